"""Outliers of a run's training examples: scores from its ledger, a combined rank, why each is high.

    python -m gemma_lora.outliers --workdir DIR [--top N] [--write-filtered FILE]

writes DIR/outliers.parquet (a row an example, a column a score, and the rules that it breaks) and
DIR/outliers.md (the worst, with their text). It takes a run with train.ledger_every. Letters: n
examples, e evals.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import scipy

from gemma_lora import rules
from gemma_lora.errors import UserError, run_main
from gemma_lora.evaluate import completion_part, read_table
from gemma_lora.files import replace_file, write_text

# Every score is larger where an example is more suspicious. All but base_loss and length_z, which
# need one eval, take the evals after step 0. Losses are of the completion alone, in nats a token,
# whatever the run trained on; those of all loss tokens differ only with data.loss_on 'all'.
SCORES = {
    "base_loss": "loss under the base model",
    "loss": "loss at the last eval",
    "length_z": "the same, in robust standard deviations from the median of its length bin",
    "opening_loss": "loss of the completion's first 20 tokens at the last eval; later ones follow "
    "from earlier ones, whether those answer the prompt or not",
    "token_max": "largest loss of a token at the last eval",
    "not_learnt": "loss at the last eval minus loss under the base model",
    "confidence": "minus the mean over evals of exp(-loss) (cartography, Swayamdipta 2020)",
    "variability": "minus the standard deviation over evals of exp(-loss)",
    "correctness": "minus the share of tokens that were the first choice, over evals",
    "aum": "minus the margin of the target over the best other token, over evals (Pleiss 2020)",
    "el2n": "norm of the error of p, over the first half of the evals (Paul 2021)",
    "forgetting": "share of correct tokens lost from eval to eval (after Toneva 2019)",
    "label_loss": "-log p of the label among the label words, at the last eval",
    "label_aum": "p of the likeliest other label minus p of the label, over evals",
    "seen_loss": "loss when the example was first trained on, before that step's update, minus the "
    "running median over the steps",
    "fold_loss": "loss under a model that did not train on the example",
    "fold_label": "-log p of the label under a model that did not train on the example",
}
# What `combined` takes the mean rank of: where there are labels, and where there are none.
LABELLED = ("fold_label", "label_aum")
UNLABELLED = ("fold_loss", "length_z")
OPENING = 20  # tokens
RUNNING = 101  # examples that a running median is over
FORGETTING_EVALS = 6  # fewer say nothing about forgetting
BINS, BIN_LEAST = 10, 20  # length bins; the examples that each must have


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The training examples over the evals that took all of them.

    ids [n]; tokens [n]: of the completion, that carry loss; label [n], -1: none; steps [e];
    loss, correct, margin, el2n [e,n]; token_max, opening [n], of the last eval; label_p
    [e,n,labels].
    """

    ids: np.ndarray
    tokens: np.ndarray
    label: np.ndarray
    steps: list[int]
    loss: np.ndarray
    correct: np.ndarray
    margin: np.ndarray
    el2n: np.ndarray
    token_max: np.ndarray
    opening: np.ndarray
    label_p: np.ndarray


def read_examples(workdir: pathlib.Path, split: str) -> list[dict[str, Any]]:
    """Texts of a split: id, text, completion, length, prompt_targets, label; in id order."""
    names = ("id", "split", "text", "completion", "length", "prompt_targets", "label")
    table = read_table(workdir / "ledger" / "examples.parquet", names)
    return sorted((e for e in table.to_pylist() if e["split"] == split), key=lambda e: e["id"])


def read_ledger(workdir: pathlib.Path) -> Ledger:
    """Raises UserError where no eval took all training examples, or the files disagree."""
    examples = read_examples(workdir, "train")
    ids = np.array([e["id"] for e in examples], object)
    before = np.array([e["prompt_targets"] for e in examples])
    names = ("id", "split", "correct", "margin", "el2n", "label_p", "tokens", "token_nll")
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((workdir / "ledger").glob("eval_*.parquet")):
        table = read_table(path, names)
        table = table.filter(pyarrow.compute.equal(table["split"], "train")).sort_by("id")
        if not len(table):
            continue
        if not np.array_equal(table["id"].to_numpy(), ids):
            raise UserError(f"{path}: its training examples are not those of examples.parquet")
        each = [np.asarray(x, np.float64) for x in table["token_nll"].to_numpy()]
        of_completion = list(map(completion_part, each, before))
        columns = {k: table[k].to_numpy() for k in ("margin", "el2n")}
        columns["correct"] = table["correct"].to_numpy() / table["tokens"].to_numpy()
        columns["loss"] = np.array([x.mean() for x in of_completion])
        columns["token_max"] = np.array([x.max() for x in of_completion])
        columns["opening"] = np.array([x[:OPENING].mean() for x in of_completion])
        columns["tokens"] = np.array([len(x) for x in of_completion])
        columns["label_p"] = np.array(table["label_p"].to_pylist(), float).reshape(len(ids), -1)
        found[int(path.stem.removeprefix("eval_"))] = columns
    if not found:
        raise UserError(
            f"{workdir / 'ledger'} has no eval of all training examples: outliers are mined from a "
            "run with train.ledger_every above 0, e.g. --config.train.ledger_every=0.5"
        )
    evals = [found[step] for step in sorted(found)]
    stacked = {k: np.stack([e[k] for e in evals]) for k in evals[0]}
    label = np.array([e["label"] for e in examples])
    last = {k: stacked.pop(k)[-1] for k in ("tokens", "token_max", "opening")}
    return Ledger(ids=ids, label=label, steps=sorted(found), **stacked, **last)


def length_bins(tokens: np.ndarray) -> np.ndarray:
    """[n] -> the number of each example's bin; the bins are quantiles of `tokens`."""
    count = max(1, min(BINS, len(tokens) // BIN_LEAST))
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, count + 1)[1:-1]))
    return np.searchsorted(edges, tokens, side="right")


def length_z(loss: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[n]: (loss - median) / (1.4826 median absolute deviation), both of the example's length bin.

    Losses of short completions vary more, and without bins they would fill both ends of the list.
    """
    bins = length_bins(tokens)
    out = np.empty(len(loss))
    for b in np.unique(bins):
        inside = loss[bins == b]
        away = inside - np.median(inside)
        deviation = 1.4826 * np.median(np.abs(away))
        out[bins == b] = away / deviation if deviation else np.sign(away)
    return out


def scores_of(ledger: Ledger, more: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The scores [n] that a ledger allows, by name, `more` that were read, and `combined`."""
    tuned = [i for i, step in enumerate(ledger.steps) if step > 0] or [0]
    out: dict[str, np.ndarray] = {}
    if ledger.steps[0] == 0:
        out["base_loss"] = ledger.loss[0]
        out["not_learnt"] = ledger.loss[-1] - ledger.loss[0]
    confidence = np.exp(-ledger.loss[tuned])
    out |= {
        "loss": ledger.loss[-1],
        "length_z": length_z(ledger.loss[-1], ledger.tokens),
        "opening_loss": ledger.opening,
        "token_max": ledger.token_max,
        "confidence": -confidence.mean(0),
        "correctness": -ledger.correct[tuned].mean(0),
        "aum": -ledger.margin[tuned].mean(0),
        "el2n": ledger.el2n[tuned[: -(-len(tuned) // 2)]].mean(0),
    }
    if len(tuned) > 1:
        out["variability"] = -confidence.std(0)
    if len(tuned) >= FORGETTING_EVALS:
        out["forgetting"] = np.maximum(0, -np.diff(ledger.correct[tuned], axis=0)).sum(0)
    labelled = ledger.label >= 0
    if labelled.any():
        own = np.where(labelled, ledger.label, 0)[None, :, None]
        right = np.take_along_axis(ledger.label_p, own, -1)[..., 0]
        others = ledger.label_p.copy()
        np.put_along_axis(others, np.broadcast_to(own, (len(others), *own.shape[1:])), -np.inf, -1)
        with np.errstate(divide="ignore"):
            out["label_loss"] = np.where(labelled, -np.log(right[-1]), np.nan)
        out["label_aum"] = np.where(labelled, (others.max(-1) - right)[tuned].mean(0), np.nan)
    out |= more or {}
    members = LABELLED if labelled.any() else UNLABELLED
    ranks = [rank(out[k]) for k in members if k in out]
    return {k: out[k] for k in SCORES if k in out} | {"combined": np.mean(ranks, 0)}


def rank(score: np.ndarray) -> np.ndarray:
    """[n] in (0, 1]: the share of examples whose score is not larger; 0.5 where it is NaN."""
    found = scipy.stats.rankdata(score, nan_policy="omit") / max(1, (~np.isnan(score)).sum())
    return np.where(np.isnan(score), 0.5, found)


def score(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """id, tokens and every score of a run's training examples; raises as read_ledger."""
    ledger = read_ledger(workdir)
    more = read_seen(workdir, ledger.ids) | read_folds(workdir, ledger.ids)
    found = scores_of(ledger, more)
    return {"id": ledger.ids, "tokens": ledger.tokens, **found}


def read_seen(workdir: pathlib.Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """seen_loss [n], NaN for what was not trained on; {} where the run kept none.

    It is of a model that had not trained on the example, at the cost of nothing (prequential loss,
    Dawid 1984); but that model had seen little where the example came early: hence the median.
    """
    names = ("id", "step", "tokens", "nll")
    tables = [read_table(p, names) for p in sorted((workdir / "ledger").glob("seen_*.parquet"))]
    if not tables:
        return {}
    first: dict[str, float] = {}  # in the order of training
    for row in pyarrow.concat_tables(tables).to_pylist():
        first.setdefault(row["id"], row["nll"] / row["tokens"])
    loss = np.array(list(first.values()))
    usual = scipy.ndimage.median_filter(loss, size=min(RUNNING, len(loss)), mode="nearest")
    excess = dict(zip(first, loss - usual, strict=True))
    return {"seen_loss": np.array([excess.get(i, np.nan) for i in ids])}


def read_folds(workdir: pathlib.Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What `folds.py` left in a workdir: fold_loss and, with labels, fold_label; {}: nothing."""
    path = workdir / "folds" / "scores.parquet"
    if not path.exists():
        return {}
    table = read_table(path, ("id", "fold_loss", "fold_label"))
    at = {i: n for n, i in enumerate(table["id"].to_pylist())}
    if at.keys() != set(ids):
        raise UserError(f"{path}: its examples are not those of the ledger; remove it")
    order = [at[i] for i in ids]
    found = {k: table[k].to_numpy()[order] for k in ("fold_loss", "fold_label")}
    return {k: x for k, x in found.items() if not np.isnan(x).all()}


def broken_rules(workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    """id -> rule -> why, of the training examples that a rule flags."""
    rows = []
    for split in ("train", "validation"):
        for e in read_examples(workdir, split):
            cut = e["completion"]
            rows.append(
                rules.Row(e["id"], split, e["text"][:cut], e["text"][cut:], e["length"], e["label"])
            )
    try:
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        seq_len = config["data"]["seq_len"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{workdir / 'config.json'} is missing or damaged: {e}") from e
    trained = {r.id for r in rows if r.split == "train"}
    return {k: v for k, v in rules.check(rows, seq_len).items() if k in trained}


def markdown(
    columns: dict[str, np.ndarray],
    broken: dict[str, dict[str, str]],
    texts: dict[str, str],
    top: int,
) -> str:
    """The examples with the highest combined rank, and those that break a rule."""
    names = [k for k in columns if k not in ("id", "tokens", "combined")]
    ranks = {k: rank(columns[k]) for k in names}
    worst = np.argsort(-columns["combined"], kind="stable")[:top]
    lines = [f"# The {len(worst)} most suspicious of {len(columns['id'])} training examples", ""]
    lines += ["Of each score its value and, in brackets, the share of examples below or at it.", ""]
    lines += [f"- `{k}`: {SCORES[k]}" for k in names]
    for place, i in enumerate(worst, 1):
        shown = ", ".join(f"{k} {columns[k][i]:.3g} ({ranks[k][i]:.3f})" for k in names)
        lines += ["", f"## {place}. {columns['id'][i]}", "", shown, ""]
        lines += [f"{rule}: {why}\n" for rule, why in broken.get(columns["id"][i], {}).items()]
        lines += ["    " + line for line in texts[columns["id"][i]].splitlines()]
    lines += ["", f"# {len(broken)} training examples that break a rule", ""]
    lines += [f"- `{k}`: {v}" for k, v in rules.RULES.items()]
    lines += [""]
    lines += [
        f"- {example}: {'; '.join(f'{rule}: {why}' for rule, why in found.items())}"
        for example, found in sorted(broken.items())
    ]
    return "\n".join(lines) + "\n"


def mine(workdir: pathlib.Path, top: int, filtered: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Writes outliers.parquet and outliers.md, and to `filtered` the ids of the `top` worst."""
    columns = score(workdir)
    if not 0 < top <= len(columns["id"]):
        raise UserError(f"--top is {top}, expected 1 to {len(columns['id'])} training examples")
    texts = {e["id"]: e["text"] for e in read_examples(workdir, "train")}
    broken = broken_rules(workdir)
    names = [sorted(broken.get(i, {})) for i in columns["id"]]
    with replace_file(workdir / "outliers.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns | {"rules": names}), temporary)
    write_text(workdir / "outliers.md", markdown(columns, broken, texts, top))
    if filtered:
        worst = np.argsort(-columns["combined"], kind="stable")[:top]
        write_text(filtered, "".join(f"{columns['id'][i]}\n" for i in worst))
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description="Mine the outliers of a run's training examples.")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--top", type=int, default=30, help="how many to show or to filter")
    parser.add_argument("--write-filtered", type=pathlib.Path, help="a file for data.exclude")
    options = parser.parse_args()
    columns = mine(options.workdir, options.top, options.write_filtered)
    print(f"{len(columns['id'])} examples scored: {options.workdir / 'outliers.md'}")


if __name__ == "__main__":
    run_main(main)
