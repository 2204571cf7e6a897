"""The host board: what sessions have registered there, its events, and who follows them."""

import json
from typing import Any

import pytest
from msgspec import UNSET, Raw
from msgspec.structs import replace

from carserver.core.hostboard import GONE, Seat
from carserver.protocol.errors import ErrorKind, RpcError
from tests.unit.boarding import Peer, World, agent, device


@pytest.fixture
def world() -> World:
    return World()


def refusal(call: Any, *args: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        call(*args)
    return caught.value


def ids(listed: bytes) -> list[str]:
    return [entry["id"] for entry in json.loads(listed)]


# What is registered.


def test_what_a_session_registered_is_listed_in_the_order_of_its_coming_until_it_leaves(world: World) -> None:
    board, one, other = world.board, Seat("one"), Seat("other")
    board.register_agent(one, agent("b"))
    board.register_agent(other, agent("a"))
    board.register_device(one, device("b"))
    assert (ids(board.list_agents()), ids(board.list_devices())) == (["b", "a"], ["b"])
    board.leave(one, GONE)
    board.leave(one, GONE)
    assert (ids(board.list_agents()), ids(board.list_devices())) == (["a"], [])
    board.leave(other, "this connection acts as host now")
    assert (board.bytes, len(one), len(other)) == (0, 0, 0)
    told = [(event["kind"], event["agent_id"], event["message"]) for event in world.events[3:]]
    assert told == [
        ("agent.unregistered", "b", f"agent 'n' is gone: {GONE}"),
        ("device.unregistered", None, f"device 'd' is gone: {GONE}"),
        ("agent.unregistered", "a", "agent 'n' is gone: this connection acts as host now"),
    ]


def test_an_id_that_another_session_has_is_taken_and_ones_own_is_replaced(world: World) -> None:
    board, one, other = world.board, Seat("one"), Seat("other")
    board.register_agent(one, agent("a"))
    error = refusal(board.register_agent, other, agent("a"))
    assert (error.kind, error.data["reason"]) == (ErrorKind.CONFLICT, "name_taken")
    board.register_device(other, device("a"))  # of another kind
    board.register_agent(one, agent("a", "longer name"))
    (listed,) = json.loads(board.list_agents())
    assert listed["name"] == "longer name"
    assert board.bytes == len(board.list_agents()) + len(board.list_devices()) - 4
    board.leave(one, GONE)
    board.register_agent(other, agent("a"))


def test_only_the_session_that_registered_something_changes_it(world: World) -> None:
    board, one, other = world.board, Seat("one"), Seat("other")
    board.register_agent(one, agent("a"))
    board.register_device(one, device("d"))
    for call, id_ in ((board.own_agent, "a"), (board.own_device, "d"), (board.unregister_agent, "a")):
        assert refusal(call, other, id_).kind is ErrorKind.FORBIDDEN
        assert refusal(call, one, "x").kind is ErrorKind.NOT_FOUND
    assert board.own_agent(one, "a").id == "a"
    board.unregister_agent(one, "a")
    assert refusal(board.own_agent, one, "a").kind is ErrorKind.NOT_FOUND
    assert world.events[-1]["message"] == "agent 'n' is gone: it was unregistered"


def test_a_changed_status_is_told_with_the_whole_agent_and_what_was_given(world: World) -> None:
    board, seat = world.board, Seat("one")
    board.register_agent(seat, agent("a"))
    running = replace(agent("a"), status="running", current_task="t")
    board.set_status(seat, running, Raw(b'{"x":1}'))
    first = world.events[-1]
    assert (first["kind"], first["agent_id"], first["message"]) == ("agent.status_changed", "a", "agent 'n' is running")
    assert first["payload"] == {**json.loads(board.list_agents())[0], "payload": {"x": 1}}
    board.set_status(seat, replace(running, message="half done"), UNSET)
    second = world.events[-1]
    assert (second["message"], "payload" in second["payload"]) == ("half done", False)
    assert board.bytes == len(board.list_agents()) - 2


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        ("board_entries", {"board_entries": 2}),
        ("board_all_entries", {"board_all_entries": 2}),
        ("board_bytes", {"board_bytes": 300}),
    ],
)
def test_beyond_a_bound_nothing_is_registered_and_what_is_may_be_replaced(limit: str, settings: Any) -> None:
    world = World(**settings)
    board, seat = world.board, Seat("one")
    board.register_agent(seat, agent("a"))
    board.register_device(seat, device("b"))
    large = agent("c", metadata=b'"%b"' % (b"x" * 100))
    error = refusal(board.register_agent, seat, large)
    assert (error.kind, error.data["limit"]) == (ErrorKind.LIMIT_EXCEEDED, limit)
    assert (ids(board.list_agents()), len(seat), board.sequence) == (["a"], 2, 2)
    board.register_agent(seat, agent("a", "m"))
    if limit == "board_bytes":
        assert refusal(board.register_agent, seat, replace(large, id="a")).data["limit"] == limit
        assert json.loads(board.list_agents())[0]["name"] == "m"
    board.unregister_agent(seat, "a")
    board.register_agent(seat, agent("c"))


def test_the_bound_of_one_session_is_not_anothers() -> None:
    board = World(board_entries=1).board
    board.register_agent(Seat("one"), agent("a"))
    board.register_agent(Seat("other"), agent("b"))
    assert ids(board.list_agents()) == ["a", "b"]


# Events.


def test_events_are_numbered_from_one_and_the_newest_are_kept() -> None:
    world = World(board_events=3)
    assert json.loads(world.board.list_events(10)) == []
    for _ in range(5):
        world.publish()
    assert [event["sequence"] for event in world.events] == [3, 4, 5]
    assert [event["sequence"] for event in json.loads(world.board.list_events(2))] == [4, 5]
    assert len({event["id"] for event in world.events}) == 3
    assert world.board.sequence == world.counters.host_events == 5


def test_events_are_kept_by_their_bytes_and_one_larger_is_kept_alone() -> None:
    world = World(board_events_bytes=1_000)
    for _ in range(20):
        world.publish()
    assert 0 < len(world.board.list_events(100)) <= 1_000 + len(world.events) + 1
    assert world.events[-1]["sequence"] == 20
    world.publish("x" * 2_000)
    assert [event["sequence"] for event in world.events] == [21]


def test_who_follows_gets_every_event_from_the_next_one_on(world: World) -> None:
    world.publish()
    first = Peer(world)
    world.publish()
    second = Peer(world)
    world.publish()
    assert first.sequences() == [2, 3]
    assert second.sequences() == [3]
    assert world.counters.host_events_delivered == 3


def test_nothing_is_sent_before_the_state_that_it_follows_on_and_nothing_of_it_is_missing(world: World) -> None:
    peer = Peer(world, held=True)
    for _ in range(3):
        world.publish()
    assert peer.sequences() == []
    peer.follower.release()
    assert peer.sequences() == [1, 2, 3]


def test_an_event_is_framed_once_for_all_who_follow(world: World) -> None:
    first, second = Peer(world), Peer(world)
    world.publish()
    world.clock.turn()
    assert first.outbox.take(1) is second.outbox.take(1)


def test_a_peer_that_does_not_read_misses_the_oldest_and_they_are_counted() -> None:
    world = World(stream_events=4)
    slow, prompt = Peer(world), Peer(world)
    read = []
    for _ in range(20):
        world.publish()
        world.clock.turn()
        read += prompt.sequences()
    assert world.board.waiting == 4
    assert slow.sequences() == [1, 17, 18, 19, 20]
    assert read == list(range(1, 21))
    assert world.counters.host_event_skips == 15


def test_who_does_not_follow_any_more_gets_nothing(world: World) -> None:
    peer = Peer(world)
    world.publish()
    world.board.unfollow(peer.follower)
    world.board.unfollow(peer.follower)
    world.publish()
    assert peer.sequences() == []
    assert (world.board.followers, world.board.waiting) == (0, 0)
