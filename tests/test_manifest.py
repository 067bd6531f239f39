"""What a run was made with: the commit of a checkout, hashes, versions."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import jax

from gemma_lora import config, manifest


def test_commit_of_an_archive(tmp_path):
    """git writes it where .gitattributes says so; a copy of the files alone has none."""
    root = Path(manifest.__file__).parents[1]
    (tmp_path / "launch").mkdir()
    shutil.copy(root / "launch" / "commit.txt", tmp_path / "launch")
    assert "launch/commit.txt export-subst" in (root / ".gitattributes").read_text()
    assert manifest.commit(tmp_path) is None
    (tmp_path / "launch" / "commit.txt").write_text("0123456789" * 4 + "\n")
    assert manifest.commit(tmp_path) == "0123456789" * 4


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
