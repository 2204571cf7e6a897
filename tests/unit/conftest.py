"""Fixtures of the unit tests."""

from pathlib import Path

import pytest

from carserver.stores.folder import StateFolder


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    """A state folder of the test's own, found by its variable; no other variable is set."""
    for variable in (
        "CARSERVER_URL",
        "CAR_DAEMON_URL",
        "CAR_AUTH_TOKEN",
        "CARSERVER_AUTH_TOKEN",
        "CARSERVER_HOST_TOKEN",
        "FORCE_COLOR",  # by which a machine takes what is written for a terminal
        "TTY_COMPATIBLE",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CARSERVER_STATE_DIR", str(tmp_path / "state"))
    return StateFolder(tmp_path / "state")
