"""The rules of handles over sockets: seed 000's own tests, and what the contract has beyond it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Asked, Host, polled, until_ended
from tests.peer import Peer, Refused, peer


@asynccontextmanager
async def hosted(daemon: Daemon, *tools: str | dict[str, Any]) -> AsyncIterator[tuple[Peer, Host]]:
    """A caller, and the host of some tools on another connection."""
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register(*(tools or ("tail",)))
        yield caller, host


async def begun(caller: Peer, host: Host, tool: str = "tail", **params: Any) -> tuple[str, Asked]:
    """A handle, and the request that its host has got."""
    invoked = await caller.call("tools.invoke", {"tool": tool, **params})
    assert invoked["status"] == "running"
    return invoked["handle"], await host.asked()


async def status(caller: Peer, handle: str) -> Any:
    found = await caller.call("tools.status", {"handle": handle})
    return found and found["status"]


# The seed's own tests.


async def test_chunks_wait_in_order_and_a_poll_takes_them(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host, action_id="a1")
        await asked.text("one", "two")
        first = await polled(caller, handle, wait_ms=10_000)
        while len(first["chunks"]) < 2:
            first["chunks"] += (await polled(caller, handle, wait_ms=10_000))["chunks"]
        assert first == {
            "handle": handle,
            "tool": "tail",
            "action_id": "a1",
            "status": "running",
            "chunks": [{"kind": "text", "text": "one"}, {"kind": "text", "text": "two"}],
        }
        assert (await polled(caller, handle))["chunks"] == []


async def test_a_result_seals_success_late_chunks_are_ignored_and_the_third_poll_is_null(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        await asked.chunk({"kind": "done", "result": {"exit": 0}})
        await asked.text("late")
        await daemon.until("late_chunks", 1)
        first, second = await polled(caller, handle), await polled(caller, handle)
        assert first["status"] == second["status"] == "succeeded"
        assert first["chunks"] == [{"kind": "done", "result": {"exit": 0}}]
        assert second["chunks"] == []
        assert first["result"] == second["result"] == {"exit": 0}
        assert "error" not in first
        assert await polled(caller, handle) is None
        assert await status(caller, handle) is None


async def test_an_error_seals_failure(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        await asked.chunk({"kind": "error", "message": "no such file"})
        chunks, answer = await until_ended(caller, handle)
        assert chunks == [{"kind": "error", "message": "no such file"}]
        assert (answer["status"], answer["error"]) == ("failed", "no such file")
        assert "result" not in answer


async def test_a_cancel_of_a_known_handle_seals_it_tells_its_host_and_is_proved_by_the_answer(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host, action_id="a3")
        assert await caller.call("tools.cancel", {"handle": handle}) == {"cancelled": True, "cancel": "requested"}
        assert await status(caller, handle) == "cancelled"
        told = await host.told_to_stop()
        assert told == {"request_id": asked.id, "action_id": "a3", "reason": "cancelled by client"}
        waiting = caller.start("tools.cancel", {"handle": handle, "wait_ms": 10_000})
        await asked.chunk({"kind": "done"})
        await daemon.until("late_chunks", 1)
        assert await status(caller, handle) == "cancelled"
        assert not waiting.done()
        await asked.answer("stopped")
        assert await waiting == {"cancelled": True, "cancel": "confirmed"}
        chunks, answer = await until_ended(caller, handle)
        assert chunks == [{"kind": "error", "message": "cancelled by client"}]
        assert answer["status"] == "cancelled"
        assert await caller.call("tools.cancel", {"handle": handle}) == {"cancelled": True, "cancel": "confirmed"}


async def test_a_cancel_of_a_finished_handle_is_true_and_changes_nothing(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        await asked.answer(1)
        await until_ended(caller, handle)
        assert await caller.call("tools.cancel", {"handle": handle, "wait_ms": 10_000}) == {"cancelled": True}
        assert await status(caller, handle) == "succeeded"


async def test_a_cancel_of_an_unknown_handle_is_false(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        assert await caller.call("tools.cancel", {"handle": "nope", "wait_ms": 30_000}) == {"cancelled": False}
        assert await caller.call("tools.poll", {"handle": "nope", "wait_ms": 30_000}) is None
        assert await caller.call("tools.status", {"handle": "nope"}) is None


async def test_a_host_that_goes_without_a_last_chunk_fails_its_handles(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        async with peer(daemon) as other:
            host = Host(other)
            await host.register("flaky")
            handle, asked = await begun(caller, host, "flaky")
            await asked.text("partial")
            first = await polled(caller, handle, wait_ms=10_000, after=0)
            assert first["chunks"] == [{"kind": "text", "text": "partial"}]
        chunks, answer = await until_ended(caller, handle)
        assert [chunk["kind"] for chunk in chunks] == ["text", "error"]
        assert answer["status"] == "failed"
        assert "connection" in answer["error"]


async def test_the_live_stream_has_what_the_polls_have(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host), peer(daemon) as watching:
        assert await watching.call("tools.stream.subscribe", {}) == {"subscribed": True}
        handle, asked = await begun(caller, host)
        await asked.text("x")
        await asked.chunk({"kind": "progress", "fraction": 0.5, "message": "half"})
        await asked.answer([1])
        seen = [await watching.next("tools.stream.event") for _ in range(3)]
        chunks, _ = await until_ended(caller, handle)
        assert [event["chunk"] for event in seen] == chunks
        assert [(event["handle"], event["sequence"]) for event in seen] == [(handle, n) for n in range(3)]
        assert await watching.call("tools.stream.unsubscribe", {}) == {"removed": True}
        assert await watching.call("tools.stream.unsubscribe", {}) == {"removed": False}


# Beyond it.


async def test_a_handle_is_32_hex_characters_and_a_host_is_asked_by_another_name(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host, parameters={"q": 1.50}, action_id="c1", timeout_ms=50_000)
        assert len(handle) == 32
        assert set(handle) <= set("0123456789abcdef")
        assert asked.id != handle
        assert asked.params == {
            "request_id": asked.id,
            "tool": "tail",
            "parameters": {"q": 1.5},
            "action_id": "c1",
            "attempt": 1,
            "timeout_ms": 50_000,
            "session_id": asked.params["session_id"],
        }
        await asked.answer()
        _, answer = await until_ended(caller, handle)
        assert answer["status"] == "succeeded"
        assert "result" not in answer, "a null result is none"


@pytest.mark.parametrize(
    ("settings", "sent", "kept"),
    [
        pytest.param({}, 1_030, 1_024, id="1,024 chunks"),
        pytest.param({"handle_chunks": 3}, 10, 3, id="as many as are set"),
        pytest.param({"handle_bytes": 270}, 10, 10, id="the bytes that are set"),
    ],
)
async def test_chunks_that_nobody_takes_are_bounded_and_counted(
    start: StartDaemon, settings: dict[str, Any], sent: int, kept: int
) -> None:
    daemon = start(**settings)
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        for n in range(sent):
            await asked.text(str(n))
        await asked.answer()
        async with peer(daemon) as other:
            while (await other.call("tools.status", {"handle": handle}))["status"] == "running":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        answer = await polled(caller, handle)
        texts = [int(chunk["text"]) for chunk in answer["chunks"] if chunk["kind"] == "text"]
        assert len(answer["chunks"]) <= kept
        assert answer["chunks"][-1] == {"kind": "done"}
        assert answer["dropped_chunks"] + len(answer["chunks"]) == sent + 1
        assert texts == list(range(sent - len(texts), sent))
        assert "dropped_chunks" not in await polled(caller, handle)


async def test_a_poll_waits_for_the_first_news_and_no_longer_than_it_says(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        assert (await polled(caller, handle, wait_ms=1))["chunks"] == []
        waiting = caller.start("tools.poll", {"handle": handle, "wait_ms": 30_000})
        await caller.call("server.ping")
        assert not waiting.done()
        await asked.text("news")
        assert (await waiting)["chunks"] == [{"kind": "text", "text": "news"}]


async def test_with_after_a_lost_answer_loses_nothing_and_a_finished_handle_stays(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        for n in range(5):
            await asked.text(str(n))
        await asked.answer("all")
        chunks, answer = await until_ended(caller, handle)
        assert [chunk["kind"] for chunk in chunks] == ["text"] * 5 + ["done"]
        again = await polled(caller, handle, after=3)
        assert (again["first_sequence"], again["chunks"]) == (3, chunks[3:])
        for _ in range(4):
            assert (await polled(caller, handle, after=6))["result"] == answer["result"] == "all"
        with pytest.raises(Refused) as refused:
            await polled(caller, handle, after=7)
        assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", "after")


async def test_a_deadline_fails_the_handle_with_its_words_and_stops_its_host(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host, timeout_ms=50)
        chunks, answer = await until_ended(caller, handle)
        assert chunks == [{"kind": "error", "message": "deadline of 50 ms"}]
        assert (answer["status"], answer["error"]) == ("failed", "deadline of 50 ms")
        assert (await host.told_to_stop())["reason"] == "deadline of 50 ms"
        await asked.answer()
        assert await caller.call("tools.cancel", {"handle": handle, "wait_ms": 10_000}) == {
            "cancelled": True,
            "cancel": "confirmed",
        }


async def test_cancel_all_is_of_ones_own_live_handles(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host), peer(daemon, "host-token") as operator:
        mine = [(await begun(caller, host))[0] for _ in range(3)]
        finished, asked = await begun(caller, host)
        await asked.answer()
        await until_ended(caller, finished)
        theirs, _ = await begun(operator, host)
        assert await caller.call("tools.cancel_all") == {"cancelled": 3}
        assert [await status(caller, handle) for handle in mine] == ["cancelled"] * 3
        assert await status(caller, finished) == "succeeded"
        assert await status(operator, theirs) == "running"
        assert await caller.call("tools.cancel_all") == {"cancelled": 0}


async def test_live_handles_are_ones_own_and_everyones_for_the_host(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host), peer(daemon, "host-token") as operator:
        mine, asked = await begun(caller, host, action_id="a")
        theirs, _ = await begun(operator, host)
        listed = (await caller.call("tools.handles"))["handles"]
        assert [entry | {"started_at_ms": 0} for entry in listed] == [
            {"handle": mine, "tool": "tail", "action_id": "a", "status": "running", "started_at_ms": 0}
        ]
        assert [entry["handle"] for entry in (await operator.call("tools.handles"))["handles"]] == [theirs]
        everyones = (await operator.call("tools.handles", {"all": True}))["handles"]
        assert {(entry["handle"], entry["owner"]) for entry in everyones} == {(mine, "client"), (theirs, "host")}
        with pytest.raises(Refused, match="forbidden"):
            await caller.call("tools.handles", {"all": True})
        await asked.answer()
        await until_ended(caller, mine)
        assert (await caller.call("tools.handles"))["handles"] == []


async def test_what_another_principal_may_not_see_is_as_if_it_were_not_there(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host), peer(daemon, "host-token") as operator:
        theirs, asked = await begun(operator, host)
        await asked.text("secret")
        for method, params in (
            ("tools.poll", {"wait_ms": 30_000}),
            ("tools.status", {}),
            ("tools.cancel", {"wait_ms": 30_000}),
        ):
            unknown = await caller.call(method, {"handle": "0" * 32, **params})
            assert await caller.call(method, {"handle": theirs, **params}) == unknown
        assert await status(operator, theirs) == "running"


async def test_the_host_sees_everyones_takes_nothing_of_it_and_may_cancel_it(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host), peer(daemon, "host-token") as operator:
        handle, asked = await begun(caller, host)
        await asked.text("one")
        await polled(operator, handle, wait_ms=10_000)
        for _ in range(3):
            assert (await polled(operator, handle))["chunks"] == [{"kind": "text", "text": "one"}]
        assert (await polled(caller, handle))["chunks"] == [{"kind": "text", "text": "one"}]
        assert (await operator.call("tools.cancel", {"handle": handle}))["cancelled"] is True
        _, answer = (await polled(caller, handle)), await polled(caller, handle)
        assert (answer["status"], answer["error"]) == ("cancelled", "cancelled by host")


async def test_a_finished_handle_is_forgotten_after_its_time(start: StartDaemon) -> None:
    daemon = start(finished_s=0.2)
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        await asked.answer()
        await daemon.until("handles_crowded_out", 1)
        assert await status(caller, handle) is None
        assert await polled(caller, handle, after=0) is None


@pytest.mark.parametrize("bound", [{"finished_handles": 2}, {"finished_bytes": 5_000}])
async def test_of_too_many_finished_handles_the_oldest_go_first(start: StartDaemon, bound: dict[str, int]) -> None:
    daemon = start(**bound)
    async with hosted(daemon) as (caller, host):
        handles = []
        for _ in range(4):
            handle, asked = await begun(caller, host)
            await asked.text("x" * 1_000)
            await asked.answer()
            await until_ended(caller, handle)
            handles.append(handle)
        assert [await status(caller, handle) for handle in handles] == [None, None, "succeeded", "succeeded"]


async def test_a_principals_live_handles_are_bounded(start: StartDaemon) -> None:
    daemon = start(handles=2)
    async with (
        hosted(daemon) as (caller, host),
        hosted(daemon, "other") as (_, other),
        peer(daemon, "host-token") as operator,
    ):
        first, asked = await begun(caller, host)
        await begun(caller, host)
        with pytest.raises(Refused) as refused:
            await caller.call("tools.invoke", {"tool": "tail"})
        assert (refused.value.type, refused.value.data["limit"], refused.value.data["maximum"]) == (
            "limit_exceeded",
            "handles",
            2,
        )
        await begun(operator, other, "other")
        await asked.answer()
        await until_ended(caller, first)
        await begun(caller, host)


async def test_an_unknown_tool_is_not_found(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        for method in ("tools.invoke", "tools.call"):
            with pytest.raises(Refused, match="unknown tool 'nope'"):
                await caller.call(method, {"tool": "nope"})


async def test_long_text_is_split_and_a_large_data_chunk_fails_its_handle(daemon: Daemon) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        long = "né" * 50_000
        await asked.text(long)
        await asked.chunk({"kind": "data", "data": "x" * 70_000})
        chunks, answer = await until_ended(caller, handle)
        assert "".join(chunk.get("text", "") for chunk in chunks) == long
        assert all(len(chunk["text"].encode()) <= 65_536 for chunk in chunks[:-1])
        assert answer["status"] == "failed"
        assert "more than chunk_bytes allows (65536)" in answer["error"]
        assert chunks[-1] == {"kind": "error", "message": answer["error"]}
        assert (await host.told_to_stop())["request_id"] == asked.id


@pytest.mark.parametrize(
    ("chunk", "place"),
    [
        ({"kind": "txt", "text": "x"}, "chunk.kind"),
        ({"kind": "text"}, "chunk"),
        ({"kind": "progress", "fraction": 2}, "chunk.fraction"),
        ({"text": "x"}, "chunk"),
        ("text", "chunk"),
        (None, "chunk"),
    ],
)
async def test_a_chunk_that_is_none_fails_its_handle_and_says_why(daemon: Daemon, chunk: Any, place: str) -> None:
    async with hosted(daemon) as (caller, host):
        handle, asked = await begun(caller, host)
        await asked.chunk(chunk)
        chunks, answer = await until_ended(caller, handle)
        assert answer["status"] == "failed"
        assert place in answer["error"]
        assert len(chunks) == 1
