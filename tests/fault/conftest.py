"""Fixtures of the fault tests."""

from pathlib import Path

import pytest

from tests.fault.preload import CannotPreload, Faults, compiled


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
