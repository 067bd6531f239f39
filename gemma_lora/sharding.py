"""Mesh and shardings: letters -> mesh axes -> NamedSharding trees; host rows -> global arrays."""

import collections
import math
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_lora.errors import UserError

AXES = ("data", "fsdp", "tensor")

# The letter of an array axis -> the mesh axis it is split over. Letters not named are whole on
# every device. B is split over both data axes; the weights' D over fsdp alone, that of matrices.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "D": ("fsdp",),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
}


def make_mesh(sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor; one size may be -1 and takes what is left.

    Slices, which meet over the slow network between hosts alone, are laid along data as far as its
    size shares factors with their number, then along fsdp, then tensor. Raises UserError when the
    sizes do not multiply to the number of devices, or the slices differ in size.
    """
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes[a]) for a in AXES]
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f"mesh is {dict(sizes)}: sizes are positive, and at most one is -1")
    if -1 in shape:
        known = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(shape)) != len(devices):
        got = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
        raise UserError(
            f"mesh {got} needs {int(np.prod(shape))} devices, but there are {len(devices)}"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = collections.Counter(getattr(d, "slice_index", None) for d in devices)
    if len(slices) < 2:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if len(set(slices.values())) > 1:
        raise UserError(f"slices have {sorted(slices.values())} devices, expected equal numbers")
    left, outer = len(slices), []
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [n // m for n, m in zip(shape, outer, strict=True)]
    # As jax.make_mesh does for one slice.
    grid = mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)


def mesh_of_first(n: int) -> Mesh:
    """The first n devices along fsdp, in their order: they need not lie side by side."""
    grid = np.array(jax.devices()[:n]).reshape(1, n, 1)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def crossing(mesh: Mesh) -> str:
    """', 2 slices along data' for a mesh over several slices, or ''."""
    slices = np.vectorize(lambda d: getattr(d, "slice_index", 0) or 0)(mesh.devices)
    along = [a for i, a in enumerate(AXES) if np.any(np.diff(slices, axis=i))]
    return f", {len(np.unique(slices))} slices along {' and '.join(along)}" if along else ""


def spec(letters: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one array. An axis that its mesh axes do not divide stays whole.

    Raises UserError when two axes of the array claim one mesh axis.
    """
    parts: list[Any] = []
    taken: dict[str, str | None] = {}
    for letter, size in zip(letters, shape, strict=True):
        axes = _axes(letter, mesh)
        if not axes or size % _ways(axes, mesh):
            parts.append(None)
            continue
        for a in axes:
            if a in taken:
                raise UserError(
                    f"sharding rules send both {taken[a]} and {letter} of an array "
                    f"{''.join(map(str, letters))} to mesh axis {a!r}"
                )
            taken[a] = letter
        parts.append(axes if len(axes) > 1 else axes[0])
    return PartitionSpec(*parts)


def _axes(letter: str | None, mesh: Mesh) -> tuple[str, ...]:
    return tuple(a for a in RULES.get(letter or "", ()) if mesh.shape[a] > 1)


def _ways(axes: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _boxes(boxed: Any) -> Iterator[tuple[str, nn.LogicallyPartitioned]]:
    """('layers/mlp/up_proj/w', the leaf in its box) of a tree as Linen makes it."""
    box = nn.LogicallyPartitioned
    for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, box)):
        yield "/".join(str(k.key) for k in path), leaf


def _letters(leaf: nn.LogicallyPartitioned) -> tuple[str | None, ...]:
    """Its axes, None for those that are not to be split: the D of a vector (a norm's scale, DoRA's
    magnitudes, the scales of int8). To gather it in every layer would cost more than it spares."""
    return leaf.names if set(leaf.names) - {"L", "D"} else (None,) * len(leaf.names)


def unsplit(boxed: Any, mesh: Mesh) -> list[str]:
    """'K=1 not over tensor=4 (params/layers/attn/k_proj/w and 3 more)' for every axis that the
    rules split and whose size the mesh does not divide."""
    found = collections.defaultdict(list)
    for path, leaf in _boxes(boxed):
        for letter, size in zip(_letters(leaf), leaf.value.shape, strict=True):
            axes = _axes(letter, mesh)
            if axes and size % _ways(axes, mesh):
                over = ", ".join(f"{a}={mesh.shape[a]}" for a in axes)
                found[f"{letter}={size} not over {over}"].append(path)
    return [
        f"{what} ({paths[0]}" + (f" and {len(paths) - 1} more)" if paths[1:] else ")")
        for what, paths in found.items()
    ]


def bytes_a_device(x: Any) -> int:
    """Of an array, or of a shape with a sharding."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def leaves(trees: Any) -> list[str]:
    """One line for every leaf: its path, dtype and shape, partition, bytes a device and in all."""
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/'):<56} "
        f"{f'{x.dtype.name}{list(x.shape)}':<28} {tuple(x.sharding.spec)!s:<34} "
        f"{bytes_a_device(x):>14,} of {math.prod(x.shape) * x.dtype.itemsize:,}"
        for path, x in jax.tree.leaves_with_path(trees)
    ]


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of arrays or shapes boxed with their axis letters by Linen."""

    def one(leaf):
        return NamedSharding(mesh, spec(_letters(leaf), leaf.value.shape, mesh))

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rank: int = 2) -> NamedSharding:
    """Rows over data and fsdp; the other axes whole. `rank` counts the array's axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *(None,) * (rank - 1)))


def split_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x [B,...], held to rows over data and fsdp and everything else whole; one device: x itself.

    The embedding table is split over D, and without this XLA follows the table: it splits the
    activations over D, gives every device all rows, and sums every matrix product over devices.
    """
    if mesh is None or mesh.size == 1:
        return x
    rows = spec(("B",) + (None,) * (x.ndim - 1), x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows))


def gathered(w: jax.Array, letters: Iterable[str], mesh: Mesh | None) -> jax.Array:
    """A matrix, whole over fsdp and split over tensor as it was; one device: w itself.

    Where a product contracts D, XLA for TPU would else send shards of the matrix round and add up
    partial products in float32: for a wide result that moves and holds more than the matrix, and
    for an adapter's it is one small exchange for every other device, product and layer.
    """
    if mesh is None or mesh.size == 1:
        return w
    kept = tuple(None if "fsdp" in RULES.get(c, ()) else c for c in letters)
    return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, spec(kept, w.shape, mesh)))


def check_rows(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raises UserError where the devices cannot share the rows of a (micro-)batch evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * micro_batches):
        times = f", in each of train.micro_batches={micro_batches}" if micro_batches > 1 else ""
        raise UserError(
            f"data.batch_size is {batch_size}, expected a multiple of {ways * micro_batches}: mesh "
            f"data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']} shares the rows among its "
            f"devices{times}"
        )


def rows_here(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that devices of this process hold, ascending.

    Not every mesh gives a process neighbouring rows, and where tensor spans processes, several of
    them hold the same rows.
    """
    parts = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts]))


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays of `rows_here` -> global arrays with the rows of all processes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = rows_here(ways, mesh)  # of equal parts of the rows, as many as there are ways

    def one(x: np.ndarray) -> jax.Array:
        each = len(x) // len(parts)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            at = np.searchsorted(parts, (index[0].start or 0) // each) * each
            return x[at : at + each]

        shape = (each * ways, *x.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, x.ndim), piece)

    return {k: one(x) for k, x in batch.items()}
