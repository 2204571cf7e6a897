"""A world for the live trace without sockets, threads or time: the real core, and a log that answers when it is told.

`World` owns the model: what is committed, what of it is published, and for every connection what it must have been
sent. Everything that a daemon does by itself (publish, read, drain) is a call here, so a test chooses the order.
"""

import json
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, NamedTuple

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import Command, Create, Record, RecordTurns
from carserver.core.counters import Counters
from carserver.core.edits import Edit
from carserver.core.outbox import Outbox
from carserver.core.ports import Committed, Damaged, PageDone, Place, Scan
from carserver.core.principals import CLIENT
from carserver.core.runs import Entry, Event, Head
from carserver.core.runstore import RunStore
from carserver.core.subscription import Mode, Subscription, Topic
from carserver.core.turns import Turn
from carserver.protocol.errors import RpcError, unavailable
from carserver.protocol.runs import RECORDS, STATUSES, ListRuns, Snapshot, Status

LIVE_STATUS = {
    "created": "in_progress",
    "planning": "in_progress",
    "executing": "in_progress",
    "verifying": "in_progress",
    "completed": "completed",
    "failed": "completed",
    "cancelled": "completed",
    "interrupted": "incomplete",
}


class Clock:
    """Implements `core.runstore.Clock`: every look at it is a millisecond later; timers fire when they are told to.

    Graces never pass: endings are commands here.
    """

    def __init__(self, settings: Settings) -> None:
        self.ms = 1_000
        self.retries: list[Callable[[], None]] = []
        self._retry_s = settings.catch_up_retry_s

    def now_ms(self) -> int:
        self.ms += 1
        return self.ms

    def monotonic(self) -> float:
        return self.ms / 1000

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Clock":
        if delay_s == self._retry_s:
            self.retries.append(callback)
        return self

    def cancel(self) -> None:
        raise AssertionError("none of these timers is ever cancelled")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        raise AssertionError("nothing of the daemon's own has a reason to run")


class HeadRead:
    """A read of a head on its way: first the thread looks (`head`), later the loop is told."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.looked = False
        self.head: Head | None = None

    def __await__(self) -> Generator["HeadRead", None, Head | None]:
        yield self
        return self.head


class PageRead(NamedTuple):
    """A read of a page on its way."""

    run_id: str
    page: list[Entry]
    done: PageDone


class FakeLog:
    """Implements `core.ports.RunLog` in memory."""

    def __init__(self) -> None:
        self.heads: dict[str, Head] = {}
        self.entries: dict[str, list[Entry]] = {}
        self.reads: list[PageRead] = []

    def page(self, head: Head, start: int, stop: int, entries: int, size: int, done: PageDone) -> None:
        run_id = head.run.id
        assert start < stop <= head.cursor, "a page that is empty, or goes past the hub's cursor"
        page: list[Entry] = []
        taken = 0
        for entry in self.entries[run_id][start : min(stop, start + entries)]:
            if page and taken + len(entry.raw) > size:
                break
            page.append(entry)
            taken += len(entry.raw)
        self.reads.append(PageRead(run_id, page, done))

    async def head(self, run_id: str) -> Head | None:
        return await HeadRead(run_id)

    async def submit(self, command: Command, by: Attendant | None, *, patient: bool = False) -> Any:
        raise AssertionError("commands are committed by the world")

    async def edit(self, edit: Edit, by: Attendant | None = None, *, patient: bool = False) -> Any:
        raise AssertionError("not part of this world")

    async def scan(self, head: Head, start: int, stop: int, limit: int, types: Sequence[str] | None) -> Scan:
        raise AssertionError("not part of this world")

    async def list(self, owner: str | None, filters: ListRuns, after: Place | None, limit: int) -> list[Head]:
        raise AssertionError("not part of this world")


class Ending(NamedTuple):
    """One time that a run came to be over."""

    number: int
    status: str
    ended_at: str
    cursor: int
    termination: dict[str, Any] | None


class Viewer:
    """What one subscription must be sent, as the wire promises it; and how far it has been."""

    def __init__(self, run_id: str, cursor: int) -> None:
        self.run_id = run_id
        self.next = cursor
        self.started_due = cursor == 0
        self.endings: list[tuple[int, int]] = []  # their numbers, and the cursors that they came with
        self.ended_by_daemon = False
        self.first_ending: int | None = None  # from this one on it is told of every ending, if it never falls behind


class Connection:
    """A peer: its outbox, its subscriptions, and what it reads."""

    def __init__(self, limit: int) -> None:
        self.woken = False
        self.outbox = Outbox(framed, limit, self._wake)
        self.subscribed: dict[str, Subscription] = {}
        self.open: dict[str, tuple[Subscription, Viewer]] = {}
        self.reading: dict[str, Viewer] = {}  # by run: to whom frames belong, from a reply to the end of it
        self.viewers: list[Viewer] = []  # whose reply is sent; a reply names its place
        self.buffer = b""

    def _wake(self) -> None:
        self.woken = True


def framed(payload: bytes) -> bytes:
    """A transport's frame: a line."""
    return payload + b"\n"


class World:
    """The daemon's core and everything around it."""

    def __init__(self, settings: Settings, runs: int, connections: int) -> None:
        self.settings = settings
        self.counters = Counters()
        self.clock = Clock(settings)
        self.log = FakeLog()
        self.store = RunStore(self.log, self.clock, settings, self.counters)
        self.hub = self.store.hub
        self.unpublished: deque[list[Committed]] = deque()
        self.looking: list[tuple[Connection, Coroutine[Any, Any, Topic], HeadRead, float]] = []
        self.unanswered: list[tuple[Connection, Subscription, Viewer]] = []
        self.endings: dict[str, list[Ending]] = {}
        self.began_behind = 0  # subscriptions whose stream began below their run's head
        self.connections = [Connection(settings.outbox_bytes) for _ in range(connections)]
        self.run_ids = [""] * runs
        for place in range(runs):
            self.create(place)

    def create(self, place: int) -> None:
        """A new run in this place, published at once: nobody could ask for it before."""
        run_id = self.run_ids[place] = f"run-{len(self.log.heads)}"
        self.log.entries[run_id] = []
        self.endings[run_id] = []
        while self.unpublished:
            self.publish()
        self.commit([Create(run_id=run_id, principal=CLIENT, now_ms=0, head=self._new_head(run_id))])
        self.publish()

    def _new_head(self, run_id: str) -> Head:
        now_ms = self.clock.now_ms()
        run = Snapshot(
            id=run_id,
            session_id="",
            agent_id="",
            status=Status.CREATED,
            prompt="",
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            event_count=0,
            epoch="epoch",
        )
        return Head(no=len(self.log.heads) + 1, owner=CLIENT.name, run=run, revision=1, endings=0, last_at_ms=now_ms)

    # The writer.

    def commit(self, commands: Sequence[Command]) -> None:
        """One transaction; a refused command spoils no neighbour."""
        committed = []
        for command in commands:
            before = self.log.heads.get(command.run_id)
            try:
                applied = command.apply(before, None)
            except RpcError:
                continue
            self.log.heads[command.run_id] = applied.head
            self.log.entries[command.run_id].extend(applied.entries)
            run = applied.head.run
            if applied.ended:
                ended_at = f"1970-01-01T00:00:{(run.ended_at_ms or 0) / 1000:06.3f}Z"
                outcome = applied.head.outcome
                said = None if outcome is None else {"kind": "outcome", "outcome": json.loads(outcome)}
                self.endings[run.id].append(Ending(applied.head.endings, run.status, ended_at, run.event_count, said))
            committed.append(Committed(command, applied, None))
        self.unpublished.append(committed)

    def record(self, run_id: str, events: Sequence[Event]) -> Record:
        """A command that appends."""
        return Record(
            run_id=run_id,
            principal=CLIENT,
            now_ms=self.clock.now_ms(),
            events=list(events),
            run_events=self.settings.run_events,
        )

    def record_turns(self, run_id: str, turns: Sequence[Turn]) -> RecordTurns:
        """A command that appends turns."""
        return RecordTurns(
            run_id=run_id,
            principal=CLIENT,
            now_ms=self.clock.now_ms(),
            turns=list(turns),
            run_turns=self.settings.turns,
            run_events=self.settings.run_events,
        )

    def publish(self) -> None:
        """The loop is told of the oldest commit."""
        self.store.committed(self.unpublished.popleft())

    def forget(self, run_id: str) -> None:
        """The loop's copy of a run goes, unless somebody watches it: others were in use since."""
        self.hub._idle.pop(run_id)

    # A peer's requests.

    def subscribe(self, connection: Connection, run_id: str, share: float) -> None:
        """Asks for a run from this share of its log on; it may have to wait for the head."""
        self._look(connection, self.store.topic(run_id, CLIENT), share)

    def _look(self, connection: Connection, work: Coroutine[Any, Any, Topic], share: float) -> None:
        try:
            read = work.send(None)
        except StopIteration as stop:
            self._subscribe(connection, stop.value, share)
        else:
            self.looking.append((connection, work, read, share))

    def look(self, place: int) -> None:
        """A reader thread sees a head as it is committed now, published or not."""
        read = self.looking[place][2]
        read.head = self.log.heads[read.run_id]
        read.looked = True

    def found(self, place: int) -> None:
        """The loop is told of a head that was read."""
        if not self.looking[place][2].looked:
            self.look(place)
        connection, work, _, share = self.looking.pop(place)
        self._look(connection, work, share)

    def _subscribe(self, connection: Connection, topic: Topic, share: float) -> None:
        if connection not in self.connections:
            return  # its connection has ended, and its request with it
        run_id = topic.run_id
        cursor = round(topic.cursor * share)
        self._drop(connection, run_id)
        subscription = self.hub.subscribe(topic, connection.outbox, cursor, connection.subscribed)
        viewer = Viewer(run_id, cursor)
        connection.open[run_id] = (subscription, viewer)
        self.unanswered.append((connection, subscription, viewer))

    def answer(self) -> None:
        """The oldest reply to a subscribe is queued."""
        connection, subscription, viewer = self.unanswered.pop(0)
        connection.viewers.append(viewer)
        connection.outbox.send(json.dumps({"reply": len(connection.viewers) - 1}).encode())
        head = subscription.topic.known
        viewer.first_ending = head.endings if not head.live else head.endings + 1
        self.began_behind += subscription.mode is Mode.PENDING and subscription.next < head.cursor
        self.hub.activate(subscription)
        if connection.open.get(viewer.run_id, (None,))[0] is not subscription:
            connection.outbox.send(json.dumps({"dropped": viewer.run_id}).encode())

    def unsubscribe(self, connection: Connection, run_id: str) -> None:
        self._drop(connection, run_id)

    def _drop(self, connection: Connection, run_id: str) -> None:
        """Ends a subscription; a mark in the stream says from where on nothing of it may come."""
        held = connection.open.pop(run_id, None)
        if held is not None:
            self.hub.drop(held[0])
            connection.outbox.send(json.dumps({"dropped": run_id}).encode())

    def disconnect(self, connection: Connection) -> None:
        """As `rpc.session.Session.close` does it; another peer comes instead."""
        for subscription in list(connection.subscribed.values()):
            self.hub.drop(subscription)
        assert not connection.subscribed
        connection.outbox.discard()
        self.unanswered = [waiting for waiting in self.unanswered if waiting[0] is not connection]
        self.connections[self.connections.index(connection)] = Connection(self.settings.outbox_bytes)

    # The reader threads, and the sockets.

    def complete(self, place: int) -> None:
        """The loop is told of a page."""
        read = self.log.reads.pop(place)
        read.done(read.page)

    def fail_for_now(self, place: int) -> None:
        """A page could not be read; those who wait for it wait on."""
        self.log.reads.pop(place).done(unavailable("busy"))

    def find_damage(self, place: int) -> None:
        """A page cannot be read, now or later: those who wait for it are told, and that is the end of it."""
        waiting = [held for connection in self.connections for held in connection.open.values()]
        read = self.log.reads.pop(place)
        read.done(Damaged("damaged"))
        for subscription, viewer in waiting:
            viewer.ended_by_daemon = subscription.mode is Mode.CLOSED
        for connection in self.connections:
            for run_id in set(connection.open) - set(connection.subscribed):
                del connection.open[run_id]

    def drain(self, connection: Connection, size: int) -> None:
        """The socket takes about `size` bytes, if somebody told it to."""
        if not connection.woken:
            return
        taken = connection.outbox.take(size)
        connection.woken = bool(connection.outbox.size)
        *lines, connection.buffer = (connection.buffer + taken).split(b"\n")
        for line in lines:
            self._receive(connection, json.loads(line), line)

    def _receive(self, connection: Connection, message: dict[str, Any], line: bytes) -> None:
        if "reply" in message:
            viewer = connection.viewers[message["reply"]]
            connection.reading[viewer.run_id] = viewer
        elif "dropped" in message:
            connection.reading.pop(message["dropped"], None)
        elif message["method"] == "runs.trace.closed":
            closed = connection.reading.pop(message["params"]["run_id"])
            assert closed.ended_by_daemon
        else:
            params = message["params"]
            assert params["run_id"] in connection.reading, f"a frame before a reply, or after the end: {params}"
            self._check(connection.reading[params["run_id"]], params, line)

    def _check(self, viewer: Viewer, params: dict[str, Any], line: bytes) -> None:
        """The next frame of a stream, against the model."""
        kind = params["record"]["record"]
        assert (kind == "started") == viewer.started_due, (
            "`started` is the first record of a stream from 0, and only that"
        )
        viewer.started_due = False
        assert params["status"] == LIVE_STATUS[params["run_status"]]
        if kind == "started":
            assert (params["cursor"], params["run_status"]) == (0, "created")
        elif kind in RECORDS:
            sequence = params["record"]["sequence" if kind == "event" else "index"]
            assert sequence == viewer.next, "a gap, or a repetition"
            entry = self.log.entries[viewer.run_id][viewer.next]
            viewer.next += 1
            assert params["cursor"] == viewer.next
            assert params["run_status"] == STATUSES[entry.status]
            assert kind == RECORDS[entry.kind]
            if kind == "event":
                assert params["record"]["timestamp_ms"] == entry.timestamp_ms
                assert entry.raw in line
            else:
                assert entry.raw.replace(b'{"type"', b'{"record"', 1) in line
        else:
            assert kind == "ended"
            assert params["cursor"] == viewer.next, "`ended` before all that came before it"
            said = (params["run_status"], params["record"]["ended_at"])
            numbers = [
                ending.number for ending in self.endings[viewer.run_id] if (ending.status, ending.ended_at) == said
            ]
            assert len(numbers) == 1, "an ending that there was not"
            assert not viewer.endings or numbers[0] > viewer.endings[-1][0], "`ended` twice for one ending"
            viewer.endings.append((numbers[0], params["cursor"]))
            assert params["record"].get("termination") == self.endings[viewer.run_id][numbers[0] - 1].termination

    # The end.

    def come_to_rest(self) -> None:
        """Everything that is under way happens; it must come to an end."""
        for _ in range(100_000):
            if self.looking:
                self.found(0)
            elif self.unanswered:
                self.answer()
            elif self.unpublished:
                self.publish()
            elif self.log.reads:
                self.complete(0)
            elif self.clock.retries:
                self.clock.retries.pop(0)()
            else:
                woken = [connection for connection in self.connections if connection.woken]
                if not woken:
                    return
                for connection in woken:
                    self.drain(connection, 1)
        raise AssertionError("it never comes to rest")

    def check_rest(self) -> None:
        """At rest every open subscription is live and has had everything."""
        for connection in self.connections:
            assert connection.outbox.size == 0
            assert connection.subscribed == {run_id: held[0] for run_id, held in connection.open.items()}
            for run_id, (subscription, viewer) in connection.open.items():
                head = self.log.heads[run_id]
                assert subscription.mode is Mode.LIVE
                assert viewer.next == head.cursor == len(self.log.entries[run_id])
                assert not viewer.started_due
                last = viewer.endings[-1][0] if viewer.endings else 0
                assert head.live or last == head.endings, "the run is over and nobody said so"
                assert not subscription.topic.waiting
        assert self.hub.subscriptions == sum(len(connection.open) for connection in self.connections)

    def not_every_ending(self, run_id: str) -> None:
        """A head is read ahead of its publishing: what was undone in between is never seen by those who watch now."""
        for connection in self.connections:
            if run_id in connection.open:
                connection.open[run_id][1].first_ending = None

    def check_endings(self) -> None:
        """Where nobody ever falls behind, everyone is told of each ending, when it is."""
        for connection in self.connections:
            for run_id, (_, viewer) in connection.open.items():
                if viewer.first_ending is not None:
                    endings = [ending for ending in self.endings[run_id] if ending.number >= viewer.first_ending]
                    assert [number for number, _ in viewer.endings] == [ending.number for ending in endings]
                    later = [ending.cursor for ending in endings[1:]]  # the first may have been before it came
                    assert [cursor for _, cursor in viewer.endings[1:]] == later

    def check_bounds(self) -> None:
        """What a peer does not take stays within its outbox: frames of streams to its limit, or one larger piece."""
        for connection in self.connections:
            sizes: list[int] = []
            events: dict[int, int] = {}
            for frames, sender, count in connection.outbox._queue:
                if sender is not None:
                    sizes.append(len(frames))
                    events[id(sender)] = events.get(id(sender), 0) + count
            assert len(sizes) <= 1 or sum(sizes) <= connection.outbox.limit
            for subscription, _ in connection.open.values():
                assert subscription._undelivered_events == events.get(id(subscription), 0)
