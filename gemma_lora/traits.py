"""Traits of examples that need no model: measured, then compared between flagged rows and others.

Letters: n examples.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
import scipy  # its parts load at first use
from scipy.sparse import csr_array

from gemma_lora.stats import holm, risk_ratio

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")  # noqa: RUF001 the apostrophe that texts have
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?", re.A)
_SENTENCE = re.compile(r"[.!?]+(?=\s|$)")
_LIST = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]", re.M)
_TAG = re.compile(r"</?[a-z][^<>\n]*>", re.I)
_END = tuple(".!?…。！？\"'”’)]}`")  # noqa: RUF001 of other scripts, too


class Text:
    """A text as the features read it. words: of all of it, in lower case."""

    def __init__(self, prompt: str, completion: str) -> None:
        self.prompt, self.completion, self.all = prompt, completion, f"{prompt}\n{completion}"
        self.words = _WORD.findall(self.all.lower().replace("’", "'"))  # noqa: RUF001


Feature = Callable[[Text], float]


def _per_100(words: str) -> Feature:
    wanted = frozenset(words.split())
    return lambda t: 100 * sum(map(wanted.__contains__, t.words)) / max(1, len(t.words))


def _characters(pattern: str) -> Feature:
    """Per cent of the characters."""
    found = re.compile(pattern)
    return lambda t: 100 * (len(t.all) - len(found.sub("", t.all))) / len(t.all)


def _count(pattern: re.Pattern) -> Feature:
    return lambda t: len(pattern.findall(t.all))


def _largest(t: Text) -> float:
    found = (float(x.replace(",", "")) for x in _NUMBER.findall(t.all))
    return float(np.log10(max((x for x in found if x < np.inf), default=0) or 0.1))


_NEGATION = (
    "no not never nothing nobody none nor neither nowhere cannot without n't don't doesn't didn't "
    "isn't aren't wasn't weren't won't wouldn't can't couldn't shouldn't hasn't haven't hadn't "
    "hardly barely"
)
_TIME = "second seconds minute minutes hour hours day days week weeks month months year years"
_MONEY = "dollar dollars cent cents euro euros pound pounds price cost costs pay pays paid"
_LENGTH = "inch inches foot feet yard yards mile miles meter meters metre metres km cm kilometers"
_WEIGHT = "ounce ounces gram grams kg kilogram kilograms ton tons lb lbs"
_CONTRAST = (
    "but however although though yet despite while whereas except unfortunately nevertheless"
)
_FIRST = "i me my mine we us our ours i'm i've i'd i'll we're we've we'll"
_PARTS = "half halves third thirds quarter quarters fifth fifths twice percent percentage ratio"

# Name -> (what it is, its function), of prompt and completion together where neither is named. A
# name reads on as 'more than 3'.
FEATURES: dict[str, tuple[str, Feature]] = {
    "prompt words": ("of letters", lambda t: len(_WORD.findall(t.prompt))),
    "completion words": ("of letters", lambda t: len(_WORD.findall(t.completion))),
    "completion to prompt": (
        "characters of the completion for one of the prompt",
        lambda t: len(t.completion) / max(1, len(t.prompt)),
    ),
    "sentences": ("marks that end one", _count(_SENTENCE)),
    "calculator steps": ("annotations << >>", lambda t: t.completion.count("<<")),
    "numbers": ("in digits", _count(_NUMBER)),
    "largest number, log10": ("-1 where there is none", _largest),
    "divisions": ("'/' and '÷' in the completion", lambda t: len(re.findall("[/÷]", t.completion))),
    "percent signs": ("'%'", lambda t: t.all.count("%")),
    "words of parts per 100 words": ("half, third, twice, percent, ratio, ...", _per_100(_PARTS)),
    "units of time per 100 words": ("second, ..., years", _per_100(_TIME)),
    "words of money per 100 words": ("dollar, euro, cost, pay, ...", _per_100(_MONEY)),
    "units of length per 100 words": ("inch, ..., kilometers", _per_100(_LENGTH)),
    "units of weight per 100 words": ("ounce, ..., tons", _per_100(_WEIGHT)),
    "negations per 100 words": ("no, not, never, without, don't, ...", _per_100(_NEGATION)),
    "words of contrast per 100 words": ("but, however, although, ...", _per_100(_CONTRAST)),
    "words in first person per 100 words": ("I, me, my, we, our, ...", _per_100(_FIRST)),
    "question marks": ("'?'", lambda t: t.all.count("?")),
    "exclamation marks": ("'!'", lambda t: t.all.count("!")),
    "quotation marks": ("straight and typographic", _count(re.compile(r'["“”]'))),
    "capitals, %": ("A to Z, of all characters", _characters("[A-Z]+")),
    "characters beyond ASCII, %": ("of all characters", _characters(r"[^\x00-\x7f]+")),
    "code-like characters, %": ("of { } < > ; = _ \\ `", _characters(r"[{}<>;=_\\`]+")),
    "list items": ("lines that begin as a list's do", _count(_LIST)),
    "markup tags": ("such as <br />", _count(_TAG)),
    "completion without final punctuation": (
        "its last character ends no sentence, quotation or bracket",
        lambda t: not t.completion.rstrip().endswith(_END),
    ),
}


def measure(texts: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Every feature [n] of (prompt, completion) pairs: bool, or numbers."""
    found = [[f(text) for _, f in FEATURES.values()] for text in (Text(*pair) for pair in texts)]
    return {k: np.array([x[i] for x in found]) for i, k in enumerate(FEATURES)}


@dataclasses.dataclass(frozen=True)
class Trait:
    """flagged, others: shares that have it; lift their ratio, with its 95 % interval; p by Holm."""

    name: str
    flagged: float
    others: float
    lift: float
    interval: list[float]
    p: float


def lifts(
    flagged: np.ndarray, features: dict[str, np.ndarray], others: np.ndarray | None = None
) -> list[Trait]:
    """Every trait that varies, compared between `flagged` [n] and `others` (default: the rest).

    A number is cut at the quartiles of the rows compared: above the third, below the first.
    interval: stats.risk_ratio; p: Fisher's exact test, two-sided, corrected by Holm over all
    traits returned. They come with the smallest p first.
    """
    others = ~flagged if others is None else others
    n, m = int(flagged.sum()), int(others.sum())
    if not n or not m:
        return []
    found = []
    for name, has in _traits({k: x[flagged | others] for k, x in features.items()}):
        inside = flagged[flagged | others]
        a, c = int(has[inside].sum()), int(has[~inside].sum())
        p = scipy.stats.fisher_exact([[a, n - a], [c, m - c]]).pvalue
        found.append((name, a / n, c / m, *risk_ratio(a, n, c, m), p))
    corrected = holm(np.array([x[-1] for x in found]))
    made = [Trait(*x[:-1], float(p)) for x, p in zip(found, corrected, strict=True)]
    return sorted(made, key=lambda t: t.p)


def _traits(features: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    out = []
    for name, x in features.items():
        if x.dtype == bool:
            out.append((name, x))
            continue
        low, high = np.quantile(x, [0.25, 0.75])
        out += [
            (f"{name}: more than {_short(high)}", x > high),
            (f"{name}: less than {_short(low)}", x < low),
        ]
    return [(name, has) for name, has in out if has.any() and not has.all()]


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


SAMPLE = 200  # other examples, whose pairs say how alike two texts are by chance
CLOSE = 0.01  # the share of those pairs that are as alike as a cluster's rows on average
CLUSTER_LEAST = 3  # rows of a cluster


def tfidf(texts: Sequence[str], rows: Sequence[int]) -> tuple[csr_array, list[str]]:
    """Unit vectors [rows,words] of tf * idf, and the words.

    tf = 1 + ln(count in the text), idf = ln(n / texts with the word), over all n texts: the words
    of a template weigh nothing.
    """
    among: collections.Counter[str] = collections.Counter()
    for text in texts:
        among.update(set(_WORD.findall(text.lower())))
    counts = {i: collections.Counter(_WORD.findall(texts[i].lower())) for i in rows}
    words = sorted({w for i in rows for w in counts[i]})
    column = {w: k for k, w in enumerate(words)}
    where = [(r, column[w], k) for r, i in enumerate(rows) for w, k in counts[i].items()]
    r, k, times = np.array(where, int).reshape(-1, 3).T
    idf = np.log(len(texts) / np.array([among[w] for w in words], float))
    value = (1 + np.log(times)) * idf[k]
    norm = np.sqrt(np.bincount(r, value**2, len(rows)))
    value /= np.where(norm > 0, norm, 1)[r]
    return csr_array((value, (r, k)), shape=(len(rows), len(words))), words


def clusters(texts: Sequence[str], flagged: np.ndarray) -> list[tuple[np.ndarray, list[str]]]:
    """(indices, the at most five words that weigh most) of each group of alike flagged texts [n].

    Agglomerative, average linkage, on the cosine distance of TF-IDF. It stops at the distance that
    a share CLOSE of the pairs of SAMPLE other texts is below. Groups below CLUSTER_LEAST rows are
    left out; largest first.
    """
    mine, rest = np.flatnonzero(flagged), np.flatnonzero(~flagged)
    if len(mine) < CLUSTER_LEAST or len(rest) < 2:
        return []
    drawn = np.random.default_rng(0).permutation(rest)[:SAMPLE]
    vectors, words = tfidf(texts, [*mine, *drawn])
    distance = np.clip(1 - (vectors @ vectors.T).toarray(), 0, None)
    k = len(mine)
    between = distance[k:, k:][np.triu_indices(len(drawn), 1)]
    inside = distance[:k, :k][np.triu_indices(k, 1)]
    tree = scipy.cluster.hierarchy.linkage(inside, "average")
    # Distances of exactly the cut, such as 1 for texts without a common word, join nothing.
    cut = np.nextafter(np.quantile(between, CLOSE), -np.inf)
    names = scipy.cluster.hierarchy.fcluster(tree, cut, "distance")
    out = []
    for name, size in collections.Counter(names.tolist()).most_common():
        if size >= CLUSTER_LEAST:
            weight = vectors[np.flatnonzero(names == name)].mean(0)
            top = [j for j in np.argsort(-weight, kind="stable")[:5] if weight[j] > 0]
            out.append((mine[names == name], [words[j] for j in top]))
    return out
