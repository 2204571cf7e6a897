"""Any events, followers, slow peers and leaving sessions, against a model; and the liveness twin.

Safety: a peer gets no event twice, none out of its order, none from before the state that it was answered; what it
does not get is counted. Liveness: who reads at once misses nothing.
"""

from typing import Any, ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from carserver.core.hostboard import Seat
from carserver.protocol.errors import RpcError
from tests.unit.boarding import Peer, World, agent

PEERS = 3
PLACES = st.integers(0, PEERS - 1)
TIGHT = {"stream_events": 3, "stream_bytes": 600, "watch_piece_bytes": 250, "board_entries": 2, "board_events": 4}
ROOMY: dict[str, int] = {}


class Follower(Peer):
    """A peer, where it began, and what it got."""

    def __init__(self, world: World, limit: int) -> None:
        super().__init__(world, limit=limit, held=True)
        self.begin = world.board.sequence
        self.got: list[int] = []

    def take(self) -> list[dict[str, Any]]:
        taken = super().take()
        self.got += [event["sequence"] for event in taken]
        return taken


class Steps(RuleBasedStateMachine):
    """Every step of the daemon is a step of the test's."""

    settings: ClassVar[dict[str, int]] = TIGHT
    limit: ClassVar[int] = 1_000

    @initialize()
    def begin(self) -> None:
        self.world = World(**self.settings)
        self.peers = [Follower(self.world, self.limit) for _ in range(PEERS)]
        self.seats = [Seat(str(place)) for place in range(PEERS)]
        self.skipped_before = 0  # by those who are gone, or that were in their queues
        self.got_before = 0

    def done(self) -> None:
        """After every step."""

    @rule(count=st.integers(1, 6), size=st.sampled_from([1, 100, 700]))
    def publish(self, count: int, size: int) -> None:
        for _ in range(count):
            self.world.publish("x" * size)
        self.done()

    @rule(place=PLACES, name=st.sampled_from("abc"))
    def register(self, place: int, name: str) -> None:
        board, seat = self.world.board, self.seats[place]
        there = board.agents.get(name)
        refused = (there is not None and there.seat is not seat) or (
            there is None and len(seat) >= self.world.settings.board_entries
        )
        before = board.sequence
        try:
            board.register_agent(seat, agent(name))
        except RpcError:
            assert refused
        else:
            assert not refused
        assert board.sequence == before + (not refused)
        self.done()

    @rule(place=PLACES)
    def leave(self, place: int) -> None:
        seat, before = self.seats[place], self.world.board.sequence
        count = len(seat)
        self.world.board.leave(seat, "gone")
        self.seats[place] = Seat("new")
        assert self.world.board.sequence == before + count
        self.done()

    @rule(place=PLACES)
    def answer(self, place: int) -> None:
        self.peers[place].follower.release()
        self.done()

    @rule()
    def turn(self) -> None:
        assert len(self.world.clock.calls) <= 1, "one call a turn, however much was published"
        self.world.clock.turn()

    @rule(place=PLACES)
    def drain(self, place: int) -> None:
        self.peers[place].take()

    @rule(place=PLACES)
    def reconnect(self, place: int) -> None:
        peer = self.peers[place]
        self.got_before += len(peer.got)
        self.skipped_before += self.world.board.sequence - peer.begin - len(peer.got) - self.held(peer)
        self.world.board.unfollow(peer.follower)
        peer.outbox.discard()
        self.peers[place] = Follower(self.world, self.limit)

    def held(self, peer: Follower) -> int:
        """What of a peer's events is in its outbox or in its queue."""
        sent = sum(events for _, sender, events in peer.outbox._queue if sender is peer.follower)
        return peer.follower.waiting + sent

    @invariant()
    def nothing_is_repeated_out_of_order_or_uncounted(self) -> None:
        wanted = got = held = 0
        for peer in self.peers:
            assert peer.got == sorted(set(peer.got)), "twice, or not in order"
            assert not peer.got or peer.begin < peer.got[0] <= peer.got[-1] <= self.world.board.sequence
            wanted += self.world.board.sequence - peer.begin
            got += len(peer.got)
            held += self.held(peer)
        assert wanted == got + held + self.world.counters.host_event_skips - self.skipped_before
        assert got + self.got_before == self.world.counters.host_events_delivered

    @invariant()
    def bounds_hold_and_sums_are_right(self) -> None:
        board, settings = self.world.board, self.world.settings
        for peer in self.peers:
            assert peer.follower.waiting <= settings.stream_events
            assert peer.follower.waiting <= 1 or peer.follower._bytes <= settings.stream_bytes
        assert len(self.world.events) == min(board.sequence, settings.board_events)
        assert board.bytes == sum(len(entry.listed) for entry in board.agents.values())
        assert {name: entry.seat for name, entry in board.agents.items()} == {
            name: seat for seat in self.seats for name in seat.agents
        }

    def come_to_rest(self) -> None:
        for peer in self.peers:
            peer.read()

    def teardown(self) -> None:
        for peer in self.peers:
            peer.follower.release()
        self.come_to_rest()
        self.nothing_is_repeated_out_of_order_or_uncounted()
        assert self.world.board.waiting == 0
        if self.world.board.sequence:
            assert all(peer.got[-1:] in ([self.world.board.sequence], []) for peer in self.peers)


class PromptSteps(Steps):
    """The liveness twin: with room and peers that read at once nobody misses anything."""

    settings = ROOMY
    limit = 1_000_000

    def done(self) -> None:
        self.come_to_rest()
        assert self.world.counters.host_event_skips == 0
        for peer in self.peers:
            if not peer.follower.held:
                assert peer.got == list(range(peer.begin + 1, self.world.board.sequence + 1))


EFFORT = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
Steps.TestCase.settings = EFFORT
PromptSteps.TestCase.settings = settings(EFFORT, max_examples=50)

TestBoard = Steps.TestCase
TestPromptBoard = PromptSteps.TestCase
