"""Noise of known kinds, planted in rows of real data; each kind a key of EDITS or EXCHANGED.

flip           text, label: the other label
swap           question, answer: answers exchanged, none keeps its own
final          the number after #### is off by one; the steps before contradict it
step           a calculator result and the number after it are off by one; later steps are left
annotation     only the result inside <<a*b=c>> is off by one
truncate       instruction, output: the response ends after 20 to 60 % of its words
swap_response  responses exchanged
"""

import decimal
import functools
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_lora.errors import UserError, nearest

Row = dict[str, Any]

NUMBER = r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
FINAL = re.compile(rf"(####\s*)({NUMBER})")
ANNOTATION = re.compile(rf"(<<[^<>]*=)({NUMBER})(>>\s*\$?)({NUMBER})?")
OTHER = {0: 1, 1: 0, "negative": "positive", "positive": "negative"}


def _number(text: str) -> decimal.Decimal:
    return decimal.Decimal(text.replace(",", ""))


def _off_by_one(text: str, by: int) -> str:
    """The number as it was written, with its commas and decimals, one more or one less."""
    return f"{_number(text) + by:{',' if ',' in text else ''}f}"


def _flip(row: Row, rng: np.random.Generator) -> Row | None:
    other = OTHER.get(row.get("label"))
    return None if other is None else {**row, "label": other}


def _final(row: Row, rng: np.random.Generator) -> Row | None:
    found = FINAL.search(row.get("answer", ""))
    if not found:
        return None
    start, end = found.span(2)
    changed = _off_by_one(found[2], int(rng.choice((-1, 1))))
    return {**row, "answer": row["answer"][:start] + changed + row["answer"][end:]}


def _calculator(row: Row, rng: np.random.Generator, text_too: bool) -> Row | None:
    """One annotation's result changed and, with text_too, the equal number that follows it."""
    answer = row.get("answer", "")
    found = list(ANNOTATION.finditer(answer))
    if text_too:  # rows where another number follows say something else there
        found = [m for m in found if m[4] and _number(m[4]) == _number(m[2])]
    if not found:
        return None
    m, by = found[rng.integers(len(found))], int(rng.choice((-1, 1)))
    after = m[4] or ""
    changed = m[1] + _off_by_one(m[2], by) + m[3] + (_off_by_one(after, by) if text_too else after)
    return {**row, "answer": answer[: m.start()] + changed + answer[m.end() :]}


def _truncate(row: Row, rng: np.random.Generator) -> Row | None:
    words = list(re.finditer(r"\S+", row.get("output", "")))
    if len(words) < 5:  # the shortest of which 20 % is a word
        return None
    kept = int(rng.uniform(0.2, 0.6) * len(words))
    return {**row, "output": row["output"][: words[kept - 1].end()]}


EDITS: dict[str, Callable[[Row, np.random.Generator], Row | None]] = {
    "flip": _flip,
    "final": _final,
    "step": functools.partial(_calculator, text_too=True),
    "annotation": functools.partial(_calculator, text_too=False),
    "truncate": _truncate,
}
EXCHANGED = {"swap": "answer", "swap_response": "output"}


def _exchange(rows: list[Row], field: str, rng: np.random.Generator) -> list[Row]:
    """Every row with the field of another one, which must not be equal; in the order given."""
    for _ in range(100):  # equal fields side by side are rare: another cycle avoids them
        order = rng.permutation(len(rows))
        giver = np.empty(len(rows), int)
        giver[order] = np.roll(order, 1)
        given = [rows[g][field] for g in giver]
        if all(row[field] != new for row, new in zip(rows, given, strict=True)):
            return [{**row, field: new} for row, new in zip(rows, given, strict=True)]
    raise UserError(f"the {len(rows)} rows chosen have too few different values of {field!r}")


def plant(
    rows: list[Row], kind: str, share: float, seed: int, taken: frozenset[str] = frozenset()
) -> tuple[list[Row], dict[str, str]]:
    """(the rows, of which round(share * n) are changed; {id: kind} of those).

    A row that cannot take the kind, or whose id is taken, is not chosen. Order and ids stay.
    """
    kinds = [*EDITS, *EXCHANGED]
    if kind not in kinds:
        raise UserError(f"the kind {kind!r} is unknown, {nearest(kind, kinds)}")
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    count, changed = round(share * len(rows)), {}
    free = [i for i in rng.permutation(len(rows)) if rows[i]["id"] not in taken]
    if kind in EXCHANGED:
        chosen = [i for i in free if rows[i].get(EXCHANGED[kind])][:count]
        exchanged = _exchange([rows[i] for i in chosen], EXCHANGED[kind], rng) if chosen else []
        changed = dict(zip(chosen, exchanged, strict=True))
    else:
        for i in free:
            if len(changed) < count and (new := EDITS[kind](rows[i], rng)) is not None:
                changed[i] = new
    if not 0 < count == len(changed):
        raise UserError(f"{kind}:{share} of {len(rows)} rows is {count}: {len(changed)} can be it")
    planted = {rows[i]["id"]: kind for i in sorted(changed)}
    return [changed.get(i, row) for i, row in enumerate(rows)], planted


def plant_all(
    rows: list[Row], shares: dict[str, float], seed: int
) -> tuple[list[Row], dict[str, str]]:
    """Several kinds, on disjoint rows."""
    planted: dict[str, str] = {}
    for kind, share in shares.items():
        rows, found = plant(rows, kind, share, seed, frozenset(planted))
        planted |= found
    return rows, planted
