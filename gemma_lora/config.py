"""Every config key once, with its comment; reading a config from the command line."""

import json
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from gemma_lora.errors import UserError


def default() -> ConfigDict:
    """The recipe of the source reports, for Gemma 3 270M. A config file changes what differs."""
    c = ConfigDict()
    c.arch = "gemma3_270m"  # a name of arch.ARCHS, or 'auto': from the config.json of weights
    c.weights = "demo"  # 'demo', a .gguf file, a .safetensors file, or a Hugging Face directory
    c.weights_sha256 = ""  # refuse a weights file with another hash; '': do not check
    c.tokenizer = ""  # a directory or file with the tokenizer; '': where the weights are
    c.dtype = "bfloat16"  # of base weights and matrix products; adapters are always float32
    c.remat = "matmuls"  # none, matmuls or full: what the backward recomputes (model.REMAT)
    c.unroll = False  # unroll the loop over layers: slower to compile, sometimes faster to run
    c.vocab_chunk = 2048  # vocabulary entries the loss looks at at a time
    c.seed = 0

    c.data = ConfigDict()
    c.data.source = "generated:600"  # tfds:NAME[/SPLIT] or generated:COUNT
    c.data.path = ""  # a .jsonl, .json or .parquet file, instead of source
    c.data.validation_path = ""  # a file to validate on, instead of a split
    c.data.validation_fraction = 0.1  # of the examples, chosen by a hash of seed and id
    c.data.template = ""  # 'Question: {question}\nAnswer: {answer}'; '': by the rows' fields
    c.data.labels = ("negative", "positive")  # words for integer labels 0, 1, ...
    c.data.loss_on = "all"  # 'all' tokens or the 'completion' (the template's last field)
    c.data.seq_len = 256  # tokens of a row, T
    c.data.batch_size = 8  # rows of one optimizer step, over all devices and micro-batches, B
    c.data.limit = 0  # only the first rows of the source; 0: all
    c.data.pack = False  # several examples a row

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.lora.dropout = 0.1
    c.lora.targets = "all-linear"  # or 'qv', or a regular expression over module names
    c.lora.rslora = False  # scale alpha / sqrt(rank) instead of alpha / rank

    c.optim = ConfigDict()
    c.optim.lr = 2e-4
    c.optim.schedule = "linear"  # linear, cosine or constant
    c.optim.warmup_steps = 0
    c.optim.clip = 1.0  # largest global gradient norm; 0: no clipping
    c.optim.weight_decay = 0.0

    c.train = ConfigDict()
    c.train.epochs = 3
    c.train.max_steps = 0  # optimizer steps, instead of epochs
    c.train.micro_batches = 1  # parts in which a batch goes through the model
    c.train.eval_every = 0.25  # below 1: a fraction of an epoch; else steps
    c.train.eval_examples = 0  # at most so many validation and train-probe examples; 0: all
    c.train.patience = 5  # evals without a better validation loss before stopping; 0: never
    c.train.save_every = 100  # steps between checkpoints (each eval saves one, too)

    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})  # -1: what is left
    return c


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types."""
    return json.loads(config.to_json())


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data': {'path': ''}} -> {'data.path': ''}."""
    out: dict[str, Any] = {}
    for k, v in config.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """'lora.rank: 8 here, 16 there' for every key that differs."""
    a, b = flat(ours), flat(theirs)
    return [
        f"{k}: {a.get(k)!r} here, {b.get(k)!r} there"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


def check(config: ConfigDict) -> None:
    """Raises UserError for unknown or missing keys and for values no run can use."""
    valid, got = flat(to_dict(default())), flat(to_dict(config))
    if got.keys() != valid.keys():
        raise UserError(
            f"config keys unknown: {sorted(got.keys() - valid.keys()) or 'none'}, "
            f"missing: {sorted(valid.keys() - got.keys()) or 'none'} "
            "(start from gemma_lora.config.default())"
        )
    if config.dtype not in ("bfloat16", "float32"):
        why = ": Gemma overflows in float16 and gives NaN" if config.dtype == "float16" else ""
        raise UserError(f"dtype {config.dtype!r}{why}; expected bfloat16 or float32")
    t, d = config.train, config.data
    positive = {
        "data.seq_len": d.seq_len - 1,
        "data.batch_size": d.batch_size,
        "train.micro_batches": t.micro_batches,
        "train.save_every": t.save_every,
        "train.eval_every": t.eval_every,
        "train.epochs or train.max_steps": max(t.epochs, t.max_steps),
        "vocab_chunk": config.vocab_chunk,
    }
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"{name} is too small: expected a positive number")
    if d.batch_size % t.micro_batches:
        raise UserError(
            f"data.batch_size {d.batch_size} is not a multiple of "
            f"train.micro_batches {t.micro_batches}"
        )
    if t.eval_every > 1 and t.eval_every != int(t.eval_every):
        raise UserError(f"train.eval_every {t.eval_every}: above 1 it is steps, a whole number")
    if not 0 < d.validation_fraction < 1:
        raise UserError(f"data.validation_fraction is {d.validation_fraction}, expected in (0, 1)")


CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")


def parse_flags(required: tuple[str, ...] = ("config",)) -> ConfigDict:
    """Parses sys.argv and returns the checked config.

    Raises UserError instead of a traceback for unknown flags, unknown keys and wrong types.
    """
    try:
        rest = flags.FLAGS(sys.argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        raise UserError(f"command line: {' '.join(str(e).split())}") from e
    if len(rest) > 1:
        raise UserError(f"command line: {rest[1]!r} is no flag (flags look like --config.seed=1)")
    missing = [f"--{name}" for name in required if not flags.FLAGS[name].value]
    if missing:
        raise UserError(f"command line: {' and '.join(missing)} must be given")
    config = CONFIG.value
    check(config)
    return config
