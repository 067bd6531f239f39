"""Evaluation of a whole set: metrics and one ledger row per example, from the same sums.

    python -m gemma_lora.evaluate --config C [--adapter DIR] --config.data.path=F --out DIR

prints one JSON line, which names the data, the weights and the base that the adapter says it was
made on (one base may have two names: they are not compared), and writes DIR/ledger/*.parquet. It
takes data.path or data.source, whole but for data.limit: data.validation_path, data.exclude and
train.eval_examples are of a run. Without --adapter it evaluates the base model.
On several hosts each process gets the command, with the flags of gemma_lora/distributed.py.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import scipy
from absl import flags
from jax.sharding import Mesh

from gemma_lora import distributed
from gemma_lora.compiled import keep_compiled
from gemma_lora.config import check, parse_flags, to_dict
from gemma_lora.data import sources
from gemma_lora.data.dataset import Batch, Dataset, shapes
from gemma_lora.data.examples import check_vocabulary, tokenize
from gemma_lora.data.pipeline import dataset
from gemma_lora.errors import UserError, one_line
from gemma_lora.files import path_of, replace_file
from gemma_lora.metrics import finite, say
from gemma_lora.model import Transformer, Wrap, no_wrap
from gemma_lora.sharding import check_rows, make_mesh, to_global, tree_shardings
from gemma_lora.step import jit_eval_step
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import peft
from gemma_lora.weights.pretrained import Pretrained, build_model, load_base, open_weights

# The columns of a ledger row; nll in nats, sums and largest in float64 over the example's tokens.
COLUMNS = {
    "id": pyarrow.string(),
    "split": pyarrow.string(),
    "step": pyarrow.int64(),
    "tokens": pyarrow.int64(),
    "nll": pyarrow.float64(),
    "nll_max": pyarrow.float64(),
    "correct": pyarrow.int64(),
    "margin": pyarrow.float64(),
    "el2n": pyarrow.float64(),
    "label": pyarrow.int64(),
    "label_p": pyarrow.list_(pyarrow.float64()),
    "token_nll": pyarrow.list_(pyarrow.float32()),
}

# The columns of a row of an example as a training step saw it: dropout on, before the update; of
# the completion's tokens alone.
SEEN = {k: COLUMNS[k] for k in ("id", "step", "tokens", "nll", "nll_max")}


class StoppedError(Exception):
    """An evaluation was asked to stop; nothing is kept of it."""


def ledger_rows(
    eval_step: Callable,
    lora: Any,
    base: Any,
    data: Dataset,
    mesh: Mesh,
    split: str,
    step: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray]:
    """Runs the set once, dropout off -> one row per example, in the set's order, as columns.

    eval_step gives every process the values of all rows. Raises StoppedError at the first batch
    where `stop` says so.

    tokens: targets that carry loss; nll: their summed -log p; nll_max: the largest; correct: how
    many are the greedy choice; margin and el2n: means over those of the completion, or all where
    the row was cut before it. In classification, label:
    the index of the row's label word (else -1); label_p: the probabilities of all label words at
    the first token of the answer, given that it is one of them (else empty). token_nll: the -log p
    of each of the tokens, in their order.
    """
    n = len(data.examples)
    sums = {k: np.zeros(n) for k in ("tokens", "nll", "correct")}
    each: dict[str, list[np.ndarray]] = {k: [] for k in ("nll", "margin", "el2n")}
    largest = np.full(n, -np.inf)
    whose = []
    label_logits = np.full((n, len(data.label_tokens)), np.nan)

    def evaluated() -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
        """Each batch when the next is under way, as the devices need not wait for the host."""
        before = None
        for i in range(data.steps_per_epoch):
            if stop():
                raise StoppedError
            batch = data.batch_at(i)
            values = eval_step(lora, base, to_global(batch.arrays, mesh))
            if before is not None:
                yield before
            before = batch, values
        if before is not None:
            yield before

    for batch, on_device in evaluated():
        values = jax.device_get(on_device)
        owner, answer = batch.owner, batch.answer
        mine = owner >= 0
        if data.label_tokens:
            label_logits[owner[answer]] = values.pop("label_logits")[answer]
        np.add.at(sums["tokens"], owner[mine], 1)
        whose.append(owner[mine])
        for name, parts in each.items():
            parts.append(values[name][mine])
        for name in ("nll", "correct"):
            np.add.at(sums[name], owner[mine], values[name][mine].astype(np.float64))
        with np.errstate(invalid="ignore"):  # NaN stays NaN; the caller looks for it
            np.maximum.at(largest, owner[mine], values["nll"][mine].astype(np.float64))
    # An example's tokens are in one row of one batch, so a stable sort keeps their order.
    order = np.argsort(np.concatenate(whose), kind="stable")
    ends = np.cumsum(sums["tokens"].astype(np.int64))[:-1]
    by_example = {k: np.split(np.concatenate(x)[order], ends) for k, x in each.items()}
    token_nll = np.empty(n, object)
    token_nll[:] = by_example["nll"]

    def mean(name: str) -> np.ndarray:
        pairs = zip(by_example[name], data.examples, strict=True)
        parts = [completion_part(x, e.prompt_targets) for x, e in pairs]
        return np.array([x.mean(dtype=np.float64) for x in parts])

    return {
        "id": np.array([e.id for e in data.examples], object),
        "split": np.array([split] * n, object),
        "step": np.full(n, step, np.int64),
        "tokens": sums["tokens"].astype(np.int64),
        "nll": sums["nll"],
        "nll_max": largest,
        "correct": sums["correct"].astype(np.int64),
        "margin": mean("margin"),
        "el2n": mean("el2n"),
        "label": np.array([e.label for e in data.examples], np.int64),
        "label_p": scipy.special.softmax(label_logits, -1) if label_logits.size else label_logits,
        "token_nll": token_nll,
    }


def seen_rows(
    token_nll: jax.Array, owner: np.ndarray, data: Dataset, step: int
) -> list[dict[str, Any]]:
    """The rows SEEN of the examples of one training batch, from its token_nll, owner [B,C]."""
    whose, each = owner[owner >= 0], np.asarray(token_nll, np.float64)[owner >= 0]
    order = np.argsort(whose, kind="stable")  # keeps the order of an example's tokens
    members, first = np.unique(whose[order], return_index=True)
    rows = []
    for m, nll in zip(members, np.split(each[order], first[1:]), strict=True):
        nll = completion_part(nll, data.prompt_targets[m])
        sums = {"tokens": len(nll), "nll": nll.sum(), "nll_max": nll.max()}
        rows.append({"id": data.ids[m], "step": step, **sums})
    return rows


def completion_part(token_nll: np.ndarray, prompt_targets: int) -> np.ndarray:
    """The losses of the completion's tokens; where the row was cut before them, of all."""
    return token_nll[prompt_targets:] if prompt_targets < len(token_nll) else token_nll


def part_of(rows: dict[str, np.ndarray], ids: set[str], split: str) -> dict[str, np.ndarray]:
    """The rows of some examples, under the name of another split."""
    chosen = np.array([i in ids for i in rows["id"]])
    return {k: v[chosen] for k, v in rows.items()} | {"split": np.array([split] * chosen.sum())}


def metrics(rows: dict[str, np.ndarray], batch_size: int) -> dict[str, float]:
    """Token-weighted loss and accuracy of ledger rows, and TRL's versions under their own names.

    TRL's eval_loss and eval_mean_token_accuracy are means of per-batch token means, so they depend
    on the batch size: eval_loss, transformers' own, by the examples of a batch (which the last may
    have fewer of), the accuracy unweighted. In classification also class_accuracy: how often the
    row's own label word is the most probable one.
    """
    tokens, nll, correct = (rows[k].astype(np.float64) for k in ("tokens", "nll", "correct"))
    groups = np.arange(0, len(tokens), batch_size)
    per_batch, examples = (np.add.reduceat(x, groups) for x in (tokens, np.ones_like(tokens)))
    found = {
        "loss": float(nll.sum() / tokens.sum()),
        "token_accuracy": float(correct.sum() / tokens.sum()),
        "tokens": int(tokens.sum()),
        "examples": len(tokens),
        "trl_compat/eval_loss": float(
            np.average(np.add.reduceat(nll, groups) / per_batch, weights=examples)
        ),
        "trl_compat/eval_mean_token_accuracy": float(
            np.mean(np.add.reduceat(correct, groups) / per_batch)
        ),
    }
    labelled = rows["label"] >= 0
    if labelled.any():
        found["class_accuracy"] = float(np.mean(label_is_likeliest(rows)[labelled]))
    return found


def label_is_likeliest(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n] bool: the label is the likeliest of the label words; never where a p is not finite."""
    p = rows["label_p"]
    return np.isfinite(p).all(-1) & (p.argmax(-1) == rows["label"])


def write_ledger(path: pathlib.Path, parts: list[dict[str, np.ndarray]]) -> None:
    """One Parquet file of rows, written whole or not at all."""
    columns = {k: np.concatenate([p[k] for p in parts]) for k in COLUMNS}
    columns["label_p"] = list(columns["label_p"])  # a list a row
    write_table(path, pyarrow.table(columns, schema=pyarrow.schema(list(COLUMNS.items()))))


def write_examples(path: pathlib.Path, sets: dict[str, Dataset], tokenizer: Tokenizer) -> None:
    """What the ledger's ids stand for.

    id, split, text, completion: index of its first character; end: index behind its last; length:
    tokens, whether they carry loss or not; prompt_targets: how many of the tokens that carry loss
    lie before the completion; label: as in the ledger; pieces: the text of each token that carries
    loss.
    """

    @functools.cache
    def piece(token: int) -> str:
        return tokenizer.decode([token], skip_special=False)

    rows = [
        {"id": e.id, "split": split, "text": e.text, "completion": e.completion, "end": e.end,
         "length": len(e.tokens), "prompt_targets": e.prompt_targets,
         "label": e.label, "pieces": [piece(int(t)) for t in e.tokens[e.loss_from :]]}
        for split, data in sets.items()
        for e in data.examples
    ]  # fmt: skip
    write_table(path, pyarrow.Table.from_pylist(rows))


def write_seen(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """rows: of `seen_rows`."""
    write_table(path, pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(SEEN.items()))))


def write_table(path: pathlib.Path, table: pyarrow.Table) -> None:
    """A Parquet file, written whole or not at all."""
    with replace_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def column_names(path: pathlib.Path) -> list[str]:
    """Of a Parquet file that is there; raises UserError where it is none."""
    try:
        with path.open("rb") as f:
            return pyarrow.parquet.read_schema(f).names
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{path} is missing or damaged: {e}") from e


def read_table(path: pathlib.Path, columns: tuple[str, ...]) -> pyarrow.Table:
    """Some columns of a Parquet file; raises UserError where that fails."""
    try:
        with path.open("rb") as f, pyarrow.parquet.ParquetFile(f) as file:
            return file.read(list(columns)).select(columns)
    except (OSError, KeyError, pyarrow.ArrowException) as e:
        raise UserError(f"{path} is missing or damaged: {one_line(e)}") from e


def not_finite(rows: dict[str, np.ndarray]) -> list[str]:
    """Ids of the examples whose loss is infinite or no number."""
    return [i for i, nll in zip(rows["id"], rows["nll"], strict=True) if not math.isfinite(nll)]


def _make(out: pathlib.Path) -> None:
    """Makes --out; UserError where that fails."""
    try:
        (out / "ledger").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out} cannot be used: {e.strerror}") from e


def opened(
    config: Any, adapter: pathlib.Path | None
) -> tuple[Mesh, Pretrained, Wrap, dict[str, Any]]:
    """(mesh, base weights on the disk, what wraps the model, the adapter's tree on the host) of a
    config and a PEFT adapter directory; None: the base model."""
    mesh = make_mesh(config.mesh)
    check_rows(config.data.batch_size, mesh, config.train.micro_batches)
    if adapter:
        peft.require(adapter)
    pretrained = open_weights(config.weights, config.arch, config.weights_sha256, config.tokenizer)
    return mesh, pretrained, *(peft.read(adapter, pretrained.arch) if adapter else (no_wrap, {}))


def loaded(
    pretrained: Pretrained, model: Transformer, lora: dict[str, Any], mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(base, lora) of `opened` on the devices."""
    base = load_base(pretrained, model, mesh)
    if lora:
        lora = jax.device_put(lora, tree_shardings(model.abstract()["lora"], mesh))
    return base, lora


def measured(config: Any, where: str, adapter: pathlib.Path | None) -> dict[str, Any]:
    """What the numbers of a command are of: its data, weights and adapter."""
    found = {"data": where, "weights": config.weights, "adapter": None, "adapter_base": None}
    if adapter:
        found |= {"adapter": str(adapter), "adapter_base": peft.base_of(adapter)}
    return found


def evaluate(config: Any, out: pathlib.Path, adapter: pathlib.Path | None) -> dict[str, Any]:
    """Writes the ledger of the config's data to `out`; returns its metrics and what was left out.

    adapter: a PEFT adapter directory; None: the base model.
    """
    check(config)
    distributed.agree("the command", json.dumps([to_dict(config), str(adapter)], sort_keys=True))
    if (out / "config.json").exists():  # its ledger would be overwritten
        raise UserError(f"--out {out} is the workdir of a training run; give another directory")
    sources.check_place(config.data.source, config.data.path)
    mesh, pretrained, wrap, lora = opened(config, adapter)
    where = config.data.path or config.data.source
    rows = sources.read(config.data.source, config.data.path, config.data.limit)
    tokenizer = pretrained.tokenizer()
    found = tokenize(rows, tokenizer, config.data, where)
    if not found.examples:
        raise UserError(f"{where}: no example has a token that carries loss within data.seq_len")
    check_vocabulary(found.examples, pretrained.arch.vocab)
    model = build_model(pretrained.arch, config, wrap, mesh)
    _make(out)
    base, lora = loaded(pretrained, model, lora, mesh)
    rows = shapes(found.examples, config.data)
    data = dataset(found.examples, config, rows, found.label_tokens, shuffle=False)
    distributed.agree("the data", data.fingerprint())
    step = jit_eval_step(model, config, found.label_tokens, mesh)
    ledger = ledger_rows(step, lora, base, data, mesh, "eval", 0)
    if jax.process_index() == 0:
        write_ledger(out / "ledger" / "eval_000000.parquet", [ledger])
        write_examples(out / "ledger" / "examples.parquet", {"eval": data}, tokenizer)
    left_out = {"truncated": len(found.truncated), "dropped": len(found.dropped)}
    found = metrics(ledger, config.data.batch_size) | left_out
    return finite(found | measured(config, where, adapter))


def adapter_of(flag: str | None) -> pathlib.Path | None:
    """The path that --adapter names; UserError where it is empty, as of an unset variable."""
    if flag == "":
        raise UserError("command line: --adapter is empty; leave it out for the base model")
    return path_of(flag) if flag else None


def main() -> None:
    # Defined here: train imports this module and must not take these flags.
    flags.DEFINE_string("adapter", None, "A PEFT adapter directory; without it, the base model.")
    flags.DEFINE_string("out", None, "Directory that takes the ledger.")
    config = parse_flags(("config", "out"))
    adapter = adapter_of(flags.FLAGS.adapter)
    keep_compiled()
    say(json.dumps(evaluate(config, path_of(flags.FLAGS.out), adapter)))


if __name__ == "__main__":
    distributed.run(main)
