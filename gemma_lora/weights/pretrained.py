"""What `config.weights` names: opened, checked against the arch, and put on the devices."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_lora.arch import ARCHS, Arch, get_arch
from gemma_lora.errors import UserError, nearest
from gemma_lora.files import local_path, read_json
from gemma_lora.files import sha256 as file_sha256
from gemma_lora.model import Transformer
from gemma_lora.sharding import tree_shardings
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import gguf, hf, hub, keras, mapping, orbax, peft


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint: nothing but headers has been read."""

    arch: Arch
    tensors: mapping.Tensors
    form: str  # a name of mapping.FORMS
    tokenizer: Callable[[], Tokenizer]
    base_name: str  # what an adapter made on these weights calls its base
    notice: str  # licence, what is left out, or nothing
    home: pathlib.Path  # the directory that the files are in
    stated: dict[str, Any]  # what the files say of the model, in the words of a config.json
    revision: str = ""  # of a base on the hub, where one was asked for
    inner: str = ""  # peft.INNER where the files are those of a multimodal model


@dataclasses.dataclass(frozen=True)
class _Opened:
    """One format's answer: the tensors, and what its files say of the model."""

    tensors: mapping.Tensors
    form: str
    where: pathlib.Path  # what the facts were read from
    facts: dict[str, Any]  # the fields of Arch that the files state
    arch: Arch | None  # the arch that they make; None where they do not say enough
    tokenizer: Callable[[], Tokenizer]
    fit: Callable[[Arch], Arch] = lambda arch: arch  # the arch with the file's number of words
    vision: int = 0  # tensors of image parts, left out
    stated: dict[str, Any] = dataclasses.field(default_factory=dict)  # as in Pretrained


def open_weights(weights: str, arch: str, sha256: str = "", tokenizer: str = "") -> Pretrained:
    """Opens config.weights: one of CHOICES.

    arch is a name of ARCHS, or 'auto': what the files say of themselves. Raises UserError for
    missing, corrupt or foreign files, a wrong sha256, or facts that contradict the arch.
    """
    notice, base_name, revision = "", weights, ""
    source, colon, name = weights.partition(":")
    if weights == "demo":
        if arch not in ("gemma3_270m", "auto"):
            raise UserError(
                f"the demo weights are of arch gemma3_270m, but the config says {arch}; "
                "give --config.arch=gemma3_270m as well"
            )
        notice, base_name, path = gguf.DEMO_LICENCE, "google/gemma-3-270m", gguf.demo_path()
    elif colon and source in _FETCH:
        path = _FETCH[source](name)
        if source == "hf":
            base_name, _, revision = name.partition("@")
    else:
        path = local_path(weights)
        base_name = str(path)
    opener = _opener(weights, path)
    if sha256:
        if path.is_dir():
            raise UserError("weights_sha256 is given, but the weights are a directory, not a file")
        if (got := file_sha256(path)) != sha256.lower():
            raise UserError(f"{path} has sha256 {got}, expected {sha256.lower()}")
    opened = opener(path)
    chosen = opened.arch if arch == "auto" else get_arch(arch)
    if chosen is None:
        raise UserError(
            f"arch is 'auto', but {opened.where} does not say which model this is; give one of "
            f"{', '.join(ARCHS)}"
        )
    wrong = [
        f"{k} is {stated}, arch says {getattr(chosen, k)}"
        for k, stated in opened.facts.items()
        if stated != getattr(chosen, k)
    ]
    if wrong:
        raise UserError(
            f"{opened.where} is not of arch {arch}: {'; '.join(wrong)}. "
            "With --config.arch=auto the weights themselves say what they are"
        )
    if opened.vision:
        notice = f"Text only: {opened.vision} tensors of its image parts are left out"
    return Pretrained(
        opened.fit(chosen),
        opened.tensors,
        opened.form,
        (lambda: _tokenizer(tokenizer)) if tokenizer else opened.tokenizer,
        base_name,
        notice,
        path if path.is_dir() else path.parent,
        opened.stated,
        revision,
        peft.INNER if opened.vision else "",
    )


# ---- one function a format ------------------------------------------------------------------


def _hf(path: pathlib.Path) -> _Opened:
    home = path if path.is_dir() else path.parent
    config, found, stated = home / "config.json", None, {}
    if config.exists():
        stated = read_json(config)
        if quantised := stated.get("quantization_config"):
            how = quantised.get("quant_method", "method unknown")
            raise UserError(
                f"{config}: the weights are quantised ({how}): expected those of the unquantised "
                "model, whose matrices --config.quantize=int8 stores in 8 bits"
            )
        found = Arch.from_hf(stated)
    facts = dataclasses.asdict(found) if found else {}
    tensors = hf.Safetensors(path)
    from_dir = lambda: Tokenizer.from_dir(home)  # noqa: E731
    stated = (stated.get("text_config") or {}) | stated  # multimodal Gemma 3
    return _Opened(
        tensors, "hf", config, facts, found, from_dir, vision=tensors.vision, stated=stated
    )


def _gguf(path: pathlib.Path) -> _Opened:
    file = gguf.GGUFFile(path)
    stated = file.config()
    found = Arch.from_hf(stated)
    facts = dataclasses.asdict(found)
    # llama.cpp's files do not state the first, and have only the words that the tokenizer has.
    del facts["query_scale"], facts["vocab"]
    listed = _listed(facts)
    return _Opened(
        file,
        "gguf",
        path,
        facts,
        listed or dataclasses.replace(found, query_scale=float(found.head_dim)),
        lambda: Tokenizer.from_gguf(file.metadata),
        lambda arch: dataclasses.replace(arch, vocab=found.vocab),
        stated=stated,
    )


def _flax(path: pathlib.Path) -> _Opened:
    home = orbax.find(path)
    tensors = orbax.Orbax(home)
    facts = tensors.facts()
    return _Opened(
        tensors,
        "flax",
        home,
        facts,
        _listed(facts),
        lambda: Tokenizer.from_dir(home),
        lambda arch: dataclasses.replace(arch, vocab=tensors.keep_rows(arch.vocab)),
        tensors.vision,
    )


def _keras(path: pathlib.Path) -> _Opened:
    preset = keras.KerasPreset(path)
    found = Arch.from_hf(preset.arch)
    facts = dataclasses.asdict(found)
    del facts["vocab"]  # Gemma 3 lacks the words that transformers adds for images
    return _Opened(
        preset,
        preset.form,
        path,
        facts,
        found,
        lambda: Tokenizer.from_dir(path),
        lambda arch: dataclasses.replace(arch, vocab=min(arch.vocab, found.vocab)),
    )


_FETCH: dict[str, Callable[[str], pathlib.Path]] = {
    "hf": hub.hugging_face,
    "kaggle": hub.kaggle,
    "keras": keras.fetch,
}
_FILES = {".gguf": _gguf, ".safetensors": _hf}
_DIRECTORIES = {
    "*.safetensors*": _hf,
    "_METADATA": _flax,
    "*/_METADATA": _flax,
    "model.weights.*": _keras,
}
CHOICES = (
    "'demo', hf:ORG/NAME, kaggle:OWNER/MODEL/flax/VARIATION, keras:PRESET, a .gguf or .safetensors "
    "file, or a directory of Hugging Face files, of an official Flax checkpoint or a Keras preset"
)


def _opener(weights: str, path: pathlib.Path) -> Callable[[pathlib.Path], _Opened]:
    """The function that opens the file or directory; raises UserError where there is none."""
    if not path.exists():
        home = path.parent
        files = [*home.glob("*.gguf"), *home.glob("*.safetensors")]
        there = [p.name for p in (*files, *(f.parent for f in home.glob("*/config.json")))]
        hint = f"; {nearest(path.name, there)}" if there else ""
        raise UserError(f"weights {weights!r} do not exist: expected {CHOICES}{hint}")
    if path.is_dir():
        for pattern, opener in _DIRECTORIES.items():
            if any(path.glob(pattern)):
                return opener
        patterns = ", ".join(_DIRECTORIES)
        raise UserError(f"no weights in {path}: expected one of {patterns} there")
    if path.suffix not in _FILES:
        raise UserError(f"{path} is no weights file: expected {' or '.join(_FILES)}")
    return _FILES[path.suffix]


def _listed(facts: dict[str, Any]) -> Arch | None:
    """The arch of ARCHS that has all of these fields."""
    return next(
        (a for a in ARCHS.values() if all(getattr(a, k) == v for k, v in facts.items())), None
    )


def _tokenizer(path: str) -> Tokenizer:
    place = local_path(path)
    if place.name == "tokenizer.json":
        place = place.parent  # what its special tokens are for stands in the files beside it
    return (Tokenizer.from_dir if place.is_dir() else Tokenizer.from_file)(place)


# ---- onto the devices -----------------------------------------------------------------------


def load_base(pretrained: Pretrained, model: Transformer, mesh: Mesh) -> dict[str, Any]:
    """The base weights on the devices, in the model's dtype (norms in float32) and shardings."""
    boxed = model.abstract()["params"]
    return mapping.load(
        pretrained.tensors,
        pretrained.form,
        pretrained.arch,
        nn.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


_ROWS = 4096


@jax.jit
def _sum_of_bits(layers: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    """Of integers, so the same however the leaves are split over devices; of each element's bits
    and position, mixed as MurmurHash3 ends, so that what is moved or negated counts."""

    def add(total: jax.Array, leaves: list[jax.Array]) -> tuple[jax.Array, None]:
        for x in leaves:
            h = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
            stride = 1
            for axis in reversed(range(x.ndim)):
                position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
                h += position * jnp.uint32(stride * 0x9E3779B9 % 2**32)
                stride *= x.shape[axis]
            h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
            h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
            total = total * 3 + jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
        return total, None

    # A layer at a time: an array of 32 bits of all would be twice the weights.
    total, _ = jax.lax.scan(add, jnp.uint32(0), layers)
    return add(total, [x[:: max(1, len(x) // _ROWS)] for x in others])[0]


def fingerprint(base: dict[str, Any]) -> str:
    """Eight digits that other weights or another dtype would not have, on any mesh. Of the tables
    of words about _ROWS rows count."""
    others = {k: v for k, v in base.items() if k != "layers"}
    return f"{int(_sum_of_bits(jax.tree.leaves(base['layers']), jax.tree.leaves(others))):08x}"


def not_finite(base: dict[str, Any]) -> list[str]:
    """The leaves that hold a NaN or an infinity."""
    finite = jax.jit(lambda base: jax.tree.map(lambda x: jnp.isfinite(x).all(), base))(base)
    return [path for path, good in mapping.flatten(finite).items() if not good]


def build_model(arch: Arch, config: Any, wrap: Callable, mesh: Mesh | None = None) -> Transformer:
    """The model a config describes, on the mesh that will run it; none: one device."""
    dtype = jnp.dtype(config.dtype)
    return Transformer(
        arch,
        dtype,
        dtype,
        wrap,
        remat=config.remat,
        unroll=config.unroll,
        quantize=config.quantize,
        mesh=mesh,
        attention=config.attention,
    )
