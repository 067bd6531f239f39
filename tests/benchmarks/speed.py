"""Our step against PEFT's in one run: seconds, tokens a second, memory, in turn on the same rows.

    python tests/benchmarks/speed.py DIRECTORY --data gsm8k/train.jsonl [--peft-python PYTHON]

DIRECTORY takes the jobs and results.json. PYTHON is an interpreter with the extras
`demo,parity` (this one, unless given). GSM8K's rows: objects with question and answer, one a line.

Every competitor is a process of its own, so that its peak memory is its own; they work one after
the other, round after round, and the figures are medians over the rounds. Cases:
  full    rows of real text without padding, every token carries loss: the same padded work
  recipe  the rows of GSM8K as a user has them: ours packed to 576, loss on the completion; PEFT
          padded to the longest of its batch, loss on all tokens (its default) and on the completion
  eval    loss and accuracy of padded rows, every real token a target; ours packed to 576, too
  forward the decoder without its head
  parts   our step with and without the adapters' products and dropout
  growth  batches and lengths
  peers   ours and the JAX peers on the rows of full: tunix and KerasHub, where --tunix-python
          (with google-tunix) and --keras-python (with keras-hub) name an interpreter
  peers-recipe  the same on the rows of recipe, loss on the completion; the peers do not pack, and
          pad every row to one length: 576, which keeps all rows whole
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import protocol
from rich.console import Console
from rich.table import Table

from gemma_lora.config import default
from gemma_lora.data.dataset import Dataset, loss_slots
from gemma_lora.data.examples import Example, tokenize
from gemma_lora.weights.pretrained import open_weights

HERE = pathlib.Path(__file__).parent
Batches = list[dict[str, np.ndarray]]

# PEFT's forms: float32 or bfloat16 weights, autocast, torch.compile of the decoder, and the loss
# on every position as transformers computes it or on target tokens alone ('select').
PEFT = {
    "float32": {"dtype": "float32"},
    "float32 select": {"dtype": "float32", "select": True},
    "float32 compiled": {"dtype": "float32", "compile": True},
    "float32 compiled select": {"dtype": "float32", "compile": True, "select": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 compiled": {"dtype": "bfloat16", "compile": True},
    "bfloat16 autocast compiled": {"dtype": "bfloat16", "autocast": True, "compile": True},
}
OURS = {
    "float32": {"dtype": "float32"},
    "float32 floor": {"dtype": "float32", "head.floor": 2.0**-14, "head.chunk": 1024},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 floor": {"dtype": "bfloat16", "head.floor": 2.0**-14, "head.chunk": 1024},
}
# The JAX peers, as their workers build them: see there where they differ from PEFT's adapters.
TUNIX = {
    "float32": {"dtype": "float32", "dropout": 0.1},
    "float32 no dropout": {"dtype": "float32", "dropout": 0.0},
    "bfloat16": {"dtype": "bfloat16", "dropout": 0.1},
}
KERAS = {
    "float32": {"dtype": "float32", "targets": "all"},
    "float32 query value": {"dtype": "float32", "targets": "default"},
    "bfloat16": {"dtype": "bfloat16", "targets": "all"},
}


class Worker:
    """A competitor's process."""

    def __init__(self, python: str, kind: str, path: pathlib.Path, preload: str):
        environment = dict(os.environ)
        if preload:
            environment["LD_PRELOAD"] = preload
        self._process = subprocess.Popen(
            [python, str(HERE / f"{kind}_worker.py"), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts = self._answer()

    def work(self) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # _answer says that it has ended
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print, too
                return json.loads(line)
        raise SystemExit(
            f"a worker ended with code {self._process.wait()} (-9: most likely memory was short "
            f"for all competitors at once; ask for fewer): {' '.join(self._process.args)}"
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Rows:
    """GSM8K's rows in the forms that the cases need."""

    def __init__(self, path: pathlib.Path):
        rows = [json.loads(line) for line in path.read_text().splitlines()[:800]]
        self._rows = [{**row, "id": str(i)} for i, row in enumerate(rows)]
        self._tokenizer = open_weights("demo", "gemma3_270m").tokenizer()

    def examples(self, loss_on: str, length: int) -> list[Example]:
        data = default().data
        data.loss_on, data.seq_len = loss_on, length
        return tokenize(self._rows, self._tokenizer, data, "rows").examples

    def full(self, batch: int, length: int, count: int) -> Batches:
        """Text without gaps: every token but a row's first is a target."""
        text = np.concatenate([e.tokens for e in self.examples("all", 1024)])
        tokens = text[: count * batch * length].reshape(count, batch, length)
        mask = np.ones(tokens.shape, bool)
        mask[..., 0] = False
        return [{"tokens": t, "mask": m} for t, m in zip(tokens, mask, strict=True)]

    def padded(self, loss_on: str, batch: int, length: int, count: int, longest: bool) -> Batches:
        """Rows padded to `length`, or to the longest of their batch."""
        found = self.examples(loss_on, length)
        slots = np.array(loss_slots(found, length, False))
        out = []
        for n in range(count):
            part = found[n * batch : (n + 1) * batch]
            width = max(len(e.tokens) for e in part) if longest else length
            tokens, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
            for r, e in enumerate(part):
                tokens[r, : len(e.tokens)] = e.tokens
                mask[r, e.loss_from : len(e.tokens)] = True
            out.append({"tokens": tokens, "mask": mask, "slots": slots})
        return out

    def packed(self, loss_on: str, batch: int, length: int, count: int) -> tuple[Batches, float]:
        """Our packed batches of all rows; and the examples a batch."""
        found = self.examples(loss_on, length)
        data = Dataset(
            found,
            shapes={length: loss_slots(found, length, True)},
            batch_size=batch,
            pack=True,
            seed=0,
            shuffle=True,
        )
        out = []
        for i in range(count):
            arrays = data.batch_at(i).arrays
            mask = np.zeros(arrays["tokens"].shape, bool)
            row, at = np.nonzero(arrays["loss_mask"])
            mask[row, arrays["loss_pos"][row, at] + 1] = True
            kept = {k: arrays[k] for k in ("tokens", "segments", "positions")}
            out.append(kept | {"mask": mask, "slots": np.array(data.shapes[length])})
        return out, len(found) / data.steps_per_epoch


class Bench:
    """Starts competitors, lets them work in turn, prints a case's table."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self.rows = Rows(options.data)
        self._arch = open_weights("demo", "gemma3_270m").arch
        self._results: list[dict[str, Any]] = []
        self._peak = 0.0

    def ours(self, name: str, work: str, batches: Batches, **more: Any) -> dict[str, Any]:
        """A competitor: our worker in a form of OURS."""
        config = {**OURS[name], "unroll": self._options.unroll}
        job = {"work": work, "config": config, "adapters": "lora", **more}
        return {"name": f"gemma_lora {name}", "kind": "our", "job": job, "batches": batches}

    def peft(self, name: str, work: str, batches: Batches, **more: Any) -> dict[str, Any]:
        """A competitor: PEFT's worker in a form of PEFT."""
        usual = {"autocast": False, "compile": False, "select": False, "dynamic": None}
        job = {"work": work, **usual, **PEFT[name], **more}
        return {"name": f"PEFT {name}", "kind": "peft", "job": job, "batches": batches}

    def peers(self, batches: Batches) -> list[dict[str, Any]]:
        """Competitors: the forms asked for of the JAX peers that have an interpreter."""
        options, train = self._options, {"work": "train"}
        found = [("tunix", "tunix", n, TUNIX[n]) for n in options.tunix if options.tunix_python]
        found += [("KerasHub", "keras", n, KERAS[n]) for n in options.keras if options.keras_python]
        return [
            {"name": f"{label} {n}", "kind": kind, "job": train | form, "batches": batches}
            for label, kind, n, form in found
        ]

    def run(self, case: str, competitors: Iterable[dict[str, Any]]) -> None:
        """Medians over the rounds, in a table; each competitor's rows go to results.json."""
        options = self._options
        entered = list(competitors)
        workers = []
        for i, c in enumerate(entered):
            path = options.directory / f"{case}-{i}.json"
            protocol.write_job(path, c["job"] | {"threads": os.cpu_count()}, c["batches"])
            python = getattr(options, f"{c['kind']}_python", sys.executable)
            workers.append(Worker(python, c["kind"], path, options.preload))
        answers: list[list[dict[str, Any]]] = [[] for _ in workers]
        for _ in range(options.rounds):
            for worker, found in zip(workers, answers, strict=True):
                found.append(worker.work())
        for worker in workers:
            worker.close()
        self._peak = max([self._peak, *(w.facts.get("peak_flops", 0) for w in workers)])
        rows = [
            self._row(case, c, w.facts, found)
            for c, w, found in zip(entered, workers, answers, strict=True)
        ]
        self._results += rows
        text = json.dumps(self._results, indent=1)
        (options.directory / "results.json").write_text(text + "\n")
        _print(case, rows, options.rounds)

    def _row(self, case, competitor, facts, answers) -> dict[str, Any]:
        work, batches = competitor["job"]["work"], competitor["batches"]
        ran = [batches[a["batch"]] for a in answers]
        seconds = statistics.median(a["seconds"] for a in answers)
        a, passes = self._arch, 2 if work == "train" else 1
        layer = a.embed * a.head_dim * 2 * (a.heads + a.kv_heads) + 3 * a.embed * a.hidden
        per_token = 2 * passes * a.layers * layer
        per_target = 2 * passes * a.vocab * a.embed * (work != "forward")
        mean = lambda count: statistics.mean(count(b) for b in ran)  # noqa: E731
        padded, real = mean(lambda b: b["tokens"].size), mean(_real)
        targets = mean(lambda b: int(b["mask"].sum()))
        return {
            "case": case,
            "competitor": competitor["name"],
            "seconds": seconds,
            "cpu_seconds": statistics.median(a["cpu_seconds"] for a in answers),
            "padded_tokens_per_second": padded / seconds,
            "real_tokens_per_second": real / seconds,
            "loss_tokens_per_second": targets / seconds,
            "examples_per_second": competitor.get("examples", batches[0]["tokens"].shape[0])
            / seconds,
            "peak_gib": max(x["peak_bytes"] for x in answers) / 2**30,
            "warm_up_seconds": facts["warm_up_seconds"] - len(batches) * seconds,
            # Of the products that the model itself asks for, on real tokens.
            "of_matmul_peak": (real * per_token + targets * per_target) / seconds / self._peak,
            "last_loss": answers[-1]["loss"],
        }


def _real(batch: dict[str, np.ndarray]) -> int:
    """Tokens that are not padding: of a segment, or before the row's last target."""
    if "segments" in batch:
        return int((batch["segments"] > 0).sum())
    length = batch["mask"].shape[1]
    return int((length - batch["mask"][:, ::-1].argmax(1)).sum())


def _print(case: str, rows: list[dict[str, Any]], rounds: int) -> None:
    table = Table(title=f"{case}: medians of {rounds} rounds, in turn")
    heads = {
        "seconds": ("s", ".2f"),
        "cpu_seconds": ("CPU s", ".2f"),
        "padded_tokens_per_second": ("padded tok/s", ",.0f"),
        "real_tokens_per_second": ("real tok/s", ",.0f"),
        "loss_tokens_per_second": ("loss tok/s", ",.0f"),
        "examples_per_second": ("examples/s", ".2f"),
        "peak_gib": ("peak GiB", ".2f"),
        "warm_up_seconds": ("compile s", ".0f"),
        "of_matmul_peak": ("of peak", ".0%"),
        "last_loss": ("loss", ".4f"),
    }
    table.add_column("")
    for name, _ in heads.values():
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["competitor"], *(format(row[k], f) for k, (_, f) in heads.items()))
    Console(width=150).print(table)


def cases(bench: Bench, rows: Rows, options: argparse.Namespace) -> Iterator[tuple[str, list]]:
    """(name, competitors) of every case that was asked for."""
    ours, peft, n = options.ours, options.peft, 2
    if "full" in options.cases:
        batches = rows.full(4, 256, n)
        yield (
            "full",
            [
                *(bench.ours(o, "train", batches) for o in ours),
                *(bench.peft(p, "train", batches) for p in peft),
            ],
        )
    if "recipe" in options.cases:
        packed, examples = rows.packed("completion", 2, 576, n)
        everything = rows.padded("all", 4, 256, 4, longest=True)
        completion = rows.padded("completion", 4, 256, 4, longest=True)
        completing = {"name": f"PEFT {peft[-1]} completion"}
        yield (
            "recipe",
            [
                *(bench.ours(o, "train", packed) | {"examples": examples} for o in ours),
                *(bench.peft(p, "train", everything, dynamic=True) for p in peft),
                bench.peft(peft[-1], "train", completion, dynamic=True) | completing,
            ],
        )
    if "eval" in options.cases:
        batches = rows.padded("all", 4, 256, n, longest=False)
        packed, examples = rows.packed("all", 2, 576, 2 * n)
        as_packed = {"name": f"gemma_lora {ours[0]} packed", "examples": examples}
        yield (
            "eval",
            [
                *(bench.ours(o, "eval", batches) for o in ours),
                bench.ours(ours[0], "eval", packed) | as_packed,
                *(bench.peft(p, "eval", batches) for p in peft),
            ],
        )
    if "forward" in options.cases:
        batches = rows.full(4, 256, n)
        yield (
            "forward",
            [
                *(bench.ours(o, "forward", batches) for o in ours),
                *(bench.peft(p, "forward", batches) for p in peft),
            ],
        )
    if "parts" in options.cases:
        batches = rows.full(4, 256, n)
        yield (
            "parts",
            [
                *(bench.ours(o, "train", batches) for o in ours),
                *(
                    bench.ours(o, "train", batches, adapters="none")
                    | {"name": f"gemma_lora {o}, no adapter products"}
                    for o in ours
                ),
            ],
        )
    if "growth" in options.cases:
        for batch, length in (
            (1, 256),
            (2, 256),
            (4, 256),
            (8, 256),
            (4, 128),
            (4, 512),
            (2, 1024),
        ):
            batches = rows.full(batch, length, 1)
            yield (
                f"growth {batch} x {length}",
                [
                    *(bench.ours(o, "train", batches) for o in ours),
                    *(bench.peft(p, "train", batches) for p in peft),
                ],
            )
    if "peers" in options.cases:
        batches = rows.full(4, 256, n)
        yield "peers", [*(bench.ours(o, "train", batches) for o in ours), *bench.peers(batches)]
    if "peers-recipe" in options.cases:
        packed, examples = rows.packed("completion", 2, 576, n)
        fixed = rows.padded("completion", 2, 576, n, longest=False)
        same = (bench.ours(o, "train", packed) | {"examples": examples} for o in ours)
        yield "peers-recipe", [*same, *bench.peers(fixed)]


def main() -> None:
    known = ("full", "recipe", "eval", "forward", "parts", "growth", "peers", "peers-recipe")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--peft-python", default=sys.executable)
    parser.add_argument("--tunix-python", help="an interpreter with google-tunix")
    parser.add_argument("--keras-python", help="an interpreter with keras-hub")
    parser.add_argument("--preload", default="", help="a malloc library, such as libtcmalloc.so")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unroll", action="store_true", help="our loop over layers unrolled")
    parser.add_argument("--cases", nargs="+", choices=known, default=known[:-3])
    parser.add_argument("--ours", nargs="*", choices=OURS, default=["float32", "float32 floor"])
    parser.add_argument("--peft", nargs="*", choices=PEFT, default=list(PEFT))
    parser.add_argument("--tunix", nargs="*", choices=TUNIX, default=["float32"])
    parser.add_argument("--keras", nargs="*", choices=KERAS, default=["float32"])
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for case, competitors in cases(bench, bench.rows, options):
        bench.run(case, competitors)


if __name__ == "__main__":
    main()
