"""report.html: the sections as one file that asks for nothing else and runs no script.

Texts of the dataset may hold anything: the template escapes all that it is given.
"""

import importlib.resources
import re
from typing import Any

import jinja2
import markupsafe

from gemma_lora.report.sections import Block, Example, lead, sections, show, title

DEEPEST = 8.0  # nats; tokens of a larger loss have no deeper a colour
PROMPT_SHOWN, TEXT_SHOWN = 600, 3000  # characters of an example


def html(report: dict[str, Any], plots: dict[str, str]) -> str:
    """plots: data URIs by the name of a Plot."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": show, "inline": _inline, "heat": _heat, "parts": _parts}
    environment.tests["number"] = lambda x: isinstance(x, (int, float, list)) or x is None
    source = importlib.resources.files("gemma_lora.report").joinpath("page.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title=title(report),
        lead=list(map(_kinded, lead(report))),
        sections=[(name, list(map(_kinded, blocks))) for name, blocks in sections(report)],
        plots=plots,
        deepest=DEEPEST,
    )


def _kinded(x: Block) -> tuple[str, Block]:
    return {"str": "text", "list": "bullets"}.get(type(x).__name__, type(x).__name__), x


def _inline(text: str) -> markupsafe.Markup:
    """A paragraph: escaped, then **bold** and `code`."""
    safe = str(markupsafe.escape(text))
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", safe))


def _heat(nll: float | None) -> str:
    """The depth of a token's colour, 0 to 9; a loss that is not finite has the deepest."""
    return "9" if nll is None else str(min(9, int(10 * max(0.0, nll) / DEEPEST)))


def _parts(x: Example) -> dict[str, Any]:
    """What is shown of an example: its prompt's end, and its tokens or its completion."""
    prompt, rest = x.text[: x.completion], x.text[x.completion :]
    if x.pieces is not None and x.prompt_has_loss:
        prompt = ""
    return {
        "prompt": "..." * (len(prompt) > PROMPT_SHOWN) + prompt[-PROMPT_SHOWN:],
        "text": rest[:TEXT_SHOWN] + "..." * (len(rest) > TEXT_SHOWN),
        "tokens": None if x.pieces is None else list(zip(x.pieces, x.token_nll, strict=True)),
    }
