"""What an agent's program pays for importing the client, in modules: times are for `scripts`."""

import subprocess
import sys

import pytest

HEAVY = {"click", "jsonschema_rs", "orjson", "prometheus_client", "rich", "sqlite3", "unittest", "uvloop"}
ROOMS = {f"carserver.{room}" for room in ("cli", "config", "core", "daemon", "front", "methods", "rpc", "stores")}


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import carserver.client", {"asyncio", "msgspec", "websockets"}),
        ("from carserver.client import ClientError, CallError", {"asyncio", "websockets"}),
        ("from carserver.client import *", set()),
        ("import carserver.client.sync", set()),
    ],
)
def test_nothing_is_imported_that_is_not_needed(statement: str, unwanted: set[str]) -> None:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & (HEAVY | ROOMS | unwanted)


def test_every_public_name_is_there_and_no_other() -> None:
    from carserver import client  # noqa: PLC0415 - which is what this tests

    assert all(getattr(client, name) is not None for name in client.__all__)
    assert set(client.__all__) <= set(dir(client))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = client.nothing
