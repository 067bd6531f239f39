"""Completions without their prompts: what is left of them, their losses, what is written."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
import tiny_run

from gemma_lora import outliers, unprompted
from gemma_lora.data.examples import Example
from gemma_lora.errors import UserError
from gemma_lora.model import head_weight, logits
from gemma_lora.reopen import load, reopen, restored


def test_shared_ends_by_hand():
    def ends(*prompts):
        return unprompted.shared_ends([np.array(list(p)) for p in prompts])

    assert ends("Q: 1 A:", "Q: 2 A:", "Q: 17 A:") == (3, 3)
    assert ends("Q: 1 A:", "Q: 17 A:") == (4, 3)
    assert ends("ab", "xy") == (0, 0) and ends("ab", "ab") == (2, 0)
    # The whole of the shortest is shared, and none of it twice.
    assert ends("aba", "abaxaba") == (3, 0) and ends("aab", "aaxab") == (2, 1)
    assert ends("", "abc") == (0, 0)


def test_what_is_left_of_examples():
    def example(prompt: str, completion: str) -> Example:
        tokens = np.array([ord(c) for c in prompt + completion], np.int32)
        at = len(prompt)
        return Example(
            prompt, tokens, 1, prompt + completion, at, at + len(completion), answer_from=at
        )

    some = [example("Q: 1 A:", " one"), example("Q: 20 A:", " twenty")]
    left = unprompted.without_prompts(some)
    assert ["".join(map(chr, e.tokens)) for e in left] == ["Q:  A: one", "Q:  A: twenty"]
    assert [e.loss_from for e in left] == [e.answer_from for e in left] == [6, 6]
    assert [e.load for e in left] == [4, 7]
    left = unprompted.without_prompts([example("ab", " one"), example("xy", " two")])
    assert ["".join(map(chr, e.tokens)) for e in left] == ["b one", "y two"]
    assert [e.loss_from for e in left] == [1, 1] and [e.load for e in left] == [4, 4]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("unprompted")
    with tiny_run.quick_compilation():
        changes = {"train.ledger_every": 4, "data.loss_on": "all"}
        inputs = tiny_run.write_inputs(directory)
        tiny_run.run(directory / "run", tiny_run.settings(inputs, changes))
        yield directory / "run"


def test_what_the_command_writes(run):
    """Each loss is that of a direct computation; outliers takes the score, and combines it."""
    unprompted.run(run, "last")
    table = pyarrow.parquet.read_table(run / "unprompted.parquet")
    assert table.column_names == ["id", "step", "prompted", "unprompted", "ifd"]
    rows = {r["id"]: r for r in table.to_pylist()}
    assert list(rows) == sorted(rows) and {r["step"] for r in rows.values()} == {8}

    opened = reopen(run, "last")
    base = load(opened)
    _, lora, _ = restored(opened, run, "last", base)
    examples = opened.train_set.examples
    first, last = unprompted.shared_ends([e.tokens[: e.answer_from] for e in examples])
    assert first >= 1 and last >= 1  # the template's

    def mean(tokens: np.ndarray, at: int) -> float:
        t = tokens[None]
        model = opened.model
        hidden = model.apply(
            {"params": base, "lora": lora}, t, np.ones_like(t), np.arange(t.size)[None]
        )
        z = logits(hidden, head_weight(base, model.arch), model.arch, model.dtype)[0]
        p = np.asarray(jax.nn.log_softmax(z), np.float64)
        return -p[np.arange(at - 1, t.size - 1), tokens[at:]].mean()

    for e in examples[:2]:
        bare = [e.tokens[:first], e.tokens[e.answer_from - last :]]
        with_, without = mean(e.tokens, e.answer_from), mean(np.concatenate(bare), first + last)
        assert rows[e.id]["prompted"] == pytest.approx(with_, rel=1e-4)
        assert rows[e.id]["unprompted"] == pytest.approx(without, rel=1e-4)
        assert rows[e.id]["ifd"] == pytest.approx(with_ / without, rel=2e-4)

    columns = outliers.mine(run, 5, None)
    assert list(columns["ifd"]) == [rows[i]["ifd"] for i in columns["id"]]
    assert np.array_equal(columns["combined"], outliers.rank(columns["ifd"]))
    assert "\n- `ifd`: loss of the completion as a share" in (run / "outliers.md").read_text()


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_a_run_of_other_devices_is_opened_on_these(run, capsys, axis):
    config = run / "config.json"
    before = config.read_text()
    try:
        values = json.loads(before)
        values["mesh"][axis], values["attention"] = 8, "splash"
        config.write_text(json.dumps(values))
        opened = reopen(run)
        assert opened.mesh.size == 1 and opened.model.attention == "auto"
    finally:
        config.write_text(before)
    said = capsys.readouterr().out
    assert "needs 8 devices, but there are 1: fsdp=1 is taken" in said
    assert "'splash' cannot be used here: it is a TPU kernel, and this is cpu: 'auto'" in said


def test_rows_cut_before_their_completion(run, monkeypatch):
    """They have no loss and no score, and change none of the others."""
    want = unprompted.run(run, "0")
    opened = reopen(run)
    whole = opened.train_set.examples
    cut = dataclasses.replace(whole[0], tokens=whole[0].tokens[:4], answer_from=-1)
    opened.train_set.examples = [cut, *whole[1:]]
    monkeypatch.setattr(unprompted, "reopen", lambda *_: opened)
    got = unprompted.run(run, "0")
    cut_off = got["id"] == cut.id
    assert np.array_equal(np.isnan(got["ifd"]), cut_off)
    assert np.allclose(got["ifd"][~cut_off], want["ifd"][~cut_off], rtol=1e-5)


def test_what_cannot_be_answered(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="checkpoints holds no checkpoint: expected --step 0"):
        unprompted.run(tmp_path / "run", "best")
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "ledger" / "eval_000008.parquet").unlink()
    with pytest.raises(UserError, match=r"--step last is step 8, .* at 0, 4 alone"):
        unprompted.run(tmp_path / "other", "last")
    opened = reopen(run)
    one = opened.train_set.examples[0]
    monkeypatch.setattr(unprompted, "reopen", lambda *_: opened)
    opened.train_set.examples = [dataclasses.replace(one, id=str(i)) for i in range(3)]
    with pytest.raises(UserError, match="all prompts are the same: there is nothing to leave out"):
        unprompted.run(run, "0")
    opened.train_set.examples = [dataclasses.replace(one, answer_from=-1)]
    with pytest.raises(UserError, match="holds a token of its completion"):
        unprompted.run(run, "0")
