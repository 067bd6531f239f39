"""Workdirs for the tests of the report: what a run leaves, made without a run."""

import json
import pathlib
import re

import numpy as np
import pyarrow
import pyarrow.parquet

from gemma_lora import config, report

N = 40  # examples of each split
STEPS = 60


def table(split: str, step: int, tokens, nll, correct=None) -> dict[str, np.ndarray]:
    """Ledger rows of a split; ids e000, e001, ..."""
    n, tokens, nll = len(tokens), np.asarray(tokens), np.asarray(nll, float)
    return {
        "id": np.array([f"e{i:03d}" for i in range(n)], object),
        "split": np.array([split] * n, object),
        "step": np.full(n, step),
        "tokens": tokens,
        "nll": nll,
        "nll_max": nll / tokens * 2,
        "correct": tokens // 2 if correct is None else np.asarray(correct),
        "margin": np.zeros(n),
        "el2n": np.zeros(n),
        "label": np.full(n, -1),
        "label_p": np.zeros((n, 0)),
        "token_nll": lists(np.full(k, x / k, np.float32) for k, x in zip(tokens, nll, strict=True)),
    }


def lists(rows) -> np.ndarray:
    """One array of objects of any number of arrays."""
    rows = list(rows)
    out = np.empty(len(rows), object)
    out[:] = rows
    return out


def put_eval(workdir: pathlib.Path, step: int, parts: list[dict]) -> None:
    columns = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    # Order must not matter: rows are written shuffled.
    order = np.random.default_rng(step).permutation(len(columns["id"]))
    path = workdir / "ledger" / f"eval_{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {k: v[order] for k, v in columns.items()} | {
        "label_p": list(columns["label_p"][order])
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def put_rest(workdir, texts, evals, train, status="finished", schedule="linear", **run) -> None:
    c = config.to_dict(config.default())
    c["optim"]["schedule"] = schedule
    c["data"]["template"] = "Question: {question}\nAnswer: {answer}"
    c["data"]["loss_on"] = "completion"
    c["lora"]["targets"] = "attn|mlp"
    (workdir / "config.json").write_text(json.dumps(c))
    record = {
        "status": status, "arch": "gemma3_270m", "weights": "demo", "trainable_parameters": 1234567,
        "base_parameters": 268098176, "adapted_modules": 126,
        "examples": {"train": 540, "validation": N, "train_probe": N, "truncated": 3, "dropped": 1},
        "steps_planned": STEPS, "steps_per_epoch": 20, "steps": len(train), "tokens": 98765,
        "loss_tokens": 43210, "seconds": 321.5, "phases": {"steps": 4.0 * len(train)}, "nan": None,
        "devices": "1 x cpu", "versions": {"jax": "0.7"}, "data_fingerprint": "ab12",
        "best_step": 0, "best_loss": 0.0, "peak_memory": {"host": 3 * 2**30, "device": 2**30},
    }  # fmt: skip
    (workdir / "run.json").write_text(json.dumps(record | run))
    pairs = enumerate(train, 1)
    took = {"grad_norm": 0.5, "tokens": 1600, "step_seconds": 4.0}
    lines = [{"kind": "train", "step": i, "loss": x, "lr": lr} | took for i, (x, lr) in pairs]
    for step in evals:
        names = ("eval_loss", "eval_mean_token_accuracy")
        keys = [f"{s}/trl_compat/{n}" for s in report.SPLITS for n in names]
        line = {"kind": "eval", "step": step}
        lines.append(line | {k: 0.125 + step / 1000 + i for i, k in enumerate(keys)})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    examples = {
        "id": [f"e{i:03d}" for i in range(len(texts))] + ["e000"],
        "split": ["validation"] * len(texts) + ["train"],
        "text": [*texts, "a text of the training set"],
        "completion": [0] * (len(texts) + 1),
        "length": [50] * (len(texts) + 1),
        "prompt_targets": [0] * (len(texts) + 1),
    }
    path = workdir / "ledger" / "examples.parquet"
    pyarrow.parquet.write_table(pyarrow.table(examples), path)


def make(workdir: pathlib.Path, losses=(2.0, 1.0, 1.5), probe=(2.0, 0.8, 0.5), n=N, **kw):
    """A run whose token-weighted losses are exactly `losses`; evals every 20 steps."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(4, 40, n)
    noise = rng.normal(0, 0.2, (len(losses), n)) * tokens
    noise -= tokens * (noise.sum(1) / tokens.sum())[:, None]  # sums to zero over the tokens
    steps = kw.pop("steps", [20 * i for i in range(len(losses))])
    for i, step in enumerate(steps):
        right = (tokens * (0.25 + 0.25 * i)).astype(int)
        parts = [
            table("validation", step, tokens, losses[i] * tokens + noise[i], right),
            table("train_probe", step, tokens, probe[i] * tokens + noise[-1 - i], right),
        ]
        put_eval(workdir, step, parts)
    lowest = min(range(len(losses)), key=lambda i: np.nan_to_num(losses[i], nan=np.inf))
    kw.setdefault("best_step", steps[lowest])
    train = kw.pop("train", [(3 * 0.98**i, 1e-4 * (1 - i / STEPS)) for i in range(STEPS)])
    texts = kw.pop("texts", [f"text of {i}" for i in range(n)])
    put_rest(workdir, texts, steps, train, **kw)
    return workdir


def gsm8k(workdir: pathlib.Path, validation: int, train: int, steps=(0, 20, 40, 60), **run):
    """A run on GSM8K's kind of rows that looked at all training examples, with texts of tokens."""
    rng = np.random.default_rng(1)
    rows = []
    for split, count in (("train", train), ("validation", validation)):
        for i in range(count):
            a, b = (int(x) for x in rng.integers(2, 99, 2))
            answer = f"It is {a}+{b} = <<{a}+{b}={a + b}>>{a + b}.\n" + "So it is. " * (i % 7)
            prompt = f"What is {a} plus {b}?\n"
            text = prompt + answer + f"\n#### {a + b}"
            pieces = [*re.findall(r"<<|>>|####|\d|\s?\w+|\s|[^\w\s]", text[len(prompt) :]), "<eos>"]
            rows.append({
                "id": f"{split}-{i}", "split": split, "text": text, "completion": len(prompt),
                "end": len(text),
                "length": len(pieces) + 9, "prompt_targets": 0, "label": -1, "pieces": pieces,
            })  # fmt: skip
    probe = [r | {"split": "train_probe"} for r in rows[: min(40, train)]]
    for n, step in enumerate(steps):
        parts = []
        for part in (rows[train:], probe, rows[:train]):
            hard = np.random.default_rng(9).gamma(2, 0.5, len(part))  # the same at each step
            each = [
                rng.gamma(1, max(0.05, h / (1 + n)), len(r["pieces"])).astype(np.float32)
                for r, h in zip(part, hard, strict=True)
            ]
            tokens = [len(x) for x in each]
            columns = table(part[0]["split"], step, tokens, [x.sum(dtype=float) for x in each])
            right = [int((x < 0.7).sum()) for x in each]
            ids = np.array([r["id"] for r in part], object)
            parts.append(columns | {"id": ids, "token_nll": lists(each), "correct": right})
        put_eval(workdir, step, parts)
    train_lines = [(3 * 0.98**i, 1e-4 * (1 - i / STEPS)) for i in range(STEPS)]
    put_rest(workdir, [], steps, train_lines, best_step=steps[-1], **run)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows + probe), workdir / "ledger" / "examples.parquet"
    )
    return workdir
