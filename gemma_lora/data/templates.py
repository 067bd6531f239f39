"""Rows -> text, with the point where the completion begins.

A template is a format string. Its last field, and what follows it, is the completion; all before
is the prompt. Of several variants the first is used whose prompt has no empty field.
"""

import functools
import re
import string
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


def choose(template: str, row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The variants to use for rows like `row`: the config's template, or by the row's fields."""
    if template:
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
    for fields, variants in TEMPLATES.items():
        if all(f in row for f in fields):
            return variants
    known = "; ".join("/".join(f) for f in TEMPLATES)
    raise UserError(
        f"the rows of {where} have fields {field_names(row)}, which no built-in template knows "
        f"({known}). Give one: --config.data.template='... {{field}} ...'"
    )


def render(
    variants: tuple[str, ...], row: dict[str, Any], labels: tuple[str, ...], where: str
) -> tuple[str, int]:
    """(text, index of the completion's first character). `labels` are the words for 0, 1, ...

    Raises UserError naming `where` (file and row) for a field that is missing or no text.
    """
    # The prompt decides: an empty completion is the row's own affair.
    usable = [v for v in variants if all(row.get(f) not in (None, "") for f in _fields(v)[:-1])]
    template = usable[0] if usable else variants[-1]
    values = {}
    for field in _fields(template):
        if row.get(field) is None:
            raise UserError(f"{where}: field {field!r} is missing (it has {field_names(row)})")
        value = row[field]
        if field == "label" and isinstance(value, int):
            if not 0 <= value < len(labels):
                raise UserError(
                    f"{where}: label {value}, but data.labels has {len(labels)} words, {labels} "
                    "(on the command line: --config.data.labels=\"('a', 'b')\")"
                )
            value = labels[value]
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: field {field!r} is a {type(value).__name__}, expected text")
        values[field] = str(value)
    text, completion = "", 0
    for literal, field in _parts(template):
        text += literal
        if field is not None:
            completion = len(text)
            text += values[field]
    return text, completion


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
