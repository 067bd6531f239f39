"""Kept tokens: the same to the bit, only for the same inputs, and never from a damaged file."""

import dataclasses
import os

import numpy as np
import pytest
from test_dataset import settings

from gemma_lora.data import cache, examples
from gemma_lora.errors import UserError
from gemma_lora.tokenizer import Tokenizer

ROWS = [{"id": f"r{i}", "prompt": "p" * i, "completion": "c" * (i % 7)} for i in range(2, 40)]
LABELLED = [{"id": f"r{i}", "text": "ab" * i, "label": i % 2} for i in range(1, 40)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tokens are kept; also those of few rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(examples, "_WORTH_KEEPING", 0)
    return tmp_path / "gemma_lora" / "tokens"


@pytest.fixture
def encoded(monkeypatch):
    """A list that grows with every call of the tokenizer."""
    calls, encode = [], Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: calls.append(1) or encode(self, texts)
    )
    return calls


def tokenize(rows, tokenizer, **data):
    return examples.tokenize(rows, tokenizer, settings(**{"seq_len": 32} | data).data, "x.jsonl")


def same(a, b):
    fields = [f.name for f in dataclasses.fields(examples.Example) if f.name != "tokens"]
    for x, y in zip(a.examples, b.examples, strict=True):
        assert x.tokens.dtype == y.tokens.dtype == np.int32
        assert x.tokens.tobytes() == y.tokens.tobytes()
        assert [getattr(x, f) for f in fields] == [getattr(y, f) for f in fields]
    rest = ("truncated", "dropped", "label_tokens")
    assert [getattr(a, k) for k in rest] == [getattr(b, k) for k in rest]


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("rows", [ROWS, LABELLED], ids=["completions", "labels"])
def test_kept_tokens_are_the_same(rows, loss_on, tokenizer, folder, encoded, monkeypatch):
    cold = tokenize(rows, tokenizer, loss_on=loss_on)
    assert cold.examples and cold.truncated and len(list(folder.iterdir())) == 1
    count = len(encoded)
    same(tokenize(rows, tokenizer, loss_on=loss_on), cold)
    assert len(encoded) == count
    monkeypatch.setattr(examples, "_WORTH_KEEPING", 10**9)
    same(tokenize(rows, tokenizer, loss_on=loss_on), cold)
    assert len(encoded) > count
    # Ids are the rows' own, whatever they were when the tokens were kept.
    monkeypatch.setattr(examples, "_WORTH_KEEPING", 0)
    renamed = tokenize([r | {"id": r["id"] + "x"} for r in rows], tokenizer, loss_on=loss_on)
    assert [e.id for e in renamed.examples] == [f"{e.id}x" for e in cold.examples]


def test_what_decides_is_part_of_the_key(tokenizer, folder, encoded, monkeypatch):
    other = dataclasses.replace(tokenizer, add_bos=False)
    longer = [{**LABELLED[0], "text": "abc"}, *LABELLED[1:]]
    ways = [
        (LABELLED, tokenizer, {}),
        (longer, tokenizer, {}),
        (LABELLED[::-1], tokenizer, {}),
        (LABELLED[1:], tokenizer, {}),
        (LABELLED, other, {}),
        (LABELLED, tokenizer, {"seq_len": 31}),
        (LABELLED, tokenizer, {"loss_on": "completion"}),
        (LABELLED, tokenizer, {"labels": ("positive", "negative")}),
        (LABELLED, tokenizer, {"template": "{text} {label}"}),
        (ROWS, tokenizer, {}),
        (ROWS, tokenizer, {"chat": True}),
    ]
    for i, (rows, tok, data) in enumerate(ways):
        chosen = dataclasses.replace(tok, chat_template=CHAT) if data.get("chat") else tok
        count = len(encoded)
        tokenize(rows, chosen, **data)
        assert len(encoded) > count, f"way {i} found the tokens of another"
    monkeypatch.setattr(examples, "_code", lambda: "another")
    count = len(encoded)
    tokenize(LABELLED, tokenizer)
    assert len(encoded) > count and len(list(folder.iterdir())) == len(ways) + 1


CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}\
{% if add_generation_prompt %}a: {% endif %}"


def test_a_damaged_or_foreign_file_is_made_again(tokenizer, folder):
    cold = tokenize(ROWS, tokenizer)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", whole[:-1], whole[: len(whole) // 2], b"not a zip" * 40]
    for at in rng.integers(len(whole), size=60):
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        same(tokenize(ROWS, tokenizer), cold)
    tokenize(ROWS[1:], tokenizer)
    [other] = set(folder.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    same(tokenize(ROWS, tokenizer), cold)
    assert path.read_bytes() == whole


def test_no_bit_of_a_file_can_change_what_is_found(folder):
    arrays = {"tokens": np.arange(9, dtype=np.int32), "length": np.arange(3, dtype=np.int32)}
    name = cache.key(["x"])
    cache.save(name, arrays)
    path = cache._path(name)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = cache.load(name)
        if found is not None:
            assert found.keys() == arrays.keys()
            assert all(found[k].tobytes() == x.tobytes() for k, x in arrays.items())


def test_errors_are_not_kept_and_a_folder_that_cannot_be_written_is_no_error(
    tokenizer, folder, tmp_path
):
    for _ in range(2):
        with pytest.raises(UserError, match="row bad: the text itself holds the bos token"):
            tokenize([*ROWS, {"id": "bad", "prompt": "<bos>", "completion": "c"}], tokenizer)
    assert not folder.exists()
    (tmp_path / "gemma_lora").write_text("a file, no folder")
    assert tokenize(ROWS, tokenizer).examples


def test_what_was_not_used_for_longest_goes_first(folder, monkeypatch):
    arrays = {"x": np.zeros(1000, np.int32)}
    names = [cache.key([str(i)]) for i in range(5)]
    for i, name in enumerate(names[:4]):
        cache.save(name, arrays)
        os.utime(cache._path(name), (i + 1, i + 1))
    assert np.array_equal(cache.load(names[0])["x"], arrays["x"])  # used: the last to go
    monkeypatch.setattr(cache, "_LIMIT", 3 * cache._path(names[0]).stat().st_size)
    cache.save(names[4], arrays)
    assert [cache.load(name) is not None for name in names] == [True, False, False, True, True]


def test_the_key_tells_where_a_text_ends():
    assert len({cache.key(x) for x in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""])}) == 4
