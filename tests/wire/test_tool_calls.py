"""`tools.call`, and idempotency keys: callers that go away, that come again, daemons that are restarted."""

import asyncio

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host, polled, until_ended
from tests.peer import Refused, peer


async def test_a_call_is_answered_when_the_tool_has_ended(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("add")
        called = caller.start("tools.call", {"tool": "add", "parameters": {"a": 1}})
        asked = await host.asked()
        assert asked.params["parameters"] == {"a": 1}
        assert asked.params["timeout_ms"] is None
        await asked.text("adding")
        assert not called.done()
        await asked.answer({"sum": 3})
        answer = await called
        assert answer == {"handle": answer["handle"], "status": "succeeded", "result": {"sum": 3}}
        assert (await polled(caller, answer["handle"]))["chunks"][0] == {"kind": "text", "text": "adding"}

        called = caller.start("tools.call", {"tool": "add"})
        await (await host.asked()).fail("not a number")
        answer = await called
        assert answer == {"handle": answer["handle"], "status": "failed", "error": "not a number"}


async def test_a_connection_may_call_its_own_tools_64_times_at_once_and_the_65th_is_overloaded(daemon: Daemon) -> None:
    async with peer(daemon) as own:
        host = Host(own)
        await host.register("echo")
        calls = [own.start("tools.call", {"tool": "echo", "parameters": {"n": n}}) for n in range(64)]
        asked = [await host.asked() for _ in range(64)]
        assert [one.params["parameters"]["n"] for one in asked] == list(range(64)), "in the order of the calls"
        with pytest.raises(Refused) as refused:
            await own.call("tools.call", {"tool": "echo"})
        assert refused.value.type == "overloaded"
        assert refused.value.data["retry_after_ms"] > 0
        assert (await own.call("server.ping"))["now_ms"] > 0
        for one in reversed(asked):
            await one.answer(one.params["parameters"]["n"])
        assert [(await call)["result"] for call in calls] == list(range(64))
        again = own.start("tools.call", {"tool": "echo"})
        await (await host.asked()).answer("room again")
        assert (await again)["result"] == "room again"


async def test_polls_and_cancels_that_wait_count_among_these_and_such_that_do_not_do_not(start: StartDaemon) -> None:
    daemon = start(waiting=2)
    async with peer(daemon) as own, peer(daemon) as other:
        host = Host(other)
        await host.register("slow")
        handle = (await own.call("tools.invoke", {"tool": "slow"}))["handle"]
        asked = await host.asked()
        waiting = [own.start("tools.poll", {"handle": handle, "wait_ms": 30_000}) for _ in range(2)]
        await own.call("server.ping")
        for method in ("tools.poll", "tools.cancel"):
            with pytest.raises(Refused, match="overloaded"):
                await own.call(method, {"handle": handle, "wait_ms": 1})
        assert (await polled(own, handle))["status"] == "running"
        await asked.answer()
        assert [(await one)["status"] for one in waiting] == ["succeeded"] * 2


async def test_a_call_with_a_deadline_fails_when_it_is_due(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("slow")
        called = caller.start("tools.call", {"tool": "slow", "timeout_ms": 100})
        asked = await host.asked()
        assert asked.params["timeout_ms"] == 100
        answer = await called
        assert (answer["status"], answer["error"]) == ("failed", "deadline of 100 ms")
        assert (await host.told_to_stop())["reason"] == "deadline of 100 ms"


async def test_a_call_without_a_key_takes_its_handle_along(daemon: Daemon) -> None:
    async with peer(daemon) as other, peer(daemon) as watching:
        host = Host(other)
        await host.register("slow")
        async with peer(daemon) as caller:
            called = caller.start("tools.call", {"tool": "slow"})
            asked = await host.asked()
            handle = (await watching.call("tools.handles"))["handles"][0]["handle"]
        with pytest.raises(ConnectionError):
            await called
        assert (await host.told_to_stop())["request_id"] == asked.id
        answer = await polled(watching, handle)
        assert (answer["status"], answer["error"]) == ("cancelled", "the connection that called it has ended")


async def test_a_call_with_a_key_waits_for_the_same_handle_on_another_connection(daemon: Daemon) -> None:
    params = {"tool": "slow", "parameters": {"a": 1, "b": [2]}, "idempotency_key": "once"}
    async with peer(daemon) as other:
        host = Host(other)
        await host.register("slow")
        async with peer(daemon) as caller:
            called = caller.start("tools.call", params)
            asked = await host.asked()
        with pytest.raises(ConnectionError):
            await called
        async with peer(daemon) as one, peer(daemon) as two:
            again = [one.start("tools.call", params)]
            again.append(two.start("tools.call", {**params, "parameters": {"b": [2], "a": 1}}))
            with pytest.raises(Refused) as refused:
                await one.call("tools.call", {**params, "parameters": {"a": 2}})
            assert (refused.value.type, refused.value.data["reason"]) == ("conflict", "key_reused")
            await asked.answer("only once")
            answers = [await call for call in again]
            assert answers[0] == answers[1]
            assert answers[0]["result"] == "only once"
            assert await one.call("tools.call", params) == answers[0], "also when it has ended"
            figures = await asyncio.to_thread(daemon.metrics)
            assert figures["handles_started"] == 1


async def test_a_key_belongs_to_its_method_and_its_principal(daemon: Daemon) -> None:
    params = {"tool": "slow", "idempotency_key": "once"}
    async with peer(daemon) as client, peer(daemon, "host-token") as operator, peer(daemon) as other:
        host = Host(other)
        await host.register("slow")
        first = (await client.call("tools.invoke", params))["handle"]
        second = (await operator.call("tools.invoke", params))["handle"]
        called = client.start("tools.call", params)
        handles = {first, second}
        for _ in range(3):
            asked = await host.asked()
            await asked.answer()
        handles.add((await called)["handle"])
        assert len(handles) == 3
        assert (await client.call("tools.invoke", params))["handle"] == first


async def test_a_keyed_call_that_nobody_comes_for_is_cancelled_after_the_grace(start: StartDaemon) -> None:
    daemon = start(grace_s=0.2)
    async with peer(daemon) as other:
        host = Host(other)
        await host.register("slow")
        async with peer(daemon) as caller:
            caller.start("tools.call", {"tool": "slow", "idempotency_key": "once"})
            asked = await host.asked()
        assert (await host.told_to_stop())["request_id"] == asked.id
        async with peer(daemon) as caller:
            answer = await caller.call("tools.call", {"tool": "slow", "idempotency_key": "once"})
            assert answer["status"] == "cancelled"
            assert "nobody waits for it" in answer["error"]


async def test_an_invocation_whose_connection_is_gone_is_cancelled_after_the_grace_unless_it_is_polled(
    start: StartDaemon,
) -> None:
    daemon = start(grace_s=0.1)
    async with peer(daemon) as other, peer(daemon) as watching:
        host = Host(other)
        await host.register("slow")
        async with peer(daemon) as caller:
            polled_one = (await caller.call("tools.invoke", {"tool": "slow"}))["handle"]
            first = await host.asked()
            left_one = (await caller.call("tools.invoke", {"tool": "slow"}))["handle"]
            second = await host.asked()
            waiting = watching.start("tools.poll", {"handle": polled_one, "wait_ms": 30_000})
            await daemon.until("requests_in_flight", 1)  # so it is there when the grace begins, however long that takes
        assert (await host.told_to_stop())["request_id"] == second.id
        assert (await watching.call("tools.status", {"handle": left_one}))["status"] == "cancelled"
        assert (await watching.call("tools.status", {"handle": polled_one}))["status"] == "running"
        await first.answer("still there")
        assert (await waiting)["status"] == "succeeded"


async def test_a_key_whose_handle_is_gone_is_a_conflict_and_nothing_runs_again(start: StartDaemon) -> None:
    daemon = start()
    params = {"tool": "pay", "parameters": {"to": "me"}, "idempotency_key": "once"}
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("pay")
        handles = {}
        for method in ("tools.invoke", "tools.call"):
            called = caller.start(method, params)
            await (await host.asked()).answer("paid")
            handles[method] = (await called)["handle"]
        await until_ended(caller, handles["tools.invoke"])
        for _ in range(3):
            await polled(caller, handles["tools.invoke"])
        with pytest.raises(Refused) as refused:
            await caller.call("tools.invoke", params)
        assert (refused.value.type, refused.value.data["reason"]) == ("conflict", "exists")
        assert refused.value.data["handle"] == handles["tools.invoke"]
    daemon.kill()
    daemon.start()
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("pay")
        for method, handle in handles.items():
            with pytest.raises(Refused) as refused:
                await caller.call(method, params)
            assert (refused.value.data["reason"], refused.value.data["handle"]) == ("exists", handle)
            with pytest.raises(Refused) as refused:
                await caller.call(method, {**params, "timeout_ms": 5})
            assert refused.value.data["reason"] == "key_reused"
        figures = await asyncio.to_thread(daemon.metrics)
        assert figures["handles_started"] == 0


async def test_a_key_is_free_again_after_its_time(start: StartDaemon) -> None:
    daemon = start(tool_key_s=0.3, finished_handles=1)
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("pay")
        handles = []
        for params in ({"idempotency_key": "once"}, {}):  # the second crowds out the first
            handles.append((await caller.call("tools.invoke", {"tool": "pay", **params}))["handle"])
            await (await host.asked()).answer()
            await until_ended(caller, handles[-1])
        while len(handles) == 2:
            answer = await caller.request(
                {"method": "tools.invoke", "params": {"tool": "pay", "idempotency_key": "once"}}
            )
            if "error" in answer:
                assert answer["error"]["data"]["reason"] == "exists"
                await asyncio.sleep(0.02)
            else:
                handles.append(answer["result"]["handle"])
        assert handles[0] != handles[2]
        await (await host.asked()).answer()


async def test_a_reused_refusal_keeps_no_key(daemon: Daemon) -> None:
    params = {"tool": "late", "idempotency_key": "once"}
    async with peer(daemon) as caller, peer(daemon) as other:
        with pytest.raises(Refused, match="unknown tool"):
            await caller.call("tools.call", params)
        run = await caller.create()
        await caller.call("runs.fail", {"run_id": run["id"], "error": "no budget"})
        host = Host(other)
        await host.register("late")
        with pytest.raises(Refused) as refused:
            await caller.call("tools.call", {**params, "run_id": run["id"]})
        assert refused.value.data["reason"] == "run_terminal"
        called = caller.start("tools.call", params)
        await (await host.asked()).answer("now")
        assert (await called)["result"] == "now"
