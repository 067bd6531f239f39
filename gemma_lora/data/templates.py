"""Rows -> text or conversations, with the point where the completion begins.

A template is a format string. Its last field, and what follows it, is the completion; all before
is the prompt. Of several variants the first is used whose optional fields, those that the last one
lacks, are all filled.
"""

import dataclasses
import functools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from gemma_lora.data.sources import field_names
from gemma_lora.errors import UserError

# The fields by which a row is recognised -> the template's variants.
TEMPLATES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("question", "answer"): ("Question: {question}\nAnswer: {answer}",),
    ("instruction", "output"): (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}",
    ),
    ("text", "label"): ("Review: {text}\nSentiment: {label}",),
    ("prompt", "completion"): ("{prompt}{completion}",),
}
# The same for data.chat: the prompt is the user's turn, the completion the assistant's. {labels}
# stands for the words of data.labels.
CHAT_TEMPLATES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("question", "answer"): ("{question}{answer}",),
    ("instruction", "output"): ("{instruction}\n\n{input}{output}", "{instruction}{output}"),
    ("text", "label"): ("Classify the text as one of: {labels}.\n\n{text}{label}",),
    ("prompt", "completion"): ("{prompt}{completion}",),
}
MESSAGES = ("messages",)  # of rows that are conversations: in place of a template's variants


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A row as text.

    completion: index of the completion's first character; end: index behind its last, where what
    ends the turn of a conversation begins; field: (start, end) of the longest field of the prompt,
    (0, 0) where there is none; label: index of the row's label among data.labels, -1 where the
    completion is no such label.
    """

    text: str
    completion: int
    end: int
    field: tuple[int, int]
    label: int


def choose(
    template: str, row: dict[str, Any], where: str, labels: Sequence[str], chat: bool
) -> tuple[str, ...]:
    """The variants to use for rows like `row`: the config's template, or by the row's fields."""
    if template:
        if "\\n" in template:
            raise UserError(
                f"data.template {template!r} holds a backslash and an n, expected a line break; a "
                "shell takes one as --config.data.template=$'Q: {q}\\nA: {a}'"
            )
        fields = _fields(template)
        if not fields:
            raise UserError(f"data.template {template!r} has no {{field}}")
        missing = [f for f in fields if f not in row]
        if missing:
            raise UserError(
                f"data.template names {', '.join(missing)}, but the rows of {where} have "
                f"{field_names(row)}"
            )
        return (template,)
    if chat and "messages" in row:
        return MESSAGES
    words = ", ".join(labels).replace("{", "{{").replace("}", "}}")
    table = CHAT_TEMPLATES if chat else TEMPLATES
    for fields, variants in table.items():
        if all(f in row for f in fields):
            return tuple(v.replace("{labels}", words) for v in variants)
    known = "; ".join(["/".join(f) for f in table] + ["messages"] * chat)
    hint = " (conversations need data.chat=True)" if "messages" in row else ""
    raise UserError(
        f"the rows of {where} have fields {field_names(row)}, which no built-in template knows "
        f"({known}){hint}. Give one: --config.data.template='... {{field}} ...'"
    )


def read_by(variants: tuple[str, ...]) -> set[str]:
    """The names of the fields that the variants read."""
    if variants is MESSAGES:
        return {"messages", "tools"}
    return {field for v in variants for field in _fields(v)}


def is_classification(variants: tuple[str, ...]) -> bool:
    """Is the completion a label?"""
    return variants is not MESSAGES and _fields(variants[0])[-1] == "label"


def render(
    variants: tuple[str, ...], row: dict[str, Any], labels: Sequence[str], where: str
) -> Rendered:
    """A row in the first variant whose optional fields, which the last one lacks, are all filled.

    labels: words for 0, 1, ... Raises UserError naming `where` (file and row) for a field that is
    missing or no text, and for a number as label that is a place and another place's word.
    """
    needed = set(_fields(variants[-1]))
    template = next(
        v
        for v in variants
        if not any(_missing(row.get(f)) or row[f] == "" for f in set(_fields(v)) - needed)
    )
    values = {}
    for field in _fields(template):
        value = row.get(field)
        if _missing(value):
            what = ("null" if value is None else "NaN") if field in row else "missing"
            raise UserError(f"{where}: field {field!r} is {what} (it has {field_names(row)})")
        if field == "label" and isinstance(value, int | float) and value % 1 == 0:
            value = _word(int(value), labels, where)
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: field {field!r} is a {type(value).__name__}, expected text")
        values[field] = str(value)
    text, spans = "", []
    for literal, field in _parts(template):
        text += literal
        if field is not None:
            spans.append((len(text), len(text) + len(values[field])))
            text += values[field]
    *prompt, (completion, _) = spans
    longest = max(prompt, key=lambda span: span[1] - span[0], default=(0, 0))
    if not is_classification(variants):
        return Rendered(text, completion, len(text), longest, -1)
    if values["label"] not in labels:
        raise UserError(
            f"{where}: label {row['label']!r}, but data.labels has {len(labels)} words, {labels} "
            "(on the command line: --config.data.labels=\"('a', 'b')\")"
        )
    return Rendered(text, completion, len(text), longest, labels.index(values["label"]))


def _missing(value: Any) -> bool:
    """NaN is what a table writes where it has nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _word(place: int, labels: Sequence[str], where: str) -> str | int:
    """The label word at `place`; the number itself where there is none."""
    found = labels[place] if 0 <= place < len(labels) else place
    if str(place) in labels and found != str(place):
        raise UserError(
            f"{where}: the label is the number {place}, which counts data.labels from 0, but these "
            f"have a word {str(place)!r} elsewhere, {labels}: write it as text where the word is "
            "meant"
        )
    return found


def render_chat(
    variants: tuple[str, ...],
    row: dict[str, Any],
    labels: Sequence[str],
    where: str,
    chat: Callable[..., str],
) -> Rendered:
    """A row as a conversation; `chat` is Tokenizer.render_chat.

    The completion begins where the prompt ends that asks the model for the assistant's last turn.
    Raises UserError naming `where` for what is no conversation, or one that the template refuses.
    """
    content, start, end, label = "", 0, 0, -1
    if variants is MESSAGES:
        messages = _messages(row, where)
        if tools := row.get("tools"):
            if not isinstance(tools, list):
                raise UserError(f"{where}: tools is a {type(tools).__name__}, expected a list")
            chat = functools.partial(chat, tools=tools)
    else:
        plain = render(variants, row, labels, where)
        content, label = plain.text[: plain.completion].strip(), plain.label
        shift = plain.completion - len(plain.text[: plain.completion].lstrip())
        start, end = (min(max(i - shift, 0), len(content)) for i in plain.field)
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": plain.text[plain.completion :]},
        ]
    try:
        prompt = chat(messages[:-1], add_generation_prompt=True)
        text = chat(messages)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    if not text.startswith(prompt):
        raise UserError(
            f"{where}: the chat template writes a prompt that is not how the whole conversation "
            "begins, so where the completion begins is unknown; use another template, or "
            "data.chat=False"
        )
    # A template that changes the user's words leaves no field to shorten.
    at = prompt.rfind(content) if content else -1
    field = (at + start, at + end) if at >= 0 else (0, 0)
    # A template may strip the answer; where it changes the words, all that it wrote is the answer.
    answer = messages[-1]["content"].strip()
    begins = text.find(answer, len(prompt))
    ends = begins + len(answer) if begins >= 0 else len(text)
    return Rendered(text, len(prompt), ends, field, label)


def _messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The row's conversation, checked: texts in turn, of which the assistant's is the last."""
    found = row.get("messages")
    if not isinstance(found, list) or not all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in found
    ):
        raise UserError(
            f"{where}: field 'messages' must be a list of objects with a role and a content, both "
            "text"
        )
    roles = [m["role"] for m in found]
    if len(found) < 2 or roles[-1] != "assistant":
        raise UserError(
            f"{where}: messages are by {', '.join(roles) or 'nobody'}; expected at least two, the "
            "last by the assistant"
        )
    return found


def _fields(template: str) -> list[str]:
    return [field for _, field in _parts(template) if field is not None]


@functools.cache
def _parts(template: str) -> list[tuple[str, str | None]]:
    """(literal, the field after it or None) pairs; only plain {name} fields are allowed."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise UserError(f"data.template {template!r} is no format string: {e}") from e
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if spec or conversion or field.isdecimal() or not re.fullmatch(r"[\w -]+", field):
            shown = f"{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
            raise UserError(
                f"data.template {template!r} has {{{shown}}}, expected a plain field name, e.g. "
                "{question}; a literal brace is written twice"
            )
    return [(literal, field) for literal, field, _, _ in parts]
