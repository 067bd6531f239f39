"""Rows -> tokens with a loss mask -> batches of few fixed shapes; `batch_at(step)` is pure.

Letters: B rows of a batch, T tokens of a row, C positions of a row that carry loss.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from gemma_lora.data import templates
from gemma_lora.data.packing import pack
from gemma_lora.data.sources import place
from gemma_lora.errors import UserError
from gemma_lora.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example. Targets tokens[loss_from:] carry loss; loss_from >= 1."""

    id: str
    tokens: np.ndarray
    loss_from: int
    text: str
    completion: int  # index of the completion's first character
    # The first target that holds a character of the completion, and the index of the row's label
    # among data.labels; -1: the tokens hold none.
    answer_from: int = -1
    label: int = -1

    @property
    def load(self) -> int:
        """Number of targets that carry loss."""
        return len(self.tokens) - self.loss_from


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What became of the rows: examples, and those that could not be used or not whole."""

    examples: list[Example]
    # Ids of examples longer than seq_len. One with a label lacks the end of its longest field, and
    # keeps the label if that field is long enough; any other is cut at seq_len, so that its stop
    # token is not trained.
    truncated: list[str]
    dropped: list[str]  # ids whose prompt fills seq_len: nothing of them carries loss
    label_tokens: tuple[int, ...] = ()  # the first token of each word of data.labels; (): no labels


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays for the step, and which example each loss position belongs to.

    tokens, segments, positions [B,T]; loss_pos (index into T of the predicting position), targets
    and loss_mask [B,C]; owner [B,C] is the example's index in the data set, -1 where masked;
    answer [B,C] is True at the target that begins its example's completion.
    """

    arrays: dict[str, np.ndarray]
    owner: np.ndarray
    answer: np.ndarray


def tokenize(rows: list[dict[str, Any]], tokenizer: Tokenizer, data: Any, where: str) -> Tokenized:
    """Renders and tokenises rows as [bos] text [eos], in at most data.seq_len tokens.

    A conversation (data.chat) has the bos and the end that its template writes; it gets bos where
    the template writes none, and eos where the text does not end in a control token.
    data.loss_on: 'all' (every target after the first token) or 'completion' (the tokens that hold
    a character of the completion, and eos).
    """
    if data.loss_on not in ("completion", "all"):
        raise UserError(f"data.loss_on is {data.loss_on!r}, expected 'completion' or 'all'")
    labels = tuple(data.labels)
    variants = templates.choose(data.template, rows[0], where, labels, data.chat)

    def render(row: dict[str, Any]) -> templates.Rendered:
        at = place(row, where)
        if not data.chat:
            return templates.render(variants, row, labels, at)
        return templates.render_chat(variants, row, labels, at, tokenizer.render_chat)

    rendered = [render(row) for row in rows]
    for row, r in zip(rows, rendered, strict=True):
        if not r.text.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in r.text):
            raise UserError(f"{place(row, where)}: half of a surrogate pair is no text")
    sample = next((row for row, r in zip(rows, rendered, strict=True) if r.label >= 0), None)
    label_tokens = () if sample is None else _label_tokens(sample, render, tokenizer, labels)
    examples, truncated, dropped = [], [], []
    encodings = tokenizer.encode_batch([r.text for r in rendered])
    for row, r, encoding in zip(rows, rendered, encodings, strict=True):
        ids, offsets, label = list(encoding.ids), encoding.offsets, r.label
        answer = _first_token(offsets, r.completion)
        if label >= 0 and ids[answer] != label_tokens[label]:
            raise UserError(
                f"{place(row, where)}: the label {labels[label]!r} begins with another token than "
                f"it would in {place(sample, where)}; part it from the text before it by a word or "
                "a line"
            )
        if not (data.chat and _ends_in_control(r.text, encoding, tokenizer)):
            ids.append(tokenizer.eos_id)
        if tokenizer.add_bos and not (data.chat and ids[0] == tokenizer.bos_id):
            ids.insert(0, tokenizer.bos_id)
            offsets, answer = [(0, 0), *offsets], answer + 1
        if tokenizer.add_bos and ids.count(tokenizer.bos_id) != 1:
            raise UserError(f"{place(row, where)}: the text itself holds the bos token")
        if (excess := len(ids) - data.seq_len) > 0 and label >= 0:
            short = _shorten(ids, offsets, r.field, excess)
            answer, ids = answer - (len(ids) - len(short)), short
        tokens = np.asarray(ids[: data.seq_len], np.int32)
        answer = max(1, answer)
        loss_from = answer if data.loss_on == "completion" else 1
        if loss_from >= len(tokens):
            dropped.append(row["id"])
            continue
        if excess > 0:
            truncated.append(row["id"])
        if answer >= len(tokens):
            answer = label = -1
        examples.append(Example(row["id"], tokens, loss_from, r.text, r.completion, answer, label))
    return Tokenized(examples, truncated, dropped, label_tokens)


def _first_token(offsets: Sequence[tuple[int, int]], start: int) -> int:
    """The first token that holds a character of text[start:]; where there is none, the next one."""
    return next((i for i, (_, end) in enumerate(offsets) if end > start), len(offsets))


def _ends_in_control(text: str, encoding: Any, tokenizer: Tokenizer) -> bool:
    """Is the last token that is no white space a control token, e.g. that of the turn's end?"""
    pairs = zip(reversed(encoding.ids), reversed(encoding.offsets), strict=True)
    last = next((i for i, (start, end) in pairs if text[start:end].strip()), None)
    return last in tokenizer.control_ids


def _shorten(
    ids: list[int], offsets: Sequence[tuple[int, int]], field: tuple[int, int], excess: int
) -> list[int]:
    """ids without the last `excess` tokens of a field, so that what follows the field stays.

    Unchanged where the field has fewer. A character of several tokens goes as a whole.
    """
    inside = [i for i, (a, b) in enumerate(offsets) if field[0] <= a < b <= field[1]]
    if len(inside) < excess:
        return ids
    start = inside[-excess]
    while start > inside[0] and offsets[start] == offsets[start - 1]:
        start -= 1
    return ids[:start] + ids[inside[-1] + 1 :]


def _label_tokens(
    row: dict[str, Any],
    render: Callable[[dict[str, Any]], templates.Rendered],
    tokenizer: Tokenizer,
    labels: tuple[str, ...],
) -> tuple[int, ...]:
    """The first token of each label in the row's context.

    Raises UserError if two labels share it: then a model's choice cannot be read from one token.
    """
    texts = [render({**row, "label": word}) for word in labels]
    encodings = tokenizer.encode_batch([r.text for r in texts])
    found: dict[int, str] = {}
    for word, r, encoding in zip(labels, texts, encodings, strict=True):
        at = _first_token(encoding.offsets, r.completion)
        if at == len(encoding.ids):
            raise UserError(f"data.labels holds {word!r}, which has no token")
        token = encoding.ids[at]
        if token in found:
            raise UserError(
                f"data.labels {found[token]!r} and {word!r} begin with the same token, "
                f"{tokenizer.decode([token])!r}; choose words that begin differently"
            )
        found[token] = word
    return tuple(found)


def check_vocabulary(examples: list[Example], vocab: int) -> None:
    """Raises UserError for a token that the model's embedding table has no row for."""
    for e in examples:
        if e.tokens.max() >= vocab:
            raise UserError(
                f"example {e.id} holds token {e.tokens.max()}, but the model has {vocab} words: "
                "is the tokenizer that of the model?"
            )


def subset(examples: list[Example], size: int, seed: int) -> list[Example]:
    """The `size` examples whose hash of (seed, id) is smallest, in the given order."""

    def rank(e: Example) -> bytes:
        return hashlib.sha256(f"{seed}/{e.id}".encode()).digest()

    chosen = {e.id for e in sorted(examples, key=rank)[:size]}
    return [e for e in examples if e.id in chosen]


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, validation), by a hash of (seed, id): the order of the rows does not matter.

    Exact counts, at least one in each. Raises UserError for fewer than two examples.
    """
    if len(examples) < 2:
        raise UserError(
            f"{len(examples)} usable example(s), a split needs at least 2: the others have no loss "
            "token within data.seq_len"
        )
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    validation = subset(examples, count, seed)
    held_out = {e.id for e in validation}
    return [e for e in examples if e.id not in held_out], validation


class Dataset:
    """Examples in batches [B,T] of this process's rows; every epoch sees each example once.

    shapes: T -> C for each length that rows may have. A batch is as long as its longest row needs;
    examples meet in batches those of their own length, and what is left of a length over full
    batches goes along with the next longer one. The last batch of an epoch is filled with empty
    rows. `shuffle` reorders each epoch by (seed, epoch); without it (evaluation) there is one
    epoch, in the given order within each length.
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
        process: tuple[int, int] = (0, 1),
    ):
        index, count = process
        if batch_size % count:
            raise UserError(f"data.batch_size {batch_size} is not a multiple of {count} processes")
        self.examples = examples
        self.label_tokens = label_tokens
        self.shapes, self.batch_size = shapes, batch_size
        self._pack, self._shuffle, self._seed = pack, shuffle, seed
        self._mine = slice(index * batch_size // count, (index + 1) * batch_size // count)
        order = grain.MapDataset.range(len(examples)).seed(seed)
        self._order = order.shuffle().repeat() if shuffle else order
        self._sizes = sorted(shapes)
        self._lengths = [len(e.tokens) for e in examples]
        self._loads = [e.load for e in examples]
        # Packing 10,000 examples costs half a second; the plan is a function of the epoch alone.
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
            rows = pack(self._lengths, self._loads, order, size, self.shapes[size])
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
        rows = [*rows, *[[]] * (self.batch_size - len(rows))][self._mine]
        shape, wide = (len(rows), size), (len(rows), self.shapes[size])
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        loss_pos, targets = (np.zeros(wide, np.int32) for _ in range(2))
        owner = np.full(wide, -1, np.int32)
        answer = np.zeros(wide, bool)
        for r, members in enumerate(rows):
            at = slot = 0
            for number, m in enumerate(members, 1):
                e, n, load = self.examples[m], self._lengths[m], self._loads[m]
                tokens[r, at : at + n] = e.tokens
                segments[r, at : at + n] = number
                positions[r, at : at + n] = np.arange(n)
                loss_pos[r, slot : slot + load] = np.arange(at + e.loss_from, at + n) - 1
                targets[r, slot : slot + load] = e.tokens[e.loss_from :]
                owner[r, slot : slot + load] = m
                if e.answer_from > 0:  # else the completion was cut off whole
                    answer[r, slot + e.answer_from - e.loss_from] = True
                at, slot = at + n, slot + load
        arrays = {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "loss_pos": loss_pos,
            "targets": targets,
            "loss_mask": (owner >= 0).astype(np.float32),
        }
        return Batch(arrays, owner, answer)

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
    """C: a row's capacity of loss positions, a multiple of 8.

    Unpacked, the largest example's need. Packed, the least that costs at most one row in 200, so that
    neither the model runs on padding nor the head on positions that carry no loss.
    """
    most = -(-seq_len // 8)  # in eights, like all that follows
    need = min(-(-max(e.load for e in examples) // 8), most)
    if not packed:
        return 8 * need
    some = examples[:: 1 + len(examples) // _SAMPLE]
    lengths, loads = [len(e.tokens) for e in some], [e.load for e in some]
    enough = 1.005 * len(pack(lengths, loads, range(len(some)), seq_len, seq_len))

    def fits(slots: int) -> bool:
        return len(pack(lengths, loads, range(len(some)), seq_len, 8 * slots)) <= enough

    need = max(need, min(int(sum(loads) / enough) // 8, most))  # so many fill every row
    return 8 * (need + bisect.bisect_left(range(need, most), True, key=fits))


_SAMPLE = 4096  # examples that tell how many loss positions a packed row needs
