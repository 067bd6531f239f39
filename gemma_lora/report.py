"""The report of a run, computed from its workdir alone: report.json, report.md, a picture.

    python -m gemma_lora.report --workdir DIR

Losses are token-weighted means over a fixed set, in nats per token, dropout off. start is the eval
of step 0 (the base model; after PiSSA, whose base is rounded anew, but for that rounding), best the
eval with the lowest validation loss.
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
import string
from typing import Any

import numpy as np

from gemma_lora.config import flat
from gemma_lora.errors import UserError, run_main
from gemma_lora.evaluate import read_table
from gemma_lora.files import replace_file, write_text
from gemma_lora.stats import bootstrap, interval, mcnemar, spearman, trend, wilson

SPLITS = ("validation", "train_probe")
MODEL = ("arch", "weights", "trainable_parameters", "base_parameters", "adapted_modules")
RUN = ("status", "steps", "steps_planned", "steps_per_epoch", "tokens", "seconds", "examples")
OUTLIERS, SHOWN = 10, 600  # how many examples; how many characters of each in Markdown
INTERVAL_OF = "best - start, {}, 95 % paired bootstrap over examples"

# $validation_loss_start is report["validation"]["loss"]["start"].
MARKDOWN = string.Template("""# Training report: $model_arch
Status: $run_status, $run_steps of $run_steps_planned planned steps. Validation loss
$validation_loss_start at start, $validation_loss_best at best (step $evals_best), a decrease of
$validation_loss_decrease_pct %: **$validation_loss_conclusion**.

## Overview
| | |
| --- | --- |
$overview

## Learning curve
![Train loss of each step; validation and train-probe loss of each eval](learning_curve.png)

$losses

- Interval: $validation_loss_interval_of. A change is shown where it excludes 0.
- Loss reduction of the final steps $final_steps_steps, on the line fitted to the train loss:
  $final_steps_reduction nats per token. Slope per 100 steps $final_steps_slope_per_100_steps,
  interval $final_steps_interval ($final_steps_method; r = $final_steps_autocorrelation).
- More epochs recommended: **$more_epochs_recommended**; $more_epochs_because. Last two evals, steps
  $more_epochs_evals: difference $more_epochs_difference, interval $more_epochs_interval.

## Generalisation gap
Validation - train-probe loss: $generalisation_gap_start at start, $generalisation_gap_best at best;
it grew by $generalisation_gap_growth, interval $generalisation_gap_growth_interval. The probe is
part of the training set: a gap that grew is a fall that did not carry over in full to new examples.

## Token accuracy
$accuracies

The share of next tokens that are the model's first choice after the reference text before them
(teacher-forced next-token accuracy); it is not answer accuracy. TRL's metrics under their own names
are unweighted means over batches.

$trl

$classes## Worst validation examples
By mean token loss at the best step. A mean over few tokens varies more, so short completions reach
the top more easily: Spearman's rank correlation of tokens and loss is $length_spearman; the median
example has $length_median tokens, the median of those below $length_median_worst.

$worst

## Final thoughts
In $run_steps steps the validation loss went from $validation_loss_start to $validation_loss_best
($validation_loss_conclusion), its token accuracy from $validation_token_accuracy_start to
$validation_token_accuracy_best ($validation_token_accuracy_conclusion), and the gap to the training
examples grew by $generalisation_gap_growth. More epochs recommended: $more_epochs_recommended.

## What this run does not show
- Other seeds: the intervals cover the choice of the $evaluated_validation validation examples, not
  data order, initial adapters or dropout. With fewer than about 20 examples they are too narrow.
- An untouched test set: the best eval was chosen by the validation loss that is reported for it.
- Answers: everything here is teacher-forced. No text was generated, no answer was checked.
- Other tasks: no benchmark was run; neither transfer nor forgetting was measured.
""")

# Only where the rows have label words.
CLASSES = string.Template("""## Class accuracy
$accuracies

- The share of examples whose own label word is the most probable of the label words, as the first
  token of the answer. Intervals are Wilson's, 95 %, of the best eval.
- Validation, start against best: $gained examples became right, $lost became wrong; exact McNemar
  p $p: **$conclusion**.
- At best, rows are the true labels, columns the predicted ones:

$confusion

""")


@dataclasses.dataclass(frozen=True)
class Eval:
    """One eval: by split, the columns of `_eval` [examples], in id order.

    label_p is [examples, labels]: no labels, no columns.
    """

    step: int
    rows: dict[str, dict[str, np.ndarray]]

    def mean(self, split: str, column: str) -> float:
        """Per token: 'nll' -> loss, 'correct' -> token accuracy."""
        return float(self.rows[split][column].sum() / self.rows[split]["tokens"].sum())

    def right(self, split: str) -> np.ndarray:
        """Per labelled example: is its own label the most probable one."""
        label, p = (self.rows[split][k] for k in ("label", "label_p"))
        return (p.argmax(-1) == label)[label >= 0]


@dataclasses.dataclass(frozen=True)
class Workdir:
    """What a run left behind. evals are in the order of their steps, the first is step 0."""

    config: dict[str, Any]
    run: dict[str, Any]
    train: np.ndarray  # [3, train lines]: step, loss, learning rate; NaN where not finite
    lines: dict[int, dict[str, Any]]  # eval lines of metrics.jsonl by step
    evals: list[Eval]
    texts: dict[str, str]  # of the validation examples, by id


def read(workdir: pathlib.Path) -> Workdir:
    """Raises UserError naming the file that is missing, damaged or at odds with the others."""
    [config] = _records(workdir / "config.json", ("data", "optim"))
    [run] = _records(workdir / "run.json", (*MODEL, *RUN))
    lines: dict[str, dict[int, Any]] = {"train": {}, "eval": {}}
    for record in _records(workdir / "metrics.jsonl", ("kind", "step")):
        lines.setdefault(record["kind"], {})[record["step"]] = record
    train = [(s, r.get("loss"), r.get("lr")) for s, r in sorted(lines["train"].items())]
    curve = np.array(train, float).reshape(-1, 3).T  # None becomes NaN
    ledger = workdir / "ledger"
    first = _eval(ledger / "eval_000000.parquet", None)
    evals = sorted((_eval(p, first) for p in ledger.glob("eval_*.parquet")), key=lambda e: e.step)
    path = ledger / "examples.parquet"
    examples = read_table(path, ("id", "split", "text")).to_pylist()
    texts = {e["id"]: e["text"] for e in examples if e["split"] == "validation"}
    for missing in set(first.rows["validation"]["id"]) - texts.keys():
        raise UserError(f"{path}: no text of validation example {missing!r}")
    return Workdir(config, run, curve, lines["eval"], evals, texts)


def _records(path: pathlib.Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, or the one of a JSON file; each must have the keys."""
    try:
        text = path.read_text(encoding="utf-8")
        # A last line without its newline was cut short by a kill: it does not count.
        parts = text.split("\n")[:-1] if path.suffix == ".jsonl" else [text]
        found = [json.loads(part) for part in parts]
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is missing or damaged: {e}") from e
    if not all(isinstance(x, dict) and x.keys() >= set(keys) for x in found):
        raise UserError(f"{path} is damaged: expected objects with the keys {', '.join(keys)}")
    return found


def _eval(path: pathlib.Path, first: Eval | None) -> Eval:
    names = ("id", "split", "tokens", "nll", "nll_max", "correct", "label", "label_p")
    table = read_table(path, names).sort_by("id")
    columns = {k: table[k].to_numpy() for k in names[:-1]}
    columns["label_p"] = np.array(table["label_p"].to_pylist(), float).reshape(len(table), -1)
    rows = {s: {k: v[columns["split"] == s] for k, v in columns.items()} for s in SPLITS}
    for split, found in rows.items():
        if not len(found["id"]) or found["tokens"].min() < 1:
            raise UserError(f"{path}: no {split} rows, or one without tokens")
        for name in ("id", "tokens") if first else ():
            if not np.array_equal(found[name], first.rows[split][name]):
                raise UserError(f"{path}: {split} {name} differ from those of eval_000000.parquet")
    return Eval(int(path.stem.removeprefix("eval_")), rows)


def _more_epochs(w: Workdir) -> dict[str, Any]:
    """Whether training longer is worth a try: the test's numbers and what follows from them."""
    before, after = [w.evals[0], *w.evals][-2:]
    found = interval(bootstrap(before.rows["validation"], after.rows["validation"], 2)[:, 0])
    rates = w.train[2]
    share = float(rates[-1] / rates.max()) if rates.size and rates.max() > 0 else math.nan
    ended = w.run["steps_planned"] in w.train[0] and w.config["optim"]["schedule"] != "constant"
    ended = ended or share <= 0.01
    judged = before is not after and math.isfinite(share) and w.run["status"] != "nan"
    fell = found is not None and found[1] < 0
    change = "fell" if fell else "did not fall"
    because = f"the validation loss {change} beyond its interval between the last two evals"
    if not judged:
        because = "it takes two evals, train lines and a run that stayed finite to judge"
    elif ended and fell:
        because += ", but the schedule had ended: plan a longer run with a longer schedule"
    elif ended:
        because += "; with the learning rate decayed that is no sign of convergence"
    return {
        "recommended": judged and fell and not ended, "because": because,
        "evals": [before.step, after.step], "interval": found, "lr_share_of_peak": share,
        "difference": after.mean("validation", "nll") - before.mean("validation", "nll"),
    }  # fmt: skip


def build(workdir: pathlib.Path) -> dict[str, Any]:
    """The report of a workdir in JSON types, None where a number is not finite; raises as read."""
    w = read(workdir)
    best = next((e for e in w.evals if e.step == w.run["best_step"]), w.evals[0])
    points = {"start": w.evals[0], "best": best, "last": w.evals[-1]}
    # Seeded apart: the examples of the two sets are drawn independently.
    draws = {s: bootstrap(w.evals[0].rows[s], best.rows[s], i) for i, s in enumerate(SPLITS)}
    gap = {k: e.mean("validation", "nll") - e.mean("train_probe", "nll") for k, e in points.items()}

    def compared(split: str, column: str, unit: str) -> dict[str, Any]:
        out: dict[str, Any] = {k: e.mean(split, column) for k, e in points.items()}
        if column == "nll":
            change = out["start"] - out["best"]
            out["decrease_pct"] = 100 * change / out["start"] if out["start"] else None
        found = interval(draws[split][:, int(column == "correct")])
        conclusion = "no change that this set can show"
        if len(w.evals) == 1:
            conclusion = "no eval after step 0: nothing to compare"
        elif best is w.evals[0]:
            conclusion = "no eval had a lower validation loss than the base model"
        elif found is None:
            conclusion = "no interval: it takes two examples and finite losses"
        elif found[0] > 0 or found[1] < 0:
            conclusion = f"{'fell' if found[1] < 0 else 'rose'} beyond its 95 % interval"
        out["interval"], out["interval_of"] = found, INTERVAL_OF.format(unit)
        return out | {"conclusion": conclusion}

    rows, base, data = best.rows["validation"], w.evals[0].rows["validation"], w.config["data"]
    tokens, loss = rows["tokens"], rows["nll"] / rows["tokens"]
    worst = np.argsort(-loss, kind="stable")[:OUTLIERS]
    report: dict[str, Any] = {
        "run": {k: v for k, v in w.run.items() if k not in MODEL},
        "model": {k: w.run[k] for k in MODEL},
        "data": data.get("path") or data.get("source"),
        "evaluated": {s: len(best.rows[s]["id"]) for s in SPLITS},
        "config": w.config,
        "evals": {"steps": [e.step for e in w.evals], **{k: e.step for k, e in points.items()}},
        "generalisation_gap": gap | {
            "growth": gap["best"] - gap["start"],
            "growth_interval": interval(draws["validation"][:, 0] - draws["train_probe"][:, 0]),
        },
        "final_steps": trend(*w.train[:2]),
        "more_epochs": _more_epochs(w),
        "outliers": [
            {"id": rows["id"][i], "loss": float(loss[i]),
             "loss_at_start": float(base["nll"][i] / tokens[i]), "tokens": int(tokens[i]),
             "nll_max": float(rows["nll_max"][i]), "text": w.texts[rows["id"][i]]}
            for i in worst
        ],
        "length": {"spearman": spearman(tokens, loss), "median": float(np.median(tokens)),
                   "median_worst": float(np.median(tokens[worst]))},
    }  # fmt: skip
    for s in SPLITS:
        trl = {k: w.lines.get(e.step, {}) for k, e in points.items()}
        report[s] = {
            "loss": compared(s, "nll", "nats per token"),
            "token_accuracy": compared(s, "correct", "share of tokens"),
            "trl_compat": {
                name: {k: line.get(f"{s}/trl_compat/{name}") for k, line in trl.items()}
                for name in ("eval_loss", "eval_mean_token_accuracy")
            },
        }
        if (best.rows[s]["label"] >= 0).any():
            report[s]["class_accuracy"] = _classes(points, s)
    return json.loads(json.dumps(report), parse_constant=lambda name: None)


def _classes(points: dict[str, Eval], split: str) -> dict[str, Any]:
    """Class accuracy of a split at each point, and the change from start to best, tested."""
    start, best = points["start"].right(split), points["best"].right(split)
    label, p = (points["best"].rows[split][k] for k in ("label", "label_p"))
    confusion = np.zeros((p.shape[1],) * 2, int)
    np.add.at(confusion, (label[label >= 0], p[label >= 0].argmax(-1)), 1)
    chance = mcnemar(start, best)
    change = "rose" if best.sum() > start.sum() else "fell"
    return {
        **{k: float(e.right(split).mean()) for k, e in points.items()},
        "interval": wilson(best),
        "gained": int((best & ~start).sum()),
        "lost": int((start & ~best).sum()),
        "p": chance,
        "conclusion": f"{change}, p < 0.05"
        if chance < 0.05
        else "no change that this set can show",
        "confusion": confusion.tolist(),
    }


def show(x: Any) -> str:
    """A value in Markdown: 0.1235, 1,234, [0.1000, 0.2000], yes, n/a."""
    if isinstance(x, list):
        return f"[{', '.join(map(show, x))}]"
    if x is None or isinstance(x, bool):
        return {None: "n/a", True: "yes", False: "no"}[x]
    return f"{x:,.4f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)


def markdown(report: dict[str, Any]) -> str:
    """report.md; every number in it is one of the report's."""
    values = flat(report)

    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(show(x).replace("|", r"\|") for x in cells) + " |"

    def compared(*names: str, more: tuple[str, ...] = ()) -> str:
        keys, paths = ("start", "best", "last", *more), [f"{s}.{n}" for n in names for s in SPLITS]
        rows = [[p, *(values.get(f"{p}.{k}") for k in keys)] for p in paths]
        return "\n".join(map(line, [["", *keys], ["---"] * (1 + len(keys)), *rows]))

    def example(x: dict[str, Any]) -> str:
        # A longer fence than any run of backticks in the text, so that the text cannot end it.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", x["text"])), default=0))
        text = x["text"][:SHOWN] + "..." * (len(x["text"]) > SHOWN)
        numbers = ", ".join(f"{k} {show(v)}" for k, v in x.items() if k not in ("id", "text"))
        return f"**{x['id']}**: {numbers}\n\n{fence}text\n{text}\n{fence}"

    classes = ""
    if found := report["validation"].get("class_accuracy"):
        labels = report["config"]["data"]["labels"]
        table = [["", *labels], ["---"] * (1 + len(labels))]
        table += [[k, *row] for k, row in zip(labels, found["confusion"], strict=True)]
        classes = CLASSES.substitute(
            {k: show(v) for k, v in found.items()}
            | {"accuracies": compared("class_accuracy", more=("interval",))}
            | {"confusion": "\n".join(map(line, table))}
        )
    shown = {k.replace(".", "_"): show(v) for k, v in values.items()}
    parts = ("run.", "model.", "data", "evaluated.", "config.")
    overview = [line([k, json.dumps(v)]) for k, v in values.items() if k.startswith(parts)]
    return MARKDOWN.substitute(
        collections.defaultdict(lambda: "n/a", shown),  # there may be no final_steps
        overview="\n".join(overview),
        classes=classes,
        losses=compared("loss", more=("decrease_pct", "interval", "conclusion")),
        accuracies=compared("token_accuracy", more=("interval", "conclusion")),
        trl=compared("trl_compat.eval_loss", "trl_compat.eval_mean_token_accuracy"),
        worst="\n\n".join(map(example, report["outliers"])),
    )


def write(workdir: pathlib.Path) -> dict[str, Any]:
    """Writes learning_curve.png, report.md and report.json, each whole; returns the report."""
    report = build(workdir)
    with replace_file(workdir / "learning_curve.png") as temporary:
        plot(read(workdir), report, temporary)
    write_text(workdir / "report.md", markdown(report))
    write_text(workdir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def plot(w: Workdir, report: dict[str, Any], path: pathlib.Path) -> None:
    """The learning curve as a PNG of 1800 x 1000 pixels."""
    from matplotlib.figure import Figure  # costs a second that build() need not spend

    figure = Figure(figsize=(9, 5), dpi=200, layout="constrained")
    axes = figure.subplots()
    steps, losses = w.train[:2]
    width = max(1, len(steps) // 20)
    axes.plot(steps, losses, color="0.8", lw=1, label="train, each step (dropout on)")
    if width > 1:
        mean = [np.convolve(x, np.ones(width) / width, "valid") for x in (steps, losses)]
        axes.plot(*mean, color="0.45", label=f"train, running mean of {width}")
    for split, color, marker in zip(SPLITS, ("tab:blue", "tab:orange"), "os", strict=True):
        values, label = [e.mean(split, "nll") for e in w.evals], split.replace("_", " ")
        axes.plot(report["evals"]["steps"], values, color=color, marker=marker, label=label)
    best = report["evals"]["best"], report["validation"]["loss"]["best"] or math.nan
    axes.plot(*best, "*", ms=18, mec="black", color="gold", label=f"best, step {best[0]}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=report["model"]["arch"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a training run.")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    loss = write(parser.parse_args().workdir)["validation"]["loss"]
    print(f"validation loss: {loss['conclusion']}")


if __name__ == "__main__":
    run_main(main)
