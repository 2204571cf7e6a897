"""Any sequence of changes, deletions and watches, against a model; and its liveness twins.

Safety: who watches is never told an older snapshot of a run after a newer one, nor of a run that it does not see, and
what waits keeps its bounds. Liveness: at rest, the picture that a client makes of what it was told is the truth, also
where it is told nothing but to list again; with room and a prompt peer every run that a commit changed is told.
"""

import json
from typing import Any, ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.commands import Cancel, Command, Fail, Interrupt, Record, Resume
from carserver.core.ports import Committed, Done
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.runs import Event
from carserver.core.watch import DELETED
from carserver.protocol.runs import RunFilters, Status
from tests.property.watchworld import PEERS, Client, World

TIGHT = Settings(watch_runs=3, watch_bytes=8_000, watch_piece_bytes=600, outbox_bytes=4_000)
HOPELESS = replace(TIGHT, watch_runs=1)
ROOMY = Settings(outbox_bytes=2**28, watch_piece_bytes=2**24)

AGENT = Principal("agent", "a")
PRINCIPALS = [HOST, CLIENT, AGENT]
SESSIONS = ["", "s"]

runs = st.integers(0, 4)
peers = st.integers(0, PEERS - 1)
places = st.integers(0, 50)
whats = st.sampled_from(["create"] * 4 + ["record"] * 3 + ["end", "fail", "cancel", "interrupt", "resume", "delete"])
changes = st.tuples(whats, runs, st.sampled_from(PRINCIPALS), st.sampled_from(SESSIONS))
filterses = st.builds(
    RunFilters,
    session_id=st.sampled_from([None, None, *SESSIONS]),
    status=st.sampled_from([None, None, None, Status.EXECUTING, Status.COMPLETED, Status.CREATED]),
)


class Steps(RuleBasedStateMachine):
    """Every step of the daemon is a step of the test's, in any order that can be."""

    settings: ClassVar[Settings] = TIGHT

    @initialize()
    def begin(self) -> None:
        self.world = World(self.settings)

    def done(self) -> None:
        """After every step of a peer or of the writer."""

    def command(self, what: str, run: int, principal: Principal, session_id: str) -> Command | str:
        world, run_id = self.world, f"run-{run}"
        if what == "delete":
            return run_id
        head = world.heads.get(run_id)
        owner = principal if head is None else {one.name: one for one in PRINCIPALS}[head.owner]
        now_ms = world.clock.now_ms()
        if what == "create":
            return world.create(run, principal, session_id, f"{principal.name} {'x' * (run * 700)}")
        if what == "fail":
            return Fail(run_id=run_id, principal=owner, now_ms=now_ms, error="no budget")
        if what == "cancel":
            return Cancel(run_id=run_id, principal=HOST, now_ms=now_ms, reason="no need")
        if what == "resume":
            return Resume(run_id=run_id, principal=owner, now_ms=now_ms)
        if what == "interrupt":
            revision = 0 if head is None else head.revision
            return Interrupt(run_id=run_id, principal=HOST, now_ms=now_ms, revision=revision, reason="owner gone")
        type_ = "agent_end" if what == "end" else "tool_start"
        event = Event(b"{}", type_, "done" if what == "end" else None)
        return Record(run_id=run_id, principal=owner, now_ms=now_ms, events=[event], run_events=1_000)

    @rule(commands=st.lists(changes, min_size=1, max_size=8), publish=st.booleans())
    def commit(self, commands: list[tuple[str, int, Principal, str]], publish: bool) -> None:
        together: list[Committed | Done] = []
        for command in commands:  # one by one, so that each is made of what the one before it did
            self.world.commit([self.command(*command)])
            together += self.world.unpublished.pop()
        self.world.unpublished.append(together)
        while publish and self.world.unpublished:
            self.world.publish()
        self.done()

    @precondition(lambda self: self.world.unpublished)
    @rule()
    def publish(self) -> None:
        self.world.publish()
        self.done()

    @rule(peer=peers, principal=st.sampled_from(PRINCIPALS), filters=filterses, at_once=st.booleans())
    def watch(self, peer: int, principal: Principal, filters: RunFilters, at_once: bool) -> None:
        self.world.watch(self.world.clients[peer], principal, filters)
        while at_once and self.world.pending:
            self.world.answer()
        self.done()

    @precondition(lambda self: self.world.pending)
    @rule()
    def answer(self) -> None:
        self.world.answer()
        self.done()

    @rule(peer=peers, politely=st.booleans())
    def leave(self, peer: int, politely: bool) -> None:
        if politely:
            self.world.unwatch(self.world.clients[peer])
        else:
            self.world.disconnect(self.world.clients[peer])
        self.done()

    @precondition(lambda self: self.world.lists)
    @rule(place=places, tell=st.booleans())
    def list_(self, place: int, tell: bool) -> None:
        place %= len(self.world.lists)
        if tell:
            self.world.tell(place)
        else:
            self.world.look(place)
        self.done()

    @rule(peer=peers, size=st.sampled_from([100, 3_000]))
    def crowd(self, peer: int, size: int) -> None:
        """Something else fills the outbox."""
        self.world.clients[peer].outbox.send(b'{"list":-1,"pad":"%b"}' % (b"x" * size))
        self.done()

    @rule(peer=peers, size=st.sampled_from([1, 1, 1_000, 100_000]))
    def drain(self, peer: int, size: int) -> None:
        self.world.drain(self.world.clients[peer], size)

    @rule()
    def rest(self) -> None:
        self.world.come_to_rest()
        self.world.check_rest()

    @invariant()
    def bounds(self) -> None:
        if hasattr(self, "world"):
            self.world.check_bounds()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.come_to_rest()
        self.world.check_rest()
        for client in list(self.world.clients):
            self.world.disconnect(client)
        assert len(self.world.watchers) == 0


class Watching(Steps):
    """Safety, with bounds that are reached all the time."""


class HopelessWatching(Steps):
    """The liveness twin: who can never be told of two runs at once lists again and again, and comes to know all."""

    settings = HOPELESS


class PromptWatching(Steps):
    """The other one: with room and prompt peers nobody is told to list again but for what was deleted."""

    settings = ROOMY

    def done(self) -> None:
        self.world.come_to_rest()
        self.world.check_rest()
        assert self.world.counters.watch_resets <= PEERS * self.world.deleted


EFFORT = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
Watching.TestCase.settings = EFFORT
HopelessWatching.TestCase.settings = settings(EFFORT, max_examples=100)
PromptWatching.TestCase.settings = settings(EFFORT, max_examples=50)

TestWatching = Watching.TestCase
TestHopelessWatching = HopelessWatching.TestCase
TestPromptWatching = PromptWatching.TestCase


def prompt_world() -> tuple[World, Client]:
    world = World(ROOMY)
    client = world.clients[0]
    world.watch(client, HOST, RunFilters())
    world.come_to_rest()
    return world, client


def messages(world: World, client: Client) -> list[dict[str, Any]]:
    """All that waits for it."""
    while world.unpublished:
        world.publish()
    taken = b""
    while client.outbox.size:
        taken += client.outbox.take(2**30)
    return [json.loads(line) for line in taken.splitlines()]


def test_within_a_commit_a_run_is_told_of_once_and_after_all_that_happened_to_it() -> None:
    world, client = prompt_world()
    made = world.create(1, CLIENT, "", "client")
    cancel = Cancel(run_id="run-1", principal=HOST, now_ms=world.clock.now_ms(), reason="no need")
    world.commit([made, world.create(2, CLIENT, "", "client"), cancel])
    told = [message["params"]["run"] for message in messages(world, client)]
    assert [(run["id"], run["status"]) for run in told] == [("run-1", "cancelled"), ("run-2", "created")]


def test_what_changed_nothing_is_not_told() -> None:
    world, client = prompt_world()
    cancel = Cancel(run_id="run-1", principal=HOST, now_ms=world.clock.now_ms(), reason="no need")
    world.commit([world.create(1, CLIENT, "", "client"), cancel])
    assert len(messages(world, client)) == 1
    world.commit([cancel, world.create(1, CLIENT, "", "client")])
    assert messages(world, client) == []


def test_many_deletions_are_one_word_and_what_happens_after_them_is_told_after_it() -> None:
    world, client = prompt_world()
    made = [world.create(n, CLIENT, "", "client") for n in range(5)]
    ended = [Fail(run_id=f"run-{n}", principal=CLIENT, now_ms=world.clock.now_ms(), error="") for n in range(5)]
    world.commit([*made, *ended])
    assert len(messages(world, client)) == 5
    world.commit(["run-0", "run-1", world.create(0, CLIENT, "", "client")])
    first, *then = messages(world, client)
    assert (first["method"], first["params"]) == ("runs.watch.reset", {"reason": DELETED})
    assert [message["params"]["run"]["id"] for message in then] == ["run-0"]
    assert world.counters.watch_resets == 1


def test_live_traces_that_wait_for_a_low_outbox_have_their_turn_though_runs_change_all_the_time() -> None:
    world = World(TIGHT)
    client = world.clients[0]
    world.watch(client, HOST, RunFilters())
    world.come_to_rest()
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        client.outbox.when_low(turn)

    client.outbox.send(b'{"list":-1,"pad":"%b"}' % (b"x" * 3_000))
    client.outbox.when_low(turn)
    for n in range(50):
        world.commit([world.create(n, CLIENT, "", "client" * 100)])
        world.publish()
        world.drain(client, 1)
    assert turns >= 40


def test_a_piece_waits_until_the_outbox_is_low_and_a_watch_that_was_dropped_has_said_its_last_word() -> None:
    for dropped in (False, True):
        world, client = prompt_world()
        world.watchers._settings = HOPELESS
        world.watch(client, HOST, RunFilters())
        world.come_to_rest()
        client.outbox.send(b"x" * (client.outbox.limit // 4))
        waiting = client.outbox.size
        world.commit([world.create(n, CLIENT, "", "client") for n in range(4)])
        world.publish()
        assert client.outbox.size == waiting
        if dropped and client.watch is not None:
            world.watchers.drop(client.watch)
        assert len(client.outbox.take(2**30)) == waiting
        assert (client.outbox.size == 0) == dropped
