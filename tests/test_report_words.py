"""What the report says of harm, of small sets and of copies; how it shows numbers and texts."""

import pytest
from report_run import N, gsm8k, make

from gemma_lora import report
from gemma_lora.errors import UserError
from gemma_lora.report import prose
from gemma_lora.report.sections import Example, show


def test_harm_at_the_end_is_said(tmp_path):
    r = report.build(make(tmp_path, losses=(1.0, 0.9, 1.8), probe=(1.0, 0.9, 0.5)))
    assert r["validation"]["loss"]["last_conclusion"] == "rose beyond its 95 % interval"
    low, high = r["validation"]["loss"]["last_interval"]
    assert 0 < low < 0.8 < high
    lead = report.markdown(r).partition("## Overview")[0]
    fell = "**fell beyond its 95 % interval**. At the last eval, 1.8000, it "
    assert f"{fell}**rose beyond its 95 % interval**." in lead


def test_a_lower_loss_whose_adapter_was_not_kept(tmp_path):
    """Of a training example of that eval no loss was finite, or a kill came before run.json."""
    r = report.build(make(tmp_path, losses=(1.0, 0.8), probe=(1.0, 0.9), best_step=0))
    assert r["validation"]["loss"]["conclusion"] == (
        "a later eval had a lower validation loss, but its adapter was not kept"
    )


@pytest.mark.parametrize(("n", "concludes"), [(2, False), (5, False), (6, True)])
def test_a_handful_of_examples_is_no_evidence(tmp_path, n, concludes):
    loss = report.build(make(tmp_path, losses=(9.0, 1.0), probe=(9.0, 1.0), n=n))
    assert any(f"There are {n} validation examples" in x for x in loss["notes"])
    said = loss["validation"]["loss"]["conclusion"]
    assert said == (
        "fell beyond its 95 % interval"
        if concludes
        else f"no conclusion from {n} examples: it takes 6"
    )
    assert ("evals of 6 examples" in loss["more_epochs"]["because"]) is not concludes


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [(480, 80, "p" * 480 + "c" * 80), (1490, 10, "..." + "p" * 590 + "c" * 10),
     (10, 900, "p" * 10 + "c" * 590 + "..."), (900, 900, "..." + "p" * 300 + "c" * 300 + "...")],
)  # fmt: skip
def test_of_a_long_example_the_completion_is_shown(before, after, shown):
    x = Example("e", "n", "p" * before + "c" * after, before, False, None, None, 0)
    assert f"\n{shown}\n" in prose._block(x)


def test_a_small_probe_of_a_small_training_set_is_said(tmp_path):
    r = report.build(gsm8k(tmp_path, validation=60, train=8))
    assert [x for x in r["notes"] if x.startswith("There are")] == [
        "There are 8 train-probe examples: with fewer than about 20 the intervals are too narrow."
    ]


def test_copies_of_training_texts_are_in_the_notes(tmp_path):
    r = report.build(make(tmp_path, examples={"train": 9, "validation": N, "copies": 3}))
    assert any("3 in the validation set with the text of a" in x for x in r["notes"])


def test_the_best_eval_must_be_there(tmp_path):
    make(tmp_path)
    (tmp_path / "ledger" / "eval_000020.parquet").unlink()
    with pytest.raises(UserError, match=r"eval_000020.parquet is missing: it is the best eval"):
        report.build(tmp_path)


def test_numbers_for_people():
    for x, shown in (
        (0.12345, "0.1235"), (1234, "1,234"), (3e-6, "3e-06"), (-2e-5, "-2e-05"), (0.0, "0.0000"),
        ([0.1, 1250], "[0.1000, 1250]"), ([-0.02, None], "[-0.0200, n/a]"), (None, "n/a"),
    ):  # fmt: skip
        assert show(x) == shown
