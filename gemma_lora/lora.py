"""What to adapt and how, and what is done with whole trees of adapters.

The adapters themselves, their letters and sources are in adapters.py. Trees are stacked over L.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_lora.adapters import INITS, VARIANTS, Leaves
from gemma_lora.errors import UserError, require_name
from gemma_lora.layers import dequantized

# Names for common target sets; anything else is a regular expression.
TARGETS = {
    "all-linear": "(q|k|v|o|gate|up|down)_proj",
    "qv": "(q|v)_proj",  # PEFT's default for these models
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how; called as the model's `wrap`.

    Patterns are (regular expression, value) pairs: where the expression matches a module's path
    ('attn/q_proj') or its last name, the value of the first one that does stands for rank or alpha.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    targets: str = "all-linear"
    rslora: bool = False
    variant: str = "lora"
    init: str = "kaiming"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        for key in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, key, _pairs(key, getattr(self, key)))
        for key, rank in (("rank", self.rank), *_entries("rank_pattern", self.rank_pattern)):
            if not isinstance(rank, int) or rank < 1:
                raise UserError(f"lora.{key} is {rank!r}, expected a whole number, at least 1")
        for key, alpha in (("alpha", self.alpha), *_entries("alpha_pattern", self.alpha_pattern)):
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise UserError(f"lora.{key} is {alpha!r}, expected a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout is {self.dropout}, expected 0 <= dropout < 1")
        for key, table in (("variant", VARIANTS), ("init", INITS)):
            require_name(f"lora.{key}", getattr(self, key), table)
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise UserError(f"lora.targets {self.targets!r} is no regular expression: {e}") from e

    @property
    def pattern(self) -> str:
        return TARGETS.get(self.targets, self.targets)

    @property
    def scale(self) -> float:
        """s where no pattern says otherwise."""
        return self._scale(self.alpha, self.rank)

    @property
    def reads_base(self) -> bool:
        """Does step 0 depend on the base weights, so that `from_base` must be called."""
        return bool(self.changes_base or VARIANTS[self.variant].start)

    @property
    def changes_base(self) -> bool:
        """Does `from_base` change the base weights."""
        return bool(INITS[self.init])

    def rank_of(self, path: str) -> int:
        return _first(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        return _first(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        return self._scale(self.alpha_of(path), self.rank_of(path))

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def matches(self, path: str) -> bool:
        return _matches(self.pattern, path)

    def __call__(self, base: nn.Module, path: str) -> nn.Module:
        if not self.matches(path):
            return base
        if self.changes_base and base.quantize:
            raise UserError(
                f"lora.init {self.init!r} changes the base weights, which {base.quantize} cannot "
                "hold exactly; expected lora.init 'kaiming' or quantize ''"
            )
        return VARIANTS[self.variant](base, self.rank_of(path), self.scale_of(path), self.dropout)


def _matches(pattern: str, path: str) -> bool:
    """Does the expression match 'attn/q_proj', as a whole path or by its last name?"""
    return any(re.fullmatch(pattern, name) for name in (path, path.rsplit("/", 1)[-1]))


def _first(pairs: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    return next((value for pattern, value in pairs if _matches(pattern, path)), default)


def _pairs(key: str, pairs: Iterable[Any]) -> tuple[tuple[str, Any], ...]:
    try:
        return tuple((re.compile(pattern).pattern, value) for pattern, value in pairs)
    except (TypeError, ValueError, re.error) as e:
        raise UserError(
            f"lora.{key} is {pairs!r}, expected ((regular expression, number), ...): {e}"
        ) from e


def _entries(key: str, pairs: tuple[tuple[str, Any], ...]) -> list[tuple[str, Any]]:
    return [(f"{key} of {pattern!r}", value) for pattern, value in pairs]


def modules(lora: dict[str, Any]) -> dict[str, Leaves]:
    """{'attn/q_proj': its leaves} of a tree of adapters."""
    return {
        f"{module}/{name}": leaves
        for module, names in lora["layers"].items()
        for name, leaves in names.items()
    }


def put(tree: dict[str, Any], found: dict[str, Leaves]) -> dict[str, Any]:
    """`tree` with the leaves of modules replaced or added: the inverse of `modules`."""
    layers = dict(tree["layers"])
    for path, leaves in found.items():
        module, name = path.split("/")
        layers[module] = {**layers.get(module, {}), name: leaves}
    return {**tree, "layers": layers}


def check_targets(
    config: LoRAConfig, params: dict[str, Any], lora: dict[str, Any] | None = None
) -> list[str]:
    """The adapted paths of a base tree; shapes suffice.

    Raises UserError, listing all names, when the targets or an expression of a pattern match none;
    with lora, the adapters that model.init makes, also where they cannot start from such a base.
    """
    paths = [
        f"{module}/{name}"
        for module, leaves in params["layers"].items()
        for name, leaf in leaves.items()
        if isinstance(leaf, dict) and "w" in leaf
    ]
    found = [p for p in paths if config.matches(p)]
    if not found:
        raise UserError(
            f"lora.targets {config.targets!r} matches no module. "
            f"Names: {', '.join(sorted(paths))}; named sets: {', '.join(TARGETS)}"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, key):
            if not any(_matches(pattern, p) for p in found):
                raise UserError(
                    f"lora.{key} {pattern!r} matches no adapted module. "
                    f"Names: {', '.join(sorted(found))}"
                )
    if lora is not None and config.reads_base:
        jax.eval_shape(functools.partial(from_base, config), params, lora)
    return found


def count(tree: Any) -> int:
    """Number of elements in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def merged(config: LoRAConfig, path: str, w: jax.Array, leaves: Leaves) -> jax.Array:
    """One layer's W [in..., out...] float32 with its adapter in it, float32."""
    return VARIANTS[config.variant].merge(w, leaves, config.scale_of(path))


def merge(params: dict[str, Any], lora: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
    """params with the adapters in their weights, layer by layer in float32 and cast once.

    Raises UserError for quantised weights: the sum has no exact place in them.
    """

    def join(path: str, leaves: Leaves) -> Leaves:
        base = _at(params, path)
        if "w_scale" in base:
            raise UserError(f"{path} is quantised: adapters merge into weights of full precision")

        def layer(pair):
            w, leaves = pair
            return merged(config, path, w.astype(jnp.float32), leaves).astype(w.dtype)

        return {**base, "w": jax.lax.map(layer, (base["w"], leaves))}

    return put(params, {path: join(path, leaves) for path, leaves in modules(lora).items()})


def from_base(
    config: LoRAConfig, base: dict[str, Any], lora: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(base, lora) of step 0, from the real weights and the adapters that model.init made.

    Pure; to be called under jit, once, before anything is trained or restored. PiSSA takes its
    singular directions out of the base; DoRA reads the norms of the base. Otherwise both come back
    as they are. One layer of one module at a time is in float32.
    """
    init, start = INITS[config.init], VARIANTS[config.variant].start
    bases, found = {path: _at(base, path) for path in modules(lora)}, modules(lora)
    for path in found:
        scale = config.scale_of(path)
        if init:
            bases[path], found[path] = _each_layer(init, bases[path], found[path], scale)
        if start:
            found[path] = jax.lax.map(
                lambda layer, scale=scale: start(dequantized(layer[0]), layer[1], scale),
                (bases[path], found[path]),
            )
    return put(base, bases), put(lora, found)


def started_from_base(config: LoRAConfig, base: Any, lora: Any) -> tuple[Any, Any]:
    """`from_base` in place: what it changes keeps its sharding, and no second model is held."""
    where = jax.tree.map(lambda x: x.sharding, (base, lora))
    run = jax.jit(
        lambda *trees: from_base(config, *trees), donate_argnums=(0, 1), out_shardings=where
    )
    return run(base, lora)


def _each_layer(
    init: Callable, base: Leaves, leaves: Leaves, scale: float
) -> tuple[Leaves, Leaves]:
    """init on every layer of one module, in place where the caller donates the arrays."""

    def body(i, stacked):
        w, leaves = jax.tree.map(lambda x: x[i], stacked)
        found, leaves = init(w.astype(jnp.float32), leaves, scale)
        new = (found.astype(w.dtype), leaves)
        return jax.tree.map(lambda x, layer: x.at[i].set(layer), stacked, new)

    w, leaves = jax.lax.fori_loop(0, len(base["w"]), body, (base["w"], leaves))
    return {**base, "w": w}, leaves


def on_original_base(
    config: LoRAConfig, lora: dict[str, Any], initial: dict[str, Any]
) -> tuple[LoRAConfig, dict[str, Any]]:
    """Adapters trained on the base that from_base left, as adapters of the base it was given.

    initial: what from_base returned as lora. s (A B - A0 B0) is the product of [A, A0] and
    [B; -B0] at the same scale and twice the rank. Identity for an init that leaves the base alone.
    """
    if not config.changes_base:
        return config, lora

    def double(pairs, factor):
        return tuple((pattern, factor * value) for pattern, value in pairs)

    more = math.sqrt(2) if config.rslora else 2
    twice = dataclasses.replace(
        config,
        init="kaiming",
        rank=2 * config.rank,
        alpha=more * config.alpha,
        rank_pattern=double(config.rank_pattern, 2),
        alpha_pattern=double(config.alpha_pattern, more),
    )
    then = modules(initial)
    return twice, put(
        lora,
        {
            path: {
                **now,
                "a": jnp.concatenate([now["a"], then[path]["a"]], axis=-1),
                "b": jnp.concatenate([now["b"], -then[path]["b"]], axis=1),
            }
            for path, now in modules(lora).items()
        },
    )


def _at(params: dict[str, Any], path: str) -> Leaves:
    module, name = path.split("/")
    return params["layers"][module][name]
