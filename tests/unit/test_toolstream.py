"""The live stream of handles: who gets which chunks, in what pieces, and what is left out."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Raw

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.toolstream import Stream, ToolStreams
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.frames import notification
from carserver.protocol.toolevents import stream_message
from carserver.protocol.tools import TextChunk, ToolStreamEvent

AGENT = Principal("agent", "a")
ONE, TWO = "1" * 32, "2" * 32


def framed(payload: bytes) -> bytes:
    return payload + b"\n"


class World:
    """The streams, and a loop that turns when it is told to."""

    def __init__(self, **settings: Any) -> None:
        self.counters = Counters()
        self.settings = Settings(**settings)
        self.calls: list[Callable[[], None]] = []
        self.streams = ToolStreams(self._call_later, self.settings, self.counters)

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        assert delay_s == 0
        self.calls.append(callback)

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for callback in calls:
            callback()

    def publish(self, handle: str, sequence: int, text: str = "", owner: str = "client", *, last: bool = False) -> None:
        chunk = json.dumps({"kind": "text", "text": text}, separators=(",", ":")).encode()
        self.streams.publish(handle, owner, sequence, chunk, last=last)

    def peer(self, principal: Principal, *handles: str | None, limit: int = 1_000_000) -> "Peer":
        peer = Peer(self, principal, limit)
        for handle in handles:
            peer.follow(handle)
        return peer


class Peer:
    """A connection that follows."""

    def __init__(self, world: World, principal: Principal, limit: int) -> None:
        self.world = world
        self.outbox = Outbox(framed, limit, lambda: None)
        self.stream: Stream = world.streams.open(self.outbox, principal)

    def follow(self, handle: str | None) -> None:
        self.world.streams.follow(self.stream, handle)
        self.world.streams.activate(self.stream, handle)

    def unfollow(self, handle: str | None) -> bool:
        return self.world.streams.unfollow(self.stream, handle)

    def read(self) -> list[tuple[str, int]]:
        """What arrives, with the turns of the loop that it takes."""
        arrived: list[dict[str, Any]] = []
        self.world.turn()
        while taken := self.outbox.take(1):
            arrived += map(json.loads, taken.splitlines())
            self.world.turn()
        assert all(message["method"] == "tools.stream.event" for message in arrived)
        return [(message["params"]["handle"], message["params"]["sequence"]) for message in arrived]


@pytest.fixture
def world() -> World:
    return World()


def test_the_message_is_what_its_type_says() -> None:
    chunk = TextChunk(text="é\n")
    event = ToolStreamEvent(handle=ONE, chunk=chunk, sequence=7)
    raw = Raw('{"kind":"text","text":"é\\n"}'.encode())
    assert stream_message(ONE, bytes(raw), 7) == notification("tools.stream.event", event)


def test_who_follows_a_handle_gets_its_chunks_and_no_others(world: World) -> None:
    peer = world.peer(CLIENT, ONE)
    world.publish(ONE, 0)
    world.publish(TWO, 0)
    world.publish(ONE, 1)
    assert peer.read() == [(ONE, 0), (ONE, 1)]
    assert world.counters.stream_events == 2


def test_who_follows_all_gets_what_is_its_own_and_the_host_everything(world: World) -> None:
    client, agent, host = world.peer(CLIENT, None), world.peer(AGENT, None), world.peer(HOST, None)
    world.publish(ONE, 0)
    world.publish(TWO, 0, owner="agent:a")
    assert client.read() == [(ONE, 0)]
    assert agent.read() == [(TWO, 0)]
    assert host.read() == [(ONE, 0), (TWO, 0)]


def test_a_chunk_comes_once_however_often_it_was_asked_for(world: World) -> None:
    peer, host = world.peer(CLIENT, ONE, None, ONE, None), world.peer(HOST, None, ONE)
    world.publish(ONE, 0)
    world.publish(ONE, 0, owner="host")
    assert peer.read() == [(ONE, 0), (ONE, 0)]
    assert host.read() == [(ONE, 0), (ONE, 0)]


def test_nothing_is_sent_before_the_answer(world: World) -> None:
    peer = world.peer(CLIENT)
    world.streams.follow(peer.stream, ONE)
    world.streams.follow(peer.stream, None)
    world.publish(ONE, 0)
    assert peer.read() == []
    world.streams.activate(peer.stream, None)
    world.publish(ONE, 1)
    assert peer.read() == [(ONE, 1)]


def test_what_a_turn_of_the_loop_made_leaves_together(world: World) -> None:
    peer = world.peer(CLIENT, ONE)
    for sequence in range(10):
        world.publish(ONE, sequence)
    assert peer.outbox.size == 0
    assert len(world.calls) == 1
    world.turn()
    assert len(peer.outbox.take(1).splitlines()) == 10


def test_a_chunk_is_framed_once_for_all_who_get_it(world: World) -> None:
    peers = [world.peer(CLIENT, ONE) for _ in range(3)]
    world.publish(ONE, 0)
    world.turn()
    first, *others = [peer.outbox.take(1) for peer in peers]
    assert all(other is first for other in others)


def test_nobody_who_listens_costs_nothing(world: World) -> None:
    world.peer(CLIENT)
    world.publish(ONE, 0)
    peer = world.peer(CLIENT, TWO)
    world.publish(ONE, 1)
    assert not world.calls
    assert peer.read() == []


def test_a_handle_is_followed_no_more_after_its_last_chunk() -> None:
    world = World(subscriptions=1)
    peer = world.peer(CLIENT, ONE)
    with pytest.raises(RpcError) as refusal:
        world.streams.follow(peer.stream, TWO)
    assert refusal.value.kind is ErrorKind.LIMIT_EXCEEDED
    assert refusal.value.data["limit"] == "subscriptions"
    peer.follow(ONE)
    peer.follow(None)
    world.publish(ONE, 0, last=True)
    peer.follow(TWO)
    assert peer.read() == [(ONE, 0)]
    assert not peer.unfollow(ONE)


def test_a_last_chunk_that_comes_before_the_answer_leaves_nothing_behind(world: World) -> None:
    peer = world.peer(CLIENT)
    world.streams.follow(peer.stream, ONE)
    world.publish(ONE, 0, last=True)
    world.streams.activate(peer.stream, ONE)
    assert peer.read() == []
    assert not peer.stream.handles
    assert not world.streams._of_handle


def test_the_end_of_following_is_told_once_and_what_waits_is_not_sent(world: World) -> None:
    peer = world.peer(CLIENT, ONE, TWO)
    world.publish(ONE, 0)
    world.publish(TWO, 0)
    assert peer.unfollow(ONE)
    assert not peer.unfollow(ONE)
    assert not peer.unfollow(None)
    world.publish(ONE, 1)
    assert peer.read() == [(TWO, 0)]


def test_each_way_of_following_ends_by_itself(world: World) -> None:
    peer = world.peer(CLIENT, ONE, None)
    world.publish(ONE, 0, last=True)
    world.publish(TWO, 0)
    assert peer.unfollow(None)
    assert peer.read() == [(ONE, 0)]
    peer = world.peer(CLIENT, ONE, None)
    world.publish(ONE, 0)
    assert peer.unfollow(ONE)
    world.publish(ONE, 1)
    assert peer.read() == [(ONE, 0), (ONE, 1)]
    world.publish(ONE, 2)
    assert peer.unfollow(None)
    assert peer.read() == []


@pytest.mark.parametrize("bound", [{"stream_events": 4}, {"stream_bytes": 4 * 28}])
def test_who_does_not_read_keeps_the_newest_and_the_others_are_counted(bound: dict[str, int]) -> None:
    world = World(**bound)
    peer = world.peer(CLIENT, ONE, limit=200)
    for sequence in range(20):
        world.publish(ONE, sequence, "x")
        world.turn()
    assert world.streams.waiting == 4
    got = peer.read()
    assert got == [(ONE, 0), (ONE, 16), (ONE, 17), (ONE, 18), (ONE, 19)]
    assert world.counters.stream_skips == 15
    assert world.counters.stream_events == 5


def test_one_chunk_that_is_larger_than_the_bound_comes() -> None:
    world = World(stream_bytes=10)
    peer = world.peer(CLIENT, ONE)
    world.publish(ONE, 0, "x" * 100)
    assert peer.read() == [(ONE, 0)]


def test_a_burst_of_one_turn_may_use_the_outbox_before_anything_is_left_out() -> None:
    world = World(stream_events=4)
    peer = world.peer(CLIENT, ONE)
    for sequence in range(9):
        world.publish(ONE, sequence)
    assert peer.read() == [(ONE, sequence) for sequence in range(9)]
    assert world.counters.stream_skips == 0


def test_at_most_one_piece_is_in_the_outbox() -> None:
    world = World(watch_piece_bytes=300)
    peer = world.peer(CLIENT, ONE)
    for sequence in range(100):
        world.publish(ONE, sequence, "x")
    world.turn()
    assert 300 <= peer.outbox.size < 600
    assert peer.read() == [(ONE, sequence) for sequence in range(100)]


def test_it_waits_where_the_outbox_is_not_low() -> None:
    world = World()
    peer = world.peer(CLIENT, ONE, limit=400)
    peer.outbox.put(b"x" * 101)
    world.publish(ONE, 0)
    world.turn()
    assert peer.outbox.size == 101
    peer.outbox.take(1)
    assert peer.read() == [(ONE, 0)]


def test_what_was_dropped_gets_nothing_and_is_forgotten(world: World) -> None:
    peer = world.peer(CLIENT, ONE, TWO, None)
    world.publish(ONE, 0)
    world.streams.drop(peer.stream)
    world.streams.drop(peer.stream)
    world.publish(TWO, 0)
    assert peer.read() == []
    assert len(world.streams) == 0
    assert world.streams.waiting == 0
    assert not world.streams._of_handle
    assert not world.streams._of_owner
