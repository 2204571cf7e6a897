"""How calls end in the corners: the daemon drains, a host's answer is refused, a request came with a key again."""

import asyncio
import signal
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host, polled, until_ended
from tests.peer import Refused, peer

LOOKS = 10


async def test_a_host_has_time_to_confirm_what_the_drain_stopped(start: StartDaemon) -> None:
    daemon = start(drain_s=40)
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("tail")
        handle = (await caller.call("tools.invoke", {"tool": "tail"}))["handle"]
        asked = await host.asked()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        assert (await host.told_to_stop())["reason"] == "the daemon stops"
        for _ in range(LOOKS):
            found = await caller.call("tools.status", {"handle": handle})
            assert found == {"handle": handle, "status": "cancelled", "cancel": "requested"}
            await asyncio.sleep(0.02)
        await asked.answer()
        assert (await other.closed())[0] == 1012
        assert (await caller.closed())[0] == 1012
    assert daemon.process.wait(20) == 0
    daemon.process.stdout.close()  # type: ignore[union-attr]
    daemon.process = None


async def test_a_hosts_answer_that_is_refused_as_a_message_fails_its_handle(start: StartDaemon) -> None:
    daemon = start(brackets=1_000)
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("rows")
        handle = (await caller.call("tools.invoke", {"tool": "rows"}))["handle"]
        asked = await host.asked()
        await asked.answer([{}] * 2_000)
        _, answer = await until_ended(caller, handle)
        assert answer["status"] == "failed"
        assert answer["error"].startswith("the host's answer was refused: message")
        assert "brackets" in answer["error"]


async def test_who_invokes_again_with_the_same_key_attends_its_run(start: StartDaemon) -> None:
    daemon = start(grace_s=0.1)
    async with peer(daemon) as other, peer(daemon) as second, peer(daemon) as third:
        host = Host(other)
        await host.register("tail")
        async with peer(daemon) as first:
            run_id = (await first.create())["id"]
            order = {"tool": "tail", "run_id": run_id, "idempotency_key": "k"}
            handle = (await first.call("tools.invoke", order))["handle"]
            await host.asked()
            assert (await second.call("tools.invoke", order))["handle"] == handle
        unattended = (await third.create())["id"]
        await third.socket.close()
        await daemon.until("runs_interrupted", 1)
        assert (await second.call("runs.get", {"run_id": unattended}))["status"] == "interrupted"
        assert (await second.call("runs.get", {"run_id": run_id}))["status"] == "created"
        assert (await second.call("tools.status", {"handle": handle}))["status"] == "running"


async def test_a_key_with_a_number_that_differs_beyond_64_bits_has_other_params(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        await Host(other).register("tail")
        order: dict[str, Any] = {"tool": "tail", "idempotency_key": "k", "parameters": {"n": 2**70}}
        handle = (await caller.call("tools.invoke", order))["handle"]
        assert (await caller.call("tools.invoke", order))["handle"] == handle
        order["parameters"] = {"n": 2**70 + 1}
        with pytest.raises(Refused) as refused:
            await caller.call("tools.invoke", order)
        assert refused.value.data["reason"] == "key_reused"


async def test_a_poll_whose_answer_cannot_be_sent_does_not_lose_its_chunks_in_silence(start: StartDaemon) -> None:
    daemon = start(frame_bytes=4_000)
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("talk")
        handle = (await caller.call("tools.invoke", {"tool": "talk"}))["handle"]
        asked = await host.asked()
        await asked.text(*["x" * 1_000] * 5)
        await daemon.until("chunks", 5)
        with pytest.raises(Refused, match="limit_exceeded"):
            await polled(caller, handle)
        await asked.text("small")
        answer = await polled(caller, handle, wait_ms=10_000)
        assert answer["chunks"] == [{"kind": "text", "text": "small"}]
        assert answer["dropped_chunks"] == 5
