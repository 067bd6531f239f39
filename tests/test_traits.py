"""Traits, their lifts against scipy and by hand, clusters, categories, confident learning."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import scipy
from common import needs

from gemma_lora import confident, explain, folds, rules, traits
from gemma_lora.errors import UserError
from gemma_lora.evaluate import write_table
from gemma_lora.outliers import SCORES
from gemma_lora.stats import holm, risk_ratio


@pytest.mark.parametrize(("a", "n", "c", "m"), [(7, 30, 40, 920), (1, 3, 5, 9), (30, 30, 1, 40)])
def test_risk_ratio_is_scipys(a, n, c, m):
    ratio, (low, high) = risk_ratio(a, n, c, m)
    reference = scipy.stats.contingency.relative_risk(a, n, c, m)
    assert ratio == pytest.approx(reference.relative_risk, rel=1e-12)
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-12)


def test_risk_ratio_of_zero_cells():
    """scipy answers 0 or infinity there; the correction by hand."""
    for a, c in ((0, 4), (3, 0), (0, 0)):
        ratio, (low, high) = risk_ratio(a, 10, c, 20)
        assert ratio == pytest.approx(((a + 0.5) / 11) / ((c + 0.5) / 21))
        error = math.sqrt(1 / (a + 0.5) - 1 / 11 + 1 / (c + 0.5) - 1 / 21)
        assert math.log(high / ratio) == pytest.approx(1.959963984540054 * error)
        assert low * high == pytest.approx(ratio**2)


def test_holm():
    """The example of Holm's step-down by hand: 4, 3, 2, 1 times the sorted p, never falling."""
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5, 0.9])).tolist() == [1, 1] and not len(holm(np.array([])))


def test_features_of_a_text():
    prompt = "Is it TRUE? A train took 3 hours, but I never paid $1,250.50!"
    completion = "1. Half is 3/2=<<3/2=1.5>>1.5\n2. <b>é</b>"
    got = {k: x[0] for k, x in traits.measure([(prompt, completion)]).items()}
    assert (got["prompt words"], got["sentences"], got["calculator steps"]) == (11, 4, 1)
    assert got["largest number, log10"] == pytest.approx(math.log10(1250.5))
    assert (got["question marks"], got["exclamation marks"], got["divisions"]) == (1, 1, 3)
    assert (got["list items"], got["markup tags"]) == (2, 2)
    words = 11 + 5  # half is b é b
    for name in ("negations", "words of contrast", "units of time", "words in first person",
                 "words of parts"):  # fmt: skip
        assert got[f"{name} per 100 words"] == pytest.approx(100 / words), name
    everything = f"{prompt}\n{completion}"
    capitals = 100 * sum(x in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for x in everything) / len(everything)
    assert got["capitals, %"] == pytest.approx(capitals)
    assert got["characters beyond ASCII, %"] == pytest.approx(100 / len(everything))
    assert got["completion without final punctuation"] and set(got) == set(traits.FEATURES)
    empty = {k: x[0] for k, x in traits.measure([("", "")]).items()}
    assert empty["largest number, log10"] == -1 and all(np.isfinite(x) for x in empty.values())


def test_lifts_find_what_was_planted_and_nothing_else():
    rng = np.random.default_rng(0)
    flagged = np.arange(400) < 40
    features = {f"noise {i}": rng.standard_normal(400) for i in range(8)}
    features |= {"planted": flagged * 3.0 + rng.standard_normal(400), "constant": np.ones(400)}
    features["marked"] = np.where(flagged, rng.random(400) < 0.9, rng.random(400) < 0.2)
    found = traits.lifts(flagged, features)
    certain = {t.name.split(":")[0]: t for t in found if t.p < 0.05}
    assert set(certain) == {"planted", "marked"}
    assert not any("constant" in t.name for t in found) and len(found) == 2 * 9 + 1
    high = np.quantile(features["planted"], 0.75)
    [t] = [t for t in found if t.name == f"planted: more than {high:.3g}"]
    has = features["planted"] > high
    a, c = int(has[flagged].sum()), int(has[~flagged].sum())
    assert (t.flagged, t.others) == (a / 40, c / 360)
    assert t.lift == pytest.approx((a / 40) / (c / 360))
    chances = scipy.stats.hypergeom.pmf(np.arange(41), 400, a + c, 40)
    exact = chances[chances <= chances[a] * (1 + 1e-9)].sum()
    assert t.p == pytest.approx(exact * (len(found) - found.index(t)), rel=1e-6)
    assert traits.lifts(np.zeros(400, bool), features) == []


def test_lifts_of_noise_alone():
    """Over 60 draws of what is flagged, a false trait comes no oftener than 5 % allow."""
    rng = np.random.default_rng(1)
    features = {f"noise {i}": rng.standard_normal(200) for i in range(10)}
    false = 0
    for _ in range(60):
        flagged = np.isin(np.arange(200), rng.permutation(200)[:20])
        false += any(t.p < 0.05 for t in traits.lifts(flagged, features))
    assert scipy.stats.binomtest(false, 60, 0.05, "greater").pvalue > 0.001


def test_tfidf_by_hand():
    texts = ["Say: red red fox", "Say: red dog", "Say: cat"]
    vectors, words = traits.tfidf(texts, [0, 1])
    assert words == ["dog", "fox", "red", "say"]
    red, alone = math.log(3 / 2), math.log(3)
    expected = np.array([[0, alone, (1 + math.log(2)) * red, 0], [alone, 0, red, 0]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert vectors.toarray() == pytest.approx(expected)


def test_clusters_are_the_planted_groups():
    rng = np.random.default_rng(0)
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(120)]
    for i in range(4):
        texts[i] = f"ship harbour captain {texts[i]}"
    for i in range(10, 13):
        texts[i] = f"bread oven flour {texts[i]}"
    flagged = np.arange(120) < 20
    found = traits.clusters(texts, flagged)
    assert [rows.tolist() for rows, _ in found] == [[0, 1, 2, 3], [10, 11, 12]]
    assert {"ship", "harbour", "captain"} <= set(found[0][1])
    assert traits.clusters(texts, np.arange(120) < 2) == []
    alike = ["alpha beta"] * 3 + [f"{a} {b}" for a, b in zip(words[::2], words[1::2], strict=True)]
    [(_, top)] = traits.clusters(alike, np.arange(len(alike)) < 3)
    assert sorted(top) == ["alpha", "beta"]
    assert traits.clusters([f"x{chr(97 + i)}" for i in range(20)], np.arange(20) < 5) == []


def test_categories_know_every_reason():
    """Each rule and each score stands for one category; the first that applies is taken."""
    every = [r for of in explain.CATEGORIES.values() for r in of]
    about_base = {"base_loss", "variability"}  # not suspicious by themselves
    assert sorted(every) == sorted(
        (SCORES.keys() - about_base) | rules.RULES.keys() | explain.LABEL_REASONS.keys()
    )
    assert explain.category({"loss", "arithmetic"}) == "a sum that does not hold"
    assert explain.category({"base_loss"}) == explain.category(set()) == "no single reason"


def test_confident_learning_is_the_confident_joint():
    """By the definition: thresholds are means of p over a label's own examples."""
    needs("cleanlab")
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 60)
    label = np.array([rng.choice(3, p=x) for x in p])
    label[:4] = -1
    got = confident.find(label, p)
    thresholds = np.array([p[label == k, k].mean() for k in range(3)])
    joint, issue = np.zeros((3, 3), int), np.zeros(60, bool)
    for i in range(4, 60):
        above = [k for k in range(3) if p[i, k] >= thresholds[k]]
        if above:
            k = max(above, key=lambda k: p[i, k])
            joint[label[i], k] += 1
            issue[i] = k != label[i]
    assert got.thresholds == pytest.approx(thresholds)
    assert np.array_equal(got.joint, joint) and np.array_equal(got.issue, issue)
    assert 0 < issue.sum() < 56 and got.known == 56
    p[:4] = p[4] = np.nan  # is as if it had no label
    label[4], unknown = -1, label.copy()
    unknown[4] = 0
    assert np.array_equal(confident.find(unknown, p).joint, confident.find(label, p).joint)
    with pytest.raises(UserError, match=r"none of \{2\}"):
        confident.find(np.minimum(label, 1), p)


def test_probabilities_of_the_folds_are_read(tmp_path):
    """As the folds wrote them, by id; a folder from before they were kept is named."""
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    held = SimpleNamespace(examples=[SimpleNamespace(prompt_targets=0)] * 2)
    rows = {"id": np.array(["b", "a"], object), "label": np.array([1, -1]), "label_p": p,
            "token_nll": [np.ones(1)] * 2}  # fmt: skip
    columns = folds._scores(rows, held)
    assert columns["fold_label"][0] == -np.log(0.5) and np.isnan(columns["fold_label"][1])
    path = tmp_path / "folds" / "scores.parquet"
    write_table(path, pyarrow.table(columns))
    assert np.array_equal(confident.read(tmp_path, np.array(["a", "b"])), p[::-1])
    write_table(path, pyarrow.table({k: columns[k] for k in ("id", "fold_loss", "fold_label")}))
    with pytest.raises(UserError, match="of an earlier version: remove it"):
        confident.read(tmp_path, np.array(["a", "b"]))


def test_confident_learning_says_what_it_lacks(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"python -m gemma_lora\.folds"):
        confident.read(tmp_path, np.array(["a"]))
    monkeypatch.setattr(confident.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes cleanlab; run: pip install .*'\.\[clean\]'"):
        confident.find(np.zeros(2, int), np.ones((2, 2)) / 2)


def test_what_the_most_suspicious_have_in_common(tmp_path):
    """Counts, shares and the bounds of a reason by hand; without folds it says what is missing."""
    n, worst = 100, np.array([99, 98, 97, 96, 95, 50])
    label = np.where(np.isin(np.arange(n), [*worst, 0, 1]), 1, 0)
    examples = [
        {"id": f"e{i:02}", "label": int(k), "prompt": "a plain text", "text": f"a plain text {i}",
         "answer": (" no", " yes")[k]}
        for i, k in enumerate(label)
    ]  # fmt: skip
    columns = {"id": np.array([e["id"] for e in examples], object), "label_aum": np.full(n, -1.0)}
    columns["label_aum"][[10, 50]] = 0.1
    columns["label_aum"][11] = 0
    ranks = {"loss": np.arange(1, n + 1) / n, "base_loss": np.arange(n, 0, -1) / n}
    broken = {"e50": {"arithmetic": "1 + 1 = 3"}, "e96": {"length": "long"}}
    kinds, lines = explain.explain(tmp_path, examples, columns, ranks, broken, worst)
    named = {10: "the label contradicts the model", 50: "a sum that does not hold"}
    named |= dict.fromkeys([95, 97, 98, 99], "hard: high loss") | {96: "unusual length"}
    assert kinds == [named.get(i, "no single reason") for i in range(n)]
    rows = [line.split(" | ") for line in lines if line.endswith("|")]
    counts = {row[0][2:]: (row[2], row[3][:-2]) for row in rows if len(row) == 4}
    assert counts.pop("category") == ("most suspicious", "all") and counts.pop("---")
    assert counts == {
        "a sum that does not hold": ("1", "1"),
        "the label contradicts the model": ("0", "1"),
        "unusual length": ("1", "1"),
        "hard: high loss": ("4", "4"),
        "no single reason": ("0", "93"),
    }
    shares = {row[0]: row[1:3] for row in rows if len(row) == 5}
    assert shares["| label `yes`"] == ["100%", "2%"] and shares["| label `no`"] == ["0%", "98%"]
    assert any("# Clusters of the 6" in line for line in lines)
    assert any(line.startswith("Not computed: ") and "folds" in line for line in lines)
