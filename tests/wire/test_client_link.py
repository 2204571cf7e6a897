"""A car and a real daemon: how it is found, why it is not, and what becomes of calls when the connection is lost."""

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from carserver.client import Car, ConnectionLost, NotAuthorised, Unreachable, connect
from carserver.protocol.runs import Snapshot
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import peer

EVENT = {"type": "text_delta", "text": "x"}
CALLS = 200


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No daemon is found but those that a test names."""
    for name in os.environ:
        if name.startswith(("CARSERVER_", "CAR_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))


# ------------------------------------------------------------------------------------------------------------ finding


async def test_a_daemon_is_found_by_its_folder_by_the_environment_and_by_its_address(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect(state_dir=daemon.state) as car:
        assert (await car.server.status()).version
    async with connect(daemon.url, token=daemon.token()) as car:
        assert (await car.server.status()).version
    async with connect(daemon.url, host_token=daemon.token("host-token")) as car:
        assert (await car.server.prune(older_than_ms=0)).runs == 0, "the host's alone to ask"
    async with connect(state_dir=daemon.state, agent_id="coder") as car:
        run = await car.runs.create("mine")
        async with connect(state_dir=daemon.state) as other:
            assert run.id not in [one.id for one in (await other.runs.list()).runs]
    monkeypatch.setenv("CARSERVER_STATE_DIR", str(daemon.state))
    async with connect() as car:
        assert (await car.server.status()).version
    monkeypatch.delenv("CARSERVER_STATE_DIR")
    monkeypatch.setenv("CAR_DAEMON_URL", daemon.url)
    monkeypatch.setenv("CAR_AUTH_TOKEN", daemon.token())
    async with connect() as car:
        assert (await car.server.status()).version


async def test_why_there_is_no_daemon_is_said_at_once(daemon: Daemon, tmp_path: Path) -> None:
    async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reasons: list[tuple[Car, type[Exception], str]] = [
        (connect(), Unreachable, "no daemon found in .*/none/carserver: start one with `carserver serve`"),
        (connect(state_dir=tmp_path), Unreachable, "no daemon found in"),
        (connect(daemon.url), NotAuthorised, "no token for ws://.* was found"),
        (connect(daemon.url, token="another"), NotAuthorised, "does not accept this token"),
        (connect(daemon.url, host_token=daemon.token()[::-1]), NotAuthorised, "does not accept this token"),
        (connect(f"ws://127.0.0.1:{port}", token="a"), Unreachable, "does not speak WebSocket"),
        (connect(daemon.url.replace("ws:", "wss:"), token="a"), Unreachable, "no TLS with wss://.*is it ws:// that"),
        (
            connect("ws://nowhere.invalid:1", token="a"),
            Unreachable,
            "ws://nowhere.invalid:1",
        ),  # or its resolver is slow
    ]
    async with server:
        for car, kind, said in reasons:
            with pytest.raises(kind, match=said):
                async with car:
                    pass


async def test_a_daemon_without_authentication_needs_no_token(start: StartDaemon) -> None:
    daemon = start("--no-auth")
    async with connect(daemon.url) as car:
        assert (await car.server.status()).version


# -------------------------------------------------------------------------------------------------------- being lost


async def test_a_daemon_that_is_killed_and_restarted_elsewhere_is_found_again_and_waiting_calls_go_on(
    daemon: Daemon,
) -> None:
    async with connect(state_dir=daemon.state) as car:
        run = await car.runs.create("before")
        daemon.kill()
        waiting = [asyncio.create_task(car.runs.create(f"{n}", idempotency_key=f"{n}")) for n in range(CALLS)]
        reading = asyncio.create_task(car.runs.get(run.id))
        await asyncio.to_thread(daemon.start)
        assert len({made.id for made in await asyncio.gather(*waiting)}) == CALLS
        assert (await reading).prompt == "before"


async def test_a_daemon_that_drains_is_waited_for(daemon: Daemon) -> None:
    async with connect(state_dir=daemon.state) as car:
        run = await car.runs.create("before")
        stopping = asyncio.create_task(asyncio.to_thread(daemon.terminate))
        reading = asyncio.create_task(car.runs.get(run.id))
        while not stopping.done():  # through its whole drain
            await asyncio.wait([reading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                assert (await reading).prompt == "before"
                reading = asyncio.create_task(car.runs.get(run.id))
        await asyncio.to_thread(daemon.start)
        assert (await reading).prompt == "before"
        assert (await car.runs.record(run.id, [EVENT])).cursor == 1


def left() -> tuple[int, int]:
    """How many sockets and tasks this process has."""
    links = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            links.append(str(file.readlink()))
    return sum(link.startswith("socket:") for link in links), len(asyncio.all_tasks())


async def test_nothing_is_left_when_a_car_is_closed_in_whichever_state(daemon: Daemon) -> None:
    async with connect(state_dir=daemon.state) as car:  # what is made once is made
        await car.runs.list()
    gc.collect()  # what other tests have left is not to go meanwhile
    before = left()
    async with connect(state_dir=daemon.state) as car:
        calls = [asyncio.create_task(car.runs.list()) for _ in range(10)]
    await asyncio.gather(*calls, return_exceptions=True)
    async with connect(state_dir=daemon.state) as car:
        trace = car.runs.trace((await car.runs.create("p")).id)
        await anext(trace)
        daemon.kill()
        call = asyncio.create_task(car.runs.list())
        await asyncio.sleep(0)
    with pytest.raises(ConnectionLost, match="closed by this side"):
        await call
    await trace.aclose()
    assert left() == before
    await asyncio.to_thread(daemon.start)


# ------------------------------------------------------------------------------------------- done, and not answered


class Swallowing:
    """A proxy that lets everything through, but swallows the next answer, and ends the connection, when `armed`."""

    def __init__(self, daemon: Daemon) -> None:
        self._at = daemon.url.removeprefix("ws://").split(":")
        self.armed = False
        self.swallowed = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(self._at[0], int(self._at[1]))
        up = asyncio.create_task(self._pump(reader, here))
        with contextlib.suppress(OSError):
            while data := await there.read(65_536):
                if self.armed:
                    self.armed = False
                    self.swallowed += 1
                    break
                writer.write(data)
                await writer.drain()
        up.cancel()
        for end in (writer, here):
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def swallowing(daemon: Daemon) -> AsyncIterator[tuple[Swallowing, Car]]:
    proxy = Swallowing(daemon)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with connect(url, token=daemon.token()) as car:
            yield proxy, car


async def test_what_has_its_key_is_done_once_though_its_answer_was_lost(daemon: Daemon) -> None:
    async with swallowing(daemon) as (proxy, car):
        proxy.armed = True
        run = await car.runs.create("once", idempotency_key="k")
        proxy.armed = True
        assert (await car.runs.record(run.id, [EVENT, EVENT], batch_id="b")).cursor == 2
        proxy.armed = True
        assert (await car.runs.get(run.id)).event_count == 2
        assert proxy.swallowed == 3
    async with peer(daemon) as other:
        assert [one["id"] for one in (await other.call("runs.list"))["runs"]] == [run.id]
        assert (await other.call("runs.get", {"run_id": run.id}))["event_count"] == 2


async def test_what_has_none_is_done_once_and_its_outcome_is_told_to_be_unknown(daemon: Daemon) -> None:
    async def lost(call: Callable[[], Any]) -> None:
        proxy.armed = True
        with pytest.raises(ConnectionLost):
            await call()

    async with swallowing(daemon) as (proxy, car):
        await lost(lambda: car.runs.create("once"))
        (run,) = (await car.runs.list()).runs
        await lost(lambda: car.runs.record(run.id, [EVENT]))
        found: Snapshot = await car.runs.get(run.id)
        assert found.event_count == 1
