"""Decoding with a cache against the plain forward of every token, which knows no cache."""

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_lora.decode import Sampling, continuations, sampled
from gemma_lora.errors import UserError
from gemma_lora.lora import LoRAConfig

pytestmark = pytest.mark.usefixtures("quick")

NEW = 12  # more than the window of 8
# Of unlike lengths, one beyond the window: rows of a batch are padded, and must not see it.
PROMPTS = [tiny.tokens(seed, 1, length)[0] for seed, length in enumerate((5, 12, 1, 9, 3))]


def continued(model, params, lora, prompts=PROMPTS, **changes) -> list[list[int]]:
    settings = {"stops": (), "rows": 2, "new": NEW} | changes
    found = dict(continuations(model, params, lora, prompts, **settings))
    assert sorted(found) == list(range(len(prompts)))
    return [found[i].tolist() for i in range(len(prompts))]


def plain(model, params, lora, found: list[list[int]]) -> list[np.ndarray]:
    """The logits [NEW,V] that chose each new token, by a forward of whole rows."""
    rows = np.zeros((len(found), max(map(len, PROMPTS)) + NEW), np.int32)
    for row, prompt, new in zip(rows, PROMPTS, found, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *new]
    z = common.all_logits(model, params, lora, rows)
    return [z[i, len(p) - 1 :][:NEW] for i, p in enumerate(PROMPTS)]


# One of each kind: soft-cap and window, norms of q and k, neither and biases, an untied head.
@pytest.mark.parametrize("name", ("gemma", "gemma2", "gemma3", "qwen2_untied"))
def test_tokens_are_those_of_the_plain_forward(name):
    model, params = common.tiny_model(name, LoRAConfig(4, 8, 0.3))
    lora = common.adapter(name)
    # Drawn: the likeliest of a random model are all the same token, which would hide much.
    sampling = Sampling(temperature=4.0)
    found = continued(model, params, lora, sampling=sampling, seed=1)
    for place, (z, got) in enumerate(zip(plain(model, params, lora, found), found, strict=True)):
        own = jax.random.fold_in(jax.random.key(1), place)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(NEW))
        assert got == sampled(z, keys, sampling).tolist()
    assert len(set(np.ravel(found))) > 20


def test_greedy_is_the_likeliest_and_an_adapter_counts():
    model, params = common.tiny_model("gemma3", LoRAConfig(4, 8, 0.3))
    lora = common.adapter("gemma3")
    found = continued(model, params, lora)
    for z, got in zip(plain(model, params, lora, found), found, strict=True):
        assert got == z.argmax(-1).tolist()
    base, _ = common.tiny_model("gemma3")
    assert continued(base, params, {}) != found


def test_a_stop_ends_its_row_alone():
    model, params = common.tiny_model("gemma3")
    whole = continued(model, params, {})
    stop = whole[1][7]
    for got, row in zip(continued(model, params, {}, stops=(stop,)), whole, strict=True):
        assert got == (row[: row.index(stop) + 1] if stop in row else row)


def test_the_rows_of_a_batch_do_not_matter():
    model, params = common.tiny_model("gemma2")
    drawn = {"sampling": Sampling(temperature=2.0, top_p=0.9), "seed": 3}
    draws = continued(model, params, {}, rows=1, **drawn)
    assert continued(model, params, {}, rows=5, **drawn) == draws
    assert continued(model, params, {}, rows=5, **drawn | {"seed": 4}) != draws


MESHES = """
import common, jax, test_decode
from gemma_lora.lora import LoRAConfig
from gemma_lora.model import Transformer
from gemma_lora.sharding import make_mesh, tree_shardings

wrap = LoRAConfig(4, 8.0, 0.0)
model, params = common.tiny_model("gemma3", wrap)
lora = common.adapter("gemma3")
one = test_decode.continued(model, params, lora)
mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
split = Transformer(model.arch, wrap=wrap, mesh=mesh)
boxed = split.abstract()
trees = [jax.device_put(jax.device_get(tree), tree_shardings(boxed[name], mesh))
         for name, tree in (("params", params), ("lora", lora))]
assert test_decode.continued(split, *trees, rows=4) == one
print("equal")
"""


def test_the_mesh_does_not_matter():
    common.on_eight_devices(MESHES)


def test_draws_follow_the_probabilities():
    n = 20_000
    p = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    z = jnp.tile(jnp.log(p), (n, 1)).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), n)
    for temperature, top_p, want in (
        (1.0, 1.0, p),
        (0.5, 1.0, p**2),
        (1.0, 0.8, p * (np.arange(5) < 3)),  # 0.75 < 0.8: the third is needed
        (1.0, 0.74, p * (np.arange(5) < 2)),
        (1.0, 1e-6, p * (np.arange(5) < 1)),
        (2.0, 0.4, p * (np.arange(5) < 2)),  # the temperature comes first: 0.36 is the first's
    ):
        got = np.bincount(sampled(z, keys, Sampling(temperature, top_p)), minlength=5) / n
        want = want / want.sum() if temperature != 2 else np.sqrt(want) / np.sqrt(want).sum()
        np.testing.assert_allclose(got, want, atol=5 * np.sqrt(0.25 / n))
        assert not got[want == 0].any()
    assert (sampled(z, keys, Sampling()) == 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"new": 0}, "got 0 new tokens"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature -1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature nan"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p 0;"),
        ({"prompts": [np.array([5]), np.array([], np.int32)]}, "prompt 1 is empty"),
    ],
)
def test_refusals(changes, said):
    model, params = common.tiny_model("gemma")
    with pytest.raises(UserError, match=said):
        continued(model, params, {}, **changes)
