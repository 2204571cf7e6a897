"""Any chunks, followers and slow peers, against a model of what each may and must get; and the liveness twin.

Safety: a peer gets what it follows, nothing before the answer nor after the end, each chunk once and a handle's in
their order; what is not sent is counted. Liveness: who reads at once misses nothing.
"""

import json
from collections.abc import Callable
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.toolstream import ToolStreams
from carserver.protocol.errors import RpcError

TIGHT = Settings(stream_events=3, stream_bytes=200, watch_piece_bytes=250, subscriptions=2, outbox_bytes=1_000)
ROOMY = Settings(stream_events=64, subscriptions=4)
AGENT = Principal("agent", "a")
OWNERS = [CLIENT, AGENT, HOST]
Chunk = tuple[str, int]


class Handle:
    """A handle that runs."""

    def __init__(self, name: str, owner: Principal) -> None:
        self.name = name
        self.owner = owner
        self.next = 0


class Peer:
    """A connection: what it follows as the daemon has it, as it knows itself, and what it got."""

    def __init__(self, principal: Principal, limit: int) -> None:
        self.principal = principal
        self.outbox = Outbox(lambda payload: payload + b"\n", limit, lambda: None)
        self.follows: dict[str | None, bool] = {}  # and whether that is answered
        self.known: set[str | None] = set()
        self.wanted: list[Chunk] = []
        self.got: list[Chunk] = []
        self.forgotten = 0


class Steps(RuleBasedStateMachine):
    """Every step of the daemon is a step of the test's."""

    settings: ClassVar[Settings] = TIGHT

    @initialize()
    def begin(self) -> None:
        self.counters = Counters()
        self.calls: list[Callable[[], None]] = []
        self.streams = ToolStreams(lambda _, callback: self.calls.append(callback), self.settings, self.counters)
        self.handles = [Handle(f"h{place}", owner) for place, owner in enumerate([*OWNERS, CLIENT])]
        self.peers = [Peer(principal, self.settings.outbox_bytes) for principal in [*OWNERS, HOST]]
        self.opened = [self.streams.open(peer.outbox, peer.principal) for peer in self.peers]
        self.made = len(self.handles)
        self.skipped_before = 0

    def done(self) -> None:
        """After every step."""

    @rule(place=st.integers(0, 3), which=st.integers(0, 3) | st.none(), answered=st.booleans())
    def follow(self, place: int, which: int | None, answered: bool) -> None:
        peer, stream = self.peers[place], self.opened[place]
        handle = None if which is None else self.handles[which]
        if handle is not None and not peer.principal.sees(handle.owner.name):
            return  # it is not found
        name = None if handle is None else handle.name
        full = len([one for one in peer.follows if one]) >= self.settings.subscriptions
        try:
            is_new = self.streams.follow(stream, name)
        except RpcError:
            assert full
            return
        assert is_new == (name not in peer.follows)
        peer.follows.setdefault(name, False)
        if answered:
            self.answer(place)

    @rule(place=st.integers(0, 3))
    def answer(self, place: int) -> None:
        """All that it asked for."""
        peer = self.peers[place]
        for name, answered in peer.follows.items():
            if not answered:
                peer.outbox.send(json.dumps({"follows": name}).encode())
                self.streams.activate(self.opened[place], name)
                peer.follows[name] = True
        self.done()

    @rule(place=st.integers(0, 3), which=st.integers(0, 3) | st.none())
    def unfollow(self, place: int, which: int | None) -> None:
        peer, stream = self.peers[place], self.opened[place]
        name = None if which is None else self.handles[which].name
        waiting = stream.waiting
        assert self.streams.unfollow(stream, name) == (name in peer.follows)
        peer.follows.pop(name, None)
        peer.forgotten += waiting - stream.waiting
        peer.outbox.send(json.dumps({"unfollows": name}).encode())
        self.done()

    @rule(which=st.integers(0, 3), count=st.integers(1, 6), size=st.sampled_from([1, 60, 300]), last=st.booleans())
    def publish(self, which: int, count: int, size: int, last: bool) -> None:
        handle = self.handles[which]
        for number in range(count):
            is_last = last and number == count - 1
            for peer in self.peers:
                if peer.follows.get(handle.name) or (peer.follows.get(None) and peer.principal.sees(handle.owner.name)):
                    peer.wanted.append((handle.name, handle.next))
                if is_last:
                    peer.follows.pop(handle.name, None)
            chunk = b'"' + b"x" * size + b'"'
            self.streams.publish(handle.name, handle.owner.name, handle.next, chunk, last=is_last)
            handle.next += 1
        if last:
            self.handles[which] = Handle(f"h{self.made}", handle.owner)
            self.made += 1
        self.done()

    @rule()
    def turn(self) -> None:
        calls, self.calls = self.calls, []
        assert len(calls) <= 1, "one call a turn, however much was published"
        for callback in calls:
            callback()

    @rule(place=st.integers(0, 3), size=st.sampled_from([1, 500]))
    def drain(self, place: int, size: int) -> None:
        peer = self.peers[place]
        for line in peer.outbox.take(size).splitlines():
            message = json.loads(line)
            if "follows" in message:
                peer.known.add(message["follows"])
            elif "unfollows" in message:
                peer.known.discard(message["unfollows"])
            else:
                assert message["method"] == "tools.stream.event"
                params = message["params"]
                assert {params["handle"], None} & peer.known, "nothing that it asked for"
                peer.got.append((params["handle"], params["sequence"]))

    @rule(place=st.integers(0, 3))
    def reconnect(self, place: int) -> None:
        """Its connection ends, and another one begins."""
        self.rest_of_turn()
        peer = self.peers[place]
        self.skipped_before += len(peer.wanted) - peer.forgotten - self.taken_or_waiting(place) - len(peer.got)
        self.counters.stream_events -= len(peer.got)
        self.streams.drop(self.opened[place])
        peer.outbox.discard()
        self.peers[place] = Peer(peer.principal, self.settings.outbox_bytes)
        self.opened[place] = self.streams.open(self.peers[place].outbox, peer.principal)

    def taken_or_waiting(self, place: int) -> int:
        """What of a peer's chunks is in its outbox or in its queue."""
        stream, outbox = self.opened[place], self.peers[place].outbox
        return stream.waiting + sum(events for _, sender, events in outbox._queue if sender is stream)

    def rest_of_turn(self) -> None:
        if self.calls:
            self.turn()

    @invariant()
    def nothing_is_out_of_order_or_uncounted(self) -> None:
        for peer in self.peers:
            wanted = iter(peer.wanted)
            assert all(chunk in wanted for chunk in peer.got), "not wanted, twice, or not in its order"
        held = sum(self.taken_or_waiting(place) for place in range(len(self.peers)))
        wanted_by_all = sum(len(peer.wanted) - peer.forgotten for peer in self.peers)
        got = sum(len(peer.got) for peer in self.peers)
        assert wanted_by_all == got + held + self.counters.stream_skips - self.skipped_before
        assert got == self.counters.stream_events

    @invariant()
    def bounds_hold(self) -> None:
        for place, stream in enumerate(self.opened):
            pieces = [frames for frames, sender, _ in self.peers[place].outbox._queue if sender is stream]
            assert len(pieces) <= 1
            assert stream.waiting <= self.settings.stream_events
            assert stream.waiting <= 1 or stream._bytes <= self.settings.stream_bytes
            assert stream._bytes == sum(piece.size for piece, _ in stream._queue)
            assert len(stream.handles) <= self.settings.subscriptions

    def come_to_rest(self) -> None:
        self.rest_of_turn()
        for place, peer in enumerate(self.peers):
            while peer.outbox.size:
                self.drain(place, 1)

    def teardown(self) -> None:
        self.come_to_rest()
        self.nothing_is_out_of_order_or_uncounted()
        assert self.streams.waiting == 0
        for stream in self.opened:
            self.streams.drop(stream)
        assert len(self.streams) == 0
        assert not self.streams._of_handle
        assert not self.streams._of_owner


class PromptSteps(Steps):
    """The liveness twin: with room and peers that read at once nobody misses anything."""

    settings = ROOMY

    def done(self) -> None:
        self.come_to_rest()
        assert self.counters.stream_skips == 0
        for peer in self.peers:
            assert peer.got == peer.wanted


EFFORT = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
Steps.TestCase.settings = EFFORT
PromptSteps.TestCase.settings = settings(EFFORT, max_examples=75)

TestStream = Steps.TestCase
TestPromptStream = PromptSteps.TestCase
