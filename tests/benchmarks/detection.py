"""How well a score finds planted rows: AUROC, average precision, precision at k, with intervals."""

import dataclasses
from typing import Any

import numpy as np
import scipy

from gemma_lora.errors import UserError
from gemma_lora.stats import interval

RESAMPLES = 2_000
METRICS = ("auroc", "ap", "precision_at_k")


@dataclasses.dataclass(frozen=True)
class Measured:
    """values [3], as METRICS; draws [RESAMPLES, 3]; missing: rows whose score was NaN."""

    values: np.ndarray
    draws: np.ndarray
    missing: int


def resampled(n: int) -> np.ndarray:
    """[RESAMPLES, n]: how often each resample of n rows takes each of them."""
    drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    drawn += n * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * n)
    return counts.reshape(RESAMPLES, n).astype(np.float32)  # exact, and quick to multiply


def measure(score: np.ndarray, planted: np.ndarray, kind: str, drawn: np.ndarray) -> Measured:
    """How well a score (larger: more suspicious) finds the rows planted with a kind.

    planted [n]: each row's kind, '' where nothing was planted; rows of other kinds are left out.
    Ties count as half won in the AUROC, as one threshold in the average precision, and in the
    precision at k (k: rows of the kind) as drawn by lot. drawn [RESAMPLES, n]: how often each
    resample takes each row, the same for whatever is to be compared or pooled: scores, which are
    then paired, and seeds, which share their rows. Draws that take no row of the kind are NaN.
    """
    inside = (planted == kind) | (planted == "")
    score, drawn = np.asarray(score, float)[inside], drawn[:, inside]
    right = planted[inside] == kind
    if right.all() or not right.any():
        raise UserError(f"{kind}: {right.sum()} of {len(right)} rows are planted; none to compare")
    missing = np.isnan(score)
    ranks = scipy.stats.rankdata(score, nan_policy="omit")
    ranks[missing] = ((~missing).sum() + 1) / 2  # nothing is known about them: the median
    once = np.ones((1, len(ranks)), np.float32)
    values, draws = (_metrics(ranks, right, times) for times in (once, drawn))
    # A planted row that is drawn twice ranks with itself, which raises the average precision.
    average = METRICS.index("ap")
    draws[:, average] += values[0, average] - np.nanmean(draws[:, average])
    np.clip(draws, 0, 1, out=draws)  # the shift may leave what an average precision can be
    return Measured(values[0], draws, int(missing.sum()))


def _metrics(ranks: np.ndarray, planted: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[b,3], as METRICS, of ranks [n] with each row as often as times [b,n] says."""
    right, wrong = ranks[planted], ranks[~planted]
    rights, wrongs = times[:, planted], times[:, ~planted]
    k, n = (w.sum(1, dtype=np.float64, keepdims=True) for w in (rights, wrongs))
    k, n = (np.where(size > 0, size, np.nan) for size in (k, n))

    def counts(ranks: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[b,p] twice: how many rows rank above, and how many above or with, a planted one."""
        above, with_it = ranks[:, None] > right, ranks[:, None] >= right
        found = (weights @ x.astype(np.float32) for x in (above, with_it))
        return tuple(x.astype(np.float64) for x in found)

    true_above, true = counts(right, rights)
    false_above, false = counts(wrong, wrongs)
    above, tied = true_above + false_above, true + false - true_above - false_above
    auroc = (n - (false + false_above) / 2) / n
    average = true / np.maximum(true + false, 1)
    precision = np.clip(k - above, 0, tied) / np.maximum(tied, 1)
    found = [(rights * x).sum(1) / k[:, 0] for x in (auroc, average, precision)]
    return np.stack(found, 1)


def _pooled(values: list[float], draws: list[np.ndarray]) -> dict[str, Any]:
    """The mean over seeds, its interval from the draws averaged over seeds, and every seed."""
    mean = float(np.mean(values))
    return {
        "mean": mean,
        "interval": interval(np.mean(draws, 0)),
        "seeds": list(map(float, values)),
    }


def summary(found: dict[int, dict[str, dict[str, Measured]]]) -> dict[str, Any]:
    """{seed: {kind: {score: Measured}}} -> {kind: {score: pooled metrics}}, the best score first.

    combined_minus: the AUROC of 'combined' minus the score's, on the same resamples.
    """
    out: dict[str, Any] = {}
    for kind in next(iter(found.values())):
        seeds = [f[kind] for f in found.values()]
        scores: dict[str, Any] = {}
        for name in [n for n in seeds[0] if all(n in s for s in seeds)]:
            each = [s[name] for s in seeds]
            scores[name] = {
                metric: _pooled([m.values[i] for m in each], [m.draws[:, i] for m in each])
                for i, metric in enumerate(METRICS)
            } | {"missing": [m.missing for m in each]}
            pairs = [(s["combined"], m) for s, m in zip(seeds, each, strict=True)]
            scores[name]["combined_minus"] = _pooled(
                [c.values[0] - m.values[0] for c, m in pairs],
                [c.draws[:, 0] - m.draws[:, 0] for c, m in pairs],
            )
        order = sorted(scores, key=lambda n: -scores[n]["auroc"]["mean"])
        out[kind] = {n: scores[n] for n in order}
    return out
