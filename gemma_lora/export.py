"""A run's result for other programs: its adapter, or a whole model with the adapter merged in.

    python -m gemma_lora.export --workdir DIR --format peft|merged --out DIR

peft: PEFT's adapter. merged: a Hugging Face directory (config.json, safetensors, tokenizer) that
transformers loads as it is. Merging takes one tensor at a time: read from the base, in any format,
merged in float32, cast once, written. The host holds no more than that, but for a Keras preset,
which its library reads whole.

What was written is loaded again and its logits are compared with those of base and adapter. The
check runs in float32 and holds at most two copies of the model on the devices. --out appears when
it has passed, whole.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora import config as configs
from gemma_lora.arch import Arch
from gemma_lora.data.examples import control_end
from gemma_lora.errors import Parser, UserError, require_name, run_main
from gemma_lora.files import path_argument, read_json, remote, write_text
from gemma_lora.lora import LoRAConfig, merge, merged, modules
from gemma_lora.metrics import banner
from gemma_lora.model import Transformer, head_weight, logits
from gemma_lora.reopen import FINGERPRINTS, check_weights
from gemma_lora.sharding import make_mesh, tree_shardings
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import mapping, peft
from gemma_lora.weights.pretrained import Pretrained, load_base, open_weights
from gemma_lora.workdir import read_config, read_records

DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # ours -> safetensors'
SHARD_GB = 5.0  # the largest file of weights in 10^9 bytes
# The largest difference of a logit between two float32 models that should be one and the same.
LIMIT = 2e-3
# What the check runs the models on: prose, a question, other scripts, code.
TEXTS = (
    "In 1905 a clerk at the patent office in Bern published four papers. Each of them changed",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Straße, naïveté, Ελλάδα, Москва, 東京, नमस्ते: a tokenizer has to know what to do with these.",
    "def area(radius):\n    # of a circle\n    return 3.14159 * radius ** 2\n\n\nprint(area(1.5))",
)
# Of a run's config, what its model is made from.
CONFIG = ("weights", "arch", "weights_sha256", "tokenizer", "dtype", "quantize", "data.chat")
# Of a Hugging Face base: the tokenizer's files, and what its config.json says beyond the Arch.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
KEPT = ("initializer_range", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A base model, its tokenizer, and the adapter of a run as host arrays."""

    pretrained: Pretrained
    tokenizer: Tokenizer
    tokenizer_home: pathlib.Path | None  # where it came from, if from Hugging Face's files
    config: LoRAConfig
    lora: dict[str, Any]
    chat: bool  # was it tuned on conversations

    def merged(self, ours: str, layer: int | None) -> np.ndarray:
        """The leaf with what the adapter adds, of one layer where it has layers; float32."""
        p = self.pretrained
        w = mapping.read_leaf(p.tensors, p.form, p.arch, ours, layer).astype(np.float32)
        path, _, leaf = ours.removeprefix("layers/").rpartition("/")
        adapter = modules(self.lora).get(path)
        if adapter is None or leaf != "w":
            return w
        return np.asarray(merged(self.config, path, w, {k: x[layer] for k, x in adapter.items()}))


def export(
    workdir: pathlib.Path,
    form: str,
    out: pathlib.Path,
    dtype: str | None = None,
    shard_gb: float | None = None,
) -> dict[str, Any]:
    """Writes what a run has learnt to `out`, as 'peft' or 'merged'; returns facts to show.

    dtype: of merged weights, by default the run's; shard_gb: the largest of their files. Raises
    UserError, and leaves nothing at `out`, where the run has no adapter, where the base is no
    longer its own, where `out` exists or cannot be written, and where what was written is not what
    was meant.
    """
    if form == "peft" and (dtype or shard_gb is not None):
        raise UserError("--dtype and --max-shard-gb are for --format merged")
    if shard_gb is not None and not shard_gb > 0:
        raise UserError(f"--max-shard-gb is {shard_gb}, expected a positive number")
    _require_new(out)
    run = read_config(workdir, CONFIG)
    require_name(f"{workdir / 'config.json'}: dtype", run["dtype"], DTYPES)
    if not (workdir / "adapter").is_dir():
        raise UserError(
            f"{workdir} has no adapter: the run has not finished. The command that started it "
            "continues it and ends with one"
        )
    pretrained = open_weights(run["weights"], run["arch"], run["weights_sha256"], run["tokenizer"])
    config, lora = peft.read(workdir / "adapter", pretrained.arch)
    home = pathlib.Path(run["tokenizer"]).expanduser() if run["tokenizer"] else None
    if home is None and pretrained.form == "hf":
        home = pretrained.home
    tuned = Tuned(pretrained, pretrained.tokenizer(), home, config, lora, run["data"]["chat"])
    facts = {"to": out, "base": f"{run['weights']}. {pretrained.notice}".rstrip(". ")}
    with _appears(out) as directory:
        _check_base(workdir, run, pretrained)
        if form == "peft":
            base_model = pretrained.base_name, pretrained.inner, pretrained.revision
            peft.export(directory, lora, config, pretrained.arch, *base_model)
            return facts | check_adapter(tuned, directory)
        dtype = dtype or run["dtype"]
        sums = write_merged(tuned, directory, dtype, shard_gb or SHARD_GB)
        if run["quantize"]:
            facts["merged into"] = f"the base's own weights, not those in {run['quantize']}"
        return facts | check_merged(tuned, directory, dtype, sums)


def _check_base(workdir: pathlib.Path, run: dict[str, Any], pretrained: Pretrained) -> None:
    """UserError where the base weights are no longer those that the run adapted."""
    [made], _ = read_records(workdir / "run.json", FINGERPRINTS)
    dtype = jnp.dtype(run["dtype"])
    model = Transformer(pretrained.arch, dtype, dtype, quantize=run["quantize"])
    base = load_base(pretrained, model, _mesh())
    check_weights(run["weights"], base, made["weights_fingerprint"])


def _require_new(out: pathlib.Path) -> None:
    if remote(out):
        raise UserError(
            f"--out {out}: expected a local directory; copy it to the bucket afterwards"
        )
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists; give a new name")


@contextlib.contextmanager
def _appears(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a new path beside `out`; what the block has put there becomes `out` if it succeeds."""
    refused = f"--out {out} cannot be written"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as e:
        raise UserError(f"{refused}: {e}") from e
    try:
        yield temporary / out.name
        os.replace(temporary / out.name, out)
    except OSError as e:
        if e.filename is not None and not pathlib.Path(e.filename).is_relative_to(temporary):
            raise  # of the run or its base, which the block reads
        raise UserError(f"{refused}: {e}") from e
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(
            "nothing was exported: the devices cannot hold the float32 copies of the model that "
            "the check compares; run it on the host: JAX_PLATFORMS=cpu python -m gemma_lora.export"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- writing --------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor of the new checkpoint comes from, and its shape there."""

    ours: str
    layer: int | None
    shape: tuple[int, ...]


def write_merged(
    tuned: Tuned, directory: pathlib.Path, dtype: str, shard_gb: float
) -> dict[str, int]:
    """Writes a new Hugging Face directory; returns the CRC-32 of each tensor's bytes by name."""
    directory.mkdir()
    sums, files = {}, {}
    shards = _shards(tuned.pretrained.arch, jnp.dtype(dtype).itemsize, shard_gb * 1e9)
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        sums |= _write_safetensors(directory / file, shard, dtype, tuned)
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(math.prod(p.shape) for shard in shards for p in shard.values())
        total *= jnp.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_small_files(tuned, directory, dtype)
    return sums


def _shards(arch: Arch, width: int, limit: float) -> list[dict[str, Place]]:
    """Hugging Face's names and their places, in parts of at most `limit` bytes where that goes."""
    leaves = mapping.leaves(arch)
    stacked = [ours for ours in leaves if ours.startswith("layers/")]
    order: list[tuple[str, int | None]] = [(o, None) for o in leaves if o not in stacked]
    order += [(ours, i) for i in range(arch.layers) for ours in stacked]
    shards: list[dict[str, Place]] = []
    room = 0.0
    for ours, layer in order:
        shape = leaves[ours][1][layer is not None :]
        # Zeros without strides have the tensor's shape and take no memory.
        zeros = np.broadcast_to(np.float32(0), shape)
        name, zeros = mapping.hf_tensor(arch, ours, zeros, layer)
        if not shards or width * zeros.size > room:
            shards.append({})
            room = limit
        shards[-1][name] = Place(ours, layer, zeros.shape)
        room -= width * zeros.size
    return shards


def _write_safetensors(
    path: pathlib.Path, tensors: dict[str, Place], dtype: str, tuned: Tuned
) -> dict[str, int]:
    """8 bytes of length, a JSON header, the tensors one after the other; returns their CRC-32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in tensors.items():
        begin, end = end, end + math.prod(place.shape) * jnp.dtype(dtype).itemsize
        header[name] = {
            "dtype": DTYPES[dtype], "shape": place.shape, "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers may want the tensors aligned
    sums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (ours, layer, _) in tensors.items():
            x = tuned.merged(ours, layer)
            x = mapping.hf_tensor(tuned.pretrained.arch, ours, x, layer)[1]
            data = x.astype(jnp.dtype(dtype), order="C").view(np.uint8)
            sums[name] = zlib.crc32(data)
            file.write(data)
    return sums


def _write_small_files(tuned: Tuned, directory: pathlib.Path, dtype: str) -> None:
    """config.json, the tokenizer, and generation_config.json where the base has one."""
    stated, t = tuned.pretrained.stated, tuned.tokenizer
    generation = tuned.pretrained.home / "generation_config.json"
    if tuned.pretrained.form == "hf" and generation.exists():
        shutil.copy(generation, directory)
        said = read_json(generation)
        if (found := _stopping(said, tuned)) != said:
            _write_json(directory / generation.name, found)
    ids = {"bos_token_id": t.bos_id, "eos_token_id": t.eos_id, "pad_token_id": t.pad_id}
    config = tuned.pretrained.arch.to_hf() | {"torch_dtype": dtype} | ids
    config |= {k: stated[k] for k in (*KEPT, *ids) if k in stated}
    _write_json(directory / "config.json", _stopping(config, tuned))
    home = tuned.tokenizer_home
    if home is None or not (home / "tokenizer_config.json").exists():
        t.save(directory)
        return
    for file in TOKENIZER_FILES:
        if (home / file).exists():
            shutil.copy(home / file, directory)
    said = read_json(directory / "tokenizer_config.json").get("chat_template")
    if tuned.chat and not said and not (directory / "chat_template.jinja").exists():
        # The turns that the run taught are of the template known for such a vocabulary.
        write_text(directory / "chat_template.jinja", t.chat_template)


def _stopping(config: dict[str, Any], tuned: Tuned) -> dict[str, Any]:
    """With the token that the run taught as the end among the ids that generation stops at."""
    ids, t, end = config.get("eos_token_id"), tuned.tokenizer, None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if tuned.chat:
        text = t.render_chat([{"role": k, "content": "a"} for k in ("user", "assistant")])
        end = control_end(text, t.encode_batch([text])[0], t)
    end = t.eos_id if end is None else end
    return config if end in ids else config | {"eos_token_id": [*ids, end]}


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- checking -------------------------------------------------------------------------------


def check_adapter(tuned: Tuned, directory: pathlib.Path) -> dict[str, str]:
    """The adapter in `directory` gives the logits of the run's own; returns facts, or raises."""
    arch, rows = tuned.pretrained.arch, _rows(tuned.tokenizer)
    config, lora = peft.read(directory, arch)
    base = load_base(tuned.pretrained, Transformer(arch), _mesh())
    expected = _logits(Transformer(arch, wrap=tuned.config), base, tuned.lora, rows)
    got = _logits(Transformer(arch, wrap=config), base, lora, rows)
    moved = np.abs(got - _logits(Transformer(arch), base, {}, rows)).max()
    return {
        "check": _within("the adapter as read back", got - expected, rows, LIMIT),
        "effect": f"it moves a logit of the base by up to {moved:.1e}",
    }


def check_merged(
    tuned: Tuned, directory: pathlib.Path, dtype: str, sums: dict[str, int]
) -> dict[str, str]:
    """The model in `directory` is base + adapter; returns facts, or raises UserError.

    Every tensor must have the bytes that were written, and the logits must be those of the unmerged
    model but for `LIMIT` and, in bfloat16, for what rounding does. That is measured: the logits of
    a model merged on the devices, rounded, minus those of the same model before. It is zero for
    float32. Where the two merges differ in the last place of float32 a few weights round the other
    way, which may come to a fiftieth of the measured effect.
    """
    arch, mesh, rows = tuned.pretrained.arch, _mesh(), _rows(tuned.tokenizer)
    again = open_weights(str(directory), "auto")
    read = again.tensors.read
    as_written = {
        # A pattern of layers longer than the model reads back as what is there of it.
        "config.json": again.arch.is_local == arch.is_local
        and dataclasses.replace(again.arch, local=arch.local) == arch,
        "the tokenizer": np.array_equal(_rows(again.tokenizer()), rows),
        "a tensor": {n: zlib.crc32(read(n).view(np.uint8)) for n in again.tensors.names()} == sums,
    }
    if wrong := [what for what, same in as_written.items() if not same]:
        raise UserError(f"nothing was exported: {' and '.join(wrong)} did not read back the same")

    plain, adapted = Transformer(arch), Transformer(arch, wrap=tuned.config)
    params = load_base(tuned.pretrained, plain, mesh)
    lora = jax.device_put(tuned.lora, tree_shardings(adapted.abstract()["lora"], mesh))
    expected = _logits(adapted, params, lora, rows)
    params = jax.jit(merge, static_argnums=2, donate_argnums=0)(params, lora, tuned.config)
    exact = _logits(plain, params, {}, rows)
    params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
    rounding = _logits(plain, params, {}, rows) - exact
    del params
    difference = _logits(plain, load_base(again, plain, mesh), {}, rows) - expected
    by_rounding = np.abs(rounding).max()
    limit = LIMIT + by_rounding / 50
    facts = {"check": _within("the model as loaded again", difference - rounding, rows, limit)}
    if by_rounding:
        moves = f"to {dtype} moves a logit by up to {by_rounding:.1e}, not counted above"
        facts["rounding"] = moves
    return facts | {"weights": f"{len(sums)} tensors, {dtype}"}


def _mesh() -> jax.sharding.Mesh:
    """All devices share the weights."""
    return make_mesh(configs.default().mesh)


def _rows(tokenizer: Tokenizer) -> np.ndarray:
    """TEXTS as ids [B,T], cut to the shortest."""
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    rows = [start + tokenizer.encode(text) for text in TEXTS]
    return np.array([row[: min(map(len, rows))] for row in rows], np.int32)


def _logits(model: Transformer, params: Any, lora: Any, rows: np.ndarray) -> np.ndarray:
    """[B,T] ids -> [B,T,V] float32."""
    return np.asarray(_forward(model, params, lora, rows))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Transformer, params: Any, lora: Any, rows: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    variables = {"params": params, "lora": lora}
    hidden = model.apply(variables, rows, jnp.ones_like(rows), positions)
    return logits(hidden, head_weight(params, model.arch), model.arch, model.dtype)


def _within(what: str, differences: np.ndarray, rows: np.ndarray, limit: float) -> str:
    """A sentence on the largest difference; raises UserError where it is over limit, or NaN."""
    largest = np.abs(differences).max()
    found = f"logits of {what} differ from base + adapter by at most {largest:.1e}"
    if not largest <= limit:
        raise UserError(f"nothing was exported: {found}, expected at most {limit:.1e}")
    return f"{found} (limit {limit:.1e}) over {rows.size} tokens"


def main() -> None:
    parser = Parser("gemma_lora.export", __doc__)
    parser.add_argument("--workdir", required=True, type=path_argument)
    parser.add_argument("--format", required=True, choices=("peft", "merged"))
    parser.add_argument("--out", required=True, type=path_argument, help="a new directory")
    parser.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: the run's")
    parser.add_argument(
        "--max-shard-gb", type=float, help=f"largest file of weights, 10^9 bytes ({SHARD_GB:g})"
    )
    a = parser.parse_args()
    banner("exported", export(a.workdir, a.format, a.out, a.dtype, a.max_shard_gb))


if __name__ == "__main__":
    run_main(main)
