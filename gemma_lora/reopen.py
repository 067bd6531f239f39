"""A run opened again from its workdir: its config, model and training examples."""

import dataclasses
import json
import pathlib

from jax.sharding import Mesh
from ml_collections import ConfigDict

from gemma_lora.config import check
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.pipeline import load_data
from gemma_lora.errors import UserError
from gemma_lora.lora import LoRAConfig
from gemma_lora.model import Transformer
from gemma_lora.sharding import check_rows, make_mesh
from gemma_lora.weights.pretrained import Pretrained, build_model, open_weights
from gemma_lora.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command that made a workdir had before it loaded any weights."""

    config: ConfigDict
    pretrained: Pretrained
    wrap: LoRAConfig
    mesh: Mesh
    model: Transformer
    train_set: Dataset


def reopen(workdir: pathlib.Path) -> Run:
    """Raises UserError where there is no run, or its data are no longer those it trained on."""
    config = _read_config(workdir)
    try:
        begun = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
        fingerprint = begun["data_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{workdir / 'run.json'} is missing or damaged: {e}") from e
    pretrained = open_weights(config.weights, config.arch, config.weights_sha256, config.tokenizer)
    wrap = LoRAConfig(**config.lora)
    mesh = make_mesh(config.mesh)
    check_rows(config.data.batch_size, mesh)
    model = build_model(pretrained.arch, config, wrap, mesh)
    train_set, validation, *_ = load_data(config, pretrained.tokenizer(), pretrained.arch.vocab)
    if train_set.fingerprint() + validation.fingerprint() != fingerprint:
        raise UserError(f"the data has changed since the run in {workdir}")
    return Run(config, pretrained, wrap, mesh, model, train_set)


def _read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of the run in a workdir; UserError where it is missing or of another version."""
    config = ConfigDict(read_config(workdir, ("data", "lora")))
    try:
        # JSON has no tuples.
        pairs = {k: tuple(v) for k, v in config.data.items() if isinstance(v, list)}
        config.data.update(pairs)
        for k in ("rank_pattern", "alpha_pattern"):
            config.lora[k] = tuple(map(tuple, config.lora[k]))
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{workdir / 'config.json'} is of another version: {e}") from e
    check(config)
    return config
