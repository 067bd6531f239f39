"""What the tests of weights/ share: loading to numpy, one-line errors, a recorder of reads."""

import jax.numpy as jnp
import numpy as np
from common import all_logits, one_device

from gemma_lora.model import Transformer
from gemma_lora.weights import mapping
from gemma_lora.weights.pretrained import Pretrained, load_base, open_weights


def load(pretrained: Pretrained, dtype=jnp.float32, quantize: str = "") -> dict[str, np.ndarray]:
    """Our flat tree as numpy arrays, through one device."""
    model = Transformer(pretrained.arch, dtype, dtype, quantize=quantize)
    tree = load_base(pretrained, model, one_device())
    return {k: np.asarray(v) for k, v in mapping.flatten(tree).items()}


def load_dir(directory, dtype=jnp.float32) -> dict[str, np.ndarray]:
    return load(open_weights(str(directory), "auto"), dtype)


def logits(pretrained: Pretrained, tokens: np.ndarray) -> np.ndarray:
    """[B,T] ids -> [B,T,V] in float32."""
    model = Transformer(pretrained.arch)
    return all_logits(model, load_base(pretrained, model, one_device()), {}, tokens)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype, k
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


class Recorder:
    """Tensors that remember what was read."""

    def __init__(self, tensors: mapping.Tensors):
        self.tensors, self.reads = tensors, []

    def names(self) -> list[str]:
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self.tensors.read(name)
