"""The HTML report: equal to the Markdown, closed in itself, whole for a run that is not."""

import base64
import html.parser
import json
import math
import re
import sys

import numpy as np
import pyarrow.parquet
import pytest
import report_run

from gemma_lora import report
from gemma_lora.errors import UserError
from gemma_lora.report import __main__ as command
from gemma_lora.report import reading, sections

SECTIONS = ["Overview", "Hyper-parameters", "Cost", "Losses", "Learning curve",
            "Generalisation gap", "Token accuracy", "Loss by length", "Format and content",
            "Outliers of the training set", "Worst validation examples",
            "Comparison with the base model", "Final thoughts",
            "What this run does not show", "Manifest"]  # fmt: skip


class Page(html.parser.HTMLParser):
    """tables: rows of cells; tags: (name, attributes); heads; text: all of it, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.tags, self.heads, self.text, self._into = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._into.append(tag)

    def handle_endtag(self, tag):
        while self._into.pop() != tag:  # tags without an end
            pass

    def handle_data(self, data):
        inside = self._into[-1] if self._into else ""
        if inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif inside == "h2":
            self.heads.append(data)
        if inside != "style":
            self.text += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    split = [[re.split(r"(?<!\\) \| ", x[2:-2]) for x in b.splitlines()] for b in blocks]
    clean = [[[c.replace(r"\|", "|").strip() for c in row] for row in t] for t in split]
    return [[t[0], *t[2:]] for t in clean]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run and its report: (workdir, report, parsed page)."""
    workdir = report_run.gsm8k(tmp_path_factory.mktemp("run"), validation=45, train=45)
    other = report_run.gsm8k(tmp_path_factory.mktemp("other"), 45, 45, steps=(0, 20))
    r = report.write(workdir, (other,), price=2.0)
    return workdir, r, Page((workdir / "report.html").read_text())


def test_page_markdown_and_json_have_the_same_numbers(written):
    workdir, r, page = written
    assert json.loads((workdir / "report.json").read_text()) == r
    assert page.heads == [*SECTIONS[:12], "Comparison with other runs", *SECTIONS[12:]]
    text = (workdir / "report.md").read_text()
    assert page.tables == markdown_tables(text) and len(page.tables) == 12
    loss = r["validation"]["loss"]
    cells = [f"{loss[k]:.4f}" for k in ("start", "best", "last", "decrease_pct")]
    cells.append("[{:.4f}, {:.4f}]".format(*loss["interval"]))
    assert ["validation.loss", *cells, loss["conclusion"]] in page.tables[3]
    [kinds] = [t for t in page.tables if t[0][-1] == "share best interval"]
    for row in kinds[1:]:
        found = r["format_content"][row[0]]
        assert row[1] == f"{found['tokens']:,}" and row[2] == f"{found['loss_start']:.4f}"
    # The prose: every number of a paragraph of the one is in the other.
    for block in (b for _, blocks in sections.sections(r) for b in blocks if isinstance(b, str)):
        assert re.sub(r"\*\*|`", "", block) in page.text and block in text


def test_page_asks_for_nothing_and_runs_nothing(written):
    workdir, _, page = written
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base", "svg"}
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(images) == 6  # curve, schedule, length, data map, scores, base
    for tag, attributes in page.tags:
        assert not [k for k in attributes if k.startswith("on") or k == "srcset"]
        for value in (attributes.get("href"), attributes.get("src")):
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    for image in images:
        drawn = base64.b64decode(image.partition("base64,")[2]).decode()
        assert drawn.rstrip().endswith("</svg>") and "<script" not in drawn
        assert all(x.startswith(("#", "data:")) for x in re.findall(r'href="([^"]*)"', drawn))
    style = re.search("<style>(.*?)</style>", (workdir / "report.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_texts_of_the_dataset_are_only_text(tmp_path):
    evil = "<script>alert(1)</script><img src=http://x onerror=alert(2)> &lt; **x** </pre>\x00"
    report_run.make(tmp_path, texts=[evil] * report_run.N, arch="<b>arch</b>")
    report.write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert page.text.count("<script>alert(1)</script>") == 10
    assert "Training report: <b>arch</b>" in page.text


def test_heat_map_shows_each_token_with_its_loss(written):
    workdir, r, page = written
    worst = r["outliers"][0]
    ledger = pyarrow.parquet.read_table(workdir / "ledger" / "eval_000060.parquet").to_pylist()
    [row] = [x for x in ledger if (x["id"], x["split"]) == (worst["id"], "validation")]
    assert worst["token_nll"] == pytest.approx(row["token_nll"], abs=6e-5)
    assert "".join(worst["pieces"]) == worst["text"][worst["completion"] :] + "<eos>"
    assert worst["worst_tokens"][0][1] == pytest.approx(max(row["token_nll"]), abs=6e-5)
    titles = [a["title"] for tag, a in page.tags if tag == "span" and "title" in a]
    shown = [f"{x:,.4f}" for e in (*r["training"]["worst"], *r["outliers"]) for x in e["token_nll"]]
    assert titles == shown
    deepest = max((a for t, a in page.tags if "title" in a), key=lambda a: float(a["title"]))
    assert deepest["class"] == f"h{min(9, int(float(deepest['title']) * 10 / 8))}"


def test_a_long_heat_map_says_what_it_leaves_out(tmp_path):
    report_run.gsm8k(tmp_path, 8, 12, steps=(0, 20))
    for path in (tmp_path / "ledger").glob("*.parquet"):
        rows = pyarrow.parquet.read_table(path).to_pylist()
        for r in rows:
            if "pieces" in r:
                r["pieces"] = r["pieces"] * 20
            else:
                r |= {"token_nll": r["token_nll"] * 20, "tokens": 20 * r["tokens"]}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    r = report.write(tmp_path)
    worst = r["outliers"][0]
    assert len(worst["pieces"]) == len(worst["token_nll"]) == 400
    assert worst["tokens_left_out"] == worst["tokens"] - 400 > 0
    said = f" ... {worst['tokens_left_out']} more tokens"
    assert said in Page((tmp_path / "report.html").read_text()).text


def test_without_texts_of_tokens_the_report_says_so(tmp_path):
    report_run.gsm8k(tmp_path, 12, 12, steps=(0, 20))
    path = tmp_path / "ledger" / "examples.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop(["pieces"]), path)
    r = report.write(tmp_path)
    assert r["format_content"] == {} and r["outliers"][0]["pieces"] is None
    page = Page((tmp_path / "report.html").read_text())
    assert "does not hold the texts of the tokens" in page.text
    assert r["outliers"][0]["text"] in page.text
    assert not [a for tag, a in page.tags if tag == "span" and "title" in a]


def test_texts_of_other_tokens_are_refused(tmp_path):
    report_run.gsm8k(tmp_path, 12, 12, steps=(0, 20))
    path = tmp_path / "ledger" / "examples.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows = [r | {"pieces": r["pieces"][1:]} for r in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=r"validation-\d+ has the texts of \d+ tokens, but the"):
        report.build(tmp_path)


def poison(workdir, step: int) -> None:
    """One validation and one training example of an eval get NaN and infinity."""
    path = workdir / "ledger" / f"eval_{step:06d}.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    for r in rows:
        bad = {"validation-3": math.nan, "train-2": math.inf}.get(r["id"])
        if bad is not None:
            r |= {"nll": bad, "nll_max": bad, "token_nll": [bad] * r["tokens"], "margin": bad}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


KILLED = {"status": "running", "steps": 20}
NAN = {"status": "nan", "steps": 60, "nan": {"steps": [60, 60], "ids": ["validation-3", "train-2"]}}


@pytest.mark.parametrize(
    ("steps", "run", "poisoned", "said"),
    [
        ((0, 20, 40), KILLED | {"best_step": 20}, None,
         ["had not ended at step 20 of 60", "was cut short", "came to step 60"]),
        ((0,), KILLED | {"steps": 0, "phases": {}, "peak_memory": None}, None,
         ["had not ended at step 0", "There is one eval, of step 0"]),
        ((0,), {"status": "nan", "steps": 0, "best_step": None, "nan": NAN["nan"]}, 0,
         ["not finite", "There is one eval", "there is no best one",
          "At step 0 the loss of 2 examples"]),
        ((0, 20, 40, 60), NAN | {"best_step": 40}, 60,
         ["ended at step 60 of 60", "validation-3, train-2", "At step 60 the loss of 2 examples"]),
        ((0, 20, 40), {"status": "interrupted", "steps": 60}, None, ["was interrupted at step 60"]),
    ],
)  # fmt: skip
def test_a_run_that_is_not_whole_is_told_first_and_in_full(tmp_path, steps, run, poisoned, said):
    report_run.gsm8k(tmp_path, 25, 45, steps=steps)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | run))
    if poisoned is not None:
        poison(tmp_path, poisoned)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    r = report.write(tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    begin = text[: text.index("\n## ")]
    for words in said:
        assert any(words in note for note in r["notes"]), words
        assert words in begin and words in page[: page.index("<h2")]
    parsed = Page(page)
    assert parsed.heads == SECTIONS and parsed.tables == markdown_tables(text)
    assert ["run.status", json.dumps(run["status"])] in parsed.tables[0]
    assert sum(tag == "img" for tag, _ in parsed.tags) >= 3


def test_label_probabilities_that_are_no_numbers_have_no_reliability(tmp_path):
    report_run.gsm8k(tmp_path, 25, 45, steps=(0,))
    path = tmp_path / "ledger" / "eval_000000.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    for n, r in enumerate(rows):
        lost = r["id"] == "validation-3"
        p = [math.nan, math.nan] if lost else [0.25, 0.75]
        r |= {"label": 0 if lost else n % 2, "label_p": p}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = tmp_path / "config.json"
    found = json.loads(config.read_text())
    found["data"]["labels"] = ["no", "yes"]
    config.write_text(json.dumps(found))
    found = report.write(tmp_path)["validation"]["class_accuracy"]
    assert found["reliability"] == [] and found["overconfidence"]["interval"] is None
    labels = [r["label"] for r in rows if r["split"] == "validation"]
    assert found["best"] == sum(labels) / 25 == np.trace(found["confusion"]) / 25 < 1
    assert found["conclusion"] == "no eval after step 0: nothing to compare"


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_that_is_none(monkeypatch, price):
    monkeypatch.setattr(sys, "argv", ["report", "--workdir", "x", "--price-per-hour", price])
    with pytest.raises(UserError, match=r"--price-per-hour is .*, expected a number that is not"):
        command.main()


@pytest.mark.once
def test_five_thousand_examples_stay_under_5_mb(tmp_path):
    report_run.gsm8k(tmp_path, 500, 4500, steps=(0, 30, 60))
    report.write(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_tokens_are_read_for_the_examples_asked_for(written):
    workdir, _, _ = written
    w = reading.read(workdir)
    found = w.token_losses("train", 20, ["train-7", "train-1"])
    assert sorted(found) == ["train-1", "train-7"]
    assert [len(found[i]) for i in found] == [len(w.pieces("train", [i])[i]) for i in found]
    assert np.isfinite(found["train-7"]).all()
