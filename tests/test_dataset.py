"""Pure batches of every shape; the data sets of a run."""

import dataclasses
import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from gemma_lora import config as configs
from gemma_lora.data import sources
from gemma_lora.data.dataset import Dataset, loss_slots, shapes
from gemma_lora.data.examples import Example
from gemma_lora.data.pipeline import check_files, describe, load_data
from gemma_lora.errors import UserError

SIZE = 32


def settings(**data):
    c = configs.default()
    c.data.seq_len = 64
    c.data.batch_size = 4
    c.data.update(data)
    return c


def examples(n, seed, longest=SIZE):
    """Random lengths; tokens are different everywhere, so that a misplaced one is seen."""
    rng = random.Random(seed)
    made, at = [], 1
    for i in range(n):
        length = rng.randint(2, longest)
        tokens = np.arange(at, at + length, dtype=np.int32)
        made.append(Example(f"x{i}", tokens, rng.randint(1, length - 1), "", 0, 0))
        at += length
    return made


def dataset(made, packed, *, size=SIZE, batch_size=4, seed=0, shuffle=True, here=None, sizes=None):
    return Dataset(
        made,
        shapes=sizes or {size: loss_slots(made, size, packed)},
        batch_size=batch_size,
        pack=packed,
        seed=seed,
        shuffle=shuffle,
        rows_here=here,
    )


def equal(a, b):
    return a.arrays.keys() == b.arrays.keys() and all(
        np.array_equal(x, y)
        for x, y in zip((*a.arrays.values(), a.owner), (*b.arrays.values(), b.owner), strict=True)
    )


# ---- batches --------------------------------------------------------------------------------

both = pytest.mark.parametrize("packed", [False, True])


@both
@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_holds_every_token_pair_of_every_example_once(packed, seed):
    made = examples(37, seed)
    data = dataset(made, packed, seed=seed)
    for epoch in range(3):
        seen = {i: [] for i in range(len(made))}
        assert len(data.plan(epoch)) <= data.steps_per_epoch * 4 < len(data.plan(epoch)) + 4
        for i in range(data.steps_per_epoch):
            batch = data.batch_at(epoch * data.steps_per_epoch + i)
            a = batch.arrays
            assert a["tokens"].shape == (4, SIZE) and a["loss_pos"].shape == (4, data.shapes[SIZE])
            assert np.array_equal(a["loss_mask"], (batch.owner >= 0).astype(np.float32))
            for r, s in zip(*np.nonzero(a["loss_mask"]), strict=True):
                at, m = a["loss_pos"][r, s], int(batch.owner[r, s])
                assert a["segments"][r, at] == a["segments"][r, at + 1] > 0
                assert a["tokens"][r, at + 1] == a["targets"][r, s]
                seen[m].append((int(a["tokens"][r, at]), int(a["targets"][r, s])))
            for r in range(4):
                for number in range(1, a["segments"][r].max() + 1):
                    inside = a["segments"][r] == number
                    tokens = a["tokens"][r, inside]
                    assert np.array_equal(a["positions"][r, inside], np.arange(len(tokens)))
                    assert any(np.array_equal(tokens, e.tokens) for e in made)
            padding = a["segments"] == 0
            assert not a["tokens"][padding].any() and not a["positions"][padding].any()
        for i, e in enumerate(made):
            pairs = list(zip(e.tokens[:-1].tolist(), e.tokens[1:].tolist(), strict=True))
            assert seen[i] == pairs[e.loss_from - 1 :]


@both
def test_epochs_differ_and_are_pure(packed):
    made = examples(37, 0)
    data = dataset(made, packed)
    steps = data.steps_per_epoch
    batches = [data.batch_at(i) for i in range(3 * steps)]
    again = dataset(made, packed)
    for i in random.Random(0).sample(range(3 * steps), 3 * steps):
        assert equal(again.batch_at(i), batches[i])
    # A batch may come again by chance (the last one has few rows), an epoch may not.
    epochs = [batches[i : i + steps] for i in range(0, 3 * steps, steps)]
    other = dataset(made, packed, seed=1)
    epochs.append([other.batch_at(i) for i in range(steps)])
    for one, two in itertools.combinations(epochs, 2):
        assert sum(map(equal, one, two)) <= 1


@both
def test_without_shuffling_there_is_one_order(packed):
    made = examples(11, 0)
    data, other = (dataset(made, packed, shuffle=False, seed=s) for s in (0, 5))
    assert all(equal(data.batch_at(i), other.batch_at(i)) for i in range(data.steps_per_epoch))
    if not packed:
        assert data.plan(0) == [[i] for i in range(11)]


@both
def test_the_last_batch_is_filled_with_empty_rows(packed):
    made = examples(9, 3)
    data = dataset(made, packed, batch_size=4)
    rows = len(data.plan(0))
    last = data.batch_at(data.steps_per_epoch - 1)
    empty = data.steps_per_epoch * 4 - rows
    assert empty  # or this tests nothing
    for name in ("tokens", "segments", "positions", "targets", "loss_mask"):
        assert not last.arrays[name][4 - empty :].any()
    assert (last.owner[4 - empty :] == -1).all() and (last.owner[: 4 - empty] >= 0).any()


@both
def test_processes_together_hold_the_whole_batch(packed):
    made = examples(21, 0)
    whole = dataset(made, packed)
    here = [np.array([0, 3]), np.array([1, 2])]  # as some meshes give them
    parts = [dataset(made, packed, here=rows) for rows in here]
    assert all(p.steps_per_epoch == whole.steps_per_epoch for p in parts)
    for i in range(2 * whole.steps_per_epoch):
        got, want = [p.batch_at(i) for p in parts], whole.batch_at(i)
        for name, x in want.arrays.items():
            assert all(np.array_equal(g.arrays[name], x[r]) for g, r in zip(got, here, strict=True))
        for g in got:
            assert np.array_equal(g.owner, want.owner) and np.array_equal(g.answer, want.answer)
            assert g.filled == (want.arrays["segments"] > 0).sum()


@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_has_as_many_steps_when_packed(seed):
    data = dataset(examples(40 + seed, seed, longest=SIZE // 2), True, seed=seed)
    assert len({len(data.plan(epoch)) for epoch in range(5)}) == 1
    assert len({str(data.plan(epoch)) for epoch in range(5)}) == 5


def test_packing_fills_more():
    made = examples(60, 0, longest=SIZE // 2)
    packed, single = dataset(made, True), dataset(made, False)
    tokens = sum(len(e.tokens) for e in made)
    assert single.fill == tokens / (60 * SIZE)
    assert packed.fill > 1.5 * single.fill and packed.fill <= 1
    real = sum(
        (packed.batch_at(i).arrays["segments"] > 0).sum() for i in range(packed.steps_per_epoch)
    )
    assert real == tokens


def test_batches_are_made_ahead():
    data = dataset(examples(21, 0), True)
    made = list(data.batches(2, 9))
    assert len(made) == 7
    assert all(equal(batch, data.batch_at(2 + i)) for i, batch in enumerate(made))
    assert list(data.batches(5, 5)) == []


# ---- buckets --------------------------------------------------------------------------------


def bucketed(made, buckets=(8, 20), **kwargs):
    c = settings(seq_len=SIZE, buckets=buckets)
    return dataset(made, False, sizes=shapes(made, c.data), **kwargs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [37, 40, 3])
def test_buckets_hold_every_example_once_in_the_shortest_row_that_fits(seed, count):
    made = examples(count, seed)
    data = bucketed(made, seed=seed)
    assert data.steps_per_epoch == -(-count // 4)
    sizes, orders = set(), set()
    for epoch in range(4):
        seen, lengths = [], []
        for i in range(data.steps_per_epoch):
            batch = data.batch_at(epoch * data.steps_per_epoch + i)
            rows, size = batch.arrays["tokens"].shape
            assert rows == 4 and batch.owner.shape == (4, data.shapes[size])
            members = [int(m) for m in np.unique(batch.owner[batch.owner >= 0])]
            longest = max(len(made[m].tokens) for m in members)
            assert size == min(t for t in (8, 20, SIZE) if t >= longest)
            loads = {m: int((batch.owner == m).sum()) for m in members}
            assert loads == {m: made[m].load for m in members}
            assert len(members) == 4 or i == data.steps_per_epoch - 1
            seen += members
            lengths.append(size)
        assert sorted(seen) == list(range(count))
        sizes.add(tuple(sorted(lengths)))
        orders.add((tuple(seen), tuple(lengths)))
    assert len(sizes) == 1  # the same programs, as often, in every epoch
    assert len(orders) == (4 if count > 3 else 1)
    assert {t: len(at) for t, at in data.steps_by_length().items()} == {
        t: sizes.copy().pop().count(t) for t in sizes.copy().pop()
    }


def test_batches_of_buckets_are_mixed_pure_and_fill_more():
    made = examples(400, 0)
    data, again = bucketed(made), bucketed(made)
    steps = range(3 * data.steps_per_epoch)
    batches = [data.batch_at(i) for i in steps]
    assert all(equal(again.batch_at(i), batches[i]) for i in random.Random(0).sample(steps, 60))
    lengths = [b.arrays["tokens"].shape[1] for b in batches[: data.steps_per_epoch]]
    assert sum(a != b for a, b in itertools.pairwise(lengths)) > len(lengths) / 3
    single = dataset(made, False)
    tokens = sum(b.arrays["tokens"].size for b in batches[: data.steps_per_epoch])
    assert data.fill == sum(len(e.tokens) for e in made) / tokens > 1.3 * single.fill
    parts = [bucketed(made, here=2 * i + np.arange(2)) for i in range(2)]
    for i in range(20):
        got, want = [p.batch_at(i) for p in parts], data.batch_at(i)
        for name, x in want.arrays.items():
            assert np.array_equal(np.concatenate([g.arrays[name] for g in got]), x)


def test_fixed_sets_have_buckets_too():
    made = examples(30, 1)
    data, other = (bucketed(made, shuffle=False, seed=s) for s in (0, 5))
    assert data.plan(0) == other.plan(0)
    assert sorted(data.plan(0)) == [[i] for i in range(30)]
    assert len(data.steps_by_length()) == 3


def test_buckets_that_hold_nothing_are_left_out():
    made = examples(10, 0, longest=12)
    kept = bucketed(made, (2, 16)).shapes
    assert 16 in kept and SIZE in kept
    assert list(bucketed(made, (16,)).steps_by_length()) == [16]


def test_fingerprint():
    made = examples(5, 0)
    known = dataset(made, False).fingerprint()
    assert known == dataset(examples(5, 0), True, seed=3).fingerprint()
    e = made[2]
    changes = [
        dataclasses.replace(e, id="other"),
        dataclasses.replace(e, loss_from=e.loss_from % (len(e.tokens) - 1) + 1),
        dataclasses.replace(e, tokens=e.tokens + np.int32(1)),
        dataclasses.replace(e, tokens=np.append(e.tokens, np.int32(1))),
    ]
    changed = [[*made[:2], c, *made[3:]] for c in changes] + [made[::-1], made[:4]]
    prints = {dataset(c, False, size=SIZE + 1).fingerprint() for c in changed}
    assert len(prints) == len(changed) and known not in prints


# ---- the sets of a run ----------------------------------------------------------------------


def write(path, ids, size=4):
    rows = [{"id": i, "prompt": f"{i} ", "completion": "c" * size} for i in ids]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def ids(data):
    return {e.id for e in data.examples}


def test_copies_of_training_texts_are_counted(tmp_path, tokenizer):
    write(tmp_path / "all.jsonl", [f"a{i}" for i in range(40)])
    path = tmp_path / "copies.jsonl"
    path.write_text("".join((tmp_path / "all.jsonl").read_text().replace("a", x) for x in "aB"))
    text = path.read_text().replace('"prompt": "B', '"prompt": "A')  # but for its case, and the id
    path.write_text(text)
    c = settings(path=str(path))
    train, validation, _, counts = load_data(c, tokenizer, 128)
    other = {"a": "B", "B": "a"}
    alone = {i for i in ids(validation) if other[i[0]] + i[1:] not in ids(validation)}
    assert counts["copies"] == len(alone) > 4
    told = describe(c, train, counts, 9, 3)
    assert told["copies"].startswith(f"{len(alone)} in the validation set with the text of a")


def test_a_split_of_one_file(tmp_path, tokenizer):
    c = settings(path=write(tmp_path / "all.jsonl", [f"a{i}" for i in range(40)]))
    train, validation, probe, counts = load_data(c, tokenizer, 128)
    assert counts == {
        "train": 36, "validation": 4, "train_probe": 4, "truncated": 0, "dropped": 0,
        "excluded": 0,
        "copies": 0, "unused_fields": [],
    }  # fmt: skip
    assert not ids(train) & ids(validation) and len(ids(train) | ids(validation)) == 40
    assert ids(probe) < ids(train) and len(ids(probe)) == 4
    assert train.shapes == validation.shapes == probe.shapes
    shapes = {k: v.shape for k, v in train.batch_at(0).arrays.items()}
    for data in (validation, probe):
        assert {k: v.shape for k, v in data.batch_at(0).arrays.items()} == shapes


def test_what_is_excluded_leaves_the_validation_set_as_it_is(tmp_path, tokenizer):
    """Runs with and without stay comparable."""
    c = settings(path=write(tmp_path / "all.jsonl", [f"a{i}" for i in range(40)]))
    train, validation, _, _ = load_data(c, tokenizer, 128)
    left_out = {*sorted(ids(train))[:2], *sorted(ids(validation))[:2]}
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in left_out))
    c.data.exclude = str(tmp_path / "ids.txt")
    fewer, same, _, counts = load_data(c, tokenizer, 128)
    assert ids(same) == ids(validation) and ids(fewer) == ids(train) - left_out
    assert counts["excluded"] == 2


def test_a_validation_file(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", [f"a{i}" for i in range(20)])
    held = write(tmp_path / "held.jsonl", [f"b{i}" for i in range(6)], size=80)
    c = settings(path=path, validation_path=held)
    train, validation, probe, counts = load_data(c, tokenizer, 128)
    assert (len(ids(train)), len(ids(validation)), len(ids(probe))) == (20, 6, 6)
    assert all(i.startswith("b") for i in ids(validation)) and ids(probe) < ids(train)
    assert counts["truncated"] == 6 and counts["dropped"] == 0
    c.train.eval_examples = 3
    train, validation, probe, counts = load_data(c, tokenizer, 128)
    assert (counts["train"], counts["validation"], counts["train_probe"]) == (20, 3, 3)
    c.data.limit = 5
    assert load_data(c, tokenizer, 128)[3]["train"] == 5


def test_load_errors(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", ["a", "b", "c"])
    held = write(tmp_path / "held.jsonl", ["x", "b"])
    with pytest.raises(UserError, match=r"1 ids are in both .*train\.jsonl and .*held\.jsonl.* b "):
        load_data(settings(path=path, validation_path=held), tokenizer, 128)
    dropped = write(tmp_path / "dropped.jsonl", ["y" * 99])
    with pytest.raises(UserError, match=r"3 training and 0 validation examples .*data.seq_len 64"):
        load_data(
            settings(path=path, validation_path=dropped, loss_on="completion"), tokenizer, 128
        )
    with pytest.raises(UserError, match="needs at least 2"):
        load_data(settings(path=write(tmp_path / "one.jsonl", ["a"])), tokenizer, 128)


def test_a_source_may_validate(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "train.jsonl", [f"a{i}" for i in range(9)])
    rows = ({"prompt": f"{i} ", "completion": "c"} for i in range(4))
    monkeypatch.setitem(sources.SOURCES, "mine", lambda argument: rows if argument == "x/y" else ())
    c = settings(path=path, validation_path="mine:x/y")
    check_files(c)
    train, validation, *_ = load_data(c, tokenizer, 128)
    assert len(ids(train)) == 9 and ids(validation) == {f"x-y-{i:06d}" for i in range(4)}
    c = settings(source="generated:12", validation_path="generated:6", seq_len=512)
    with pytest.raises(UserError, match="6 ids are in both generated:12 and generated:6"):
        load_data(c, tokenizer, 128)
    with pytest.raises(UserError, match="data file genrated:6: ending '' is unknown"):
        check_files(settings(source="generated:12", validation_path="genrated:6"))


def test_describe(tmp_path, tokenizer):
    names = [f"a{i}" for i in range(22)]
    c = settings(path=write(tmp_path / "x.jsonl", names, size=99), pack=True, loss_on="completion")
    c.train.micro_batches = 2
    train, _, _, counts = load_data(c, tokenizer, 128)
    facts = describe(c, train, counts, total=12, every=5)
    assert facts["source"] == c.data.path
    assert facts["examples"] == "20 train, 2 validation, 2 of train as probe"
    assert facts["loss on"] == "completion tokens"
    assert facts["batch"].startswith("4 rows = 2 micro-batches x 2; 64 tokens a row")
    assert "100.0 % filled, packed" in facts["batch"] and "padding" not in facts
    assert facts["epoch"] == "5 steps"
    assert facts["run"] == "12 steps = 2.40 epochs; eval at 0 and every 5 steps: 4 evals"
    assert facts["truncated"].startswith("22 examples") and "dropped" not in facts
    assert "patience 5 can never" in facts["note"]
    c.train.patience = 2
    assert "note" not in describe(c, train, counts, total=12, every=5)
    part = dataset(train.examples[:18], False, size=64)
    facts = describe(c, part, counts | {"dropped": 3}, total=12, every=5)
    assert facts["epoch"] == "5 steps, the last with 2 empty rows"
    assert facts["dropped"].startswith("3 examples")
    c = settings(path=write(tmp_path / "y.jsonl", names, size=32), pack=True)
    train, _, _, counts = load_data(c, tokenizer, 128)
    facts = describe(c, train, counts, total=12, every=5)
    assert "larger data.seq_len" in facts["padding"] and "fields not used" not in facts
    path = pathlib.Path(c.data.path)
    path.write_text(path.read_text().replace('"id"', '"context": "x", "a b": 1, "id"'))
    train, _, _, counts = load_data(c, tokenizer, 128)
    facts = describe(c, train, counts, total=12, every=5)
    assert facts["fields not used"].startswith("a b, context: data.template")
    c = settings(path=c.data.path, buckets=(20, 40))
    train, _, _, counts = load_data(c, tokenizer, 128)
    facts = describe(c, train, counts, total=12, every=5)
    assert "; 40 tokens a row, 40 of them may" in facts["batch"]
    train = bucketed(examples(40, 0))
    facts = describe(c, train, counts, total=12, every=5)
    assert "; 20 (3 steps) or 32 (7 steps) tokens a row, 16 or 32 of them" in facts["batch"]


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path, tokenizer):
    c = settings(path=write(tmp_path / "all.jsonl", ["abc", "abd", "abe"]))
    with pytest.raises(UserError, match=r"holds token \d+, but the model has 50 words"):
        load_data(c, tokenizer, 50)


def test_a_missing_field_is_named_by_file_and_line(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c"}\n')
    c = settings(path=str(path))
    with pytest.raises(UserError, match=r"x.jsonl, line 3: field 'completion' is missing"):
        load_data(c, tokenizer, 128)
