"""Fixtures of the fault tests."""

import random
from pathlib import Path

import pytest

from tests.fault.preload import CannotPreload, Faults, compiled


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A test's own, and the same each time: a change is not blamed for what another one would have met.

    The commands, `scripts/…_rounds`, search on.
    """
    return random.Random(request.node.name)


@pytest.fixture(scope="session")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path | CannotPreload:
    """The library, compiled once; or why there is none."""
    try:
        return compiled(tmp_path_factory.mktemp("preload"))
    except CannotPreload as reason:
        return reason


@pytest.fixture
def faults(preload: Path | CannotPreload, tmp_path: Path) -> Faults:
    """Faults for a daemon that is started with `wrapper=faults.wrapper`; none yet."""
    if isinstance(preload, CannotPreload):
        pytest.skip(str(preload))
    return Faults(preload, tmp_path / "faults")
