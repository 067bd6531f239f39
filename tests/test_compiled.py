"""Where compiled programs are kept, and that a second start finds them."""

import os
import subprocess
import sys

import pytest

CHILD = """
import jax, jax.numpy as jnp
from gemma_lora.compiled import keep_compiled
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
print(jax.config.jax_compilation_cache_dir or None, "/jax/compilation_cache/cache_hits" in hits)
"""


def start(**environment: str) -> list[str]:
    """(folder, did it find a program) of a process that compiles."""
    rest = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    line = [sys.executable, "-c", CHILD]
    done = subprocess.run(line, env=rest | environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_second_start_finds_the_programs(tmp_path):
    first, second = (start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first[0].startswith(str(tmp_path / "gemma_lora" / "compiled"))
    assert (first[1], second[1]) == ("False", "True") and first[0] == second[0]


@pytest.mark.parametrize("chosen", ["other", ""])
def test_the_users_choice_counts(tmp_path, chosen):
    chosen = chosen and str(tmp_path / chosen)
    folder, _ = start(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=chosen)
    assert folder == (chosen or "None") and not (tmp_path / "gemma_lora").exists()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "gemma_lora").write_text("a file, no folder")
    assert start(XDG_CACHE_HOME=str(tmp_path)) == ["None", "False"]
