"""The live trace under load, over real sockets. What one stream promises: test_trace_streams."""

import asyncio
import itertools
import json
import random
from datetime import datetime
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer
from tests.trace import (
    SMALL_BUFFER,
    RawViewer,
    connected,
    cursor_of,
    shown,
    sized,
    subscribe,
    take,
    text,
    unhurried,
    until_at_most,
    until_ended,
)

EVENTS, EVENT_BYTES, BATCH = 6_000, 1_024, 25
VIEWERS, STEADY = 40, 8
WRITE_S, TOLERANCE_S = 1.5, 1.2  # for the daemon to see that the time is over; less than another `WRITE_S`
CLOCK_S = 0.01  # in which a clock that tells milliseconds may be off
LONG_S = 60.0  # a write may wait longer than any test takes
SURELY_STALLED = 2_000  # events: 2 MiB, more than all the buffers between the daemon's log and a stalled peer
FIGURES = ("subscription_overflows", "catch_up_pages", "catch_up_rejoins", "outbox_largest_bytes", "events_delivered")


class Progress:
    """How far the producer is."""

    def __init__(self) -> None:
        self.written = 0
        self.ceiling = EVENTS // 2  # how far it goes before it waits for the viewers
        self._moved = asyncio.Condition()

    async def moved(self, written: int) -> None:
        async with self._moved:
            self.written = written
            self._moved.notify_all()

    async def past(self, cursor: int) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: self.written >= min(cursor, self.ceiling))


class Viewer:
    """One of many: it reads for a while, leaves, and comes back with the cursor and epoch that it has."""

    def __init__(self, daemon: Daemon, run_id: str, number: int) -> None:
        self._daemon = daemon
        self._run_id = run_id
        self._random = random.Random(number)
        self._steady = number < STEADY
        self._epoch: str | None = None
        self._started = 0
        self.cursor = 0
        self.visits = 0
        self.ended: dict[str, Any] | None = None
        self.halfway = asyncio.Event()

    async def watch(self, progress: Progress) -> None:
        """Watches until the run has ended."""
        while self.ended is None:
            async with self._connect() as socket:
                await self._subscribe(socket)
                await self._read(socket)
                self.visits += 1
                if self._random.random() < 0.5:
                    socket.transport.abort()  # a program that is killed; leaving the block is the polite way
            if self.ended is None:
                await progress.past(self.cursor + self._random.choice([0, 100, 400]))
        assert self._started == 1

    def _connect(self) -> connect:
        headers = {"Authorization": f"Bearer {self._daemon.token()}"}
        # Without a bound on its queue: else it stops reading, and its own closing handshake with that.
        return connect(
            self._daemon.url,
            additional_headers=headers,
            compression=None,
            ping_interval=None,
            max_size=None,
            max_queue=None,
        )

    async def _subscribe(self, socket: ClientConnection) -> None:
        place = {"cursor": self.cursor, "epoch": self._epoch} if self._epoch is not None else {}
        request = {"run_id": self._run_id, **place}
        await socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "runs.trace.subscribe", "params": request}))
        answer = json.loads(await socket.recv())["result"]
        assert (answer["recovered"], answer["cursor"]) == (self._epoch is not None, self.cursor)
        self._epoch = answer["epoch"]

    async def _read(self, socket: ClientConnection) -> None:
        stay = EVENTS * 2 if self._steady else self._random.randint(50, 900)
        for _ in range(stay):
            frame = await socket.recv(decode=False)
            cursor = cursor_of(frame)
            if b'"record":{"record":"event"' in frame[:300]:
                assert cursor == self.cursor + 1, "a gap, or a repetition"
                self.cursor = cursor
                if cursor >= EVENTS // 2:
                    self.halfway.set()
            elif b'"record":{"record":"started"' in frame[:300]:
                assert self.cursor == 0
                self._started += 1
            else:
                self.ended = json.loads(frame)["params"]
                return


async def produce(agent: Peer, run_id: str, progress: Progress, start: int, stop: int) -> None:
    """Writes events, a few batches at a time under way."""
    under_way: list[asyncio.Task[Any]] = []
    for at in range(start, stop, BATCH):
        events = [json.loads(sized(n, EVENT_BYTES)) for n in range(at, at + BATCH)]
        if at + BATCH == EVENTS:
            events[-1] = json.loads(sized(EVENTS - 1, EVENT_BYTES, "agent_end"))
        under_way.append(agent.start("runs.record", {"run_id": run_id, "events": events}))
        if len(under_way) == 4:
            await progress.moved((await under_way.pop(0))["cursor"])
    for answer in under_way:
        await progress.moved((await answer)["cursor"])


def aborted_at(daemon: Daemon) -> list[float]:
    """When the daemon aborted peers that did not read, as its log has it."""
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    return [datetime.fromisoformat(line["time"]).timestamp() for line in lines if line["message"].startswith("aborted")]


async def now_s(agent: Peer) -> float:
    """By the daemon's clock, so that only the daemon need keep time: this process may stand still for a while."""
    return float((await agent.call("server.ping"))["now_ms"]) / 1_000


async def test_a_viewer_that_never_reads_is_aborted_when_it_has_had_its_time(start: StartDaemon) -> None:
    daemon = start(write_s=WRITE_S)
    async with peer(daemon) as agent:
        run_id = (await agent.create())["id"]
        stalled = RawViewer(daemon, connected(daemon, SMALL_BUFFER), run_id=run_id)
        await daemon.until("subscriptions", 1)
        began_s = await now_s(agent)
        for at in range(0, SURELY_STALLED, 500):
            await agent.record(run_id, *[json.loads(sized(n, EVENT_BYTES)) for n in range(at, at + 500)])
        stalled_by_s = await now_s(agent)
        await daemon.until("write_timeouts", 1)
        (aborted_s,) = aborted_at(daemon)
        assert began_s + WRITE_S - CLOCK_S <= aborted_s <= stalled_by_s + WRITE_S + TOLERANCE_S
        assert await asyncio.to_thread(stalled.read) < SURELY_STALLED * EVENT_BYTES * 3 / 4
        await until_at_most(daemon, "subscriptions", 0)


async def test_forty_viewers_come_and_go_and_have_every_cursor_once_while_one_never_reads(start: StartDaemon) -> None:
    daemon = start(write_s=LONG_S)
    progress = Progress()
    async with peer(daemon) as agent:
        run_id = (await agent.create())["id"]
        stalled = RawViewer(daemon, connected(daemon, SMALL_BUFFER), run_id=run_id)
        await daemon.until("subscriptions", 1)
        viewers = [Viewer(daemon, run_id, number) for number in range(VIEWERS)]
        async with asyncio.TaskGroup() as watching:
            for viewer in viewers:
                watching.create_task(viewer.watch(progress))
            await daemon.until("subscriptions", 1 + STEADY)
            await produce(agent, run_id, progress, 0, EVENTS // 2)
            for viewer in viewers:
                await viewer.halfway.wait()
            progress.ceiling = EVENTS
            await produce(agent, run_id, progress, EVENTS // 2, EVENTS)

        assert [viewer.cursor for viewer in viewers] == [EVENTS] * VIEWERS
        assert {(viewer.ended or {})["cursor"] for viewer in viewers} == {EVENTS}
        assert {(viewer.ended or {})["run_status"] for viewer in viewers} == {"completed"}
        visits = sum(viewer.visits for viewer in viewers)
        assert visits > 3 * VIEWERS

        await until_at_most(daemon, "subscriptions", 1)
        figures = await asyncio.to_thread(daemon.metrics)
        print({name: figures[name] for name in FIGURES} | {"visits": visits})
        assert 0 < figures["outbox_largest_bytes"] < EVENTS * EVENT_BYTES / 3, "the stalled one is still there"
        stalled.socket.close()
        await until_at_most(daemon, "subscriptions", 0)
        await until_at_most(daemon, "connections", 2)  # the agent's, and the one that asks
        assert figures["subscription_overflows"] >= 1, "the stalled one was live and had no room"
        assert figures["catch_up_pages"] >= VIEWERS, "those who came back were behind"
        assert figures["catch_up_rejoins"] >= 1 + VIEWERS, "everybody was level once"
        assert figures["write_timeouts"] == figures["ping_timeouts"] == 0
        assert figures["subscriptions_closed"] == figures["storage_failures"] == 0


async def test_a_viewer_that_pauses_falls_behind_catches_up_and_is_live_again(daemon: Daemon) -> None:
    async with peer(daemon) as agent:
        run_id = (await agent.create())["id"]
        socket = await unhurried(daemon, connected(daemon, SMALL_BUFFER))
        async with socket:
            await socket.send(
                json.dumps({"jsonrpc": "2.0", "id": 1, "method": "runs.trace.subscribe", "params": {"run_id": run_id}})
            )
            assert json.loads(await socket.recv())["result"]["cursor"] == 0
            assert cursor_of(await socket.recv(decode=False)) == 0
            for at in range(0, 4_000, 500):
                await agent.record(run_id, *[json.loads(sized(n, 1_024)) for n in range(at, at + 500)])
            figures = await asyncio.to_thread(daemon.metrics)
            assert (figures["subscription_overflows"], figures["catch_up_rejoins"]) == (1, 1)

            for cursor in range(1, 4_001):
                assert cursor_of(await socket.recv(decode=False)) == cursor
            await daemon.until("catch_up_rejoins", 2)
            pages = (await asyncio.to_thread(daemon.metrics))["catch_up_pages"]
            assert pages > 0
            for cursor in range(4_001, 4_101):
                await agent.record(run_id, text(cursor))
                assert cursor_of(await socket.recv(decode=False)) == cursor
            figures = await asyncio.to_thread(daemon.metrics)
            assert (figures["subscription_overflows"], figures["catch_up_pages"]) == (1, pages), "live means live"


async def test_viewers_that_read_are_never_turned_to_catching_up(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as one, peer(daemon) as other:
        run_id = (await agent.create())["id"]
        for viewer in (one, other):
            await subscribe(viewer, run_id)
        for at in range(0, 2_000, 50):
            await agent.record(run_id, *[text(n, 500) for n in range(at, at + 50)])
        for viewer in (one, other):
            assert [params["cursor"] for params in await take(viewer, 2_001)] == list(range(2_001))
        figures = await asyncio.to_thread(daemon.metrics)
        assert figures["subscription_overflows"] == figures["catch_up_pages"] == 0
        assert figures["events_delivered"] == 4_000


async def record_big_run(agent: Peer, megabytes: int) -> str:
    """A run of events of 1 KiB that is over."""
    run_id: str = (await agent.create())["id"]
    for at in range(0, megabytes * 1_000, 1_000):
        await agent.record(run_id, *[text(n, 1_000) for n in range(at, at + 1_000)])
    await agent.record(run_id, {"type": "agent_end", "text": "big"})
    return run_id


async def record_small_run(agent: Peer) -> str:
    run_id: str = (await agent.create())["id"]
    await agent.record(run_id, *map(text, range(10)), {"type": "agent_end", "text": "small"})
    return run_id


async def test_a_viewer_of_a_small_run_does_not_wait_for_those_who_catch_up_on_a_big_one(daemon: Daemon) -> None:
    hungry, events = 4, 20_000
    async with peer(daemon) as agent, peer(daemon) as viewer:
        big, small = await record_big_run(agent, events // 1_000), await record_small_run(agent)
        epoch = (await agent.call("runs.get", {"run_id": big}))["epoch"]
        # They read in threads, as fast as bytes can be thrown away, each from a place of its own, so that nobody's page
        # serves another.
        reading = []
        for place in range(hungry):
            reader = RawViewer(daemon, connected(daemon), run_id=big, cursor=place + 1, epoch=epoch)
            reading.append(asyncio.create_task(asyncio.to_thread(reader.read, b'"record":{"record":"ended"')))
        await daemon.until("events_delivered", 1)
        await subscribe(viewer, small)
        stream = await until_ended(viewer)
        delivered = (await asyncio.to_thread(daemon.metrics))["events_delivered"]
        assert shown(stream)[-1] == ("ended", 11, "completed")
        assert delivered < hungry * events / 2, "it came while the others were far from the end"
        received = await asyncio.gather(*reading)
        assert min(received) > events * 1_000
        print({"delivered_by_then": delivered, "of": hungry * events})


async def test_on_one_connection_too_a_small_run_does_not_wait_for_a_big_one(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        big, small = await record_big_run(agent, 10), await record_small_run(agent)
        await asyncio.gather(subscribe(viewer, big), subscribe(viewer, small))  # they leave together, in this order
        ended: list[str] = []
        seen = {big: 0, small: 0}
        while len(ended) < 2:
            (params,) = await take(viewer, 1)
            run_id, kind = params["run_id"], params["record"]["record"]
            if kind == "event":
                seen[run_id] += 1
                assert params["cursor"] == seen[run_id]
            elif kind == "ended":
                ended.append(run_id)
                if run_id == small:
                    assert seen[big] < 5_000
        assert ended == [small, big]
        assert seen == {big: 10_001, small: 11}


async def create_many(agent: Peer, count: int) -> list[str]:
    """Runs, made by batches of calls."""
    run_ids: list[str] = []
    for at in range(0, count, 50):
        calls = [
            {"jsonrpc": "2.0", "id": f"create-{n}", "method": "runs.create", "params": {"prompt": f"run {n}"}}
            for n in range(at, min(at + 50, count))
        ]
        run_ids += [answer["result"]["id"] for answer in await agent.raw(json.dumps(calls))]
    return run_ids


async def subscribe_to_all(viewer: Peer, run_ids: list[str]) -> list[list[dict[str, Any]]]:
    """Subscribes by batches of calls; what was pushed between, and the answers are seen to be good."""
    between: list[list[dict[str, Any]]] = []
    for at in range(0, len(run_ids), 50):
        calls = [
            {"jsonrpc": "2.0", "id": f"watch-{run_id}", "method": "runs.trace.subscribe", "params": {"run_id": run_id}}
            for run_id in run_ids[at : at + 50]
        ]
        await viewer.socket.send(json.dumps(calls))
        pushed = []
        while type(message := json.loads(await viewer.next_frame())) is not list:
            pushed.append(message["params"])
        assert all("result" in answer for answer in message), message
        between.append(pushed)
    return between


async def test_a_viewer_watches_two_hundred_runs_at_once_each_in_its_order(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_ids = await create_many(agent, 200)
        for run_id in run_ids[::2]:
            await agent.record(run_id, text(0), text(1))
        between = await subscribe_to_all(viewer, run_ids)
        for run_id in run_ids:
            await agent.record(run_id, text(2), {"type": "agent_end", "text": "done"})
        streams: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in run_ids}
        for params in itertools.chain.from_iterable(between):
            streams[params["run_id"]].append(params)
        while not all(stream and stream[-1]["record"]["record"] == "ended" for stream in streams.values()):
            (params,) = await take(viewer, 1)
            streams[params["run_id"]].append(params)
        for place, run_id in enumerate(run_ids):
            count = 2 if place % 2 else 4
            kinds = [(kind, cursor) for kind, cursor, _ in shown(streams[run_id])]
            assert kinds == [("started", 0), *(("event", n) for n in range(1, count + 1)), ("ended", count)]


async def test_a_connection_has_1024_subscriptions_and_one_more_is_refused(start: StartDaemon) -> None:
    daemon = start(durability="normal")
    async with peer(daemon) as agent, peer(daemon) as viewer, peer(daemon) as other:
        run_ids = await create_many(agent, 1_025)
        await subscribe_to_all(viewer, run_ids[:1_024])
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 1_024
        with pytest.raises(Refused) as refused:
            await subscribe(viewer, run_ids[1_024])
        assert refused.value.data == {
            "type": "limit_exceeded",
            "limit": "subscriptions",
            "value": 1_025,
            "maximum": 1_024,
        }
        await subscribe(viewer, run_ids[0])  # replaces one
        await subscribe(other, run_ids[1_024])  # the bound is a connection's
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 1_025
        await viewer.call("runs.trace.unsubscribe", {"run_id": run_ids[5]})
        await subscribe(viewer, run_ids[1_024])
        await agent.record(run_ids[1_024], text(0))
        while (params := (await take(viewer, 1))[0])["record"]["record"] != "event":
            pass
        assert params["run_id"] == run_ids[1_024]
