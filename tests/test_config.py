"""Config files, the command line, the workdir: every mistake is one clear line."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from common import message
from ml_collections import ConfigDict

from gemma_lora import config as configs
from gemma_lora import files, workdir
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.optim import SCHEDULES
from gemma_lora.sharding import AXES

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))


# ---- the keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_file_builds(path):
    scope = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    config = scope["get_config"]()
    configs.check(config)
    LoRAConfig(**config.lora)
    assert json.loads(json.dumps(configs.to_dict(config))) == configs.to_dict(config)


def test_there_are_config_files():
    assert ROOT / "configs" / "quickstart.py" in FILES
    configs.check(configs.default())


def test_every_key_is_read_by_something():
    def last(node: ast.AST) -> str | None:  # 'c' of a.b.c, of a.b["c"], and of c
        if isinstance(node, ast.Subscript):
            return getattr(node.slice, "value", None)
        return getattr(node, "attr", None) or getattr(node, "id", None)

    package = [p for p in (ROOT / "gemma_lora").rglob("*.py") if p.name != "config.py"]
    nodes = [n for p in package for n in ast.walk(ast.parse(p.read_text()))]
    read = {
        (last(n.value), last(n))
        for n in nodes
        if isinstance(n, ast.Attribute | ast.Subscript) and isinstance(n.ctx, ast.Load)
    }
    known = {f"lora.{f}" for f in LoRAConfig.__dataclass_fields__}
    known |= {f"mesh.{a}" for a in AXES} | {f"head.{f}" for f in Sweep._fields}
    keys = set(configs.flat(configs.to_dict(configs.default())))
    assert {k for k in keys if k.startswith(("lora.", "mesh.", "head."))} == known
    # config.data.limit, or data.limit where `data = config.data`; config["data"]["limit"]
    assert not {k for k in keys - known if tuple(f"config.{k}".split(".")[-2:]) not in read}


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("dtype", "float16", "NaN; expected bfloat16 or float32"),
        ("dtype", "int8", "expected bfloat16 or float32"),
        ("seed", -1, "at least 0"),
        ("head.chunk", 0, "at least 1"),
        ("head.floor", 1.0, "below 1"),
        ("data.seq_len", 1, "at least 2"),
        ("data.batch_size", 0, "at least 1"),
        ("data.batch_size", 3, "not a multiple of train.micro_batches 2"),
        ("data.limit", -1, "at least 0"),
        ("data.labels", (0, 1), "expected different words"),
        ("data.labels", ("good", "good"), "expected different words"),
        ("data.buckets", (64, 32), "rising whole numbers from 2 to below data.seq_len 256"),
        ("data.buckets", (64, 64), "rising"),
        ("data.buckets", (1,), "rising"),
        ("data.buckets", (256,), "rising"),
        ("data.buckets", ("64",), "rising"),
        ("data.validation_fraction", 0.0, "(0, 1)"),
        ("data.validation_fraction", 1.0, "(0, 1)"),
        ("optim.lr", 0.0, "positive"),
        ("optim.lr", float("nan"), "finite"),
        ("optim.lr", float("inf"), "finite"),
        ("train.eval_every", float("inf"), "finite"),
        ("seed", 2**32, "less than 2**32"),
        ("data.batch_size", True, "expected a int"),
        ("optim.b_lr_ratio", 0.0, "positive"),
        ("optim.clip", -1.0, "at least 0"),
        ("optim.weight_decay", -0.1, "at least 0"),
        ("optim.warmup_steps", -1, "at least 0"),
        ("head.floor", -0.1, "at least 0"),
        ("train.eval_examples", -1, "at least 0"),
        ("train.ledger_every", -0.5, "at least 0"),
        ("train.epochs", 0, "train.max_steps"),
        ("train.max_steps", -5, "at least 0"),
        ("train.micro_batches", 0, "at least 1"),
        ("train.save_every", 0, "at least 1"),
        ("train.eval_every", 0.0, "positive"),
        ("train.eval_every", 1.5, "a whole number"),
        ("train.patience", -1, "at least 0"),
        ("arch", "gemma_2", "did you mean gemma_2b, gemma2_2b"),
        ("weights", "", "such as 'demo'"),
        ("remat", "matmul", "did you mean matmuls? (valid: full, matmuls, none, offload)"),
        ("attention", "splsh", "did you mean splash? (valid: auto, block, cudnn, reference"),
        ("quantize", "int4", "did you mean int8? (valid: '', int8)"),
        (
            "optim.schedule",
            "cosin",
            f"did you mean cosine? (valid: {', '.join(sorted(SCHEDULES))})",
        ),
        ("data.loss_on", "answer", "(valid: all, completion)"),
        ("data.seq_len", 2**31, "at most 2147483647"),
        ("data.limit", 2**31, "at most 2147483647"),
        ("train.max_steps", 10**20, "at most 2147483647"),
    ],
)
def test_values_no_run_can_use(key, value, hint):
    c = configs.default()
    c.train.micro_batches = 2
    configs.check(c)
    c.update_from_flattened_dict({key: value})
    text = message(configs.check, c)
    assert key in text and hint in text and str(value) in text


def test_buckets_are_not_for_packed_rows():
    c = configs.default()
    c.data.buckets, c.data.pack = (64, 128), True
    assert "data.buckets is (64, 128) and data.pack is True" in message(configs.check, c)
    c.data.pack = False
    configs.check(c)


def test_unknown_and_missing_keys():
    c = configs.default()
    c.data.seqlen = 3
    text = message(configs.check, c)
    assert "'data.seqlen' is unknown" in text and "did you mean data.seq_len" in text
    c = configs.default()
    del c.optim.clip
    assert "lacks optim.clip" in message(configs.check, c)
    assert "lacks" in message(configs.check, ConfigDict())


def test_differences():
    a = configs.to_dict(configs.default())
    b = json.loads(json.dumps(a))
    assert configs.differences(a, b) == []
    b["lora"]["rank"], b["new"] = 16, 1
    assert configs.differences(a, b) == ["lora.rank: 8 here, 16 there", "new: None here, 1 there"]


# ---- the command line -----------------------------------------------------------------------

QUICK = ("--config", "configs/quickstart.py")


def parse(monkeypatch, *arguments):
    """parse_flags as a fresh process would run it; --workdir stands for a program's own flag."""
    from absl import flags

    values = flags.FlagValues()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the last test's file
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    return configs.parse_flags(("config", "workdir"))


def test_values_from_the_command_line(monkeypatch):
    more = ("--config.lora.rank=3", "--config.optim.lr", "1e-3", "--noconfig.data.pack")
    c = parse(monkeypatch, *QUICK, "--workdir=x", *more, "--config.data.labels=('no','yes')")
    assert (c.lora.rank, c.optim.lr, c.data.pack) == (3, 1e-3, False)
    assert tuple(c.data.labels) == ("no", "yes") and c.data.batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ((*QUICK, "--config.lorra.rank=3"), ["'lorra.rank' is unknown", "did you mean lora.rank"]),
        ((*QUICK, "--config.batch_size=3"), ["'batch_size'", "did you mean data.batch_size"]),
        ((*QUICK, "--noconfig.data.pak"), ["'data.pak'", "did you mean data.pack"]),
        ((*QUICK, "--config.lora.rank=abc"), ["lora.rank is 'abc', expected a whole number"]),
        ((*QUICK, "--config.lora.rank", "1.5"), ["lora.rank is '1.5', expected a whole number"]),
        ((*QUICK, "--config.optim.lr=fast"), ["optim.lr is 'fast', expected a number"]),
        ((*QUICK, "--config.data.pack=maybe"), ["data.pack is 'maybe', expected True or False"]),
        ((*QUICK, "--config.lora=3"), ["--config.lora=3"]),
        ((*QUICK, "--config.dtype=float16"), ["dtype 'float16': Gemma overflows"]),
        ((*QUICK, "--workdri=y"), ["'workdri'", "workdir"]),
        ((*QUICK, "stray"), ["'stray' is no flag"]),
        (("--config.lora.rank=3",), ["--config must be given"]),
        (("--config", "configs/quickstat.py"), ["'configs/quickstat.py' does not exist",
                                                "did you mean configs/quickstart.py"]),
        (("--config=quickstart",), ["did you mean configs/quickstart.py"]),
        (("--config=configs",), ["'configs' does not exist"]),
        (("--config",), ["config file '' does not exist"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(monkeypatch, arguments, hints):
    text = message(parse, monkeypatch, "--workdir=x", *arguments)
    for hint in hints:
        assert hint in text


def test_what_must_be_given(monkeypatch):
    assert "--config must be given" in message(parse, monkeypatch, "--workdir=x")
    assert "--workdir must be given" in message(parse, monkeypatch, *QUICK)


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("c.lora.rank = unknown", ", line 5: NameError: name 'unknown' is not defined"),
        ("c.lora.rank = '8'", ", line 5: TypeError: Could not override field 'rank'"),
        ("c.lora.rank = int('x')", ", line 5: ValueError: invalid literal"),
        ("c.lora.rank = (", ", line 5: SyntaxError"),
        ("raise UserError('too hot')", ", line 5: UserError: too hot"),
        ("open('/no/file')", ", line 5: FileNotFoundError: [Errno 2] No such file"),
        ("c.lora.rnk = 8", "'lora.rnk' is unknown, did you mean lora.rank"),
        ("return 3", "get_config() gave 3"),
        ("return None", "get_config() gave None"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, monkeypatch, body, hint):
    path = tmp_path / "mine.py"
    lines = ["from gemma_lora.config import default", "from gemma_lora.errors import UserError"]
    lines += ["def get_config():", "    c = default()", f"    {body}", "    return c"]
    path.write_text("\n".join(lines))
    text = message(parse, monkeypatch, "--workdir=x", f"--config={path}")
    assert hint in text and (str(path) in text or "config key" in text)


def test_a_config_file_without_get_config(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1\n")
    text = message(parse, monkeypatch, "--workdir=x", f"--config={tmp_path / 'mine.py'}")
    assert "mine.py has no function get_config()" in text


def test_a_config_file_that_is_no_text(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_bytes(b"\0\1\2")
    text = message(parse, monkeypatch, "--workdir=x", f"--config={path}")
    assert f"config file {path} is not Python: source code" in text


def test_a_process_prints_one_line_and_exits_with_2(tmp_path):
    flags = [*QUICK, "--config.lorra.rank=3", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "gemma_lora.train", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "did you mean lora.rank" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- the workdir ----------------------------------------------------------------------------

PLAIN = configs.to_dict(configs.default())


def other(**changes):
    c = json.loads(json.dumps(PLAIN))
    c["lora"] |= changes
    return c


def entries(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_claim_and_claim_again(tmp_path):
    run = tmp_path / "a" / "b"
    assert workdir.claim(run, PLAIN, 1) is False
    assert entries(run) == ["config.json"]
    assert json.loads((run / "config.json").read_text()) == PLAIN
    # A start that failed before its first checkpoint, say for a mistyped path, does not bind.
    assert workdir.claim(run, other(rank=16), 1) is False
    assert json.loads((run / "config.json").read_text())["lora"]["rank"] == 16
    (run / "checkpoints").mkdir()  # as one that ran out of memory while compiling leaves it
    assert workdir.claim(run, PLAIN, 1) is True
    assert workdir.claim(run, other(rank=16), 1) is True


@pytest.mark.parametrize("left", ["checkpoints/0", "run.json"])
def test_what_a_run_saved_binds(tmp_path, left):
    workdir.claim(tmp_path, PLAIN, 1)
    (tmp_path / left).mkdir(parents=True)
    assert workdir.claim(tmp_path, PLAIN, 1) is True
    assert "lora.rank: 16 here, 8 there" in message(workdir.claim, tmp_path, other(rank=16), 1)


def test_another_config_names_its_keys(tmp_path):
    workdir.claim(tmp_path, PLAIN, 1)
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    text = message(workdir.claim, tmp_path, other(rank=16, alpha=1.0), 1)
    assert "lora.rank: 16 here, 8 there" in text and "lora.alpha: 1.0 here, 16.0 there" in text
    assert "dropout" not in text and str(tmp_path) in text
    assert json.loads((tmp_path / "config.json").read_text()) == PLAIN


MODEL = '{"model_type": "gemma"}'  # a model's directory has a config.json, too


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("broken", ["", "{", "[]", "3", MODEL])
def test_a_broken_or_foreign_config_json(tmp_path, broken, begun):
    if begun:
        (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(broken)
    text = message(workdir.claim, tmp_path, PLAIN, 1)
    assert "config.json is not" in text and "--workdir" in text
    assert (tmp_path / "config.json").read_text() == broken


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "not empty and holds no run" in message(workdir.claim, tmp_path, PLAIN, 1)
    assert entries(tmp_path) == ["thesis.tex"]


HOLD = """
import json, sys
from gemma_lora import workdir
import pathlib
workdir.claim(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), 1)
print("claimed", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    """The same command twice; the lock goes with its process, even one that is killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), json.dumps(PLAIN)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"claimed\n"
        assert "another process trains in workdir" in message(workdir.claim, tmp_path, PLAIN, 1)
        first.kill()
    workdir.claim(tmp_path, PLAIN, 1)
    workdir.claim(tmp_path, PLAIN, 1)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
        assert second.wait() != 0
    workdir.release()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as third:
        assert third.stdout.readline() == b"claimed\n"
        third.kill()


def test_copies_in_the_ledger_do_not_count(tmp_path):
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    for name in ("eval_000020", "eval_000003", "seen_000004", "eval_000020 (1)", "my_notes"):
        (ledger / f"{name}.parquet").touch()
    assert [*workdir.ledger_files(tmp_path, "eval")] == [3, 20]
    workdir.forget_after(tmp_path, 3)
    assert entries(ledger) == ["eval_000003.parquet", "eval_000020 (1).parquet", "my_notes.parquet"]


def test_hidden_files_are_no_run(tmp_path):
    (tmp_path / ".config.json.abc").touch()  # a write that was cut off
    assert workdir.claim(tmp_path, PLAIN, 1) is False


def test_unusable_places(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert f"{file} is a file, expected a directory" in message(workdir.claim, file, PLAIN, 1)
    text = message(workdir.claim, file / "run", PLAIN, 1)
    assert "cannot be used: Not a directory" in text
    assert entries(tmp_path) == ["file"]


def test_too_little_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = message(workdir.claim, tmp_path / "run", PLAIN, 64 * 2**20)
    assert "5 MiB free" in text and "64 MiB" in text
    assert entries(tmp_path / "run") == []


def test_what_is_no_workdir_of_a_run(tmp_path):
    """Not there, without a config, or with another program's: a run beside it may be meant."""
    for name in ("run_1", "run_1_merged", "other", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "empty" / "config.json").unlink()
    (tmp_path / "run_1" / "run.json").touch()
    workdir.require(tmp_path / "run_1")
    assert workdir.read_config(tmp_path / "run_1", ("data.seq_len", "optim.lr", "dtype")) == PLAIN
    text = message(workdir.require, tmp_path / "run1")
    assert text == (
        f"{tmp_path / 'run1'} is not the workdir of a run: there is no such directory; did you "
        "mean run_1? (valid: run_1)"
    )
    text = message(workdir.require, tmp_path / "empty")
    assert f"{tmp_path / 'empty' / 'config.json'} is missing" in text
    for config, words in (
        ({"data": {}}, "is not the config of a run: it lacks data.seq_len, optim.lr, dtype"),
        (PLAIN | {"data": 3}, "is not the config of a run: it lacks data.seq_len"),
        (PLAIN | {"data": {"seq_len": "3"}}, "is damaged: data.seq_len is '3', expected a int"),
        (PLAIN | {"dtype": None}, "is damaged: dtype is None, expected a str"),
        ([3], "is damaged: expected objects"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        keys = ("data.seq_len", "optim.lr", "dtype")
        text = message(workdir.read_config, tmp_path / "other", keys)
        assert words in text and str(tmp_path / "other" / "config.json") in text


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    text = message(workdir.claim, tmp_path, PLAIN, 1)
    assert "cannot be used: No space left on device" in text
    assert entries(tmp_path) == []
