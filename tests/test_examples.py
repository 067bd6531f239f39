"""Tokens with their loss mask, what is cut and left out, splits."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from test_dataset import examples, settings

from gemma_lora.data import examples as module
from gemma_lora.data.examples import split, subset, tokenize
from gemma_lora.errors import UserError


def tokenized(rows, tokenizer, **data):
    return tokenize(rows, tokenizer, settings(**data).data, "x.jsonl")


QA = {"id": "r1", "question": "2+3?", "answer": "5 ok"}
TEXT = "Question: 2+3?\nAnswer: 5 ok"


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_bos_text_eos_and_the_loss_mask(tokenizer, loss_on):
    [e] = tokenized([QA], tokenizer, loss_on=loss_on).examples
    assert e.tokens.dtype == np.int32 and e.tokens[0] == 2 and e.tokens[-1] == 1
    assert list(e.tokens).count(2) == 1 and tokenizer.decode(e.tokens) == e.text == TEXT
    assert e.text[e.completion :] == "5 ok"
    learnt = [tokenizer.backend.id_to_token(int(i)) for i in e.tokens[e.loss_from :]]
    assert learnt[-1] == "<eos>"
    assert "".join(learnt[:-1]) == ("5 ok" if loss_on == "completion" else TEXT)
    assert e.load == len(learnt)


def test_a_text_that_ends_itself_is_not_ended_twice(tokenizer):
    rows = [QA, QA | {"id": "r2", "answer": QA["answer"] + "<eos>"}]
    once, own = tokenized(rows, tokenizer, loss_on="all").examples
    assert once.tokens.tolist() == own.tokens.tolist() and list(once.tokens).count(1) == 1


class Triples:
    """Tokens of three characters: the completion begins inside one."""

    add_bos, bos_id, eos_id = True, 2, 1

    def encode_batch(self, texts):
        spans = [[(i, min(i + 3, len(t))) for i in range(0, len(t), 3)] for t in texts]
        return [SimpleNamespace(ids=[10 + a for a, _ in s], offsets=s) for s in spans]


@pytest.mark.parametrize(
    ("prompt", "completion", "first"),
    [("abc", "def", 2), ("abcd", "efg", 2), ("abcde", "f", 2), ("", "ab", 1), ("abcd", "", 3)],
)
def test_loss_begins_at_the_first_token_with_a_character_of_the_completion(
    prompt, completion, first
):
    row = {"id": "r", "prompt": prompt, "completion": completion}
    [e] = tokenized([row], Triples(), loss_on="completion").examples
    assert e.loss_from == first and e.tokens[-1] == 1


def test_without_bos_the_first_token_carries_no_loss():
    plain = SimpleNamespace(
        add_bos=False, bos_id=None, eos_id=1, encode_batch=Triples().encode_batch
    )
    for loss_on in ("all", "completion"):
        [e] = tokenized(
            [{"id": "r", "prompt": "", "completion": "abcd"}], plain, loss_on=loss_on
        ).examples
        assert e.tokens.tolist() == [10, 13, 1] and e.loss_from == 1


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_texts_are_encoded_in_blocks(tokenizer, monkeypatch, block):
    rows = [{"id": f"r{i}", "prompt": f"{i} ", "completion": "c" * (i + 1)} for i in range(7)]
    want = tokenized(rows, tokenizer).examples
    monkeypatch.setattr(module, "_AT_ONCE", block)
    for a, b in zip(want, tokenized(rows, tokenizer).examples, strict=True):
        assert a.id == b.id and a.tokens.tolist() == b.tokens.tolist()
    assert len({e.tokens.size for e in want}) == 7


def test_truncated_and_dropped_are_told_apart(tokenizer):
    rows = [{"id": str(n), "prompt": "p" * 5, "completion": "c" * n} for n in range(8)]
    rows.append({"id": "long", "prompt": "p" * 10, "completion": "c"})
    found = tokenized(rows, tokenizer, seq_len=10, loss_on="completion")
    # bos + 5 + n + eos <= 10 fits whole
    assert [e.id for e in found.examples] == [str(n) for n in range(8)]
    assert found.truncated == ["4", "5", "6", "7"] and found.dropped == ["long"]
    assert [e.load for e in found.examples] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert [int(e.tokens[-1]) == 1 for e in found.examples] == [True] * 4 + [False] * 4
    exact = tokenized(rows[:1], tokenizer, seq_len=6, loss_on="completion")
    assert not exact.examples and exact.dropped == ["0"] and not exact.truncated


def test_refused_texts(tokenizer):
    for bad, hint in (("a <bos> b", "the bos token"), ("a \ud800", "surrogate")):
        rows = [QA, {"id": "r2", "question": bad, "answer": "x"}]
        with pytest.raises(UserError, match=rf"x\.jsonl, row r2: .*{hint}"):
            tokenized(rows, tokenizer)
    with pytest.raises(UserError, match=r"x\.jsonl, row r2: field 'answer' is missing"):
        tokenized([QA, {"id": "r2", "question": "q"}], tokenizer)
    with pytest.raises(UserError, match=r"data\.loss_on 'answer' is unknown, .valid: all, comp"):
        tokenized([QA], tokenizer, loss_on="answer")


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 5), (0.5, 25), (0.001, 1), (0.999, 49)])
def test_split_counts_and_order_independence(fraction, count):
    made = examples(50, 0)
    train, validation = split(made, fraction, 7)
    assert (len(train), len(validation)) == (50 - count, count)
    assert {e.id for e in train} | {e.id for e in validation} == {e.id for e in made}
    order = {e.id: i for i, e in enumerate(made)}
    assert [order[e.id] for e in train] == sorted(order[e.id] for e in train)
    shuffled = random.Random(1).sample(made, 50)
    assert {e.id for e in split(shuffled, fraction, 7)[1]} == {e.id for e in validation}


def test_split_depends_on_the_seed_and_needs_two():
    made = examples(50, 0)
    parts = {frozenset(e.id for e in split(made, 0.2, seed)[1]) for seed in range(4)}
    assert len(parts) == 4
    assert [len(p) for p in split(made[:2], 0.1, 0)] == [1, 1]
    with pytest.raises(UserError, match=r"1 usable example\(s\)"):
        split(made[:1], 0.5, 0)


def test_a_subset_grows_by_adding():
    made = examples(30, 0)
    small, large = ({e.id for e in subset(made, n, 3)} for n in (5, 12))
    assert small < large and len(small) == 5
    assert subset(made, 99, 3) == made
