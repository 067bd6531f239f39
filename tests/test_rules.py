"""Suspicious rows: each rule on rows that it must flag and on rows that it must not."""

import json
import random

import common
import pytest

from gemma_lora import rules
from gemma_lora.data import templates
from gemma_lora.rules import RULES, Row, check, imbalance

LONG = 512
WORDS = [
    f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rd", "sk", "lt", "mp")
]


def row(ident, prompt="", completion="It is so.", split="train", tokens=50, label=-1):
    return Row(ident, split, prompt or f"What about {ident}?", completion, tokens, label)


def prose(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def flagged(rows, rule, seq_len=LONG):
    assert rule in RULES
    return {i: why[rule] for i, why in check(rows, seq_len).items() if rule in why}


def test_clean_rows_and_no_rows_are_silent():
    assert check([], LONG) == {}
    assert check([row(str(i), prose(i), prose(-i - 1)) for i in range(50)], LONG) == {}


def test_every_rule_has_a_sentence_and_no_other_name_is_used():
    rows = [
        row("a", "Same", "same, "),
        row("b", "same ", "SAME,"),
        row("c", "same", "", tokens=LONG),
        row("d", "another", "same"),
    ]
    names = {name for why in check(rows, LONG).values() for name in why}
    assert {"duplicate", "conflict", "empty", "cut"} <= names <= set(RULES)
    assert all(text.endswith(".") for text in RULES.values())


def test_duplicates_name_each_other_whatever_case_and_space():
    rows = [
        row("a", "One  two\n", "Three"),
        row("b", "one two", "THREE "),
        row("c", "one two.", "3"),
    ]
    assert flagged(rows, "duplicate") == {"a": "like b", "b": "like a"}
    assert flagged([*rows, row("d", "ONE TWO", "three")], "duplicate")["a"] == "like b and 1 more"
    assert flagged(rows, "conflict") == {}


def test_a_prompt_with_two_completions_conflicts():
    rows = [row("a", "Is it?", "yes"), row("b", "is  it?", "no"), row("c", "Is it not?", "no")]
    assert flagged(rows, "conflict") == {"a": "like b", "b": "like a"}
    assert flagged(rows, "duplicate") == {}


def test_of_many_rows_of_one_prompt_one_is_named_and_the_others_counted():
    rows = [row(str(i), "Is it?", str(i // 2 if i < 1000 else i)) for i in range(2000)]
    rows += [row(f"o{i}", f"{i}?", "no") for i in range(18_000)]
    conflicts, copies = flagged(rows, "conflict"), flagged(rows, "duplicate")
    assert len(conflicts) == 2000 and len(copies) == 1000
    assert conflicts["0"] == "like 2 and 1997 more" and conflicts["1999"] == "like 0 and 1998 more"
    assert copies["6"] == "like 7" and copies["7"] == "like 6"


def test_a_prompt_that_all_rows_share_is_no_conflict_and_no_overlap():
    rows = [
        row(str(i), "Tell me a story.", prose(i), "validation" if i % 3 else "train")
        for i in range(30)
    ]
    assert check(rows, LONG) == {}
    assert check(rows[:4], LONG) == {}


@pytest.mark.parametrize("count", [2, 40])
def test_near_duplicates_are_found_and_others_are_not(count):
    rows = [row(str(i), prose(i), prose(1000 + i)) for i in range(count)]
    words = rows[1].prompt.split()
    words[20] = "other"
    rows.append(row("near", " ".join(words), rows[1].completion))
    half = row("half", rows[0].prompt, prose(7))  # the same prompt: a conflict, not that near
    found = flagged([*rows, half], "near_duplicate")
    assert set(found) == {"1", "near"}
    assert found["near"].startswith("like 1, 9") and found["1"].startswith("like near, 9")


def test_what_the_template_writes_is_no_likeness():
    text = prose(0, 100)
    rows = [row(str(i), f"{text} {prose(i + 1, 8)}", prose(-i - 1, 8)) for i in range(40)]
    assert flagged(rows, "near_duplicate") == {}
    assert len(flagged(rows[:2], "near_duplicate")) == 2  # the text itself is what they share


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_near_duplicate_in_a_large_group_of_alike_rows(split):
    """What 120 of 820 rows begin with is not all rows' template, and puts them into one group."""
    start = prose(0, 200)
    rows = [row(str(i), f"{start} {prose(i + 1, 90)}", "fine") for i in range(120)]
    rows += [row(f"o{i}", prose(5000 + i), "fine") for i in range(700)]
    rows.append(row("near", rows[5].prompt + " more", "fine", split))
    assert set(flagged(rows, "near_duplicate")) == {"5", "near"}
    assert set(flagged(rows, "overlap")) == (set() if split == "train" else {"5", "near"})


def test_an_instruction_that_some_of_the_rows_begin_with_is_no_likeness():
    """Eight tasks, each with a long definition; of one of them two rows are alike."""
    tasks = [prose(i, 150) for i in range(8)]
    rows = [
        row(str(i), f"{tasks[i % 8]} {prose(100 + i, 20)}", prose(500 + i, 20), side)
        for i, side in enumerate(["train", "validation"] * 100)
    ]
    assert check(rows, LONG) == {}
    rows.append(row("near", rows[8].prompt, rows[8].completion + " more", "validation"))
    assert set(flagged(rows, "near_duplicate")) == {"8", "near"}


def test_many_copies_of_one_row_with_a_few_words_changed():
    rows = [row(str(i), prose(i, 300), "fine") for i in range(300)]
    draw, copies = random.Random(0), []
    for i in range(20):
        words = prose(9999, 300).split()
        for at in draw.sample(range(300), 5):
            words[at] = draw.choice(WORDS)
        copies.append(row(f"c{i}", " ".join(words), "fine", "train" if i else "validation"))
    found = flagged([*rows, *copies], "near_duplicate")
    assert set(found) == {c.id for c in copies}
    assert set(flagged([*rows, *copies], "overlap")) == set(found)


def test_near_duplicates_are_recalled_among_many():
    """Rows with a few of their words replaced: all of those that are really near."""
    rows, changed = [row(str(i), prose(i), "fine") for i in range(1500)], {}
    draw = random.Random(0)
    for i in range(300):
        words = rows[i].prompt.split()
        for at in draw.sample(range(60), i % 12 + 1):
            words[at] = draw.choice(WORDS)
        changed[str(i)] = row(f"x{i}", " ".join(words), "fine")
    found = flagged([*rows, *changed.values()], "near_duplicate")
    pieces = {r.id: _pieces(r) for r in [*rows, *changed.values()]}
    near = {
        i
        for i, c in changed.items()
        if len(pieces[i] & pieces[c.id]) >= rules.NEAR * len(pieces[i] | pieces[c.id])
    }
    assert 100 < len(near) < 300  # some are changed too much
    both = near | {f"x{i}" for i in near}
    assert set(found) <= both and len(found) >= 0.98 * len(both)


def _pieces(r):
    text = f"{r.prompt} {r.completion}".lower().encode()
    return {text[i : i + 8] for i in range(len(text) - 7)}


def test_overlap_names_both_directions():
    a, v = row("a", "Who is it?", "me"), row("v", "who is it?", "you", "validation")
    found = flagged([a, v, row("b")], "overlap")
    assert found == {"a": "like v (validation)", "v": "like a (train)"}
    near = row("n", prose(3) + " And more.", "fine", "validation")
    found = flagged([row("a", prose(3), "fine"), near], "overlap")
    assert found["a"].startswith("like n (validation), 9") and found["n"].startswith(
        "like a (train)"
    )
    assert flagged([a, row("b", a.prompt, "me")], "overlap") == {}


@pytest.mark.parametrize("same", [False, True])
def test_overlap_is_not_lost_among_many_of_one_side(same):
    """In groups of more than are compared, and of rows of which another is a copy."""
    rows = [row(f"t{i}", prose(3), f"word{i}") for i in range(100)]
    rows += [row(f"v{i}", prose(3) + " And", f"more{i}", "validation") for i in range(3)]
    if same:  # v is a copy of the first, and the second is like both, with a prompt of its own
        rows = [
            row("t0", prose(3), "fine"),
            row("t1", prose(3) + " And more.", "fine"),
            row("v", prose(3), "fine", "validation"),
        ]
    others = [row(f"o{i}", prose(9 + i), "fine") for i in range(500)]
    found = flagged([*rows, *others], "overlap")
    assert found.keys() == {r.id for r in rows}
    assert all(("(validation)" in why) == i.startswith("t") for i, why in found.items())


def test_empty_completions():
    rows = [row("a", completion=" \n"), row("b", completion="7"), row("c", completion="")]
    assert set(flagged(rows, "empty")) == {"a", "c"}


def test_rows_that_fill_the_length():
    rows = [
        row("whole", tokens=LONG - 1),
        row("cut", "Why?", "Because " * 9, tokens=LONG),
        row("prompt", "why " * 100, "so", tokens=LONG),
        row("label", "why " * 100, "so", tokens=LONG, label=1),
    ]
    assert set(flagged(rows, "cut")) == {"cut", "prompt"}  # a label is kept, its prompt is cut
    assert set(flagged(rows, "full_prompt")) == {"prompt", "label"}


@pytest.mark.parametrize(
    ("completion", "bad"),
    [
        ("He went to the shop and bought the", True),
        ("These are the five reasons for it:", True),
        ("This is how:\n```\nprint(1)\n", True),
        ("This is how:\n```\nprint(1)\n```", False),
        ("He went to the shop and bought bread.", False),
        ("1. bread 2. butter 3. cheese", False),
        ("a, b, c, d, data", False),
        ("of the", False),
        ("SELECT name FROM users WHERE age > 30;", False),
        ("The correct answer is option A", False),
        ("I could not find it anywhere, sorry :(", False),
        ("I could not find it anywhere, sorry (", True),
        ("In Markdown use ``` to open a block of code.", False),
        ("In Markdown use ```code``` in a line.", False),
    ],
)
def test_unfinished_completions(completion, bad):
    assert bool(flagged([row("a", completion=completion)], "unfinished")) == bad
    assert not flagged([row("a", completion=completion, label=0)], "unfinished")


def test_arithmetic_is_reported_for_its_row():
    wrong = "So <<12*3=38>>38, and <<1+1=3>>3.\n#### 3"
    found = flagged(
        [row("a", completion=wrong), row("b", completion="<<12*3=36>>36")], "arithmetic"
    )
    assert found == {"a": "<<12*3=38>>: 12*3 is 36 (and 1 more)"}


def test_length_tails_on_both_sides():
    rows = [row(str(i), tokens=80 + i) for i in range(40)]
    assert flagged(rows, "length") == {}
    found = flagged([*rows, row("s", tokens=3), row("l", tokens=LONG)], "length")
    assert set(found) == {"s", "l"} and found["s"] == "3 tokens, the median is 99"
    assert (
        flagged([row(str(i), tokens=9) for i in range(9)] + [row("l", tokens=99)], "length") == {}
    )


def test_imbalance_is_of_labelled_rows_and_none_without_labels():
    rows = [row(str(i), label=int(i < 5)) for i in range(100)]
    unlabelled = [row(f"u{i}") for i in range(900)]
    assert imbalance(rows + unlabelled) == {1: 0.05}
    assert imbalance([row(str(i), label=i % 2) for i in range(100)]) == {}
    assert imbalance([row(str(i), label=int(i < 10)) for i in range(100)]) == {}  # 10 % is not rare
    many = [row(str(i), label=i % 14) for i in range(140)]
    assert imbalance(many) == {}  # each has 7 %, an equal share
    assert imbalance([*many[14:], row("x", label=0)]) == {}
    assert imbalance([*many, row("y", label=14)]) == {14: 1 / 141}
    assert imbalance(unlabelled) is None and imbalance([]) is None


def test_one_pair_among_thousands():
    rows = [row(str(i), prose(i, 100), "fine") for i in range(2000)]
    rows.append(row("near", rows[1321].prompt + " more", "fine"))
    assert set(flagged(rows, "near_duplicate")) == {"1321", "near"}


def test_real_problems_have_few_findings():
    """GSM8K: every annotation holds; answers that contradict their steps are few."""
    fields = [json.loads(line) for line in common.rows_of("gsm8k").read_text().splitlines()]
    made = [
        templates.render(templates.TEMPLATES["question", "answer"], f, (), "gsm8k") for f in fields
    ]
    rows = [
        Row(
            str(i),
            "train",
            r.text[: r.completion],
            r.text[r.completion :],
            1 + len(r.text) // 4,
            -1,
        )
        for i, r in enumerate(made)
    ]
    found = check(rows, 2048)
    assert {name for why in found.values() for name in why} == {"final_answer"}
    assert len(found) == 13
