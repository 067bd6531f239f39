"""The statistics of reports, traits and reviews: intervals, tests, trends. Numbers in and out."""

import math
from typing import Any

import numpy as np
import scipy  # its parts load at first use: stats takes a second that training need not wait

RESAMPLES = 10_000
LEAST = 6  # examples for a conclusion: of five that all change alike a sign test's p is 0.06
FEW = 20  # examples; about how many it takes for bootstrap intervals not to be too narrow


def resampled(columns: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Sums over bootstrap resamples of rows: a column [n] -> [RESAMPLES], [n,k] -> [RESAMPLES,k].

    A resample draws n rows, the same ones for every column, so that what is made of the sums is
    paired. NaN for a single row, and where a column is not finite.
    """
    wide = {k: np.asarray(v, np.float64).reshape(len(v), -1) for k, v in columns.items()}
    rows = np.concatenate(list(wide.values()), 1)
    rows = np.where(np.isfinite(rows).all(0), rows, np.nan)
    n, chunk = len(rows), 100
    rng, sums = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // chunk if n > 1 else 0):
        drawn = rng.integers(n, size=(chunk, n)) + n * np.arange(chunk)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=chunk * n).reshape(chunk, n)
        sums.append(weights @ rows)
    total = np.concatenate(sums) if sums else np.full((RESAMPLES, rows.shape[1]), np.nan)
    parts = np.split(total, np.cumsum([v.shape[1] for v in wide.values()])[:-1], axis=1)
    shapes = ((RESAMPLES, *np.shape(v)[1:]) for v in columns.values())
    return {k: p.reshape(s) for k, p, s in zip(wide, parts, shapes, strict=True)}


def bootstrap(before: dict[str, np.ndarray], after: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """[RESAMPLES, 2]: after - before of loss and of token accuracy, each resample's own ratio.

    The rows of both are the same examples, weighed by tokens; NaN as in `resampled`.
    """
    change = np.stack([after[k] - before[k] for k in ("nll", "correct")], 1)
    sums = resampled({"change": change, "tokens": before["tokens"]}, seed)
    return sums["change"] / sums["tokens"][:, None]


def interval(draws: np.ndarray) -> list[float] | None:
    """[lo, hi], the central 95 % of the draws that are finite; None where one in 20 is not.

    A few are not where resamples miss a small group; an example whose loss is not finite is in 63 %
    of them.
    """
    finite = np.isfinite(draws)
    if finite.mean() <= 0.95:
        return None
    return np.quantile(draws[finite], [0.025, 0.975]).tolist()


def conclusion(limits: list[float] | None, n: int, neither: str, below: str, above: str) -> str:
    """What the interval of a difference between n examples allows to say."""
    if limits is None:
        return "no interval: it takes two examples and finite losses"
    if n < LEAST:
        return f"no conclusion from {n} examples: it takes {LEAST}"
    if limits[0] <= 0 <= limits[1]:
        return neither
    return below if limits[1] < 0 else above


def intervals(draws: np.ndarray) -> list[list[float] | None]:
    """`interval` of each column."""
    return [interval(column) for column in draws.T]


def wilson(right: np.ndarray) -> list[float]:
    """The 95 % Wilson score interval of a share, from one bool an example."""
    found = scipy.stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: are right -> wrong and wrong -> right equally likely.

    before and after: one bool for each of the same examples. 1 where nothing changed.
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties share their mean rank; NaN where one does not vary."""
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return math.nan
    return float(scipy.stats.spearmanr(x, y).statistic)


def spearman_interval(r: float, n: int) -> list[float] | None:
    """95 %, on Fisher's z with the variance (1 + r^2 / 2) / (n - 3) of Bonett & Wright (2000)."""
    if n < 4 or not abs(r) < 1:
        return None
    half = 1.959964 * math.sqrt((1 + r * r / 2) / (n - 3))
    return [math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)]


def trend(steps: np.ndarray, losses: np.ndarray) -> dict[str, Any] | None:
    """Trend of the last max(10, 20 %) steps with a finite loss; None with fewer than ten."""
    steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
    if len(steps) < 10:
        return None
    window = max(10, math.ceil(0.2 * len(steps)))
    steps, losses = steps[-window:], losses[-window:]
    fit = scipy.stats.linregress(steps, losses)
    residual = losses - (fit.intercept + fit.slope * steps)
    squares = residual @ residual
    r = float(residual[1:] @ residual[:-1] / squares) if squares else 0.0
    error = fit.stderr * math.sqrt(max(1.0, (1 + r) / (1 - r)))
    half = float(error * scipy.stats.t.ppf(0.975, window - 2))
    span = float(steps[-1] - steps[0])
    return {
        "steps": [int(steps[0]), int(steps[-1])],
        "autocorrelation": r,
        "reduction": -float(fit.slope) * span,
        "reduction_interval": [span * (-float(fit.slope) - half), span * (half - float(fit.slope))],
        "slope_per_100_steps": 100 * float(fit.slope),
        "interval": [100 * (float(fit.slope) - half), 100 * (float(fit.slope) + half)],
        "method": "least squares; 95 % interval from the regression's standard error, widened by "
        "sqrt((1 + r) / (1 - r)) where the residuals' lag-1 autocorrelation r is positive",
    }


def risk_ratio(a: int, n: int, c: int, m: int) -> tuple[float, list[float]]:
    """(a / n) / (c / m) and its 95 % interval on the log scale (Katz et al. 1978).

    Where a or c is 0, 0.5 is added to each of the four cells of the table, a, n - a, c and m - c.
    """
    if not a or not c:
        a, n, c, m = a + 0.5, n + 1, c + 0.5, m + 1
    ratio = (a / n) / (c / m)
    half = scipy.stats.norm.ppf(0.975) * math.sqrt(1 / a - 1 / n + 1 / c - 1 / m)
    return ratio, [ratio * math.exp(-half), ratio * math.exp(half)]


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number, in their order (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty(len(p))
    out[order] = np.minimum(1, stepped)
    return out
