"""The real client and the host board: what it registers, hears and asks, and with what token it speaks as the host."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from carserver.core.principals import agent_token
from tests.carclient import CarClient, CarError, car_client, needs_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import peer

pytestmark = needs_car

HOST_TOKEN_FILE = ".config/ai.parslee.car/host-token"  # in its home
AGENT: dict[str, Any] = {
    "id": "builder",
    "name": "Builder",
    "kind": "coder",
    "capabilities": ["build", "grün"],
    "project": "website",
    "pid": 4711,
    "display": {"color": "blue"},
    "metadata": {"team": 7},
}
DEVICE: dict[str, Any] = {"id": "phone", "name": "Phone", "kind": "mobile", "capabilities": ["camera"]}


async def heard(car: CarClient, kind: str) -> dict[str, Any]:
    """The next event, which is of this kind."""
    notified = await car.notified()
    event: dict[str, Any] = notified.params
    assert (notified.method, event["kind"]) == ("host.event", kind)
    return event


async def approvals(car: CarClient) -> list[dict[str, Any]]:
    """Those that are pending."""
    pending: list[dict[str, Any]] = (await car.call("host_approvals"))["approvals"]
    return pending


async def resolved(car: CarClient, id_: str, resolution: str) -> dict[str, Any]:
    """The approval, as whoever resolves it is told."""
    approval: dict[str, Any] = await car.call("host_resolve_approval", {"approval_id": id_, "resolution": resolution})
    return approval


async def test_what_one_client_registers_another_sees_hears_and_does_not_change(daemon: Daemon) -> None:
    async with car_client(daemon) as car, car_client(daemon) as viewer:
        assert await car.call("host_agents") == await car.call("host_devices") == []
        assert await car.call("host_events") == {"events": []}
        await viewer.listen("host.event")
        state = await viewer.call("host_subscribe", {})
        assert {name: state[name] for name in ("subscribed", "agents", "devices", "approvals", "events")} == {
            "subscribed": True,
            "agents": [],
            "devices": [],
            "approvals": [],
            "events": [],
        }
        assert (state["pending_signins"], state["event_sequence"]) == ([], 0)

        agent = await car.call("host_register_agent", AGENT)
        assert agent.items() >= (AGENT | {"status": "idle"}).items()
        event = await heard(viewer, "agent.registered")
        assert (event["sequence"], event["agent_id"], event["payload"]) == (1, "builder", agent)
        unnamed = await car.call("host_register_agent", {"name": "Other", "kind": "tester"})
        assert unnamed["id"] == (await heard(viewer, "agent.registered"))["agent_id"]
        assert await viewer.call("host_agents") == [agent, unnamed]

        new = {"agent_id": "builder", "status": "running", "current_task": "fix", "message": "so far", "payload": [1]}
        changed = await car.call("host_set_status", new)
        told = {"status": "running", "current_task": "fix", "message": "so far"}
        assert changed.items() >= (AGENT | told).items()
        event = await heard(viewer, "agent.status_changed")
        assert (event["message"], event["payload"]) == ("so far", changed | {"payload": [1]})

        device = await car.call("host_register_device", DEVICE)
        assert device.items() >= DEVICE.items()
        assert (await heard(viewer, "device.registered"))["payload"] == device
        moved = await car.call("host_update_device", {"id": "phone", "status": "locked"})
        assert moved == device | {"status": "locked", "updated_at": moved["updated_at"]}
        assert (await heard(viewer, "device.updated"))["payload"] == moved
        assert await viewer.call("host_devices") == [moved]

        notice = {"kind": "tests.passed", "agent_id": "builder", "message": "grün", "payload": {"count": 3}}
        said = await car.call("host_notify", notice)
        assert said.items() >= notice.items()
        assert await heard(viewer, "tests.passed") == said
        assert (await car.call("host_events", 2))["events"][-1] == said
        assert [event["sequence"] for event in (await car.call("host_events"))["events"]] == list(range(1, 7))
        assert [event["sequence"] for event in (await car.call("host_events", limit=2))["events"]] == [5, 6]

        refused: list[tuple[str, Any, str]] = [
            ("host_register_agent", AGENT, "-32011 .*'builder'"),
            ("host_set_status", {"agent_id": "builder", "status": "idle"}, "-32003 .*'builder'"),
            ("host_unregister_agent", {"agent_id": "builder"}, "-32003 .*'builder'"),
            ("host_update_device", {"id": "phone", "status": "mine"}, "-32003 .*'phone'"),
            ("host_unregister_agent", {"agent_id": "nobody"}, "-32010 .*'nobody'"),
            ("host_set_status", {"agent_id": "builder", "status": "lazy"}, "-32602 status"),
            ("host_notify", {"kind": "agent.registered"}, "-32602 kind"),
        ]
        for call, params, words in refused:
            with pytest.raises(CarError, match=words):
                await viewer.call(call, params)
        assert await car.call("host_unregister_agent", {"agent_id": "builder"}) == {"ok": True}
        assert (await heard(viewer, "agent.unregistered"))["agent_id"] == "builder"
        assert await viewer.call("host_agents") == [unnamed]

        # A process that is gone without a word takes along what it registered.
        await car.kill()
        assert (await heard(viewer, "agent.unregistered"))["agent_id"] == unnamed["id"]
        assert (await heard(viewer, "device.unregistered"))["payload"] == moved
        assert await viewer.call("host_agents") == await viewer.call("host_devices") == []


async def test_an_approval_that_one_client_asks_for_is_resolved_by_it_the_host_or_for_the_system_by_anyone(
    daemon: Daemon,
) -> None:
    tester = agent_token(daemon.token("agent-key"), "tester")
    async with (
        car_client(daemon) as car,
        car_client(daemon, token=tester) as other,
        peer(daemon, "host-token") as host,
    ):
        await other.listen("host.event")
        await other.call("host_subscribe", {})

        async def asked(**members: Any) -> str:
            """The id of an approval, which everyone has been told of."""
            approval = await car.call("host_request_approval", {"action": "delete", "agent_id": "builder", **members})
            assert (approval["status"], approval["action"]) == ("pending", "delete")
            assert (await heard(other, "approval.requested"))["payload"] == approval
            assert await approvals(other) == [approval]
            id_: str = approval["id"]
            return id_

        async def told(approval: dict[str, Any], resolution: str) -> None:
            """Everyone has been told that it is resolved, and it waits no longer."""
            assert (approval["status"], approval["resolution"]) == ("resolved", resolution)
            assert (await heard(other, "approval.resolved"))["payload"] == approval
            assert await approvals(car) == []

        mine = await asked(details={"branch": "main"}, options=["yes", "no"])
        with pytest.raises(CarError, match=r"-32003 .*requested it"):
            await resolved(other, mine, "yes")
        with pytest.raises(CarError, match="-32602 resolution: 'perhaps' is none of 'yes', 'no'"):
            await resolved(car, mine, "perhaps")
        approval = await resolved(car, mine, "yes")
        await told(approval, "yes")
        assert approval["details"] == {"branch": "main"}
        assert await resolved(car, mine, "yes") == approval  # again
        with pytest.raises(CarError, match=r"-32011 .*'yes'"):
            await resolved(car, mine, "no")

        approval = await host.call("host.resolve_approval", {"approval_id": await asked(), "resolution": "deny"})
        await told(approval, "deny")
        assert approval["resolved_by"] == "host"
        approval = await resolved(other, await asked(system_level=True), "approve")
        await told(approval, "approve")
        assert approval["resolved_by"] == "agent:tester"
        with pytest.raises(CarError, match=r"-32010 .*'none'"):
            await resolved(other, "none", "approve")

        left = await asked()
        await car.call("host_register_agent", AGENT)
        await heard(other, "agent.registered")
        await car.kill()
        await heard(other, "agent.unregistered")  # so its session has ended
        with pytest.raises(CarError, match=r"-32003 .*requested by client"):
            await resolved(other, left, "approve")
        async with car_client(daemon) as heir:  # of the same token, and so the same principal
            approval = await resolved(heir, left, "approve")
        assert (await heard(other, "approval.resolved"))["payload"] == approval


async def test_an_approval_outlives_the_daemon_and_another_process_resolves_it_afterwards(daemon: Daemon) -> None:
    async with car_client(daemon) as car:
        approval = await car.call("host_request_approval", {"action": "deploy", "options": ["ship it", "wait"]})
        daemon.kill()
    await asyncio.to_thread(daemon.start)
    async with car_client(daemon) as other:
        assert await approvals(other) == [approval]
        await other.listen("host.event")
        assert (await other.call("host_subscribe", {}))["approvals"] == [approval]
        answer = await resolved(other, approval["id"], "ship it")
        assert answer.items() >= (approval | {"status": "resolved", "resolution": "ship it"}).items()
        assert (await heard(other, "approval.resolved"))["payload"] == answer


async def test_the_host_client_comes_as_the_host_with_the_token_of_its_home_and_with_no_other(
    start: StartDaemon, tmp_path: Path
) -> None:
    daemon = start("--methods", "tests.car_methods", wrong_token_s=0.01)
    file = tmp_path / HOST_TOKEN_FILE
    file.parent.mkdir(parents=True)
    async with car_client(daemon, HOME=str(tmp_path)) as car:
        assert await car.call("connection_epoch") == 1
        requests = daemon.metrics()["requests"]
        with pytest.raises(CarError, match="host-management token is unavailable") as refused:
            await car.host("agents_remove", {})
        assert refused.value.type == "RuntimeError"
        assert daemon.metrics()["requests"] == requests  # it said nothing

        file.write_text("wrong\n")
        with pytest.raises(CarError, match=r"session\.auth rejected by daemon .*token mismatch"):
            await car.host("agents_remove", {})
        assert daemon.metrics()["wrong_tokens"] == 1
        file.write_text(f"{daemon.token()}\n")  # a token, and not the host's
        with pytest.raises(CarError, match=r"session\.auth rejected by daemon"):
            await car.host("agents_remove", {})

        file.write_text(f"{daemon.token('host-token')}\n")
        assert await car.host("agents_remove", {}) == "host"
        assert await car.call("daemon_call_host_management", "agents.remove", "{}") == "host"
        with pytest.raises(CarError, match=r"agents\.remove is for the host"):  # its own connection is no host's
            await car.daemon_call("agents.remove")
        with pytest.raises(
            CarError, match=r"no method 'agents\.upsert'; there are, of agents.*: .*capabilities\.list"
        ) as refused:
            await car.host("agents_upsert", {})
        assert (refused.value.code, refused.value.data["type"]) == (-32601, "method_not_found")
