"""What a report says, once: sections of blocks, which prose.py and page.py only put into a form.

A str is a paragraph, a list of str are bullets; **x** is bold. Every number is one of the report's.
"""

import dataclasses
import json
from typing import Any

from gemma_lora.config import flat
from gemma_lora.outliers import SCORES, combined_of
from gemma_lora.report.reading import SPLITS
from gemma_lora.stats import FEW

BROUGHT_UP = ("status", "steps", "steps_planned", "steps_per_epoch", "examples", "nan")
IN_COST = ("phases", "peak_memory")


@dataclasses.dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[Any]]


@dataclasses.dataclass(frozen=True)
class Plot:
    """name: a key of plots.figures; without such a figure nothing is shown."""

    name: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A text of the dataset, which may hold anything; loss by token where the ledger has it."""

    name: str
    numbers: str
    text: str
    completion: int
    prompt_has_loss: bool
    pieces: list[str] | None
    token_nll: list[float] | None
    tokens_left_out: int


Block = str | list[str] | Table | Plot | Example


def show(x: Any) -> str:
    """A value for people: 0.1235, 1.2e-05, 1,234, [0.1000, 1234], yes, n/a."""
    if isinstance(x, list):  # whose commas part its items alone
        return f"[{', '.join(show(y).replace(',', '') for y in x)}]"
    if x is None or isinstance(x, bool):
        return {None: "n/a", True: "yes", False: "no"}[x]
    if isinstance(x, float):
        return f"{x:.2g}" if 0 < abs(x) < 1e-3 else f"{x:,.4f}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def title(r: dict[str, Any]) -> str:
    return f"Training report: {r['model']['arch']}"


def lead(r: dict[str, Any]) -> list[Block]:
    run, loss = r["run"], r["validation"]["loss"]
    text = (
        f"Status: {run['status']}, {show(run['steps'])} of {show(run['steps_planned'])} planned "
        f"steps. Validation loss {show(loss['start'])} at start, {show(loss['best'])} at best "
        f"(step {show(r['evals']['best'])}), a decrease of {show(loss['decrease_pct'])} %, "
        f"interval {show(loss['decrease_pct_interval'])}: **{loss['conclusion']}**."
    )
    if loss["last_conclusion"].startswith("rose"):
        text += f" At the last eval, {show(loss['last'])}, it **{loss['last_conclusion']}**."
    return [r["notes"], text] if r["notes"] else [text]


def sections(r: dict[str, Any]) -> list[tuple[str, list[Block]]]:
    left_out = tuple(f"run.{k}" for k in (*BROUGHT_UP, *IN_COST))
    found = [
        ("Overview", _overview(r)),
        ("Hyper-parameters", [_facts(r, "config.")]),
        ("Cost", _cost(r["cost"])),
        ("Losses", _losses(r)),
        ("Learning curve", _curve(r)),
        ("Generalisation gap", _gap(r["generalisation_gap"])),
        ("Token accuracy", _accuracy(r)),
        ("Class accuracy", _classes(r)),
        ("Loss by length", _lengths(r["loss_by_length"])),
        ("Format and content", _kinds(r["format_content"])),
        ("Outliers of the training set", _training(r["training"])),
        ("Worst validation examples", _worst(r)),
        ("Comparison with the base model", _base(r)),
        ("Comparison with other runs", _others(r["compare"])),
        ("Final thoughts", [_final(r)]),
        ("What this run does not show", [_not_shown(r)]),
        ("Manifest", [_facts(r, "run.", left_out)]),
    ]
    return [(name, blocks) for name, blocks in found if blocks]


def _facts(r: dict[str, Any], parts: str | tuple[str, ...], left_out: Any = ()) -> Table:
    return Table(
        ["key", "value"],
        [
            [k, json.dumps(v)]
            for k, v in flat(r).items()
            if k.startswith(parts) and not k.startswith(left_out)
        ],
    )


def _by_point(r: dict[str, Any], *names: str, more: tuple[str, ...] = ()) -> Table:
    keys, values = ("start", "best", "last", *more), flat(r)
    paths = [f"{s}.{n}" for n in names for s in SPLITS]
    rows = [[p, *(values.get(f"{p}.{k}") for k in keys)] for p in paths]
    return Table(["", *(k.replace("_", " ") for k in keys)], rows)


def _overview(r: dict[str, Any]) -> list[Block]:
    parts = ("data", "evaluated.", "model.", *(f"run.{k}" for k in BROUGHT_UP))
    return [_facts(r, parts)]


def _cost(c: dict[str, Any]) -> list[Block]:
    quarter = c["step_seconds"] or [None] * 3
    text = (
        f"{show(c['seconds'])} seconds in all; {show(c['tokens'])} tokens trained on, padding not "
        f"counted, {show(c['tokens_per_second'])} a second of the steps. A step took "
        f"{show(quarter[1])} seconds (median; half of them {show(quarter[0])} to "
        f"{show(quarter[2])}). Peak memory in GiB: "
        + (", ".join(f"{k} {show(v)}" for k, v in c["peak_memory_gib"].items()) or "n/a")
        + ". "
        + (
            f"At {show(c['price_per_hour'])} an hour of the machine that is {show(c['money'])}."
            if c["money"] is not None
            else "No price an hour was given, so none is stated."
        )
    )
    head = ["phase", "seconds", "share of the run", "tokens"]
    rows = [[k, *(p[x] for x in ("seconds", "share_of_run", "tokens"))]
            for k, p in c["phases"].items()]  # fmt: skip
    notes = ["The phases of waiting and copying are parts of the steps."]
    if c["continued"]:
        notes.append("The run was continued: the phases are those of its last start alone.")
    return [text, Table(head, rows), notes]


def _losses(r: dict[str, Any]) -> list[Block]:
    more = ("decrease_pct", "interval", "conclusion")
    head = ["step", *(f"{s.replace('_', ' ')} {x}" for s in SPLITS for x in ("loss", "interval"))]
    curves = [r[s]["curve"]["loss"] for s in SPLITS]
    rows = [
        [step, *(c[x][i] for c in curves for x in ("value", "interval"))]
        for i, step in enumerate(r["evals"]["steps"])
    ]
    return [
        _by_point(r, "loss", more=more),
        [
            f"Interval: {r['validation']['loss']['interval_of']}. A change is shown where it "
            "excludes 0.",
            *(
                f"{s.replace('_', ' ').capitalize()} loss, last - start: interval "
                f"{show(r[s]['loss']['last_interval'])}: {r[s]['loss']['last_conclusion']}."
                for s in SPLITS
            ),
        ],
        "Each eval, with the 95 % bootstrap interval of its loss over examples. Two evals are of "
        "the same examples, so overlapping intervals do not mean that they are equal: of the "
        "start against best and last that is tested above, paired.",
        Table(head, rows),
    ]


def _curve(r: dict[str, Any]) -> list[Block]:
    more, last = r["more_epochs"], r["final_steps"]
    trend = "Fewer than ten train steps with a finite loss: no trend is fitted."
    if last:
        trend = (
            f"Loss reduction of the final steps {show(last['steps'])}, on the line fitted to the "
            f"train loss: {show(last['reduction'])} nats per token, interval "
            f"{show(last['reduction_interval'])}. Slope per 100 steps "
            f"{show(last['slope_per_100_steps'])}, interval {show(last['interval'])} "
            f"({last['method']}; r = {show(last['autocorrelation'])})."
        )
    return [
        Plot("learning_curve", "Train loss of each step; validation and train-probe loss of each "
             "eval, with 95 % bootstrap intervals"),
        Plot("schedule", "Learning rate and norm of the gradient"),
        [
            trend,
            f"More epochs recommended: **{show(more['recommended'])}**; {more['because']}. Of "
            f"the evals of steps {show(more['evals'])}: difference {show(more['difference'])}, "
            f"interval {show(more['interval'])}.",
        ],
    ]  # fmt: skip


def _gap(g: dict[str, Any]) -> list[Block]:
    return [
        f"Validation - train-probe loss: {show(g['start'])} at start, interval "
        f"{show(g['start_interval'])}; {show(g['best'])} at best, interval "
        f"{show(g['best_interval'])}; best - start {show(g['growth'])}, interval "
        f"{show(g['growth_interval'])}. The probe is part of the training set: a gap that grew "
        "beyond its interval is a fall that did not carry over in full to new examples."
    ]


def _accuracy(r: dict[str, Any]) -> list[Block]:
    return [
        _by_point(r, "token_accuracy", more=("interval", "conclusion")),
        f"Interval: {r['validation']['token_accuracy']['interval_of']}.",
        "The share of next tokens that are the model's first choice after the reference text "
        "before them (teacher-forced next-token accuracy); it is not answer accuracy. TRL's "
        "metrics under their own names are means over batches; they have no interval.",
        _by_point(r, "trl_compat.eval_loss", "trl_compat.eval_mean_token_accuracy"),
    ]


def _classes(r: dict[str, Any]) -> list[Block]:
    found = r["validation"].get("class_accuracy")
    if not found:
        return []
    labels, over = r["config"]["data"]["labels"], found["overconfidence"]
    confusion = [[k, *row] for k, row in zip(labels, found["confusion"], strict=True)]
    head = ["p of the chosen label", "examples", "mean p", "accuracy", "interval"]
    rows = [[b[k] for k in ("p", "examples", "mean_p", "accuracy", "interval")]
            for b in found["reliability"]]  # fmt: skip
    return [
        _by_point(r, "class_accuracy", more=("start_interval", "interval")),
        [
            "The share of examples whose own label word is the most probable of the label words, "
            "as the first token of the answer. Intervals are Wilson's, 95 %, the last one of the "
            "best eval. The most frequent label is that of "
            f"{show(found['most_frequent'])} of those with a label: as much is right by "
            "always naming it.",
            f"Validation, start against best: {show(found['gained'])} examples became right, "
            f"{show(found['lost'])} became wrong; exact McNemar p {show(found['p'])}: "
            f"**{found['conclusion']}**.",
            "At best, rows are the true labels, columns the predicted ones:",
        ],
        Table(["", *labels], confusion),
        f"Calibration of the validation set at best: mean p of the chosen label minus its "
        f"accuracy is {show(over['value'])}, interval {show(over['interval'])} (bootstrap over "
        "examples); above 0 the model is too sure of itself.",
        Table(head, rows),
        Plot("reliability", "Accuracy against the probability of the chosen label, with Wilson "
             "intervals; on the line the model is calibrated"),
    ]  # fmt: skip


def _lengths(bins: list[dict[str, Any]]) -> list[Block]:
    head = ["loss tokens", "examples", "start", "interval", "best", "interval"]
    keys = ("tokens", "examples", "start", "start_interval", "best", "best_interval")
    return [
        "Validation loss in bins of the examples' number of loss tokens (quantiles), with 95 % "
        "bootstrap intervals.",
        Table(head, [[b[k] for k in keys] for b in bins]),
        Plot("length", "Validation loss by number of loss tokens, at start and at best"),
    ]


def _kinds(found: dict[str, Any] | None) -> list[Block]:
    if found is None:
        return []
    if not found:
        return ["The completions have GSM8K's '####', but this run's ledger does not hold the "
                "texts of the tokens, so their loss cannot be split."]  # fmt: skip
    keys = [f"{what}_{at}{end}" for at in ("start", "best") for what in ("loss", "share")
            for end in ("", "_interval")]  # fmt: skip
    return [
        f"Of the {show(found['examples'])} validation completions that hold '####': format tokens "
        "are those with a character of `<<`, `>>` or `####`, content tokens all others; share is "
        "that of all nats. 95 % bootstrap intervals over examples.",
        Table(["", "tokens", *(k.replace("_", " ") for k in keys)],
              [[k, found[k]["tokens"], *(found[k][x] for x in keys)]
               for k in ("format", "content")]),
    ]  # fmt: skip


def _example(x: dict[str, Any], numbers: dict[str, Any]) -> Example:
    if x["worst_tokens"]:
        shown = ", ".join(f"{json.dumps(p, ensure_ascii=False)} {show(nll)}"
                          for p, nll in x["worst_tokens"])  # fmt: skip
        numbers = {**numbers, "tokens of the largest loss": shown}
    text = ", ".join(f"{k} {show(v)}" for k, v in numbers.items())
    keys = ("text", "completion", "prompt_has_loss", "pieces", "token_nll", "tokens_left_out")
    return Example(x["id"], text, **{k: x[k] for k in keys})


def _training(t: dict[str, Any] | None) -> list[Block]:
    if t is None:
        return ["The run did not look at its training examples one by one; train.ledger_every "
                "above 0 makes it."]  # fmt: skip
    mapped = (
        "Data map: over the evals after step 0, mean and standard deviation of exp(-loss) of each "
        "training example; colour: share of its tokens that were the first choice"
    )
    blocks: list[Block] = [
        f"{show(t['examples'])} training examples, looked at in the evals of steps "
        f"{show(t['evals'])}; larger scores are more suspicious, but base_loss and "
        f"variability alone say little. Scores from {t['source']}. "
        + ("" if t["mapped"] else "A data map takes two evals after step 0."),
        Table(["score", "what", "smallest", "quartile", "median", "quartile", "largest"],
              [[k, SCORES.get(k, f"mean rank of {' and '.join(combined_of(t['scores']))}"), *q]
               for k, q in t["scores"].items()]),
    ]  # fmt: skip
    if t["mapped"]:
        blocks.append(Plot("data_map", mapped))
    blocks += [
        Plot("scores", "Distribution of each score; the ticks are the examples shown below"),
        "The highest by the combined rank. After a score its value and, in brackets, the share of "
        "examples below or at it. A score is a reason to look, not a verdict.",
    ]
    for x in t["worst"]:
        scores = {k: f"{show(v)} ({show(rank)})" for k, (v, rank) in x["scores"].items()}
        numbers = {"combined": x["combined"], "tokens": x["tokens"], **scores}
        if x["rules"]:
            numbers["rules broken:"] = ", ".join(x["rules"])
        blocks.append(_example(x, numbers))
    return blocks


def _worst(r: dict[str, Any]) -> list[Block]:
    n = r["length"]
    keys = ("loss", "loss_at_start", "tokens", "nll_max")
    blocks: list[Block] = [
        "By mean token loss at the best step. A mean over few tokens varies more, which alone "
        "brings short completions to the top. Spearman's rank correlation of tokens and loss is "
        f"{show(n['spearman'])}, interval {show(n['interval'])} (Fisher's z, Bonett & Wright "
        f"2000); the median example has {show(n['median'])} tokens, the median of those below "
        f"{show(n['median_worst'])}."
    ]
    if not r["pieces"]:
        blocks.append("This run's ledger does not hold the texts of the tokens (the column "
                      "pieces of examples.parquet), so no loss is shown by token.")  # fmt: skip
    return blocks + [_example(x, {k: x[k] for k in keys}) for x in r["outliers"]]


def _base(r: dict[str, Any]) -> list[Block]:
    if r["run"]["best_step"] is None:
        return ["No eval had finite losses in all sets: nothing to compare."]
    if r["evals"]["best"] == r["evals"]["start"]:
        return ["The best eval is that of the base model itself: nothing to compare."]
    better, loss = r["improved"], r["validation"]["loss"]
    return [
        f"Validation loss {show(loss['start'])} under the base model, {show(loss['best'])} under "
        f"the adapter: **{loss['conclusion']}**. The loss of {show(better['examples'])} of "
        f"{show(r['evaluated']['validation'])} examples is lower under the adapter, a share of "
        f"{show(better['share'])}, Wilson's 95 % interval {show(better['interval'])}.",
        Plot("base", "Loss of each validation example under the base model and at best; below the "
             "line it fell"),
    ]  # fmt: skip


def _others(runs: list[dict[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    if runs:
        blocks.append(
            "Each at its own best eval, on the validation examples that both have, paired; "
            "differences are this run minus the other, with 95 % paired bootstrap intervals, not "
            "widened for the number of runs compared, nor for the choice of each one's best eval "
            "on these very examples (of more evals the best looks better). Another seed of the "
            "same recipe would also differ: an interval over examples does not say that the "
            "recipe is better."
        )
    if len(runs) > 1:
        head = ["other run", "its loss", "this run's", "difference", "interval", "config"]
        keys = ("other", "this", "difference", "interval")
        rows = [[c["workdir"], *(c.get("loss", {}).get(k) for k in keys), "; ".join(c["config"])]
                for c in runs]  # fmt: skip
        blocks.append(Table(head, rows))
    for c in runs:
        steps = f"steps {show(c['best'])}, {show(c['shared'])} shared examples"
        if c["obstacles"]:
            blocks.append(f"**{c['workdir']}** ({steps}): the losses **cannot be compared**: "
                          f"{'; '.join(c['obstacles'])}.")  # fmt: skip
        else:
            keys = ("this", "other", "difference", "interval", "conclusion")
            blocks += [
                f"**{c['workdir']}** ({steps}):",
                Table(["", *keys], [[k.replace("_", " "), *(c[k][x] for x in keys)]
                                    for k in ("loss", "token_accuracy")]),
            ]  # fmt: skip
            if k := c.get("class_accuracy"):
                blocks.append(
                    f"Class accuracy {show(k['this'])} here, {show(k['other'])} there: right "
                    f"only here {show(k['only_this_right'])}, right only there "
                    f"{show(k['only_other_right'])}; exact McNemar p {show(k['p'])}."
                )
        notes = [f"Caution: {x}." for x in c["cautions"]]
        notes += [f"Config, {x}." for x in c["config"]]
        blocks += [notes] if notes else []
    return blocks


def _final(r: dict[str, Any]) -> str:
    loss, accuracy = (r["validation"][k] for k in ("loss", "token_accuracy"))
    return (
        f"By step {show(r['evals']['best'])} of the {show(r['run']['steps'])} that were made "
        f"the validation loss went from {show(loss['start'])} "
        f"to {show(loss['best'])} ({loss['conclusion']}), its token accuracy from "
        f"{show(accuracy['start'])} to {show(accuracy['best'])} ({accuracy['conclusion']}), and "
        "the gap to the training examples changed by "
        f"{show(r['generalisation_gap']['growth'])}, interval "
        f"{show(r['generalisation_gap']['growth_interval'])}. More epochs recommended: "
        f"{show(r['more_epochs']['recommended'])}."
    )


def _not_shown(r: dict[str, Any]) -> list[str]:
    return [
        f"Other seeds: the intervals cover the choice of the {show(r['evaluated']['validation'])} "
        "validation examples, not data order, initial adapters or dropout. With fewer than about "
        f"{FEW} examples they are too narrow.",
        "An untouched test set: the best eval was chosen by the validation loss that is reported "
        "for it, and its interval takes that choice as given.",
        "Answers: everything here is teacher-forced. No text was generated, no answer was checked.",
        "Other tasks: no benchmark was run; neither transfer nor forgetting was measured.",
    ]
