"""The mesh, and what of a tree it splits."""

import common
import numpy as np
import pytest

from gemma_lora.errors import UserError
from gemma_lora.sharding import crossing, make_mesh


class FakeDevice:
    """What a mesh asks of the device of a slice, without the device."""

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index
        self.platform = self.device_kind = "fake"


def of_slices(sizes):
    numbered = [s for s, n in enumerate(sizes) for _ in range(n)]
    return [FakeDevice(i, s) for i, s in enumerate(numbered)]


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((2, 4, 1), ", 2 slices along data"),
        ((4, 2, 1), ", 2 slices along data"),
        ((1, -1, 2), ", 2 slices along fsdp"),
        ((1, 1, 8), ", 2 slices along tensor"),
    ],
)
def test_slices_lie_along_the_outermost_axis_that_they_divide(sizes, want):
    devices = of_slices([4, 4])[::-1]  # in no order
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), devices)
    assert crossing(mesh) == want
    assert {d.id for d in mesh.devices.flat} == set(range(8))
    of = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    axis = next(i for i, n in enumerate(mesh.devices.shape) if n % 2 == 0)
    assert [len(np.unique(part)) for part in np.split(of, 2, axis)] == [1, 1]


def test_four_slices_lie_along_two_axes():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, of_slices([2] * 4))
    assert crossing(mesh) == ", 4 slices along data and fsdp"


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(UserError, match=r"slices have \[2, 6\] devices"):
        make_mesh({"data": 2, "fsdp": 4, "tensor": 1}, of_slices([2, 6]))


def test_one_slice_crosses_nothing():
    assert crossing(common.one_device()) == ""


LEAVES = """
import common, jax, numpy as np
import flax.linen as nn
from gemma_lora.lora import LoRAConfig
from gemma_lora.model import Transformer
from gemma_lora.sharding import bytes_a_device, leaves, make_mesh, tree_shardings, unsplit

boxed = Transformer(common.tiny_arch("gemma3"), wrap=LoRAConfig(4, 8.0, 0.0)).abstract()
params = common.tiny_params("gemma3")
for sizes, missed in (((1, 2, 4), ["K=2"]), ((1, 8, 1), []), ((2, 2, 2), []), ((8, 1, 1), [])):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)))
    assert [x.partition(" ")[0] for x in unsplit(boxed, mesh)] == missed, unsplit(boxed, mesh)
    base = jax.device_put(jax.device_get(params), tree_shardings(boxed["params"], mesh))
    for x in jax.tree.leaves(base):
        assert {s.data.nbytes for s in x.addressable_shards} == {bytes_a_device(x)}
mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
(told,) = unsplit(boxed, mesh)
# Matrices of k and v, the adapters' B of both; A has no K.
assert told.endswith(" and 3 more)") and "K=2 not over tensor=4" in told, told
base = jax.device_put(jax.device_get(params), tree_shardings(boxed["params"], mesh))
lines = leaves({"base": base})
assert len(lines) == len(jax.tree.leaves(base))
(up,) = [x.split() for x in lines if "up_proj/w" in x]
assert up[0] == "base/layers/mlp/up_proj/w" and up[-3:] == ["7,168", "of", "57,344"], up
(norm,) = [x.split() for x in lines if "final_norm/scale" in x]
assert norm[-3:] == ["128", "of", "128"], norm  # a vector, whole though fsdp divides its 32
print("equal")
"""


def test_what_stays_whole_is_named_and_bytes_are_those_of_the_shards():
    """[7,32,64] float32 over fsdp 2 and tensor 4 is an eighth of 57,344 bytes a device."""
    common.on_eight_devices(LEAVES)
