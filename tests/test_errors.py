"""What a command says when something is wrong, and what it leaves: one line, and whole files."""

import os
import pathlib
import signal

import jax
import pytest
from common import message

from gemma_lora import errors, files, gradients
from gemma_lora.interrupt import Interrupt


def entries(path: pathlib.Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


# ---- the command line -----------------------------------------------------------------------


def parsed(*arguments: str):
    parser = errors.Parser("gemma_lora.x", "What it is.", elsewhere=("--coordinator",))
    parser.add_argument("--workdir", required=True, type=files.path_argument)
    parser.add_argument("--folds", type=int, default=2)
    return parser.parse_args(arguments)


def test_the_parser_takes_what_argparse_takes():
    options = parsed("--workdir=a", "--folds", "-3")
    assert (options.workdir, options.folds) == (pathlib.Path("a"), -3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--worksdir", "a"), "--worksdir is unknown, did you mean --workdir, "),
        (("--workdir", "a", "--fold=3"), "--fold is unknown, did you mean --folds, "),
        ((), "required: --workdir"),
        (("--workdir", "a", "--folds", "x"), "argument --folds: invalid int value: 'x'"),
        (("--workdir", ""), "argument --workdir: expected a path, got ''"),
        (("--workdir", "a", "b"), "unrecognized arguments: b"),
        (
            ("--workdir", "a", "--coordinatr", "b"),
            "did you mean --coordinator, --workdir?",
        ),
        (("--workdir", "a", "--", "b"), "unrecognized arguments: -- b"),
    ],
)
def test_the_parser_says_what_is_wrong_in_one_line(arguments, words):
    text = message(parsed, *arguments)
    assert text.startswith("command line: ") and words in text


def test_help_is_the_docstring_as_it_stands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gradients", "--help"])
    with pytest.raises(SystemExit) as end:
        gradients.main()
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert told.startswith("usage: python -m gemma_lora.gradients ")
    assert gradients.__doc__.strip() in told


# ---- how a command ends ---------------------------------------------------------------------


def ended(raised: BaseException | None) -> int:
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as end:
        errors.run_main(main)
    return end.value.code


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "/not/there"),
         "error: /not/there: No such file or directory\n"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nstack"),
         "error: the memory of a device does not suffice: RESOURCE_EXHAUSTED: 9 GiB; "),
        (MemoryError("Unable to allocate 9 GiB"),
         "error: the memory of this host does not suffice: Unable to allocate 9 GiB\n"),
        (MemoryError(), "error: the memory of this host does not suffice: no more was given\n"),
        (errors.UserError("seed is 2"), "error: seed is 2\n"),
        (OSError(122, "Disk quota exceeded"), "error: Disk quota exceeded\n"),
    ],
)  # fmt: skip
def test_what_the_system_or_a_device_says_is_one_line(capsys, raised, said):
    assert ended(raised) == 2
    told = capsys.readouterr().err
    assert told.startswith(said) and told.count("\n") == 1


@pytest.mark.parametrize(
    "raised", [OSError(104, "Connection reset by peer"), RuntimeError("INTERNAL"), KeyError("x")]
)
def test_a_fault_of_the_program_keeps_its_traceback(raised):
    with pytest.raises(type(raised)) as e:
        errors.run_main(lambda: (_ for _ in ()).throw(raised))
    assert e.value is raised


def test_exit_status(capsys):
    assert ended(None) == 0
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_first_signal_asks_and_the_second_ends(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked
        assert capfd.readouterr().err == ("\nstopping after this step; once more to stop at once\n")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ---- files ----------------------------------------------------------------------------------


def test_require_writable(tmp_path):
    files.require_writable(tmp_path / "new" / "x")
    assert entries(tmp_path) == []
    assert "is a directory, expected the name" in message(files.require_writable, tmp_path)
    (tmp_path / "file").touch()
    text = message(files.require_writable, tmp_path / "file" / "x")
    assert "cannot be written: this user may not make files in" in text


def test_no_home_directory():
    assert "~nobody-here/x" in message(files.path_of, "~nobody-here/x")


def test_replace_directory_keeps_the_old_one_when_it_fails(tmp_path, monkeypatch):
    path, replace = tmp_path / "x", os.replace
    for text in ("old", "new"):
        with files.replace_directory(path) as temporary:
            (temporary / text).touch()
    with pytest.raises(KeyError), files.replace_directory(path):
        raise KeyError
    assert entries(path) == ["new"] and entries(tmp_path) == ["x"]

    def refuse(source, target):
        if target == path and not str(source).endswith(".old"):
            raise error
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.replace_directory(path):
            pass
        assert entries(path) == ["new"] and entries(tmp_path) == ["x"]


def test_replace_file_keeps_the_old_one_when_the_block_fails(tmp_path):
    path = tmp_path / "new" / "x"
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.replace_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and entries(path.parent) == ["x"]


def test_what_is_written_has_the_rights_of_any_new_file(tmp_path):
    """Of mkstemp and mkdtemp they would be the owner's alone."""
    (tmp_path / "usual").touch()
    (tmp_path / "usual_directory").mkdir()
    files.write_text(tmp_path / "x", "text")
    with files.replace_directory(tmp_path / "d") as temporary:
        (temporary / "y").touch()
    mode = {p.name: p.stat().st_mode for p in tmp_path.iterdir()}
    assert mode["x"] == mode["usual"] and mode["d"] == mode["usual_directory"]
