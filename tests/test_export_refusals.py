"""Exports that are refused or fail: one message, and nothing at --out."""

import sys
from pathlib import Path

import pytest
from tiny_export import edit, write_run

from gemma_lora import export
from gemma_lora.errors import UserError, run_main
from gemma_lora.weights import mapping, peft

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path, "gemma")


def left(workdir: Path) -> list[str]:
    """Everything beside the workdir, hidden or not, that the test did not put there."""
    return [p.name for p in workdir.parent.iterdir() if p.name not in ("base", "run")]


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_main(export.main)
    return stopped.value.code, *capsys.readouterr()


def test_another_base_than_the_run_had(workdir, tmp_path):
    edit(workdir, "run.json", weights_fingerprint="0123abcd")
    with pytest.raises(UserError, match=r"these are no longer the weights of the run: got .{8}, "):
        export.export(workdir, "merged", tmp_path / "out")
    assert left(workdir) == []


def test_command_line(workdir, tmp_path, monkeypatch, capsys):
    arguments = (f"--workdir={workdir}", "--format=merged", f"--out={tmp_path / 'out'}")
    status, printed, errors = command(monkeypatch, capsys, *arguments, "--dtype=bfloat16")
    assert status == 0, errors
    assert "(limit " in printed and "rounding" in printed
    before = {f: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    status, _, errors = command(monkeypatch, capsys, *arguments)
    assert status == 2 and errors == f"error: --out {tmp_path / 'out'} exists; give a new name\n"
    assert before == {f: f.read_bytes() for f in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("adapter", {}, "run has no adapter: the run has not finished. The command that started"),
        ("config.json", {}, "run is not the workdir of a run: .*config.json is missing"),
        ("", {"form": "peft", "dtype": "float32"}, "--dtype and --max-shard-gb are for"),
        ("", {"form": "peft", "shard_gb": 0.0}, "--dtype and --max-shard-gb are for"),
        ("", {"shard_gb": 0.0}, "--max-shard-gb is 0.0, expected a positive number"),
        ("", {"shard_gb": float("nan")}, "--max-shard-gb is nan, expected a positive number"),
    ],
)
def test_what_is_refused(workdir, change, arguments, message):
    """change: a part of the workdir that is not there."""
    if change:
        (workdir / change).rename(workdir / "elsewhere")
    with pytest.raises(UserError, match=message):
        export.export(workdir, **{"form": "merged", "out": workdir.parent / "out", **arguments})
    assert not left(workdir)


def test_a_foreign_config_is_refused(workdir):
    (workdir / "config.json").write_text('{"weights": "demo"}')
    with pytest.raises(UserError, match="lacks arch, weights_sha256, tokenizer, dtype"):
        export.export(workdir, "peft", workdir.parent / "out")


def test_out_that_cannot_be_made(workdir):
    with pytest.raises(UserError, match=r"cannot be written: .*File exists"):
        export.export(workdir, "merged", workdir / "config.json" / "out")


def test_a_base_that_is_gone_is_not_blamed_on_out(workdir, monkeypatch):
    gone = str(workdir.parent / "base" / "model.safetensors")

    def reads(*arguments):
        raise FileNotFoundError(2, "No such file or directory", gone)

    monkeypatch.setattr(export, "write_merged", reads)
    with pytest.raises(FileNotFoundError):
        export.export(workdir, "merged", workdir.parent / "out")
    assert not left(workdir)


# ---- faults: nothing appears ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_broken_name_is_found(workdir, monkeypatch, capsys, form):
    """PEFT and transformers only warn of a name they do not know."""
    if form == "merged":
        right = mapping.hf_tensor

        def wrong(*arguments):
            name, x = right(*arguments)
            return name.replace("1.mlp.up_proj", "1.mlp.upp_proj"), x

        monkeypatch.setattr(export.mapping, "hf_tensor", wrong)
    else:
        to_tensors = peft.to_tensors

        def renamed(*arguments):
            return {k.replace("lora_B", "lora_b"): x for k, x in to_tensors(*arguments).items()}

        monkeypatch.setattr(peft, "to_tensors", renamed)
    arguments = (f"--workdir={workdir}", f"--format={form}", f"--out={workdir.parent / 'out'}")
    status, printed, errors = command(monkeypatch, capsys, *arguments)
    assert status == 2 and not printed
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert ("model.layers.1.mlp.upp_proj.weight" if form == "merged" else "lora_B") in errors
    assert not left(workdir)


def test_an_adapter_that_is_not_merged_is_found(workdir, monkeypatch):
    """The weights are well formed; only the logits know."""
    monkeypatch.setattr(export, "merged", lambda config, path, w, leaves: w)
    with pytest.raises(UserError, match=r"nothing was exported: logits .* expected at most"):
        export.export(workdir, "merged", workdir.parent / "out", "bfloat16")
    assert not left(workdir)


def flip_a_bit(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "a tensor did not read back the same"),
        (lambda d: edit(d, "config.json", rope_theta=20_000.0), "config.json did not"),
        (lambda d: edit(d, "tokenizer_config.json", add_bos_token=False), "the tokenizer did not"),
    ],
)
def test_damaged_files_are_found(workdir, monkeypatch, damage, message):
    write = export.write_merged

    def damaged(tuned, directory, *arguments):
        sums = write(tuned, directory, *arguments)
        damage(directory)
        return sums

    monkeypatch.setattr(export, "write_merged", damaged)
    with pytest.raises(UserError, match=message):
        export.export(workdir, "merged", workdir.parent / "out")
    assert not left(workdir)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_killed_halfway(workdir, monkeypatch, stop):
    """At no moment is there anything at --out, so no kill can leave a part of it."""
    out, calls, right = workdir.parent / "out", [], export.merged

    def stopping(*arguments):
        assert not out.exists()
        calls.append(arguments)
        if len(calls) == 10:
            raise stop
        return right(*arguments)

    monkeypatch.setattr(export, "merged", stopping)
    with pytest.raises((KeyboardInterrupt, UserError), match=r"No space left|^$"):
        export.export(workdir, "merged", out)
    assert len(calls) == 10 and not left(workdir)
