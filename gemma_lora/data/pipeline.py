"""From a config to the three data sets of a run, and what to say about them."""

from typing import Any

import jax

from gemma_lora.data import sources
from gemma_lora.data.dataset import (
    Dataset,
    Example,
    Tokenized,
    check_vocabulary,
    loss_slots,
    split,
    subset,
    tokenize,
)
from gemma_lora.errors import UserError
from gemma_lora.tokenizer import Tokenizer


def fixed_set(
    examples: list[Example], config: Any, slots: int, label_tokens: tuple[int, ...]
) -> Dataset:
    """A set to evaluate: every example once, in order, in the training batch's shape."""
    return Dataset(
        examples,
        seq_len=config.data.seq_len,
        batch_size=config.data.batch_size,
        pack=config.data.pack,
        seed=config.seed,
        shuffle=False,
        slots=slots,
        label_tokens=label_tokens,
        process=(jax.process_index(), jax.process_count()),
    )


def load_data(
    config: Any, tokenizer: Tokenizer, vocab: int
) -> tuple[Dataset, Dataset, Dataset, dict[str, int]]:
    """(training set, validation set, train probe, counts), all in one batch shape.

    The train probe is a fixed part of the training examples, as large as the validation set, on
    which the same numbers are taken.
    """
    data = config.data

    def read(path: str) -> Tokenized:
        rows = sources.read(data.source, path, data.limit)
        tokenized = tokenize(rows, tokenizer, data, path or data.source)
        check_vocabulary(tokenized.examples, vocab)
        return tokenized

    found = [read(data.path)]
    label_tokens = found[0].label_tokens
    if data.validation_path:
        found.append(read(data.validation_path))
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
    if not train_part or not validation_part:
        raise UserError(
            f"{len(train_part)} training and {len(validation_part)} validation examples carry loss "
            f"within data.seq_len {data.seq_len}; both sets need at least one"
        )
    if config.train.eval_examples:
        validation_part = subset(validation_part, config.train.eval_examples, config.seed)
    probe_part = subset(train_part, len(validation_part), config.seed)
    slots = loss_slots(train_part + validation_part, data.seq_len, data.pack)
    train_set = Dataset(
        train_part,
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        pack=data.pack,
        seed=config.seed,
        shuffle=True,
        slots=slots,
        label_tokens=label_tokens,
        process=(jax.process_index(), jax.process_count()),
    )
    fixed = [fixed_set(part, config, slots, label_tokens) for part in (validation_part, probe_part)]
    counts = {
        "train": len(train_part),
        "validation": len(validation_part),
        "train_probe": len(probe_part),
        "truncated": sum(len(f.truncated) for f in found),
        "dropped": sum(len(f.dropped) for f in found),
    }
    return train_set, *fixed, counts


def describe(
    config: Any, train_set: Dataset, counts: dict[str, int], total: int, every: int
) -> dict[str, str]:
    """The facts of the data banner, the batch arithmetic among them."""
    data, train = config.data, config.train
    steps = train_set.steps_per_epoch
    empty = steps * data.batch_size - len(train_set.plan(0))
    facts = {
        "source": data.path or data.source,
        "examples": f"{counts['train']:,} train, {counts['validation']:,} validation, "
        f"{counts['train_probe']:,} of train as probe",
        "loss on": f"{data.loss_on} tokens",
        "batch": f"{data.batch_size} rows = {train.micro_batches} micro-batches x "
        f"{data.batch_size // train.micro_batches}; {data.seq_len} tokens a row, "
        f"{train_set.slots} of them may carry loss; {100 * train_set.fill:.1f} % filled"
        + (", packed" if data.pack else ""),
        "epoch": f"{steps:,} steps" + (f", the last with {empty} empty rows" if empty else ""),
        "run": f"{total:,} steps = {total / steps:.2f} epochs; "
        f"eval at 0 and every {every} steps: {1 + -(-total // every)} evals",
    }
    if counts["truncated"]:
        facts["truncated"] = (
            f"{counts['truncated']} examples are longer: cut at the end, those with a label in "
            "their longest field"
        )
    if counts["dropped"]:
        facts["dropped"] = (
            f"{counts['dropped']} examples left out: the prompt fills data.seq_len, no loss token"
        )
    if train.patience and -(-total // every) <= train.patience:
        facts["note"] = f"patience {train.patience} can never stop this run: lower train.eval_every"
    return facts
