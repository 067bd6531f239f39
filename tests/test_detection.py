"""How well scores find what was planted: the measures by their definitions, and their draws."""

import detection
import numpy as np
import pytest


def by_definition(score: np.ndarray, right: np.ndarray) -> list[float]:
    """AUROC from all pairs; average precision over thresholds; precision at k over all orders of
    the ties at the border."""
    ours, others = score[right], score[~right]
    auroc = np.mean([(a > b) + (a == b) / 2 for a in ours for b in others])
    average, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        taken = score >= threshold
        new = (taken & right).sum() / right.sum()
        average += (new - recall) * (taken & right).sum() / taken.sum()
        recall = new
    k = int(right.sum())
    border = sorted(score)[-k]
    above, tied = score > border, score == border
    chance = (right & tied).sum() / tied.sum()
    return [auroc, average, ((above & right).sum() + (k - above.sum()) * chance) / k]


def measure(score: np.ndarray, kinds: np.ndarray) -> detection.Measured:
    """How well the score finds kind 'a', with the resamples of so many rows."""
    return detection.measure(score, kinds, "a", detection.resampled(len(kinds)))


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_their_definitions(levels, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(["a"] * 7 + ["b"] * 5 + [""] * 23).astype(object)
    score = rng.integers(levels, size=35) + (kinds == "a") * levels / 3 + (kinds == "b") * 9999.0
    kept = kinds != "b"
    found = measure(score, kinds)
    np.testing.assert_allclose(found.values, by_definition(score[kept], kinds[kept] == "a"))


def test_draws_are_the_measures_of_resampled_rows():
    rng = np.random.default_rng(0)
    score, right = rng.integers(6, size=30).astype(float), np.arange(30) < 8
    times = detection.resampled(30)
    assert (times.sum(1) == 30).all() and times[:, 0].std() == pytest.approx(1, abs=0.1)
    found = measure(score, np.where(right, "a", "").astype(object))
    shift = found.values - np.nanmean(found.draws, 0)  # of the average precision, which it centres
    assert abs(shift[1]) < 1e-6
    first = []
    for b in range(20):
        drawn = np.repeat(np.arange(30), times[b].astype(int))
        first.append(found.draws[b] - by_definition(score[drawn], right[drawn]))
    np.testing.assert_allclose(np.array(first)[:, [0, 2]], 0, atol=1e-12)
    np.testing.assert_allclose(np.array(first)[:, 1], first[0][1])
    assert first[0][1] < -0.01  # a row that is drawn twice ranks with itself


def test_a_draw_without_a_planted_row_is_nan():
    times = detection.resampled(20)
    kinds = np.array(["a"] + [""] * 19, object)
    found = measure(np.arange(20.0), kinds)
    np.testing.assert_array_equal(np.isnan(found.draws).all(1), times[:, 0] == 0)
    assert np.isnan(found.draws).any(1).mean() == pytest.approx((1 - 1 / 20) ** 20, abs=0.05)


def test_rows_of_other_kinds_do_not_count():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(["a"] * 9 + ["b"] * 6 + [""] * 30).astype(object)
    score, kept, times = rng.random(45), kinds != "b", detection.resampled(45)
    found = detection.measure(score, kinds, "a", times)
    alone = detection.measure(score[kept], kinds[kept], "a", times[:, kept])
    np.testing.assert_array_equal(found.draws, alone.draws)


def test_an_average_precision_is_at_most_one_in_every_draw():
    """Also of scores that find all but one, whose draws are moved to their mean."""
    kinds = np.array(["a"] * 5 + [""] * 20, object)
    score = np.arange(25)[::-1].astype(float)
    score[4] = -1
    found = measure(score, kinds)
    assert found.values[1] == pytest.approx((4 + 5 / 25) / 5)
    assert np.nanmax(found.draws[:, 1]) == 1  # they would go to 1.004


def test_perfect_inverted_and_constant_scores():
    kinds = np.array(["a"] * 5 + [""] * 15, object)
    best = np.arange(20)[::-1].astype(float)
    draws = measure(best, kinds).draws
    np.testing.assert_allclose(draws[np.isfinite(draws)], 1)
    worst = measure(-best, kinds).values
    np.testing.assert_allclose(worst, [0, np.mean([i / (15 + i) for i in range(1, 6)]), 0])
    np.testing.assert_allclose(measure(np.ones(20), kinds).values, [0.5, 0.25, 0.25])


def test_nan_is_ranked_at_the_median():
    kinds = np.array(["a", "", "", "", "", "a"], object)
    score = np.array([np.nan, 1, 2, 3, 4, np.inf])
    found = measure(score, kinds)
    assert found.missing == 1
    assert found.values[0] == (2.5 + 4) / 8  # the median of five is the 3, a tie
    nothing = measure(np.full(6, np.nan), kinds)
    assert (nothing.values[0], nothing.missing) == (0.5, 6)


def test_the_interval_covers_what_resampling_would_give():
    """Hanley and McNeil's standard error of an AUROC of normal scores, to a fifth."""
    rng = np.random.default_rng(1)
    kinds = np.array(["a"] * 60 + [""] * 400, object)
    found = measure(rng.normal(size=460) + (kinds == "a"), kinds)
    a = found.values[0]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + 59 * (q1 - a * a) + 399 * (q2 - a * a)) / (60 * 400)
    assert np.nanstd(found.draws[:, 0]) == pytest.approx(variance**0.5, rel=0.2)


def test_seeds_that_share_their_rows_vary_together():
    """A seed that repeats another narrows nothing."""
    kinds = np.array(["a"] * 20 + [""] * 80, object)
    once = {"a": {"combined": measure(np.random.default_rng(0).random(100), kinds)}}
    alone, twice = (detection.summary(f)["a"]["combined"] for f in ({0: once}, {0: once, 1: once}))
    assert alone["auroc"]["interval"] == twice["auroc"]["interval"]


def test_summary_pools_seeds_and_pairs_with_combined():
    kinds = np.array(["a"] * 6 + [""] * 30, object)
    found, draws = {}, []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        scores = {"combined": rng.random(36) + 0.3 * (kinds == "a"), "loss": rng.random(36)}
        scores |= {"only_once": rng.random(36)} if seed else {}
        found[seed] = {"a": {k: measure(s, kinds) for k, s in scores.items()}}
        draws.append(found[seed]["a"]["combined"].draws - found[seed]["a"]["loss"].draws)
    pooled = detection.summary(found)["a"]
    assert list(pooled) == ["combined", "loss"]
    a, b = (pooled[k]["auroc"] for k in pooled)
    assert a["seeds"] == [f["a"]["combined"].values[0] for f in found.values()]
    assert a["mean"] == np.mean(a["seeds"])
    difference = pooled["loss"]["combined_minus"]
    assert difference["mean"] == pytest.approx(a["mean"] - b["mean"])
    limits = np.nanquantile(np.mean(draws, 0)[:, 0], [0.025, 0.975])
    np.testing.assert_allclose(difference["interval"], limits)
    assert pooled["combined"]["combined_minus"]["interval"] == [0, 0]
