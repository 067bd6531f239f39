"""The numbers of a report, with their intervals: a workdir -> one dict in JSON types.

Losses are token-weighted means over a fixed set, in nats per token, dropout off. start is the eval
of step 0 (the base model; after PiSSA, whose base is rounded anew, but for that rounding), best the
eval with the lowest validation loss of those that train.eval_every asks for and of the end.
Letters: n examples, e evals.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np

from gemma_lora.data.pipeline import in_steps, told_of_copies
from gemma_lora.evaluate import label_is_likeliest
from gemma_lora.metrics import LEDGER, STEPS
from gemma_lora.outliers import length_bins
from gemma_lora.report import compare, training
from gemma_lora.report.reading import MODEL, SPLITS, Eval, Workdir, read
from gemma_lora.report.tokens import detailed, format_columns
from gemma_lora.stats import (
    FEW,
    LEAST,
    conclusion,
    interval,
    intervals,
    mcnemar,
    resampled,
    spearman,
    spearman_interval,
    trend,
    wilson,
)

OUTLIERS = 10  # how many examples are shown
INTERVAL_OF = "best - start, {}, 95 % paired bootstrap over examples, the best eval taken as given"
POINTS = ("start", "best", "last")
KINDS = ("format", "content")


def build(
    workdir: pathlib.Path, others: tuple[pathlib.Path, ...] = (), price: float | None = None
) -> dict[str, Any]:
    """The report of a workdir in JSON types, None where a number is not finite; raises as read.

    others: workdirs to compare with; price: of the whole machine, an hour.
    """
    w = read(workdir)
    return build_from(w, training.scored(w), others, price)


def build_from(
    w: Workdir,
    scored: training.Scored | None,
    others: tuple[pathlib.Path, ...] = (),
    price: float | None = None,
) -> dict[str, Any]:
    best = compare.best_of(w)
    points = dict(zip(POINTS, (w.evals[0], best, w.evals[-1]), strict=True))
    at = {k: w.evals.index(e) for k, e in points.items()}
    rows, ids = best.rows["validation"], best.rows["validation"]["id"].tolist()
    marked = format_columns(w, ids, (0, best.step))
    # One set of resamples a split, so that all that is made of them is paired; seeded apart: the
    # examples of the two sets are drawn independently.
    sums = {
        s: resampled(_columns(w, s, points, marked if s == "validation" else None), seed)
        for seed, s in enumerate(SPLITS)
    }
    draws = {s: {k: sums[s][k] / sums[s]["tokens"][:, None] for k in ("nll", "correct")}
             for s in SPLITS}  # fmt: skip
    gap = {k: e.mean("validation", "nll") - e.mean("train_probe", "nll") for k, e in points.items()}
    gap_draws = draws["validation"]["nll"] - draws["train_probe"]["nll"]
    loss = rows["nll"] / rows["tokens"]
    base = w.evals[0].rows["validation"]["nll"] / rows["tokens"]
    worst = np.argsort(-loss, kind="stable")[:OUTLIERS]
    detail = detailed(w, "validation", best.step, [ids[i] for i in worst])
    rank_of_length = spearman(rows["tokens"], loss)
    better = loss < base
    report: dict[str, Any] = {
        "notes": _notes(w),
        "run": {k: v for k, v in w.run.items() if k not in MODEL},
        "model": {k: w.run[k] for k in MODEL},
        "data": w.config["data"].get("path") or w.config["data"].get("source"),
        "evaluated": {s: len(best.rows[s]["id"]) for s in SPLITS},
        "config": w.config,
        "cost": _cost(w, price),
        "evals": {"steps": [e.step for e in w.evals], **{k: e.step for k, e in points.items()}},
        "generalisation_gap": gap | {
            **{f"{k}_interval": interval(gap_draws[:, at[k]]) for k in POINTS},
            "growth": gap["best"] - gap["start"],
            "growth_interval": interval(gap_draws[:, at["best"]] - gap_draws[:, at["start"]]),
        },
        "final_steps": trend(w.train["step"], w.train["loss"]),
        "more_epochs": _more_epochs(w, draws["validation"]["nll"]),
        "loss_by_length": _by_length(rows["tokens"], points, sums["validation"]),
        "format_content": marked and _by_kind(marked, sums["validation"]),
        "pieces": w.has_pieces,
        "improved": {
            "examples": int(better.sum()), "share": float(better.mean()),
            "interval": wilson(better),
        },
        "outliers": [
            {"id": ids[i], "loss": float(loss[i]), "loss_at_start": float(base[i]),
             "tokens": int(rows["tokens"][i]), "nll_max": float(rows["nll_max"][i]),
             "text": w.examples["validation"][ids[i]]["text"], **detail[ids[i]]}
            for i in worst
        ],
        "length": {"spearman": rank_of_length,
                   "interval": spearman_interval(rank_of_length, len(loss)),
                   "median": float(np.median(rows["tokens"])),
                   "median_worst": float(np.median(rows["tokens"][worst]))},
        "training": scored and training.summary(w, scored, OUTLIERS),
        "compare": [compare.compared(w, read(other)) for other in others],
    }  # fmt: skip
    for s in SPLITS:
        trl = {k: w.lines.get(e.step, {}) for k, e in points.items()}
        report[s] = {
            "loss": _change(w, s, "nll", points, at, draws[s]["nll"]),
            "token_accuracy": _change(w, s, "correct", points, at, draws[s]["correct"]),
            "curve": {
                name: {"value": [e.mean(s, k) for e in w.evals], "interval": intervals(draws[s][k])}
                for name, k in (("loss", "nll"), ("token_accuracy", "correct"))
            },
            "trl_compat": {
                name: {k: line.get(f"{s}/trl_compat/{name}") for k, line in trl.items()}
                for name in ("eval_loss", "eval_mean_token_accuracy")
            },
        }
        if (best.rows[s]["label"] >= 0).any():
            report[s]["class_accuracy"] = _classes(points, s, sums[s], _nothing_to_compare(w))
    return json.loads(json.dumps(report), parse_constant=lambda name: None)


def _columns(
    w: Workdir, split: str, points: dict[str, Eval], marked: dict[str, Any] | None
) -> dict[str, np.ndarray]:
    """What is summed over examples: columns [n] or [n,k] by name, those of the functions below."""
    best, start = points["best"].rows[split], points["start"].rows[split]
    bins = length_bins(best["tokens"])
    inside = bins[:, None] == np.unique(bins)
    labelled = best["label"] >= 0
    columns = {
        "tokens": best["tokens"],
        **{k: np.stack([e.rows[split][k] for e in w.evals], 1) for k in ("nll", "correct")},
        **{f"bin_{name}": np.where(inside, x[:, None], 0) for name, x in
           (("tokens", best["tokens"]), ("start", start["nll"]), ("best", best["nll"]))},
        "labelled": labelled,
    }  # fmt: skip
    if labelled.any():
        right = label_is_likeliest(best)
        columns["over"] = np.where(labelled, best["label_p"].max(-1) - right, 0)
    if marked:
        columns |= {"kind_tokens": marked["tokens"], "kind_nll": marked["nll"]}
    return columns


def _nothing_to_compare(w: Workdir) -> str | None:
    """Why start and best are one eval; None where they are two."""
    if w.run["best_step"] is None:
        return "no eval had finite losses in all sets"
    if len(w.evals) == 1:
        return "no eval after step 0: nothing to compare"
    if compare.best_of(w) is w.evals[0]:
        start, *later = (e.mean("validation", "nll") for e in w.evals)
        if any(x < start for x in later):
            return "a later eval had a lower validation loss, but its adapter was not kept"
        return "no later eval had a lower validation loss than the base model"
    return None


def _change(
    w: Workdir, split: str, column: str, points: dict[str, Eval], at: dict[str, int],
    draws: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """A mean over tokens at each point, and its change from start to best."""
    out: dict[str, Any] = {k: e.mean(split, column) for k, e in points.items()}
    start, best = draws[:, at["start"]], draws[:, at["best"]]
    found = interval(best - start)
    if column == "nll":
        change = out["start"] - out["best"]
        out["decrease_pct"] = 100 * change / out["start"] if out["start"] else None
        share = 100 * (start - best) / start if out["start"] else start * math.nan
        out["decrease_pct_interval"] = interval(share)
        # The adapter at the end, which need not be the best: does training on do harm?
        last = interval(draws[:, at["last"]] - start)
        nothing = None if at["last"] else _nothing_to_compare(w)
        out |= {
            "last_interval": last, "last_conclusion": nothing or _conclusion(last, w, split)
        }  # fmt: skip
    told = _nothing_to_compare(w) or _conclusion(found, w, split)
    of = "nats per token" if column == "nll" else "share of tokens"
    return out | {
        "interval": found, "interval_of": INTERVAL_OF.format(of), "conclusion": told
    }  # fmt: skip


def _conclusion(found: list[float] | None, w: Workdir, split: str) -> str:
    """What the interval of a change allows to say."""
    words = (
        "no change that this set can show",
        *(f"{verb} beyond its 95 % interval" for verb in ("fell", "rose")),
    )
    return conclusion(found, len(w.evals[0].rows[split]["id"]), *words)


def _notes(w: Workdir) -> list[str]:
    """What makes the run less than whole, or its numbers less than they seem."""
    run, evals = w.run, w.evals
    steps = f"step {run['steps']:,} of {run['steps_planned']:,}"
    ids = (run.get("nan") or {"ids": []})["ids"]
    notes = {
        "running": f"The run had not ended at {steps}: it was killed, or it still trains.",
        "interrupted": f"The run was interrupted at {steps}; the same command continues it.",
        "nan": f"The run ended at {steps}: the loss or its gradient was not finite. Examples: "
        f"{', '.join(ids[:8])}{f' and {len(ids) - 8} more' * (len(ids) > 8)}.",
        "stopped early": f"The run stopped at {steps}: train.patience evals in a row brought no "
        "lower validation loss.",
    }
    found = [notes[run["status"]]] if run["status"] in notes else []
    if w.cut:
        found.append("The last line of metrics.jsonl was cut short and does not count.")
    last = max([*w.train["step"], evals[-1].step, 0])
    if last > run["steps"]:
        found.append(
            f"run.json was last written at step {run['steps']:,}, the run came to step {last:,.0f}:"
            " its time, tokens, memory and best step are those up to the former."
        )
    if len(evals) == 1:
        found.append("There is one eval, of step 0: the losses of both sets are the base model's.")
    if run["best_step"] is None:
        found.append(
            "No eval had finite losses in all sets: there is no best one and no adapter; where "
            "this report says best, it shows step 0."
        )
    held, probed = (len(evals[0].rows[split]["id"]) for split in SPLITS)
    few = {"validation": held} | ({"train-probe": probed} if probed != held else {})
    found += [
        f"There are {n} {of} examples: with fewer than about {FEW} the intervals are too narrow."
        for of, n in few.items()
        if 1 < n < FEW
    ]
    if copies := run["examples"].get("copies"):
        found.append(f"Copies: {told_of_copies(copies)}, and their losses are not independent.")
    for e in evals:
        if bad := e.not_finite():
            found.append(f"At step {e.step} the loss of {len(bad)} examples is not finite.")
    return found


def _cost(w: Workdir, price: float | None) -> dict[str, Any]:
    """Seconds and tokens by phase. Tokens of the steps are of the batches without their padding."""
    run, phases = w.run, w.run.get("phases") or {}
    each = w.train["step_seconds"][w.train["step"] <= run["steps"]]
    counted = w.train["tokens"][w.train["step"] <= run["steps"]]
    length = {s: sum(e["length"] for e in x.values()) for s, x in w.examples.items()}
    evals = [e.whole for e in w.evals if e.step <= run["steps"]]
    whole = sum(evals)
    tokens = {
        STEPS: run["tokens"],
        "evaluate": len(evals) * length["validation"]
        + (len(evals) - whole) * length["train_probe"],
        LEDGER: whole * length["train"],
    }
    # What other starts ran is in the steps' records and in `seconds`, not in phases.
    continued = bool(phases) and run.get("earlier_seconds", 0.0) > 0
    memory = run.get("peak_memory") or {}
    return {
        "seconds": run["seconds"],
        "phases": {
            name: {"seconds": s, "share_of_run": s / run["seconds"] if run["seconds"] else None,
                   "tokens": tokens.get(name) if not continued else None}
            for name, s in phases.items()
        },
        "continued": continued,
        "tokens": tokens[STEPS],
        "tokens_per_second": counted.sum() / each.sum() if each.sum() else None,
        "step_seconds": np.quantile(each, [0.25, 0.5, 0.75]).tolist() if len(each) else None,
        "peak_memory_gib": {k: v and v / 2**30 for k, v in memory.items()},
        "price_per_hour": price,
        "money": None if price is None else price * run["seconds"] / 3600,
    }  # fmt: skip


def _more_epochs(w: Workdir, draws: np.ndarray) -> dict[str, Any]:
    """Whether training longer is worth a try: the test's numbers and what follows from them.

    draws: [RESAMPLES,e] of the validation loss.
    """
    after = w.evals[-1]
    # The last eval may come a few steps after another: what changes between them says nothing.
    apart = in_steps(w.config["train"]["eval_every"], w.run["steps_per_epoch"]) / 2
    first = max([0, *(i for i, e in enumerate(w.evals[:-1]) if after.step - e.step >= apart)])
    before = w.evals[first]
    found = interval(draws[:, -1] - draws[:, first])
    rates = w.train["lr"]
    share = float(rates[-1] / rates.max()) if rates.size and rates.max() > 0 else math.nan
    ended = w.run["steps_planned"] in w.train["step"]
    ended = (ended and w.config["optim"]["schedule"] != "constant") or share <= 0.01
    judged = before is not after and math.isfinite(share) and found is not None
    judged &= len(after.rows["validation"]["id"]) >= LEAST
    judged &= w.run["status"] in ("finished", "stopped early")
    fell = judged and found[1] < 0
    lowest = min(reversed(w.evals), key=lambda e: e.mean("validation", "nll"))
    change = "fell" if fell else "did not fall"
    because = (
        f"the validation loss {change} beyond its interval from step {before.step} to {after.step}"
    )
    if not judged:
        because = (
            f"to judge takes two evals of {LEAST} examples, train lines and a run that stayed "
            "finite and came to its end"
        )
    elif fell and lowest is not after:
        because += f", but it was lowest at step {lowest.step}"
    elif ended and fell:
        because += ", but the schedule had ended: plan a longer run with a longer schedule"
    elif ended:
        because += "; with the learning rate decayed that is no sign of convergence"
    return {
        "recommended": judged and fell and lowest is after and not ended, "because": because,
        "evals": [before.step, after.step], "interval": found, "lr_share_of_peak": share,
        "difference": after.mean("validation", "nll") - before.mean("validation", "nll"),
    }  # fmt: skip


def _by_length(
    tokens: np.ndarray, points: dict[str, Eval], sums: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Loss at start and best in bins of the examples' loss tokens, shortest first."""
    bins = length_bins(tokens)
    out = []
    for n, b in enumerate(np.unique(bins)):
        inside = bins == b
        row = {"tokens": [int(tokens[inside].min()), int(tokens[inside].max())],
               "examples": int(inside.sum())}  # fmt: skip
        for k in ("start", "best"):
            nll = points[k].rows["validation"]["nll"][inside]
            row[k] = float(nll.sum() / tokens[inside].sum())
            with np.errstate(invalid="ignore"):  # a resample may miss a small bin
                row[f"{k}_interval"] = interval(sums[f"bin_{k}"][:, n] / sums["bin_tokens"][:, n])
        out.append(row)
    return out


def _by_kind(marked: dict[str, Any], sums: dict[str, np.ndarray]) -> dict[str, Any]:
    """Loss of format and content tokens at start and best, and each one's share of the nats."""
    out: dict[str, Any] = {"examples": marked["examples"]}
    tokens, nll = marked["tokens"].sum(0), marked["nll"].sum(0)  # [2], [2,2]
    with np.errstate(invalid="ignore", divide="ignore"):
        loss, share = nll / tokens, nll / nll.sum(1, keepdims=True)
        draws = sums["kind_nll"] / sums["kind_tokens"][:, None]
        shares = sums["kind_nll"] / sums["kind_nll"].sum(2, keepdims=True)
    for k, kind in enumerate(KINDS):
        out[kind] = {"tokens": int(tokens[k])}
        for e, point in enumerate(("start", "best")):
            out[kind] |= {
                f"loss_{point}": float(loss[e, k]),
                f"loss_{point}_interval": interval(draws[:, e, k]),
                f"share_{point}": float(share[e, k]),
                f"share_{point}_interval": interval(shares[:, e, k]),
            }
    return out


def _classes(
    points: dict[str, Eval], split: str, sums: dict[str, np.ndarray], nothing: str | None
) -> dict[str, Any]:
    """Class accuracy of a split at each point, the change from start to best, and calibration;
    `nothing`: what _nothing_to_compare says."""
    right = {k: e.right(split) for k, e in points.items()}
    start, best = right["start"], right["best"]
    label, p = (points["best"].rows[split][k] for k in ("label", "label_p"))
    label, p = label[label >= 0], p[label >= 0]
    confusion = np.zeros((p.shape[1],) * 2, int)
    known = np.isfinite(p).all(-1)
    np.add.at(confusion, (label[known], p[known].argmax(-1)), 1)
    chance = mcnemar(start, best)
    change = "rose" if best.sum() > start.sum() else "fell"
    sure = p.max(-1)
    bins = np.minimum((sure * 10).astype(int), 9) if np.isfinite(sure).all() else sure * 0 - 1
    reliability = [
        {"p": [b / 10, (b + 1) / 10], "examples": int((bins == b).sum()),
         "mean_p": float(sure[bins == b].mean()), "accuracy": float(best[bins == b].mean()),
         "interval": wilson(best[bins == b])}
        for b in range(10) if (bins == b).any()
    ]  # fmt: skip
    with np.errstate(invalid="ignore"):
        over = interval(sums["over"] / sums["labelled"])
    return {
        **{k: float(x.mean()) for k, x in right.items()},
        "start_interval": wilson(start),
        "interval": wilson(best),
        "gained": int((best & ~start).sum()),
        "lost": int((start & ~best).sum()),
        "p": chance,
        "conclusion": nothing
        or (f"{change}, p < 0.05" if chance < 0.05 else "no change that this set can show"),
        "most_frequent": np.bincount(label).max() / len(label),
        "confusion": confusion.tolist(),
        "reliability": reliability,
        "overconfidence": {"value": float(sure.mean() - best.mean()), "interval": over},
    }
