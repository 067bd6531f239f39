"""What a model answers, beside what its data say.

    python -m gemma_lora.generate --config C [--adapter DIR] --config.data.path=F --out FILE.jsonl
    python -m gemma_lora.generate --config C [--adapter DIR] --prompt TEXT

The first takes the data as gemma_lora.evaluate does (data.path or data.source, at most data.limit
rows), lets the model complete every prompt, writes a line an example (id, prompt, completion,
answer: what the model wrote, tokens, stopped: whether it ended by itself, exact, right) and prints
one JSON line with 95 % Wilson intervals:

  exact_match      answer and completion are the same text, but for white space around them
  answer_accuracy  both arrive at the same number, the one after ####, or else the last of the text;
                   of the examples whose completion has such a #### alone (GSM8K), lm-eval's
                   flexible-extract but that it prefers the marked number. Nothing but EOS and --new
                   ends an answer: a base model that goes on with a next question is judged by that

The second prints the answer to TEXT, which goes to the model as it is or, with data.chat, as the
user's turn. Without --adapter it is the base model that answers. Dropout is off. One process.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from gemma_lora.compiled import keep_compiled
from gemma_lora.config import check, parse_flags
from gemma_lora.data import sources
from gemma_lora.data.examples import Example, check_vocabulary, control_end, tokenize
from gemma_lora.decode import Sampling, continuations, require_usable
from gemma_lora.errors import UserError, run_main
from gemma_lora.evaluate import adapter_of, loaded, measured, opened
from gemma_lora.files import path_of, require_writable, write_text
from gemma_lora.metrics import finite, say
from gemma_lora.stats import wilson
from gemma_lora.sums import result
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights.pretrained import build_model


class Decoding(NamedTuple):
    """new: tokens of an answer, at most."""

    new: int = 256
    sampling: Sampling = Sampling()


def stop_ids(tokenizer: Tokenizer, chat: bool) -> list[int]:
    """EOS and, for conversations, the token by which the chat template ends a turn."""
    found = {tokenizer.eos_id}
    if chat:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.render_chat(turns)
        found.add(control_end(text, tokenizer.encode_batch([text])[0], tokenizer))
    return sorted(found - {None})


def prompt_ids(tokenizer: Tokenizer, text: str, chat: bool) -> np.ndarray:
    """[T] token ids of a prompt: with the BOS of a training row, in chat as the user's turn."""
    if chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.render_chat(turn, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    if not ids:
        raise UserError("command line: --prompt has no token")
    return np.array(ids, np.int32)


def compared(example: Example, answer: str) -> dict[str, Any]:
    """exact, and right: None where the completion arrives at no number after ####."""
    completion = example.text[example.completion : example.end]
    expected = result(completion) if "####" in completion else None
    return {
        "id": example.id,
        "prompt": example.text[: example.completion],
        "completion": completion,
        "answer": answer,
        "exact": answer.strip() == completion.strip(),
        "right": None if expected is None else result(answer) == expected,
    }


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of `compared` rows, which also have tokens and stopped."""
    found: dict[str, Any] = {"examples": len(rows), "tokens": sum(r["tokens"] for r in rows)}
    for name, key in (("exact_match", "exact"), ("answer_accuracy", "right")):
        of = np.array([r[key] for r in rows if r[key] is not None], bool)
        if of.size:
            found |= {name: float(of.mean()), f"{name}_95": wilson(of)}
    return found | {"stopped": float(np.mean([r["stopped"] for r in rows]))}


def generate(
    config: Any,
    adapter: pathlib.Path | None,
    out: pathlib.Path | None,
    prompt: str | None = None,
    decoding: Decoding = Decoding(),  # noqa: B008  a tuple
) -> dict[str, Any]:
    """The metrics of the config's data, with a row an example in `out`; or, of a prompt, its
    {"answer", "tokens", "stopped"}.

    adapter: a PEFT adapter directory; None: the base model.
    """
    check(config)
    require_usable(*decoding)
    where = config.data.path or config.data.source
    if prompt is None:
        sources.check_place(config.data.source, config.data.path)
        require_writable(out)
    mesh, pretrained, wrap, lora = opened(config, adapter)
    tokenizer, examples = pretrained.tokenizer(), []
    if prompt is None:
        rows = sources.read(config.data.source, config.data.path, config.data.limit)
        found = tokenize(rows, tokenizer, config.data, where)
        examples = [e for e in found.examples if e.answer_from > 0]
        if not examples:
            raise UserError(
                f"{where}: no prompt is shorter than data.seq_len={config.data.seq_len}"
            )
        check_vocabulary(examples, pretrained.arch.vocab)
        prompts = [e.tokens[: e.answer_from] for e in examples]
    else:
        prompts = [prompt_ids(tokenizer, prompt, config.data.chat)]
    model = build_model(pretrained.arch, config, wrap, mesh)
    base, lora = loaded(pretrained, model, lora, mesh)
    stops = stop_ids(tokenizer, config.data.chat)
    size = config.data.batch_size if prompt is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def answers() -> Iterator[tuple[int, dict[str, Any]]]:
        how = {"rows": size, "seed": config.seed, **decoding._asdict()}
        for i, ids in continuations(model, base, lora, prompts, stops, **how):
            stopped = int(ids[-1]) in stops
            text = tokenizer.decode(ids[:-1] if stopped else ids)
            yield i, {"answer": text, "tokens": len(ids), "stopped": stopped}

    if prompt is not None:
        return next(answers())[1]
    console = Console(stderr=True)
    of = dict(track(answers(), "answering", len(prompts), console=console, transient=True))
    rows = [of[i] | compared(e, of[i]["answer"]) for i, e in enumerate(examples)]
    write_text(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    left_out = {"left_out": len(found.examples) - len(examples) + len(found.dropped)}
    how = decoding.sampling._asdict() | {"new": decoding.new}
    return finite(shares(rows) | left_out | measured(config, where, adapter) | how)


def main() -> None:
    default = Decoding()
    flags.DEFINE_string("adapter", None, "A PEFT adapter directory; without it, the base model.")
    flags.DEFINE_string("out", None, "File of JSON lines that takes the answers.")
    flags.DEFINE_string("prompt", None, "A text to answer, in place of the data.")
    flags.DEFINE_integer("new", default.new, "Tokens of an answer, at most.")
    flags.DEFINE_float("temperature", 0.0, "0: the likeliest token; else one is drawn.")
    flags.DEFINE_float("top_p", 1.0, "Draw of the likeliest tokens with this probability.")
    config = parse_flags(("config",))
    f = flags.FLAGS
    if (f.out is None) == (f.prompt is None):
        raise UserError("command line: one of --out and --prompt must be given")
    if f.out == "":
        raise UserError("command line: --out is empty, expected the name of a file")
    sampling = Sampling(f.temperature, f.top_p)
    out = None if f.out is None else path_of(f.out)
    keep_compiled()
    found = generate(config, adapter_of(f.adapter), out, f.prompt, Decoding(f.new, sampling))
    say(found["answer"] if out is None else json.dumps(found))


if __name__ == "__main__":
    run_main(main)
