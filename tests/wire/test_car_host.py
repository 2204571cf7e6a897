"""`host.*` by raw peers: the board, its events, approvals that survive, and every bound."""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from carserver.core.principals import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.lines import unix_peer
from tests.peer import Peer, Refused, peer
from tests.rawpeer import raw_peer

HANDSHAKE = {"protocol_version": 3}
AGENT = {"id": "builder", "name": "Builder", "kind": "coder"}
LARGE = "x" * (64 * 1024)
DEEP: list[Any] = []
for _ in range(48):
    DEEP = [DEEP]


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a Unix socket may be: its name must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "socket"


@contextlib.asynccontextmanager
async def car(daemon: Daemon, token: str = "auth-token") -> AsyncIterator[Peer]:
    """A connection that speaks the dialect."""
    async with peer(daemon, token) as connection:
        await connection.call("server.handshake", HANDSHAKE)
        yield connection


def agent(daemon: Daemon, name: str) -> str:
    """An agent's token."""
    return agent_token(daemon.token("agent-key"), name)


async def refused(connection: Peer, method: str, params: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        await connection.call(method, params)
    return caught.value


async def told(connection: Peer, count: int) -> list[dict[str, Any]]:
    """The next events."""
    return [await connection.next("host.event") for _ in range(count)]


# The board.


async def test_who_subscribes_gets_the_board_and_then_every_event(daemon: Daemon) -> None:
    async with car(daemon) as one, car(daemon, "host-token") as watcher:
        registered = await one.call("host.register_agent", AGENT | {"metadata": {"a": 1}, "pid": 7, "unknown": 1})
        who = await one.call("session.auth", {"token": daemon.token()})
        assert registered == registered | AGENT | {"capabilities": [], "status": "idle", "metadata": {"a": 1}, "pid": 7}
        assert registered["session_id"] == who["client_id"]
        state = await watcher.call("host.subscribe", {})
        assert state["subscribed"] is True
        assert (state["agents"], state["devices"], state["approvals"], state["pending_signins"]) == (
            *([registered], [], [], []),
        )
        assert [event["kind"] for event in state["events"]] == ["agent.registered"]
        assert state["event_sequence"] == state["events"][-1]["sequence"] == 1
        assert state["identity"]["pid"] == daemon.pid
        changed = {"agent_id": "builder", "status": "running", "current_task": "t", "payload": [1]}
        status = await one.call("host.set_status", changed)
        notified = await one.call("host.notify", {"message": "m", "agent_id": "elsewhere", "payload": {"x": None}})
        custom = await one.call("host.notify", {"kind": "a.word"})
        device = await one.call("host.register_device", {"id": "phone", "capabilities": ["c"]})
        await one.call("host.update_device", {"id": "phone", "device_id": "phone", "status": "on"})
        assert await one.call("host.unregister_agent", {"agent_id": "builder"}) == {"ok": True}
        events = await told(watcher, 6)
        assert [event["sequence"] for event in events] == [2, 3, 4, 5, 6, 7]
        assert [event["kind"] for event in events] == [
            *("agent.status_changed", "notification", "a.word"),
            *("device.registered", "device.updated", "agent.unregistered"),
        ]
        assert events[0]["payload"] == status | {"payload": [1]}
        assert (status["status"], status["current_task"]) == ("running", "t")
        assert events[1] == notified
        assert (notified["message"], notified["agent_id"], notified["payload"]) == ("m", "elsewhere", {"x": None})
        assert events[2] == custom
        assert events[3]["payload"] == device
        assert (device["name"], device["kind"], events[4]["payload"]["status"]) == ("phone", "device", "on")
        assert (await one.call("host.events", {"limit": 6}))["events"] == events
        assert await one.call("host.devices") == [events[4]["payload"]]


async def test_calls_without_a_handshake_are_served_too(daemon: Daemon) -> None:
    async with peer(daemon) as one:
        await one.call("host.register_agent", AGENT)
        assert [entry["id"] for entry in await one.call("host.agents")] == ["builder"]
        assert (await one.call("host.subscribe"))["event_sequence"] == 1


async def test_what_a_session_registered_only_that_one_changes_and_it_goes_with_it(daemon: Daemon) -> None:
    async with car(daemon) as watcher:
        await watcher.call("host.subscribe", {})
        async with car(daemon) as one, car(daemon) as other:
            await one.call("host.register_agent", AGENT)
            await one.call("host.register_agent", AGENT | {"name": "Again"})
            await one.call("host.register_device", {"id": "phone", "name": "Phone"})
            error = await refused(other, "host.register_agent", AGENT)
            assert (error.type, error.data["reason"]) == ("conflict", "name_taken")
            for method, params in (
                ("host.set_status", {"agent_id": "builder", "status": "stopped"}),
                ("host.unregister_agent", {"agent_id": "builder"}),
                ("host.update_device", {"device_id": "phone", "name": "Mine"}),
            ):
                assert (await refused(other, method, params)).type == "forbidden"
                unknown = {**params, next(iter(params)): "unknown"}
                assert (await refused(other, method, unknown)).type == "not_found"
            assert len(await told(watcher, 3)) == 3
        gone = await told(watcher, 2)
        assert [(event["kind"], event["sequence"]) for event in gone] == [
            ("agent.unregistered", 4),
            ("device.unregistered", 5),
        ]
        assert gone[0]["message"] == "agent 'Again' is gone: its session has ended"
        assert (await watcher.call("host.agents"), await watcher.call("host.devices")) == ([], [])
        await watcher.call("host.register_agent", AGENT)


async def test_who_acts_as_another_from_now_on_leaves_what_it_registered_and_goes_on_following(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(unix=path)
    async with unix_peer(path) as one:
        await one.call("host.subscribe", {})
        await one.call("host.register_agent", AGENT)
        asked = await one.call("host.request_approval", {"action": "a"})
        await one.call("session.auth", {"token": agent(daemon, "a")})
        assert await one.call("host.agents") == []
        answer = {"approval_id": asked["id"], "resolution": "deny"}
        assert (await refused(one, "host.resolve_approval", answer)).type == "forbidden"
        await one.call("host.register_agent", AGENT)
        events = await told(one, 4)
        assert [event["kind"] for event in events] == [
            *("agent.registered", "approval.requested", "agent.unregistered", "agent.registered"),
        ]
        assert events[2]["message"] == "agent 'Builder' is gone: this connection acts as agent:a now"


async def test_in_a_batch_what_follows_the_state_comes_after_the_reply_and_nothing_is_missing(daemon: Daemon) -> None:
    calls = [("host.notify", {"message": "1"}), ("host.subscribe", {}), ("host.notify", {"message": "2"})]
    batch = [{"jsonrpc": "2.0", "id": n, "method": name, "params": params} for n, (name, params) in enumerate(calls)]
    async with peer(daemon) as one:
        replies = await one.raw(json.dumps(batch))
        (state,) = [reply["result"] for reply in replies if reply["id"] == 1]
        assert state["event_sequence"] == 1
        (event,) = await told(one, 1)
        assert (event["sequence"], event["message"]) == (2, "2")


async def test_who_subscribes_again_is_not_told_what_the_new_state_has(daemon: Daemon) -> None:
    calls = [("host.notify", {"message": "1"}), ("host.subscribe", {}), ("host.notify", {"message": "2"})]
    batch = [{"jsonrpc": "2.0", "id": n, "method": name, "params": params} for n, (name, params) in enumerate(calls)]
    async with peer(daemon) as one:
        await one.call("host.subscribe", {})
        for first in (1, 3):
            replies = await one.raw(json.dumps(batch))
            (state,) = [reply["result"] for reply in replies if reply["id"] == 1]
            assert (state["event_sequence"], state["events"][-1]["sequence"]) == (first, first)
            (event,) = await told(one, 1)
            assert (event["sequence"], event["message"]) == (first + 1, "2")


# Approvals.


async def test_an_approval_is_asked_for_told_resolved_and_told(daemon: Daemon) -> None:
    async with car(daemon, agent(daemon, "a")) as one, car(daemon, "host-token") as watcher:
        await watcher.call("host.subscribe", {})
        params = {"action": "deploy", "agent_id": "x", "details": {"to": "production"}}
        asked = await one.call("host.request_approval", params)
        assert asked == asked | params | {"status": "pending", "options": ["approve", "deny"], "system_level": False}
        (event,) = await told(watcher, 1)
        assert (event["kind"], event["payload"], event["agent_id"]) == ("approval.requested", asked, "x")
        assert (await watcher.call("host.approvals", {})) == {"approvals": [asked]}
        assert (await watcher.call("host.subscribe"))["approvals"] == [asked]
        answer = {"approval_id": asked["id"], "resolution": "approve"}
        resolved = await watcher.call("host.resolve_approval", answer)
        assert resolved == asked | {
            "status": "resolved",
            "resolution": "approve",
            "resolved_by": "host",
            "resolved_at": resolved["resolved_at"],
        }
        (event,) = await told(watcher, 1)
        assert (event["kind"], event["payload"]) == ("approval.resolved", resolved)
        assert await watcher.call("host.resolve_approval", answer) == resolved
        assert (await one.call("host.approvals")) == {"approvals": []}
        assert (await one.call("host.approvals", {"all": True})) == {"approvals": [resolved]}
        assert (await watcher.call("host.notify", {}))["sequence"] == 3


async def test_who_may_resolve_and_with_what_words(daemon: Daemon) -> None:
    async with car(daemon) as other, car(daemon, agent(daemon, "a")) as stranger:
        async with car(daemon) as one:
            asked = await one.call("host.request_approval", {"action": "do", "options": ["yes"]})
            system = await one.call("host.request_approval", {"action": "do", "system_level": True})
            answer = {"approval_id": asked["id"], "resolution": "yes"}
            for connection in (other, stranger):
                assert (await refused(connection, "host.resolve_approval", answer)).type == "forbidden"
            error = await refused(one, "host.resolve_approval", answer | {"resolution": "approve"})
            assert (error.type, error.data["path"]) == ("invalid_params", "resolution")
            by_all = {"approval_id": system["id"], "resolution": "deny"}
            assert (await stranger.call("host.resolve_approval", by_all))["resolved_by"] == "agent:a"
            error = await refused(one, "host.resolve_approval", by_all | {"resolution": "approve"})
            assert (error.type, error.data["reason"]) == ("conflict", "resolved")
            unknown = answer | {"approval_id": "unknown"}
            assert (await refused(one, "host.resolve_approval", unknown)).type == "not_found"
            await one.call("host.register_agent", AGENT)
        while await other.call("host.agents"):  # until its session's end is heard
            pass
        assert (await refused(stranger, "host.resolve_approval", answer)).type == "forbidden"
        assert (await other.call("host.resolve_approval", answer))["resolved_by"] == "client"


@pytest.mark.parametrize("way", ["kill", "terminate"])
async def test_approvals_survive_a_restart_and_events_begin_anew(daemon: Daemon, way: str) -> None:
    async with car(daemon) as one:
        first, second = [await one.call("host.request_approval", {"action": action}) for action in ("1", "2")]
        resolved = await one.call("host.resolve_approval", {"approval_id": first["id"], "resolution": "deny"})
        if way == "kill":
            daemon.kill()
    if way == "terminate":
        assert daemon.terminate() == 0
    daemon.start()
    async with car(daemon) as one:
        state = await one.call("host.subscribe")
        assert (state["approvals"], state["events"], state["event_sequence"]) == ([second], [], 0)
        assert (await one.call("host.approvals", {"all": True}))["approvals"] == [resolved, second]
        await one.call("host.resolve_approval", {"approval_id": second["id"], "resolution": "approve"})
        (event,) = await told(one, 1)
        assert (event["kind"], event["sequence"]) == ("approval.resolved", 1)


# Bounds.


@pytest.mark.parametrize(
    ("method", "params", "limit"),
    [
        ("host.register_agent", AGENT | {"metadata": LARGE}, "metadata_bytes"),
        ("host.register_agent", AGENT | {"display": {"x": LARGE}}, "metadata_bytes"),
        ("host.register_agent", AGENT | {"display": DEEP}, "value_nesting"),
        ("host.register_agent", AGENT | {"capabilities": ["x" * 257]}, "name_chars"),
        ("host.register_agent", AGENT | {"capabilities": ["x" * 250] * 300}, "metadata_bytes"),
        ("host.register_agent", AGENT | {"name": "x" * 257}, "name_chars"),
        ("host.register_device", {"metadata": LARGE}, "metadata_bytes"),
        ("host.register_device", {"status": "x" * 257}, "name_chars"),
        ("host.notify", {"payload": LARGE}, "metadata_bytes"),
        ("host.notify", {"payload": DEEP}, "value_nesting"),
        ("host.notify", {"message": "x" * 16_385}, "board_text_bytes"),
        ("host.notify", {"kind": "x" * 257}, "name_chars"),
        ("host.request_approval", {"action": "x" * 16_385}, "board_text_bytes"),
        ("host.request_approval", {"action": "x", "details": LARGE}, "metadata_bytes"),
        ("host.request_approval", {"action": "x", "details": DEEP}, "value_nesting"),
        ("host.request_approval", {"action": "x", "options": LARGE}, "metadata_bytes"),
        ("host.request_approval", {"action": "x", "options": ["x" * 257]}, "name_chars"),
        ("host.resolve_approval", {"approval_id": "x", "resolution": "x" * 257}, "name_chars"),
        ("host.events", {"limit": 1_001}, "board_events"),
    ],
)
async def test_each_bound_of_a_value_is_announced(served: Daemon, method: str, params: Any, limit: str) -> None:
    async with car(served) as one:
        error = await refused(one, method, params)
        assert (error.type, error.data["limit"]) == ("limit_exceeded", limit)


@pytest.mark.parametrize(
    ("method", "params", "path"),
    [
        ("host.register_agent", {"name": "n"}, ""),
        ("host.register_agent", AGENT | {"id": ""}, "id"),
        ("host.register_agent", AGENT | {"id": "a\n"}, "id"),
        ("host.register_agent", AGENT | {"capabilities": "c"}, "capabilities"),
        ("host.set_status", {"agent_id": "builder", "status": "asleep"}, "status"),
        ("host.update_device", {"name": "n"}, "id"),
        ("host.update_device", {"id": "a", "device_id": "b"}, "device_id"),
        ("host.notify", {"kind": "approval.resolved"}, "kind"),
        ("host.notify", {"agent_id": ""}, "agent_id"),
        ("host.request_approval", {"action": ""}, "action"),
        ("host.request_approval", {"action": "a", "options": ["a", ""]}, "options[1]"),
        ("host.events", {"limit": 0}, "limit"),
    ],
)
async def test_what_is_wrong_is_named(served: Daemon, method: str, params: Any, path: str) -> None:
    async with car(served) as one:
        error = await refused(one, method, params)
        assert (error.type, error.data["path"]) == ("invalid_params", path)


async def test_each_bound_of_a_number_is_announced_and_room_is_used_again(start: StartDaemon) -> None:
    daemon = start(board_entries=2, board_all_entries=3, approvals=1)
    async with car(daemon) as one, car(daemon) as other:
        await one.call("host.register_agent", AGENT)
        device = await one.call("host.register_device", {})
        assert (await refused(one, "host.register_device", {})).data["limit"] == "board_entries"
        await one.call("host.register_device", {"id": device["id"], "name": "again"})
        await other.call("host.register_device", {})
        assert (await refused(other, "host.register_device", {})).data["limit"] == "board_all_entries"
        await one.call("host.unregister_agent", {"agent_id": "builder"})
        await other.call("host.register_agent", AGENT)
        asked = await one.call("host.request_approval", {"action": "a"})
        assert (await refused(other, "host.request_approval", {"action": "b"})).data["limit"] == "approvals"
        for connection, word in ((one, "approve"), (other, "deny")):
            await connection.call("host.resolve_approval", {"approval_id": asked["id"], "resolution": word})
            asked = await other.call("host.request_approval", {"action": "b"})
        assert len((await one.call("host.approvals", {"all": True}))["approvals"]) == 2
        figures = await asyncio.to_thread(daemon.metrics)
        shown = {name: figures[name] for name in ("board_agents", "board_devices", "approvals_pending")}
        assert shown == {"board_agents": 1, "board_devices": 2, "approvals_pending": 1}


async def test_a_peer_that_does_not_read_sees_the_gap_and_is_told_what_it_missed(start: StartDaemon) -> None:
    daemon = start(stream_events=8, send_buffer_bytes=4_096, high_water_bytes=65_536, write_s=60)
    async with raw_peer(daemon, receive_buffer=4_096) as slow, car(daemon) as one:
        slow.send_call(1, "host.subscribe")
        assert (await slow.message())["result"]["event_sequence"] == 0
        last = 0
        while not (await asyncio.to_thread(daemon.metrics))["host_event_skips"]:
            for _ in range(20):
                last = (await one.call("host.notify", {"payload": "x" * 60_000}))["sequence"]
        got: list[int] = []
        while not got or got[-1] != last:
            got.append((await slow.message())["params"]["sequence"])
        assert got == sorted(set(got))
        assert len(got) == last - (await asyncio.to_thread(daemon.metrics))["host_event_skips"]
        slow.send_call(2, "host.events", {"limit": 1_000})
        missed = (await slow.message())["result"]["events"]
        assert missed[-1]["sequence"] == last
        kept = [event["sequence"] for event in missed]
        assert kept == list(range(kept[0], last + 1))
