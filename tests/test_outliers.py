"""Scores against a direct computation in float64; out-of-fold losses; what the command writes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import scipy
import tiny_run
from tiny_run import ledger

from gemma_lora import folds, outliers
from gemma_lora.config import default
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.examples import Example
from gemma_lora.errors import UserError

EVALS = (0, 2, 4, 6, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    """A run of eight steps that looked at all training examples every two of them."""
    directory = tmp_path_factory.mktemp("outliers")
    with tiny_run.quick_compilation():
        inputs = tiny_run.write_inputs(directory)
        # A warmup of more steps than a fold has.
        changes = {"train.ledger_every": 2, "optim.warmup_steps": 4}
        tiny_run.run(directory / "run", tiny_run.settings(inputs, changes))
        folds.run(directory / "run", 2)
        yield directory / "run"


def test_ledger_of_all_training_examples(run):
    """Every example once, its tokens' losses summing to its own; the probe is a part of them."""
    ids = [e["id"] for e in outliers.read_examples(run, "train")]
    assert len(ids) == 18
    for step in (0, 2, 3, 4, 6, 8):
        rows = ledger(run, step, "train")
        if step == 3:  # an eval, but none of all training examples
            assert not len(rows["id"])
            continue
        assert sorted(rows["id"]) == ids
        assert [len(x) for x in rows["token_nll"]] == rows["tokens"].tolist()
        sums = [np.sum(x, dtype=np.float64) for x in rows["token_nll"]]
        assert np.allclose(sums, rows["nll"], rtol=1e-12, atol=0)
        assert [x.max() for x in rows["token_nll"]] == rows["nll_max"].tolist()
        probe, at = ledger(run, step, "train_probe"), {i: n for n, i in enumerate(rows["id"])}
        chosen = [at[i] for i in probe["id"]]
        assert np.array_equal(probe["nll"], rows["nll"][chosen])
        [line] = [r for r in tiny_run.records(run, "eval") if r["step"] == step]
        assert line["train_probe/loss"] == probe["nll"].sum() / probe["tokens"].sum()


def test_scores_are_their_formulas(run):
    """Of the loss on the completion alone, though the run trained on all tokens."""
    got = outliers.score(run)
    begins = {e["id"]: e["prompt_targets"] for e in outliers.read_examples(run, "train")}
    rows = {s: ledger(run, s, "train") for s in EVALS}
    assert min(begins.values()) > 0
    assert set(got) == {
        "id", "tokens", "base_loss", "loss", "length_z", "token_max", "not_learnt", "confidence",
        "variability", "correctness", "aum", "el2n", "seen_loss", "opening_loss", "fold_loss",
        "combined",
    }  # fmt: skip
    for n, example in enumerate(got["id"]):
        at = {s: list(r["id"]).index(example) for s, r in rows.items()}
        each = {s: r["token_nll"][at[s]].astype(float)[begins[example] :] for s, r in rows.items()}
        loss = {s: sum(map(float, x)) / len(x) for s, x in each.items()}
        p = [np.exp(-loss[s]) for s in EVALS[1:]]
        of = lambda k, s: float(rows[s][k][at[s]])  # noqa: E731, B023
        right = [of("correct", s) / of("tokens", s) for s in EVALS[1:]]
        expected = {
            "tokens": len(each[0]),
            "base_loss": loss[0],
            "loss": loss[8],
            "opening_loss": float(each[8][:20].mean()),
            "token_max": max(each[8]),
            "not_learnt": loss[8] - loss[0],
            "confidence": -sum(p) / 4,
            "variability": -float(np.sqrt(sum((x - sum(p) / 4) ** 2 for x in p) / 4)),
            "correctness": -sum(right) / 4,
            "aum": -sum(of("margin", s) for s in EVALS[1:]) / 4,
            "el2n": sum(of("el2n", s) for s in EVALS[1:3]) / 2,
        }
        for name, value in expected.items():
            assert got[name][n] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    ranks = [scipy.stats.rankdata(got[k]) / 18 for k in ("fold_loss", "length_z")]
    assert np.allclose(got["combined"], np.mean(ranks, 0), rtol=1e-12)


def test_loss_when_first_trained_on(run):
    """Eight steps of four rows are more than an epoch of 18: only the first time counts."""
    got = outliers.score(run)
    paths = sorted((run / "ledger").glob("seen_*.parquet"))
    rows = [r for p in paths for r in pyarrow.parquet.read_table(p).to_pylist()]
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows) and len(rows) > 18
    first = {}
    for r in rows:
        first.setdefault(r["id"], (r["nll"] / r["tokens"], len(first)))
    assert len(first) == 18
    padded = [x for x, _ in first.values()]
    padded = padded[9:0:-1] + padded + padded[-2:-11:-1]
    for i, found in zip(got["id"], got["seen_loss"], strict=True):
        loss, at = first[i]
        window = sorted(padded[at : at + 18])  # an even window begins half of it before
        assert found == pytest.approx(loss - window[9], rel=1e-12)


def made(label_p: np.ndarray, label: list[int]) -> outliers.Ledger:
    """A ledger of label probabilities [e,n,labels]; its losses rise from example to example."""
    e, n = label_p.shape[:2]
    ramp = np.broadcast_to(np.arange(n, dtype=float), (e, n))
    correct = np.linspace(1, 0, e)[:, None] * np.ones((1, n))
    return outliers.Ledger(
        ids=np.array([str(i) for i in range(n)], object), tokens=np.arange(n) + 1,
        label=np.array(label), steps=list(range(e)), loss=ramp, correct=correct, margin=-ramp,
        el2n=ramp, token_max=ramp[-1], opening=ramp[-1], label_p=label_p,
    )  # fmt: skip


def test_an_example_without_a_number_leaves_the_others_their_place():
    loss, tokens = np.array([1.0, 2.0, 4.0, np.nan]), np.full(4, 9)
    got = outliers.length_z(loss, tokens)
    assert np.array_equal(got[:3], outliers.length_z(loss[:3], tokens[:3]))
    assert np.isnan(got[3])
    assert np.isnan(outliers.length_z(np.full(2, np.nan), tokens[:2])).all()


def test_scores_of_labels():
    """A flipped label is the first; an example without a label has no such score and no rank."""
    base = [[0.4, 0.6], [0.5, 0.5], [0.6, 0.4]]  # which counts for none of them
    p = np.array([base, [[0.7, 0.3], [0.4, 0.6], [0.7, 0.3]], [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]])
    got = outliers.scores_of(made(p, [0, 0, -1]))
    assert got["label_loss"][:2] == pytest.approx([-np.log(0.9), -np.log(0.2)])
    assert got["label_aum"][:2] == pytest.approx([-0.6, 0.4])  # of the evals after the base's
    assert np.isnan(got["label_loss"][2])
    assert got["combined"].tolist() == [0.5, 1.0, 0.5]


def test_ranks_are_shares():
    """An infinite score is the largest, no number none: the shares stay within (0, 1]."""
    assert outliers.rank(np.array([1.0, np.inf, np.nan, 0.0])).tolist() == [2 / 3, 1, 0.5, 1 / 3]


def test_shares_count_equals():
    got = outliers.share(np.array([0.0, 0.0, 1.0, np.nan, 0.0]))
    assert np.array_equal(got, [0.75, 0.75, 1, np.nan, 0.75], equal_nan=True)


def test_evals_after_a_run_diverged_are_left_out(run, tmp_path):
    """Of the losses that are left the scores are those of a run that ended there."""
    shutil.copytree(run, tmp_path / "run")
    for last in range(len(before := outliers.read_ledger(run).steps) - 1, -1, -1):
        path = tmp_path / "run" / "ledger" / f"eval_{before[last]:06d}.parquet"
        table = pyarrow.parquet.read_table(path).to_pylist()
        for r in table:
            r["token_nll"] = [float("nan")] * len(r["token_nll"])
        schema = pyarrow.parquet.read_schema(path)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema=schema), path)
        if last:
            assert outliers.read_ledger(tmp_path / "run").steps == before[:last]
    with pytest.raises(UserError, match=r"no loss of the training examples .* is finite"):
        outliers.mine(tmp_path / "run", None, None)


def test_forgetting_needs_evals_enough():
    p = np.full((7, 3, 0), 0.5)
    assert outliers.scores_of(made(p, [-1] * 3))["forgetting"] == pytest.approx([5 / 6] * 3)
    assert "forgetting" not in outliers.scores_of(made(p[:6], [-1] * 3))
    one = outliers.scores_of(made(p[:1], [-1] * 3))
    assert "variability" not in one and "loss" in one


def test_length_z_compares_like_with_like():
    """Short completions lose more; the outlier is the one that is high among its own length."""
    rng = np.random.default_rng(0)
    tokens = np.repeat([5, 50], 40)
    loss = np.where(tokens == 5, 4.0, 1.0) + 0.1 * rng.standard_normal(80)
    loss[60] = 2.0
    got = outliers.length_z(loss, tokens)
    assert got.argmax() == 60 and loss.argmax() < 40
    inside = loss[:40]
    spread = 1.4826 * np.median(abs(inside - np.median(inside)))
    assert np.allclose(got[:40], (inside - np.median(inside)) / spread)
    assert np.array_equal(outliers.length_z(np.ones(5), np.arange(5)), np.zeros(5))


def test_length_z_where_most_losses_are_one():
    """The mean deviation then tells the worst from the rest; a loss without a number has no z."""
    loss = np.array([0.0] * 60 + [1e-4] * 39 + [9.0])
    got = outliers.length_z(loss, np.full(100, 5))
    assert got[99] > 100 * got[60:99].max() > 0 and not got[:60].any()
    assert got[99] == pytest.approx(9 / (1.2533 * np.abs(loss).mean()))
    got = outliers.length_z(np.array([0.0, 0.0, 0.0, np.nan, np.inf]), np.full(5, 5))
    assert np.array_equal(got, [0, 0, 0, np.nan, 1], equal_nan=True)


@pytest.mark.parametrize("short", [[3], [3] * 19, [3] * 20])
def test_no_length_bin_is_smaller_than_it_says(short):
    tokens = np.array([*short, *[5] * 39, *range(6, 60)])
    counts = np.bincount(outliers.length_bins(tokens))
    assert counts.min() >= outliers.BIN_LEAST / 2 and len(counts) >= 3
    loss = np.array([9.0] + [1.0, 1.1, 0.9] * 40)[: len(short) + 39]
    assert outliers.length_z(loss, tokens[: len(loss)])[0] > 5


def test_what_the_combined_rank_is_of():
    scores = ("loss", "length_z", "fold_loss", "ifd")
    assert outliers.combined_of(scores[:2]) == ["length_z"]
    assert outliers.combined_of(scores[:3]) == ["fold_loss", "length_z"]
    assert outliers.combined_of(scores) == ["ifd"]
    assert outliers.combined_of((*scores, "label_aum")) == ["label_aum"]
    assert outliers.combined_of((*scores, "fold_label", "label_aum")) == ["fold_label", "label_aum"]


def test_no_fold_trains_on_what_it_scores():
    # Of 20 texts, each twice; white space and case make no other.
    texts = [("Text {}" if i < 20 else "text   {}").format(i % 20) for i in range(40)]
    examples = [Example(str(i), np.arange(4, dtype=np.int32), 1, t, 0, 0)
                for i, t in enumerate(texts)]  # fmt: skip
    config = default()
    config.data.batch_size = 4
    whole = Dataset(examples, shapes={8: 8}, batch_size=4, pack=False, seed=0, shuffle=True)
    made = folds.parts(whole, config, 3)
    everything = {e.id for e in examples}
    held = [{e.id for e in h.examples} for _, h in made]
    assert sorted(i for h in held for i in h) == sorted(everything)
    for fit, h in made:
        trained = {e.id for e in fit.examples}
        assert trained == everything - {e.id for e in h.examples}
        assert all(str((int(e.id) + 20) % 40) not in trained for e in h.examples)
        seen = {fit.examples[i].id for s in range(fit.steps_per_epoch)
                for i in np.unique(fit.batch_at(s).owner) if i >= 0}  # fmt: skip
        assert seen == trained
    with pytest.raises(UserError, match="--folds is 41, expected 2 to 40"):
        folds.parts(whole, config, 41)


def test_folds_continue(run, capsys):
    """What is there is kept; what is not is made again, with the same numbers."""
    before = pyarrow.parquet.read_table(run / "folds" / "scores.parquet")
    path = run / "folds" / "1_of_2.parquet"
    other = pyarrow.parquet.read_table(path)[1:]  # of other examples, as if cut otherwise
    path.unlink()
    for _ in range(2):
        folds.run(run, 2)
        told = capsys.readouterr().out
        assert "fold 0 of 2: kept" in told and "fold 1 of 2: " in told and "held out" in told
        pyarrow.parquet.write_table(other, path)
    folds.run(run, 2)
    after = pyarrow.parquet.read_table(run / "folds" / "scores.parquet")
    for name in ("id", "fold_loss"):
        assert after[name].equals(before[name])
    assert np.isfinite(after["fold_loss"].to_numpy()).all()


def test_what_the_command_writes(run, tmp_path):
    """The list of the worst can be excluded from the next run: then it trains on the others."""
    worst = tmp_path / "worst.txt"
    columns = outliers.mine(run, 4, worst)
    order = np.argsort(-columns["combined"], kind="stable")
    assert worst.read_text().split() == [columns["id"][i] for i in order[:4]]
    table = pyarrow.parquet.read_table(run / "outliers.parquet")
    assert table.column_names == [*columns, "rules", "category"] and len(table) == 18
    page = (run / "outliers.md").read_text()
    assert page.startswith("# The 4 most suspicious of 18") and page.count("\n## ") == 4
    assert f"\n## 1. `{columns['id'][order[0]]}`: " in page
    assert all(f"`{k}`" in page for k in columns if k in outliers.SCORES)
    c = tiny_run.settings(run.parent, {"data.exclude": str(worst), "train.max_steps": 2})
    told = tiny_run.run(tmp_path / "next", c)
    assert "4 training examples, by" in told
    left = json.loads((tmp_path / "next" / "run.json").read_text())["examples"]
    assert (left["train"], left["validation"], left["excluded"]) == (14, 6, 4)


ALL = "".join(f"{a}+{b}\n" for a in range(4) for b in range(6) if 6 * a + b < 18)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0+0\n0+9\n", "1 of 2 ids are not in the data, e.g. '0\\+9'"),
        (ALL, "leaves out all 18 training examples"),
        (None, "cannot be read"),
    ],
)
def test_exclude_is_checked(run, tmp_path, text, message):
    path = tmp_path / "ids.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        tiny_run.run(tmp_path / "x", tiny_run.settings(run.parent, {"data.exclude": str(path)}))


def test_a_run_without_such_evals_says_what_to_do(tmp_path, run):
    tiny_run.run(tmp_path / "plain", tiny_run.settings(run.parent, {"train.max_steps": 1}))
    with pytest.raises(UserError, match=r"train\.ledger_every above 0"):
        outliers.score(tmp_path / "plain")
    with pytest.raises(UserError, match="--top is 19, expected 1 to 18"):
        outliers.mine(run, 19, None)
