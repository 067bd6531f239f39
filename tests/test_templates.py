"""The text that templates make of rows, and where its parts are."""

import math

import pytest
from common import message

from gemma_lora.data.templates import CHAT_TEMPLATES, TEMPLATES, choose, render

WORDS = ("negative", "positive")


def made(row, template="", labels=WORDS, chat=False):
    variants = choose(template, row, "x.jsonl", labels, chat)
    return render(variants, row, labels, "x.jsonl, row 7")


def show(row, template="", **kwargs):
    """(prompt, completion)."""
    r = made(row, template, **kwargs)
    return r.text[: r.completion], r.text[r.completion :]


def test_templates_are_chosen_by_fields():
    assert show({"id": "a", "question": "q", "answer": "a"}) == ("Question: q\nAnswer: ", "a")
    assert show({"prompt": "p", "completion": "c"}) == ("p", "c")
    assert show({"text": "good", "label": 1}) == ("Review: good\nSentiment: ", "positive")
    assert show({"text": "good", "label": 0})[1] == "negative"
    assert show({"text": "good", "label": 1.0})[1] == "positive"  # as Parquet may have it
    assert show({"text": "good", "label": "negative"})[1] == "negative"
    prompt, completion = show({"instruction": "i", "input": "x", "output": "o"})
    assert completion == "o" and prompt == (  # as Stanford Alpaca wrote it
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "i\n\n### Input:\nx\n\n### Response:\n"
    )
    prompt, _ = show({"instruction": "i", "input": "", "output": "o"})
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\ni\n\n### Response:\n"
    )


def test_every_kind_of_row_has_a_prompt_for_chat():
    assert CHAT_TEMPLATES.keys() == TEMPLATES.keys()
    row = {"text": "good", "label": 1}
    prompt, completion = show(row, chat=True, labels=("{bad}", "good"))
    assert prompt == "Classify the text as one of: {bad}, good.\n\ngood" and completion == "good"


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"input": math.nan}])
@pytest.mark.parametrize("chat", [False, True])
def test_a_variant_without_the_empty_input(empty, chat):
    prompt, completion = show({"instruction": "i", "output": "o"} | empty, chat=chat)
    assert "Input" not in prompt and "None" not in prompt and "nan" not in prompt
    assert prompt == "i" if chat else "### Instruction:\ni\n" in prompt
    assert completion == "o"


@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_instruction_hides_no_input(chat):
    prompt, completion = show({"instruction": "", "input": "cat", "output": "o"}, chat=chat)
    assert "cat" in prompt and completion == "o"


def test_completion_begins_at_the_last_field():
    row = {"q": "{answer} and {q}", "a": "{}"}
    assert show(row, "Q {q} A {a} end") == ("Q {answer} and {q} A ", "{} end")
    # Literal braces survive, also where they look like the last field.
    assert show(row, "{{q}} {q} = {a} {{a}}") == ("{q} {answer} and {q} = ", "{} {a}")
    assert show(row, "{a}{a}") == ("{}", "{}")
    assert show({"my field": 1.5, "b-c": True}, "{my field}{b-c}") == ("1.5", "True")


def test_the_longest_field_of_the_prompt():
    row = {"a": "abc", "b": "abcdef", "c": "a longer one", "d": ""}
    for template, field in (
        ("{a} {b} {a}: {c}", "abcdef"),
        ("{a}: {c} {d}", "a longer one"),
        ("({c})", ""),
        ("{d}: {c}", ""),
    ):
        r = made(row, template)
        assert r.text[slice(*r.field)] == field and r.field[1] <= r.completion


@pytest.mark.parametrize(
    ("row", "template", "label"),
    [
        ({"text": "t", "label": 1}, "", 1),
        ({"text": "t", "label": False}, "", 0),
        ({"text": "t", "label": "positive"}, "", 1),
        ({"text": "t", "label": 1}, "{text}: {label}!", 1),
        ({"text": "positive", "label": 1}, "{label}: {text}", -1),
        ({"question": "q", "answer": "positive"}, "", -1),
    ],
)
def test_the_label_of_a_row(row, template, label):
    assert made(row, template).label == label


@pytest.mark.parametrize(
    "template",
    ["{}", "{0}", "{q.x}", "{q[0]}", "{q:>10}", "{q!r}", "{q:{a}}", "{ q.__class__ }", "{q} {"],
)
def test_only_plain_fields(template):
    text = message(made, {"q": "1", "a": "2"}, template)
    assert "data.template" in text and repr(template) in text


def test_template_errors():
    row = {"question": "q", "answer": "a"}
    assert "has no {field}" in message(made, row, "{{question}}")
    text = message(made, row, "{question}{anwser}")
    assert "anwser" in text and "question, answer" in text and "x.jsonl" in text
    text = message(made, row, "{question}\\n{answer}")
    assert "a backslash and an n, expected a line break" in text
    text = message(made, {"body": "x"})
    assert "body" in text and "question/answer" in text and "--config.data.template" in text
    for more, what in (
        ({}, "missing"), ({"answer": None}, "null"), ({"answer": math.nan}, "NaN")
    ):  # fmt: skip
        broken = {"question": "q"} | more
        text = message(render, TEMPLATES["question", "answer"], broken, (), "x.jsonl, row 7")
        assert f"x.jsonl, row 7: field 'answer' is {what} (it has question" in text
    for value in ([], {}, b"x"):
        text = message(made, {"question": "q", "answer": value})
        assert "x.jsonl, row 7: field 'answer' is a" in text and "expected text" in text
    for label in (2, -1, 0.5, math.inf, "Positive"):
        text = message(made, {"text": "t", "label": label})
        assert f"label {label!r}, but data.labels has 2 words, ('negative', 'positive')" in text
    assert "field 'label' is NaN" in message(made, {"text": "t", "label": math.nan})


def test_a_number_that_is_a_place_and_another_word_is_refused():
    """Stars from 1 to 5 would otherwise each be trained as the next."""
    stars = ("1", "2", "3", "4", "5")
    for label in (1, 4, 5, 5.0, True):
        text = message(made, {"text": "t", "label": label}, labels=stars)
        assert f"the label is the number {int(label)}, which counts data.labels from 0" in text
    assert "have a word '-1'" in message(made, {"text": "t", "label": -1}, labels=("1", "-1"))
    assert [made({"text": "t", "label": x}, labels=stars).label for x in ("1", "5", 0)] == [0, 4, 0]
    assert show({"text": "t", "label": 1}, labels=("0", "1"))[1] == "1"
