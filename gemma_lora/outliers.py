"""Outliers of a run's training examples: scores from its ledger, a combined rank, why each is high.

    python -m gemma_lora.outliers --workdir DIR [--top N] [--write-filtered FILE]

writes DIR/outliers.parquet (a row an example, a column a score, the rules that it breaks, and a
category), DIR/outliers.md (the worst, with their text and what they share) and, for a person's
marks, DIR/review.csv and review.html. It takes a run with train.ledger_every. Letters: n examples,
e evals.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import scipy

from gemma_lora import review, rules
from gemma_lora.errors import Parser, UserError, run_main
from gemma_lora.evaluate import column_names, completion_part, read_table, write_table
from gemma_lora.explain import code, explain
from gemma_lora.files import path_argument, require_writable, write_text
from gemma_lora.workdir import ledger_files, read_config, require

DIMENSION = 1024  # of projected gradients, where gemma_lora.gradients is given no other
RUNNING = 101  # examples that a running median is over

# Every score is larger where an example is more suspicious; base_loss and variability are weak
# evidence alone (what is always easy varies as little as what is never learnt). Means over evals
# are over those after step 0; what is of one eval says which. All are of the completion alone (of
# what is there where a row was cut before it: a rule names those), losses in nats a token, but
# correctness and forgetting: of all tokens that carry loss, with the prompt's or not.
SCORES = {
    "base_loss": "loss under the base model",
    "loss": "loss at the last eval",
    "length_z": "the same, in robust standard deviations from the median of its length bin",
    "opening_loss": "loss of the completion's first 20 tokens at the last eval; later ones follow "
    "from earlier ones, whether those answer the prompt or not",
    "token_max": "largest loss of a token at the last eval",
    "not_learnt": "loss at the last eval minus loss under the base model",
    "confidence": "minus the mean over evals of exp(-loss) (cartography, Swayamdipta 2020)",
    "variability": "minus the standard deviation over evals of exp(-loss): as high for what is "
    "always easy as for what is never learnt",
    "correctness": "minus the share of tokens that were the first choice, over evals",
    "aum": "minus the margin of the target over the best other token, over evals (Pleiss 2020)",
    "el2n": "norm of the error of p, over the first half of the evals (Paul 2021)",
    "forgetting": "falls of the share of correct tokens between evals, summed (after Toneva 2019)",
    "label_loss": "-log p of the label among the label words, at the last eval",
    "label_aum": "p of the likeliest other label minus p of the label, over evals",
    "seen_loss": "loss when the example was first trained on, before that step's update, minus the "
    f"running median over {RUNNING} examples",
    "fold_loss": "loss under a model that did not train on the example",
    "fold_label": "-log p of the label under a model that did not train on the example",
    "ifd": "loss of the completion as a share of its loss without the prompt, so near 1 where that "
    "does not help (IFD, Li et al. 2023)",
    "grad_norm": "norm of the gradient of the example's loss (GraNd, Paul 2021)",
    "grad_misfit": "1 - cosine of that gradient with the mean direction of the others'",
}
# The files that other commands leave in a workdir, and the scores in them.
MORE = {
    "folds/scores.parquet": ("fold_loss", "fold_label"),
    "unprompted.parquet": ("ifd",),
    "gradients.parquet": ("grad_norm", "grad_misfit"),
}
# What `combined` takes the mean rank of, as far as it is there: with labels, and without. Those of
# the folds were not measured on planted noise; for the others see tests/benchmarks/outliers.md.
# There ifd alone finds swapped answers better than this mean does.
LABELLED = ("fold_label", "label_aum")
UNLABELLED = ("fold_loss", "length_z")
TOP = 30  # examples shown, unless the command says how many
OPENING = 20  # tokens
FORGETTING_EVALS = 6  # fewer say nothing about forgetting
# Length bins; the examples of each, of which equal lengths may take up to half.
BINS, BIN_LEAST = 10, 20


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
    """Texts of a split: id, text, prompt, answer, length, prompt_targets, label; in id order.

    answer: the completion without what ends the turn of a conversation.
    """
    names = ("id", "split", "text", "completion", "end", "length", "prompt_targets", "label")
    table = read_table(workdir / "ledger" / "examples.parquet", names)
    found = sorted((e for e in table.to_pylist() if e["split"] == split), key=lambda e: e["id"])
    for e in found:
        cut = e.pop("completion")
        e |= {"prompt": e["text"][:cut], "answer": e["text"][cut : e.pop("end")]}
    return found


def read_ledger(workdir: pathlib.Path) -> Ledger:
    """Raises UserError where no eval took all training examples, or the files disagree."""
    examples = read_examples(workdir, "train")
    ids = np.array([e["id"] for e in examples], object)
    before = np.array([e["prompt_targets"] for e in examples])
    names = ("id", "split", "correct", "margin", "el2n", "label_p", "tokens", "token_nll")
    found: dict[int, dict[str, Any]] = {}
    for step, path in ledger_files(workdir, "eval").items():
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
        found[step] = columns
    if not found:
        raise UserError(
            f"{workdir / 'ledger'} has no eval of all training examples: outliers are mined from a "
            "run with train.ledger_every above 0, e.g. --config.train.ledger_every=0.5"
        )
    # Of a run that diverged, the evals after that hold nothing to rank by.
    found = {k: e for k, e in found.items() if np.isfinite(e["loss"]).any()} or found
    evals = [found[step] for step in sorted(found)]
    stacked = {k: np.stack([e[k] for e in evals]) for k in evals[0]}
    label = np.array([e["label"] for e in examples])
    last = {k: stacked.pop(k)[-1] for k in ("tokens", "token_max", "opening")}
    return Ledger(ids=ids, label=label, steps=sorted(found), **stacked, **last)


def length_bins(tokens: np.ndarray) -> np.ndarray:
    """[n] -> the number of each example's bin; the bins are quantiles of `tokens`."""
    count = max(1, min(BINS, len(tokens) // BIN_LEAST))
    edges: list[float] = []
    for edge in np.quantile(tokens, np.linspace(0, 1, count + 1)[1:-1]):
        low = edges[-1] if edges else -np.inf
        # Where many have one length, some of the bins would be smaller.
        inside, behind = ((tokens >= low) & (tokens < edge)).sum(), (tokens >= edge).sum()
        if min(inside, behind) >= BIN_LEAST / 2:
            edges.append(edge)
    return np.searchsorted(edges, tokens, side="right")


def length_z(loss: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[n]: (loss - median) / (1.4826 median absolute deviation), both of the example's length bin.

    Where that deviation is 0, as more than half of the losses are one, 1.2533 times the mean
    absolute one stands for it: both are the standard deviation of normal losses.
    Losses of short completions vary more, and without bins they would fill both ends of the list.
    """
    bins = length_bins(tokens)
    out = np.empty(len(loss))
    for b in np.unique(bins):
        inside = loss[bins == b]
        # An example whose loss is no number has no place, and leaves the others theirs.
        finite = inside[~np.isnan(inside)]
        away = inside - (np.median(finite) if len(finite) else np.nan)
        apart = np.abs(away[np.isfinite(away)])
        deviation = 0.0
        if len(apart):
            deviation = 1.4826 * np.median(apart) or 1.2533 * apart.mean()
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
    ranks = [rank(out[k]) for k in combined_of(out)]
    return {k: out[k] for k in SCORES if k in out} | {"combined": np.mean(ranks, 0)}


def combined_of(scores: Iterable[str]) -> list[str]:
    """The scores, of those that there are, whose mean rank is `combined`."""
    if "label_aum" in scores:
        return [k for k in LABELLED if k in scores]
    return ["ifd"] if "ifd" in scores else [k for k in UNLABELLED if k in scores]


def rank(score: np.ndarray) -> np.ndarray:
    """[n] in (0, 1]: places by size over their number, a mean where equal; 0.5 where it is NaN."""
    return np.where(np.isnan(score), 0.5, share(score, "average"))


def share(score: np.ndarray, ties: str = "max") -> np.ndarray:
    """[n] in (0, 1]: the share of examples whose score is not larger; NaN where it is NaN."""
    found = scipy.stats.rankdata(score, ties, nan_policy="omit") / max(1, (~np.isnan(score)).sum())
    return np.where(np.isnan(score), np.nan, found)


def score(workdir: pathlib.Path, ledger: Ledger | None = None) -> dict[str, np.ndarray]:
    """id, tokens and every score of a run's training examples; raises as read_ledger.

    ledger: the workdir's, where it was read before.
    """
    ledger = ledger or read_ledger(workdir)
    more = read_seen(workdir, ledger.ids) | read_more(workdir, ledger.ids)
    return {"id": ledger.ids, "tokens": ledger.tokens, **scores_of(ledger, more)}


def read_seen(workdir: pathlib.Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """seen_loss [n], NaN for what was not trained on; {} where the run kept none.

    It is of a model that had not trained on the example, at the cost of nothing (prequential loss,
    Dawid 1984); but that model had seen little where the example came early: hence the median.
    """
    names = ("id", "tokens", "nll")
    tables = [read_table(p, names) for p in ledger_files(workdir, "seen").values()]
    if not tables:
        return {}
    first: dict[str, float] = {}  # in the order of training
    for row in pyarrow.concat_tables(tables).to_pylist():
        first.setdefault(row["id"], row["nll"] / row["tokens"])
    loss = np.array(list(first.values()))
    usual = scipy.ndimage.median_filter(loss, size=min(RUNNING, len(loss)), mode="mirror")
    excess = dict(zip(first, loss - usual, strict=True))
    return {"seen_loss": np.array([excess.get(i, np.nan) for i in ids])}


def read_more(workdir: pathlib.Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The scores [n] of the files of MORE that are there; without those that are NaN for all."""
    found: dict[str, np.ndarray] = {}
    for name, scores in MORE.items():
        path = workdir / name
        if not path.exists():
            continue
        table = read_table(path, ("id", *scores))
        at = {i: n for n, i in enumerate(table["id"].to_pylist())}
        if at.keys() != set(ids):
            raise UserError(f"{path}: its examples are not those of the ledger; remove it")
        order = [at[i] for i in ids]
        found |= {k: table[k].to_numpy()[order] for k in scores}
    return {k: x for k, x in found.items() if not np.isnan(x).all()}


def read_neighbours(workdir: pathlib.Path) -> dict[str, list[tuple[str, float]]]:
    """id -> (id, cosine) of the examples with the most alike gradients; {}: none were taken."""
    path = workdir / "gradients.parquet"
    if not path.exists():
        return {}
    table = read_table(path, ("id", "neighbours", "cosines"))
    columns = [c.to_pylist() for c in table.columns]
    return {i: list(zip(*pair, strict=True)) for i, *pair in zip(*columns, strict=True)}


def _looked_at(workdir: pathlib.Path, steps: list[int]) -> str:
    """Which adapters the scores were taken under: the files of MORE may be of other steps."""
    told = f"The ledger looked at steps {', '.join(map(str, steps))}; the last is that of `loss`."
    for name, scores in MORE.items():
        path = workdir / name
        if path.exists() and "step" in column_names(path):
            step = read_table(path, ("step",))["step"][0].as_py()
            told += f" The adapters of step {step} made {' and '.join(f'`{k}`' for k in scores)}."
    return told


def broken_rules(workdir: pathlib.Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(id -> rule -> why, of the training examples that a rule flags; lines on rare labels)."""
    rows, words = [], {}
    for split in ("train", "validation"):
        for e in read_examples(workdir, split):
            words[e["label"]] = e["answer"].strip()
            of = e["prompt"], e["answer"], e["length"], e["label"]
            rows.append(rules.Row(e["id"], split, *of))
    seq_len = read_config(workdir, ("data.seq_len",))["data"]["seq_len"]
    trained = {r.id for r in rows if r.split == "train"}
    rare = rules.imbalance([r for r in rows if r.split == "train"]) or {}
    lines = [f"- label {code(words[k])}: {x:.1%} of the labelled" for k, x in rare.items()]
    broken = {k: v for k, v in rules.check(rows, seq_len).items() if k in trained}
    return broken, ["", "# Rare labels", "", *lines] if lines else []


def markdown(
    columns: dict[str, np.ndarray],
    broken: dict[str, dict[str, str]],
    texts: list[str],
    worst: np.ndarray,
    categories: list[str],
    neighbours: dict[str, list[tuple[str, float]]],
    looked_at: str,
    shared: list[str],
) -> str:
    """The worst examples, what they share (lines of Markdown), and those that break a rule."""
    names = [k for k in SCORES if k in columns]
    text_of = dict(zip(columns["id"], texts, strict=True))
    lines = [f"# The {len(worst)} most suspicious of {len(columns['id'])} training examples", ""]
    lines += ["Of each score its value and, in brackets, the share of examples below or at it.", ""]
    lines += [f"- `{k}`: {SCORES[k]}" for k in names]
    ranked = " and ".join(map(code, combined_of(names)))
    lines += ["", f"Ranked by the mean rank of {ranked}.", "", looked_at]
    if neighbours:
        chance = math.sqrt(2 * math.log(len(texts)) / DIMENSION)
        lines += [
            "",
            f"Gradients are compared by their projections: of the usual {DIMENSION:,} numbers, "
            f"unrelated examples come to a cosine of about {chance:.2f} by chance.",
        ]
    if lost := [code(i) for i in columns["id"][~np.isfinite(columns["loss"])]]:
        shown = ", ".join(lost[:20]) + (f" and {len(lost) - 20} more" if len(lost) > 20 else "")
        lines += ["", f"The last eval gave {len(lost)} no finite loss: {shown}."]
    shares = {k: share(columns[k]) for k in names}
    for place, i in enumerate(worst, 1):
        shown = ", ".join(f"{k} {columns[k][i]:.3g} ({shares[k][i]:.3f})" for k in names)
        ident = columns["id"][i]
        lines += ["", f"## {place}. {code(ident)}: {categories[i]}", "", shown, ""]
        lines += [f"{rule}: {code(why)}\n" for rule, why in broken.get(ident, {}).items()]
        lines += ["    " + line for line in texts[i].splitlines()]
        if near := neighbours.get(ident):
            lines += ["", "The training examples with the most alike gradients:", ""]
            lines += [f"- {code(j)}, cosine {c:.3f}: {code(text_of[j][:120])}" for j, c in near]
    lines += [*shared, "", f"# {len(broken)} training examples that break a rule", ""]
    lines += [f"- `{k}`: {v}" for k, v in rules.RULES.items()]
    lines += [""]
    lines += [
        f"- {code(example)}: {'; '.join(f'{k}: {code(why)}' for k, why in found.items())}"
        for example, found in sorted(broken.items())
    ]
    return "\n".join(lines) + "\n"


def mine(
    workdir: pathlib.Path, top: int | None, filtered: pathlib.Path | None
) -> dict[str, np.ndarray]:
    """Writes the files of a workdir, and to `filtered` the ids of the `top` worst.

    top: None: TOP, or all where there are fewer.
    """
    require(workdir)
    ledger = read_ledger(workdir)
    review.read_marks(workdir / "review.csv", list(ledger.ids))  # refused before minutes of work
    columns = score(workdir, ledger)
    if not np.isfinite(columns["loss"]).any():
        raise UserError(f"no loss of the training examples in {workdir} is finite: nothing to rank")
    top = min(TOP, len(columns["id"])) if top is None else top
    if not 0 < top <= len(columns["id"]):
        raise UserError(f"--top is {top}, expected 1 to {len(columns['id'])} training examples")
    if filtered:
        require_writable(filtered)
    examples = read_examples(workdir, "train")
    texts = [e["text"] for e in examples]
    broken, rare = broken_rules(workdir)
    ranks = {k: rank(columns[k]) for k in SCORES if k in columns}
    worst = np.argsort(-columns["combined"], kind="stable")[:top]
    if filtered:
        write_text(filtered, "".join(f"{columns['id'][i]}\n" for i in worst))
    categories, shared = explain(workdir, examples, columns, ranks, broken, worst)
    shared = review.write(workdir, texts, columns, broken, categories, top) + shared + rare
    more = {"rules": [sorted(broken.get(i, {})) for i in columns["id"]], "category": categories}
    write_table(workdir / "outliers.parquet", pyarrow.table(columns | more))
    near, looked_at = read_neighbours(workdir), _looked_at(workdir, ledger.steps)
    page = markdown(columns, broken, texts, worst, categories, near, looked_at, shared)
    write_text(workdir / "outliers.md", page)
    return columns


def main() -> None:
    parser = Parser("gemma_lora.outliers", __doc__)
    parser.add_argument("--workdir", required=True, type=path_argument)
    parser.add_argument("--top", type=int, help=f"how many to show or filter ({TOP})")
    parser.add_argument("--write-filtered", type=path_argument, help="a file for data.exclude")
    options = parser.parse_args()
    columns = mine(options.workdir, options.top, options.write_filtered)
    print(f"{len(columns['id'])} examples scored: {options.workdir / 'outliers.md'}, review.html")


if __name__ == "__main__":
    run_main(main)
