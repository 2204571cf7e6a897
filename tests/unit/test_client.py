"""The client, against a real socket."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import pytest
from msgspec import Raw

from carserver.client import (
    CallError,
    CallTimeout,
    ClientError,
    Connection,
    ConnectionLost,
    NotAuthorised,
    Pauses,
    TraceClosed,
    Traced,
    TraceReset,
    Unreachable,
    open_connection,
)
from carserver.client.trace import trace
from carserver.protocol.errors import conflict, unavailable
from carserver.protocol.runs import Cancelled
from tests.unit.fakedaemon import (
    PATIENCE_S,
    FakeDaemon,
    Session,
    Unanswered,
    snapshot,
    trace_ended,
    trace_event,
    trace_started,
)


def go(test: Coroutine[Any, Any, None]) -> None:
    """Runs an asynchronous test, in asyncio's debug mode, for no longer than it may take."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded(), debug=True)


def silence(session: Session, params: Any) -> Any:
    raise Unanswered


# ------------------------------------------------------------------------------------------------------ connections


def test_a_call_returns_the_result_decoded_or_typed_or_as_it_came() -> None:
    async def test() -> None:
        with FakeDaemon({"m": lambda _, params: params, "c": {"cancelled": True, "status": "cancelled"}}) as daemon:
            async with open_connection(daemon.url) as car:
                assert await car.call("m", {"a": [1, None]}) == {"a": [1, None]}
                assert await car.call("m", [2**70]) == [2**70]
                assert await car.call("m") is None
                assert bytes(await car.call("m", Raw(b'{"n":1}'), result_type=Raw)) == b'{"n":1}'
                assert (await car.call("c", result_type=Cancelled)).cancelled is True
                with pytest.raises(ClientError, match="the answer to m is not what"):
                    await car.call("m", result_type=Cancelled)
            assert ("m", None) in daemon.calls

    go(test())


def test_calls_run_concurrently_and_each_gets_its_own_answer() -> None:
    async def test() -> None:
        with FakeDaemon({"m": lambda _, params: params}) as daemon:
            async with open_connection(daemon.url) as car:
                assert await asyncio.gather(*(car.call("m", [n]) for n in range(50))) == [[n] for n in range(50)]

    go(test())


def test_an_error_of_the_daemon_is_raised_with_its_type_and_data() -> None:
    def refuse(session: Session, params: Any) -> Any:
        raise conflict("exists", "there is one")

    async def test() -> None:
        with FakeDaemon({"m": refuse}) as daemon:
            async with open_connection(daemon.url) as car:
                with pytest.raises(CallError, match="there is one") as caught:
                    await car.call("m")
        error = caught.value
        assert (error.code, error.type, error.data["reason"], error.passing) == (-32011, "conflict", "exists", False)

    go(test())


def test_an_error_without_an_id_ends_the_calls_under_way() -> None:
    def unread(session: Session, params: Any) -> Any:
        session.send('{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"not JSON"}}')
        raise Unanswered

    async def test() -> None:
        with FakeDaemon({"m": unread}) as daemon:
            async with open_connection(daemon.url) as car:
                with pytest.raises(CallError, match="not JSON"):
                    await car.call("m")

    go(test())


def test_a_call_without_an_answer_times_out_and_the_connection_lives_on() -> None:
    async def test() -> None:
        with FakeDaemon({"silent": silence, "m": 1}) as daemon:
            async with open_connection(daemon.url) as car:
                with pytest.raises(CallTimeout, match=r"silent was not answered within 0.01 s"):
                    await car.call("silent", timeout=0.01)
                assert await car.call("m") == 1

    go(test())


def test_the_token_goes_into_the_upgrade_and_a_wrong_one_is_not_authorised() -> None:
    async def test() -> None:
        with FakeDaemon({"m": 1}, token="a b.right") as daemon:
            async with open_connection(daemon.url, "a b.right") as car:
                await car.call("m")
            for wrong in ("wrong-one", None, "bad\r\nHeader: x"):
                with pytest.raises(NotAuthorised) as caught:
                    async with open_connection(daemon.url, wrong):
                        pass
                assert not wrong or wrong not in str(caught.value)

    go(test())


def test_a_daemon_that_is_not_there_or_refuses_is_unreachable() -> None:
    async def test() -> None:
        with socket.socket() as deaf, FakeDaemon() as daemon:
            deaf.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens
            port = deaf.getsockname()[1]
            daemon.pages["/"] = (421, "this Host is not known here")
            for url, message in [
                (f"ws://127.0.0.1:{port}", "connection refused; is the daemon running"),
                (daemon.url, "421: this Host is not known here"),
                ("http://127.0.0.1:1", "is no WebSocket address"),
                ("ws://user:secret@127.0.0.1:1", "user part"),
            ]:
                with pytest.raises(Unreachable, match=message) as caught:
                    async with open_connection(url):
                        pass
                assert "secret" not in str(caught.value)

    go(test())


def test_a_listener_that_never_answers_is_unreachable_after_the_timeout() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            url = f"ws://127.0.0.1:{mute.getsockname()[1]}"
            with pytest.raises(Unreachable, match=r"did not answer within 0.05 s"):
                async with open_connection(url, open_timeout=0.05):
                    pass

    go(test())


def test_a_lost_connection_ends_every_pending_call_and_the_notifications() -> None:
    def leave(session: Session, params: Any) -> Any:
        session.notify("last", {})
        session.close(1012, "restarting")
        raise Unanswered

    async def test() -> None:
        with FakeDaemon({"silent": silence, "leave": leave}) as daemon:
            async with open_connection(daemon.url) as car:
                calls = [asyncio.create_task(car.call(method)) for method in ("silent", "silent", "leave")]
                for outcome in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(outcome, ConnectionLost)
                    assert (outcome.code, outcome.reason, outcome.passing) == (1012, "restarting", True)
                notifications = car.notifications()
                assert (await anext(notifications)).method == "last", "what came before the end is not lost"
                with pytest.raises(ConnectionLost, match="1012"):
                    await anext(notifications)
                with pytest.raises(ConnectionLost):
                    await car.call("silent")

    go(test())


def test_closing_ends_pending_calls_and_ends_the_notifications_quietly() -> None:
    async def test() -> None:
        with FakeDaemon({"silent": silence, "m": 1}) as daemon:
            async with open_connection(daemon.url) as car:
                call = asyncio.create_task(car.call("silent"))
                assert await car.call("m") == 1
            with pytest.raises(ConnectionLost, match="closed by this side"):
                await call
            assert [n async for n in car.notifications()] == []

    go(test())


def test_what_is_not_json_rpc_ends_the_connection() -> None:
    def babble(session: Session, params: Any) -> Any:
        session.send(params[0])
        raise Unanswered

    async def test() -> None:
        with FakeDaemon({"m": babble}) as daemon:
            for text in ("{", "[]", '{"jsonrpc":"2.0"}', "[" * 5_000):
                async with open_connection(daemon.url) as car:
                    with pytest.raises(ConnectionLost, match="does not speak JSON-RPC"):
                        await car.call("m", [text])

    go(test())


def test_a_request_of_the_daemon_is_declined_with_its_own_id() -> None:
    def ask(session: Session, params: Any) -> Any:
        session.send('{"jsonrpc":"2.0","id":"q-1","method":"tools.execute","params":{}}')
        return None

    async def test() -> None:
        with FakeDaemon({"m": ask}) as daemon:
            async with open_connection(daemon.url) as car:
                await car.call("m")
                assert await asyncio.to_thread(daemon.replied.wait, PATIENCE_S)
            assert daemon.frames[0]["id"] == "q-1"
            assert daemon.frames[0]["error"]["code"] == -32601

    go(test())


def test_notifications_come_in_order_and_a_connection_may_throw_them_away() -> None:
    def burst(session: Session, params: Any) -> Any:
        for number in range(100):
            session.notify("n", number)
        return None

    async def test() -> None:
        with FakeDaemon({"m": burst}) as daemon:
            async with open_connection(daemon.url) as car:
                await car.call("m")
                async with aclosing(car.notifications()) as notifications:
                    taken = [int(bytes((await anext(notifications)).params)) for _ in range(100)]
                assert taken == list(range(100))
            async with open_connection(daemon.url, notifications=0) as car:
                await car.call("m")
                assert not car._notifications

    go(test())


def test_a_full_queue_stops_the_reading_until_somebody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = asyncio.Event()
    keep = Connection._keep

    async def watched(self: Connection, notification: Any) -> None:
        if len(self._notifications) >= self._limit:
            paused.set()
        await keep(self, notification)

    monkeypatch.setattr(Connection, "_keep", watched)

    def burst(session: Session, params: Any) -> Any:
        def send_all() -> None:
            for number in range(50):
                session.notify("n", number)

        session.later(send_all)
        return None

    async def test() -> None:
        with FakeDaemon({"m": burst}) as daemon:
            async with open_connection(daemon.url, notifications=4) as car:
                await car.call("m")
                await paused.wait()
                assert len(car._notifications) == 4
                async with aclosing(car.notifications()) as notifications:
                    assert [int(bytes((await anext(notifications)).params)) for _ in range(50)] == list(range(50))

    go(test())


def test_a_call_gets_its_answer_from_behind_more_notifications_than_the_queue_holds() -> None:
    def burst(session: Session, params: Any) -> Any:
        for number in range(30):
            session.notify("n", number)
        return "behind"

    async def test() -> None:
        with FakeDaemon({"m": burst}) as daemon:
            async with open_connection(daemon.url, notifications=4) as car:
                assert await car.call("m") == "behind"

    go(test())


def test_a_token_is_not_logged_even_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def test() -> None:
        with FakeDaemon({"m": 1}) as daemon:
            async with open_connection(daemon.url, "token-8675309") as car:
                await car.call("m")

    go(test())
    client_side = [record for record in caplog.records if "server" not in record.name]
    assert not [record for record in client_side if "token-8675309" in record.getMessage()]


# ------------------------------------------------------------------------------------------------------- the trace

Opener = Callable[[], AbstractAsyncContextManager[Connection]]


class Log:
    """A run's log, served as the contract says, in as many pieces as there are connections to be lost."""

    def __init__(self, pieces: list[int], epoch: str = "e1") -> None:
        self.events = sum(pieces)
        self.epoch = epoch
        self._pieces = iter(pieces)

    def subscribe(self, session: Session, params: Any) -> Any:
        recovered = params.get("epoch") == self.epoch
        cursor = params["cursor"] if recovered else 0
        session.later(lambda: self._stream(session, cursor))
        return {"run": snapshot(), "cursor": cursor, "epoch": self.epoch, "recovered": recovered}

    def _stream(self, session: Session, cursor: int) -> None:
        if cursor == 0:
            session.notify("runs.trace.event", trace_started())
        session.notify("runs.trace.event", trace_event(99, {"type": "x"}, run_id="another"))
        session.notify("runs.changed", {})
        end = cursor + next(self._pieces)
        for sequence in range(cursor, end):
            session.notify("runs.trace.event", trace_event(sequence, {"type": "x", "n": sequence}))
        if end == self.events:
            session.notify("runs.trace.event", trace_ended(end))
        else:
            session.close(1012)


def opener(url: str) -> Opener:
    return lambda: open_connection(url)


async def collect(records: AsyncIterator[Traced]) -> list[tuple[str, int]]:
    return [(record.kind, record.cursor) async for record in records]


def expected(first: int, last: int) -> list[tuple[str, int]]:
    return [("event", cursor) for cursor in range(first, last + 1)]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are too short to notice."""
    counted = Pauses.__init__

    def hurry(self: Pauses, total_s: float, **_: float) -> None:
        counted(self, total_s, first_s=0.001, longest_s=0.01)

    monkeypatch.setattr(Pauses, "__init__", hurry)


def test_a_trace_goes_on_through_lost_connections_without_gap_or_duplicate_to_the_end() -> None:
    async def test() -> None:
        log = Log([0, 3, 0, 4])
        with FakeDaemon({"runs.trace.subscribe": log.subscribe}) as daemon:
            records = await collect(trace(opener(daemon.url), "run-1"))
            assert records == [("started", 0), *expected(1, 7), ("ended", 7)]
            asked = [(p["cursor"], p.get("epoch")) for p in daemon.params_of("runs.trace.subscribe")]
            assert asked == [(0, None), (0, "e1"), (3, "e1"), (3, "e1")]

    go(test())


def test_a_trace_begins_at_the_cursor_that_it_is_given() -> None:
    async def test() -> None:
        with FakeDaemon({"runs.trace.subscribe": Log([3, 4]).subscribe}) as daemon:
            first = trace(opener(daemon.url), "run-1")
            async with aclosing(first):
                seen = [await anext(first) for _ in range(4)]
            assert (seen[-1].cursor, seen[-1].epoch) == (3, "e1")
            assert seen[-1].record["event"] == {"type": "x", "n": 2}
            assert b'"sequence":2' in bytes(seen[-1].raw)
            rest = await collect(trace(opener(daemon.url), "run-1", cursor=3, epoch="e1"))
            assert rest == [*expected(4, 7), ("ended", 7)]

    go(test())


def test_another_log_in_the_place_of_the_one_that_was_read_is_announced() -> None:
    async def test() -> None:
        log = Log([3, 4])
        with FakeDaemon({"runs.trace.subscribe": log.subscribe}) as daemon:
            records = trace(opener(daemon.url), "run-1")
            assert [(await anext(records)).cursor for _ in range(4)] == [0, 1, 2, 3]
            log.epoch = "e2"
            with pytest.raises(TraceReset, match="begin again"):
                await anext(records)

    go(test())


def test_a_closed_trace_says_why() -> None:
    def subscribe(session: Session, params: Any) -> Any:
        session.later(lambda: session.notify("runs.trace.closed", {"run_id": "run-1", "reason": "deleted"}))
        return {"run": snapshot(), "cursor": 0, "epoch": "e1", "recovered": False}

    async def test() -> None:
        with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon, pytest.raises(TraceClosed, match="deleted"):
            await collect(trace(opener(daemon.url), "run-1"))

    go(test())


def test_a_trace_waits_for_a_daemon_that_drains_and_one_that_is_away() -> None:
    refusals = itertools.count()
    log = Log([2, 2])

    def subscribe(session: Session, params: Any) -> Any:
        if params["cursor"] == 2 and next(refusals) < 2:
            raise unavailable("draining")
        return log.subscribe(session, params)

    async def test() -> None:
        with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon:
            attempts = itertools.count()

            @asynccontextmanager
            async def flaky() -> AsyncIterator[Connection]:
                if next(attempts) == 1:
                    raise Unreachable("away")
                async with open_connection(daemon.url) as car:
                    yield car

            records = await collect(trace(flaky, "run-1"))
            assert records == [("started", 0), *expected(1, 4), ("ended", 4)]

    go(test())


def test_a_trace_does_not_wait_for_what_cannot_become_better() -> None:
    def subscribe(session: Session, params: Any) -> Any:
        session.later(lambda: session.close(1008, "too many"))
        return {"run": snapshot(), "cursor": 0, "epoch": "e1", "recovered": False}

    async def test() -> None:
        with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon:
            with pytest.raises(ConnectionLost, match="1008: too many"):
                await collect(trace(opener(daemon.url), "run-1"))
            daemon.answers.clear()
            with pytest.raises(CallError, match="runs"):
                await collect(trace(opener(daemon.url), "run-1"))
            assert len(daemon.params_of("runs.trace.subscribe")) == 2

    go(test())


def test_the_patience_of_a_trace_ends() -> None:
    def subscribe(session: Session, params: Any) -> Any:
        session.later(lambda: session.close(1012))
        return {"run": snapshot(), "cursor": 0, "epoch": "e1", "recovered": True}

    async def test() -> None:
        with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon, pytest.raises(ConnectionLost):
            await collect(trace(opener(daemon.url), "run-1", patience_s=0.02))

    go(test())


def test_pauses_grow_stay_within_what_is_left_and_begin_anew_after_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    pauses = Pauses(1.0)

    async def test() -> None:
        while await pauses.pause():
            pass
        assert sum(slept) == pytest.approx(1.0)
        assert slept[0] <= 0.001
        assert max(slept) <= 0.01
        pauses.reset()
        assert await pauses.pause(at_least_s=0.5)
        assert 0.5 < slept[-1] <= 0.501, "what was asked for, and a little that differs from client to client"

    asyncio.run(test())
