"""Streams of hosted tools at length and many at once, over sockets: every chunk is there once, or counted as gone."""

import asyncio
import contextlib
import json
from typing import Any

import pytest

from carserver.config import Settings
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Asked, Host, begun, hosted, polled, until_ended
from tests.peer import Peer, peer
from tests.rawpeer import TEXT, RawPeer, frame, raw_peer

CHUNKS = 10_000
WINDOW = 500  # chunks that a host is ahead of who reads: with those that are read and not freed yet a handle keeps all
SMALL_BUFFER = 4 * 1024  # of a socket whose peer is to be behind


def numbers(chunks: list[dict[str, Any]]) -> list[int]:
    """Of the chunks of `numbered`."""
    return [int(chunk["text"].split()[0]) for chunk in chunks if chunk["kind"] == "text"]


def numbered(number: int, padding: str = "") -> str:
    """The text of a chunk that says which one it is."""
    return f"{number} {padding}"


class Reader:
    """Polls a handle with `after` until its end; the host may wait for how far it is."""

    def __init__(self, caller: Peer, handle: str) -> None:
        self.chunks: list[dict[str, Any]] = []
        self._read = asyncio.Event()
        self._work = asyncio.create_task(self._poll(caller, handle))

    async def _poll(self, caller: Peer, handle: str) -> dict[str, Any]:
        while True:
            answer: dict[str, Any] = await polled(caller, handle, wait_ms=10_000, after=len(self.chunks))
            assert answer["first_sequence"] == len(self.chunks)
            assert "dropped_chunks" not in answer
            self.chunks += answer["chunks"]
            self._read.set()
            if answer["status"] != "running":
                return answer

    async def has(self, count: int) -> None:
        """Waits until it has read so many."""
        while len(self.chunks) < count and not self._work.done():
            self._read.clear()
            await self._read.wait()

    async def ended(self) -> dict[str, Any]:
        """Its last answer."""
        return await self._work


async def stream_to(reader: Reader, asked: Asked, padding: str = "") -> None:
    """The chunks, never more than a window ahead of who reads; then the answer."""
    for number in range(CHUNKS):
        if number % (WINDOW // 2) == 0:
            await reader.has(number - WINDOW // 2)
        await asked.text(numbered(number, padding))
    await asked.answer(CHUNKS)


# Ten thousand chunks.


async def test_a_reader_that_is_slow_is_told_how_many_of_ten_thousand_chunks_it_has_missed(daemon: Daemon) -> None:
    kept, spurt = Settings().handle_chunks, CHUNKS // 4
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        received: list[int] = []
        for first in range(0, CHUNKS, spurt):
            for number in range(first, first + spurt):
                await asked.text(numbered(number))
            await daemon.until("chunks", first + spurt)
            answer = await polled(caller, handle)
            assert (len(answer["chunks"]), answer["dropped_chunks"]) == (kept, spurt - kept)
            received += numbers(answer["chunks"])
        await asked.answer()
        last = await polled(caller, handle, wait_ms=10_000)
        assert last["chunks"] == [{"kind": "done"}]
        assert "dropped_chunks" not in last
    ends = range(spurt, CHUNKS + 1, spurt)
    assert received == [number for end in ends for number in range(end - kept, end)], "the newest of each spurt"


async def test_a_reader_that_polls_as_it_can_has_or_has_missed_each_of_ten_thousand_chunks(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)

        async def stream() -> None:
            for number in range(CHUNKS):
                await asked.text(numbered(number))
            await asked.answer()

        streaming = asyncio.create_task(stream())
        received: list[int] = []
        dropped = 0
        while True:
            answer = await polled(caller, handle, wait_ms=10_000)
            dropped += answer.get("dropped_chunks", 0)
            received += numbers(answer["chunks"])
            if answer["status"] != "running":
                break
        await streaming
        assert answer["chunks"][-1] == {"kind": "done"}
        assert len(received) + dropped == CHUNKS
        assert received == sorted(set(received)), "in order, none twice"
        assert (await asyncio.to_thread(daemon.metrics))["chunks_dropped"] == dropped


async def test_with_after_a_reader_that_keeps_up_has_all_of_ten_thousand_chunks_in_order(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        reader = Reader(caller, handle)
        await stream_to(reader, asked)
        assert (await reader.ended())["result"] == CHUNKS
        assert numbers(reader.chunks) == list(range(CHUNKS))
        assert reader.chunks[CHUNKS:] == [{"kind": "done", "result": CHUNKS}]
        assert (await asyncio.to_thread(daemon.metrics))["chunks_dropped"] == 0


async def test_a_reader_with_after_that_misses_nothing_is_told_of_nothing_dropped(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        for number in range(1_000):
            await asked.text(str(number))
        await daemon.until("chunks", 1_000)
        assert len((await polled(caller, handle, after=0))["chunks"]) == 1_000
        for number in range(1_000, 1_500):
            await asked.text(str(number))
        await daemon.until("chunks", 1_500)
        answer = await polled(caller, handle, after=1_000)
        assert (answer["first_sequence"], len(answer["chunks"])) == (1_000, 500)
        assert "dropped_chunks" not in answer, answer["dropped_chunks"]


async def test_who_polls_has_all_while_who_follows_live_misses_what_it_was_too_slow_for(start: StartDaemon) -> None:
    daemon = start(write_s=60, ping_s=600)
    async with (
        hosted(daemon) as (caller, host),
        raw_peer(daemon, receive_buffer=SMALL_BUFFER) as behind,
        peer(daemon) as viewer,
    ):
        behind.send_call(1, "tools.stream.subscribe", {})
        assert (await behind.message())["result"] == {"subscribed": True}
        await viewer.call("tools.stream.subscribe", {})
        handle, asked = await begun(caller, host)
        reader = Reader(caller, handle)
        await stream_to(reader, asked, padding="x" * 400)
        await reader.ended()
        assert len(reader.chunks) == CHUNKS + 1
        events, missed = 0, 0
        for seen in (await _live(viewer), await _live_behind(behind)):
            assert {event["handle"] for event in seen} == {handle}
            sequences = [event["sequence"] for event in seen]
            assert sequences == sorted(set(sequences)), "they rise, and none is there twice"
            assert sequences[-1] == CHUNKS, "the last chunk is the newest, so it is never skipped"
            assert [event["chunk"] for event in seen] == [reader.chunks[sequence] for sequence in sequences]
            events += len(seen)
            missed += CHUNKS + 1 - len(seen)
        figures = await asyncio.to_thread(daemon.metrics)
        assert (figures["stream_events"], figures["stream_skips"]) == (events, missed)
        assert len(seen) < CHUNKS, "who did not read has missed some"


async def _live(viewer: Peer) -> list[dict[str, Any]]:
    """What the live stream had of a handle, to its end."""
    seen = [await viewer.next("tools.stream.event")]
    while seen[-1]["chunk"]["kind"] != "done":
        seen.append(await viewer.next("tools.stream.event"))
    return seen


async def _live_behind(viewer: RawPeer) -> list[dict[str, Any]]:
    """Likewise."""
    seen = [(await viewer.message())["params"]]
    while seen[-1]["chunk"]["kind"] != "done":
        seen.append((await viewer.message())["params"])
    return seen


# Many at once.


async def test_of_200_handles_of_10_connections_everyone_gets_each_chunk_of_theirs_once(daemon: Daemon) -> None:
    callers, each, pieces = 10, 20, 20
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer(daemon)) for _ in range(callers)]
        hosts = [Host(await stack.enter_async_context(peer(daemon))) for _ in range(2)]
        for number, host in enumerate(hosts):
            await host.register(f"count{number}")

        async def serve(host: Host) -> None:
            """Answers when it has all its calls, so that all are live at once; their streams are mixed."""
            all_asked = [await host.asked() for _ in range(callers * each // len(hosts))]
            for piece in range(pieces):
                for asked in all_asked:
                    await asked.text(numbered(piece, asked.params["action_id"]))
            for asked in reversed(all_asked):
                await asked.answer(asked.params["action_id"])

        async def use(caller: Peer, name: str, number: int) -> None:
            params = {"tool": f"count{number % len(hosts)}", "action_id": name}
            handle = (await caller.call("tools.invoke", params))["handle"]
            chunks, answer = await until_ended(caller, handle)
            texts = [{"kind": "text", "text": numbered(piece, name)} for piece in range(pieces)]
            assert chunks == [*texts, {"kind": "done", "result": name}]
            assert (answer["status"], answer["result"], answer["action_id"]) == ("succeeded", name, name)

        serving = [asyncio.create_task(serve(host)) for host in hosts]
        await asyncio.gather(
            *(use(caller, f"{place}-{number}", number) for place, caller in enumerate(peers) for number in range(each))
        )
        await asyncio.gather(*serving)
        figures = await asyncio.to_thread(daemon.metrics)
        names = ("handles_started", "handles_succeeded", "chunks", "chunks_dropped", "late_chunks", "stray_chunks")
        count = callers * each
        assert [figures[name] for name in names] == [count, count, count * (pieces + 1), 0, 0, 0]
        assert [figures[name] for name in ("handles_live", "handles_running", "handles_finished")] == [0, 0, count]


async def test_three_streams_of_one_host_are_mixed_and_answered_in_another_order(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        begun_ones = [await begun(caller, host) for _ in range(3)]
        for piece in range(4):
            for place, (_, asked) in enumerate(begun_ones):
                await asked.text(f"{place}.{piece}")
        for place in (2, 0, 1):
            await begun_ones[place][1].answer(place)
            chunks, answer = await until_ended(caller, begun_ones[place][0])
            assert [chunk.get("text") for chunk in chunks] == [*(f"{place}.{piece}" for piece in range(4)), None]
            assert answer["result"] == place


# How a host's words are cut up and joined.


def text_of(request_id: str, text: str) -> dict[str, Any]:
    """A `tools.chunk` notification."""
    chunk = {"kind": "text", "text": text}
    return {"jsonrpc": "2.0", "method": "tools.chunk", "params": {"request_id": request_id, "chunk": chunk}}


@pytest.mark.parametrize("shape", ["one segment", "a byte at a time", "a batch", "a batch of notifications alone"])
async def test_chunks_and_their_answer_may_come_in_any_pieces(daemon: Daemon, shape: str) -> None:
    async with peer(daemon) as caller, raw_peer(daemon) as host:
        host.send_call(1, "tools.register", [{"name": "tail"}])
        assert (await host.message())["result"] == 1
        handle = (await caller.call("tools.invoke", {"tool": "tail"}))["handle"]
        id_ = (await host.message())["params"]["request_id"]
        notifications = [text_of(id_, "one"), text_of(id_, "two")]
        answer = {"jsonrpc": "2.0", "id": id_, "result": "all"}
        messages: list[Any] = [*notifications, answer]
        if shape == "a batch":
            messages = [messages]
        elif shape == "a batch of notifications alone":
            messages = [notifications, answer]
        data = b"".join(frame(TEXT, json.dumps(message).encode()) for message in messages)
        for byte in data if shape == "a byte at a time" else ():
            host.send(bytes([byte]))
            await asyncio.sleep(0)
        if shape != "a byte at a time":
            host.send(data)
        chunks, polled_ = await until_ended(caller, handle)
        assert [chunk.get("text") for chunk in chunks] == ["one", "two", None]
        assert polled_["result"] == "all"
        host.send_call(2, "server.ping")
        assert (await host.message())["id"] == 2, "neither notifications nor answers are answered"


async def test_a_host_that_wants_to_know_is_told_whether_its_chunks_were_taken(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        calls = [text_of(asked.id, "one"), text_of("unknown", "two"), text_of(asked.id, "three")]
        replies = await host.peer.raw(json.dumps([call | {"id": place} for place, call in enumerate(calls)]))
        assert [(reply["id"], reply["result"]["taken"]) for reply in replies] == [(0, True), (1, False), (2, True)]
        await asked.answer()
        chunks, _ = await until_ended(caller, handle)
        assert [chunk.get("text") for chunk in chunks] == ["one", "three", None]
