"""Who attends which run, and when nobody does any more: with a clock and timers of the test's own."""

import heapq
import itertools
from collections.abc import Callable

import pytest

from carserver.config import Settings
from carserver.core.attendance import OWNER_GONE, Attendance
from carserver.core.outbox import Outbox
from carserver.core.runs import Head, LiveRun
from carserver.protocol.runs import Snapshot, Status

GRACE_S = 30.0
AT_ONCE, PAUSE_S = 50, 0.25
SETTINGS = Settings(grace_s=GRACE_S, interrupts_at_once=AT_ONCE, interrupts_pause_s=PAUSE_S)


class Peer:
    """A connection that may attend."""

    def __init__(self, client_id: str = "") -> None:
        self.client_id = client_id
        self.outbox = Outbox(bytes, 1_000, lambda: None)
        self.closed = False


class Time:
    """A clock that moves when it is told to, and its timers."""

    def __init__(self) -> None:
        self.s = 100.0
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self.s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        assert delay_s >= 0
        heapq.heappush(self.timers, (self.s + delay_s, next(self._numbers), callback))

    def passes(self, seconds: float) -> None:
        until = self.s + seconds
        while self.timers and self.timers[0][0] <= until:
            self.s, _, callback = heapq.heappop(self.timers)
            callback()
        self.s = until


class Watch:
    """The attendance, and the interruptions that it asked for."""

    def __init__(self) -> None:
        self.time = Time()
        self.interrupted: list[tuple[str, int, str]] = []
        self.attendance = Attendance(
            SETTINGS, self.time.now, self.time.call_later, lambda *asked: self.interrupted.append(asked)
        )

    def changed(self, by: Peer | None = None, run_id: str = "run", revision: int = 1, live: bool = True) -> None:
        self.attendance.changed(head(run_id, revision, Status.EXECUTING if live else Status.COMPLETED), by)

    def leaves(self, peer: Peer) -> None:
        peer.closed = True
        self.attendance.leave(peer)


def head(run_id: str, revision: int, status: Status) -> Head:
    run = Snapshot(
        id=run_id,
        session_id="",
        agent_id="",
        status=status,
        prompt="",
        created_at_ms=0,
        updated_at_ms=0,
        event_count=0,
        epoch="epoch",
    )
    return Head(no=1, owner="client", run=run, revision=revision, endings=0, last_at_ms=0)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_an_attended_run_is_left_alone_for_ever(watch: Watch) -> None:
    peer = Peer()
    watch.changed(peer)
    watch.time.passes(100 * GRACE_S)
    assert watch.interrupted == []
    assert watch.attendance.attendants("run") == [peer]
    assert watch.attendance.attended_runs() == 1


def test_a_run_is_interrupted_when_the_grace_has_passed_since_its_last_attendant_left(watch: Watch) -> None:
    first, last = Peer(), Peer()
    watch.changed(first)
    watch.changed(last, revision=7)
    watch.leaves(first)
    watch.time.passes(2 * GRACE_S)
    assert watch.interrupted == []
    watch.leaves(last)
    assert watch.attendance.attended_runs() == 0
    watch.time.passes(GRACE_S - 0.001)
    assert watch.interrupted == []
    watch.time.passes(0.001)
    assert watch.interrupted == [("run", 7, OWNER_GONE)]
    watch.time.passes(10 * GRACE_S)
    assert len(watch.interrupted) == 1, "it is asked for once"


def test_whoever_comes_back_within_the_grace_keeps_the_run(watch: Watch) -> None:
    peer, back = Peer(), Peer()
    watch.changed(peer)
    watch.leaves(peer)
    watch.time.passes(GRACE_S - 1)
    watch.changed(back, revision=2)
    watch.time.passes(10 * GRACE_S)
    assert watch.interrupted == []
    watch.leaves(back)
    watch.time.passes(GRACE_S - 1)
    assert watch.interrupted == [], "the grace begins anew"
    watch.time.passes(1)
    assert watch.interrupted == [("run", 2, OWNER_GONE)]


def test_a_run_that_ended_is_not_interrupted_and_nobody_attends_it(watch: Watch) -> None:
    peer = Peer()
    watch.changed(peer)
    watch.changed(None, revision=2, live=False)
    assert watch.attendance.attendants("run") == []
    watch.leaves(peer)
    watch.time.passes(10 * GRACE_S)
    assert watch.interrupted == []


def test_a_run_that_is_reopened_is_attended_by_who_reopened_it_alone(watch: Watch) -> None:
    before, after = Peer(), Peer()
    watch.changed(before)
    watch.changed(None, revision=2, live=False)
    watch.changed(after, revision=3)
    assert watch.attendance.attendants("run") == [after]
    watch.leaves(after)
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 3, OWNER_GONE)]


def test_a_run_that_nobody_attends_from_its_first_moment_has_its_grace_too(watch: Watch) -> None:
    watch.changed(None)
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 1, OWNER_GONE)]


def test_a_change_by_nobody_gives_an_unattended_run_another_grace(watch: Watch) -> None:
    watch.changed(None)
    watch.time.passes(GRACE_S - 1)
    watch.changed(None, revision=2)
    watch.time.passes(GRACE_S - 1)
    assert watch.interrupted == []
    watch.time.passes(1)
    assert watch.interrupted == [("run", 2, OWNER_GONE)]


def test_a_change_by_nobody_takes_no_attendant_away(watch: Watch) -> None:
    peer = Peer()
    watch.changed(peer)
    watch.changed(None, revision=2)
    watch.time.passes(10 * GRACE_S)
    assert watch.interrupted == []
    assert watch.attendance.attendants("run") == [peer]


def test_runs_that_were_live_when_the_daemon_started_have_the_grace_and_a_reason_of_their_own(watch: Watch) -> None:
    back = Peer()
    watch.attendance.found([LiveRun("kept", 3), LiveRun("left", 4)], "daemon restarted (boot old)")
    watch.changed(back, "kept", revision=5)
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("left", 4, "daemon restarted (boot old)")]
    watch.leaves(back)
    watch.time.passes(GRACE_S)
    assert watch.interrupted[1:] == [("kept", 5, OWNER_GONE)], "from then on it is its owner who goes"


def test_a_run_that_changed_before_it_was_found_is_not_taken_back(watch: Watch) -> None:
    peer = Peer()
    watch.changed(peer, revision=9)
    watch.attendance.found([LiveRun("run", 8)], "daemon restarted")
    watch.time.passes(10 * GRACE_S)
    assert watch.interrupted == []


def test_an_interruption_that_could_not_be_stored_is_asked_for_again_after_another_grace(watch: Watch) -> None:
    watch.changed(None)
    watch.time.passes(GRACE_S)
    watch.attendance.again("run")
    watch.time.passes(GRACE_S - 1)
    assert len(watch.interrupted) == 1
    watch.time.passes(1)
    assert len(watch.interrupted) == 2


def test_it_is_not_asked_for_again_where_somebody_came_or_the_run_ended(watch: Watch) -> None:
    for run_id in ("attended", "ended"):
        watch.changed(None, run_id)
    watch.time.passes(GRACE_S)
    watch.changed(Peer(), "attended", revision=2)
    watch.changed(None, "ended", revision=2, live=False)
    watch.attendance.again("attended")
    watch.attendance.again("ended")
    watch.attendance.again("unknown")
    watch.time.passes(10 * GRACE_S)
    assert len(watch.interrupted) == 2


def test_who_leaves_leaves_all_runs_that_are_still_live(watch: Watch) -> None:
    peer, other = Peer(), Peer()
    for run_id in ("one", "two", "shared", "over"):
        watch.changed(peer, run_id)
    watch.changed(other, "shared")
    watch.changed(None, "over", live=False)
    watch.leaves(peer)
    watch.leaves(peer)
    watch.time.passes(GRACE_S)
    assert {run_id for run_id, _, _ in watch.interrupted} == {"one", "two"}
    assert watch.attendance.attendants("shared") == [other]


def test_one_timer_is_enough_however_many_runs_wait(watch: Watch) -> None:
    for number in range(100):
        watch.changed(None, f"run-{number}")
        watch.time.passes(0.01)
    assert len(watch.time.timers) == 1
    watch.time.passes(GRACE_S)
    assert [run_id for run_id, _, _ in watch.interrupted] == [f"run-{number}" for number in range(100)]
    assert watch.time.timers == []


def test_very_many_at_once_are_interrupted_in_goes_so_that_others_come_between(watch: Watch) -> None:
    watch.attendance.found([LiveRun(f"run-{number}", 1) for number in range(2 * AT_ONCE + 1)], "daemon restarted")
    watch.time.passes(GRACE_S)
    for gone in (AT_ONCE, 2 * AT_ONCE, 2 * AT_ONCE + 1):
        assert len({run_id for run_id, _, _ in watch.interrupted}) == len(watch.interrupted) == gone
        watch.time.passes(PAUSE_S)


def test_a_run_is_not_interrupted_while_somebody_is_about_to_attend_it(watch: Watch) -> None:
    watch.changed(None)
    watch.attendance.arriving("run")
    watch.attendance.arriving("run")
    watch.time.passes(GRACE_S + 1)
    watch.attendance.arrived("run")
    watch.time.passes(GRACE_S)
    assert watch.interrupted == []
    watch.attendance.arrived("run")  # refused: nothing changed, and nobody attends it
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 1, OWNER_GONE)]


def test_nothing_is_kept_of_runs_that_are_over_and_of_peers_that_went(watch: Watch) -> None:
    peers = [Peer() for _ in range(10)]
    for number, peer in enumerate(peers):
        watch.changed(peer, f"run-{number}")
        watch.changed(None, f"run-{number}", live=False)
        watch.leaves(peer)
    watch.time.passes(GRACE_S)
    watch.attendance.arriving("run-0")
    watch.attendance.arrived("run-0")
    kept = (watch.attendance._runs, watch.attendance._attended, watch.attendance._graces, watch.attendance._arriving)
    assert [len(held) for held in kept] == [0, 0, 0, 0]


def test_whoever_polls_for_a_live_run_attends_it_and_of_one_that_is_over_nothing_is_kept(watch: Watch) -> None:
    peer = Peer()
    watch.attendance.attend("run", peer)
    assert not watch.attendance.is_live("run")
    watch.changed()
    assert watch.attendance.is_live("run")
    watch.time.passes(GRACE_S - 1)
    watch.attendance.attend("run", peer)
    watch.time.passes(10 * GRACE_S)
    assert watch.interrupted == []
    watch.leaves(peer)
    watch.attendance.attend("run", peer)
    assert watch.attendance.attendants("run") == [], "it has ended"
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 1, OWNER_GONE)]
    watch.changed(live=False)
    watch.attendance.attend("run", Peer())
    assert not watch.attendance.is_live("run")
    assert watch.attendance._attended == {}


def test_whoever_takes_a_run_over_attends_it_alone_and_is_remembered_as_the_last(watch: Watch) -> None:
    old, beside, new = Peer("old"), Peer("beside"), Peer("new")
    watch.changed(old)
    watch.changed(beside)
    assert watch.attendance.last("run") == "beside"
    watch.attendance.attend_alone("run", old)
    assert (watch.attendance.attendants("run"), watch.attendance.last("run")) == ([old], "old")
    watch.leaves(beside)
    watch.changed(new)
    watch.attendance.attend_alone("run", new)
    watch.leaves(old)
    watch.time.passes(10 * GRACE_S)
    assert watch.interrupted == []
    watch.leaves(new)
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 1, OWNER_GONE)]


def test_of_two_who_take_a_run_over_at_once_the_second_attends_it(watch: Watch) -> None:
    first, second = Peer("first"), Peer("second")
    watch.changed(first)
    watch.changed(second)  # both resumed it, in one commit
    watch.attendance.attend_alone("run", first)
    watch.attendance.attend_alone("run", second)
    assert watch.attendance.attendants("run") == [second]
    watch.leaves(second)
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 1, OWNER_GONE)]


def test_a_run_that_is_taken_over_by_one_who_is_gone_by_then_has_its_grace(watch: Watch) -> None:
    old, gone = Peer("old"), Peer("gone")
    watch.changed(old)
    watch.leaves(gone)
    watch.attendance.attend_alone("run", gone)
    watch.time.passes(GRACE_S)
    assert watch.interrupted == [("run", 1, OWNER_GONE)]
    watch.changed(live=False)
    watch.attendance.attend_alone("run", old)
    assert watch.attendance._attended == {}
