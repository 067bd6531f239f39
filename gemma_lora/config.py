"""Every config key once, with its comment; reading a config from the command line."""

import json
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Collection
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from gemma_lora.arch import ARCHS
from gemma_lora.attention import NAMES
from gemma_lora.data.examples import LOSS_ON
from gemma_lora.errors import UserError, nearest, require_name
from gemma_lora.layers import QUANTIZE
from gemma_lora.model import REMAT
from gemma_lora.optim import SCHEDULES


def default() -> ConfigDict:
    """What all recipes share, for Gemma 3 270M. A config file changes what differs."""
    c = ConfigDict()
    c.arch = "gemma3_270m"  # a name of arch.ARCHS, or 'auto': what the weights say
    # 'demo', hf:ORG/NAME, kaggle:OWNER/MODEL/flax/VARIATION, keras:PRESET, a .gguf or .safetensors
    # file, or a directory: of Hugging Face, an official Flax checkpoint, or a Keras preset.
    c.weights = "demo"
    c.weights_sha256 = ""  # refuse a weights file with another hash; '': do not check
    c.tokenizer = ""  # a directory or file with the tokenizer; '': where the weights are
    c.dtype = "bfloat16"  # of base weights and matrix products; adapters are always float32
    c.quantize = ""  # 'int8': base matrices in 8 bits, one scale an output channel; '': in dtype
    c.remat = "matmuls"  # none, matmuls, offload, full: what the backward recomputes (model.REMAT)
    c.attention = "auto"  # by platform; or reference, block (any), splash (TPU), cudnn (GPU)
    c.unroll = False  # unroll the loop over layers: slower to compile, sometimes faster to run
    c.seed = 0  # of adapters, dropout, order, and what validates, but for a whole validation_path

    c.head = ConfigDict()
    c.head.chunk = 2048  # vocabulary entries the loss looks at at a time
    # Chunks where every probability of a token is below this are not multiplied out in the
    # backward: their mean embedding stands for them. 0: exact. Pays on CPUs; 2**-14 costs about
    # what rounding that gradient to bfloat16 does.
    c.head.floor = 0.0

    c.data = ConfigDict()
    c.data.source = "generated:600"  # tfds:NAME[[/CONFIG]/SPLIT] or generated:COUNT
    c.data.path = ""  # a .jsonl, .json or .parquet file, instead of source
    c.data.validation_path = ""  # a file or a source to validate on, instead of a split
    c.data.validation_fraction = 0.1  # of the examples, chosen by a hash of seed and id
    c.data.template = ""  # 'Question: {question}\nAnswer: {answer}'; '': by the rows' fields
    c.data.chat = False  # prompt and completion as turns of the model's chat template
    c.data.labels = ("negative", "positive")  # words for 0, 1, ... in a field named 'label'
    c.data.loss_on = "all"  # 'all' tokens or the 'completion': the last field, the last turn
    c.data.seq_len = 256  # tokens of a row, T
    c.data.batch_size = 8  # rows of one optimizer step, over all devices and micro-batches, B
    c.data.limit = 0  # only the first rows of the source or of each file; 0: all
    c.data.pack = False  # several examples a row
    # Row lengths below seq_len, (128, 192): a batch gets the shortest that holds its rows. Each
    # length is compiled once; not with pack, whose rows are full.
    c.data.buckets = ()
    c.data.exclude = ""  # a text file, one id a line: examples that are not to be trained on

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.lora.dropout = 0.1
    c.lora.targets = "all-linear"  # or 'qv', or a regular expression over module names
    c.lora.rslora = False  # scale alpha / sqrt(rank) instead of alpha / rank
    c.lora.variant = "lora"  # or 'dora'
    c.lora.init = "kaiming"  # of A, with B = 0; or 'pissa', from the base weights
    c.lora.rank_pattern = ()  # (("down_proj", 4),): another rank where the expression matches
    c.lora.alpha_pattern = ()  # the same for alpha

    c.optim = ConfigDict()
    c.optim.lr = 2e-4
    c.optim.schedule = "linear"  # linear, cosine or constant
    c.optim.warmup_steps = 0
    c.optim.clip = 1.0  # largest global gradient norm; 0: no clipping
    c.optim.weight_decay = 0.0
    c.optim.b_lr_ratio = 1.0  # LoRA+: the learning rate of B is this times that of A

    c.train = ConfigDict()
    c.train.epochs = 3
    c.train.max_steps = 0  # optimizer steps, instead of epochs
    c.train.micro_batches = 1  # parts in which a batch goes through the model
    c.train.eval_every = 0.25  # below 1: a fraction of an epoch; else steps
    # Evals that also take every training example, from which outliers are mined: a fraction of an
    # epoch or steps, as eval_every, and then step 0 and the last step, too; 0: none. Those between
    # the evals of eval_every change neither the best step nor when a run stops.
    c.train.ledger_every = 0.0
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


def require_kind(what: str, got: Any, usual: Any) -> None:
    """Raises UserError where a value is not of the type of `usual`; a whole number is a float."""
    kinds = (int, float) if isinstance(usual, float) else type(usual)
    if not isinstance(got, kinds) or isinstance(got, bool) != isinstance(usual, bool):
        raise UserError(f"{what} is {got!r}, expected a {type(usual).__name__}")


def check(config: ConfigDict) -> None:
    """Raises UserError for unknown or missing keys and for values no run can use."""
    valid = flat(to_dict(default()))
    try:
        got = flat(to_dict(config))
    except TypeError as e:
        raise UserError(f"the config holds what JSON cannot: {e}; expected plain values") from e
    for key in sorted(got.keys() - valid.keys()):
        raise UserError(f"config key {key!r} is unknown, {nearest(key, valid)}")
    if missing := sorted(valid.keys() - got.keys()):
        raise UserError(
            f"the config lacks {', '.join(missing)}: start from gemma_lora.config.default()"
        )
    for key, usual in valid.items():
        require_kind(key, got[key], usual)
        if isinstance(usual, float) and not math.isfinite(got[key]):
            raise UserError(f"{key} is {got[key]}, expected a finite number")
        if isinstance(usual, int) and key != "seed" and got[key] > _MOST:
            raise UserError(f"{key} is {got[key]}, expected at most {_MOST}")
    if config.seed >= 2**32:  # of which JAX's keys are made
        raise UserError(f"seed is {config.seed}, expected less than 2**32")
    if config.dtype not in ("bfloat16", "float32"):
        why = ": Gemma overflows in float16 and gives NaN" if config.dtype == "float16" else ""
        raise UserError(f"dtype {config.dtype!r}{why}; expected bfloat16 or float32")
    for key, names in _NAMES.items():
        require_name(key, got[key], names)
    require_name("arch", config.arch, ("auto", *ARCHS))
    if not config.weights:
        raise UserError("weights is '', expected a place to load from, such as 'demo'")
    for key, least in _LEAST.items():
        if not got[key] >= least:
            raise UserError(f"{key} is {got[key]}, expected at least {least}")
    if not config.head.floor < 1:
        raise UserError(f"head.floor is {config.head.floor}, expected a probability below 1")
    t, d = config.train, config.data
    for key in ("train.eval_every", "optim.lr", "optim.b_lr_ratio"):
        if not got[key] > 0:
            raise UserError(f"{key} is {got[key]}, expected a positive number")
    if not t.epochs and not t.max_steps:
        raise UserError("train.epochs and train.max_steps are both 0: expected one to be positive")
    if d.batch_size % t.micro_batches:
        raise UserError(
            f"data.batch_size {d.batch_size} is not a multiple of "
            f"train.micro_batches {t.micro_batches}"
        )
    for key in ("train.eval_every", "train.ledger_every"):
        if got[key] > 1 and got[key] != int(got[key]):
            raise UserError(f"{key} {got[key]}: above 1 it is steps, a whole number")
    words = list(d.labels)
    if (
        not words
        or len(set(words)) < len(words)
        or not all(isinstance(x, str) and x for x in words)
    ):
        raise UserError(
            f"data.labels is {tuple(words)}, expected different words, such as ('bad', 'good')"
        )
    _check_buckets(list(d.buckets), d)
    if not 0 < d.validation_fraction < 1:
        raise UserError(f"data.validation_fraction is {d.validation_fraction}, expected in (0, 1)")


def _check_buckets(buckets: list[Any], data: Any) -> None:
    whole = all(type(size) is int and 2 <= size < data.seq_len for size in buckets)
    if not whole or buckets != sorted(set(buckets)):
        raise UserError(
            f"data.buckets is {tuple(buckets)}, expected rising whole numbers from 2 to below "
            f"data.seq_len {data.seq_len}, such as ({data.seq_len // 2},)"
        )
    if buckets and data.pack:
        raise UserError(
            f"data.buckets is {tuple(buckets)} and data.pack is True: packed rows are full, "
            "leave one of the two out"
        )


# Of what the keys name one: those of other modules, so that a name is refused before any work.
_NAMES: dict[str, Collection[str]] = {
    "remat": REMAT,
    "attention": NAMES,
    "quantize": ("", *QUANTIZE),
    "data.loss_on": LOSS_ON,
    "optim.schedule": SCHEDULES,
}

_MOST = 2**31 - 1  # of what is counted; positions and indices are int32

# The smallest value of a key; where 0 means 'off' or 'all', less than that means nothing.
_LEAST = {
    "head.chunk": 1,
    "head.floor": 0,
    "seed": 0,
    "data.seq_len": 2,
    "data.batch_size": 1,
    "data.limit": 0,
    "optim.warmup_steps": 0,
    "optim.clip": 0,
    "optim.weight_decay": 0,
    "train.epochs": 0,
    "train.max_steps": 0,
    "train.micro_batches": 1,
    "train.eval_examples": 0,
    "train.ledger_every": 0,
    "train.patience": 0,
    "train.save_every": 1,
}

_FILE = "Path of a config file."


def parse_flags(required: tuple[str, ...] = ("config",)) -> ConfigDict:
    """Parses sys.argv and returns the checked config.

    Raises UserError instead of a traceback for unknown flags, unknown keys, wrong types, and for
    a config file that is missing or fails.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        _help()
    path = _check_argv(sys.argv[1:])
    try:
        # Here: a program that imports this module may have a flag of that name.
        config_flags.DEFINE_config_file("config", help_string=_FILE, flag_values=flags.FLAGS)
        rest = flags.FLAGS(sys.argv)
        config = flags.FLAGS.config
        usable = hasattr(config, "lock")  # raises now what open() raised in the config file
    except Exception as e:  # a config file may raise anything
        raise UserError(_explain(e, path)) from e
    if len(rest) > 1:
        raise UserError(f"command line: {rest[1]!r} is no flag (flags look like --config.seed=1)")
    missing = [f"--{name}" for name in required if flags.FLAGS[name].value in (None, "", [])]
    if not usable:
        raise UserError(f"config file {path}: get_config() gave {config!r}, not a ConfigDict")
    if missing:
        raise UserError(f"command line: {' and '.join(missing)} must be given")
    check(config)
    return config


def _help() -> NoReturn:
    """Prints how the entry point is called, every flag and every config key; exits."""
    print((sys.modules["__main__"].__doc__ or "").strip() + "\n\nflags:")
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]) or []:
        print(f"  --{flag.name:<38} {flag.help}")
    print(f"  --{'config':<38} {_FILE}")
    for key, value in flat(to_dict(default())).items():
        print(f"  --config.{key:<31} {value!r}")
    print("\nwhat each key means: gemma_lora/config.py; several hosts: gemma_lora/distributed.py")
    raise SystemExit(0)


def _check_argv(arguments: list[str]) -> str:
    """The path of the config file; UserError where it is no file, or for a --config.key unknown."""
    path, valid = None, flat(to_dict(default()))
    for i, argument in enumerate(arguments):
        if argument in ("--config", "-config"):
            path = "".join(arguments[i + 1 : i + 2])
        elif found := re.match(r"--?config=(.*)", argument):
            path = found[1]
        elif found := re.match(r"--?(?:no)?config\.([^=[]*)", argument):
            key = found[1]
            if key not in valid and not any(k.startswith(f"{key}.") for k in valid):
                raise UserError(
                    f"command line: config key {key!r} is unknown, {nearest(key, valid)}"
                )
    if path is None:
        raise UserError("command line: --config must be given, e.g. --config configs/quickstart.py")
    path = path.partition(":")[0]  # what follows is an argument of get_config
    file = pathlib.Path(path)
    if not file.is_file():
        near = {str(p) for d in (file.parent, pathlib.Path("configs")) for p in d.glob("*.py")}
        raise UserError(f"config file {path!r} does not exist, {nearest(path, near)}")
    return path


def _explain(error: Exception, path: str) -> str:
    """What went wrong while the flags were parsed; names the line where the config file failed."""
    chain: list[BaseException] = [error]  # the flags library wraps some errors of a config file
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for e in chain:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else frames[-1].lineno if frames else None
        if line is not None:
            return f"config file {path}, line {line}: {type(e).__name__}: {_one_line(e)}"
        if isinstance(e, SyntaxError):  # of no line: a file of bytes
            return f"config file {path} is not Python: {_one_line(e)}"
    if "has no attribute 'get_config'" in str(error):
        return f"config file {path} has no function get_config()"
    if found := re.match(r"flag --(?:no)?config\.([^=]+)=(.*?): ", str(error), re.DOTALL):
        key, got = found.groups()
        usual = flat(to_dict(default())).get(key)
        if usual is not None:
            kind = {bool: "True or False", int: "a whole number", float: "a number"}
            expected = kind.get(type(usual), f"a {type(usual).__name__}")
            return f"command line: {key} is {got!r}, expected {expected}, e.g. {usual!r}"
    return f"command line: {_one_line(error)}"


def _one_line(e: BaseException) -> str:
    return " ".join((e.msg if isinstance(e, SyntaxError) else str(e)).split())
