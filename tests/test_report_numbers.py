"""The report's new numbers against direct computations: tokens by kind, bins, costs, other runs."""

import json
import math

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import pytest
import report_run
import scipy

from gemma_lora import outliers, report, stats
from gemma_lora.report import sections, tokens, training
from gemma_lora.report.reading import read


def rows_of(workdir, step: int, split: str) -> dict[str, dict]:
    table = pyarrow.parquet.read_table(workdir / "ledger" / f"eval_{step:06d}.parquet")
    return {r["id"]: r for r in table.to_pylist() if r["split"] == split}


def edit(path, change) -> None:
    """Puts the rows of a Parquet file through a function."""
    rows = [change(dict(r)) for r in pyarrow.parquet.read_table(path).to_pylist()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return report_run.gsm8k(tmp_path_factory.mktemp("run"), validation=60, train=45)


def test_sums_of_resamples_are_paired_and_not_finite_alone():
    rng = np.random.default_rng(0)
    x, wide = rng.normal(size=50), rng.normal(size=(50, 2, 3))
    bad = np.where(np.arange(50) == 7, np.inf, x)
    found = stats.resampled({"x": x, "twice": 2 * x, "wide": wide, "bad": bad}, 3)
    assert found["x"].shape == (stats.RESAMPLES,)
    assert found["wide"].shape == (stats.RESAMPLES, 2, 3)
    assert np.allclose(found["twice"], 2 * found["x"])
    assert np.isnan(found["bad"]).all() and np.isfinite(found["wide"]).all()
    # A sum of n draws: n times the mean, n times the variance.
    assert found["x"].mean() == pytest.approx(x.sum(), abs=5 * x.std() * math.sqrt(50 / 10_000))
    assert found["x"].std() == pytest.approx(x.std() * math.sqrt(50), rel=0.05)
    assert np.isnan(stats.resampled({"x": x[:1]}, 3)["x"]).all()


def test_interval_of_a_rank_correlation_covers_it():
    rng, covered = np.random.default_rng(5), 0
    true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a normal pair with correlation 0.6
    for _ in range(300):
        x = rng.normal(size=40)
        y = 0.6 * x + 0.8 * rng.normal(size=40)
        low, high = stats.spearman_interval(stats.spearman(x, y), 40)
        covered += low < true < high
    assert 0.91 <= covered / 300 <= 0.99
    z = np.arctanh(stats.spearman_interval(0.8, 40))
    assert z == pytest.approx(np.arctanh(0.8) + 1.959964 * np.sqrt(1.32 / 37) * np.array([-1, 1]))
    assert stats.spearman_interval(math.nan, 40) is None
    assert stats.spearman_interval(0.5, 3) is None


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["48", "/2=", "<<", "48", "=", "24", ">>", "24", "\n", "####", " ", "24"], "001000100100"),
        (["=<", "<4", "8>>2", "4<", "5"], "11100"),  # brackets that tokens share
        (["\n##", "## 7", "#", " ###"], "1100"),
        (["a < b", " > c"], "00"),
        (["", "<<", ""], "010"),
    ],
)
def test_format_tokens_are_brackets_and_marker(pieces, expected):
    assert tokens.is_format(pieces).tolist() == [c == "1" for c in expected]


def test_loss_of_format_and_content(run):
    found = report.build(run)["format_content"]
    texts = {r["id"]: r for r in pyarrow.parquet.read_table(run / "ledger/examples.parquet")
             .to_pylist() if r["split"] == "validation"}  # fmt: skip
    assert found["examples"] == len(texts) == 60
    for point, step in (("start", 0), ("best", 60)):
        sums = {True: [0.0, 0], False: [0.0, 0]}
        for name, row in rows_of(run, step, "validation").items():
            for piece, nll in zip(texts[name]["pieces"], row["token_nll"], strict=True):
                kind = sums[piece in ("<<", ">>", "####")]
                kind[0] += nll
                kind[1] += 1
        whole = sums[True][0] + sums[False][0]
        for name, marked in (("format", True), ("content", False)):
            nll, count = sums[marked]
            got = found[name]
            assert got["tokens"] == count
            assert got[f"loss_{point}"] == pytest.approx(nll / count)
            assert got[f"share_{point}"] == pytest.approx(nll / whole)
            for what in ("loss", "share"):
                low, high = got[f"{what}_{point}_interval"]
                assert low < got[f"{what}_{point}"] < high
    low, high = found["format"]["share_best_interval"]
    assert found["content"]["share_best_interval"] == pytest.approx([1 - high, 1 - low])


def test_only_completions_with_a_marker_are_split(tmp_path):
    """A question may hold '####'; an answer without it is left out; the prompt's loss, too."""
    report_run.gsm8k(tmp_path, 10, 12, steps=(0,))
    path = tmp_path / "ledger" / "examples.parquet"
    edit(path, lambda r: r | {"text": r["text"].replace("####", "----"), "prompt_targets": 3})
    assert report.build(tmp_path)["format_content"] is None

    def one(r):
        return r | {"text": r["text"].replace("----", "####")} if r["id"] == "validation-4" else r

    edit(path, one)
    found = report.build(tmp_path)["format_content"]
    row = rows_of(tmp_path, 0, "validation")["validation-4"]
    assert found["examples"] == 1
    assert found["format"]["tokens"] + found["content"]["tokens"] == row["tokens"] - 3


def test_a_row_cut_before_its_completion_has_no_loss_of_it(tmp_path):
    report_run.gsm8k(tmp_path, 10, 12, steps=(0,))
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["loss_on"] = "all"
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "ledger" / "examples.parquet"
    edit(path, lambda r: r | {"prompt_targets": 3 * (r["id"] != "validation-4")})
    found = report.build(tmp_path)
    assert found["format_content"]["examples"] == 9
    shown = {x["id"]: x["prompt_has_loss"] for x in found["outliers"]}
    assert "validation-4" in shown and all(shown.values())


def test_loss_by_length_adds_up(run):
    bins = report.build(run)["loss_by_length"]
    rows = rows_of(run, 60, "validation").values()
    assert len(bins) == 3 and sum(b["examples"] for b in bins) == 60
    for b in bins:
        inside = [r for r in rows if b["tokens"][0] <= r["tokens"] <= b["tokens"][1]]
        assert len(inside) == b["examples"]
        loss = sum(r["nll"] for r in inside) / sum(r["tokens"] for r in inside)
        assert b["best"] == pytest.approx(loss)
        assert b["best_interval"][0] < loss < b["best_interval"][1]


def test_every_eval_has_its_interval(run):
    r = report.build(run)
    curve = r["validation"]["curve"]["loss"]
    assert curve["value"][0] == r["validation"]["loss"]["start"] and len(curve["interval"]) == 4
    for value, (low, high) in zip(curve["value"], curve["interval"], strict=True):
        assert low < value < high
    # Of a mean of about equal weights: 1.96 standard errors.
    each = np.array([x["nll"] / x["tokens"] for x in rows_of(run, 0, "validation").values()])
    width = np.ptp(curve["interval"][0])
    assert width == pytest.approx(2 * 1.96 * each.std(ddof=1) / math.sqrt(60), rel=0.15)
    low, high = r["validation"]["loss"]["decrease_pct_interval"]
    assert low < r["validation"]["loss"]["decrease_pct"] < high < 100
    start, best = (rows_of(run, step, "validation") for step in (0, r["evals"]["best"]))
    better = [k for k in start if best[k]["nll"] < start[k]["nll"]]
    assert len(better) > 30 and r["improved"]["examples"] == len(better)
    assert r["improved"]["share"] == len(better) / 60
    each = {k: {i: x["nll"] / x["tokens"] for i, x in rows.items()}
            for k, rows in (("loss_at_start", start), ("loss", best))}  # fmt: skip
    for x in r["outliers"]:
        assert {k: x[k] for k in each} == pytest.approx({k: v[x["id"]] for k, v in each.items()})
    largest = sorted(each["loss"].values())[::-1][: len(r["outliers"])]
    assert [x["loss"] for x in r["outliers"]] == pytest.approx(largest)
    lengths = {k: x["tokens"] for k, x in best.items()}
    ranks = [scipy.stats.rankdata([of[k] for k in best]) for of in (lengths, each["loss"])]
    assert r["length"]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    worst = [lengths[x["id"]] for x in r["outliers"]]
    assert r["length"]["median_worst"] == np.median(worst)
    assert r["improved"]["interval"] == pytest.approx(
        list(scipy.stats.binomtest(r["improved"]["examples"], 60).proportion_ci(method="wilson"))
    )


def test_cost_by_phase(tmp_path):
    report_run.gsm8k(
        tmp_path,
        10,
        20,
        steps=(0, 30, 60),
        phases={"compile": 9.0, "steps": 240.0, "evaluate": 3.0, "ledger": 5.0},
    )
    length = {s: sum(e["length"] for e in read(tmp_path).examples[s].values())
              for s in ("train", "validation")}  # fmt: skip
    cost = report.build(tmp_path, price=3.6)["cost"]
    assert cost["money"] == pytest.approx(0.3215) and not cost["continued"]
    assert cost["tokens_per_second"] == 400 and cost["step_seconds"] == [4.0, 4.0, 4.0]
    assert cost["phases"]["ledger"]["tokens"] == 3 * length["train"]
    assert cost["phases"]["evaluate"]["tokens"] == 3 * length["validation"]
    assert cost["phases"]["steps"]["tokens"] == 98765
    assert cost["phases"]["compile"] == pytest.approx(
        {"seconds": 9.0, "share_of_run": 9 / 321.5, "tokens": None}
    )
    # An eval that did not take the training set took the probe.
    path = tmp_path / "ledger" / "eval_000030.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.filter(pyarrow.compute.field("split") != "train"), path)
    probe = sum(e["length"] for e in read(tmp_path).examples["train_probe"].values())
    phases = report.build(tmp_path)["cost"]["phases"]
    assert phases["ledger"]["tokens"] == 2 * length["train"]
    assert phases["evaluate"]["tokens"] == 3 * length["validation"] + probe > probe
    # No phase holds what other starts of the run spent.
    run = json.loads((tmp_path / "run.json").read_text())
    run["earlier_seconds"] = 100.0
    (tmp_path / "run.json").write_text(json.dumps(run))
    r = report.build(tmp_path)
    assert r["cost"]["continued"] and r["cost"]["phases"]["steps"]["tokens"] is None
    assert r["cost"]["money"] is None
    assert "The run was continued" in report.markdown(r)


def test_training_examples_and_their_map(run):
    w, found = read(run), report.build(run)["training"]
    rows = [rows_of(run, step, "train") for step in (20, 40, 60)]
    p = {i: [math.exp(-r[i]["nll"] / r[i]["tokens"]) for r in rows] for i in rows[0]}
    ledger = training.scored(w)[0]
    drawn = training.data_map(ledger)
    assert drawn["mean"] == pytest.approx([np.mean(p[i]) for i in ledger.ids])
    assert drawn["std"] == pytest.approx([np.std(p[i]) for i in ledger.ids])
    expected = outliers.score(run)
    order = np.argsort(-expected["combined"], kind="stable")[:10]
    assert [x["id"] for x in found["worst"]] == expected["id"][order].tolist()
    assert found["scores"]["loss"][4] == expected["loss"].max()
    assert "outliers.parquet" not in found["source"] and not found["worst"][0]["rules"]


def test_mined_outliers_are_taken_where_they_are_of_this_ledger(tmp_path):
    report_run.gsm8k(tmp_path, 10, 24, steps=(0, 60))
    columns = outliers.score(tmp_path)
    names = [["duplicate"] if i == columns["id"][3] else [] for i in columns["id"]]
    mined = columns | {"combined": (columns["id"] == columns["id"][3]) * 1.0, "rules": names}
    path = tmp_path / "outliers.parquet"
    pyarrow.parquet.write_table(pyarrow.table(mined), path)
    found = report.build(tmp_path)["training"]
    assert found["source"] == "outliers.parquet" and not found["mapped"]
    assert found["worst"][0]["id"] == columns["id"][3]
    assert found["worst"][0]["rules"] == ["duplicate"]
    later = {"id": columns["id"], "grad_norm": columns["loss"], "grad_misfit": columns["loss"]}
    pyarrow.parquet.write_table(pyarrow.table(later), tmp_path / "gradients.parquet")
    found = report.build(tmp_path)["training"]
    assert "other files of scores" in found["source"] and "grad_norm" in found["scores"]
    with_them = mined | {k: columns["loss"] for k in ("grad_norm", "grad_misfit")}
    pyarrow.parquet.write_table(pyarrow.table(with_them), path)
    assert report.build(tmp_path)["training"]["source"] == "outliers.parquet"
    (tmp_path / "gradients.parquet").unlink()  # what was made of it is no longer so
    assert "other files of scores" in report.build(tmp_path)["training"]["source"]
    pyarrow.parquet.write_table(pyarrow.table(mined | {"loss": columns["loss"] + 1}), path)
    found = report.build(tmp_path)["training"]
    assert "is not used" in found["source"] and found["worst"][0]["rules"] == []


def test_another_run_is_compared_by_example(run, tmp_path):
    other = report_run.gsm8k(tmp_path, 60, 45, steps=(0, 20), data_fingerprint="other")
    [found] = report.build(run, (other,))["compare"]
    assert found["obstacles"] == [] and found["shared"] == 60 and found["best"] == [60, 20]
    assert any("same data" in x for x in found["cautions"])
    a, b = rows_of(run, 60, "validation"), rows_of(other, 20, "validation")
    total = sum(r["tokens"] for r in a.values())
    loss = found["loss"]
    assert loss["this"] == pytest.approx(sum(r["nll"] for r in a.values()) / total)
    assert loss["other"] == pytest.approx(sum(r["nll"] for r in b.values()) / total)
    assert loss["interval"][0] < loss["difference"] < loss["interval"][1] < 0
    assert loss["conclusion"] == "this run's is lower, beyond the 95 % interval"
    # The other way round it is the mirror image, up to the draws.
    [back] = report.build(other, (run,))["compare"]
    assert back["loss"]["difference"] == pytest.approx(-loss["difference"])
    [same] = report.build(run, (run,))["compare"]
    assert same["loss"]["interval"] == [0, 0] and same["cautions"] == []
    assert same["loss"]["conclusion"] == "no difference that these examples can show"


def test_labels_of_two_runs_are_compared_by_example(tmp_path):
    """This run errs on every third label, the other on every fourth, and the label of one differs;
    so 60 - 1 are left, of which each is right on what the other is not."""
    runs, ids = [], [f"validation-{i}" for i in range(60)]
    for name, every in (("this", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        runs.append(report_run.gsm8k(tmp_path / name, 60, 24, steps=(0, 20)))

        def labelled(r, every=every, name=name):
            if r["split"] != "validation":
                return r | {"label_p": [np.nan, np.nan]}
            i = ids.index(r["id"])
            label = i % 2 if (i, name) != (59, "other") else 0
            p = [0.2, 0.2]
            p[label if i % every else 1 - label] = 0.7
            return r | {"label": label, "label_p": p}

        for file in (tmp_path / name / "ledger").glob("eval_*.parquet"):
            edit(file, labelled)
    [found] = report.build(runs[0], (runs[1],))["compare"]
    found = found["class_accuracy"]
    assert found["this"] == pytest.approx(np.mean([i % 3 > 0 for i in range(59)]))
    assert found["other"] == pytest.approx(np.mean([i % 4 > 0 for i in range(59)]))
    only = [sum(i % a > 0 and i % b == 0 for i in range(59)) for a, b in ((3, 4), (4, 3))]
    assert [found["only_this_right"], found["only_other_right"]] == only == [10, 15]
    assert found["p"] == pytest.approx(scipy.stats.binomtest(10, 25).pvalue)


def other_text(r):
    return r | {"text": r["text"] + "." * (r["id"] == "validation-5")}


def other_tokens(r):
    return r | {"pieces": [r["pieces"][0] + ".", *r["pieces"][1:]]}


def other_ids(r):
    return r | {"id": "new" + r["id"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_text, "1 of 60 shared examples differ in their text"),
        (other_tokens, "60 of 60 shared examples differ in their tokens"),
        (other_ids, "no validation example has the same id in both runs"),
    ],
)
def test_losses_of_other_examples_are_not_compared(run, tmp_path, change, said):
    other = report_run.gsm8k(tmp_path, 60, 45, steps=(0, 20))
    edit(other / "ledger" / "examples.parquet", change)
    if change is other_ids:
        for path in (other / "ledger").glob("eval_*.parquet"):
            edit(path, change)
    r = report.build(run, (other,))
    assert r["compare"][0]["obstacles"] == [said] and "loss" not in r["compare"][0]
    assert f"**cannot be compared**: {said}" in report.markdown(r)


def test_several_runs_are_first_in_one_table(run, tmp_path):
    other = report_run.gsm8k(tmp_path / "a", 60, 45, steps=(0, 20))
    edit(other / "ledger" / "examples.parquet", other_text)
    r = report.build(run, (run, other))
    blocks = dict(sections.sections(r))["Comparison with other runs"]
    [table] = [b for b in blocks if isinstance(b, sections.Table) and b.head[0] == "other run"]
    loss = r["compare"][0]["loss"]
    keys = ("other", "this", "difference", "interval")
    first, second = (c["workdir"] for c in r["compare"])
    assert table.rows[0] == [first, *(loss[k] for k in keys), ""]
    assert table.rows[1] == [second, *[None] * 4, "; ".join(r["compare"][1]["config"])]
    alone = dict(sections.sections(report.build(run, (run,))))["Comparison with other runs"]
    assert not any(getattr(b, "head", [""])[0] == "other run" for b in alone)


def test_examples_that_only_one_run_has_are_left_out(run, tmp_path):
    other = report_run.gsm8k(tmp_path, 50, 45, steps=(0, 20))
    [found] = report.build(run, (other,))["compare"]
    assert found["shared"] == 50
    assert found["cautions"][0].startswith("10 validation examples of this run and 0 of the other")
    assert not any("too narrow" in x for x in found["cautions"])
    few = report_run.gsm8k(tmp_path / "few", 8, 45, steps=(0, 20))
    [found] = report.build(run, (few,))["compare"]
    assert "they share 8 validation examples: with fewer than about 20" in found["cautions"][1]


def test_calibration(tmp_path):
    """Of 40 labelled examples by hand: p of the chosen label, and whether it is right."""
    report_run.make(tmp_path, losses=(2.0, 1.0), probe=(2.0, 1.0))
    sure = np.repeat([0.55, 0.72, 0.78, 0.999], 10)
    right = np.arange(40) % 10 < np.repeat([5, 9, 8, 10], 10)

    def label(r):
        i = int(r["id"][1:])
        chosen = i % 2 if right[i] else 1 - i % 2
        p = [1 - sure[i]] * 2
        p[chosen] = sure[i]
        return r | {"label": i % 2, "label_p": p}

    for path in (tmp_path / "ledger").glob("eval_*.parquet"):
        edit(path, label)
    c = json.loads((tmp_path / "config.json").read_text())
    c["data"]["labels"] = ["no", "yes"]
    (tmp_path / "config.json").write_text(json.dumps(c))
    found = report.write(tmp_path)["validation"]["class_accuracy"]
    keys = ("examples", "mean_p", "accuracy")
    assert [(b["p"][0], *(b[k] for k in keys)) for b in found["reliability"]] == [
        (0.5, 10, pytest.approx(0.55), 0.5),
        (0.7, 20, pytest.approx(0.75), pytest.approx(0.85)),
        (0.9, 10, pytest.approx(0.999), 1.0),
    ]  # fmt: skip
    over = found["overconfidence"]
    assert over["value"] == pytest.approx(sure.mean() - 32 / 40)
    errors = sure - right
    half = 1.96 * errors.std(ddof=1) / math.sqrt(40)
    assert over["interval"] == pytest.approx([over["value"] - half, over["value"] + half], abs=0.02)
    assert 'alt="Accuracy against the probability' in (tmp_path / "report.html").read_text()
