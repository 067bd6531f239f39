"""Answers of a model: the command line end to end, its file and its shares."""

import json

import common
import numpy as np
import pytest
from test_evaluate import command, config  # noqa: F401  a fixture
from tiny_run import settings

from gemma_lora import generate
from gemma_lora.data.examples import Example
from gemma_lora.decode import Sampling
from gemma_lora.errors import UserError
from gemma_lora.lora import LoRAConfig
from gemma_lora.stats import wilson
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import peft


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    wrap = LoRAConfig(4, 8.0, 0.0)
    peft.export(path, common.adapter("gemma"), wrap, common.tiny_arch("gemma"), "tiny")
    return path


def test_answers_to_data_and_to_a_prompt(adapter, inputs, config, tmp_path):  # noqa: F811
    out = tmp_path / "new" / "answers.jsonl"
    path = inputs / "validation.jsonl"
    data = f"--config.data.path={path}"
    done = command("generate", config, f"--adapter={adapter}", data, f"--out={out}", "--new=12")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["id"] for r in rows] == [json.loads(x)["id"] for x in path.open()]
    assert found["examples"] == len(rows) == 6
    assert found["tokens"] == sum(r["tokens"] for r in rows)
    assert found["stopped"] == np.mean([r["stopped"] for r in rows])
    assert (found["adapter"], found["left_out"]) == (str(adapter), 0)
    assert "answer_accuracy" not in found  # no completion has its number after ####
    exact = np.array([r["answer"].strip() == r["completion"] for r in rows])
    assert (found["exact_match"], found["exact_match_95"]) == (exact.mean(), wilson(exact))
    # The same prompt alone, and the base.
    row, changes = rows[2], settings(inputs)
    assert row["prompt"] == "Question: 3 + 2\nAnswer: "
    alone = generate.generate(changes, adapter, None, row["prompt"], generate.Decoding(12))
    assert alone == {k: row[k] for k in ("answer", "tokens", "stopped")}
    base = generate.generate(changes, None, None, row["prompt"], generate.Decoding(12))
    assert base != alone


def test_an_answer_ends_at_its_stop(inputs, tmp_path):
    """The token that a trained model ends with is not in its text, and a seed draws anew."""
    tokenizer = Tokenizer.from_dir(inputs)
    changes = {"data.path": str(inputs / "validation.jsonl")}
    drawn = generate.Decoding(200, Sampling(temperature=4.0))
    found = generate.generate(settings(inputs, changes), None, tmp_path / "a", None, drawn)
    rows = [json.loads(line) for line in (tmp_path / "a").open()]
    assert found["stopped"] > 0.5  # of 128 tokens one is the stop
    eos = tokenizer.backend.id_to_token(tokenizer.eos_id)
    for row in rows:
        assert row["stopped"] or row["tokens"] == 200
        assert eos not in row["answer"]
    other = settings(inputs, changes | {"seed": 5})
    generate.generate(other, None, tmp_path / "b", None, drawn)
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()


def test_shares():
    def row(completion, answer, stopped=True):
        text = f"Q: {completion}"
        example = Example("x", np.zeros(4), 1, text, 3, len(text))
        return generate.compared(example, answer) | {"tokens": 2, "stopped": stopped}

    rows = [
        row("It is 4.\n#### 4", "It is 4.\n#### 4"),
        row("It is 4.\n#### 4", " 2 and 2\n#### 4.0 "),
        row("#### 1,000", "so it is 1000", stopped=False),
        row("#### 3", "#### 4\n3"),
        row("yes", " yes\n"),
        row("#### none", "4"),
    ]
    assert rows[0]["prompt"] == "Q: "
    assert [r["exact"] for r in rows] == [True, False, False, False, True, False]
    assert [r["right"] for r in rows] == [True, True, True, False, None, None]
    found = generate.shares(rows)
    assert (found["exact_match"], found["answer_accuracy"]) == (2 / 6, 3 / 4)
    assert found["answer_accuracy_95"] == wilson(np.array([True, True, True, False]))
    assert (found["examples"], found["tokens"], found["stopped"]) == (6, 12, 5 / 6)


def test_what_ends_a_turn_ends_an_answer(tokenizer):
    turn = tokenizer.backend.token_to_id("<end_of_turn>")
    assert generate.stop_ids(tokenizer, False) == [tokenizer.eos_id]
    assert generate.stop_ids(tokenizer, True) == sorted({tokenizer.eos_id, turn})
    ids = generate.prompt_ids(tokenizer, "2 + 2", True)
    text = tokenizer.decode(ids, skip_special=False)
    assert text.count("2 + 2") == 1 and text.endswith("<start_of_turn>model\n")
    assert list(ids).count(tokenizer.bos_id) == 1
    assert list(generate.prompt_ids(tokenizer, "2 + 2", False)) == [
        tokenizer.bos_id,
        *tokenizer.encode("2 + 2"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of --out and --prompt must be given"),
        (("--out=",), "--out is empty"),
        (("--prompt=a", "--top_p=0"), "got 256 new tokens, temperature 0, top_p 0; expected"),
    ],
)
def test_command_lines_that_are_refused(arguments, message, config):  # noqa: F811
    done = command("generate", config, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "out", "message"),
    [
        ({"data.seq_len": 8}, "answers", "no prompt is shorter than data.seq_len=8"),
        ({"data.path": "{tmp}/rows.jsonl"}, "answers", "rows.jsonl does not exist"),
        ({}, "", "is a directory"),
    ],
)
def test_data_that_are_refused(changes, out, message, inputs, tmp_path):
    changes = {"data.path": str(inputs / "validation.jsonl")} | changes
    changes = {k: v.format(tmp=tmp_path) if k == "data.path" else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        generate.generate(settings(inputs, changes), None, tmp_path / out)
    assert not any(tmp_path.iterdir())


def test_rows_keep_their_order_with_any_batch(inputs, tmp_path):
    texts = []
    for rows in (1, 4):
        changed = settings(inputs, {"data.batch_size": rows})
        generate.generate(changed, None, tmp_path / str(rows), None, generate.Decoding(6))
        texts.append((tmp_path / str(rows)).read_text())
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == len(list((inputs / "train.jsonl").open()))
