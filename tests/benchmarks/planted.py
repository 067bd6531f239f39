"""Noise planted in real data, a run trained on it: how well does every outlier score find it again?

    python tests/benchmarks/planted.py DIRECTORY --data gsm8k/train.jsonl \\
        --kinds swap:0.05 final:0.05 --config configs/gemma3_270m_gsm8k.py [--set data.seq_len=128]

DIRECTORY takes seed-N/ (data.jsonl, planted.json, run/), results.json and results.md. The same
command continues where it was interrupted. --rows rows of the file are trained on and --validation
others, which stay clean, are validated on; both by a hash of their ids, the same for every seed.
KIND:SHARE, of all rows, may be several: noise.py lists them.
--natural N writes natural.md: the N most suspicious rows of the first seed that nothing was planted
in, to be judged by hand. --consequence trains the first seed again without the most suspicious
rows, and without as many random ones.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
from detection import Measured, measure, resampled, summary
from noise import Row, plant_all
from rich.console import Console
from rich.table import Table

from gemma_lora import outliers
from gemma_lora.config import differences
from gemma_lora.data import sources
from gemma_lora.errors import UserError, run_main
from gemma_lora.evaluate import read_table
from gemma_lora.files import sha256, write_text
from gemma_lora.stats import bootstrap, interval

DONE = ("finished", "stopped early")  # what run.json calls a run that is over

# ---- runs ---------------------------------------------------------------------------------------


def _command(home: pathlib.Path, module: str, *arguments: str) -> None:
    """Runs a module of the package; its seconds are added to home/seconds.json."""
    began, path = time.monotonic(), home / "seconds.json"
    process = subprocess.Popen([sys.executable, "-m", f"gemma_lora.{module}", *arguments])
    try:
        process.wait()
    except KeyboardInterrupt:  # it got the signal, too, and saves where it is
        process.wait()
        raise
    finally:
        seconds = json.loads(path.read_text()) if path.exists() else {}
        spent = seconds.get(module, 0.0) + time.monotonic() - began
        write_text(path, json.dumps(seconds | {module: spent}) + "\n")
    if process.returncode:
        raise SystemExit(f"gemma_lora.{module} ended with code {process.returncode}")


def train(
    options: argparse.Namespace, home: pathlib.Path, name: str, seed: int, **forced: Any
) -> pathlib.Path:
    """Trains home/name on home/data.jsonl, unless that is done; returns it.

    forced: keys that go before --set, as that goes before what is usual here.
    """
    workdir = home / name
    record = workdir / "run.json"
    if record.exists() and json.loads(record.read_text())["status"] in DONE:
        return workdir
    values = {"seed": seed, "train.ledger_every": 0.5} | options.set | forced
    values |= {"data.path": home / "data.jsonl"}
    values |= {"data.validation_path": options.directory / "validation.jsonl"}
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    _command(home, "train", "--config", options.config, "--workdir", str(workdir), *flags)
    return workdir


def competitors(workdir: pathlib.Path, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The ids of the training examples, and every score with those that know nothing of a model."""
    columns = outliers.score(workdir)
    ids, tokens = columns.pop("id"), columns.pop("tokens")
    drawn = np.random.default_rng(seed).random(len(ids))
    return ids, columns | {"random": drawn, "tokens": tokens, "short": -tokens}


def natural(workdir: pathlib.Path, columns: dict[str, Any], clean: np.ndarray, top: int) -> str:
    """natural.md: the `top` rows of those in `clean` with the highest 'combined', for a verdict."""
    examples = {e["id"]: e for e in outliers.read_examples(workdir, "train")}
    worst = [i for i in np.argsort(-columns["combined"], kind="stable") if clean[i]][:top]
    lines = ["# The most suspicious rows that nothing was planted in", ""]
    for place, i in enumerate(worst, 1):
        e = examples[columns["id"][i]]
        shown = ", ".join(f"{k} {v[i]:.3g}" for k, v in columns.items() if k != "id")
        lines += [f"## {place}. {e['id']}", "", shown, "", "Verdict:", ""]
        lines += ["    " + line for line in e["prompt"].splitlines()]
        lines += ["", "Completion:", "", *("    " + x for x in e["answer"].splitlines()), ""]
    return "\n".join(lines)


def consequence(
    options: argparse.Namespace, home: pathlib.Path, seed: int, columns: dict[str, Any], k: int
) -> dict[str, Any]:
    """Differences of validation loss, with intervals: all rows, without the top k, without any k.

    Every run counts as its adapter does, at the step of its best validation loss.
    """
    worst = columns["id"][np.argsort(-columns["combined"], kind="stable")[:k]]
    drawn = np.random.default_rng(seed).choice(columns["id"], k, replace=False)
    runs = {"everything": home / "run"}
    for name, ids in (("without_top", worst), ("without_random", drawn)):
        path, text = home / f"{name}.txt", "".join(f"{i}\n" for i in ids)
        if path.exists() and path.read_text() != text:
            raise SystemExit(
                f"{path} names other rows than the scores do now: remove it and {home / name}"
            )
        write_text(path, text)
        forced = {"data.exclude": home / f"{name}.txt", "train.ledger_every": 0.0}
        runs[name] = train(options, home, name, seed, **forced)
    rows = {}
    for name, workdir in runs.items():
        best = json.loads((workdir / "run.json").read_text())["best_step"]
        path = workdir / "ledger" / f"eval_{best:06d}.parquet"
        table = read_table(path, ("id", "split", "tokens", "nll", "correct"))
        columns = {c: table.sort_by("id")[c].to_numpy() for c in table.column_names}
        rows[name] = {c: v[columns["split"] == "validation"] for c, v in columns.items()}
    out: dict[str, Any] = {"removed": k}
    for before, after in (
        ("everything", "without_top"),
        ("without_random", "without_top"),
        ("everything", "without_random"),
    ):
        a, b = rows[after], rows[before]
        change = float((a["nll"] - b["nll"]).sum() / b["tokens"].sum())
        limits = interval(bootstrap(b, a, seed)[:, 0])
        out[f"{after} - {before}"] = {"mean": change, "interval": limits, "seeds": [change]}
    return out


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Every seed, with results.json and results.md after each of them; returns the results."""
    results: dict[str, Any] = {"settings": _claim(options), "seconds": {}, "planted": {}}
    rows, validation = _chosen(options)
    write_text(options.directory / "validation.jsonl", _jsonl(validation))
    found: dict[int, dict[str, dict[str, Measured]]] = {}
    place, drawn = {row["id"]: i for i, row in enumerate(rows)}, resampled(len(rows))
    for seed in options.seeds:
        home = options.directory / f"seed-{seed}"
        noisy, planted = plant_all(rows, options.kinds, seed)
        write_text(home / "data.jsonl", _jsonl(noisy))
        write_text(home / "planted.json", json.dumps(planted, indent=1) + "\n")
        workdir = train(options, home, "run", seed)
        if options.folds and not (workdir / "folds" / "scores.parquet").exists():
            _command(home, "folds", "--workdir", str(workdir), "--folds", str(options.folds))
        if options.unprompted and not (workdir / "unprompted.parquet").exists():
            _command(home, "unprompted", "--workdir", str(workdir), "--step", "last")
        ids, scores = competitors(workdir, seed)
        kinds = np.array([planted.get(i, "") for i in ids], object)
        times = drawn[:, [place[i] for i in ids]]
        found[seed] = {
            kind: {name: measure(score, kinds, kind, times) for name, score in scores.items()}
            for kind in options.kinds
        }
        results["seconds"][seed] = json.loads((home / "seconds.json").read_text())
        # Rows longer than data.seq_len may not have been trained on.
        results["planted"][seed] = {k: int((kinds == k).sum()) for k in options.kinds}
        if seed == options.seeds[0]:
            columns = {"id": ids, **scores}
            if options.natural:
                text = natural(workdir, columns, kinds == "", options.natural)
                write_text(options.directory / "natural.md", text)
            if options.consequence:
                k = int((kinds != "").sum())
                results["consequence"] = consequence(options, home, seed, columns, k)
        results["kinds"] = summary(found)
        write_text(options.directory / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(options.directory / "results.md", markdown(results))
    return results


def _claim(options: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on; UserError where DIRECTORY holds results of something else."""
    names = ("kinds", "rows", "validation", "config", "set", "folds", "unprompted")
    settings = {k: getattr(options, k) for k in names} | {"data_sha256": sha256(options.data)}
    path = options.directory / "settings.json"
    if path.exists() and (differ := differences(settings, json.loads(path.read_text()))):
        raise UserError(f"{options.directory} holds another benchmark: {'; '.join(differ)}")
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return settings


def _chosen(options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """(rows to plant in, clean ones to validate on), by a hash of their ids: FILE may be sorted."""
    rows = sources.read("", str(options.data), 0)
    n, needed = options.rows, options.rows + options.validation
    if len(rows) < needed:
        raise UserError(f"{options.data} has {len(rows)} rows, expected {needed} at least")
    rows.sort(key=lambda row: hashlib.sha256(f"planted/{row['id']}".encode()).digest())
    return rows[:n], rows[n:needed]


def _jsonl(rows: list[Row]) -> str:
    kept = [{k: v for k, v in row.items() if k != sources.LINE} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in kept)


# ---- tables -------------------------------------------------------------------------------------

HEADS = ("score", "AUROC", "by seed", "average precision", "precision at k", "combined - it", "NaN")


def _shown(x: dict[str, Any]) -> str:
    limits = x["interval"]
    return f"{x['mean']:.3f}" + (f" [{limits[0]:.3f}, {limits[1]:.3f}]" if limits else "")


def tables(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows of cells under HEADS) of every kind."""
    out = []
    for kind, scores in results["kinds"].items():
        counts = ", ".join(str(p[kind]) for p in results["planted"].values())
        cells = [
            (name, _shown(s["auroc"]), " ".join(f"{x:.3f}" for x in s["auroc"]["seeds"]),
             _shown(s["ap"]), _shown(s["precision_at_k"]), _shown(s["combined_minus"]),
             " ".join(map(str, s["missing"])) if any(s["missing"]) else "")
            for name, s in scores.items()
        ]  # fmt: skip
        out.append((f"{kind}: rows planted, by seed: {counts}", cells))
    return out


def notes(results: dict[str, Any]) -> list[str]:
    """What stands under the tables: the best score against 'combined', consequence, seconds."""
    out = []
    for kind, scores in results["kinds"].items():
        best = next(n for n in scores if n != "combined")
        shown = _shown(scores[best]["combined_minus"])
        out.append(f"{kind}: AUROC of combined minus that of the best other, {best}: {shown}")
    for name, x in results.get("consequence", {}).items():
        out.append(f"validation loss, {name}: {_shown(x)}" if " - " in name else f"{name}: {x}")
    for seed, seconds in results["seconds"].items():
        out.append(f"seed {seed}: " + ", ".join(f"{k} {v:,.0f} s" for k, v in seconds.items()))
    return out


def markdown(results: dict[str, Any]) -> str:
    about = "Means over seeds; 95 % intervals over resamples of the rows, which seeds share."
    lines = ["# How well outlier scores find planted noise", "", about]
    for title, cells in tables(results):
        lines += ["", f"## {title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (HEADS, ["---"] * len(HEADS), *cells)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results))]) + "\n"


def _show(results: dict[str, Any]) -> None:
    console = Console(width=150)
    for title, cells in tables(results):
        table = Table(*HEADS, title=title)
        for row in cells:
            table.add_row(*row)
        console.print(table)
    for note in notes(results):
        console.print(note, highlight=False)


def _pairs(separator: str, values: list[str], kind: type) -> dict[str, Any]:
    """['a=1'] -> {'a': kind('1')}; UserError for what has not that form."""
    try:
        return {k: kind(v) for k, v in (x.split(separator, 1) for x in values)}
    except ValueError as e:
        raise UserError(f"{' '.join(values)}: expected NAME{separator}VALUE each") from e


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--kinds", nargs="+", required=True, metavar="KIND:SHARE")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=100, help="clean rows to validate on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--folds", type=int, default=2, help="0: no out-of-fold scores")
    parser.add_argument("--unprompted", action="store_true", help="losses without prompts, too")
    parser.add_argument("--natural", type=int, default=0)
    parser.add_argument("--consequence", action="store_true")
    options = parser.parse_args(arguments)
    options.kinds = _pairs(":", options.kinds, float)
    options.set = _pairs("=", options.set, str)
    _show(benchmark(options))


if __name__ == "__main__":
    run_main(main)
