"""Sessions that host tools: whose a name is, what they may say, what they are told, and those that misbehave."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from carserver.config import Settings
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import LARGE, Host, begun, hosted, invoked_until_refused, polled, until_ended
from tests.peer import Peer, Refused, peer
from tests.rawpeer import BINARY, TEXT, frame, raw_peer
from tests.trace import until_at_most

MIB = 1024 * 1024
SMALL_BUFFER = 4 * 1024  # of a socket whose peer does not read
STRAYS = ("stray_chunks", "stray_replies", "late_chunks")
CONFIRMED = {"cancelled": True, "cancel": "confirmed"}


def message(**members: Any) -> bytes:
    """One message."""
    return json.dumps({"jsonrpc": "2.0", **members}).encode()


# Whose a name is.


async def test_a_name_is_its_sessions_until_that_unregisters_it_or_goes(daemon: Daemon) -> None:
    async with peer(daemon) as second, peer(daemon) as third:
        async with peer(daemon) as first:
            await Host(first).register("a", "b")
            with pytest.raises(Refused) as refused:
                await Host(second).register("b")
            assert (refused.value.type, refused.value.data["reason"]) == ("conflict", "name_taken")
            await first.call("tools.unregister", {"name": "b"})
            assert await Host(second).register("b") == 1
            with pytest.raises(Refused, match="another session hosts"):
                await Host(first).register("b")
            with pytest.raises(Refused, match="another session hosts"):
                await Host(third).register("a")
            first.socket.transport.abort()
        while (await third.call("tools.list"))["count"] > 1:  # until the daemon has seen it go
            pass
        assert await Host(third).register("a") == 1


async def test_of_many_sessions_that_register_a_name_at_once_one_hosts_it(daemon: Daemon) -> None:
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer(daemon)) for _ in range(20)]
        caller = await stack.enter_async_context(peer(daemon))

        async def registers(one: Peer) -> bool:
            with contextlib.suppress(Refused):
                await Host(one).register("a")
                return True
            return False

        for _ in range(3):
            won = await asyncio.gather(*map(registers, peers))
            assert won.count(True) == 1
            winner = peers[won.index(True)]
            call = caller.start("tools.call", {"tool": "a"})
            await (await Host(winner).asked()).answer("mine")
            assert (await call)["result"] == "mine"
            assert all(one.pushed.empty() for one in peers)
            await winner.call("tools.unregister", {"name": "a"})


async def test_a_session_replaces_its_own_tools_all_or_none(daemon: Daemon) -> None:
    async with peer(daemon) as first, peer(daemon) as second:
        await Host(first).register({"name": "a", "description": "old"}, "b")
        await Host(second).register("taken")
        with pytest.raises(Refused, match="another session hosts"):
            await Host(first).register({"name": "a", "description": "new"}, "c", "taken")

        async def listed() -> list[tuple[str, str]]:
            return [(tool["name"], tool["description"]) for tool in (await first.call("tools.list"))["tools"]]

        assert await listed() == [("a", "old"), ("b", ""), ("taken", "")]
        await Host(first).register({"name": "a", "description": "new"}, "c")
        assert await listed() == [("a", "new"), ("b", ""), ("c", ""), ("taken", "")]


async def test_what_runs_goes_on_with_its_host_when_another_session_takes_the_name(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host), peer(daemon) as other:
        kept, asked = await begun(caller, host)
        stopped, to_stop = await begun(caller, host)
        await host.peer.call("tools.unregister", {"name": "tail"})
        await Host(other).register("tail")
        newer, asked_newer = await begun(caller, Host(other))
        await asked.text("still here")
        await asked.answer("old")
        await asked_newer.answer("new")
        chunks, answer = await until_ended(caller, kept)
        assert (chunks[0], answer["result"]) == ({"kind": "text", "text": "still here"}, "old")
        assert (await until_ended(caller, newer))[1]["result"] == "new"
        cancelled = caller.start("tools.cancel", {"handle": stopped, "wait_ms": 10_000})
        assert (await host.told_to_stop())["request_id"] == to_stop.id
        await to_stop.answer()
        assert await cancelled == CONFIRMED


async def test_a_call_that_was_taken_before_its_tool_was_unregistered_is_made(daemon: Daemon) -> None:
    async with raw_peer(daemon) as own:
        own.send_call(1, "tools.register", [{"name": "a"}])
        assert (await own.message())["result"] == 1
        invoke = message(id=2, method="tools.invoke", params={"tool": "a", "idempotency_key": "k"})
        unregister = message(id=3, method="tools.unregister", params={"name": "a"})
        own.send(frame(TEXT, invoke) + frame(TEXT, unregister))  # the first waits for storage, the second for nothing
        got = [await own.message() for _ in range(3)]
        results = {one["id"]: one["result"] for one in got if "result" in one}
        assert results[3] == {"unregistered": "a", "removed": 1}
        (request,) = (one for one in got if one.get("method") == "tools.execute")
        own.send_text(message(id=request["id"], result="made"))
        own.send_call(4, "tools.poll", {"handle": results[2]["handle"], "wait_ms": 10_000})
        assert (await own.message())["result"]["result"] == "made"


# What is of no request, or of none any more.


async def strays(daemon: Daemon) -> list[float]:
    """The figures of what was ignored."""
    figures = await asyncio.to_thread(daemon.metrics)
    return [figures[name] for name in STRAYS]


async def test_what_is_said_of_a_request_that_is_not_ones_own_is_counted_and_leaves_it_alone(daemon: Daemon) -> None:
    async with hosted(daemon, "a") as (caller, host), hosted(daemon, "b") as (_, liar):
        handle, asked = await begun(caller, host, "a")
        _, of_liar = await begun(caller, liar, "b")
        for id_ in (asked.id, "0" * 32, "", handle):
            of_liar.id = id_  # what it streams and answers is now of this request
            await of_liar.text("a lie")
            await of_liar.chunk({"kind": "done", "result": "a lie"})
            await of_liar.chunk({"kind": "none"})
            await of_liar.answer("a lie")
            await of_liar.fail("a lie")
        await liar.peer.call("server.ping")
        assert await strays(daemon) == [12, 8, 0]
        await asked.text("the truth")
        await asked.answer("true")
        chunks, answer = await until_ended(caller, handle)
        assert chunks == [{"kind": "text", "text": "the truth"}, {"kind": "done", "result": "true"}]
        assert answer["status"] == "succeeded"


async def test_what_is_said_after_the_end_is_counted_by_whether_an_answer_is_awaited(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        sealed, of_sealed = await begun(caller, host)
        await of_sealed.chunk({"kind": "done", "result": "first"})
        cancelled, of_cancelled = await begun(caller, host)
        await caller.call("tools.cancel", {"handle": cancelled})
        for asked in (of_sealed, of_cancelled):
            await asked.text("late")
            await asked.chunk({"kind": "error", "message": "late"})
        await host.peer.call("server.ping")
        assert await strays(daemon) == [0, 0, 4]
        for asked in (of_sealed, of_cancelled):
            await asked.answer("late")  # the proof, and no stray
            await asked.text("later")
            await asked.answer("again")
        await host.peer.call("server.ping")
        assert await strays(daemon) == [2, 2, 4]
        assert (await until_ended(caller, sealed))[0] == [{"kind": "done", "result": "first"}]
        chunks, answer = await until_ended(caller, cancelled)
        assert chunks == [{"kind": "error", "message": "cancelled by client"}]
        assert answer["status"] == "cancelled"


# Answers that are wrong, or large.


def failed(error: str) -> dict[str, Any]:
    """As a call tells it."""
    return {"status": "failed", "error": error}


NO_MESSAGE = failed("the answer's error is no object with a string `message`")
DEPTH = Settings().value_nesting
LONG = Settings().text_bytes + 1


@pytest.mark.parametrize(
    ("reply", "called"),
    [
        pytest.param(
            {"result": 1, "error": {"code": 1, "message": "m"}},
            failed("the answer has both result and error"),
            id="both",
        ),
        pytest.param({}, failed("the answer has neither result nor error"), id="neither"),
        pytest.param({"error": {"code": 1}}, NO_MESSAGE, id="an error without a message"),
        pytest.param({"error": {"code": 1, "message": 7}}, NO_MESSAGE, id="a message that is no string"),
        pytest.param({"error": "m"}, NO_MESSAGE, id="an error that is a string"),
        pytest.param({"error": None}, failed("the answer has neither result nor error"), id="an error that is null"),
        pytest.param({"error": None, "result": 1}, {"status": "succeeded", "result": 1}, id="no error, and a result"),
        pytest.param(
            {"error": {"message": ""}}, failed("the host answered an error without a message"), id="an empty message"
        ),
        pytest.param(
            {"error": {"code": 1, "message": "x" * LONG}},
            failed(f"it failed, with an error message of {LONG} bytes, more than text_bytes allows ({LONG - 1})"),
            id="a long message",
        ),
        pytest.param(
            {"result": json.loads("[" * (DEPTH + 1) + "]" * (DEPTH + 1))},
            failed(f"the answer's result has brackets that nest deeper than {DEPTH} (value_nesting)"),
            id="deeper than it may be",
        ),
        pytest.param({"result": None}, {"status": "succeeded"}, id="null"),
        pytest.param({"result": False, "more": 1}, {"status": "succeeded", "result": False}, id="more members"),
    ],
)
async def test_an_answer_ends_its_call_whatever_is_wrong_with_it(
    daemon: Daemon, reply: dict[str, Any], called: dict[str, Any]
) -> None:
    async with hosted(daemon) as (caller, host):
        call = caller.start("tools.call", {"tool": "tail"})
        asked = await host.asked()
        await host.send({"id": asked.id, **reply})
        answer = await call
        assert answer == {"handle": answer["handle"], **called}
        await host.peer.call("server.ping")
        assert host.peer.pushed.empty(), "an answer is not answered"


async def test_a_result_of_ten_megabytes_becomes_an_output(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        call = caller.start("tools.call", {"tool": "tail"})
        await (await host.asked()).answer("x" * (10 * MIB))
        answer = await call
        assert answer["status"] == "succeeded"
        assert answer["result_ref"]["size"] == 10 * MIB + 2
        chunks, _ = await until_ended(caller, answer["handle"])
        assert chunks == [{"kind": "done", "result_ref": answer["result_ref"]}]


async def test_an_answer_with_another_id_or_that_is_no_json_leaves_the_call_as_it_was(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        await host.send({"id": asked.id.upper() + "0", "result": 1})
        await host.send({"id": 7, "result": 1})
        await host.send({"id": [asked.id], "result": 1})
        await host.send({"id": None, "error": {"code": 1, "message": "m"}})
        assert (await host.peer.raw(f'{{"jsonrpc":"2.0","id":"{asked.id}","result":1'))["error"]["code"] == -32700
        assert (await strays(daemon))[1] == 4
        assert (await polled(caller, handle))["status"] == "running"
        await asked.answer("well")
        assert (await until_ended(caller, handle))[1]["result"] == "well"


# What a host is told.

Stop = Callable[[Peer, str, str], Awaitable[Any]]


async def _nothing(caller: Peer, handle: str, run_id: str) -> None:
    """It comes by itself."""


async def _cancels(caller: Peer, handle: str, run_id: str) -> None:
    await caller.call("tools.cancel", {"handle": handle})


async def _cancels_all(caller: Peer, handle: str, run_id: str) -> None:
    await caller.call("tools.cancel_all")


async def _ends_the_run(caller: Peer, handle: str, run_id: str) -> None:
    await caller.call("runs.fail", {"run_id": run_id, "error": "no more"})


async def _goes(caller: Peer, handle: str, run_id: str) -> None:
    caller.socket.transport.abort()


@pytest.mark.parametrize(
    ("stop", "params", "reason", "status"),
    [
        pytest.param(_cancels, {}, "cancelled by client", "cancelled", id="a cancel"),
        pytest.param(_cancels_all, {}, "cancelled by client", "cancelled", id="a cancel of all"),
        pytest.param(_nothing, {"timeout_ms": 20}, "deadline of 20 ms", "failed", id="a deadline"),
        pytest.param(_ends_the_run, {"run_id": "its"}, "its run is over", "cancelled", id="a run that is over"),
        pytest.param(
            _goes,
            {},
            "nobody waits for it: the connection that invoked it has ended",
            "cancelled",
            id="an invoker that has gone",
        ),
    ],
)
async def test_a_host_is_told_once_that_it_is_to_stop_and_why(
    start: StartDaemon, stop: Stop, params: dict[str, Any], reason: str, status: str
) -> None:
    daemon = start(grace_s=0.1)
    async with hosted(daemon) as (caller, host), peer(daemon) as watching:
        run_id = (await caller.create())["id"]
        given = params | ({"run_id": run_id} if "run_id" in params else {})
        handle, asked = await begun(caller, host, action_id="a7", **given)
        await stop(caller, handle, run_id)
        assert await host.told_to_stop() == {"request_id": asked.id, "action_id": "a7", "reason": reason}
        answer = (await until_ended(watching, handle))[1]
        assert (answer["status"], answer["error"]) == (status, reason)
        assert (await asyncio.to_thread(daemon.metrics))["handles_running"] == 1, "it has not answered yet"
        await asked.answer()
        await until_at_most(daemon, "handles_running", 0)
        assert (await watching.call("tools.cancel", {"handle": handle, "wait_ms": 10_000})) == CONFIRMED
        assert host.peer.pushed.empty(), "it is told once"


# A host that does not read.


async def test_a_host_that_does_not_read_is_overloaded_and_others_are_not_touched(start: StartDaemon) -> None:
    daemon = start(write_s=60, ping_s=600, kill_after_s=60)
    async with hosted(daemon, "quick") as (caller, quick), raw_peer(daemon, receive_buffer=SMALL_BUFFER) as slow:
        slow.send_call(1, "tools.register", [{"name": "slow"}])
        assert (await slow.message())["result"] == 1
        handles, refused = await invoked_until_refused(caller, "slow")
        assert (refused.type, refused.data["retry_after_ms"] > 0) == ("overloaded", True)
        assert "its host reads too slowly" in str(refused)
        for _ in range(3):
            call = caller.start("tools.call", {"tool": "quick", "parameters": LARGE})
            await (await quick.asked()).answer("at once")
            assert (await call)["result"] == "at once"
        cancelled = caller.start("tools.cancel", {"handle": handles[0], "wait_ms": 30_000})
        # Now it reads: all that it was asked is there, then that one of them is to stop.
        ids = [(await slow.message())["params"]["request_id"] for _ in handles]
        told = await slow.message()
        assert (told["method"], told["params"]["request_id"]) == ("tools.cancel", ids[0])
        for id_ in ids:
            slow.send_text(message(id=id_, result=id_))
        assert await cancelled == CONFIRMED
        for handle, id_ in list(zip(handles, ids, strict=True))[1:]:
            assert (await until_ended(caller, handle))[1]["result"] == id_
        call = caller.start("tools.call", {"tool": "slow", "parameters": LARGE})
        slow.send_text(message(id=(await slow.message())["id"], result="again"))
        assert (await call)["result"] == "again"


async def test_a_host_that_is_aborted_because_it_does_not_read_fails_its_calls(start: StartDaemon) -> None:
    daemon = start(write_s=0.3)
    async with peer(daemon) as caller, raw_peer(daemon, receive_buffer=SMALL_BUFFER) as slow:
        slow.send_call(1, "tools.register", [{"name": "slow"}])
        assert (await slow.message())["result"] == 1
        handles, _ = await invoked_until_refused(caller, "slow")  # overloaded; or unknown, where it is gone by then
        for handle in handles:
            chunks, answer = await until_ended(caller, handle)
            assert chunks == [{"kind": "error", "message": "the host's connection ended"}]
            assert answer["status"] == "failed"
        assert (await asyncio.to_thread(daemon.metrics))["write_timeouts"] == 1
        assert (await caller.call("tools.list"))["count"] == 0


async def test_a_host_that_the_daemon_is_closing_hosts_nothing_any_more(start: StartDaemon) -> None:
    daemon = start(close_s=60)
    async with peer(daemon) as caller, raw_peer(daemon) as host:
        host.send_call(1, "tools.register", [{"name": "a"}])
        assert (await host.message())["result"] == 1
        handle = (await caller.call("tools.invoke", {"tool": "a"}))["handle"]
        host.send(frame(BINARY, b"x"))
        answer = await polled(caller, handle, wait_ms=20_000)
        assert (answer["status"], answer.get("error")) == ("failed", "the host's connection ended")
        assert (await caller.call("tools.list"))["count"] == 0
