"""From a config to the three data sets of a run, and what to say about them."""

from typing import Any

import jax

from gemma_lora.data import sources
from gemma_lora.data.dataset import Dataset, shapes
from gemma_lora.data.examples import (
    Example,
    Tokenized,
    check_vocabulary,
    plain,
    split,
    subset,
    tokenize,
)
from gemma_lora.errors import UserError, nearest
from gemma_lora.files import local_path, path_of
from gemma_lora.sharding import make_mesh, rows_here
from gemma_lora.tokenizer import Tokenizer


def dataset(
    examples: list[Example],
    config: Any,
    rows: dict[int, int],
    label_tokens: tuple[int, ...],
    *,
    shuffle: bool,
) -> Dataset:
    """The examples as a config batches them. rows: `shapes` of all sets of a run, so that they
    share their compiled steps; shuffle: for training; without it every example comes once."""
    return Dataset(
        examples,
        shapes=rows,
        batch_size=config.data.batch_size,
        pack=config.data.pack,
        seed=config.seed,
        shuffle=shuffle,
        label_tokens=label_tokens,
        rows_here=rows_here(config.data.batch_size, make_mesh(config.mesh))
        if jax.process_count() > 1
        else None,
    )


def load_data(
    config: Any, tokenizer: Tokenizer, vocab: int
) -> tuple[Dataset, Dataset, Dataset, dict[str, Any]]:
    """(training set, validation set, train probe, counts), all in the same batch shapes.

    The train probe is a fixed part of the training examples, as large as the validation set, on
    which the same numbers are taken. What data.exclude names is left out of the training set
    alone, and only after the split, so that both sets stay comparable without it.
    """
    data = config.data

    def read(source: str, path: str) -> Tokenized:
        rows = sources.read(source, path, data.limit)
        tokenized = tokenize(rows, tokenizer, data, path or source)
        check_vocabulary(tokenized.examples, vocab)
        return tokenized

    found = [read(data.source, data.path)]
    label_tokens = found[0].label_tokens
    if data.validation_path:
        found.append(read(*sources.divided(data.validation_path)))
        if found[1].label_tokens != label_tokens:
            raise UserError(
                f"{data.path or data.source} and {data.validation_path} are not of one kind: the "
                f"tokens of their label words are {label_tokens} and {found[1].label_tokens}"
            )
        train_part, validation_part = found[0].examples, found[1].examples
        shared = {e.id for e in train_part} & {e.id for e in validation_part}
        if shared:
            raise UserError(
                f"{len(shared)} ids are in both {data.path or data.source} and "
                f"{data.validation_path}, e.g. {min(shared)} (a row without an 'id' is named after "
                "its file)"
            )
    else:
        train_part, validation_part = split(
            found[0].examples, data.validation_fraction, config.seed
        )
    known = {i for f in found for i in (*(e.id for e in f.examples), *f.dropped)}
    excluded = _excluded(data.exclude, known)
    kept = [e for e in train_part if e.id not in excluded]
    left_out, train_part = len(train_part) - len(kept), kept
    if left_out and not kept:
        raise UserError(f"data.exclude {data.exclude} leaves out all {left_out} training examples")
    if not train_part or not validation_part:
        raise UserError(
            f"{len(train_part)} training and {len(validation_part)} validation examples carry loss "
            f"within data.seq_len {data.seq_len}; both sets need at least one"
        )
    if config.train.eval_examples:
        validation_part = subset(validation_part, config.train.eval_examples, config.seed)
    probe_part = subset(train_part, len(validation_part), config.seed)
    rows = shapes(train_part + validation_part, data)
    sets = (
        dataset(part, config, rows, label_tokens, shuffle=part is train_part)
        for part in (train_part, validation_part, probe_part)
    )
    held = [plain(e.text) for e in validation_part]
    looked_for = set(held)  # of the training texts, which can be many, no others are kept
    trained = {text for e in train_part if (text := plain(e.text)) in looked_for}
    counts = {
        "train": len(train_part),
        "validation": len(validation_part),
        "train_probe": len(probe_part),
        "truncated": sum(len(f.truncated) for f in found),
        "dropped": sum(len(f.dropped) for f in found),
        "excluded": left_out,
        "copies": sum(text in trained for text in held),
        "unused_fields": list(found[0].unused),
    }
    return *sets, counts


def check_files(config: Any) -> None:
    """Raises UserError where a file that a config names is not there, before anything else."""
    data = config.data
    if config.tokenizer and not local_path(config.tokenizer).exists():
        raise UserError(f"tokenizer {config.tokenizer} does not exist")
    sources.check_place(data.source, data.path)
    if data.validation_path:
        sources.check_place(*sources.divided(data.validation_path))
    _listed(data.exclude)


def _listed(path: str) -> set[str]:
    """The ids in the file of data.exclude; UserError where it cannot be read."""
    if not path:
        return set()
    try:
        lines = path_of(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"data.exclude {path} cannot be read: {e}") from e
    return {line.strip() for line in lines} - {""}


def _excluded(path: str, known: set[str]) -> set[str]:
    """The ids of data.exclude; UserError where one of them is unknown."""
    ids = _listed(path)
    if unknown := sorted(ids - known):
        raise UserError(
            f"data.exclude {path}: {len(unknown)} of {len(ids)} ids are not in the data, e.g. "
            f"{unknown[0]!r}, {nearest(unknown[0], known)}"
        )
    return ids


def in_steps(value: float, steps_per_epoch: int) -> int:
    """A period of the config, below 1 a fraction of an epoch, else steps; 0 stays 0."""
    return max(1, round(value * steps_per_epoch)) if 0 < value < 1 else int(value)


def total_steps(train: Any, steps_per_epoch: int) -> int:
    """The optimizer steps that config.train asks for; early stopping may end a run before.

    Raises UserError for more than a run has time for: the rate of each of them is held.
    """
    total = train.max_steps or train.epochs * steps_per_epoch
    if total > _MOST_STEPS:
        raise UserError(
            f"train.max_steps {train.max_steps}, train.epochs {train.epochs}: {total:,} steps, "
            f"expected at most {_MOST_STEPS:,}"
        )
    return total


_MOST_STEPS = 10**8


def unshuffled(train_set: Dataset, config: Any) -> Dataset:
    """The training examples once each, in a fixed order, in the shapes of the training set."""
    rows, labels = train_set.shapes, train_set.label_tokens
    return dataset(train_set.examples, config, rows, labels, shuffle=False)


def told_of_copies(n: int) -> str:
    return f"{n} in the validation set with the text of a training example: they test nothing new"


def _shown(e: Example) -> str:
    """Where an example's completion begins, for a person who chose the template."""
    prompt, completion = e.text[: e.completion], e.text[e.completion : e.end]
    before, after = "... " * (len(prompt) > 60), " ..." * (len(completion) > 60)
    return f"{before}{prompt[-60:]!r} -> {completion[:60]!r}{after}"


def describe(
    config: Any, train_set: Dataset, counts: dict[str, Any], total: int, every: int
) -> dict[str, str]:
    """The facts of the data banner, the batch arithmetic among them."""
    data, train = config.data, config.train
    steps = train_set.steps_per_epoch
    empty = steps * data.batch_size - len(train_set.plan(0))
    used = train_set.steps_by_length()
    lengths = " or ".join(
        f"{size} ({len(at):,} steps)" if len(used) > 1 else str(size) for size, at in used.items()
    )
    slots = " or ".join(str(train_set.shapes[size]) for size in used)
    facts = {
        "source": data.path or data.source,
        "examples": f"{counts['train']:,} train, {counts['validation']:,} validation, "
        f"{counts['train_probe']:,} of train as probe",
        "first example": _shown(train_set.examples[0]),
        "loss on": f"{data.loss_on} tokens",
        "batch": f"{data.batch_size} rows = {train.micro_batches} micro-batches x "
        f"{data.batch_size // train.micro_batches}; {lengths} tokens a row, "
        f"{slots} of them may carry loss; {100 * train_set.fill:.1f} % filled"
        + (", packed" if data.pack else ""),
        "epoch": f"{steps:,} steps" + (f", the last with {empty} empty rows" if empty else ""),
        "run": f"{total:,} steps = {total / steps:.2f} epochs; "
        f"eval at 0 and every {every} steps: {1 + -(-total // every)} evals",
    }
    if data.pack and steps > 1 and train_set.fill < 0.9:
        facts["padding"] = (
            "examples longer than half a row leave much of it empty: a larger data.seq_len with a "
            "smaller data.batch_size wastes less"
        )
    if counts["unused_fields"]:
        facts["fields not used"] = (
            f"{', '.join(counts['unused_fields'])}: data.template says what the model sees"
        )
    if counts["truncated"]:
        facts["truncated"] = (
            f"{counts['truncated']} examples are longer: cut at the end, those with a label in "
            "their longest field"
        )
    if counts["copies"]:
        facts["copies"] = told_of_copies(counts["copies"])
    if counts["excluded"]:
        facts["excluded"] = f"{counts['excluded']} training examples, by {data.exclude}"
    if ledger := in_steps(train.ledger_every, steps):
        facts["ledger"] = (
            f"all {counts['train']:,} training examples at 0, every {ledger} steps and at the end: "
            f"{1 + -(-total // ledger)} evals"
        )
    if counts["dropped"]:
        facts["dropped"] = (
            f"{counts['dropped']} examples left out: the prompt fills data.seq_len, or there is no "
            "text at all; no loss token"
        )
    if train.patience and -(-total // every) <= train.patience:
        facts["note"] = f"patience {train.patience} can never stop this run: lower train.eval_every"
    return facts
