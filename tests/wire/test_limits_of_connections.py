"""The limits of section 3 on connections, on what is under way on one, and on how long things take.

Where a refusal would be a lie, reading pauses: then the figure `reading_pauses` tells, and all is answered in the end.
"""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing

import pytest
from websockets.exceptions import InvalidStatus

from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.peer import Refused, peer
from tests.rawpeer import CLOSE, PING, PONG, TEXT, frame, raw_peer, raw_socket, request

MIB = 1024 * 1024
METHODS = ("--methods", "tests.methods_for_tests")
IN_TIME_S = 2.0  # for what a peer must do here: it is in this process, which may stand still for a while


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("limits") / "state", *METHODS, auth_s=60) as daemon:
        yield daemon


# Under way on one connection.


async def test_with_63_requests_under_way_the_next_is_answered_and_with_64_reading_pauses(served: Daemon) -> None:
    pauses = served.metrics()["reading_pauses"]
    async with peer(served) as client, peer(served) as other:
        held = [client.start("test.hold", {"name": "in flight"}) for _ in range(63)]
        assert await client.call("server.ping")
        assert served.metrics()["reading_pauses"] == pauses
        held.append(client.start("test.hold", {"name": "in flight"}))
        await asyncio.sleep(0)  # the 64 are on their way
        late = client.start("server.ping")
        await served.until("reading_pauses", pauses + 1)
        assert await other.call("server.ping")  # another connection is not held up
        assert not late.done()
        await other.call("test.release", {"name": "in flight"})
        assert await asyncio.gather(*held) == ["in flight"] * 64
        assert (await late)["now_ms"]


async def test_64_requests_may_wait_on_someone_and_the_65th_is_overloaded_while_short_ones_go_on(
    served: Daemon,
) -> None:
    overloads = served.metrics()["overloads"]
    async with peer(served) as client:
        waiting = [client.start("test.wait", {"name": "waiting"}) for _ in range(64)]
        await client.call("server.ping")  # so that what follows is sent after them
        with pytest.raises(Refused) as refused:
            await client.call("test.wait", {"name": "waiting"})
        assert refused.value.error["code"] == -32013
        assert refused.value.data == {"type": "overloaded", "retry_after_ms": 1_000}
        assert "waiting" in refused.value.error["message"]
        assert await client.call("server.ping")
        assert not any(task.done() for task in waiting)
        await client.call("test.release", {"name": "waiting"})
        assert await asyncio.gather(*waiting) == ["waiting"] * 64
        assert await client.call("test.wait", {"name": "waiting"}) == "waiting"  # there is room again
    assert served.metrics()["overloads"] == overloads + 1


async def test_reading_pauses_while_an_outbox_is_full_and_all_is_answered_once_the_peer_reads(served: Daemon) -> None:
    calls, size = 60, 100_000
    before = served.metrics()
    async with raw_peer(served, receive_buffer=4_096) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket, so a transport that reads
        for n in range(calls):
            client.send_call(n, "test.bytes", {"size": size})
        await served.until("reading_pauses", before["reading_pauses"] + 1)
        figures = served.metrics()
        # The outbox, and the write buffer: up to its mark, and one write beyond it. Each with one frame more.
        assert 0 < figures["outbox_largest_bytes"] <= MIB + 2 * 256 * 1024 + 2 * (size + 100)
        assert figures["requests"] - before["requests"] < calls
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answers = [await client.message() for _ in range(calls)]
        assert [(answer["id"], len(answer["result"])) for answer in answers] == [(n, size - 2) for n in range(calls)]


async def test_a_peer_that_does_not_read_is_aborted_after_the_write_timeout(start: StartDaemon) -> None:
    daemon = start(*METHODS, write_s=0.3)
    async with raw_peer(daemon, receive_buffer=4_096) as stalled, peer(daemon) as other:
        stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for n in range(20):
            stalled.send_call(n, "test.bytes", {"size": 100_000})
        await daemon.until("write_timeouts", 1)
        assert await other.call("server.ping")
        assert (await other.call("server.status"))["counts"]["connections"] == 1
        assert daemon.metrics()["outbox_bytes"] == 0


async def test_a_connection_has_so_many_subscriptions_and_may_renew_and_exchange_them(start: StartDaemon) -> None:
    async with peer(start(subscriptions=3)) as client:
        runs = [(await client.create())["id"] for _ in range(4)]
        for run_id in (*runs[:3], runs[0]):
            await client.call("runs.trace.subscribe", {"run_id": run_id})
        with pytest.raises(Refused) as refused:
            await client.call("runs.trace.subscribe", {"run_id": runs[3]})
        assert refused.value.data == {"type": "limit_exceeded", "limit": "subscriptions", "value": 4, "maximum": 3}
        assert (await client.call("server.status"))["counts"]["subscriptions"] == 3
        await client.call("runs.trace.unsubscribe", {"run_id": runs[1]})
        await client.call("runs.trace.subscribe", {"run_id": runs[3]})


# Storage.


async def test_what_storage_does_not_answer_in_time_has_an_unknown_outcome_and_what_is_too_much_is_refused(
    start: StartDaemon,
) -> None:
    daemon = start(storage_s=1.5, write_queue=2, durability="normal")  # so that no disk is waited for
    async with peer(daemon) as client:
        await client.create()
        with closing(sqlite3.connect(daemon.state / "carserver.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # the writer waits for this
            slow = [client.start("runs.create", {"prompt": "slow", "session_id": "slow"}) for _ in range(2)]
            await client.call("server.ping")
            with pytest.raises(Refused) as refused:
                await client.create("too many", session_id="slow")
            assert refused.value.data == {"type": "overloaded", "retry_after_ms": 1_000}
            for task in slow:
                with pytest.raises(Refused) as refused:
                    await task
                assert (refused.value.error["code"], refused.value.type) == (-32004, "deadline_exceeded")
            assert (await client.call("server.ping"))["now_ms"]
            other.execute("ROLLBACK")
        await daemon.until("commands", 3)
        assert daemon.metrics()["storage_deadlines"] == 2
        # "Unknown" was right: both were stored after all.
        assert len((await client.call("runs.list", {"session_id": "slow"}))["runs"]) == 2
        assert await client.create("again")


# Connections.


async def test_there_is_room_for_so_many_connections_and_the_probes_beside_them(start: StartDaemon) -> None:
    daemon = start(connections=3)
    async with peer(daemon), peer(daemon):
        async with peer(daemon) as third:
            with pytest.raises(InvalidStatus) as refused:
                async with peer(daemon):
                    pass
            assert refused.value.response.status_code == 503
            assert b"connections (3)" in (refused.value.response.body or b"")
            assert refused.value.response.headers["Retry-After"] == "1"
            assert daemon.metrics()["handshakes_refused"] == 1
            assert await third.call("server.ping")
        async with peer(daemon) as next_:
            assert await next_.call("server.ping")


async def test_64_connections_may_wait_for_authentication_and_the_65th_takes_the_place_of_the_oldest(
    served: Daemon,
) -> None:
    dropped = served.metrics()["unauthenticated_dropped"]
    async with AsyncExitStack() as stack:
        known = await stack.enter_async_context(peer(served))
        waiting = [await stack.enter_async_context(peer(served, None)) for _ in range(64)]
        assert served.metrics()["connections_unauthenticated"] == 64
        assert served.metrics()["unauthenticated_dropped"] == dropped
        waiting.append(await stack.enter_async_context(peer(served, None)))
        code, reason = await waiting[0].closed()
        assert code == 1013
        assert "unauthenticated (64)" in (reason or "")
        auth = {"token": served.token()}
        await waiting[1].call("session.auth", auth)  # it waits no more, so there is room for one
        waiting.append(await stack.enter_async_context(peer(served, None)))
        for client in waiting[2:]:
            assert (await client.call("session.auth", auth))["ok"]
        assert await known.call("server.ping")
    assert served.metrics()["unauthenticated_dropped"] == dropped + 1


# Time.


async def test_who_does_not_finish_the_opening_handshake_in_time_is_dropped(start: StartDaemon) -> None:
    daemon = start(handshake_s=IN_TIME_S)
    said = (b"", b"GET / HTTP/1.1\r\n", request()[:-2])
    async with peer(daemon) as early, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(raw_socket(daemon)) for _ in said]
        for client, words in zip(slow, said, strict=True):
            client.send(words)
        assert [await client.rest() for client in slow] == [b""] * len(said)
        assert daemon.metrics()["handshakes_refused"] == len(said)
        assert await early.call("server.ping")


async def test_who_does_not_authenticate_in_time_is_closed_and_who_does_stays(start: StartDaemon) -> None:
    daemon = start(auth_s=IN_TIME_S)
    async with peer(daemon, None) as good, peer(daemon, None) as late:
        await good.call("session.auth", {"token": daemon.token()})
        assert await late.closed() == (1008, f"not authenticated within auth_s ({IN_TIME_S:g})")
        assert await good.call("server.ping")
        assert daemon.metrics()["unauthenticated_dropped"] == 1


async def test_who_does_not_answer_a_ping_is_closed_and_who_does_stays(start: StartDaemon) -> None:
    daemon = start(ping_s=0.2, pong_s=IN_TIME_S)
    async with peer(daemon) as good, raw_peer(daemon) as silent:
        assert await silent.frame() == (PING, b"")
        closed = await silent.frame()
        assert (closed.opcode, closed.code) == (CLOSE, 1011)
        assert closed.reason == f"no answer to a ping within pong_s ({IN_TIME_S:g})"
        assert daemon.metrics()["ping_timeouts"] == 1
        assert await good.call("server.ping")  # the library has answered its pings meanwhile


async def test_any_message_counts_as_the_answer_to_a_ping(start: StartDaemon) -> None:
    daemon = start(ping_s=0.2, pong_s=IN_TIME_S)

    async def pinged_again(answer: bytes) -> bool:
        """Whether who answers its first ping like this has another one, and is not closed."""
        async with raw_peer(daemon) as client:
            assert await client.frame() == (PING, b"")
            client.send(answer)
            while (got := await client.frame()).opcode not in (PING, CLOSE):
                pass
            return got.opcode == PING

    answers = (frame(PONG, b""), frame(TEXT, b"no JSON"), frame(PING, b"x"), b"")
    assert await asyncio.gather(*map(pinged_again, answers)) == [True, True, True, False]


async def test_a_peer_is_not_pinged_before_it_is_authenticated(start: StartDaemon) -> None:
    daemon = start(ping_s=0.05, pong_s=0.05, auth_s=0.5)
    async with raw_peer(daemon, None) as client:
        assert (await client.frame()).code == 1008


async def test_the_ping_clock_stands_still_while_reading_pauses(start: StartDaemon) -> None:
    daemon = start(*METHODS, ping_s=IN_TIME_S, pong_s=0.1, in_flight=2)
    async with raw_peer(daemon) as client:
        for n in range(3):
            client.send_call(n, "test.hold", {"name": "clock"})
        await daemon.until("reading_pauses", 1)
        async with raw_peer(daemon) as younger:  # which is pinged, and closed, later than the other one would be
            assert (await younger.close_frame()).code == 1011
        assert daemon.metrics()["ping_timeouts"] == 1
        async with peer(daemon) as other:
            await other.call("test.release", {"name": "clock"})
        assert sorted([(await client.message())["id"] for _ in range(3)]) == [0, 1, 2]


async def test_a_batch_counts_each_of_its_calls_among_those_that_wait(served: Daemon) -> None:
    call = {"jsonrpc": "2.0", "method": "test.wait", "params": {"name": "batch"}}
    async with peer(served) as client:
        one = client.start("test.wait", {"name": "batch"})
        await client.call("server.ping")
        await client.socket.send(json.dumps([{**call, "id": f"b{n}"} for n in range(64)]))
        await client.call("test.release", {"name": "batch"})
        answers = json.loads(await client.next_frame())
        assert [answer["id"] for answer in answers if "error" in answer] == ["b63"]
        assert await one == "batch"
