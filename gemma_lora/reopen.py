"""A run opened again from its workdir: its config, model and training examples."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_lora.attention import chosen
from gemma_lora.checkpoint import Checkpoints
from gemma_lora.config import check, default
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.pipeline import check_files, load_data, total_steps
from gemma_lora.errors import UserError
from gemma_lora.lora import LoRAConfig, started_from_base
from gemma_lora.metrics import say
from gemma_lora.model import Transformer
from gemma_lora.optim import optimizer
from gemma_lora.sharding import check_rows, make_mesh, mesh_of_first
from gemma_lora.step import init_state
from gemma_lora.weights.pretrained import (
    Pretrained,
    build_model,
    fingerprint,
    load_base,
    open_weights,
)
from gemma_lora.workdir import has_checkpoint, read_config, read_records

FINGERPRINTS = ("data_fingerprint", "weights_fingerprint")  # of run.json
STEPS = ("best", "last", "0")  # whose adapters: of a checkpoint, or those the run started from


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command that made a workdir had, but for the base weights."""

    config: ConfigDict
    pretrained: Pretrained
    wrap: LoRAConfig
    mesh: Mesh
    model: Transformer
    train_set: Dataset
    begun: dict[str, Any]  # its run.json


def reopen(workdir: pathlib.Path, which: str = "0") -> Run:
    """Raises UserError where there is no run, or its data are no longer those it trained on.

    which: the one of STEPS to be `restored` later, which a workdir without a checkpoint lacks.
    """
    config = _read_config(workdir)
    if which != "0" and not has_checkpoint(workdir):
        raise UserError(f"{workdir / 'checkpoints'} holds no checkpoint: expected --step 0")
    [begun], _ = read_records(workdir / "run.json", (*FINGERPRINTS, "best_step"))
    check_files(config)
    pretrained = open_weights(config.weights, config.arch, config.weights_sha256, config.tokenizer)
    wrap = LoRAConfig(**config.lora)
    mesh = _mesh(config)
    try:
        chosen(config.attention, pretrained.arch, jnp.dtype(config.dtype), [1], mesh)
    except UserError as e:
        say(f"   {e}: 'auto' is taken")
        config.attention = "auto"
    model = build_model(pretrained.arch, config, wrap, mesh)
    train_set, validation, *_ = load_data(config, pretrained.tokenizer(), pretrained.arch.vocab)
    if (found := train_set.fingerprint() + validation.fingerprint()) != begun["data_fingerprint"]:
        raise UserError(
            f"the data are no longer those of the run in {workdir}: got {found}, expected "
            f"{begun['data_fingerprint']}; put the files back that it was trained on, or train it "
            "anew"
        )
    return Run(config, pretrained, wrap, mesh, model, train_set, begun)


def _mesh(config: ConfigDict) -> Mesh:
    """The mesh of a run; on other devices than it had, one whose devices share its rows evenly."""
    batch = config.data.batch_size, config.train.micro_batches
    try:
        mesh = make_mesh(config.mesh)
        check_rows(batch[0], mesh, batch[1])
        return mesh
    except UserError as e:
        if jax.process_count() > 1:  # each of which has to take part
            raise
        config.mesh = default().mesh
        rows = batch[0] // batch[1]
        n = max(n for n in range(1, min(jax.device_count(), rows) + 1) if rows % n == 0)
        say(f"   {e}: fsdp={n} is taken")
        return mesh_of_first(n)


def _read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of the run in a workdir; UserError where it is missing or of another version."""
    found = read_config(workdir, ())
    try:
        config = ConfigDict(found)
        # JSON has no tuples.
        pairs = {k: tuple(v) for k, v in config.data.items() if isinstance(v, list)}
        config.data.update(pairs)
        for k in ("rank_pattern", "alpha_pattern"):
            config.lora[k] = tuple(map(tuple, config.lora[k]))
        check(config)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{workdir / 'config.json'} is of another version: {e}") from e
    return config


def load(opened: Run) -> dict[str, Any]:
    """The base weights on the devices; UserError where they are not those of the run."""
    base = load_base(opened.pretrained, opened.model, opened.mesh)
    check_weights(opened.config.weights, base, opened.begun["weights_fingerprint"])
    return base


def check_weights(name: str, base: dict[str, Any], expected: str) -> None:
    """UserError where the base weights have not the fingerprint that the run's had."""
    if (found := fingerprint(base)) != expected:
        raise UserError(
            f"{name}: these are no longer the weights of the run: got {found}, expected "
            f"{expected}; put those back that it was trained on, or train it anew (as one that an "
            "older gemma_lora made)"
        )


def restored(opened: Run, workdir: pathlib.Path, which: str, base: Any) -> tuple[int, Any, Any]:
    """(step, lora, base) of one of STEPS; the base is changed where the run's adapters change it.

    Raises UserError where the workdir has no such checkpoint.
    """
    # The optimizer's state is a part of a checkpoint.
    total = total_steps(opened.config.train, opened.train_set.steps_per_epoch)
    tx = optimizer(opened.config.optim, total)
    state = init_state(opened.model, tx, opened.config.seed, opened.mesh)
    if opened.wrap.reads_base:
        base, lora = started_from_base(opened.wrap, base, state.lora)
        state = state.replace(lora=lora)
    if which == "0":
        return 0, state.lora, base
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    latest = checkpoints.latest()
    state, notes = checkpoints.restore(latest, state)
    step = latest
    if which == "best":
        # After an eval that was interrupted, and made when the run went on, run.json alone knows.
        step = (opened.begun if notes["eval_due"] else notes)["best_step"]
        if step is None:
            raise UserError(
                f"no eval of the run in {workdir} was finite: expected --step last or 0"
            )
        if step != latest:
            state, _ = checkpoints.restore(step, state)
    checkpoints.close()
    return step, state.lora, base
