"""The report: its numbers against direct computations, its Markdown, damaged and short runs."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from report_run import STEPS, N, make, put_eval, table

from gemma_lora import evaluate, report, stats
from gemma_lora.errors import UserError

LOSS = ("start", "best", "last", "decrease_pct", "interval")
PATHS = [
    *(f"run.{k}" for k in ("status", "steps", "tokens", "seconds")),
    *("model.arch", "model.trainable_parameters"),
    *(f"{split}.loss.{k}" for split in report.SPLITS for k in LOSS),
    *(f"validation.token_accuracy.{k}" for k in ("start", "best", "last", "interval")),
]


def test_best_is_the_step_whose_adapter_was_exported(tmp_path):
    """The run may refuse an eval that has the lowest validation loss (a probe loss not finite)."""
    r = report.build(make(tmp_path, best_step=40))
    assert r["evals"]["best"] == 40 == r["run"]["best_step"]


def at(r: dict, path: str):
    for key in path.split("."):
        r = r[key]
    return r


def test_losses_and_decreases_are_exact(tmp_path):
    r = report.build(make(tmp_path))
    val, probe = r["validation"]["loss"], r["train_probe"]["loss"]
    assert [val[k] for k in ("start", "best", "last")] == pytest.approx([2.0, 1.0, 1.5])
    # The probe's best is taken at the best validation step, not where the probe is lowest.
    assert [probe[k] for k in ("start", "best", "last")] == pytest.approx([2.0, 0.8, 0.5])
    assert (val["decrease_pct"], probe["decrease_pct"]) == pytest.approx((50.0, 60.0))
    assert r["evals"] == {"steps": [0, 20, 40], "start": 0, "best": 20, "last": 40}
    assert val["conclusion"] == "fell beyond its 95 % interval"
    of = "best - start, nats per token, 95 % paired bootstrap over examples, "
    of += "the best eval taken as given"
    assert val["interval_of"] == of
    gap = r["generalisation_gap"]
    assert [gap[k] for k in ("start", "best", "last")] == pytest.approx([0.0, 0.2, 1.0])
    assert (
        gap["growth"] == pytest.approx(0.2)
        and gap["growth_interval"][0] < 0.2 < gap["growth_interval"][1]
    )
    assert r["validation"]["token_accuracy"]["conclusion"] == "rose beyond its 95 % interval"
    trl = r["validation"]["trl_compat"]["eval_loss"]
    assert trl == pytest.approx({"start": 0.125, "best": 0.145, "last": 0.165})


def test_the_sets_are_drawn_apart(tmp_path):
    """Where both have the same losses their gap is 0, but not known to be."""
    gap = report.build(make(tmp_path, probe=(2.0, 1.0, 0.5)))["generalisation_gap"]
    assert gap["best"] == pytest.approx(0) and gap["best_interval"][0] < -0.01
    assert gap["best_interval"][1] > 0.01


def test_report_has_the_paths_that_others_read(tmp_path):
    r = report.build(make(tmp_path))
    for path in PATHS:
        assert at(r, path) is not None, path
    assert [x["loss"] for x in r["outliers"]] == sorted(
        (x["loss"] for x in r["outliers"]), reverse=True
    )
    assert len(r["outliers"]) == 10
    worst = r["outliers"][0]
    assert worst["text"] == f"text of {int(worst['id'][1:])}"


def test_interval_agrees_with_a_direct_bootstrap():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 50, 30)
    before, after = (table("validation", s, tokens, tokens * rng.random(30)) for s in (0, 1))
    after["correct"] = before["correct"] + rng.integers(0, 2, 30)
    draws = stats.bootstrap(before, after, 0)
    assert draws.shape == (10_000, 2)
    assert np.array_equal(draws, stats.bootstrap(before, after, 0))
    direct = []
    for _ in range(10_000):
        i = rng.integers(30, size=30)
        total = tokens[i].sum()
        direct.append([(after[k][i] - before[k][i]).sum() / total for k in ("nll", "correct")])
    for column, slow in zip(draws.T, np.array(direct).T, strict=True):
        lo, hi = stats.interval(column)
        assert np.allclose([lo, hi], np.quantile(slow, [0.025, 0.975]), atol=0.06 * (hi - lo))
        assert column.mean() == pytest.approx(slow.mean(), abs=0.02 * (hi - lo))


def test_interval_is_paired_and_covers_the_true_difference():
    """Examples differ by nats, the change is -0.1 everywhere plus little noise."""
    rng, covered, widths = np.random.default_rng(11), 0, []
    for _ in range(100):
        tokens = rng.integers(10, 30, 60)
        nll = tokens * rng.uniform(0.5, 4, 60)
        after = nll + tokens * rng.normal(-0.1, 0.05, 60)
        rows = [table("validation", 0, tokens, x) for x in (nll, after)]
        lo, hi = stats.interval(stats.bootstrap(*rows, 0)[:, 0])
        covered += lo < -0.1 < hi
        widths.append(hi - lo)
    assert 88 <= covered <= 100
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.05 / 60**0.5, rel=0.15)


def test_no_change_is_said_to_be_none(tmp_path):
    r = report.build(make(tmp_path, losses=(1.0, 0.9999), probe=(1.0, 1.0)))
    loss = r["validation"]["loss"]
    assert loss["interval"][0] < 0 < loss["interval"][1]
    assert loss["conclusion"] == "no change that this set can show"


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 31], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
        ([1, 2, 2, 9], [0, 5, 4, 6], 4.5 / math.sqrt(4.5 * 5)),
        ([1, 1, 1], [1, 2, 3], math.nan),
        ([1], [1], math.nan),
    ],
)
def test_spearman(x, y, expected):
    assert stats.spearman(np.array(x), np.array(y)) == pytest.approx(expected, nan_ok=True)


def test_an_interval_is_of_the_draws_that_are_finite_if_nearly_all_are():
    draws = np.arange(1000.0)
    whole = stats.interval(draws)
    assert whole == np.quantile(draws, [0.025, 0.975]).tolist()
    draws[::21] = np.nan
    rest = draws[np.isfinite(draws)]
    assert stats.interval(draws) == np.quantile(rest, [0.025, 0.975]).tolist()
    draws[1::21] = np.inf
    assert stats.interval(draws) is None
    assert stats.interval(np.full(10, np.nan)) is None


def test_final_steps_slope_window_and_interval():
    steps = np.arange(1.0, 101)
    line = np.where(steps <= 80, 7.0, 3 - 0.01 * steps)  # the last 20 % alone are on a line
    found = stats.trend(steps, line)
    assert found["steps"] == [81, 100]
    assert found["slope_per_100_steps"] == pytest.approx(-1)
    assert found["interval"] == pytest.approx([-1, -1])
    assert found["reduction"] == pytest.approx(0.19)
    assert stats.trend(steps[:20], line[:20])["steps"] == [11, 20]
    assert stats.trend(steps[:9], line[:9]) is None
    for y, together in ((np.tile([1.0, 2.0, 1.5], 4), False), (np.sin(np.arange(12) / 2), True)):
        found = stats.trend(np.arange(12.0), y)
        r, half = found["autocorrelation"], np.ptp(found["interval"]) / 200
        assert (r > 0) == together
        # The last ten points by hand: sum of squares of x 82.5, t at 8 degrees of freedom 2.306.
        x, y = np.arange(2.0, 12), y[2:]
        error = math.sqrt(((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2).sum() / 8 / 82.5)
        widened = math.sqrt((1 + r) / (1 - r)) if together else 1
        assert half == pytest.approx(2.306 * error * widened, rel=0.01)


FALLING = {"losses": (2.0, 1.5, 1.0), "probe": (2.0, 1.5, 1.0)}
FLAT = {"losses": (2.0, 1.0, 0.9999), "probe": (2.0, 1.0, 1.0)}
CLOSE = {"losses": (2.0, 1.0, 1.0), "probe": (2.0, 1.0, 1.0), "steps": (0, 20, 21)}
BACK = {"losses": (2.0, 1.0, 1.5, 1.2), "probe": (2.0, 1.0, 1.0, 1.0)}
EARLY = [(1.0, 1e-4)] * 30  # half of the planned steps at the full rate


@pytest.mark.parametrize(
    ("kw", "recommended", "words"),
    [
        ({**FALLING, "train": EARLY}, True, "fell"),
        ({**FALLING, "schedule": "constant", "train": [(1.0, 1e-4)] * STEPS}, True, "fell"),
        (FALLING, False, "longer schedule"),
        ({**FALLING, "train": [*EARLY, (1.0, 1e-6)]}, False, "longer schedule"),
        ({**FLAT, "train": EARLY}, False, "did not fall"),
        (FLAT, False, "no sign of convergence"),
        ({**FALLING, "train": []}, False, "train lines"),
        ({**FALLING, "train": EARLY, "status": "nan"}, False, "finite"),
        ({**FALLING, "train": EARLY, "status": "interrupted"}, False, "came to its end"),
        ({"losses": (2.0,), "probe": (2.0,), "train": EARLY}, False, "two evals"),
        # An eval just before the last is not what that is compared with.
        ({**CLOSE, "train": EARLY}, True, "fell .* from step 0 to 21"),
        ({**BACK, "train": EARLY}, False, "fell .* but it was lowest at step 20"),
    ],
)
def test_advice_on_more_epochs(tmp_path, kw, recommended, words):
    more = report.build(make(tmp_path, **kw))["more_epochs"]
    assert more["recommended"] is recommended
    assert re.search(words, more["because"])


def test_markdown_numbers_are_the_reports_numbers(tmp_path):
    r = report.write(make(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == r
    assert "n/a" not in text and "$" not in text
    for name in ("Overview", "Learning", "Generalisation", "Token", "Worst", "Final", "What"):
        assert f"\n## {name}" in text
    for path in PATHS:
        overview = f"| {path} | {json.dumps(at(r, path))} |"
        assert (overview if path[:3] in ("run", "mod") else report.show(at(r, path))) in text
    loss = r["validation"]["loss"]
    cells = [f"{loss[k]:.4f}" for k in ("start", "best", "last", "decrease_pct")]
    cells.append("[{:.4f}, {:.4f}]".format(*loss["interval"]))
    assert f"| validation.loss | {' | '.join(cells)} | {loss['conclusion']} |" in text
    assert "| train_probe.trl_compat.eval_loss | 2.1250 | 2.1450 | 2.1650 |" in text
    assert '| config.lora.targets | "attn\\|mlp" |' in text
    assert r'| config.data.template | "Question: {question}\nAnswer: {answer}" |' in text
    for x in r["outliers"]:
        assert f"**{x['id']}**: loss {x['loss']:.4f}, loss_at_start" in text
        assert x["text"] in text


def test_texts_are_cut_and_cannot_end_their_block(tmp_path):
    inside = "before\n```\n# not a heading\n````python\nafter $run_status"
    r = report.build(make(tmp_path, texts=["x" * 1000] * N))
    r["outliers"][0]["text"] = inside
    text = report.markdown(r)
    assert f"\n`````text\n{inside}\n`````\n" in text
    assert f"\n```text\n{'x' * 600}...\n```\n" in text and "x" * 601 not in text


def test_interrupted_before_the_second_eval(tmp_path):
    r = report.write(make(tmp_path, losses=(2.0,), probe=(1.9,), train=[], status="interrupted"))
    for split in report.SPLITS:
        loss = r[split]["loss"]
        assert loss["start"] == loss["best"] == loss["last"]
        assert loss["decrease_pct"] == 0 and loss["interval"] == [0, 0]
        assert loss["conclusion"] == "no eval after step 0: nothing to compare"
        assert loss["last_conclusion"] == loss["conclusion"]
    assert r["final_steps"] is None
    text = (tmp_path / "report.md").read_text()
    assert "interrupted, 0 of 60" in text and "no eval after step 0" in text


def test_run_that_never_beat_the_base_model(tmp_path):
    r = report.build(make(tmp_path, losses=(1.0, 1.2), probe=(1.0, 0.9)))
    assert r["evals"]["best"] == 0 and r["validation"]["loss"]["decrease_pct"] == 0
    assert r["validation"]["loss"]["conclusion"].startswith("no later eval had")


def test_not_finite_numbers_become_null(tmp_path):
    nan = {"steps": [21, 21], "ids": ["a", "b"]}
    train = [(1.0, 1e-4)] * 20 + [(None, 1e-4)] * 5
    more = {"train": train, "nan": nan, "status": "nan", "best_loss": math.inf}
    make(tmp_path, losses=(2.0, 1.0, math.nan), probe=(2.0, 1.0, 1.0), **more)
    r = report.write(tmp_path)
    assert r["evals"]["best"] == 20 and r["validation"]["loss"]["decrease_pct"] == pytest.approx(50)
    assert r["validation"]["loss"]["last"] is None and r["more_epochs"]["difference"] is None
    assert r["run"]["best_loss"] is None and r["run"]["nan"] == nan

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert '| run.nan.ids | ["a", "b"] |' in (tmp_path / "report.md").read_text()


def test_every_loss_not_finite(tmp_path):
    r = report.write(make(tmp_path, losses=(math.nan,) * 2, probe=(math.nan,) * 2, status="nan"))
    assert r["validation"]["loss"]["start"] is None and r["validation"]["loss"]["interval"] is None


def test_class_accuracy(tmp_path):
    """20 examples of 3 labels: the first 8 are right at start, the last 15 at best."""
    labels = np.arange(20) % 3
    right = {0: np.arange(20) < 8, 20: np.arange(20) >= 5}
    workdir = make(tmp_path, losses=(2.0, 1.0), probe=(2.0, 1.0), n=20)
    for step, mask in right.items():
        tokens = np.full(20, 4)
        part = table("validation", step, tokens, tokens * (2.0 if step == 0 else 1.0))
        guess = np.where(mask, labels, (labels + 1) % 3)
        part |= {"label": labels, "label_p": 0.2 + 0.4 * np.eye(3)[guess]}
        put_eval(workdir, step, [part, part | {"split": np.array(["train_probe"] * 20, object)}])
    c = json.loads((workdir / "config.json").read_text())
    c["data"]["labels"] = ["bad", "fair", "good"]
    (workdir / "config.json").write_text(json.dumps(c))
    found = report.build(workdir)["validation"]["class_accuracy"]
    assert (found["start"], found["best"], found["gained"], found["lost"]) == (0.4, 0.75, 12, 5)
    assert found["most_frequent"] == 0.35
    # McNemar: 5 or fewer, or 12 or more, of 17 fair coins.
    p = 2 * sum(math.comb(17, i) for i in range(6)) / 2**17
    assert found["p"] == pytest.approx(p) and p > 0.05
    assert found["conclusion"] == "no change that this set can show"
    # Wilson's interval of 15 of 20 by its formula.
    z, share, n = 1.959964, 0.75, 20
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert found["interval"] == pytest.approx([middle - half, middle + half])
    wrong = labels[:5]
    expected = np.diag(np.bincount(labels[5:])) + np.array(
        [[np.sum((wrong == i) & ((wrong + 1) % 3 == j)) for j in range(3)] for i in range(3)]
    )
    assert found["confusion"] == expected.tolist()
    report.write(workdir)
    text = (workdir / "report.md").read_text()
    assert (
        "## Class accuracy" in text and f"| bad | {expected[0, 0]} | {expected[0, 1]} | 0 |" in text
    )
    assert "12 examples became right, 5 became wrong" in text


def test_single_example(tmp_path):
    r = report.write(make(tmp_path, n=1))
    loss = r["validation"]["loss"]
    assert loss["decrease_pct"] == pytest.approx(50) and loss["interval"] is None
    assert loss["conclusion"].startswith("no interval: it takes two examples")
    assert len(r["outliers"]) == 1 and r["length"]["spearman"] is None


def test_a_line_cut_short_by_a_kill_does_not_count(tmp_path):
    make(tmp_path)
    whole = report.build(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    [note] = (cut := report.build(tmp_path)).pop("notes")
    assert "cut short" in note and whole.pop("notes") == [] and cut == whole


FILES = ("config.json", "run.json", "metrics.jsonl", "ledger/eval_000000.parquet",
         "ledger/eval_000020.parquet", "ledger/examples.parquet")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [b"\xff{\n", b"[1]\n"])
def test_damaged_file_is_named(tmp_path, name, damage):
    path = make(tmp_path) / name
    path.write_bytes(damage)
    with pytest.raises(UserError, match=re.escape(str(path))):
        report.build(tmp_path)


def test_damaged_columns_are_named(tmp_path):
    path = tmp_path / "outliers.parquet"
    path.touch()
    with pytest.raises(UserError, match=re.escape(str(path))):
        evaluate.column_names(path)


@pytest.mark.parametrize("name", [x for x in FILES if "020" not in x])
def test_missing_file_is_named(tmp_path, name):
    path = make(tmp_path) / name
    path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path))):
        report.build(tmp_path)


def test_files_at_odds_are_named(tmp_path):
    make(tmp_path)
    tokens = np.arange(2, 2 + N)
    put_eval(tmp_path, 40, [table(s, 40, tokens, tokens) for s in report.SPLITS])
    with pytest.raises(UserError, match=r"eval_000040.parquet: validation tokens differ"):
        report.build(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    for name in ("tokens", "best_step"):
        less = {k: v for k, v in run.items() if k != name}
        (tmp_path / "run.json").write_text(json.dumps(less))
        with pytest.raises(UserError, match=rf"run.json is damaged: expected .*{name}"):
            report.build(tmp_path)


def test_validation_example_without_text(tmp_path):
    make(tmp_path, texts=["only one"])
    with pytest.raises(UserError, match=r"examples.parquet: no text of validation example 'e0"):
        report.build(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    report.write(make(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.once
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "gemma_lora.report", "--workdir", str(make(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "fell beyond" in done.stdout
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "run.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "run.json" in done.stderr and "Traceback" not in done.stderr
