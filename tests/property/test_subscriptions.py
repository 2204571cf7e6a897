"""Any sequence of operations on logs and subscriptions, against a model; and its liveness twin.

Safety: every subscription is sent `started` (from 0), then its log without gap or repetition, and `ended` once per
ending, level. Liveness: at rest everyone has everything; with room and prompt peers nobody reads a page without need.
"""

from typing import Any, ClassVar

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carserver.config import MIB, Settings
from carserver.core.commands import Cancel, Command, Complete, Fail, Interrupt, Resume
from carserver.core.principals import CLIENT, HOST
from carserver.core.runs import MODEL_TURN, TURN, Event
from carserver.core.turns import Turn
from carserver.protocol.runs import Status
from tests.property.world import Connection, World

RUNS, PEERS = 2, 3

TIGHT = Settings(
    subscription_events=3,
    subscription_bytes=800,
    outbox_bytes=2_000,
    burst_bytes=600,
    catch_up_bytes=60,
    page_entries=3,
    catch_up_reads=2,
    topics=1,
)
ROOMY = Settings(
    subscription_events=100_000,
    subscription_bytes=64 * MIB,
    outbox_bytes=256 * MIB,
    catch_up_bytes=64 * MIB,
    page_entries=100_000,
)

EVENTS = [
    Event(b'{"type":"a"}', "a", None),
    Event(b'{"type":"tool_start"}', "tool_start", None),
    Event(b'{"type":"longer","pad":"%b"}' % (b"x" * 250), "longer", None),
    Event(b'{"type":"larger than any bound","pad":"%b"}' % (b"x" * 4_000), "larger than any bound", None),
    Event(b'{"type":"agent_end","text":"done"}', "agent_end", "done"),
]
SMALL, ENDING = EVENTS[:2], EVENTS[-1]
events = st.one_of(
    st.lists(st.sampled_from(SMALL), min_size=1, max_size=3),
    st.lists(st.sampled_from([*SMALL * 4, *EVENTS]), min_size=1, max_size=6),
)
turns = st.lists(
    st.sampled_from([Turn(TURN, b"}"), Turn(TURN, b',"output":"%b"}' % (b"x" * 250)), Turn(MODEL_TURN, b',"m":1}')]),
    min_size=1,
    max_size=3,
)
operations = st.sampled_from(["interrupt"] * 4 + ["resume"] * 2 + ["fail", "cancel", "complete"])
changes = st.one_of(events, events, events, turns, operations)
runs = st.integers(0, RUNS - 1)
peers = st.integers(0, PEERS - 1)
places = st.integers(0, 50)


def interrupt(world: World, run_id: str, revision: int) -> Interrupt:
    now_ms = world.clock.now_ms()
    return Interrupt(run_id=run_id, principal=HOST, now_ms=now_ms, revision=revision, reason="owner gone")


class Steps(RuleBasedStateMachine):
    """Every step of the daemon is a step of the test's, in any order that can be."""

    settings: ClassVar[Settings] = TIGHT

    @initialize()
    def begin(self) -> None:
        self.world = World(self.settings, RUNS, PEERS)

    def done(self) -> None:
        """After every step of a peer or of the writer."""

    def peer(self, number: int) -> Connection:
        return self.world.connections[number]

    def run(self, number: int) -> str:
        return self.world.run_ids[number]

    def command(self, run: int, change: Any) -> Command:
        run_id, now_ms = self.run(run), self.world.clock.now_ms()
        if change == "fail":
            return Fail(run_id=run_id, principal=CLIENT, now_ms=now_ms, error="no budget")
        if change == "cancel":
            return Cancel(run_id=run_id, principal=CLIENT, now_ms=now_ms, reason="no need")
        if change == "resume":
            return Resume(run_id=run_id, principal=CLIENT, now_ms=now_ms)
        if change == "interrupt":
            return interrupt(self.world, run_id, self.world.log.heads[run_id].revision)
        if change == "complete":
            said: dict[str, Any] = {"status": Status.COMPLETED, "text": "done", "outcome": b'{"status":"success"}'}
            return Complete(run_id=run_id, principal=CLIENT, now_ms=now_ms, **said)
        if isinstance(change[0], Turn):
            return self.world.record_turns(run_id, change)
        return self.world.record(run_id, change)

    @rule(commands=st.lists(st.tuples(runs, changes), min_size=1, max_size=4))
    def commit(self, commands: list[tuple[int, Any]]) -> None:
        self.world.commit([self.command(run, change) for run, change in commands])
        self.done()

    @rule(commands=st.lists(st.tuples(runs, changes), min_size=1, max_size=3))
    def commit_and_publish(self, commands: list[tuple[int, Any]]) -> None:
        self.world.commit([self.command(run, change) for run, change in commands])
        while self.world.unpublished:
            self.world.publish()
        self.done()

    @precondition(lambda self: self.world.unpublished)
    @rule()
    def publish(self) -> None:
        self.world.publish()
        self.done()

    @rule(run=runs)
    def begin_another_run(self, run: int) -> None:
        """In the place of one that is likely to be over; who watches that one goes on watching it."""
        self.world.create(run)
        self.done()

    @rule(peer=peers, run=runs, share=st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0]))
    def subscribe(self, peer: int, run: int, share: float) -> None:
        self.world.subscribe(self.peer(peer), self.run(run), share)
        self.done()

    @rule(peer=peers, run=runs, share=st.sampled_from([0.0, 0.5, 1.0]))
    def subscribe_and_answer(self, peer: int, run: int, share: float) -> None:
        self.world.subscribe(self.peer(peer), self.run(run), share)
        while self.world.unanswered:
            self.world.answer()
        self.done()

    @rule(first=peers, second=peers, run=runs, ahead=st.lists(changes, min_size=1, max_size=4))
    def subscribe_ahead_of_publish(self, first: int, second: int, run: int, ahead: list[Any]) -> None:
        """Two ask for a run that the loop does not have; the second one's head is read before it is published."""
        self.world.forget(self.run(run))
        self.world.subscribe(self.peer(first), self.run(run), 1.0)
        self.world.subscribe(self.peer(second), self.run(run), 1.0)
        if len(self.world.looking) < 2:
            return  # somebody watches it already
        self.world.found(len(self.world.looking) - 2)
        while self.world.unanswered:
            self.world.answer()
        self.world.commit([self.command(run, change) for change in ahead])
        self.world.not_every_ending(self.run(run))
        self.world.found(len(self.world.looking) - 1)
        self.done()

    @rule(peer=peers, run=runs, meanwhile=st.lists(changes, min_size=1, max_size=3))
    def subscribe_behind_publish(self, peer: int, run: int, meanwhile: list[Any]) -> None:
        """Someone asks for a run that the loop does not have; what its read found is old when it arrives."""
        self.world.forget(self.run(run))
        self.world.subscribe(self.peer(peer), self.run(run), 1.0)
        if self.world.looking:
            self.world.look(len(self.world.looking) - 1)
            self.world.commit([self.command(run, change) for change in meanwhile])
            self.world.publish()
            self.world.found(len(self.world.looking) - 1)
        self.done()

    @precondition(lambda self: self.world.looking)
    @rule(place=places)
    def look(self, place: int) -> None:
        self.world.look(place % len(self.world.looking))

    @precondition(lambda self: self.world.looking)
    @rule(place=places)
    def found(self, place: int) -> None:
        self.world.found(place % len(self.world.looking))
        self.done()

    @precondition(lambda self: self.world.unanswered)
    @rule()
    def answer(self) -> None:
        self.world.answer()
        self.done()

    @rule(peer=peers, run=runs, politely=st.booleans())
    def leave(self, peer: int, run: int, politely: bool) -> None:
        if politely:
            self.world.unsubscribe(self.peer(peer), self.run(run))
        else:
            self.world.disconnect(self.peer(peer))
        self.done()

    @precondition(lambda self: self.world.log.reads)
    @rule(place=places, luck=st.integers(0, 9))
    def complete(self, place: int, luck: int) -> None:
        place %= len(self.world.log.reads)
        if luck == 9:
            self.world.find_damage(place)
        elif luck == 8:
            self.world.fail_for_now(place)
        else:
            self.world.complete(place)

    @precondition(lambda self: self.world.clock.retries)
    @rule()
    def retry(self) -> None:
        self.world.clock.retries.pop(0)()

    @rule(peer=peers, size=st.sampled_from([1, 1, 300, 1_000, 100_000]))
    def drain(self, peer: int, size: int) -> None:
        self.world.drain(self.peer(peer), size)

    @rule()
    def rest(self) -> None:
        self.world.come_to_rest()
        self.world.check_rest()

    @invariant()
    def outboxes_keep_their_bounds(self) -> None:
        if hasattr(self, "world"):
            self.world.check_bounds()

    def teardown(self) -> None:
        """At the end of any sequence everyone gets everything, and nothing is left of those who went."""
        if not hasattr(self, "world"):
            return
        self.world.come_to_rest()
        self.world.check_rest()
        for connection in list(self.world.connections):
            self.world.disconnect(connection)
        assert self.world.hub.subscriptions == 0
        assert not self.world.hub._pinned
        assert self.world.hub._catch_up._free_reads == self.settings.catch_up_reads
        assert not self.world.hub._catch_up._lanes


class Subscriptions(Steps):
    """Safety: also where publishing is not as it should be, a stream neither lacks nor repeats an event."""

    @rule(run=runs, lost=events, later=events)
    def lose_a_publishing(self, run: int, lost: list[Event], later: list[Event]) -> None:
        """What a live subscription sees next does not follow what it has: rule 1, `anything else`."""
        while self.world.unpublished:
            self.world.publish()
        self.world.commit([self.command(run, lost)])
        self.world.unpublished.clear()
        self.world.commit([self.command(run, later)])
        self.world.publish()

    @rule(run=runs, before=events, later=events)
    def publish_again(self, run: int, before: list[Event], later: list[Event]) -> None:
        """What it sees next begins with what it has."""
        while self.world.unpublished:
            self.world.publish()
        self.world.commit([self.command(run, before)])
        again = list(self.world.unpublished[0])
        self.world.publish()
        self.world.commit([self.command(run, later)])
        self.world.unpublished[0][:0] = again
        self.world.publish()


class PromptSubscriptions(Steps):
    """The liveness twin: there is room for everything, and everything happens at once."""

    settings = ROOMY

    def done(self) -> None:
        self.world.come_to_rest()
        self.world.check_rest()
        self.world.check_endings()
        assert self.world.counters.subscription_overflows == 0
        assert self.world.counters.catch_up_pages <= self.world.began_behind


EFFORT = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
Subscriptions.TestCase.settings = EFFORT
PromptSubscriptions.TestCase.settings = settings(EFFORT, max_examples=100)

TestSubscriptions = Subscriptions.TestCase
TestPromptSubscriptions = PromptSubscriptions.TestCase


def test_an_ending_that_has_no_room_comes_when_there_is() -> None:
    world = World(TIGHT, runs=1, connections=1)
    (peer,), (run_id,) = world.connections, world.run_ids
    world.subscribe(peer, run_id, 0.0)
    world.come_to_rest()
    _, viewer = peer.open[run_id]
    world.commit([world.record(run_id, [*SMALL, SMALL[0]])])
    world.commit([Fail(run_id=run_id, principal=CLIENT, now_ms=2_000, error="no budget")])
    world.publish()
    assert world.counters.subscription_overflows == 0, "three events have room"
    world.publish()
    assert world.counters.subscription_overflows == 1
    world.come_to_rest()
    world.check_rest()
    assert viewer.endings == [(1, 3)]
    assert world.counters.catch_up_pages == 0


def test_an_ending_is_not_told_before_events_that_came_in_the_same_commit_though_the_head_was_read_ahead() -> None:
    world = World(TIGHT, runs=1, connections=2)
    (first, second), (run_id,) = world.connections, world.run_ids
    world.forget(run_id)
    for peer in (first, second):
        world.subscribe(peer, run_id, 1.0)
    world.found(0)
    world.answer()  # the first is live at 0
    world.commit([world.record(run_id, [ENDING]), world.record(run_id, SMALL)])
    world.found(0)  # the second one's read sees the head after that commit, which is not published yet
    world.come_to_rest()
    world.check_rest()
    assert [viewer.endings for _, viewer in (first.open[run_id], second.open[run_id])] == [[(1, 3)], [(1, 3)]]


def test_every_ending_of_one_commit_is_told_where_it_was() -> None:
    world = World(ROOMY, runs=1, connections=1)
    (peer,), (run_id,) = world.connections, world.run_ids
    world.subscribe(peer, run_id, 0.0)
    world.come_to_rest()
    commands: list[Command] = []
    for revision in (2, 4):
        commands.append(world.record(run_id, SMALL))
        commands.append(interrupt(world, run_id, revision))
    world.commit([*commands, world.record(run_id, [ENDING, *SMALL])])
    world.come_to_rest()
    world.check_rest()
    assert peer.open[run_id][1].endings == [(1, 2), (2, 4), (3, 7)]


def take_turns(watched: list[list[int]], runs: int, pages: int) -> list[int]:
    """By connection, how many of the first so many pages were for it; each connection watches some of the runs."""
    world = World(msgspec.structs.replace(ROOMY, catch_up_reads=1, page_entries=3), runs, len(watched))
    for run_id in world.run_ids:
        world.commit([world.record(run_id, SMALL * 50)])
        world.publish()
    for connection, places in zip(world.connections, watched, strict=True):
        for place in places:
            world.subscribe(connection, world.run_ids[place], 0.0)
            world.answer()
    served = [0] * len(watched)
    for _ in range(pages):
        before = [sum(subscription.next for subscription, _ in peer.open.values()) for peer in world.connections]
        world.complete(0)
        for number, peer in enumerate(world.connections):
            served[number] += sum(subscription.next for subscription, _ in peer.open.values()) > before[number]
            world.drain(peer, 1_000_000)
    world.come_to_rest()
    world.check_rest()
    return served


def test_connections_take_turns_at_reading() -> None:
    assert take_turns([[0], [1], [2], [3]], runs=4, pages=20) == [5, 5, 5, 5]


def test_viewers_who_share_their_pages_have_no_more_turns_than_one_who_reads_alone() -> None:
    *shared, alone = take_turns([[0]] * 6 + [[1]], runs=2, pages=30)
    assert set(shared) == {shared[0]}
    assert abs(shared[0] - alone) <= 2


def test_a_connection_with_many_subscriptions_has_one_turn_like_any_other() -> None:
    many, one = take_turns([[0, 1, 2, 3], [4]], runs=5, pages=20)
    assert abs(many - one) <= 2


def test_within_a_connection_subscriptions_take_turns() -> None:
    world = World(msgspec.structs.replace(ROOMY, catch_up_reads=1, page_entries=3), runs=4, connections=1)
    (peer,) = world.connections
    for run_id in world.run_ids:
        world.commit([world.record(run_id, SMALL * 50)])
        world.publish()
        world.subscribe(peer, run_id, 0.0)
        world.answer()
    for _ in range(20):
        world.complete(0)
        world.drain(peer, 1_000_000)
    assert [subscription.next for subscription, _ in peer.open.values()] == [15, 15, 15, 15]


def test_a_page_is_read_once_for_all_who_wait_for_it() -> None:
    assert take_turns([[0], [0], [0]], runs=1, pages=10) in ([10, 10, 10], [9, 9, 9])


def test_a_page_for_which_there_is_no_room_any_more_is_kept_until_there_is() -> None:
    world = World(ROOMY, runs=1, connections=1)
    (peer,), (run_id,) = world.connections, world.run_ids
    world.commit([world.record(run_id, SMALL)])
    world.publish()
    world.subscribe(peer, run_id, 0.0)
    world.answer()
    peer.outbox.send(b'{"dropped":"%b"}' % (b"x" * peer.outbox.limit))  # a large answer
    world.complete(0)
    assert peer.open[run_id][0].next == 0
    world.come_to_rest()
    world.check_rest()
    assert world.counters.catch_up_pages == 1
