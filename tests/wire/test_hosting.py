"""Tools that connections host, over a socket: what a host is asked, what it may say, and that nothing is in the way."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from carserver.config import Settings
from tests.daemon import Daemon, running
from tests.peer import Peer, Refused, peer

AT_ONCE = Settings().waiting
MIB = 1024 * 1024
UNANSWERED_S = 0.2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    state = tmp_path_factory.mktemp("hosting") / "state"
    with running(state, kill_after_s=UNANSWERED_S / 2, unconfirmed_s=UNANSWERED_S / 2) as daemon:
        yield daemon


async def asked(host: Peer) -> dict[str, Any]:
    """The params of the next `tools.execute`, whose id is its request id."""
    message = json.loads(await host.next_frame())
    assert message["method"] == "tools.execute"
    params: dict[str, Any] = message["params"]
    assert params["request_id"] == message["id"]
    return params


async def say(host: Peer, **members: Any) -> None:
    await host.socket.send(json.dumps({"jsonrpc": "2.0", **members}))


async def stream(host: Peer, request_id: str, **chunk: Any) -> None:
    await say(host, method="tools.chunk", params={"request_id": request_id, "chunk": chunk})


async def invoke(client: Peer, tool: str, **params: Any) -> str:
    handle: str = (await client.call("tools.invoke", {"tool": tool, **params}))["handle"]
    return handle


async def ended(client: Peer, handle: str) -> dict[str, Any]:
    """The first poll that sees the end, with all chunks from the beginning."""
    while True:
        poll: dict[str, Any] = await client.call("tools.poll", {"handle": handle, "wait_ms": 5_000, "after": 0})
        if poll["status"] != "running":
            return poll


async def test_polls_that_wait_do_not_keep_the_daemon_from_reading_the_answer_they_wait_for(served: Daemon) -> None:
    async with peer(served) as client:
        await client.call("tools.register", [{"name": "polled"}])
        handle = await invoke(client, "polled")
        request = await asked(client)
        polls = [client.start("tools.poll", {"handle": handle, "wait_ms": 30_000, "after": 0}) for _ in range(AT_ONCE)]
        await served.until("requests_in_flight", AT_ONCE)
        with pytest.raises(Refused, match="overloaded"):
            await client.call("tools.poll", {"handle": handle, "wait_ms": 1, "after": 0})
        at_once = await client.call("tools.poll", {"handle": handle, "after": 0})
        assert (at_once["status"], at_once["chunks"]) == ("running", [])
        await say(client, id=request["request_id"], result="x")
        assert {poll["status"] for poll in await asyncio.gather(*polls)} == {"succeeded"}


async def test_large_parameters_and_results_pass_each_other_on_one_connection(served: Daemon) -> None:
    async with peer(served) as client:
        await client.call("tools.register", [{"name": "large"}])
        client_id = (await client.call("session.auth", {"token": served.token()}))["client_id"]
        large = "x" * (2 * MIB)
        for _ in range(3):
            call = client.start("tools.call", {"tool": "large", "parameters": {"x": large}})
            request = await asked(client)
            assert (request["parameters"], request["session_id"]) == ({"x": large}, client_id)
            await say(client, id=request["request_id"], result=large)
            called = await call
            assert (called["status"], called["result_ref"]["size"]) == ("succeeded", 2 * MIB + 2)


async def test_a_result_keeps_its_digits_and_loses_its_spaces(served: Daemon) -> None:
    async with peer(served) as client:
        await client.call("tools.register", [{"name": "digits"}])
        handle = await invoke(client, "digits")
        id_ = (await asked(client))["request_id"]
        result = '{"n": [1.50,\n 1180591620717411303424]}'
        await client.socket.send(f'{{"jsonrpc":"2.0","id":"{id_}","result":{result}}}')
        await ended(client, handle)
        poll = {"jsonrpc": "2.0", "id": "p", "method": "tools.poll", "params": {"handle": handle}}
        await client.socket.send(json.dumps(poll))
        assert b'"result":{"n":[1.50,1180591620717411303424]}' in await client.next_frame()


async def test_answers_may_come_in_a_batch(served: Daemon) -> None:
    async with peer(served) as client:
        await client.call("tools.register", [{"name": "batched"}])
        calls = [client.start("tools.call", {"tool": "batched"}) for _ in range(3)]
        ids = [(await asked(client))["request_id"] for _ in range(3)]
        error = {"code": 1, "message": "it broke"}
        replies = [{"id": ids[2], "result": 2}, {"id": ids[0], "error": error}, {"id": ids[1]}]
        await client.socket.send(json.dumps([{"jsonrpc": "2.0", **reply} for reply in replies]))
        first, second, third = await asyncio.gather(*calls)
        assert (first["status"], first["error"]) == ("failed", "it broke")
        assert (second["status"], second["error"]) == ("failed", "the answer has neither result nor error")
        assert (third["status"], third["result"]) == ("succeeded", 2)
        assert client.pushed.empty(), "an answer is not answered"


async def test_ten_thousand_chunks_in_a_row_come_before_the_answer(served: Daemon) -> None:
    async with peer(served) as client:
        await client.call("tools.register", [{"name": "chatty"}])
        handle = await invoke(client, "chatty")
        id_ = (await asked(client))["request_id"]
        for _ in range(10_000):
            await stream(client, id_, kind="text", text="line\n")
        await say(client, id=id_, result=None)
        seen = 0
        while True:
            poll = await client.call("tools.poll", {"handle": handle, "wait_ms": 5_000})
            seen += len(poll["chunks"]) + poll.get("dropped_chunks", 0)
            if poll["status"] != "running":
                break
        assert (seen, poll["chunks"][-1]) == (10_001, {"kind": "done"})
        late = {"request_id": id_, "chunk": {"kind": "text", "text": "late"}}
        assert await client.call("tools.chunk", late) == {"taken": False}


async def test_what_another_connection_says_of_a_request_is_counted_and_ignored(served: Daemon) -> None:
    async with peer(served) as host, peer(served) as other:
        await host.call("tools.register", [{"name": "mine"}])
        before = served.metrics()
        call = other.start("tools.call", {"tool": "mine"})
        id_ = (await asked(host))["request_id"]
        await stream(other, id_, kind="done", result="a lie")
        await say(other, id=id_, result="another lie")
        assert await other.call("tools.chunk", [id_, {"kind": "text", "text": "a lie"}]) == {"taken": False}
        await say(host, id=id_, result="the truth")
        assert (await call)["result"] == "the truth"
        after = served.metrics()
        assert after["stray_chunks"] == before["stray_chunks"] + 2
        assert after["stray_replies"] == before["stray_replies"] + 1


async def test_a_cancel_that_the_host_does_not_answer_is_unconfirmed_and_its_answer_a_stray(served: Daemon) -> None:
    async with peer(served) as client, peer(served) as host:
        await host.call("tools.register", [{"name": "deaf"}])
        handle = await invoke(client, "deaf")
        id_ = (await asked(host))["request_id"]
        cancelled = await client.call("tools.cancel", {"handle": handle, "wait_ms": 10_000})
        assert cancelled == {"cancelled": True, "cancel": "unconfirmed"}
        before = served.metrics()["stray_replies"]
        await say(host, id=id_, result="too late")
        await host.call("server.ping")
        assert served.metrics()["stray_replies"] == before + 1
