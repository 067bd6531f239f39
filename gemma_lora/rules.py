"""Suspicious training rows, found by rules that need no model: copies, leaks, cuts, wrong sums."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array, csgraph

from gemma_lora.data.examples import plain
from gemma_lora.sums import arithmetic, final_answer

NEAR = 0.6  # Jaccard similarity of two near duplicates, at least
RARE = 0.2  # a label is rare with a smaller part of an equal share of the labelled rows
TAIL = 4.0  # robust standard deviations from the median: a length beyond is a tail

RULES: dict[str, str] = {
    "duplicate": "Prompt and completion are those of another row, but for white space and case.",
    "conflict": "The prompt is that of another row, but for white space and case; the completion "
    "is another.",
    "near_duplicate": f"Of the 8-byte pieces of this row and another, {NEAR:.0%} are in both.",
    "overlap": "A training and a validation row have the same prompt or are near duplicates.",
    "empty": "The completion holds no text.",
    "cut": "The tokens fill the length: the end of the completion, or all of it, is probably "
    "missing.",
    "full_prompt": "The tokens fill the length, and nearly all of the text is the prompt's.",
    "unfinished": "The completion ends as no sentence does, or in an open code block; weak "
    "evidence.",
    "arithmetic": "An annotation such as <<12*3=38>> does not hold.",
    "final_answer": "The answer after #### is neither the last annotation's result, nor 100 times "
    "or a 100th of it, nor what it is rounded to, nor a number of the line before it after the "
    "annotations there.",
    "length": f"The log length is {TAIL:g} or more robust standard deviations from the median.",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One example. tokens: its length, at most seq_len; label -1: none."""

    id: str
    split: str  # 'train' or 'validation'
    prompt: str
    completion: str
    tokens: int
    label: int


def check(rows: list[Row], seq_len: int) -> dict[str, dict[str, str]]:
    """id -> rule name -> why, with the evidence; ids without a finding are left out.

    Ids are unique. Rules that do not apply to the data (no labels, no annotations) are silent.
    """
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    copies = itertools.chain(_copies(rows), _near(rows), _tails(rows))
    for i, rule, why in copies:
        found[rows[i].id].setdefault(rule, why)
    for row in rows:
        for rule, why in _alone(row, seq_len):
            found[row.id].setdefault(rule, why)
    return dict(found)


def imbalance(rows: list[Row]) -> dict[int, float] | None:
    """Label -> share of the labelled rows, of the rare ones; None: no row has a label."""
    counts = collections.Counter({r.id: r.label for r in rows if r.label >= 0}.values())
    total = counts.total()
    if not total:
        return None
    least = RARE * total / len(counts)
    return {k: n / total for k, n in sorted(counts.items()) if n < least}


def _side(row: Row) -> str:
    return "validation" if row.split == "validation" else "train"


# One row by itself.


_FENCE = re.compile(r"^[ \t]*```", re.M)
# In small letters: an A may be an answer. A statement of code ends in a semicolon; :( is a face.
_OPEN = re.compile(
    r"(?:[,:{]|(?<![:;=])[(\[]|\b(?:a|an|the|and|or|of|to|with|for|from|by|is|are))$"
)


def _alone(row: Row, seq_len: int) -> Iterator[tuple[str, str]]:
    completion = row.completion.rstrip()
    if not completion:
        yield "empty", "no text"
    if row.tokens >= seq_len:
        share = len(row.prompt) / max(1, len(row.prompt) + len(row.completion))
        # A row with a label loses the end of its prompt instead, see examples.tokenize.
        if row.label >= 0 or share > 0.9:
            yield "full_prompt", f"{row.tokens} of {seq_len} tokens, {share:.0%} of its text prompt"
        if row.label < 0:
            yield "cut", f"{row.tokens} of {seq_len} tokens"
    # A label or a short answer is no sentence.
    if row.label < 0 and len(completion.split()) >= 5:
        # A fence begins a line; in one, or about code in a line, there may be others.
        if completion.count("```") % 2 and len(_FENCE.findall(completion)) % 2:
            yield "unfinished", "a ``` without its end"
        elif _OPEN.search(completion[-20:]):
            yield "unfinished", f"ends in {completion[-20:]!r}"
    if wrong := arithmetic(row.completion):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield "arithmetic", wrong[0] + more
    if why := final_answer(row.completion):
        yield "final_answer", why


# One row among the others. Each yields (index, rule, why).


def _copies(rows: list[Row]) -> Iterator[tuple[int, str, str]]:
    """Rows whose prompt, or prompt and completion, another row has."""
    prompts: dict[str, list[int]] = collections.defaultdict(list)
    pairs = [(plain(r.prompt), plain(r.completion)) for r in rows]
    for i, (prompt, _) in enumerate(pairs):
        prompts[prompt].append(i)
    for prompt, group in prompts.items():
        # A prompt that is always the same, or empty, says nothing about its row.
        trivial = not prompt or len(group) == len(rows) or len(group) > _common(len(rows))
        same: dict[str, list[int]] = collections.defaultdict(list)
        for i in group:
            same[pairs[i][1]].append(i)
        first, *rest = same  # a completion, and those that differ from it
        for completion, twins in same.items():
            if len(twins) > 1:
                for i in twins:
                    other = twins[1] if i == twins[0] else twins[0]
                    yield i, "duplicate", _like(rows[other], len(twins) - 1)
            if not trivial and rest:
                other = same[rest[0] if completion == first else first][0]
                for i in twins:
                    yield i, "conflict", _like(rows[other], len(group) - len(twins))
        for alike in same.values() if trivial else (group,):
            sides: dict[str, list[int]] = collections.defaultdict(list)
            for i in alike:
                sides[_side(rows[i])].append(i)
            for here, there in itertools.permutations(sides, 2):
                why = f"{_like(rows[sides[there][0]], len(sides[there]))} ({there})"
                for i in sides[here]:
                    yield i, "overlap", why


def _like(other: Row, count: int) -> str:
    """count: of the rows meant, of which `other` is one."""
    return f"like {other.id}" + (f" and {count - 1} more" if count > 1 else "")


def _common(count: int) -> float:
    """What more of `count` rows than this have in common is the template's, not theirs."""
    return max(10, count / 5)


_BANDS, _BAND = 24, 3  # of two rows alike by 0.6, 1 - (1 - 0.6**3)**24 = 99.7 % share a band
_LIKELY = NEAR - 0.15  # by the minima alone, of which 72 say it to 0.06 (standard deviation)
_FEWEST = 32  # pieces that a row must have to be compared


def _near(rows: list[Row]) -> Iterator[tuple[int, str, str]]:
    """Rows of which NEAR of the pieces (of all that either has) are in another, compared exactly.

    Candidates share a band of MinHash minima. A band links each of its rows to the next one only,
    so the work grows with the rows and not with their pairs; rows that are alike become one group
    by their links, in which all are compared.
    """
    copies: dict[str, list[int]] = collections.defaultdict(list)
    texts = [plain(f"{r.prompt} {r.completion}") for r in rows]
    for i, text in enumerate(texts):
        copies[text].append(i)
    kept = [same[0] for same in copies.values()]  # of copies, one is compared
    sample = [_pieces(texts[i]) for i in kept[:: max(1, len(kept) // 1000)]]
    hashes, counts = np.unique(np.concatenate([_pieces(""), *sample]), return_counts=True)
    template = hashes[counts > _common(len(sample))]
    factors = np.random.default_rng(0).integers(0, 2**63, _BANDS * _BAND, np.uint64) * 2 + 1
    minima = np.zeros((len(kept), len(factors)), np.uint64)
    enough = np.zeros(len(kept), bool)
    for k, i in enumerate(kept):
        own = _own(texts[i], template)
        if len(own) >= _FEWEST:
            parts = (own[at : at + 4096] for at in range(0, len(own), 4096))  # a text may be a book
            minima[k] = np.min([(factors[:, None] * part).min(1) for part in parts], 0)
            enough[k] = True
    kept, minima = [i for i, e in zip(kept, enough, strict=True) if e], minima[enough]
    links = []
    for band in range(0, len(factors), _BAND):
        key = minima[:, band : band + _BAND] @ factors[:_BAND]
        order = np.argsort(key, kind="stable")
        a, b = order[:-1], order[1:]
        same = key[a] == key[b]
        a, b = a[same], b[same]
        likely = (minima[a] == minima[b]).mean(1) >= _LIKELY
        links.append(np.stack([a[likely], b[likely]]))
    a, b = np.concatenate(links, 1)
    linked: dict[int, list[int]] = collections.defaultdict(list)
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        linked[kept[i]].append(kept[j])
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(kept), len(kept)))
    groups: dict[int, list[int]] = collections.defaultdict(list)
    names = csgraph.connected_components(graph, directed=False)[1] if kept else []
    for k in np.unique([a, b]):
        groups[names[k]].append(kept[k])
    for group in groups.values():
        yield from _compare(rows, {i: copies[texts[i]] for i in group}, texts, template, linked)


def _compare(
    rows: list[Row],
    group: dict[int, list[int]],
    texts: list[str],
    template: np.ndarray,
    linked: dict[int, list[int]],
) -> Iterator[tuple[int, str, str]]:
    """group: row -> its copies and itself; what is found of it and other rows. linked: row -> those
    that shared a band with it."""
    own = {i: set(_own(texts[i], template).tolist()) for i in group}
    held = collections.Counter(piece for pieces in own.values() for piece in pieces)
    # Such as an instruction that some of the rows begin with.
    shared = {piece for piece, n in held.items() if n > _common(len(group))}
    bare = {i: pieces - shared for i, pieces in own.items()} if shared else own
    members = list(group)
    sides = {i: {_side(rows[c]) for c in copies} for i, copies in group.items()}
    others = {s: [j for j in members if sides[j] - {s}] for s in ("train", "validation")}
    for at, i in enumerate(members):
        # Of the others of a group of hundreds, which is one pattern filled in, some do for
        # evidence, but of either side.
        near = [*linked[i], *members[at + 1 : at + 33]]
        near += [j for s in sides[i] for j in others[s][:32]]
        for j in dict.fromkeys(near):
            # Where hardly anything is left, what they share is no frame but the rows themselves.
            enough = all(len(bare[k]) >= max(_FEWEST, len(own[k]) / 8) for k in (i, j))
            compared = bare if enough else own
            alike = len(compared[i] & compared[j]) / len(compared[i] | compared[j])
            if alike < NEAR or i == j:
                continue
            for this, other in ((i, j), (j, i)):
                yield this, "near_duplicate", f"like {rows[other].id}, {alike:.0%}"
                for a in group[this]:
                    leaks = (b for b in group[other] if _side(rows[b]) != _side(rows[a]))
                    if sides[other] - {_side(rows[a])}:
                        b = next(leaks)
                        yield a, "overlap", f"like {rows[b].id} ({_side(rows[b])}), {alike:.0%}"


def _own(text: str, template: np.ndarray) -> np.ndarray:
    pieces = _pieces(text)
    if not len(template):
        return pieces
    at = np.minimum(np.searchsorted(template, pieces), len(template) - 1)
    return pieces[template[at] != pieces]


def _pieces(text: str) -> np.ndarray:
    """Hashes of all the 8-byte pieces of a text, sorted, each once: a piece is one 64-bit word."""
    data = np.frombuffer(text.encode(errors="replace"), np.uint8)
    if len(data) < 8:
        return np.zeros(0, np.uint64)
    words = np.lib.stride_tricks.sliding_window_view(data, 8).copy().view("<u8")[:, 0]
    # Odd factors and a shift: a bijection, after which the order of words is as good as random.
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return np.unique(words ^ (words >> np.uint64(32)))


def _tails(rows: list[Row]) -> Iterator[tuple[int, str, str]]:
    logs = np.log([max(1, r.tokens) for r in rows])
    if not len(logs):
        return
    median = np.median(logs)
    scale = 1.4826 * np.median(np.abs(logs - median))
    if not scale:
        return  # more than half of the rows have one length
    for i in np.flatnonzero(np.abs(logs - median) >= TAIL * scale):
        yield int(i), "length", f"{rows[i].tokens} tokens, the median is {np.exp(median):.0f}"
