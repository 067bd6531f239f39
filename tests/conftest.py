"""Fixtures that several files of tests share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
import tiny_tokenizer

from gemma_lora.tokenizer import Tokenizer


def pytest_configure() -> None:
    """The process that starts the others makes the directory, and removes it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[tiny_run.COMPILED] = tempfile.mkdtemp()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ.pop(tiny_run.COMPILED), ignore_errors=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The tiny one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write_tokenizer(folder)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Few optimisations, equal programs compiled once: for tests that compile more than they run,
    of what does not depend on how well it is compiled."""
    with tiny_run.quick_compilation():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Iterator[Path]:
    """Where `tiny_run.write_inputs` wrote; programs are compiled quickly while it is in use."""
    with tiny_run.quick_compilation():
        yield tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory) -> tuple[Path, str]:
    """(workdir, what was printed) of a run of `tiny_run.settings` that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return workdir, tiny_run.run(workdir, tiny_run.settings(inputs), drawn=True)
