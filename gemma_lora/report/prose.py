"""report.md: the sections as Markdown; of the plots, those that are files beside it."""

import re
from typing import Any

from gemma_lora.report.sections import Block, Example, Plot, Table, lead, sections, show, title

SHOWN = 600  # characters of an example
FILES = {"learning_curve": "learning_curve.png"}


def markdown(report: dict[str, Any]) -> str:
    """report.md; every number in it is one of the report's."""
    parts = [f"# {title(report)}", *map(_block, lead(report))]
    for name, blocks in sections(report):
        parts += [f"## {name}", *map(_block, blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(x: Block) -> str:
    if isinstance(x, str):
        return x
    if isinstance(x, list):
        return "\n".join(f"- {item}" for item in x)
    if isinstance(x, Table):
        return "\n".join(map(_line, [x.head, ["---"] * len(x.head), *x.rows]))
    if isinstance(x, Plot):
        return f"![{x.caption}]({FILES[x.name]})" if x.name in FILES else ""
    return _example(x)


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(show(x).replace("|", r"\|") for x in cells) + " |"


def _example(x: Example) -> str:
    # A longer fence than any run of backticks in the text, so that the text cannot end it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", x.text)), default=0))
    # Of a long prompt its end, so that the completion is seen.
    first = max(0, min(x.completion - SHOWN // 2, len(x.text) - SHOWN))
    text = "..." * (first > 0) + x.text[first : first + SHOWN]
    text += "..." * (first + SHOWN < len(x.text))
    name, numbers = (re.sub("([`*<])", r"\\\1", s) for s in (x.name, x.numbers))
    return f"**{name}**: {numbers}\n\n{fence}text\n{text}\n{fence}"
