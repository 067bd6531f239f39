"""Examples -> batches of few fixed shapes; `batch_at(step)` is pure.

Letters: B rows of a batch, T tokens of a row, C places of a row for positions that carry loss.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from typing import Any

import grain
import numpy as np

from gemma_lora.data.examples import Example
from gemma_lora.data.packing import pack


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays for the step, and which example each loss position belongs to.

    The arrays hold this process's rows alone: tokens, segments, positions [B,T]; loss_pos (index
    into T of the predicting position), targets and loss_mask [B,C]. The others are of all rows:
    owner [B,C] is the example's index in the data set, -1 where masked; answer [B,C] is True at the
    target that begins its example's completion; filled counts the positions that hold a token.
    """

    arrays: dict[str, np.ndarray]
    owner: np.ndarray
    answer: np.ndarray
    filled: int


class Dataset:
    """Examples in batches [B,T]; every epoch sees each example once.

    rows_here: the rows of each batch whose arrays this process makes, ascending; None: all.
    shapes: T -> C for each length that rows may have. A batch is as long as its longest row needs;
    examples meet in batches those of their own length, and what is left of a length over full
    batches goes along with the next longer one. The last batch of an epoch is filled with empty
    rows. `shuffle` reorders each epoch by (seed, epoch); without it (evaluation) there is one
    epoch, in the given order within each length, packed in that of pack().
    """

    def __init__(
        self,
        examples: list[Example],
        *,
        shapes: dict[int, int],
        batch_size: int,
        pack: bool,
        seed: int,
        shuffle: bool,
        label_tokens: tuple[int, ...] = (),
        rows_here: np.ndarray | None = None,
    ):
        self.examples = examples
        self.label_tokens = label_tokens
        self.shapes, self.batch_size = shapes, batch_size
        self._pack, self._shuffle, self._seed = pack, shuffle, seed
        self._here = range(batch_size) if rows_here is None else rows_here.tolist()
        order = grain.MapDataset.range(len(examples)).seed(seed)
        self._order = order.shuffle().repeat() if shuffle else order
        self._sizes = sorted(shapes)
        self._lengths = [len(e.tokens) for e in examples]
        self._loads = [e.load for e in examples]
        self.ids = [e.id for e in examples]
        self.prompt_targets = [e.prompt_targets for e in examples]
        # Of the targets with loss, the one that begins the completion; below 0: none does.
        self._answers = [e.answer_from - e.loss_from if e.answer_from > 0 else -1 for e in examples]
        # Packing 10,000 examples costs 0.1 s; the plan is a function of the epoch alone.
        self.plan = functools.lru_cache(maxsize=2)(self._plan)
        self.steps_per_epoch = self._steps_per_epoch()

    def _steps_per_epoch(self) -> int:
        return -(-len(self.plan(0)) // self.batch_size)

    def _plan(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, each a list of examples, in the order of its batches."""
        n = len(self.examples)
        order = [int(self._order[epoch * n + i]) for i in range(n)]
        if self._pack:
            size = self._sizes[-1]
            rows = pack(self._lengths, order, size)
            # Best-fit leaves long rows first; the order of rows must not follow their length.
            return self._mixed(rows, epoch) if self._shuffle else rows
        rows = [[i] for i in order]
        if len(self._sizes) == 1:
            return rows
        # As many full batches as without buckets, and of each length as many in every epoch.
        rows.sort(key=lambda row: self._size([row]))
        full = [rows[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
        last = full.pop() if n % self.batch_size else []
        if self._shuffle:
            full = self._mixed(full, epoch)
        return [*itertools.chain.from_iterable(full), *last]

    def _mixed(self, items: list[Any], epoch: int) -> list[Any]:
        """A permutation of the items, from (seed, epoch)."""
        if not items:
            return items
        mixed = grain.MapDataset.range(len(items)).seed(self._seed).shuffle().repeat()
        return [items[int(mixed[epoch * len(items) + i])] for i in range(len(items))]

    def _size(self, rows: list[list[int]]) -> int:
        """T: the smallest length that holds the longest of these rows."""
        longest = max(sum(self._lengths[i] for i in row) for row in rows)
        return self._sizes[bisect.bisect_left(self._sizes, longest)]

    def _rows(self, step: int) -> list[list[int]]:
        """The rows of a step's batch over all processes, without those that fill it."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self.plan(epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    def steps_by_length(self) -> dict[int, list[int]]:
        """T -> the steps of the first epoch whose batches are so long; only lengths in use."""
        found: dict[int, list[int]] = {}
        for step in range(self.steps_per_epoch):
            found.setdefault(self._size(self._rows(step)), []).append(step)
        return dict(sorted(found.items()))

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, from (seed, step) alone."""
        rows = self._rows(step)
        size = self._size(rows)
        rows = [*rows, *[[]] * (self.batch_size - len(rows))]
        owner = np.full((len(rows), self.shapes[size]), -1, np.int32)
        answer = np.zeros(owner.shape, bool)
        for r, members in enumerate(rows):
            slot = 0
            for m in members:
                owner[r, slot : slot + self._loads[m]] = m
                if self._answers[m] >= 0:
                    answer[r, slot + self._answers[m]] = True
                slot += self._loads[m]
        shape, wide = (len(self._here), size), (len(self._here), self.shapes[size])
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        loss_pos, targets = (np.zeros(wide, np.int32) for _ in range(2))
        for r, members in enumerate(rows[i] for i in self._here):
            at = slot = 0
            for number, m in enumerate(members, 1):
                e, n, load = self.examples[m], self._lengths[m], self._loads[m]
                tokens[r, at : at + n] = e.tokens
                segments[r, at : at + n] = number
                positions[r, at : at + n] = np.arange(n)
                loss_pos[r, slot : slot + load] = np.arange(at + e.loss_from, at + n) - 1
                targets[r, slot : slot + load] = e.tokens[e.loss_from :]
                at, slot = at + n, slot + load
        arrays = {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "loss_pos": loss_pos,
            "targets": targets,
            "loss_mask": (owner[self._here] >= 0).astype(np.float32),
        }
        return Batch(arrays, owner, answer, sum(self._lengths[m] for row in rows for m in row))

    def batches(self, start: int, stop: int) -> grain.IterDataset:
        """Batches start..stop-1, made ahead in the background."""
        source = grain.MapDataset.range(start, stop).map(self.batch_at)
        return source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))

    @property
    def fill(self) -> float:
        """Share of the first epoch's token positions that are not padding."""
        rows = sum(size * len(steps) for size, steps in self.steps_by_length().items())
        return sum(self._lengths) / (self.batch_size * rows)

    def fingerprint(self) -> str:
        """A hash of every example's id, tokens and mask, in order."""
        h = hashlib.sha256()
        for e in self.examples:
            h.update(f"{e.id}/{e.loss_from}/".encode() + e.tokens.tobytes())
        return h.hexdigest()[:16]


def shapes(examples: list[Example], data: Any) -> dict[int, int]:
    """T -> C for the rows of data.buckets and of data.seq_len, where they hold an example."""
    sizes = (*data.buckets, data.seq_len)
    held = {size: [e for e in examples if len(e.tokens) <= size] for size in sizes}
    return {size: loss_slots(part, size, data.pack) for size, part in held.items() if part}


def loss_slots(examples: list[Example], seq_len: int, packed: bool) -> int:
    """C, a multiple of 8: the largest example's need, or all positions of a packed row."""
    need = seq_len if packed else max(e.load for e in examples)
    return 8 * -(-need // 8)
