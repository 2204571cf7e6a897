"""How many connections there may be, and from one address: with addresses that are made up, and no traffic."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from carserver.front.connection import Connection
from tests.rig import rigged


@pytest.mark.parametrize(
    ("address", "bounded"),
    [
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("203.0.113.7", True),
        ("2001:db8::7", True),
        ("::ffff:203.0.113.7", True),
    ],
)
def test_one_address_has_so_many_connections_but_loopback_has_all(tmp_path: Path, address: str, bounded: bool) -> None:
    with rigged(tmp_path, connections_per_address=2) as (rig, runner):
        front = rig.daemon.front

        def accept(address: str) -> Any:
            connection = Connection(front)
            connection.address = address
            assert front.accepted(connection)
            return connection

        async def check() -> None:
            first, second, third = (accept(address) for _ in range(3))
            assert front.full(third) == ("connections_per_address (2)" if bounded else None)
            assert front.full(accept("198.51.100.1")) is None, "another address has its own"
            front.lost(first)
            assert front.full(second) is None

        runner.run(check())


def test_a_few_more_than_all_connections_are_told_so_and_the_rest_is_not_even_read(tmp_path: Path) -> None:
    with rigged(tmp_path, connections=2, connections_per_address=1) as (rig, runner):
        front = rig.daemon.front

        async def check() -> None:
            connections = [Connection(front) for _ in range(4)]
            assert [front.accepted(connection) for connection in connections] == [True, True, True, False]
            assert front.full(connections[2]) == "connections (2)"
            await asyncio.sleep(0)

        runner.run(check())
