"""hf: and kaggle: names, with the libraries' download functions replaced; no network."""

import fnmatch
import sys
import types

import common
import flax_layout
import huggingface_hub
import orbax.checkpoint as ocp
import pytest
from common import message
from huggingface_hub import constants, errors
from loading import load, load_dir, same
from tiny import write_tiny

from gemma_lora.arch import ARCHS, Arch
from gemma_lora.errors import extra
from gemma_lora.weights import hub
from gemma_lora.weights.pretrained import open_weights

NAME = "google/gemma-3-270m"


@pytest.fixture
def calls(monkeypatch):
    """Replaces snapshot_download; the list holds what it is asked, then what it is to do."""
    asked = types.SimpleNamespace(calls=[], result=None)

    def snapshot_download(repo, *, revision=None, allow_patterns):
        asked.calls.append((repo, revision, allow_patterns))
        if isinstance(asked.result, Exception):
            raise asked.result
        return str(asked.result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(("suffix", "revision"), [("", None), ("@v1.0", "v1.0")])
def test_a_model_of_the_hub(calls, tmp_path, suffix, revision):
    calls.result = write_tiny("gemma3", tmp_path / "snapshot")
    opened = open_weights(f"hf:{NAME}{suffix}", "auto")
    assert [call[:2] for call in calls.calls] == [(NAME, revision)]
    assert (opened.base_name, opened.home) == (NAME, calls.result)
    assert opened.revision == (revision or "")
    same(load(opened), load_dir(calls.result))
    text = message(open_weights, f"hf:{NAME}", "auto", "0" * 64)
    assert "weights_sha256 is given, but the weights are a directory" in text


def test_only_the_files_that_are_read_are_fetched():
    wanted = ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    wanted += ["tokenizer.model", "chat_template.jinja", "model-00001-of-00002.safetensors"]
    wanted += ["vocab.json", "merges.txt"]
    others = ["pytorch_model.bin", "flax_model.msgpack", "README.md", "gemma.gguf", "model.onnx"]
    for name in wanted + others:
        found = any(fnmatch.fnmatch(name, pattern) for pattern in hub.HF_FILES)
        assert found == (name in wanted), name


REFUSED = types.SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.GatedRepoError("403\nmore", response=REFUSED),
            f"hf:{NAME} is gated: accept the licence at https://huggingface.co/{NAME}, then run: "
            "hf auth login",
        ),
        (
            errors.RepositoryNotFoundError("404\nmore", response=REFUSED),
            f"hf:{NAME}: there is no public model https://huggingface.co/{NAME}; check the name",
        ),
        (
            errors.LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nmore"),
            f"hf:{NAME} could not be fetched (Got: ConnectError: Name or service not known); "
            f"download https://huggingface.co/{NAME} by other means and give its directory",
        ),
        (errors.HTTPError("peer closed connection"), "could not be fetched (peer closed"),
        (OSError(28, "No space left on device"), "could not be fetched ([Errno 28] No space left"),
        (errors.HfHubHTTPError("500 Server Error", response=REFUSED), "(500 Server Error)"),
    ],
)
def test_what_to_do_when_the_hub_says_no(calls, error, expected):
    calls.result = error
    assert expected in message(open_weights, f"hf:{NAME}", "auto")


def test_a_revision_that_is_not_there(calls):
    calls.result = errors.RevisionNotFoundError("404", response=REFUSED)
    text = message(open_weights, f"hf:{NAME}@v9", "auto")
    assert f"https://huggingface.co/{NAME} has no revision 'v9'" in text


def test_the_library_itself(monkeypatch, tmp_path):
    """Offline, with an empty cache; and a name that it refuses."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    text = message(open_weights, f"hf:{NAME}", "auto")
    assert "could not be fetched" in text and "by other means and give its directory" in text
    text = message(open_weights, "hf:a/b/c", "auto")
    assert text == "hf:a/b/c: expected hf:ORG/NAME or hf:ORG/NAME@revision"


# ---- Kaggle ---------------------------------------------------------------------------------

HANDLE = "google/gemma/flax/2b"


def test_kaggle_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    text = message(open_weights, f"kaggle:{HANDLE}", "auto")
    assert text.endswith(f"run: {extra('kaggle')}")


def test_a_model_of_kaggle(monkeypatch, tmp_path):
    kagglehub = common.needs("kagglehub")
    config, _ = flax_layout.CONFIGS["gemma"]
    monkeypatch.setitem(ARCHS, "tiny", Arch.from_hf(config))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "2b", flax_layout.flat("gemma"))
    monkeypatch.setattr(kagglehub, "model_download", {HANDLE: str(tmp_path)}.__getitem__)
    opened = open_weights(f"kaggle:{HANDLE}", "auto")
    assert opened.form == "flax" and opened.base_name == f"kaggle:{HANDLE}"
    same(load(opened), load(open_weights(str(tmp_path), "tiny")))


def test_what_to_do_when_kaggle_says_no(monkeypatch):
    kagglehub = common.needs("kagglehub")
    import requests
    from kagglehub.exceptions import KaggleApiHTTPError

    def say(error):
        def model_download(handle):
            raise error

        monkeypatch.setattr(kagglehub, "model_download", model_download)
        return message(open_weights, f"kaggle:{HANDLE}", "auto")

    def status(code):
        response = requests.Response()
        response.status_code = code
        return KaggleApiHTTPError(f"{code} Client Error.\n\nmore", response=response)

    page = "https://www.kaggle.com/models/google/gemma"
    for code in (401, 403):
        text = say(status(code))
        assert f"accept the licence at {page} and give Kaggle's credentials" in text
    assert f"there is no such model; look at {page}" in say(status(404))
    text = say(status(500))
    assert "could not be fetched" in text and "500 Client Error" in text and page in text
    text = say(requests.ConnectionError("no route to host"))
    assert "could not be fetched (no route to host)" in text and "by other means" in text


def test_a_name_that_kagglehub_refuses():
    common.needs("kagglehub")
    text = message(open_weights, "kaggle:google/gemma", "auto")
    assert "expected kaggle:OWNER/MODEL/flax/VARIATION, such as" in text
