"""Rows -> examples: tokens with a loss mask; which of them are for training, which to validate."""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_lora.data import cache, templates
from gemma_lora.data.sources import LINE, place
from gemma_lora.errors import UserError, require_name
from gemma_lora.tokenizer import Tokenizer

LOSS_ON = ("all", "completion")


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example. Targets tokens[loss_from:] carry loss; loss_from >= 1."""

    id: str
    tokens: np.ndarray
    loss_from: int
    text: str
    completion: int  # index of the completion's first character
    end: int  # index behind its last: in a conversation what ends the turn comes after it
    # The first target that holds a character of the completion, and the index of the row's label
    # among data.labels; -1: the tokens hold none.
    answer_from: int = -1
    label: int = -1

    @property
    def load(self) -> int:
        """Number of targets that carry loss."""
        return len(self.tokens) - self.loss_from

    @property
    def prompt_targets(self) -> int:
        """How many of the targets that carry loss lie before the completion."""
        return max(0, self.answer_from - self.loss_from)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What became of the rows: examples, and those that could not be used or not whole."""

    examples: list[Example]
    # Ids of examples longer than seq_len. One with a label lacks the end of its longest field, and
    # keeps the label if that field is long enough; any other is cut at seq_len, so that its stop
    # token is not trained.
    truncated: list[str]
    # Ids of which nothing carries loss: the prompt fills seq_len, or there is neither text nor BOS.
    dropped: list[str]
    label_tokens: tuple[int, ...] = ()  # the first token of each word of data.labels; (): no labels
    unused: tuple[str, ...] = ()  # the first row's fields that no example holds


def tokenize(rows: list[dict[str, Any]], tokenizer: Tokenizer, data: Any, where: str) -> Tokenized:
    """Renders and tokenises rows as [bos] text [eos], in at most data.seq_len tokens.

    A conversation (data.chat) has the bos and the end that its template writes; it gets bos where
    the template writes none, and eos where the text does not end in a control token.
    data.loss_on: 'all' (every target after the first token) or 'completion' (the tokens that hold
    a character of the completion, and eos).
    """
    require_name("data.loss_on", data.loss_on, LOSS_ON)
    labels = tuple(data.labels)
    variants = templates.choose(data.template, rows[0], where, labels, data.chat)

    def render(row: dict[str, Any]) -> templates.Rendered:
        at = place(row, where)
        if not data.chat:
            return templates.render(variants, row, labels, at)
        return templates.render_chat(variants, row, labels, at, tokenizer.render_chat)

    rendered = [render(row) for row in rows]
    for row, r in zip(rows, rendered, strict=True):
        try:
            r.text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{place(row, where)}: half of a surrogate pair is no text") from None
    unused = set(rows[0]) - templates.read_by(variants) - {"id", LINE}
    if sum(len(r.text) for r in rendered) < _WORTH_KEEPING:
        found = _measure(rows, rendered, render, tokenizer, data, where)
        return _assemble(found, rows, rendered, unused)
    settings = [data.seq_len, data.loss_on, data.chat, labels]
    name = cache.key(
        [
            f"{_code()} {settings}",
            tokenizer.fingerprint,
            *(f"{r.completion} {r.field} {r.label} {r.text}" for r in rendered),
        ]
    )
    found = cache.load(name)
    if found is None:
        found = _measure(rows, rendered, render, tokenizer, data, where)
        cache.save(name, found)
    return _assemble(found, rows, rendered, unused)


@functools.cache
def _code() -> str:
    """A hash of the code that `_measure` runs, so that no fork gets what another has kept."""
    files = (__file__, inspect.getfile(Tokenizer))
    return hashlib.sha256(b"".join(pathlib.Path(f).read_bytes() for f in files)).hexdigest()


_WORTH_KEEPING = 1_000_000  # characters; fewer are tokenised as soon as a kept result is checked


def _measure(
    rows: list[dict[str, Any]],
    rendered: list[templates.Rendered],
    render: Callable[[dict[str, Any]], templates.Rendered],
    tokenizer: Tokenizer,
    data: Any,
    where: str,
) -> dict[str, np.ndarray]:
    """What `tokenize` finds out, in a form that can be kept.

    By row: length (0: dropped), loss_from, answer, label, truncated; tokens of all rows, one after
    the other; label_tokens.
    """
    labels = tuple(data.labels)
    sample = next((row for row, r in zip(rows, rendered, strict=True) if r.label >= 0), None)
    label_tokens = () if sample is None else _label_tokens(sample, render, tokenizer, labels)
    facts, kept = np.zeros((len(rows), len(_FACTS)), np.int32), [np.zeros(0, np.int32)]
    encodings = itertools.chain.from_iterable(  # each is a hundred bytes a token
        tokenizer.encode_batch([r.text for r in rendered[i : i + _AT_ONCE]])
        for i in range(0, len(rendered), _AT_ONCE)
    )
    for i, (row, r, encoding) in enumerate(zip(rows, rendered, encodings, strict=True)):
        ids, offsets, label = list(encoding.ids), encoding.offsets, r.label
        answer = _first_token(offsets, r.completion)
        if label >= 0 and ids[answer] != label_tokens[label]:
            raise UserError(
                f"{place(row, where)}: the label {labels[label]!r} begins with another token than "
                f"it would in {place(sample, where)}; part it from the text before it by a word or "
                "a line"
            )
        if label >= 0 and answer == 0 and not tokenizer.add_bos:
            raise UserError(
                f"{place(row, where)}: the label {labels[label]!r} is the first token, which "
                "nothing predicts; expected a text before it"
            )
        ended = ids[-1:] == [tokenizer.eos_id]  # the text says so itself
        if not ended and not (data.chat and control_end(r.text, encoding, tokenizer) is not None):
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
            continue
        if answer >= len(tokens):
            answer = label = -1
        facts[i] = len(tokens), loss_from, answer, label, excess > 0
        kept.append(tokens)
    columns = dict(zip(_FACTS, facts.T, strict=True))
    return columns | {
        "tokens": np.concatenate(kept),
        "label_tokens": np.asarray(label_tokens, np.int32),
    }


_AT_ONCE = 4096  # texts
_FACTS = ("length", "loss_from", "answer", "label", "truncated")


def _assemble(
    found: dict[str, np.ndarray],
    rows: list[dict[str, Any]],
    rendered: list[templates.Rendered],
    unused: set[str],
) -> Tokenized:
    """Tokenized from what `_measure` found out of the rows."""
    examples, truncated, dropped, at = [], [], [], 0
    facts = zip(*(found[k].tolist() for k in _FACTS), strict=True)
    for row, r, (length, loss_from, answer, label, cut) in zip(rows, rendered, facts, strict=True):
        if not length:
            dropped.append(row["id"])
            continue
        if cut:
            truncated.append(row["id"])
        tokens = found["tokens"][at : at + length]
        at += length
        span = r.completion, r.end
        examples.append(Example(row["id"], tokens, loss_from, r.text, *span, answer, label))
    label_tokens = tuple(found["label_tokens"].tolist())
    return Tokenized(examples, truncated, dropped, label_tokens, tuple(sorted(unused)))


def _first_token(offsets: Sequence[tuple[int, int]], start: int) -> int:
    """The first token that holds a character of text[start:]; where there is none, the next one."""
    return next((i for i, (_, end) in enumerate(offsets) if end > start), len(offsets))


def control_end(text: str, encoding: Any, tokenizer: Tokenizer) -> int | None:
    """The last token that is no white space, if a control token, e.g. that of the turn's end."""
    pairs = zip(reversed(encoding.ids), reversed(encoding.offsets), strict=True)
    last = next((i for i, (start, end) in pairs if text[start:end].strip()), None)
    return last if last in tokenizer.control_ids else None


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


def plain(text: str) -> str:
    """What copies of a text have in common: all but white space and case."""
    return " ".join(text.lower().split())


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
            f"{len(examples)} usable example(s), a split needs at least 2; an example without a "
            "loss token within data.seq_len is none"
        )
    validation = subset(examples, held_out(len(examples), fraction), seed)
    held = {e.id for e in validation}
    return [e for e in examples if e.id not in held], validation


def held_out(examples: int, fraction: float) -> int:
    """How many of them validate: of two or more at least one, but not all."""
    return min(max(1, round(examples * fraction)), examples - 1)
