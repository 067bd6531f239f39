"""Writes goldens/tokenizer.json, the ids transformers gives: python tests/make_tokenizer_golden.py

Needs transformers and torch beside the demo model's packages.
"""

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "goldens" / "tokenizer.json"

TEXTS = (
    "",
    " ",
    "a",
    "Hello world",
    " leading and trailing ",
    "one  two   three    four",
    " " * 31,
    " " * 32,  # SentencePiece would give 31 + 1
    "x" + " " * 40 + "y",
    "\t\tif x:\r\n\t\t\treturn\n",
    "\n",
    "a\n\n\n\nb\n" + "\n" * 40,
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "1234567890 3.14159 1,000,000 0x1F",
    "Café, naïve, coöperate; Cafe\u0301 e\u0323\u0302",
    "你好,世界。こんにちは 안녕하세요",
    "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "\U00013000\U00013001 between \U00013000",  # no pieces: byte fallback
    "\x00\x01\x07\x7f\u200b\ufeff",
    "▁ ▁▁ a▁b",
    "<bos>twice<bos> and <eos> <pad><unk>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<iframe></iframe> <h1>Title</h1><br /><br /> <table><tr> </s>",
    "[multimodal] <unused7> <0x41>",
    "\\frac{1}{2} $x^2$ <<48/2=24>>24 #### 72",
    "المرحبا بالعالم שלום नमस्ते สวัสดี",
)


def reference(gguf_path: Path) -> Any:
    """The tokenizer transformers reads from a GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


def main() -> None:
    import transformers

    from gemma_lora.weights import gguf

    path = gguf.demo_path()
    tokenizer = reference(path)
    golden = {
        "made_by": f"transformers {transformers.__version__}",
        "gguf_sha256": gguf.sha256(path),
        "ids": {text: tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS},
    }
    lines = ",\n".join(
        f"    {json.dumps(text)}: {json.dumps(ids, separators=(',', ':'))}"
        for text, ids in golden.pop("ids").items()
    )
    head = json.dumps(golden, indent=2).removesuffix("\n}")
    GOLDEN.write_text(f'{head},\n  "ids": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
