"""Rows from every source."""

import json
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from common import message

from gemma_lora.data import generated, sources

ROWS = [
    {"id": "a", "question": "1 + 1?", "answer": "2", "n": 1},
    {"id": "b", "question": "zwei\u2028Zeilen é 😀", "answer": "{x}\n", "n": 2},
    {"id": "c", "question": "", "answer": "0", "n": 3},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return str(path)


def read_path(path, limit=0):
    return sources.read("", str(path), limit)


# ---- files ----------------------------------------------------------------------------------


def test_jsonl_json_and_parquet_give_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    lines = [{sources.LINE: i, **row} for i, row in enumerate(ROWS, 1)]
    assert read_path(tmp_path / "x.jsonl") == lines
    assert read_path(tmp_path / "x.json") == ROWS
    assert read_path(tmp_path / "x.parquet") == ROWS


def test_jsonl_takes_blank_lines_crlf_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a"}\r\n\r\n{"id": "b"}')
    assert [r["id"] for r in read_path(path)] == ["a", "b"]


def test_limit_and_ids(tmp_path):
    path = write_jsonl(tmp_path / "part.jsonl", [{"t": 1}, {"t": 2, "id": None}, {"t": 3, "id": 7}])
    assert [r["id"] for r in read_path(path)] == ["part-000000", "part-000001", "7"]
    assert [r["t"] for r in read_path(path, 2)] == [1, 2]
    assert [r["t"] for r in read_path(path, 99)] == [1, 2, 3]


def test_path_wins_over_source(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert [r["id"] for r in sources.read("generated:5", path, 0)] == [r["id"] for r in ROWS]


def test_duplicate_id_is_named(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": "a"}, {"id": "b"}, {"id": "a"}])
    text = message(read_path, path)
    assert "'a' occurs twice" in text and "row 2" in text and path in text


@pytest.mark.parametrize("bad", [" a", "a\n", "a\u2028b", "", "\ud800"])
def test_an_id_that_no_list_of_ids_could_name(bad, tmp_path):
    path = str(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(f'{{"id": "a b"}}\n{json.dumps({"id": bad})}\n')
    assert f"{path}: the id {bad!r} (row 1) cannot be a line" in message(read_path, path)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        pytest.param(b"[" * 200_000, "not JSON", id="nested"),
        (b"[1, 2]", "expected an object, got '[1, 2]'"),
        (b'"text"', "expected an object"),
    ],
)
def test_broken_line_names_file_and_line(tmp_path, line, hint):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    text = message(read_path, path)
    assert f"{path}, line 3: " in text and hint in text
    assert len(read_path(path, 1)) == 1  # what is not asked for is not read


def test_broken_files(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert "expected a list of objects" in message(read_path, tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": 1}\n{"a": 2}')
    assert ".jsonl" in message(read_path, tmp_path / "x.json")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    assert "not a Parquet file" in message(read_path, tmp_path / "x.parquet")
    bad = pyarrow.array([b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"t": bad}), tmp_path / "x.parquet")
    assert "not a Parquet file" in message(read_path, tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(b"\n")
    assert "holds no rows" in message(read_path, tmp_path / "x.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    assert "d.jsonl is a directory" in message(read_path, tmp_path / "d.jsonl")


def test_missing_file_suggests_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").touch()
    text = message(read_path, tmp_path / "trian.jsonl")
    assert "does not exist" in text and "did you mean train.jsonl?" in text
    assert "nor does its directory" in message(read_path, tmp_path / "no" / "x.jsonl")


def test_unknown_ending_and_source(tmp_path):
    text = message(read_path, tmp_path / "x.jsnl")
    assert "'.jsnl'" in text and "did you mean .jsonl" in text
    text = message(sources.read, "tdfs:gsm8k", "", 0)
    assert "'tdfs:gsm8k'" in text and "did you mean tfds?" in text
    assert "data.path" in message(sources.read, "train.jsonl", "", 0)


# ---- generated ------------------------------------------------------------------------------


def test_generated():
    assert sources.read("generated:5", "", 0) == generated.problems(5)
    assert sources.read("generated:5", "", 2) == generated.problems(2)
    for argument in ("", "x", "-1", "²", "1.5"):
        assert "generated:600" in message(sources.read, f"generated:{argument}", "", 0)
    assert "at least 1" in message(sources.read, "generated:0", "", 0)


# ---- TensorFlow Datasets --------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set prepared by tfds itself, without TensorFlow and without a network."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    tfds.core.add_data_dir(folder)

    with tfds.core.registered.skip_registration():

        class Sums(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "question": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(num_classes=2),
                    "marks": tfds.features.Sequence(tfds.features.Scalar(np.int32)),
                    "messages": tfds.features.Sequence(
                        {"role": tfds.features.Text(), "content": tfds.features.Text()}
                    ),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, manager):
                return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

            def _generate_examples(self, n):
                for i in range(n):
                    row = {"question": f"{i} + é?", "answer": f"{i}", "label": i % 2, "marks": [i]}
                    yield i, row | {"messages": turns(i)}

    Sums(data_dir=folder, file_format="array_record").download_and_prepare()


def turns(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"é{i}"}, {"role": "model", "content": "yes"}][: 1 + i % 2]


def test_tfds_rows(prepared):
    rows = sources.read("tfds:sums", "", 0)
    assert [r["id"] for r in rows] == [f"sums-train-{i:06d}" for i in range(5)]
    assert sorted(r["question"] for r in rows) == [f"{i} + é?" for i in range(5)]
    assert all(type(r["answer"]) is str and type(r["label"]) is int for r in rows)
    assert all(r["marks"] == [int(r["answer"])] for r in rows)
    assert all(r["messages"] == turns(int(r["answer"])) for r in rows)
    assert sources.read("tfds:sums/train", "", 3) == rows[:3]
    assert [r["id"] for r in sources.read("tfds:sums/test", "", 0)] == [
        "sums-test-000000",
        "sums-test-000001",
    ]


def test_tfds_errors(prepared):
    text = message(sources.read, "tfds:gsm8", "", 0)
    assert "has no 'gsm8'" in text and "did you mean gsm8k" in text and len(text) < 500
    text = message(sources.read, "tfds:sums/trian", "", 0)
    assert "'sums/trian'" in text and "train" in text and "data.path" in text


def test_tfds_that_another_process_prepared_meanwhile(prepared, monkeypatch):
    import tensorflow_datasets as tfds

    def second(self, *args, **kwargs):
        raise FileExistsError(self.data_path)

    expected = sources.read("tfds:sums", "", 0)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", second)
    assert sources.read("tfds:sums", "", 0) == expected
    assert "FileExistsError" in message(sources.read, "tfds:gsm8k", "", 0)


def test_tfds_knows_its_older_builders(prepared, monkeypatch):
    """gsm8k is found although tfds' own import of such builders fails without TensorFlow."""
    import tensorflow_datasets as tfds

    def offline(self, *args, **kwargs):
        raise OSError(f"no network for {self.name}")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    assert "no network for gsm8k" in message(sources.read, "tfds:gsm8k", "", 0)


@pytest.mark.parametrize("argument", ["o/sums", "o/sums/train", "o/sums/default/train"])
def test_tfds_of_the_hub(argument, tmp_path, monkeypatch):
    """tfds converts what the datasets library reads; only the two calls to the hub are replaced."""
    import datasets
    import huggingface_hub
    import tensorflow_datasets as tfds

    rows = [{"instruction": f"i{i}", "input": "", "output": f"é{i}"} for i in range(3)]
    (tmp_path / "o" / "sums").mkdir(parents=True)
    write_jsonl(tmp_path / "o" / "sums" / "train.jsonl", rows)
    real, asked = datasets.load_dataset_builder, []

    def local(repository, config):
        asked.append((repository, config))
        return real(str(tmp_path / repository), config, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    info = types.SimpleNamespace(gated=False, card_data=None, tags=[], license="MIT")
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    found = sources.read(f"tfds:huggingface:{argument}", "", 0)
    assert asked[0][0] == "o/sums"
    assert [{k: r[k] for k in rows[0]} for r in found] == rows
    assert found[0]["id"].startswith("o-sums") and found[0]["id"].endswith("-train-000000")


def test_tfds_of_the_hub_errors():
    assert "tfds:huggingface:ORG/NAME" in message(sources.read, "tfds:huggingface:sums", "", 0)
