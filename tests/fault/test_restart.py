"""After a restart all is as it was; what nobody attends is interrupted, and its owner goes on."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from carserver.core.principals import CLIENT, agent_token
from carserver.methods.runs import keyed_run_id
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.fault.processes import call
from tests.peer import Peer, Refused, peer, records
from tests.trace import until_at_most
from tests.unit.storing import write_lock

GRACE_S = 0.4
WITHIN_S = 2.0  # a grace within which somebody comes back, on a machine that stands still for a while, too
RESTARTS = [pytest.param(Daemon.kill, id="killed"), pytest.param(Daemon.terminate, id="terminated")]
STEP = {"type": "text_delta", "text": "on"}


async def answer(client: Peer, method: str, **params: Any) -> bytes:
    """The answer by its bytes; what is pushed before it is dropped."""
    await client.socket.send(json.dumps({"jsonrpc": "2.0", "id": "bytes", "method": method, "params": params}))
    while not (frame := await client.next_frame()).startswith(b'{"jsonrpc":"2.0","id":"bytes"'):
        pass
    return frame


def agent(daemon: Daemon, name: str) -> str:
    return agent_token(daemon.token("agent-key"), name)


async def watching(viewer: Peer, run_id: str) -> dict[str, Any]:
    subscribed: dict[str, Any] = await viewer.call("runs.trace.subscribe", {"run_id": run_id})
    return subscribed


async def ending(viewer: Peer) -> dict[str, Any]:
    """The params of the next frame that says `ended`."""
    while (params := await viewer.next("runs.trace.event"))["record"]["record"] != "ended":
        pass
    return params


async def left_run(daemon: Daemon, token: str = "auth-token") -> str:
    """A run whose only attendant has gone; its id."""
    async with peer(daemon, token) as owner:
        return str((await owner.create())["id"])


async def a_grace_passes(daemon: Daemon, viewer: Peer) -> None:
    """Comes back when a run that was left after this call has been interrupted: not before one whole grace."""
    await watching(viewer, run_id := await left_run(daemon))
    while (await ending(viewer))["run_id"] != run_id:
        pass


async def status(viewer: Peer, run_id: str) -> str:
    return str((await viewer.call("runs.get", {"run_id": run_id}))["status"])


# What is stored.


@pytest.mark.parametrize("end", RESTARTS)
async def test_snapshots_events_bytes_lists_keys_and_batches_are_after_a_restart_what_they_were(
    daemon: Daemon, end: Callable[[Daemon], object]
) -> None:
    spaced = '{ "type" : "text_delta",  "text":"\\u00e9 é \\ud83d\\ude00", "n": 1.50e+2 }'
    async with peer(daemon) as owner:
        about = {"session_id": "s", "agent_id": "a", "outcome_description": "o", "metadata": {"k": [1, "é"]}}
        keyed = await owner.create("keyed", **about, idempotency_key="key")
        runs = [keyed["id"], *[(await owner.create(f"run {n}", parent_run_id=keyed["id"]))["id"] for n in range(4)]]
        batch = [{"type": "planning_start"}, {"type": "tool_start", "id": "t"}]
        first = await owner.record(runs[0], *batch, batch_id="batch")
        await owner.raw(
            '{"jsonrpc":"2.0","id":"raw","method":"runs.record",'
            f'"params":{{"run_id":"{runs[0]}","events":[{spaced}],"batch_id":"raw"}}}}'
        )
        await owner.record(runs[1], {"type": "agent_end", "text": "done"}, STEP)
        await owner.call("runs.fail", {"run_id": runs[2], "error": "broke"})
        await owner.call("runs.cancel", {"run_id": runs[3], "reason": "enough"})
        before = [await answer(owner, "runs.get", run_id=run_id) for run_id in runs]
        before += [await answer(owner, "runs.events", run_id=run_id) for run_id in runs]
        before += [await answer(owner, "runs.list", session_id="s"), await answer(owner, "runs.list")]
        assert f'"event":{spaced}'.encode() in before[len(runs)]
        assert b'"metadata":{"k":[1,"\\u00e9"]}' in before[0]
    end(daemon)
    daemon.start()
    async with peer(daemon) as owner:
        after = [await answer(owner, "runs.get", run_id=run_id) for run_id in runs]
        after += [await answer(owner, "runs.events", run_id=run_id) for run_id in runs]
        after += [await answer(owner, "runs.list", session_id="s"), await answer(owner, "runs.list")]
        assert after == before

        again = await owner.create("keyed", **about, idempotency_key="key")
        assert (again["id"], again["epoch"], again["event_count"]) == (runs[0], keyed["epoch"], 3)
        with pytest.raises(Refused) as refused:
            await owner.create("another prompt", idempotency_key="key")
        assert refused.value.data["reason"] == "key_reused"

        assert await owner.record(runs[0], *batch, batch_id="batch") == first
        with pytest.raises(Refused) as refused:
            await owner.record(runs[0], STEP, batch_id="batch")
        assert refused.value.data["reason"] == "batch_reused"
        assert (await owner.record(runs[0], STEP))["first_sequence"] == 3


@pytest.mark.parametrize("end", RESTARTS)
async def test_a_viewer_comes_back_by_cursor_and_epoch_and_goes_on_without_gap_or_repetition(
    daemon: Daemon, end: Callable[[Daemon], object]
) -> None:
    count = 900
    async with peer(daemon) as producer, peer(daemon) as viewer:
        run_id = (await producer.create())["id"]
        epoch = (await watching(viewer, run_id))["epoch"]
        answers = [
            producer.start("runs.record", {"run_id": run_id, "events": [{**STEP, "n": n} for n in range(at, at + 3)]})
            for at in range(0, count, 3)
        ]
        seen = [await viewer.next_frame() for _ in range(count // 2)]  # in the midst of the stream, it ends
        await asyncio.to_thread(end, daemon)
        await asyncio.gather(*answers, return_exceptions=True)
        await viewer.closed()
        while not viewer.pushed.empty():
            seen.append(viewer.pushed.get_nowait())
    seen = [frame for frame in seen if b'"runs.trace.event"' in frame]
    cursor = records(seen[-1:])[0]["cursor"]

    daemon.start()
    async with peer(daemon) as viewer, peer(daemon) as producer, peer(daemon) as from_start:
        back = await viewer.call("runs.trace.subscribe", {"run_id": run_id, "cursor": cursor, "epoch": epoch})
        assert (back["recovered"], back["cursor"], back["epoch"]) == (True, cursor, epoch)
        await watching(from_start, run_id)
        await producer.record(run_id, STEP, {"type": "agent_end", "text": "done"})
        while b'"record":"ended"' not in seen[-1]:
            seen.append(await viewer.next_frame())
        whole = [await from_start.next_frame()]
        while b'"record":"ended"' not in whole[-1]:
            whole.append(await from_start.next_frame())
    total = records(whole[-1:])[0]["cursor"]
    assert total >= count // 2
    assert [record["cursor"] for record in records(seen)] == [*range(total + 1), total]
    assert seen == whole  # frame by frame the same bytes, across the restart


async def test_after_a_restart_a_cursor_of_another_epoch_or_beyond_the_head_begins_anew(daemon: Daemon) -> None:
    async with peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        await owner.record(run_id, STEP)
        epoch = (await watching(owner, run_id))["epoch"]
    daemon.kill()
    daemon.start()
    async with peer(daemon) as viewer:
        for cursor, named in ((1, "another"), (2, epoch)):
            back = await viewer.call("runs.trace.subscribe", {"run_id": run_id, "cursor": cursor, "epoch": named})
            assert (back["recovered"], back["cursor"], back["epoch"]) == (False, 0, epoch)


# Attendance.


@pytest.fixture
def graceful(start: StartDaemon) -> Daemon:
    """A daemon with a short grace."""
    return start(grace_s=GRACE_S)


async def test_a_run_that_nobody_attends_is_interrupted_after_the_grace_because_its_owner_is_gone(
    graceful: Daemon,
) -> None:
    async with peer(graceful, "host-token") as host:
        async with peer(graceful) as owner:
            run_id = (await owner.create())["id"]
            await watching(host, run_id)
            left_ms = time.time_ns() // 1_000_000
        ended = await ending(host)
        assert (ended["status"], ended["run_status"]) == ("incomplete", "interrupted")
        run = await host.call("runs.get", {"run_id": run_id})
    assert (run["status"], run["interrupted_reason"]) == ("interrupted", "owner gone")
    assert run["ended_at_ms"] == run["updated_at_ms"] >= left_ms + GRACE_S * 1000 - 2


async def test_a_run_whose_creator_went_before_it_was_stored_is_attended_by_nobody_and_interrupted_too(
    graceful: Daemon,
) -> None:
    async with peer(graceful, "host-token") as host:
        with write_lock(graceful.state / "carserver.db"):
            async with peer(graceful) as owner:
                creating = owner.start("runs.create", {"prompt": "hasty", "idempotency_key": "hasty"})
                await graceful.until("storage_waiting_commands", 1)
            with pytest.raises(ConnectionError):
                await creating
            await until_at_most(graceful, "connections", 2)  # the host's, and the one that asks
        await until_at_most(graceful, "storage_waiting_commands", 0)
        run_id = keyed_run_id(CLIENT, "hasty")
        await watching(host, run_id)
        await ending(host)
        assert (await host.call("runs.get", {"run_id": run_id}))["interrupted_reason"] == "owner gone"


async def test_a_run_that_was_live_when_the_daemon_was_killed_is_interrupted_and_the_reason_names_the_old_boot(
    graceful: Daemon,
) -> None:
    async with peer(graceful) as owner:
        run_id = (await owner.create())["id"]
        boot_id = (await owner.call("server.status"))["boot_id"]
        graceful.kill()
    graceful.start()
    async with peer(graceful, "host-token") as host:
        await watching(host, run_id)
        assert (await ending(host))["run_status"] == "interrupted"
        run = await host.call("runs.get", {"run_id": run_id})
        assert run["interrupted_reason"] == f"daemon restarted (boot {boot_id})"
    graceful.kill()
    graceful.start()
    async with peer(graceful) as owner:  # it stays what it is, and a second restart does not change the reason
        assert await owner.call("runs.get", {"run_id": run_id}) == run


async def test_a_run_whose_owner_comes_back_within_the_grace_after_a_restart_is_not_interrupted(
    start: StartDaemon,
) -> None:
    daemon = start(grace_s=WITHIN_S)
    async with peer(daemon) as owner:
        recorded, resumed = [(await owner.create())["id"] for _ in range(2)]
        daemon.kill()
    daemon.start()
    async with peer(daemon) as owner, peer(daemon, "host-token") as host:
        await owner.record(recorded, STEP)
        assert (await owner.call("runs.resume", {"run_id": resumed}))["status"] == "created"
        await a_grace_passes(daemon, host)
        assert [await status(host, recorded), await status(host, resumed)] == ["created", "created"]
        await watching(host, recorded)
        await owner.socket.close()
        await ending(host)
        run = await host.call("runs.get", {"run_id": recorded})
        assert run["interrupted_reason"] == "owner gone"  # not the restart: it was attended since


@pytest.mark.parametrize("how", ["runs.record", "runs.resume"])
async def test_an_agent_continues_its_interrupted_run_by_its_token(graceful: Daemon, how: str) -> None:
    token = agent(graceful, "smith")
    async with peer(graceful, "host-token") as host:
        run_id = await left_run(graceful, token)
        await watching(host, run_id)
        await ending(host)
        async with peer(graceful, token) as back:
            await back.call(how, {"run_id": run_id} | ({"events": [STEP]} if how == "runs.record" else {}))
            run = await back.call("runs.get", {"run_id": run_id})
            assert (run["status"], run["agent_id"]) == ("executing", "smith")
            assert not {"interrupted_reason", "ended_at_ms"} & run.keys()
            await a_grace_passes(graceful, host)
            assert await status(host, run_id) == "executing"  # and it attends
            await back.record(run_id, {"type": "agent_end", "text": "done"})
            assert (await ending(host))["record"]["run_status"] == "completed"


async def test_a_client_continues_its_run_by_two_calls_in_a_row(graceful: Daemon) -> None:
    created = await asyncio.to_thread(call, graceful.state, "runs.create", {"prompt": "by hand"})
    run_id = created["id"]
    async with peer(graceful, "host-token") as host:
        await watching(host, run_id)
        assert (await ending(host))["run_status"] == "interrupted"
        recorded = await asyncio.to_thread(
            call, graceful.state, "runs.record", {"run_id": run_id, "events": [STEP, STEP]}
        )
        assert (recorded["first_sequence"], recorded["cursor"], recorded["status"]) == (0, 2, "executing")
        frames = [await host.next("runs.trace.event") for _ in range(2)]
        assert [(frame["cursor"], frame["run_status"]) for frame in frames] == [(1, "executing"), (2, "executing")]
        again = await ending(host)  # nobody attends it since: another ending, after another grace
        assert (again["cursor"], again["run_status"]) == (2, "interrupted")


async def test_an_attended_run_is_not_interrupted_however_long_it_is_silent(graceful: Daemon) -> None:
    async with peer(graceful) as owner, peer(graceful, "host-token") as host:
        run_id = (await owner.create())["id"]
        for _ in range(2):
            await a_grace_passes(graceful, host)
            assert await status(host, run_id) == "created"


async def test_a_second_attending_connection_keeps_a_run_alive_and_one_that_only_looks_does_not(
    graceful: Daemon,
) -> None:
    async with peer(graceful, "host-token") as host, peer(graceful) as looker:
        async with peer(graceful) as second:
            async with peer(graceful) as first:
                run_id = (await first.create())["id"]
                await watching(looker, run_id)
                await looker.call("runs.events", {"run_id": run_id})
                await second.record(run_id, STEP)
            await a_grace_passes(graceful, host)
            assert await status(host, run_id) == "created"
        assert (await ending(looker))["run_status"] == "interrupted"


async def test_a_run_that_is_attended_again_within_the_grace_is_not_interrupted(start: StartDaemon) -> None:
    daemon = start(grace_s=WITHIN_S)
    async with peer(daemon, "host-token") as host:
        run_id = await left_run(daemon)
        async with peer(daemon) as back:
            await back.call("runs.resume", {"run_id": run_id})
            await a_grace_passes(daemon, host)
            assert await status(host, run_id) == "created"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_a_run_that_is_finished_is_not_touched_by_the_grace_nor_by_a_restart(graceful: Daemon, end: str) -> None:
    async with peer(graceful) as owner:
        run_id = (await owner.create())["id"]
        if end == "completed":
            await owner.record(run_id, {"type": "agent_end", "text": "done"})
        else:
            await owner.call(*_ending(run_id, end))
        run = await owner.call("runs.get", {"run_id": run_id})
        assert run["status"] == end
    async with peer(graceful, "host-token") as host:
        await a_grace_passes(graceful, host)
        assert await host.call("runs.get", {"run_id": run_id}) == run
    graceful.kill()
    graceful.start()
    async with peer(graceful, "host-token") as host:
        await a_grace_passes(graceful, host)
        assert await host.call("runs.get", {"run_id": run_id}) == run


def _ending(run_id: str, end: str) -> tuple[str, dict[str, str]]:
    if end == "failed":
        return "runs.fail", {"run_id": run_id, "error": "broke"}
    return "runs.cancel", {"run_id": run_id, "reason": "enough"}


async def test_nobody_but_its_owner_continues_an_interrupted_run(graceful: Daemon) -> None:
    async with peer(graceful, "host-token") as host:
        run_id = await left_run(graceful, agent(graceful, "smith"))
        await watching(host, run_id)
        await ending(host)
        run = await host.call("runs.get", {"run_id": run_id})
        expected = {"auth-token": "not_found", agent(graceful, "jones"): "not_found", "host-token": "forbidden"}
        for token, type_ in expected.items():
            async with peer(graceful, token) as other:
                for method, more in (("runs.record", {"events": [STEP]}), ("runs.resume", {})):
                    with pytest.raises(Refused) as refused:
                        await other.call(method, {"run_id": run_id, **more})
                    assert refused.value.type == type_
        assert await host.call("runs.get", {"run_id": run_id}) == run
