"""A run whose workdir is a bucket: the same files as a local one's, and the same way on.

In place of Google's service, fsspec's file system in memory answers for gs://, with objects that
cannot be appended to. Orbax's own writing to a bucket and TensorBoard's are not part of this.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec.implementations.memory
import pytest
import tiny_run
from common import message
from etils import epath
from tensorboardX import event_file_writer, record_writer

from gemma_lora import checkpoint, evaluate, export, metrics, outliers, report, unprompted
from gemma_lora import config as configs
from gemma_lora.errors import UserError
from gemma_lora.files import path_argument, path_of, replace_directory, replace_file
from gemma_lora.workdir import claim, has_checkpoint, read_records


class Bucket(fsspec.implementations.memory.MemoryFileSystem):
    protocol = "gs"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **more):
        assert mode in ("rb", "wb"), f"an object cannot be opened for {mode}"
        return super()._open(path, mode, **more)


def with_gcsfs(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n == "gcsfs" or find(n))


@pytest.fixture
def bucket(monkeypatch) -> epath.Path:
    with_gcsfs(monkeypatch)
    storage = SimpleNamespace(Client=lambda: SimpleNamespace(get_bucket=lambda name: None))
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    files = Bucket(skip_instance_cache=True)
    backend = type(epath.backend.fsspec_backend)
    monkeypatch.setattr(backend, "_get_filesystem", lambda self, name: files)
    files.store, files.pseudo_dirs = {}, [""]
    return path_of("gs://bucket")


@pytest.fixture
def beside(bucket, monkeypatch, tmp_path) -> Path:
    """Where checkpoints and TensorBoard's files go: they do not take the memory."""
    manager, events = checkpoint.ocp.CheckpointManager, event_file_writer.EventsWriter
    make = record_writer.directory_check

    def local(path):
        return tmp_path / str(path).removeprefix("gs://")

    monkeypatch.setattr(
        checkpoint.ocp, "CheckpointManager", lambda path, **more: manager(local(path), **more)
    )
    monkeypatch.setattr(record_writer, "directory_check", lambda path: make(str(local(path))))
    monkeypatch.setattr(
        event_file_writer, "EventsWriter", lambda path, *more: events(str(local(path)), *more)
    )
    return tmp_path


def test_paths(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://b/r: Google Cloud Storage needs gcsfs"):
        path_of("gs://b/r")
    for text in ("s3://b/r", "gs:/b/r"):
        with pytest.raises(UserError, match=f"{text}: expected a local path, or gs://bucket/"):
            path_of(text)
    with pytest.raises(argparse.ArgumentTypeError, match="s3://b/r: expected a local path"):
        path_argument("s3://b/r")
    assert isinstance(path_of("a/b"), Path) and path_of("a/b") == Path("a/b")


def test_paths_in_a_bucket(bucket, monkeypatch):
    assert path_argument("gs://bucket/a") == path_of("gs://bucket/a")
    assert str(path_of("gs://bucket/a") / "b") == "gs://bucket/a/b"

    def refuse(self, path, **more):
        raise ConnectionRefusedError("no credentials\nand more")

    monkeypatch.setattr(Bucket, "exists", refuse)
    message = "^gs://bucket/a cannot be reached: ConnectionRefusedError: no credentials; .* login`$"
    with pytest.raises(UserError, match=message):
        path_of("gs://bucket/a")


def test_a_bucket_that_orbax_may_not_ask_about(bucket, monkeypatch):
    def forbidden(name):
        raise PermissionError(f"403 storage.buckets.get of {name}\nand more")

    client = SimpleNamespace(get_bucket=forbidden)
    monkeypatch.setattr(sys.modules["google.cloud.storage"], "Client", lambda: client)
    text = message(claim, bucket / "run", configs.to_dict(configs.default()), 0)
    assert "gs://bucket/run: checkpoints need storage.buckets.get of bucket" in text
    assert "PermissionError: 403 storage.buckets.get of bucket; expected a role" in text
    assert not (bucket / "run").exists()


def test_a_checkpoint_that_is_not_whole_is_none(bucket, tmp_path):
    step = bucket / "run" / "checkpoints" / "4"
    (step / "state").write_text("")
    assert not has_checkpoint(bucket / "run")
    (step / "commit_success.txt").write_text("")
    assert has_checkpoint(bucket / "run")
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert has_checkpoint(tmp_path)


def test_objects_appear_whole_or_not_at_all(bucket):
    for name in ("first", "second"):
        with replace_file(bucket / "d" / "f") as temporary:
            temporary.write_text(name)
        assert (bucket / "d" / "f").read_text() == name
    with pytest.raises(ZeroDivisionError), replace_file(bucket / "d" / "f") as temporary:
        temporary.write_text("third")
        raise ZeroDivisionError
    assert (bucket / "d" / "f").read_text() == "second"
    for names in (("a", "b"), ("c",)):
        with replace_directory(bucket / "d" / "g") as temporary:
            for name in names:
                (temporary / name).write_text(name)
        assert sorted(p.name for p in (bucket / "d" / "g").iterdir()) == sorted(names)
    with pytest.raises(ZeroDivisionError), replace_directory(bucket / "d" / "g"):
        raise ZeroDivisionError
    assert [p.read_text() for p in (bucket / "d" / "g").iterdir()] == ["c"]


def test_an_export_to_a_bucket_is_refused_before_the_run_is_read(bucket, tmp_path):
    with pytest.raises(UserError, match="--out gs://bucket/out: expected a local directory"):
        export.export(tmp_path / "nothing", "merged", bucket / "out")


def test_a_run_in_a_bucket_is_the_local_run(bucket, beside, tmp_path):
    """Interrupted, continued and mined; its data are in the bucket, too."""
    changes = {"train.ledger_every": 4, "train.save_every": 2}
    with tiny_run.quick_compilation():
        inputs = tiny_run.write_inputs(tmp_path / "inputs")
        local, there = tmp_path / "run", bucket / "runs" / "one"
        tiny_run.run(local, tiny_run.settings(inputs, changes))
        for name in ("train", "validation"):
            text = (inputs / f"{name}.jsonl").read_text()
            (bucket / f"{name}.jsonl").write_text(text)
        places = {
            "data.path": "gs://bucket/train.jsonl",
            "data.validation_path": "gs://bucket/validation.jsonl",
        }
        c = tiny_run.settings(inputs, changes | places)

        write, stop = metrics.Metrics.write, KeyboardInterrupt

        def killed(self, record, line):
            write(self, record, line)
            if (record["kind"], record["step"]) == ("train", 5):
                raise stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics.Metrics, "write", killed)
            patch.setattr(metrics.Metrics, "close", lambda self: None)  # a kill saves nothing
            with pytest.raises(stop):
                tiny_run.run(there, c)
        assert [r["step"] for r in read_records(there / "metrics.jsonl", ())[0]][-2:] == [4, 4]
        assert json.loads((there / "run.json").read_text())["status"] == "running"
        output = tiny_run.run(there, c)
        assert "continuing from the checkpoint of step 4" in output
        for workdir in (local, there):
            unprompted.run(workdir, "0")  # no checkpoint lies in the bucket
            outliers.mine(workdir, 5, None)
            report.write(workdir)

        hashes = [json.loads((w / "run.json").read_text())["sha256"] for w in (local, there)]
        assert hashes[0] == hashes[1] and hashes[0]["data.validation_path"]
        lines = [read_records(w / "metrics.jsonl", ())[0] for w in (local, there)]
        kept = [[(r["step"], r.get("loss"), r.get("validation/loss")) for r in x] for x in lines]
        assert kept[0] == kept[1] and len(kept[0]) == 8 + 5
        assert names(local) - {"checkpoints", "tensorboard", ".lock"} == names(there)
        for name in ("adapter", "ledger"):
            assert names(local / name) == names(there / name)
        for name in ("adapter/adapter_model.safetensors", "outliers.md", "review.csv"):
            assert (there / name).read_bytes() == (local / name).read_bytes(), name

        config = tiny_run.settings(inputs, places)
        found = evaluate.evaluate(config, bucket / "evaluated", there / "adapter")
        assert found == evaluate.evaluate(config, tmp_path / "evaluated", local / "adapter") | {
            "adapter": str(there / "adapter")
        }
        with pytest.raises(UserError, match="gs://bucket/runs/one belongs to a run with another"):
            tiny_run.run(there, tiny_run.settings(inputs, changes | places | {"optim.lr": 1.0}))


def names(directory) -> set[str]:
    return {p.name for p in directory.iterdir()}
