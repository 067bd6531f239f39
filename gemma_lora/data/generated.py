"""Generated arithmetic word problems in GSM8K's answer format.

A scene (cookies, mowing lawns, a hike, ...) supplies the words of a family's step templates; a
seeded choice of opening, events and ending composes 2 to 5 steps into one problem.
"""

import contextlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from gemma_lora.data.scenes import FAMILIES
from gemma_lora.errors import Parser, UserError, run_main
from gemma_lora.files import path_argument, write_text
from gemma_lora.sums import evaluate

NAMES = {
    ("she", "her", "her"): ["Amara", "Beth", "Chloe", "Dina", "Elena", "Grace", "Hana", "Ivy"],
    ("he", "his", "him"): ["Adam", "Boris", "Carlos", "David", "Ethan", "Farid", "Kofi", "Omar"],
}
PEOPLE = [(name, *pronouns) for pronouns, names in NAMES.items() for name in names]
VARIED = {
    "day": ["Monday", "Tuesday", "Thursday", "Friday", "Saturday"],
    "thing": ["a birthday present", "a pair of gloves", "art supplies", "lunch", "a haircut"],
    "goods": ["T-shirts", "paperbacks", "movie tickets", "houseplants", "board games"],
    "gadget": ["bicycle", "tablet", "guitar", "telescope", "pair of skates", "camera"],
}
# How a multiplier (k) or a divisor (F) is said.
SPOKEN = {("k", 2): "twice", ("k", 3): "three times", ("k", 4): "four times"}
SPOKEN |= {("F", 2): "half", ("F", 3): "a third", ("F", 4): "a quarter", ("F", 5): "a fifth"}
SLOT = re.compile(r"\{(\w+)(?:([=/+])([\d,-]+))?\}")


class _UnfitError(Exception):
    """A draw that gives a fraction or an odd size; the problem is drawn again."""


def _pick(rng: random.Random, choices: Sequence):
    """Uses random() only: the one method whose sequence Python promises to keep."""
    if not choices:
        raise _UnfitError
    return choices[int(rng.random() * len(choices))]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "to")) else "s")


def _fill(text: str, words: dict, rng: random.Random) -> str:
    """Replaces slots until none is left (a word may itself hold slots); draws go into words."""

    def word(match: re.Match) -> str:
        key, kind, spec = match.groups()
        if kind:
            numbers = [int(n) for n in re.split("[,-]", spec)]
            if "-" in spec:
                numbers = range(numbers[0], numbers[1] + 1)
            if kind == "/":
                numbers = [n for n in numbers if words["x"] % n == 0]
            words[key] = _pick(rng, numbers) + (words["x"] if kind == "+" else 0)
        return SPOKEN.get((key, words[key]), str(words[key]))

    while "{" in text:
        text = SLOT.sub(word, text)
    return text


def _step(template: list[str], words: dict, rng: random.Random) -> tuple[str, list[str]]:
    """(sentence of the question, sentences of the answer); quantities go into words."""
    question, solution = _fill(template[0], words, rng), []
    for computation in template[1:]:
        name, formula, sentence = re.fullmatch("(.)=(.*?): (.*)", computation).groups()
        shown = re.sub("[a-zA-Z]", lambda m: str(words[m[0]]), formula)
        value = evaluate(shown)
        if value.denominator != 1 or not 2 <= value <= 9999:
            raise _UnfitError
        words[name] = int(value)
        solution.append(_fill(sentence, words, rng).replace("@", f"<<{shown}={value}>>{value}"))
    return question, solution


def _parse(family: str) -> list[tuple[dict, list, list, list]]:
    """One (words, openings, events, endings) per scene."""
    table, *parts = family.strip().split("\n---\n")
    header, *rows = (re.split(r" \| ", row) for row in table.split("\n"))
    scenes = [dict(zip(header, row, strict=True)) for row in rows]
    scenes = [scene | {k + "s": _plural(v) for k, v in scene.items()} for scene in scenes]
    joined = [part.replace("\n|", " |").split("\n") for part in parts]
    steps = [[line.split(" | ") for line in lines] for lines in joined]
    return [(scene, *steps) for scene in scenes]


SCENES = [scene for family in FAMILIES for scene in _parse(family)]


def _compose(rng: random.Random, scene: dict, openings: list, events: list, endings: list) -> tuple:
    """(question, answer); raises _UnfitError when the draws do not fit together."""
    people, events = PEOPLE.copy(), events.copy()
    (a, he, his, him), *others = (people.pop(_pick(rng, range(len(people)))) for _ in "ABCD")
    words = scene | {key: _pick(rng, values) for key, values in VARIED.items()}
    words |= {"A": a, "he": he, "his": his, "him": him}
    words |= {key: other[0] for key, other in zip("BCD", others, strict=True)}
    words |= {"He": he.title(), "His": his.title(), "now": "in all", "all": "all the"}

    story = [_step(_pick(rng, openings), words, rng)]
    for i in range(_pick(rng, [0, 1, 1, 1, 2])):
        event, before = events.pop(_pick(rng, range(len(events)))), words["x"]
        if i and event[0].startswith("{He}"):
            event = [
                _pick(rng, ["Then {he}", "After that, {he}", "{He}"]) + event[0][4:],
                *event[1:],
            ]
        story.append(_step(event, words, rng))
        less = words["x"] < before
        words |= {"now": "left" if less else "now", "all": "the remaining" if less else "all the"}
    words["All"] = words["all"].capitalize()
    story.append(_step(_pick(rng, endings), words, rng))
    solution = [sentence for _, sentences in story for sentence in sentences]
    if not 2 <= len(solution) <= _pick(rng, [3, 3, 4, 4, 5]):
        raise _UnfitError
    return " ".join(text for text, _ in story), "\n".join([*solution, f"#### {words['x']}"])


def problems(count: int, seed: int = 0) -> list[dict]:
    """count dicts of id, question and answer. Problem i depends only on (seed, i)."""
    if count < 1:
        raise UserError(f"count: got {count}, expected at least 1")
    made = []
    while len(made) < count:
        rng = random.Random(f"{seed}/{len(made)}")
        scene, composed = _pick(rng, SCENES), None
        while composed is None:
            with contextlib.suppress(_UnfitError):
                composed = _compose(rng, *scene)
        question, answer = composed
        # Those of two seeds can be training and validation set.
        ident = f"generated-{f'{seed}-' if seed else ''}{len(made):06d}"
        made.append({"id": ident, "question": question, "answer": answer})
    return made


def write(path: Path, count: int, seed: int = 0) -> None:
    """Writes problems(count, seed) as JSON lines; path ends up whole or unchanged."""
    text = "".join(json.dumps(problem) + "\n" for problem in problems(count, seed))
    try:
        write_text(path, text)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def main() -> None:
    parser = Parser("gemma_lora.data.generated", __doc__)
    parser.add_argument("--count", type=int, required=True, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=path_argument, required=True, help="path of the .jsonl file")
    args = parser.parse_args()
    write(args.out, args.count, args.seed)


if __name__ == "__main__":
    run_main(main)
