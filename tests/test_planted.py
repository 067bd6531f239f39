"""The benchmark of outlier scores: what it plants, and what a whole run of it leaves."""

import json
import pathlib
import re

import noise
import numpy as np
import planted
import pyarrow
import pyarrow.parquet
import pytest

from gemma_lora.config import default, flat, to_dict
from gemma_lora.errors import UserError

MATHS = ("swap", "final", "step", "annotation")
FIELD = {"flip": "label", "truncate": "output", "swap_response": "output"} | dict.fromkeys(
    MATHS, "answer"
)


def maths(n: int = 60) -> list[noise.Row]:
    """Rows in the form of GSM8K; every third has no annotation."""
    out = []
    for i in range(n):
        a, b = i + 2, 1000 + i
        steps = (
            f"She has {a}*{b} = $<<{a}*{b}={a * b}>>{a * b:,}.\nThat is all." if i % 3 else "All."
        )
        row = {"id": f"maths-{i}", "question": f"{a} times {b}?"}
        out.append({**row, "answer": f"{steps}\n#### {a * b:,}"})
    return out


def reviews(n: int = 40) -> list[noise.Row]:
    return [{"id": f"r-{i}", "text": f"film {i}", "label": i % 2} for i in range(n)]


def tasks(n: int = 40) -> list[noise.Row]:
    """Every fourth response is one word."""
    words = ["a", "b\n", "c", "d", "e", "f", "g", "h", "i", "j"]
    text = lambda i: " ".join([*words, str(i)]) if i % 4 else f"yes{i}"  # noqa: E731
    return [{"id": f"t-{i}", "instruction": f"do {i}", "output": text(i)} for i in range(n)]


ROWS = {"flip": reviews, "truncate": tasks, "swap_response": tasks} | dict.fromkeys(MATHS, maths)


def changed(kind: str, seed: int = 0, share: float = 0.2) -> list[tuple[noise.Row, noise.Row]]:
    """(before, after) of the rows planted; checks that only they and only their field differ."""
    rows = ROWS[kind]()
    copy = json.loads(json.dumps(rows))
    new, found = noise.plant(rows, kind, share, seed)
    assert rows == copy  # pure
    assert [r["id"] for r in new] == [r["id"] for r in rows]
    pairs = [(a, b) for a, b in zip(rows, new, strict=True) if a != b]
    assert {b["id"]: kind for _, b in pairs} == found
    assert len(found) == round(share * len(rows))
    for a, b in pairs:
        assert {k for k in a if a[k] != b[k]} == {FIELD[kind]}
    return pairs


@pytest.mark.parametrize("kind", ROWS)
def test_planting_follows_the_seed(kind):
    assert changed(kind, 3) == changed(kind, 3)
    assert changed(kind, 3) != changed(kind, 4)


def test_flip():
    assert all(b["label"] == 1 - a["label"] for a, b in changed("flip"))
    words = [{"id": str(i), "label": "positive"} for i in range(4)]
    assert [r["label"] for r in noise.plant(words, "flip", 1.0, 0)[0]] == ["negative"] * 4


@pytest.mark.parametrize("kind", ["swap", "swap_response"])
def test_exchange(kind):
    pairs = changed(kind)
    before, after = ([p[i][FIELD[kind]] for p in pairs] for i in (0, 1))
    assert sorted(before) == sorted(after)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_equal_fields_are_not_exchanged():
    rows = [{"id": str(i), "answer": "yes" if i < 3 else f"no {i}"} for i in range(8)]
    for seed in range(10):
        assert all(
            a != b for a, b in zip(rows, noise.plant(rows, "swap", 1.0, seed)[0], strict=True)
        )
    with pytest.raises(UserError, match="too few different"):
        noise.plant([{"id": str(i), "answer": "yes"} for i in range(8)], "swap", 1.0, 0)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_final_is_off_by_one_and_nothing_else():
    moves = set()
    for a, b in changed("final", share=0.5):
        (start, x), (same, y) = (r["answer"].split("#### ") for r in (a, b))
        assert start == same
        assert (number(x) >= 1000) == ("," in y)
        moves.add(number(y) - number(x))
    assert moves == {-1, 1}


@pytest.mark.parametrize("kind", ["step", "annotation"])
def test_calculator(kind):
    form = re.compile(r"(.*=)(\d+)(>>)([\d,]+)(\..*)", re.DOTALL)
    moves = set()
    for a, b in changed(kind, share=0.5):
        old, new = (form.fullmatch(r["answer"]).groups() for r in (a, b))
        assert (old[0], old[2], old[4]) == (new[0], new[2], new[4])  # ####, too, is left
        moves.add(number(new[1]) - number(old[1]))
        assert number(new[3]) == number(new[1] if kind == "step" else old[3])
        assert ("," in new[3]) == (number(new[3]) >= 1000)
    assert moves == {-1, 1}


def test_calculator_takes_decimals_and_only_a_step_that_its_text_repeats():
    def one(answer: str, kind: str) -> str:
        return noise.plant([{"id": "a", "answer": answer}], kind, 1.0, 0)[0][0]["answer"]

    assert one("is <<1*2.5=2.5>>2.5 km", "step") in (
        "is <<1*2.5=3.5>>3.5 km",
        "is <<1*2.5=1.5>>1.5 km",
    )
    assert one("is <<1/2=.5>> a half", "annotation") in (
        "is <<1/2=1.5>> a half",
        "is <<1/2=-0.5>> a half",
    )
    with pytest.raises(UserError, match="0 can be it"):
        one("is <<1/2=.5>>50 %", "step")


def test_truncate():
    shares = []
    for a, b in changed("truncate", share=0.5):
        assert a["output"].startswith(b["output"]) and b["output"][-1].strip()
        assert a["output"][len(b["output"])].isspace()  # at the end of a word
        shares.append(len(b["output"].split()) / len(a["output"].split()))
    assert min(shares) >= 1 / 11 and max(shares) <= 0.6 and len(set(shares)) > 1


def test_several_kinds_on_disjoint_rows():
    rows = maths()
    new, found = noise.plant_all(rows, dict.fromkeys(MATHS, 0.1), 0)
    assert {k: list(found.values()).count(k) for k in MATHS} == dict.fromkeys(MATHS, 6)
    assert {b["id"] for a, b in zip(rows, new, strict=True) if a != b} == found.keys()


@pytest.mark.parametrize(
    ("kind", "share", "match"),
    [("swp", 0.1, "did you mean swap"), ("final", 0.001, "is 0"), ("step", 0.9, "40 can be it")],
)
def test_what_cannot_be_planted(kind, share, match):
    with pytest.raises(UserError, match=match):
        noise.plant(maths(), kind, share, 0)


# ---- a whole benchmark, with runs that only leave what it reads ----------------------------------


class Runs:
    """In place of the processes: leaves files as a run would, and remembers what was started."""

    def __init__(self):
        self.started: list[tuple[str, dict[str, str]]] = []

    def command(self, home, module, *arguments):
        (home / "seconds.json").write_text(json.dumps({module: 1.0}))
        flags = dict(a.removeprefix("--config.").split("=", 1) for a in arguments if "=" in a)
        workdir = home / "run"
        if module == "train":
            workdir = home / arguments[arguments.index("--workdir") + 1]
            self.train(workdir, flags)
        elif module == "unprompted":
            (workdir / "unprompted.parquet").touch()
        else:
            (workdir / "folds").mkdir()
            (workdir / "folds" / "scores.parquet").touch()
        self.started.append((f"{module} {home.name}/{workdir.name}", flags))

    def train(self, workdir, flags):
        assert flags.keys() <= flat(to_dict(default())).keys()
        ledger = workdir / "ledger"
        ledger.mkdir(parents=True)
        texts, losses = [], []
        for split, path in (("train", "data.path"), ("validation", "data.validation_path")):
            for row in map(json.loads, pathlib.Path(flags[path]).read_text().splitlines()):
                text = f"Q: {row['question']}\nA: {row['answer']}"
                where = {"id": row["id"], "split": split}
                texts.append({**where, "text": text, "completion": text.index("A: ") + 3,
                              "end": len(text),
                              "length": 9, "prompt_targets": 0, "label": -1})  # fmt: skip
                better = workdir.name == "without_top"
                losses.append({**where, "tokens": 10, "nll": 10.0 - better, "correct": 1})
        for name, rows in (("examples", texts), ("eval_000004", losses)):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), ledger / f"{name}.parquet")
        (workdir / "run.json").write_text(json.dumps({"status": "finished", "best_step": 4}))


def fake_score(workdir):
    """'combined' knows what was planted, 'loss' half of it, 'fold_label' nothing at all."""
    where = json.loads((workdir.parent / "planted.json").read_text())
    lines = (workdir.parent / "data.jsonl").read_text().splitlines()
    ids = np.array(sorted(json.loads(line)["id"] for line in lines), object)
    hit, rng = np.array([i in where for i in ids]), np.random.default_rng(0)
    scores = {"combined": hit + rng.random(len(ids)), "fold_label": np.full(len(ids), np.nan)}
    scores |= {"base_loss": rng.random(len(ids)), "loss": hit + 2 * rng.random(len(ids))}
    return {"id": ids, "tokens": np.arange(len(ids)), **scores}


@pytest.fixture
def runs(monkeypatch):
    found = Runs()
    monkeypatch.setattr(planted, "_command", found.command)
    monkeypatch.setattr(planted.outliers, "score", fake_score)
    return found


def arguments(tmp_path, *more: str) -> list[str]:
    data = tmp_path / "maths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in maths()))
    usual = ["--kinds", "swap:0.1", "final:0.1", "--rows", "50", "--validation", "10"]
    usual += ["--config", "configs/quickstart.py", "--data", str(data), "--seeds", "0", "1"]
    return [str(tmp_path / "out"), *usual, *more]


def test_a_whole_benchmark(tmp_path, runs, capsys):
    more = ("--set", "data.seq_len=128", "--natural", "3", "--consequence")
    planted.main(arguments(tmp_path, *more))
    out = tmp_path / "out"
    assert [name for name, _ in runs.started] == [
        "train seed-0/run",
        "folds seed-0/run",
        "train seed-0/without_top",
        "train seed-0/without_random",
        "train seed-1/run",
        "folds seed-1/run",
    ]
    flags = [f for name, f in runs.started if name.startswith("train")]
    assert all(f["data.seq_len"] == "128" for f in flags)
    assert [f["train.ledger_every"] for f in flags] == ["0.5", "0.0", "0.0", "0.5"]
    assert [f["seed"] for f in flags] == ["0", "0", "0", "1"]

    clean = {row["id"]: row for row in maths()}
    validation = [json.loads(x) for x in (out / "validation.jsonl").read_text().splitlines()]
    assert len(validation) == 10 and all(clean[r["id"]] == r for r in validation)
    chosen = []
    for seed in (0, 1):
        home = out / f"seed-{seed}"
        rows = [json.loads(x) for x in (home / "data.jsonl").read_text().splitlines()]
        where = json.loads((home / "planted.json").read_text())
        assert {r["id"] for r in rows if r != clean[r["id"]]} == where.keys()
        assert sorted(where.values()) == ["final"] * 5 + ["swap"] * 5
        assert not {r["id"] for r in validation} & {r["id"] for r in rows}
        chosen.append([r["id"] for r in rows])
    assert chosen[0] == chosen[1]  # other noise, the same rows

    results = json.loads((out / "results.json").read_text())
    assert results["kinds"].keys() == {"swap", "final"}
    for scores in results["kinds"].values():
        assert {"random", "tokens", "short", "base_loss"} < scores.keys()
        assert scores["combined"]["auroc"] == {"mean": 1, "interval": [1, 1], "seeds": [1, 1]}
        assert scores["tokens"]["auroc"]["mean"] == 1 - scores["short"]["auroc"]["mean"]
        assert scores["fold_label"]["auroc"]["mean"] == 0.5
        assert scores["fold_label"]["missing"] == [45, 45]
    removed = results["consequence"]
    assert removed["removed"] == 10
    assert removed["without_top - everything"]["interval"] == pytest.approx([-0.1, -0.1])
    assert removed["without_random - everything"]["mean"] == 0
    excluded = (out / "seed-0" / "without_top.txt").read_text().split()
    assert set(excluded) == json.loads((out / "seed-0" / "planted.json").read_text()).keys()
    shown = capsys.readouterr().out
    for text in (shown, (out / "results.md").read_text()):
        assert "combined" in text and "seed 0: " in text and "best other, loss" in text

    text = (out / "natural.md").read_text()
    ids = re.findall(r"^## \d+\. (\S+)$", text, re.MULTILINE)
    assert len(ids) == 3 and not set(ids) & set(excluded)
    assert text.count("Verdict:\n\n") == 3 and f"    Q: {clean[ids[0]]['question']}" in text


def test_what_is_done_is_not_trained_again(tmp_path, runs):
    planted.main(arguments(tmp_path))
    results = (tmp_path / "out" / "results.json").read_text()
    done = len(runs.started)
    record = tmp_path / "out" / "seed-1" / "run" / "run.json"
    planted.main(arguments(tmp_path))
    assert len(runs.started) == done
    assert (tmp_path / "out" / "results.json").read_text() == results
    record.write_text(json.dumps({"status": "interrupted"}))
    with pytest.raises(FileExistsError):  # of Runs: seed 1 is begun again
        planted.main(arguments(tmp_path))


def test_refusals(tmp_path, runs):
    planted.main(arguments(tmp_path, "--folds", "0", "--unprompted"))
    started = ["train seed-0/run", "unprompted seed-0/run"]
    assert [name for name, _ in runs.started][:2] == started
    assert not [name for name, _ in runs.started if name.startswith("folds")]
    with pytest.raises(UserError, match="another benchmark: folds: 2 here, 0 there; unprompted"):
        planted.main(arguments(tmp_path))
    with pytest.raises(UserError, match="60 rows, expected 61"):
        planted.main([str(tmp_path / "b"), *arguments(tmp_path, "--rows", "51")[1:]])
    with pytest.raises(UserError, match="NAME:VALUE"):
        planted.main([str(tmp_path / "c"), *arguments(tmp_path, "--kinds", "swap")[1:]])


def test_a_process_that_fails_ends_the_benchmark(tmp_path):
    with pytest.raises(SystemExit, match="no_such_module ended with code 1"):
        planted._command(tmp_path, "no_such_module")
    assert json.loads((tmp_path / "seconds.json").read_text())["no_such_module"] > 0
