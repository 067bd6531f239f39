"""The review file: marks kept and checked, the page's text escaped, precision of the flags."""

import csv
import html.parser
import re

import numpy as np
import pytest
import scipy

from gemma_lora import review
from gemma_lora.errors import UserError

N = 12
TEXTS = (
    ["<script>alert('x')</script> & \"quoted\", \u00e9\nsecond line"]
    + ["=1+1"]
    + ["plain"] * (N - 2)
)


def write(directory, top=4, combined=None):
    columns = {"id": np.array([f"row/{i}" for i in range(N)], object),
               "combined": np.linspace(1, 0, N) if combined is None else combined}  # fmt: skip
    broken = {"row/0": {"cut": "9 of 9 tokens"}}
    return review.write(directory, TEXTS, columns, broken, ["duplicate"] * N, top)


def rows(directory):
    with open(directory / "review.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def mark(directory, marks):
    """Writes marks as a spreadsheet does: all rows, a byte order mark, its own line ends."""
    found = [r | marks.get(r["id"], {}) for r in rows(directory)]
    with open(directory / "review.csv", "w", newline="", encoding="utf-8-sig") as f:
        table = csv.DictWriter(f, review.FIELDS, lineterminator="\r\n")
        table.writeheader()
        table.writerows(found)


def test_first_review_is_unmarked(tmp_path):
    lines = write(tmp_path)
    found = rows(tmp_path)
    assert [r["id"] for r in found] == [f"row/{i}" for i in range(4)]
    assert [r["rank"] for r in found] == ["1", "2", "3", "4"]
    assert found[0]["rules"] == "cut: 9 of 9 tokens" and found[0]["text"].endswith("second line")
    assert found[1]["text"] == "'=1+1" and found[2]["text"] == "plain"
    assert {r["mark"] + r["comment"] for r in found} == {""}
    assert lines[-1].startswith("No example is marked yet")


def test_an_id_that_a_spreadsheet_would_compute(tmp_path):
    columns = {"id": np.array(["=1+1", "'b", "c"], object), "combined": np.array([3.0, 2.0, 1.0])}
    for _ in range(2):
        review.write(tmp_path, ["x"] * 3, columns, {}, ["none"] * 3, 3)
        assert [r["id"] for r in rows(tmp_path)] == ["'=1+1", "'b", "c"]
        mark(tmp_path, {"'=1+1": {"mark": "error"}, "'b": {"mark": "ok"}})
    found = review.read_marks(tmp_path / "review.csv", columns["id"].tolist())
    assert found == {"=1+1": ("error", ""), "'b": ("ok", "")}


def test_marks_are_kept(tmp_path):
    """Also those of rows that are no longer among the worst, with their place of now."""
    write(tmp_path)
    marks = {"row/0": {"mark": " Error "}, "row/1": {"mark": "ok", "comment": 'a, "b"\nc'},
             "row/3": {"comment": "later"}}  # fmt: skip
    mark(tmp_path, marks)
    write(tmp_path, top=2, combined=np.linspace(0, 1, N))
    found = {r["id"]: r for r in rows(tmp_path)}
    assert [*found] == ["row/11", "row/10", "row/3", "row/1", "row/0"]
    assert (found["row/0"]["mark"], found["row/0"]["rank"]) == ("error", "12")
    assert (found["row/1"]["mark"], found["row/1"]["comment"]) == ("ok", 'a, "b"\nc')
    assert (found["row/3"]["mark"], found["row/3"]["comment"]) == ("", "later")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,mark,comment\nrow/1,ok,\nrow/2,eror,\n", "line 3: mark 'eror' of row/2: did you mean "
         r"error\? \(valid: error, ok, unsure\)"),
        ("id,mark,comment\nrow/99,ok,\n", "'row/99' is no training example.*did you mean row/9"),
        ("id,mark,comment\nrow/1,ok,\nrow/1,error,\n", "row/1 is marked twice"),
        ("id;mark;comment\nrow/1;ok;\n", "no column comment, id, mark; expected .*commas"),
        ('id,mark,comment\nrow/1,ok,"he said\nrow/2,error,\n', "line 2: not CSV: unexpected end"),
        (b"id,mark,comment\nrow/1,ok,\xff\n", "cannot be read as UTF-8"),
    ],
)  # fmt: skip
def test_bad_marks_are_refused_and_left(tmp_path, text, message):
    path = tmp_path / "review.csv"
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        write(tmp_path)
    assert path.read_bytes() == data and not (tmp_path / "review.html").exists()


def test_precision_counts_marked_rows_alone(tmp_path):
    write(tmp_path, top=12)
    kinds = ["error", "error", "", "ok", "unsure", "error"]
    mark(tmp_path, {f"row/{i}": {"mark": k} for i, k in enumerate(kinds)})
    lines = write(tmp_path, top=12)
    ci = scipy.stats.binomtest(3, 4).proportion_ci(0.95, "wilson")
    share = f"0.75 [{ci.low:.2f}, {ci.high:.2f}]"
    assert lines[-2:] == [f"| {k} | 5 of {k} | 3 | 1 | 1 | {share} |" for k in (10, 12)]
    assert "| 2 | 1 of 2 | 0 | 0 | 1 | n/a |" in review.precision(["unsure", ""], 2)


def test_page_is_one_file_with_escaped_text(tmp_path):
    write(tmp_path)
    mark(tmp_path, {"row/2": {"mark": "unsure", "comment": '"><img src=x>'}})
    write(tmp_path)
    page = (tmp_path / "review.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "&lt;script&gt;alert" in page and "<img" not in page
    loads, parser = [], html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: loads.extend(
        k for k, _ in attributes if k in ("src", "href", "srcset", "action")
    )
    parser.feed(page)
    assert not loads and not re.search(r"https?:|@import|url\(", page)
    assert page.count("<section>") == 4 and page.count(" checked") == 4
    assert re.search(r'name="mark2"[^>]*value="unsure" checked', page)
