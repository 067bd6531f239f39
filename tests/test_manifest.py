"""What a run was made with: the commit of a checkout, hashes, versions."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import jax

from gemma_lora import config, manifest


def test_commit_of_an_archive(tmp_path):
    """git writes it where .gitattributes says so; a copy of the files alone has none."""
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    (tree / "launch").mkdir(parents=True)
    shutil.copy(Path(manifest.__file__).parents[1] / ".gitattributes", tree)
    (tree / "launch" / "commit.txt").write_text("$Format:%H$\n")
    assert manifest.commit(tree) is None
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    archive = ("archive", "--format=zip", f"--output={tmp_path / 'a.zip'}", "HEAD")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "one"), archive):
        subprocess.run(["git", "-C", str(tree), *names, *command], check=True)
    shutil.unpack_archive(tmp_path / "a.zip", copy)
    found = manifest.commit(copy)
    assert found and found == manifest.commit(tree)


def test_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    assert manifest.commit(tmp_path) is None

    def git(*command):
        names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *names, *command], check=True)

    git("init", "-q")
    assert manifest.commit(tmp_path) is None  # nothing is committed
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    head = (tmp_path / ".git" / "HEAD").read_text().split()[1]
    expected = (tmp_path / ".git" / head).read_text().strip()
    assert manifest.commit(tmp_path) == expected
    (tmp_path / "file").write_text("2")
    assert manifest.commit(tmp_path) == f"{expected} with changes"
    (tmp_path / "inner").mkdir()
    assert manifest.commit(tmp_path / "inner") is None  # an installed package is no checkout
    monkeypatch.setenv("PATH", "")
    assert manifest.commit(tmp_path) is None


def test_facts(tmp_path):
    c = config.default()
    c.weights, c.weights_sha256 = "model.safetensors", "AB" * 32
    c.data.path = str(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_bytes(b"{}\n")
    found = manifest.facts(c)
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert found["sha256"] == {"weights": "ab" * 32, "data.path": digest}
    assert found["versions"]["jax"] == jax.__version__
    assert found["host"]["cores"] >= 1 and found["host"]["memory_gib"] > 0
    c.weights_sha256 = ""
    assert manifest.facts(c)["sha256"]["weights"] is None
