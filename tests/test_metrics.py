"""What a run tells: TensorBoard's events, and that they never stop a run."""

import os
import struct

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gemma_lora import metrics


def events(directory) -> list[Event]:
    """Of all files: records of a length, its checksum, an event and its checksum."""
    found = []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def record(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1.5 * step, "nan": float("nan"), "eval/x": 1}


def write(workdir, start, steps) -> metrics.Metrics:
    told = metrics.Metrics(workdir, start, 10)
    for step in steps:
        told.write(record(step), f"step {step}")
    told.save()
    return told


def test_events(tmp_path):
    write(tmp_path, None, [1, 2]).close()
    first, start, *scalars = events(tmp_path / "tensorboard")
    assert first.file_version and (start.step, start.session_log.status) == (0, SessionLog.START)
    values = {(v.tag, e.step): v.simple_value for e in scalars for v in e.summary.value}
    assert values == {("train/loss", 1): 1.5, ("eval/x", 1): 1.0,
                      ("train/loss", 2): 3.0, ("eval/x", 2): 1.0}  # fmt: skip
    # A later start takes back what comes again.
    write(tmp_path, 1, [2]).close()
    starts = [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert sorted(starts) == [0, 2]


@pytest.mark.parametrize("name", ["flush", "write_event"])
def test_an_error_ends_the_events_and_not_the_run(tmp_path, monkeypatch, capsys, name):
    told = metrics.Metrics(tmp_path, None, 100)

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, name, fails)
        told.save()
        told.write(record(1), "step 1")
    for step in range(2, 60):
        told.write(record(step), f"step {step}")
    told.close()
    out = capsys.readouterr().out
    assert out.count("TensorBoard's events end here: OSError: [Errno 28] No space left") == 1
    lines = metrics.read_records(tmp_path / "metrics.jsonl", ())[0]
    assert [r["step"] for r in lines] == list(range(1, 60))
    assert len(events(tmp_path / "tensorboard")) <= 2


def test_no_directory_for_the_events(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    write(tmp_path, None, [1]).close()
    assert "TensorBoard's events end here: " in capsys.readouterr().out


def test_a_record_is_on_the_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(metrics.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    told = write(tmp_path, None, [1, 2])
    synced.clear()
    told.save()
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced
    told.close()


def test_an_eval_that_is_due_comes_again(tmp_path):
    told = write(tmp_path, None, [1, 2])
    told.write({"kind": "eval", "step": 2}, "eval")
    told.close()
    for due, kinds in ((False, ["train", "train", "eval"]), (True, ["train", "train"])):
        metrics.Metrics(tmp_path, 2, 10, eval_due=due).close()
        kept = metrics.read_records(tmp_path / "metrics.jsonl", ())[0]
        assert [r["kind"] for r in kept] == kinds
