"""A person's marks on the most suspicious examples: review.csv, review.html, and precision.

review.csv is written with an empty `mark`; marks in it are kept. review.html is the same to click
at; it downloads a review.csv that replaces the one in the workdir.
"""

import csv
import io
import pathlib
from typing import Any

import jinja2
import numpy as np

from gemma_lora.errors import UserError, nearest
from gemma_lora.files import write_text
from gemma_lora.stats import wilson

MARKS = {"error": "text or label is wrong", "ok": "it is right", "unsure": "cannot be told"}
FIELDS = ("id", "rank", "category", "rules", "text", "mark", "comment")
EXCERPT = 300  # characters of a text in the CSV


def read_marks(path: pathlib.Path, ids: list[str]) -> dict[str, tuple[str, str]]:
    """id -> (mark, comment) of the rows that have either; {} where there is no file.

    Raises UserError for a file that is no such table, an unknown mark, an id that is not in `ids`,
    and an id with two marks.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as UTF-8: {e}") from e
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows, names = [(row, table.line_num) for row in table], table.fieldnames or []
    except csv.Error as e:  # a quote without its end would swallow the marks below it
        raise UserError(f"{path}, line {table.line_num + 1}: not CSV: {e}") from e
    if text and (missing := {"id", "mark", "comment"} - set(names)):
        raise UserError(
            f"{path}: no column {', '.join(sorted(missing))}; expected {','.join(FIELDS)}, "
            f"separated by commas, got {','.join(map(str, names))[:100]}"
        )
    known, found = set(ids), {}
    for row, line in rows:
        example, at = row["id"] or "", f"{path}, line {line}"
        example = example if example in known else example.removeprefix("'")
        mark, comment = (row["mark"] or "").strip().lower(), (row["comment"] or "").strip()
        if mark and mark not in MARKS:
            raise UserError(f"{at}: mark {row['mark']!r} of {example}: {nearest(mark, MARKS)}")
        if not mark and not comment:
            continue
        if example not in known:
            raise UserError(
                f"{at}: {example!r} is no training example of this run; {nearest(example, ids)}"
            )
        if found.setdefault(example, (mark, comment)) != (mark, comment):
            raise UserError(f"{at}: {example} is marked twice, and not alike")
    return found


def write(
    workdir: pathlib.Path,
    texts: list[str],
    columns: dict[str, np.ndarray],
    broken: dict[str, dict[str, str]],
    categories: list[str],
    top: int,
) -> list[str]:
    """Writes review.csv and review.html; returns the lines of outliers.md on the marks so far.

    The rows are the `top` worst by `combined`, and below them those marked earlier. texts,
    columns and categories are in id order.
    """
    ids = columns["id"].tolist()
    marks = read_marks(workdir / "review.csv", ids)
    order = np.argsort(-columns["combined"], kind="stable")
    rows: list[dict[str, Any]] = []
    for place, i in enumerate(order, 1):
        if place > top and ids[i] not in marks:
            continue
        text = _inert(" ".join(texts[i].split()))
        mark, comment = marks.get(ids[i], ("", ""))
        rows.append(
            {"id": _inert(ids[i]), "rank": place, "category": categories[i],
             "rules": "; ".join(f"{k}: {v}" for k, v in broken.get(ids[i], {}).items()),
             "text": text[:EXCERPT] + "..." * (len(text) > EXCERPT),
             "mark": mark, "comment": comment, "whole": texts[i]}
        )  # fmt: skip
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, FIELDS, extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    listed = [{k: row[k] for k in FIELDS} for row in rows]
    html = page.render(rows=rows, listed=listed, fields=FIELDS, marks=MARKS)
    write_text(workdir / "review.html", html)
    write_text(workdir / "review.csv", out.getvalue())
    return precision([marks.get(ids[i], ("", ""))[0] for i in order], top)


def _inert(text: str) -> str:
    """With a ' before what a spreadsheet would compute."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def precision(marks: list[str], top: int) -> list[str]:
    """Lines on the share of errors among the first k examples that are marked, by rank."""
    lines = ["", "# Precision of the flags, by marks in review.csv", ""]
    if not any(marks):
        return [*lines, "No example is marked yet: see review.html."]
    lines += [
        "Of the k most suspicious, those marked; the share of errors is of those marked error or "
        "ok, with Wilson's 95 % interval. It holds for all k only where all of them are marked.",
        "",
        "| k | marked | error | ok | unsure | share of errors |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for k in sorted({k for k in (10, 30, 100, 300, 1000) if k < top} | {top, len(marks)}):
        first = marks[:k]
        error, ok, unsure = map(first.count, MARKS)
        share = "n/a"
        if error + ok:
            low, high = wilson(np.arange(error + ok) < error)
            share = f"{error / (error + ok):.2f} [{low:.2f}, {high:.2f}]"
        marked = error + ok + unsure
        lines.append(f"| {k} | {marked} of {k} | {error} | {ok} | {unsure} | {share} |")
    return lines


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Review of {{ rows|length }} suspicious examples</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #888; }
h1 { font-size: 1.3rem; margin: .5rem 0; }
section { border-bottom: 1px solid #ccc; padding: .5rem 0; }
h2 { font-size: 1rem; margin: .3rem 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .6rem; }
label { margin-right: 1rem; }
input[type=text] { width: 100%; box-sizing: border-box; }
</style>
<header>
<h1>Review of {{ rows|length }} suspicious examples</h1>
<p>Mark each (
{%- for k, v in marks.items() %}{{ k }}: {{ v }}{{ "; " if not loop.last }}{% endfor %}),
put the download into the run's directory as review.csv, and run gemma_lora.outliers again.
<button id="save">Download review.csv</button> <span id="count"></span></p>
</header>
{% for row in rows %}
<section>
<h2>{{ row.rank }}. {{ row.id }}: {{ row.category }}</h2>
{% if row.rules %}<p>{{ row.rules }}</p>{% endif %}
<pre>
{{ row.whole }}</pre>
{% set at = loop.index0 %}
<p>{% for mark in marks %}
<label><input type="radio" autocomplete="off" name="mark{{ at }}"
data-row="{{ at }}" data-field="mark"
value="{{ mark }}"{{ " checked" if mark == row.mark }}> {{ mark }}</label>
{% endfor %}
<label><input type="radio" autocomplete="off" name="mark{{ at }}"
data-row="{{ at }}" data-field="mark"
value=""{{ " checked" if not row.mark }}> not marked</label></p>
<input type="text" autocomplete="off" data-row="{{ at }}" data-field="comment"
value="{{ row.comment }}"
placeholder="comment" aria-label="comment on {{ row.id }}">
</section>
{% endfor %}
<script>
const fields = {{ fields|tojson }}, rows = {{ listed|tojson }};
let unsaved = false;
const count = () => {
  const marked = rows.filter(row => row.mark).length;
  document.getElementById("count").textContent = `${marked} of ${rows.length} marked`;
};
document.addEventListener("input", event => {
  const {row, field} = event.target.dataset;
  rows[row][field] = event.target.value;
  unsaved = true;
  count();
});
const cell = x => '"' + String(x).replaceAll('"', '""') + '"';
const table = () => [fields, ...rows.map(row => fields.map(k => row[k]))]
  .map(line => line.map(cell).join(",") + "\\r\\n").join("");
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table()], {type: "text/csv"}));
  link.download = "review.csv";
  link.click();
  unsaved = false;
});
addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
count();
</script>
</html>
"""
