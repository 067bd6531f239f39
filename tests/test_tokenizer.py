"""Folders with a tokenizer: what they may hold, what is read first, and what is saved."""

import pathlib

import common
import pytest
import tokenizers
from tiny_tokenizer import (
    CORPUS,
    noise,
    qwen_metadata,
    write_json,
    write_qwen,
    write_sentencepiece,
)

from gemma_lora import chat
from gemma_lora.errors import UserError
from gemma_lora.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture
def folder(tmp_path):
    Tokenizer.from_gguf(qwen_metadata()).save(tmp_path)
    return tmp_path


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"looked for tokenizer.json, vocab.json with merges.txt"):
        Tokenizer.from_dir(tmp_path / "nowhere")


def test_folder_with_sentencepiece_model(spm_path, tmp_path):
    plain = Tokenizer.from_dir(spm_path.parent)
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.add_bos) == (2, 1, 0, True)
    (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": "<eos>", "add_bos_token": False})
    changed = Tokenizer.from_dir(tmp_path)
    assert (changed.bos_id, changed.eos_id, changed.pad_id, changed.add_bos) == (2, 1, 1, False)
    assert changed.encode("the cat") == plain.encode("the cat")
    write_json(tmp_path / "added_tokens.json", {"<eos>": 1, "<|im_start|>": 424})
    with pytest.raises(UserError, match=r"adds tokens that tokenizer.model has not \(<\|im_start"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_folder_of_official_flax_weights(spm_path, tmp_path, inside):
    """tokenizer.model lies in the folder, or beside the folder that holds the arrays."""
    arrays = tmp_path / "2b"
    arrays.mkdir()
    ((arrays if inside else tmp_path) / "tokenizer.model").write_bytes(spm_path.read_bytes())
    found, wanted = Tokenizer.from_dir(arrays), Tokenizer.from_file(spm_path)
    assert [found.encode(t) for t in CORPUS] == [wanted.encode(t) for t in CORPUS]
    assert (found.bos_id, found.eos_id, found.pad_id, found.add_bos) == (2, 1, 0, True)


def test_keras_preset_of_gemma(spm_path, tmp_path):
    sentencepiece = common.needs("sentencepiece")
    write_json(tmp_path / "tokenizer.json", {"class_name": "GemmaTokenizer", "config": {}})
    (tmp_path / "assets" / "tokenizer").mkdir(parents=True)
    path = tmp_path / "assets" / "tokenizer" / "vocabulary.spm"
    path.write_bytes(spm_path.read_bytes())
    found = Tokenizer.from_dir(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [t for t in CORPUS if " " * 4 not in t]  # longer than the longest such piece
    assert [found.encode(t) for t in texts] == [theirs.encode(t) for t in texts]
    assert (found.bos_id, found.eos_id, found.pad_id, found.add_bos) == (2, 1, 0, True)
    path.unlink()
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        Tokenizer.from_dir(tmp_path)


def test_keras_preset_of_qwen2(tmp_path):
    special = write_qwen(tmp_path / "assets" / "tokenizer", "vocabulary.json")
    settings = {"class_name": "QwenTokenizer", "config": {"unsplittable_tokens": special[::-1]}}
    write_json(tmp_path / "tokenizer.json", settings)
    found, wanted = Tokenizer.from_dir(tmp_path), Tokenizer.from_gguf(qwen_metadata())
    texts = [*CORPUS, *noise(100), "<|im_start|>user\nHi<|im_end|>\n"]
    assert [found.encode(t) for t in texts] == [wanted.encode(t) for t in texts]
    assert found.bos_id is None and not found.add_bos
    assert found.eos_id == found.pad_id == wanted.encode("<|endoftext|>")[0]


def test_vocab_and_merges_are_transformers_qwen2(tmp_path):
    transformers = common.needs("transformers")
    special = write_qwen(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    texts = [*CORPUS, *noise(500), *special, "<|im_start|>user\nHi<|im_end|>\n"]
    assert [e.ids for e in ours.encode_batch(texts)] == theirs(texts).input_ids
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, *theirs.convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>"]
    ))  # fmt: skip
    assert not ours.add_bos
    # Older folders name the special tokens in a file of their own.
    ids = dict(zip(special, theirs.convert_tokens_to_ids(special), strict=True))
    write_json(tmp_path / "added_tokens.json", ids)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    older = Tokenizer.from_dir(tmp_path)
    assert [e.ids for e in older.encode_batch(texts)] == theirs(texts).input_ids
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*merges\.txt"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnot merge\n")
    with pytest.raises(UserError, match=r"merges\.txt: no byte-level vocabulary"):
        Tokenizer.from_dir(tmp_path)


def test_where_a_chat_template_comes_from(folder):
    qwen2 = chat.BUILT_IN["<|im_start|>"]
    assert Tokenizer.from_dir(folder).chat_template == qwen2  # as saved
    given = "{{ messages[0]['content'] }}"
    metadata = qwen_metadata()
    assert Tokenizer.from_gguf(metadata).chat_template == qwen2
    in_gguf = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": given})
    assert in_gguf.chat_template == given
    in_gguf.save(folder)
    assert Tokenizer.from_dir(folder).chat_template == given
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    config = {"eos_token": "<|im_end|>", "chat_template": named}
    write_json(folder / "tokenizer_config.json", config)
    both = Tokenizer.from_dir(folder)
    for tools, wanted in ((), "y"), (({"name": "f"},), "x"):
        assert both.render_chat([{"role": "user", "content": "a"}], tools=tools) == wanted
    unnamed = {"chat_template": [{"name": "rag", "template": "x"}]}
    write_json(folder / "tokenizer_config.json", config | unnamed)
    with pytest.raises(UserError, match=r"none of the chat templates is named default \(rag\)"):
        Tokenizer.from_dir(folder)
    (folder / "chat_template.jinja").write_text("z")
    assert Tokenizer.from_dir(folder).chat_template == "z"
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", config | {"chat_template": {"default": "y"}})
    with pytest.raises(UserError, match="chat_template is a dict, expected text or a list"):
        Tokenizer.from_dir(folder)


def test_special_ids_in_order_of_preference(folder):
    saved = Tokenizer.from_dir(folder)
    start = saved.encode("<|im_start|>")[0]
    write_json(folder / "config.json", {"eos_token_id": [start, 1], "bos_token_id": start})
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}})
    assert Tokenizer.from_dir(folder).eos_id == saved.eos_id
    (folder / "tokenizer_config.json").unlink()
    mapped = Tokenizer.from_dir(folder)
    assert mapped.eos_id == mapped.pad_id == saved.encode("<|endoftext|>")[0]
    assert mapped.bos_id == start and not mapped.add_bos
    # As Qwen2's files: what the tokenizer says it has not, config.json does not give it.
    write_json(folder / "tokenizer_config.json", {"bos_token": None})
    assert Tokenizer.from_dir(folder).bos_id is None
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_dir(folder).eos_id == start
    for number in ("1", []):
        write_json(folder / "config.json", {"eos_token_id": number})
        with pytest.raises(UserError, match=r"eos_token_id of config.json is .*expected a number"):
            Tokenizer.from_dir(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no end-of-text token.*eos_token in"):
        Tokenizer.from_dir(folder)


def test_bos_of_the_file_counts_unless_the_config_says_otherwise(spm_path, tmp_path):
    Tokenizer.from_file(spm_path).save(tmp_path)
    config = {"bos_token": "<bos>", "eos_token": "<eos>"}
    for stated, wanted in ((None, True), (False, False), (True, True)):
        write_json(tmp_path / "tokenizer_config.json", config | {"add_bos_token": stated})
        assert Tokenizer.from_dir(tmp_path).add_bos is wanted


def test_truncation_and_padding_in_the_file_are_ignored(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(folder)
    short, long = tokenizer.encode_batch(["a", CORPUS[0]])
    assert len(short.ids) == 1 and tokenizer.decode(long.ids) == CORPUS[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"model"', r"tokenizer.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', r"'</s>' as its eos token"),
        ("tokenizer_config.json", '{"eos_token": 5}', r"eos_token is 5, expected text"),
        ("chat_template.jinja", b"\xff", r"chat_template.jinja is not UTF-8"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|im_end|>", "chat_template": ["x"]}',
            "is a list",
        ),
    ],
)
def test_damaged_folder(folder, name, content, message):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        Tokenizer.from_dir(folder)


def test_failed_save_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_dir(folder)

    class Failing:
        def id_to_token(self, i):
            return "x"

        def save(self, path):
            pathlib.Path(path).write_text("half")
            raise OSError("disk full")

    object.__setattr__(tokenizer, "backend", Failing())
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert not list(folder.glob(".*"))
