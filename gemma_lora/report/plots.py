"""The plots of a report, each 5 inches wide so that its text is readable on a phone."""

import base64
import io
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_lora.report import compare, training
from gemma_lora.report.reading import SPLITS, Workdir

WIDTH = 5
COLORS = dict(zip(SPLITS, ("tab:blue", "tab:orange"), strict=True))


def figures(
    w: Workdir, scored: training.Scored | None, report: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """(name, figure) of what the run has numbers for; at least the learning curve."""
    yield "learning_curve", learning_curve(w, report)
    if len(w.train["step"]):
        yield "schedule", _schedule(w)
    if len(report["loss_by_length"]) > 1:
        yield "length", _length(report["loss_by_length"])
    if report["evals"]["best"] != report["evals"]["start"]:
        yield "base", _base(w)
    found = report["validation"].get("class_accuracy")
    if found and found["reliability"]:  # empty where a probability is not finite
        yield "reliability", _reliability(found["reliability"])
    if scored:
        ledger, scores, _, _ = scored
        if found := training.data_map(ledger):
            yield "data_map", _data_map(found)
        yield "scores", _scores(scores, [x["id"] for x in report["training"]["worst"]], ledger.ids)


def _figure(height: float, **grid: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # costs a second that build() need not spend

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(**grid)
    for panel in np.ravel(axes):
        panel.ticklabel_format(scilimits=(-3, 4))  # long numbers would overlap
    return figure, axes


def svg(figure: Any) -> str:
    """As a data URI: an <img> of it runs no script, asks for nothing and shares no ids."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
        figure.savefig(out, format="svg", metadata={"Date": None}, dpi=144)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def png(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path, format="png", dpi=300)


def _numbers(x: list[Any]) -> np.ndarray:
    """float64, NaN for None and for what has no place on an axis."""
    found = np.array(x, float)
    return np.where(np.isfinite(found), found, np.nan)


def _limits(found: list[list[float] | None]) -> np.ndarray:
    """[2, len]: lower and upper ends; NaN where there is no interval."""
    return _numbers([x or [None, None] for x in found]).T


def learning_curve(w: Workdir, report: dict[str, Any]) -> Any:
    figure, axes = _figure(3.6)
    steps, losses = w.train["step"], _numbers(w.train["loss"])
    width = max(1, len(steps) // 20)
    axes.plot(steps, losses, color="0.8", lw=1, label="train, each step (dropout on)",
              rasterized=len(steps) > 2000)  # fmt: skip
    if width > 1:
        mean = [np.convolve(x, np.ones(width) / width, "valid") for x in (steps, losses)]
        axes.plot(*mean, color="0.45", label=f"train, running mean of {width}")
    for split, marker in zip(SPLITS, "os", strict=True):
        curve, at = report[split]["curve"]["loss"], report["evals"]["steps"]
        color, label = COLORS[split], split.replace("_", " ")
        axes.fill_between(at, *_limits(curve["interval"]), color=color, alpha=0.15, lw=0)
        axes.plot(at, _numbers(curve["value"]), color=color, marker=marker, ms=4, label=label)
    best = report["evals"]["best"], report["validation"]["loss"]["best"] or math.nan
    axes.plot(*best, "*", ms=13, mec="black", color="gold", label=f"best, step {best[0]}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _schedule(w: Workdir) -> Any:
    figure, axes = _figure(3.6, nrows=2, sharex=True)
    for panel, name, label in zip(
        axes, ("lr", "grad_norm"), ("learning rate", "gradient norm"), strict=True
    ):
        panel.plot(w.train["step"], _numbers(w.train[name]), color="0.3", lw=1,
                   rasterized=len(w.train["step"]) > 2000)  # fmt: skip
        panel.set(ylabel=label)
        panel.grid(alpha=0.3)
    axes[1].set(xlabel="optimizer step")
    return figure


def _length(bins: list[dict[str, Any]]) -> Any:
    figure, axes = _figure(3.2)
    middle = np.array([np.mean(b["tokens"]) for b in bins])
    for name, color, marker in (("start", "0.5", "s"), ("best", "tab:blue", "o")):
        value, (low, high) = (
            _numbers([b[name] for b in bins]),
            _limits([b[f"{name}_interval"] for b in bins]),
        )
        axes.vlines(middle, low, high, color=color)
        axes.plot(middle, value, color=color, marker=marker, ms=4, label=name)
    axes.set(xlabel="loss tokens of the example", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _base(w: Workdir) -> Any:
    best = compare.best_of(w).rows["validation"]
    before = _numbers(w.evals[0].rows["validation"]["nll"] / best["tokens"])
    after = _numbers(best["nll"] / best["tokens"])
    figure, axes = _figure(4)
    axes.scatter(before, after, s=8, alpha=0.5, lw=0, rasterized=len(before) > 300)
    top = np.nanmax([before, after, before * 0], initial=1e-9)
    axes.plot([0, top], [0, top], color="0.5", lw=1)
    axes.set(xlabel="loss under the base model", ylabel="loss at best")
    axes.grid(alpha=0.3)
    return figure


def _reliability(bins: list[dict[str, Any]]) -> Any:
    figure, axes = _figure(4)
    p, accuracy = (_numbers([b[k] for b in bins]) for k in ("mean_p", "accuracy"))
    axes.plot([0, 1], [0, 1], color="0.5", lw=1)
    axes.vlines(p, *_limits([b["interval"] for b in bins]), color="tab:blue")
    axes.plot(p, accuracy, "o", color="tab:blue")
    for x, y, b in zip(p, accuracy, bins, strict=True):
        axes.annotate(f"n={b['examples']}", (x, y), (4, -9), textcoords="offset points", fontsize=7)
    axes.set(xlabel="mean p of the chosen label", ylabel="accuracy", xlim=(0, 1.02),
             ylim=(0, 1.02))  # fmt: skip
    axes.grid(alpha=0.3)
    return figure


def _data_map(found: dict[str, np.ndarray]) -> Any:
    figure, axes = _figure(4)
    drawn = axes.scatter(_numbers(found["std"]), _numbers(found["mean"]), c=found["correct"], s=8,
                         cmap="viridis", vmin=0, vmax=1, lw=0, alpha=0.7,
                         rasterized=len(found["std"]) > 300)  # fmt: skip
    figure.colorbar(drawn, label="share of tokens right")
    axes.set(xlabel="standard deviation of exp(-loss) over evals", ylabel="mean of exp(-loss)")
    axes.grid(alpha=0.3)
    return figure


def _scores(scores: dict[str, np.ndarray], shown: list[str], ids: np.ndarray) -> Any:
    rows = -(-len(scores) // 2)
    figure, axes = _figure(1.4 * rows, nrows=rows, ncols=2, squeeze=False)
    marked = np.isin(ids, np.array(shown, object))
    for panel, (name, x) in zip(axes.flat, scores.items(), strict=False):
        finite = np.isfinite(x)
        low, high = (x[finite].min(), x[finite].max()) if finite.any() else (0, 1)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # too narrow for bins: numpy widens it
            high = low
        counts = np.histogram(x[finite], bins=40, range=(low, high))
        panel.stairs(*counts, fill=True, color="0.6")  # one path
        panel.plot(x[finite & marked], np.zeros((finite & marked).sum()), "|", color="tab:red",
                   ms=9, clip_on=False)  # fmt: skip
        panel.set_title(name, fontsize=9, pad=2)
        panel.tick_params(labelsize=7)
        panel.locator_params(axis="x", nbins=5)
    for panel in axes.flat[len(scores) :]:
        panel.remove()
    return figure
