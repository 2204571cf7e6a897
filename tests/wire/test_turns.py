"""One connection that sends a great many calls, large ones, or asks for many pages keeps no other waiting for its end.

Who comes first is told by the daemon: `/metrics` answers with how many calls it had taken by then. The daemon is
stopped while everything is written, so all of it lies in the kernel when it goes on, and no clock decides.
"""

import contextlib
import json
import os
import random
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.peer import peer
from tests.rawpeer import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, RawPeer, frame, raw_peer, raw_socket
from tests.trace import until_at_most

KIB, MIB = 1024, 1024 * 1024
CALLS = 5_000
OFF = 2**40  # more than there is: a bound that bounds nothing
BRACKETS = 500


def call(id_: int, pad: int = 0) -> bytes:
    """A cheap call of a certain size."""
    return b'{"jsonrpc":"2.0","id":%d,"method":"server.ping","params":{"pad":"%b"}}' % (id_, b"x" * pad)


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """The daemon does nothing meanwhile."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def scraper(daemon: Daemon) -> AsyncIterator[RawPeer]:
    """A connection that is accepted, and may ask for the figures."""
    before = daemon.metrics()["connections"]
    async with raw_socket(daemon) as socket:
        await daemon.until("connections", before + 1)
        yield socket


def ask_for_figures(socket: RawPeer) -> None:
    """The request alone."""
    socket.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")


async def requests_taken(socket: RawPeer) -> int:
    """How many calls the daemon had taken when it answered."""
    found = re.search(rb"^carserver_requests_total ([-+.e\d]+)$", await socket.rest(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def all_answered(client: RawPeer, count: int) -> None:
    """Each call has its answer, in their order."""
    assert [(await client.message())["id"] for _ in range(count)] == list(range(count))


# Turns.


@pytest.mark.parametrize(
    ("settings", "calls", "pad", "first_at_most"),
    [
        ({"turn_messages": 8, "turn_bytes": OFF}, CALLS, 100, 500),
        ({}, CALLS, 100, 1_000),
        ({}, 500, 10 * KIB, 100),  # 64 of them are most of a megabyte, and one read is not the last
    ],
    ids=["small calls, by their number", "small calls, as set", "large calls, as set"],
)
async def test_whoever_comes_after_a_great_many_pipelined_calls_is_served_before_most_of_them(
    settings: dict[str, int], calls: int, pad: int, first_at_most: int, start: StartDaemon
) -> None:
    daemon = start(**settings)
    async with raw_peer(daemon) as client, peer(daemon) as other, scraper(daemon) as figures:
        await warm_up(client)
        before = daemon.metrics()
        with stopped(daemon):
            client.send(b"".join(frame(TEXT, call(n, pad)) for n in range(calls)))
            ask_for_figures(figures)
            ping = other.start("server.ping")
        taken = await requests_taken(figures) - before["requests"]
        assert taken <= first_at_most
        assert (await ping)["now_ms"]
        await all_answered(client, calls)
        assert daemon.metrics()["reading_pauses"] == before["reading_pauses"], "a turn that is given is no pause"


async def warm_up(client: RawPeer) -> None:
    """Shows the kernel that a lot comes and is read at once: from now on it has megabytes ready for the daemon."""
    for n in range(100):
        client.send(frame(TEXT, call(n, 200 * KIB)))
        await client.message()


async def test_what_a_connection_sends_beyond_its_turns_waits_in_its_socket_and_not_in_the_daemon(
    start: StartDaemon,
) -> None:
    daemon = start(turn_messages=1)
    calls = 4_000
    async with raw_peer(daemon) as client:
        await warm_up(client)
        before = peak_kib(daemon)
        client.send(frame(TEXT, call(0, 8 * KIB)) * calls)
        for _ in range(calls):
            await client.message()
        assert peak_kib(daemon) - before < 8 * KIB, "of 32 MiB"


def peak_kib(daemon: Daemon) -> int:
    """The most that the process ever had of the machine's memory."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{daemon.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def in_pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """Its bytes, cut anywhere."""
    at = 0
    while at < len(data):
        size = chance.choice((1, 2, 7, 100, 1_000, 10_000))
        yield data[at : at + size]
        at += size


def fragmented(message: bytes, chance: random.Random) -> bytes:
    """One message as one to four frames, now and then with a ping between two of them."""
    cuts = sorted(chance.choices(range(len(message) + 1), k=chance.randrange(4)))
    parts = [message[start:end] for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True)]
    frames = [
        frame(TEXT if place == 0 else CONTINUATION, part, fin=place == len(parts) - 1)
        for place, part in enumerate(parts)
    ]
    return (frame(PING, b"") if chance.random() < 0.1 else b"").join(frames)


@pytest.mark.parametrize(
    ("turn_messages", "turn_bytes"), [(1, OFF), (3, 50), (OFF, 1)], ids=["each alone", "few", "each read"]
)
async def test_reading_goes_on_by_itself_and_all_is_answered_in_order_however_the_frames_are_cut(
    turn_messages: int, turn_bytes: int, start: StartDaemon
) -> None:
    daemon = start(turn_messages=turn_messages, turn_bytes=turn_bytes)
    chance = random.Random(7)
    calls = 1_500
    async with raw_peer(daemon) as client:
        whole = b"".join(
            fragmented(call(n, chance.choice((0, 0, 150, 70_000 * (n % 50 == 0)))), chance) for n in range(calls)
        )
        for piece in in_pieces(whole, chance):
            client.send(piece)
            if chance.random() < 0.1:
                await client.writer.drain()
        assert await answered(client, calls) == list(range(calls))
        assert daemon.metrics()["reading_pauses"] == 0


async def answered(client: RawPeer, count: int) -> list[int]:
    """The ids of the next answers; pongs are passed over."""
    ids: list[int] = []
    while len(ids) < count:
        got = await client.frame()
        if got.opcode != PONG:
            ids.append(json.loads(got.payload)["id"])
    return ids


@pytest.mark.parametrize("last", [frame(CLOSE, b"\x03\xe8"), frame(BINARY, b"")], ids=["close", "violation"])
@pytest.mark.parametrize("turn", [{"turn_messages": 1}, {"turn_bytes": 1}], ids=["by messages", "by bytes"])
async def test_a_turn_that_ends_with_the_end_of_the_connection_ends_it(
    turn: dict[str, int], last: bytes, start: StartDaemon
) -> None:
    daemon = start(**turn, close_s=60)
    async with raw_peer(daemon) as client:
        client.send(b"".join(frame(TEXT, call(n)) for n in range(3)) + last + frame(TEXT, call(3)))
        await all_answered(client, 3)
        assert (await client.frame()).opcode == CLOSE
        assert await client.rest() == b""
    await until_at_most(daemon, "connections", 1)  # the one that asks


async def test_whoever_goes_in_the_middle_of_its_turns_costs_nothing(start: StartDaemon) -> None:
    daemon = start(turn_messages=1)
    async with peer(daemon) as other:
        async with raw_peer(daemon) as client:
            with stopped(daemon):
                client.send(b"".join(frame(TEXT, call(n)) for n in range(2_000)))
            client.writer.transport.abort()
        await until_at_most(daemon, "connections", 2)
        assert await other.call("server.ping")


# Brackets.


@pytest.fixture(scope="module")
def few_brackets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("brackets") / "state", brackets=BRACKETS) as daemon:
        yield daemon


def with_brackets(count: int, opening: str = "[", closing: str = "]") -> str:
    """A request with so many opening brackets, its own two among them."""
    side_by_side = ",".join([opening + closing] * (count - 3))
    return f'{{"jsonrpc":"2.0","id":7,"method":"server.ping","params":{{"x":[{side_by_side}]}}}}'


@pytest.mark.parametrize("brackets", ["[]", "{}"])
async def test_a_message_of_more_brackets_than_allowed_is_refused_by_name_and_the_connection_lives(
    brackets: str, few_brackets: Daemon
) -> None:
    async with peer(few_brackets) as client:
        assert (await client.raw(with_brackets(BRACKETS, *brackets)))["result"]["now_ms"]
        for count in (BRACKETS + 1, 10 * BRACKETS):
            refused = await client.raw(with_brackets(count, *brackets))
            assert (refused["id"], refused["error"]["code"]) == (None, -32012)
            data = {"type": "limit_exceeded", "limit": "brackets", "value": count, "maximum": BRACKETS}
            assert refused["error"]["data"] == data
            assert "brackets" in refused["error"]["message"]
        assert (await client.call("server.ping"))["now_ms"]
        assert client.pushed.empty()


MANY = "[{" * BRACKETS


IN_STRINGS = {
    "alone": MANY,
    "around a quote": f'{MANY}"{MANY}',
    "after a quote": f'"{MANY}',
    "before a quote": f'{MANY}"',
    "after a backslash": f"\\{MANY}",
    "before a backslash": f"{MANY}\\",
    "between a backslash with a quote and a backslash": f'\\"{MANY}\\',
    "between two quotes with backslashes": f'\\\\"{MANY}\\\\"',
    "among line breaks and letters": f"\n{MANY}\u00e9{MANY}\U0001f600",
}


@pytest.mark.parametrize("text", IN_STRINGS.values(), ids=IN_STRINGS.keys())
async def test_brackets_in_strings_do_not_count_whatever_is_escaped_there(text: str, few_brackets: Daemon) -> None:
    request = {"jsonrpc": "2.0", "id": 7, "method": "server.ping", "params": {"x": [text, text, {text: text}]}}
    async with peer(few_brackets) as client:
        for ascii_ in (True, False):
            assert (await client.raw(json.dumps(request, ensure_ascii=ascii_)))["result"]["now_ms"]
        over = json.loads(with_brackets(BRACKETS + 1)) | {"y": text}
        refused = await client.raw(json.dumps(over))
        assert refused["error"]["data"]["value"] == BRACKETS + 1, "and those outside of them do"


NEVER_CLOSED = {
    "quotes": '"' + r"\"" * 1_000_000,
    "quotes and half of another": '"' + r"\"" * 1_000_000 + "\\",
    "text": '"' + "x" * 2_000_000 + "[" * BRACKETS,
    "backslashes": '"' + "\\" * 2_000_000,
}


@pytest.mark.parametrize("end", NEVER_CLOSED.values(), ids=NEVER_CLOSED.keys())
async def test_a_string_that_is_never_closed_takes_no_longer_than_one_that_is(end: str, few_brackets: Daemon) -> None:
    """Each quote in it was once looked at to its end: eight thousand took half a second, a million would take hours.

    And each escape was once remembered: a million took 60 MB.
    """
    before = peak_kib(few_brackets)
    async with peer(few_brackets) as client:
        for brackets, type_ in ((BRACKETS + 1, "limit_exceeded"), (BRACKETS, "parse_error")):
            refused = await client.raw("[" * brackets + end)
            assert (refused["id"], refused["error"]["data"]["type"]) == (None, type_)
    assert peak_kib(few_brackets) - before < 40 * KIB


async def test_the_default_allows_what_a_large_message_has(daemon: Daemon) -> None:
    async with peer(daemon) as client:
        assert (await client.raw(with_brackets(131_072)))["result"]["now_ms"]
        refused = await client.raw(with_brackets(131_073))
        assert (refused["error"]["data"]["limit"], refused["error"]["data"]["maximum"]) == ("brackets", 131_072)


# Pages under way.


async def test_64_pages_that_are_asked_for_at_once_do_not_all_wait_for_a_peer_that_does_not_read(
    daemon: Daemon,
) -> None:
    calls = 64
    async with peer(daemon) as other, raw_peer(daemon, receive_buffer=4_096) as client:
        run_id = (await other.create())["id"]
        await other.record(run_id, {"type": "x", "text": "x" * (MIB - 30)})
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket, so a transport that reads
        for n in range(calls):
            client.send_call(n, "runs.events", {"run_id": run_id})
        await daemon.until("outbox_bytes", MIB)
        for _ in range(20):
            # What was read before this page was read has been answered before it.
            assert len((await other.call("runs.events", {"run_id": run_id}))["events"]) == 1
            assert daemon.metrics()["outbox_bytes"] <= 3 * MIB
        assert daemon.metrics()["reading_pauses"] >= 1
        await until_at_most(daemon, "requests_in_flight", 0)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answers = [await client.message() for _ in range(calls)]
        assert [(answer["id"], len(answer["result"]["events"])) for answer in answers] == [(n, 1) for n in range(calls)]


async def test_pages_that_are_asked_for_at_once_are_all_answered_to_a_peer_that_reads(daemon: Daemon) -> None:
    async with peer(daemon) as client:
        run_id = (await client.create())["id"]
        await client.record(run_id, *({"type": "x", "n": n} for n in range(10)))
        pages = [client.start("runs.events", {"run_id": run_id, "after": n % 10, "limit": 1}) for n in range(200)]
        lists = [client.start("runs.list", {"limit": 1}) for _ in range(50)]
        cursors: list[Any] = [(await page)["cursor"] for page in pages]
        assert cursors == [n % 10 + 1 for n in range(200)]
        assert [(await runs)["runs"][0]["id"] for runs in lists] == [run_id] * 50
