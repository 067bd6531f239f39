"""The report of a run, computed from its workdir alone: report.json, .md, .html, a picture.

python -m gemma_lora.report --workdir DIR [--compare DIR ...] [--price-per-hour X]
"""

import json
import pathlib
from typing import Any

from gemma_lora.files import replace_file, write_text
from gemma_lora.report import plots, training
from gemma_lora.report.numbers import build, build_from
from gemma_lora.report.page import html
from gemma_lora.report.prose import markdown
from gemma_lora.report.reading import SPLITS, read
from gemma_lora.report.sections import show

__all__ = ["SPLITS", "build", "markdown", "show", "write"]


def write(
    workdir: pathlib.Path, others: tuple[pathlib.Path, ...] = (), price: float | None = None
) -> dict[str, Any]:
    """Writes learning_curve.png, report.html, .md and .json, each whole; returns the report.

    others and price as in `build`.
    """
    w = read(workdir)
    scored = training.scored(w)
    report = build_from(w, scored, others, price)
    drawn = dict(plots.figures(w, scored, report))
    with replace_file(workdir / "learning_curve.png") as temporary:
        plots.png(drawn["learning_curve"], temporary)
    write_text(workdir / "report.html", html(report, {k: plots.svg(f) for k, f in drawn.items()}))
    write_text(workdir / "report.md", markdown(report))
    write_text(workdir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report
