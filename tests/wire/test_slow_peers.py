"""Peers that read slowly, or not at all, or go while something waits for them; and what they cost.

The kernel's buffers are made small, so that the bytes that a peer does not read wait in the daemon.
"""

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer
from tests.rawpeer import BINARY, CLOSE, PING, TEXT, RawPeer, frame, raw_peer
from tests.trace import until_at_most

KIB, MIB = 1024, 1024 * 1024
METHODS = ("--methods", "tests.methods_for_tests")
SMALL = 4_096  # bytes of the kernel's buffers, about
HIGH_WATER = 64 * KIB
SIZE = 4 * HIGH_WATER  # of an answer that congests
TICK_S = 0.05
PING_S = 0.3
WRITE_S = 1.5
SLACK_S = 1.2  # for the daemon to see that the time is over; less than another `WRITE_S`
TOO_SLOW = "aborted: the peer has not read for write_s"
FLOOD = 200_000
CLOCK_S = 0.01  # in which a clock that tells milliseconds may be off


def stop_reading(client: RawPeer) -> None:
    """It takes nothing any more."""
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket, so a transport that reads


def go_on_reading(client: RawPeer) -> None:
    """It takes all that comes."""
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]


async def tick(metronome: Peer) -> None:
    """A moment by the daemon's own clock, so that a machine that is slow today has slow moments: `wrong_token_s`."""
    with pytest.raises(Refused):
        await metronome.call("session.auth", {"token": "wrong"})


def congesting(start: StartDaemon, **settings: object) -> Daemon:
    """A daemon whose peers' bytes do not vanish in the kernel."""
    fixed = {"high_water_bytes": HIGH_WATER, "send_buffer_bytes": SMALL, "write_s": WRITE_S}
    return start(*METHODS, **(fixed | settings))


async def congest(daemon: Daemon, client: RawPeer) -> None:
    """Asks for `SIZE` bytes, until most of them wait in the daemon: the peer's stream takes little by itself."""
    client.send_call(1, "test.bytes", {"size": SIZE})
    await daemon.until("outbox_bytes", SIZE / 2)


# Reading slowly, and not at all.


async def test_a_peer_that_reads_slowly_but_steadily_is_neither_aborted_nor_closed_for_want_of_a_pong(
    start: StartDaemon,
) -> None:
    mark = 3 * SIZE // 4
    timing = {"write_s": WRITE_S, "ping_s": PING_S, "pong_s": WRITE_S, "wrong_token_s": TICK_S}
    daemon = congesting(start, high_water_bytes=mark, **timing)
    async with raw_peer(daemon, receive_buffer=SMALL) as client, peer(daemon) as metronome:
        await congest(daemon, client)
        slow_ticks = 0
        while slow_ticks * TICK_S < 2 * WRITE_S:  # longer than any write may wait, and than the answer to a ping
            figures = daemon.metrics()
            assert (figures["write_timeouts"], figures["ping_timeouts"]) == (0, 0)
            assert figures["outbox_bytes"], "there was something left for it to read all the time"
            # Soon until what waits has fallen below the mark, and then very slowly; the kernel takes it 6 KiB at a
            # time, which must be several times within `pong_s`.
            slow = figures["outbox_bytes"] < mark
            await client.reader.readexactly(2_400 if slow else 16 * KIB)
            slow_ticks += slow
            await tick(metronome)
        assert (await metronome.call("server.status"))["counts"]["connections"] == 2
        figures = daemon.metrics()
        assert (figures["write_timeouts"], figures["ping_timeouts"]) == (0, 0)


async def reads_nothing(client: RawPeer) -> None:
    """From the first byte."""


async def reads_a_megabyte(client: RawPeer) -> None:
    """And only then stops."""
    go_on_reading(client)
    await client.reader.readexactly(MIB)
    stop_reading(client)


async def now_s(other: Peer) -> float:
    """By the daemon's clock, so that only the daemon need keep time: this process may stand still for a while."""
    return float((await other.call("server.ping"))["now_ms"]) / 1_000


@pytest.mark.parametrize("receive_buffer", [SMALL, None], ids=["small", "as it is"])
@pytest.mark.parametrize("first", [reads_nothing, reads_a_megabyte])
async def test_a_peer_that_does_not_read_is_aborted_when_the_time_for_a_write_is_over_and_not_later(
    first: Callable[[RawPeer], Awaitable[None]], receive_buffer: int | None, start: StartDaemon
) -> None:
    """Whatever the kernel took of it before: with buffers as they are that is megabytes, after it stopped reading."""
    daemon = congesting(start) if receive_buffer else start(*METHODS, write_s=WRITE_S)
    async with raw_peer(daemon, receive_buffer=receive_buffer) as client, peer(daemon) as other:
        stop_reading(client)
        asked_s = await now_s(other)
        client.send_call(1, "test.bytes", {"size": 15 * MIB})
        client.send_call(2, "server.ping")
        await first(client)
        stopped_s = await now_s(other)
        await daemon.until("write_timeouts", 1)
        await until_at_most(daemon, "connections", 2)  # the other, and the one that asks
        assert daemon.metrics()["outbox_bytes"] == 0
    (aborted,) = [line for line in map(json.loads, daemon.log.splitlines()) if line["message"].startswith(TOO_SLOW)]
    aborted_s = datetime.fromisoformat(aborted["time"]).timestamp()
    assert aborted_s - asked_s > WRITE_S - CLOCK_S, "it has had its time"
    assert aborted_s - stopped_s < WRITE_S + SLACK_S


async def test_a_peer_that_reads_too_slowly_to_fall_below_the_mark_in_time_is_aborted(start: StartDaemon) -> None:
    daemon = congesting(start, wrong_token_s=TICK_S)
    async with raw_peer(daemon, receive_buffer=SMALL) as client, peer(daemon) as metronome:
        await congest(daemon, client)
        received = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while received < SIZE:
                received += len(await client.reader.readexactly(2 * KIB))
                await tick(metronome)
        assert daemon.metrics()["write_timeouts"] == 1
        assert received > 4 * KIB, "it did read"


@pytest.mark.parametrize("windows", [0, 1.25], ids=["soon", "later than a write may wait"])
async def test_a_peer_that_stops_below_the_mark_is_aborted_too(windows: float, start: StartDaemon) -> None:
    daemon = congesting(start, wrong_token_s=TICK_S)
    async with raw_peer(daemon, receive_buffer=SMALL) as client, peer(daemon) as metronome:
        await congest(daemon, client)
        await client.reader.readexactly(SIZE - HIGH_WATER)  # at once: there is little time for that
        while daemon.metrics()["outbox_bytes"] > 0.75 * HIGH_WATER:
            await client.reader.readexactly(4 * KIB)
        for _ in range(round(windows * WRITE_S / TICK_S)):
            await tick(metronome)
            await client.reader.readexactly(480)
        figures = daemon.metrics()
        assert figures["outbox_bytes"] > 0
        assert figures["write_timeouts"] == 0
        await daemon.until("write_timeouts", 1)
        assert (await metronome.call("server.status"))["counts"]["connections"] == 1


async def test_a_peer_that_stops_and_goes_on_in_time_is_not_aborted_then_or_later(start: StartDaemon) -> None:
    daemon = congesting(start, wrong_token_s=1.5 * WRITE_S)
    async with raw_peer(daemon, receive_buffer=SMALL) as client, peer(daemon) as metronome:
        for n in range(20):
            stop_reading(client)
            client.send_call(n, "test.bytes", {"size": 2 * HIGH_WATER})
            await daemon.until("outbox_bytes", 1)
            go_on_reading(client)
            assert (await client.message())["id"] == n
        await tick(metronome)
        client.send_call("still there", "server.ping")
        assert (await client.message())["result"]
        assert daemon.metrics()["write_timeouts"] == 0


# Going.


@pytest.mark.parametrize("payload", [b"\x03\xe8", b"\x03\xe8bye", b"\x0f\xa0", b""])
async def test_a_peer_that_closes_while_answers_wait_gets_them_and_then_the_echo_of_its_close(
    payload: bytes, start: StartDaemon
) -> None:
    daemon = congesting(start, write_s=60)
    calls, size = 6, 100 * KIB
    async with raw_peer(daemon, receive_buffer=SMALL) as client:
        stop_reading(client)
        for n in range(calls):
            client.send_call(n, "test.bytes", {"size": size})
        await daemon.until("outbox_bytes", (calls - 1) * size)
        requests = daemon.metrics()["requests"]
        client.send(frame(CLOSE, payload))
        client.send_call(calls, "server.ping")  # after its close nothing counts
        go_on_reading(client)
        answers = [await client.message() for _ in range(calls)]
        assert [(answer["id"], len(answer["result"])) for answer in answers] == [(n, size - 2) for n in range(calls)]
        assert await client.frame() == (CLOSE, payload[:2])
        assert await client.rest() == b""
        figures = daemon.metrics()
        assert (figures["requests"], figures["write_timeouts"]) == (requests, 0)


async def test_the_library_that_closes_while_answers_wait_sees_a_normal_end(start: StartDaemon) -> None:
    daemon = congesting(start, write_s=60)
    async with peer(daemon) as client:
        tasks = [client.start("test.bytes", {"size": 200 * KIB}) for _ in range(10)]
        assert len(await tasks[0]) == 200 * KIB - 2
        await client.socket.close(1000)
        assert (await client.closed())[0] == 1000
        for outcome in await asyncio.gather(*tasks[1:], return_exceptions=True):
            assert isinstance(outcome, str | ConnectionError)


async def test_a_peer_that_broke_the_protocol_is_gone_as_soon_as_it_has_gone_itself(start: StartDaemon) -> None:
    daemon = start(close_s=60)
    async with raw_peer(daemon) as client:
        client.send_call(1, "server.ping")
        client.send(frame(BINARY, b"{}"))
        assert (await client.message())["id"] == 1
        closed = await client.frame()
        assert (closed.opcode, closed.code) == (CLOSE, 1003)
        assert await client.rest() == b"", "the end of the stream asks it to close: its close frame would not be seen"
        client.send(frame(CLOSE, closed.payload[:2]))
    await until_at_most(daemon, "connections", 1)  # the one that asks


async def test_a_peer_that_broke_the_protocol_and_stays_is_aborted_after_a_while(start: StartDaemon) -> None:
    daemon = start(close_s=0.2)
    async with raw_peer(daemon) as client:
        client.send(frame(BINARY, b"{}"))
        assert (await client.close_frame()).code == 1003
        await until_at_most(daemon, "connections", 1)


# A flood of pings.


def memory_kib(daemon: Daemon) -> int:
    """What the process has of the machine's memory."""
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


async def flood(client: RawPeer, pings: float) -> None:
    """So many pings, in thousands. The answer to each has 127 bytes, so those to all together have 25 MB."""
    some = frame(PING, b"x" * 125) * 1_000
    while pings > 0:
        client.send(some)
        await client.writer.drain()
        pings -= 1_000


async def test_a_flood_of_pings_from_a_peer_that_never_reads_costs_no_memory(start: StartDaemon) -> None:
    daemon = congesting(start, write_s=60)
    async with raw_peer(daemon) as warming:
        warming.send(frame(PING, b"x" * 125) * 10_000)
        warming.send_call("warm", "server.ping")
        while (await warming.frame()).opcode != TEXT:
            pass
    requests = daemon.metrics()["requests"]
    async with raw_peer(daemon, receive_buffer=SMALL) as client:
        stop_reading(client)
        before = memory_kib(daemon)
        await flood(client, FLOOD)
        client.send_call("after", "server.ping")
        await daemon.until("requests", requests + 1)  # all of them are read
        grown = memory_kib(daemon) - before
        print(f"{FLOOD} pings: {grown} KiB more")
        assert grown < 4 * KIB
        assert daemon.metrics()["outbox_bytes"] < 2 * HIGH_WATER


async def test_who_floods_with_pings_and_never_reads_is_aborted(start: StartDaemon) -> None:
    daemon = congesting(start, high_water_bytes=4 * KIB)
    async with peer(daemon) as other, raw_peer(daemon, receive_buffer=SMALL) as client:
        stop_reading(client)
        with pytest.raises(ConnectionError):
            await flood(client, math.inf)
        assert daemon.metrics()["write_timeouts"] == 1
        assert await other.call("server.ping")
