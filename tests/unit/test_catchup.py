"""Catching up when something is in the way: a read that fails, a log that is damaged, an outbox that is full or sealed.

The hub and its subscriptions are the real ones; pages come, and timers fire, when the test says so. That every event
comes once and in order, whatever happens in whatever order, is `tests/property/test_subscriptions.py`.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.hub import Hub
from carserver.core.outbox import Outbox
from carserver.core.ports import Damaged, PageDone
from carserver.core.runs import Entry, Event, Head, advance
from carserver.core.subscription import Mode, Subscription
from carserver.protocol.errors import unavailable
from carserver.protocol.runs import Snapshot, Status

RETRY_S = 3.0
DAMAGE = "event 1 of run 'run' is missing or damaged"
LIMIT = 8_000  # bytes of an outbox; it is low up to a quarter of it
PAD = 100
SETTINGS = Settings(
    catch_up_retry_s=RETRY_S, catch_up_reads=2, catch_up_bytes=2_000, outbox_bytes=LIMIT, subscription_bytes=LIMIT
)


class Read(NamedTuple):
    """A page that was asked for."""

    run_id: str
    start: int
    stop: int
    size: int
    done: PageDone


class Pages:
    """Implements `core.ports.PageReader` and keeps the logs: a page comes when it is told to."""

    def __init__(self) -> None:
        self.logs: dict[str, list[Entry]] = {}
        self.reads: list[Read] = []  # under way
        self.asked: list[tuple[str, int]] = []  # all that there were

    def page(self, head: Head, start: int, stop: int, entries: int, size: int, done: PageDone) -> None:
        self.asked.append((head.run.id, start))
        self.reads.append(Read(head.run.id, start, stop, size, done))

    def come(self) -> None:
        """The oldest read gives its page."""
        read = self.reads.pop(0)
        page: list[Entry] = []
        for entry in self.logs[read.run_id][read.start : read.stop]:
            if page and sum(len(other.raw) for other in page) + len(entry.raw) > read.size:
                break
            page.append(entry)
        read.done(page)

    def fail(self, error: Exception) -> None:
        """The oldest read gives an error."""
        self.reads.pop(0).done(error)


class Viewer:
    """A connection and what its peer has been sent."""

    def __init__(self) -> None:
        self.outbox = Outbox(lambda payload: payload + b"\n", LIMIT, lambda: None)
        self.subscribed: dict[str, Subscription] = {}

    def read(self) -> list[dict[str, Any]]:
        """All that waits, and what comes in its place."""
        lines: list[bytes] = []
        while self.outbox.size:
            lines += self.outbox.take(LIMIT).splitlines()
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def cursors(self) -> list[int]:
        """The cursors of the event frames that wait."""
        return [message["params"]["cursor"] for message in self.read()]


class Scene:
    """A hub, its pages and its timers."""

    def __init__(self) -> None:
        self.pages = Pages()
        self.counters = Counters()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.hub = Hub(self.pages, lambda *timer: self.timers.append(timer), SETTINGS, self.counters)
        self.heads: dict[str, Head] = {}

    def record(self, run_id: str, count: int) -> None:
        """Commits so many events to a run, and publishes them."""
        head = self.heads.get(run_id) or _new_head(run_id, len(self.heads) + 1)
        log = self.pages.logs.setdefault(run_id, [])
        raws = [b'{"type":"x","n":%d,"pad":"%b"}' % (len(log) + n, b"x" * PAD) for n in range(count)]
        head, entries = advance(head, [Event(raw, "x", None) for raw in raws], now_ms=2_000)
        log += entries
        self.heads[run_id] = head
        self.hub.publish([(head, entries, False)])

    def watch(self, viewer: Viewer, run_id: str = "run", cursor: int = 1) -> Subscription:
        """Subscribes from a cursor: not 0, for then there is a record `started` as well."""
        topic = self.hub.find(run_id)
        assert topic is not None
        subscription = self.hub.subscribe(topic, viewer.outbox, cursor, viewer.subscribed)
        self.hub.activate(subscription)
        return subscription

    def time_passes(self) -> None:
        """The timers that are set fire."""
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()


def _new_head(run_id: str, no: int) -> Head:
    run = Snapshot(
        id=run_id,
        session_id="",
        agent_id="",
        status=Status.CREATED,
        prompt="",
        created_at_ms=1_000,
        updated_at_ms=1_000,
        event_count=0,
        epoch="epoch",
    )
    return Head(no=no, owner="client", run=run, revision=1, endings=0, last_at_ms=1_000)


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.record("run", 5)
    return scene


def upto(last: int, first: int = 2) -> list[int]:
    """Cursors."""
    return list(range(first, last + 1))


# A read that fails for now.


def test_a_page_that_could_not_be_read_is_asked_for_again_after_a_while_and_nothing_is_lost_or_doubled(
    scene: Scene,
) -> None:
    viewer = Viewer()
    subscription = scene.watch(viewer)
    scene.pages.fail(unavailable("storage cannot be read: for now"))
    assert [delay_s for delay_s, _ in scene.timers] == [RETRY_S]
    assert scene.pages.reads == [], "not before the time has passed"
    assert viewer.read() == []
    assert (subscription.mode, scene.counters.catch_up_retries) == (Mode.CATCHING_UP, 1)
    scene.record("run", 2)  # what is published meanwhile waits for its turn, too
    assert (viewer.read(), scene.pages.reads) == ([], [])
    scene.time_passes()
    assert scene.pages.asked == [("run", 1)] * 2
    scene.pages.come()
    assert viewer.cursors() == upto(7)
    assert (subscription.mode, scene.timers) == (Mode.LIVE, [])
    scene.record("run", 1)
    assert viewer.cursors() == [8]


def test_it_is_asked_for_again_as_often_as_it_fails(scene: Scene) -> None:
    viewer = Viewer()
    scene.watch(viewer)
    for _ in range(5):
        scene.pages.fail(unavailable("again"))
        assert len(scene.timers) == 1
        scene.time_passes()
    scene.pages.come()
    assert viewer.cursors() == upto(5)
    assert scene.counters.catch_up_retries == 5


def test_all_who_waited_for_the_page_that_failed_get_it_by_one_read(scene: Scene) -> None:
    scene.record("other", 2)
    busy = [Viewer() for _ in range(SETTINGS.catch_up_reads)]
    for viewer in busy:  # every reader has something to do, so the rest wait together
        scene.watch(viewer, "other")
        scene.record("other", 1)
    viewers, further = [Viewer() for _ in range(3)], [Viewer() for _ in range(2)]
    for viewer in viewers:
        scene.watch(viewer)
    for viewer in further:
        scene.watch(viewer, cursor=2)
    while scene.pages.reads[0].run_id != "run":
        scene.pages.come()
    scene.pages.fail(unavailable("for now"))
    while scene.pages.reads:
        scene.pages.come()
    assert [viewer.cursors() for viewer in viewers] == [[]] * 3
    scene.time_passes()
    while scene.pages.reads:
        scene.pages.come()
    assert [viewer.cursors() for viewer in viewers] == [upto(5)] * 3
    assert [viewer.cursors() for viewer in further] == [upto(5, 3)] * 2
    assert sorted(start for run_id, start in scene.pages.asked if run_id == "run") == [1, 1, 2]


def test_who_has_gone_before_the_time_has_passed_asks_for_nothing(scene: Scene) -> None:
    viewer = Viewer()
    subscription = scene.watch(viewer)
    scene.pages.fail(unavailable("for now"))
    scene.hub.drop(subscription)
    scene.time_passes()
    assert (scene.pages.reads, viewer.read()) == ([], [])


def test_a_read_that_failed_makes_room_for_the_next(scene: Scene) -> None:
    for _ in range(4):
        scene.watch(Viewer())
        scene.record("run", 1)
    for _ in range(4):
        scene.watch(Viewer(), cursor=2)
    under_way = len(scene.pages.reads)
    assert under_way == SETTINGS.catch_up_reads
    for _ in range(under_way):
        scene.pages.fail(unavailable("for now"))
    scene.time_passes()
    assert len(scene.pages.reads) == SETTINGS.catch_up_reads


# A log that is damaged.


def test_a_damaged_log_closes_the_subscription_with_its_reason_and_that_of_no_other_run(scene: Scene) -> None:
    viewer, neighbour = Viewer(), Viewer()
    scene.record("whole", 3)
    damaged = scene.watch(viewer)
    whole = scene.watch(viewer, "whole")
    level = scene.watch(neighbour, cursor=5)
    scene.pages.fail(Damaged(DAMAGE))
    assert damaged.mode is Mode.CLOSED
    assert viewer.subscribed == {"whole": whole}
    (message,) = viewer.read()
    assert message == {
        "jsonrpc": "2.0",
        "method": "runs.trace.closed",
        "params": {"run_id": "run", "reason": DAMAGE},
    }
    assert scene.counters.subscriptions_closed == 1
    assert (scene.hub.subscriptions, level.mode) == (2, Mode.LIVE)
    assert (scene.timers, scene.counters.catch_up_retries) == ([], 0), "reading it again will not help"
    scene.pages.come()
    assert viewer.cursors() == upto(3)
    scene.record("run", 1)
    assert (viewer.cursors(), neighbour.cursors()) == ([], [6])


def test_after_that_the_same_connection_may_watch_the_run_from_behind_the_damage(scene: Scene) -> None:
    viewer = Viewer()
    scene.watch(viewer)
    scene.pages.fail(Damaged(DAMAGE))
    viewer.read()
    again = scene.watch(viewer, cursor=2)
    assert viewer.subscribed == {"run": again}
    scene.pages.come()
    assert viewer.cursors() == upto(5, 3)
    assert again.mode is Mode.LIVE


def test_a_defect_closes_it_too_and_nothing_of_the_defect_gets_out(scene: Scene) -> None:
    viewer = Viewer()
    scene.watch(viewer)
    scene.pages.fail(ValueError("the words of a defect"))
    (message,) = viewer.read()
    assert message["method"] == "runs.trace.closed"
    assert "the words" not in message["params"]["reason"]
    assert (viewer.subscribed, scene.timers) == ({}, [])


def test_who_has_gone_already_is_told_nothing_of_the_damage(scene: Scene) -> None:
    viewer = Viewer()
    scene.hub.drop(scene.watch(viewer))
    scene.pages.fail(Damaged(DAMAGE))
    assert (viewer.read(), scene.counters.subscriptions_closed) == ([], 0)


# An outbox that is full.


def full(viewer: Viewer) -> None:
    """Something else fills the outbox."""
    viewer.outbox.put(b"-" * (LIMIT - 1) + b"\n")


def test_a_page_that_finds_the_outbox_full_is_kept_and_goes_first_when_there_is_room(scene: Scene) -> None:
    viewer = Viewer()
    subscription = scene.watch(viewer)
    full(viewer)
    scene.pages.come()
    scene.record("run", 2)
    assert (viewer.outbox.size, scene.pages.reads) == (LIMIT, []), "it waits, and nothing is read meanwhile"
    viewer.outbox.take(LIMIT)
    assert viewer.outbox.size > 0, "it is there by now, without a read"
    assert viewer.cursors() == upto(5)
    scene.pages.come()
    assert viewer.cursors() == upto(7, 6)
    assert scene.pages.asked == [("run", 1), ("run", 5)]
    assert subscription.mode is Mode.LIVE


def test_pages_that_do_not_fit_together_wait_for_one_another_and_none_is_read_again(scene: Scene) -> None:
    viewer = Viewer()
    runs = [f"run {number}" for number in range(6)]
    for run_id in runs:
        scene.record(run_id, 12)  # a page of it is about a quarter of the outbox in bytes of the log, more in frames
        scene.watch(viewer, run_id)
    full(viewer)
    while scene.pages.reads:
        scene.pages.come()
    assert viewer.outbox.size == LIMIT
    seen: dict[str, list[int]] = {run_id: [] for run_id in runs}
    while viewer.outbox.size or scene.pages.reads:
        for line in viewer.outbox.take(1).splitlines():
            if line.startswith(b"{"):
                params = json.loads(line)["params"]
                seen[params["run_id"]].append(params["cursor"])
        assert viewer.outbox.size <= LIMIT
        if not viewer.outbox.size and scene.pages.reads:
            scene.pages.come()
    assert seen == dict.fromkeys(runs, upto(12))
    assert len(scene.pages.asked) == len(set(scene.pages.asked)), "each page once"


def test_a_page_that_waits_for_room_goes_with_its_subscription(scene: Scene) -> None:
    viewer = Viewer()
    subscription = scene.watch(viewer)
    full(viewer)
    scene.pages.come()
    scene.hub.drop(subscription)
    assert viewer.read() == []
    assert scene.pages.reads == []


def test_nothing_is_read_for_a_peer_whose_outbox_is_not_low(scene: Scene) -> None:
    viewer, other = Viewer(), Viewer()
    viewer.outbox.put(b"-" * (LIMIT // 4) + b"\n")
    scene.watch(viewer)
    assert scene.pages.asked == []
    scene.watch(other)  # nobody else waits for that
    scene.pages.come()
    assert other.cursors() == upto(5)
    viewer.outbox.take(1)
    scene.pages.come()
    assert viewer.cursors() == upto(5)


# An outbox that is sealed.


def test_subscriptions_of_a_sealed_outbox_ask_for_no_pages(scene: Scene) -> None:
    waiting, reading = Viewer(), Viewer()
    full(waiting)
    scene.watch(waiting)
    scene.watch(reading)
    asked = list(scene.pages.asked)
    for viewer in (waiting, reading):
        viewer.outbox.seal(b"close\n")
    scene.pages.come()
    for viewer in (waiting, reading):
        assert viewer.read() == []
    scene.record("run", 20)
    scene.watch(waiting, cursor=2)
    for viewer in (waiting, reading):
        assert viewer.read() == []
    assert (scene.pages.asked, scene.pages.reads) == (asked, [])


def test_a_retry_asks_for_nothing_where_the_outbox_was_sealed_meanwhile(scene: Scene) -> None:
    viewer, other = Viewer(), Viewer()
    scene.watch(viewer)
    scene.pages.fail(unavailable("for now"))
    viewer.outbox.seal(b"close\n")
    scene.time_passes()
    assert scene.pages.reads == []
    scene.watch(other)
    scene.pages.come()
    assert other.cursors() == upto(5)
