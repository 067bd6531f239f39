"""Fixtures that several files of tests share."""

from collections.abc import Iterator

import pytest
import tiny_run


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Iterator[None]:
    """Few optimisations, equal programs compiled once: for tests that compile more than they run,
    of what does not depend on how well it is compiled."""
    with tiny_run.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield
