"""Compiled programs: one for each length of a batch, and kept on disk from start to start."""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable, Iterable
from typing import Any

import jax

from gemma_lora.data.dataset import Dataset
from gemma_lora.files import cache_dir
from gemma_lora.sharding import Mesh, to_global

_KEPT_BYTES = 4 * 2**30  # of compiled programs; those unused for longest go first


def keep_compiled() -> None:
    """Keeps compiled programs in the cache folder, unless the user chose where or not to."""
    if jax.config.jax_compilation_cache_dir or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    path = cache_dir() / "compiled" / _processor()
    with contextlib.suppress(OSError):  # a folder that cannot be written only costs the time
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(path))
            jax.config.update("jax_compilation_cache_max_size", _KEPT_BYTES)
            # A run compiles dozens of programs of a tenth of a second.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _processor() -> str:
    """Names what a program for the host's processor was compiled for.

    jax's own key does not tell processors apart, and one may lack another's instructions.
    """
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux alone says more
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        named = ("model name", "flags", "Features", "CPU part")
        facts += sorted({line for line in lines if line.startswith(named)})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


class Compiled:
    """A jitted step(*args, batch), compiled now for every length T of the sets' batches.

    `made` holds the programs by T; a call with another T raises KeyError: nothing is compiled on
    the way.
    """

    def __init__(
        self, step: Callable[..., Any], args: tuple, sets: Iterable[Dataset], mesh: Mesh
    ) -> None:
        first = {t: (data, at[0]) for data in sets for t, at in data.steps_by_length().items()}
        self.made = {
            t: step.lower(*args, to_global(data.batch_at(i).arrays, mesh)).compile()
            for t, (data, i) in first.items()
        }

    def __call__(self, *args: Any) -> Any:
        return self.made[args[-1]["tokens"].shape[1]](*args)
