"""The generated word problems: reproducible, correct, varied, fluent."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from gemma_lora.data import generated
from gemma_lora.data.generated import problems, write
from gemma_lora.errors import UserError
from gemma_lora.sums import arithmetic, final_answer

FINAL = re.compile(r"#### [1-9][0-9]*")
ANNOTATED = re.compile(r"<<([0-9+*/-]+)=([0-9]+)>>\2(?![0-9])")


@pytest.fixture(scope="module")
def many() -> list[dict]:
    return problems(5000)


def test_problem_depends_only_on_seed_and_index():
    assert problems(50) == problems(50)
    assert problems(10)[:5] == problems(5)
    ours, theirs = problems(50, seed=0), problems(50, seed=1)
    assert all(a["question"] != b["question"] for a, b in zip(ours, theirs, strict=True))


def test_first_problem_is_pinned():
    """A Python version or platform that draws differently would change every user's data."""
    [problem] = problems(1, seed=7)
    assert problem["question"] == (
        "In a quiz show, Farid answers 11 easy questions worth 3 points each "
        "and 9 hard questions worth 16 each. "
        "He loses 9 points to a penalty. How many points does Farid have at the end?"
    )
    assert problem["answer"] == (
        "The easy questions are worth <<11*3=33>>33 points.\n"
        "The hard questions are worth <<9*16=144>>144 points.\n"
        "Farid has <<33+144=177>>177 points.\n"
        "The penalty leaves him with <<177-9=168>>168 points.\n"
        "#### 168"
    )


def test_answers_check_clean_and_agree_with_a_second_evaluator(many):
    for problem in many[:2000]:
        assert not arithmetic(problem["answer"]) and not final_answer(problem["answer"])
        for expression, value in ANNOTATED.findall(problem["answer"]):
            assert eval(expression) == int(value) >= 2


def test_ids_of_two_seeds_differ():
    assert [p["id"] for p in (*problems(1), *problems(1, 3))] == [
        "generated-000000",
        "generated-3-000000",
    ]


def test_format(many):
    for i, problem in enumerate(many):
        assert problem.keys() == {"id", "question", "answer"}
        assert problem["id"] == f"generated-{i:06d}"
        assert problem["question"].endswith("?")
        *steps, final = problem["answer"].split("\n")
        assert 2 <= len(steps) <= 5
        assert FINAL.fullmatch(final)
        for step in steps:
            assert step.count("<<") == len(ANNOTATED.findall(step)) == 1
            assert step[0].isupper() and step.endswith(".")


def test_variety(many):
    questions = [problem["question"] for problem in many]
    assert len(set(questions)) > 0.99 * len(questions)
    # Most wordings, numbers aside, occur once: composition rather than templates with new numbers.
    assert len({re.sub("[0-9]+", "N", question) for question in questions}) > 4000
    assert len(generated.SCENES) >= 25
    assert min(Counter(problem["answer"].count("<<") for problem in many).values()) > 400


@pytest.mark.parametrize(
    "banned",
    [
        r"[{}@|]",
        r"  |\n ",
        r"(?<![0-9$.])1 [a-z]+s\b",
        r"\b[Aa] [aeio]",
        r"\ban [^aeiouh]",
        r"\b(\w+) \1\b",
        r" [.,?]",
    ],
)
def test_no_artefacts(many, banned):
    for problem in many:
        text = f"{problem['question']}\n{problem['answer']}"
        assert not re.search(banned, text), text


def test_write_and_command_line(tmp_path):
    write(tmp_path / "new" / "a.jsonl", 20, seed=3)
    command = [sys.executable, "-m", "gemma_lora.data.generated", "--count", "20", "--seed", "3"]
    subprocess.run([*command, "--out", str(tmp_path / "b.jsonl")], check=True)
    text = (tmp_path / "new" / "a.jsonl").read_text()
    assert text == (tmp_path / "b.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == problems(20, seed=3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="got 0, expected at least 1"):
        problems(0)
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path, 1)
    assert list(tmp_path.parent.glob(".*.tmp")) == []
