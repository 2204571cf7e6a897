"""What a car sends again, and what it does not."""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec import Raw
from websockets.exceptions import ConnectionClosedError

from carserver.client.car import Car
from carserver.client.errors import CallError, CallTimeout, ConnectionLost, NotAuthorised, Unreachable
from carserver.client.finding import Target
from carserver.client.pauses import Pauses
from carserver.protocol.errors import ErrorKind, RpcError, overloaded, unavailable
from tests.unit.fakedaemon import PATIENCE_S, FakeDaemon, Session, Unanswered, snapshot

HARMLESS = [
    ("runs.get", {"run_id": "r"}),
    ("runs.list", None),
    ("server.status", None),
    ("runs.create", {"prompt": "p", "idempotency_key": "k"}),
    ("runs.record", {"run_id": "r", "events": [], "batch_id": "b"}),
    ("tools.call", {"tool": "t", "idempotency_key": "k"}),
]
HARMFUL = [
    ("runs.create", {"prompt": "p"}),
    ("runs.create", {"prompt": "p", "idempotency_key": None}),
    ("runs.create", Raw(b'{"prompt":"p"}')),
    ("runs.record", {"run_id": "r", "events": []}),
    ("tools.invoke", {"tool": "t"}),
    ("unknown.to.us", {"idempotency_key": "k"}),
]
DEADLINE = RpcError(ErrorKind.DEADLINE_EXCEEDED, "storage took too long")


@asynccontextmanager
async def car_of(daemon: FakeDaemon, *, patience_s: float = PATIENCE_S) -> AsyncIterator[Car]:
    """One that does not wait long between attempts."""
    car = Car(lambda: Target(daemon.url, "a-token"), patience_s=patience_s)
    car.link._pauses = Pauses(math.inf, first_s=0.001, longest_s=0.01)
    async with car:
        yield car


def first_lost(code: int) -> Callable[[Session, Any], Any]:
    """The first request is taken, and the connection ends before its answer."""
    numbers = itertools.count()

    def answer(session: Session, params: Any) -> Any:
        if next(numbers) == 0:
            session.close(code)
            raise Unanswered
        return "done"

    return answer


def first_refused(*errors: RpcError) -> Callable[[Session, Any], Any]:
    left = list(errors)

    def answer(session: Session, params: Any) -> Any:
        if left:
            raise left.pop(0)
        return "done"

    return answer


@pytest.mark.parametrize(("method", "params"), HARMLESS)
@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013])
async def test_what_is_harmless_is_sent_again_on_the_next_connection(method: str, params: Any, code: int) -> None:
    with FakeDaemon({method: first_lost(code)}) as daemon:
        async with car_of(daemon) as car:
            assert await car.call(method, params) == "done"
        assert daemon.params_of(method) == [params, params]


@pytest.mark.parametrize(("method", "params"), HARMFUL)
async def test_what_may_have_been_done_is_not_sent_again_and_the_car_goes_on(method: str, params: Any) -> None:
    with FakeDaemon({method: first_lost(1012), "runs.get": 1}) as daemon:
        async with car_of(daemon) as car:
            with pytest.raises(ConnectionLost, match="1012"):
                await car.call(method, params)
            assert await car.call("runs.get", {"run_id": "r"}) == 1
        assert len(daemon.params_of(method)) == 1


async def test_the_caller_may_know_better() -> None:
    with FakeDaemon({"unknown": first_lost(1012), "runs.get": first_lost(1012)}) as daemon:
        async with car_of(daemon) as car:
            assert await car.call("unknown", again=True) == "done"
            with pytest.raises(ConnectionLost):
                await car.call("runs.get", {"run_id": "r"}, again=False)


@pytest.mark.parametrize("code", [1008, 1009])
async def test_what_ended_the_connection_by_itself_is_not_sent_again(code: int) -> None:
    with FakeDaemon({"runs.get": first_lost(code)}) as daemon:
        async with car_of(daemon) as car:
            with pytest.raises(ConnectionLost, match=str(code)):
                await car.call("runs.get", {"run_id": "r"})
        assert len(daemon.params_of("runs.get")) == 1


async def test_a_connection_that_only_sending_knows_to_be_lost_is_not_tried_again_and_again() -> None:
    tries = 0

    async def send(*_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        assert tries < 10, "nobody else gets a turn"
        raise ConnectionClosedError(None, None)

    with FakeDaemon({"runs.get": "done"}) as daemon:
        async with car_of(daemon) as car:
            websocket = (await car.link.connection())._websocket
            websocket.send = send  # type: ignore[method-assign]
            asyncio.get_running_loop().call_soon(websocket.transport.abort)
            assert await car.call("runs.get", {"run_id": "r"}) == "done"
    assert tries == 1


async def test_what_was_certainly_not_sent_goes_out_on_the_next_connection_whatever_it_is() -> None:
    with FakeDaemon({"leave": first_lost(1012), "m": "done"}) as daemon:
        async with car_of(daemon) as car:
            with pytest.raises(ConnectionLost):
                await car.call("leave")
            # The car's task has not had its turn since: the connection is lost, and still the car's.
            assert await car.call("m") == "done"
        assert len(daemon.params_of("m")) == 1


@pytest.mark.parametrize(("method", "params"), [HARMLESS[0], HARMFUL[0]])
async def test_a_daemon_that_says_later_is_asked_later(method: str, params: Any) -> None:
    refused = first_refused(overloaded("full", 1), unavailable("draining"), overloaded("full", 1))
    with FakeDaemon({method: refused}) as daemon:
        async with car_of(daemon) as car:
            assert await car.call(method, params) == "done"
        assert len(daemon.params_of(method)) == 4


@pytest.mark.parametrize("error", [unavailable("storage", outcome="unknown"), DEADLINE])
async def test_an_unknown_outcome_is_asked_again_only_where_that_is_harmless(error: RpcError) -> None:
    with FakeDaemon({"runs.create": first_refused(error, error)}) as daemon:
        async with car_of(daemon) as car:
            with pytest.raises(CallError, match="storage"):
                await car.call("runs.create", {"prompt": "p"})
            assert await car.call("runs.create", {"prompt": "p", "idempotency_key": "k"}) == "done"
        assert len(daemon.params_of("runs.create")) == 3


async def test_a_daemon_that_says_later_for_ever_is_told_of_when_the_patience_ends() -> None:
    def refuse(session: Session, params: Any) -> Any:
        raise overloaded("full", 10)

    with FakeDaemon({"m": refuse}) as daemon:
        async with car_of(daemon, patience_s=0.05) as car:
            with pytest.raises(CallError, match="full"):
                await car.call("m")
        assert 1 < len(daemon.params_of("m")) <= 6


async def test_other_errors_are_the_callers_at_once() -> None:
    refused = first_refused(RpcError(ErrorKind.NOT_FOUND, "unknown run 'r'"))
    with FakeDaemon({"runs.get": refused}) as daemon:
        async with car_of(daemon) as car:
            with pytest.raises(CallError, match="unknown run"):
                await car.call("runs.get", {"run_id": "r"})
        assert len(daemon.calls) == 1


async def test_a_timeout_is_for_all_of_it_the_wait_for_the_link_included() -> None:
    where: list[Exception] = []

    def silence(session: Session, params: Any) -> Any:
        raise Unanswered

    with FakeDaemon({"m": silence, "leave": first_lost(1012)}) as daemon:

        def find() -> Target:
            if where:
                raise where[0]
            return Target(daemon.url, "a-token")

        async with Car(find) as car:
            with pytest.raises(CallTimeout, match=r"m was not answered within 0.02 s"):
                await car.call("m", timeout=0.02)
            where.append(Unreachable("away"))
            with pytest.raises(ConnectionLost):
                await car.call("leave")
            with pytest.raises(CallTimeout, match=r"m was not answered within 0.02 s"):
                await car.call("m", timeout=0.02)


async def test_a_call_that_is_cancelled_while_it_waits_is_never_sent() -> None:
    where: list[Exception] = []
    with FakeDaemon({"m": 1, "n": 2, "leave": first_lost(1012)}) as daemon:

        def find() -> Target:
            if where:
                raise where[0]
            return Target(daemon.url, "a-token")

        car = Car(find)
        car.link._pauses = Pauses(math.inf, first_s=0.001, longest_s=0.01)
        async with car:
            where.append(Unreachable("away"))
            with pytest.raises(ConnectionLost):
                await car.call("leave")
            waiting = asyncio.create_task(car.call("m"))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            where.clear()
            assert await car.call("n") == 2
        assert not daemon.params_of("m")


async def test_a_beginning_without_a_daemon_says_why_at_once() -> None:
    with FakeDaemon(token="the-right-one") as daemon:
        with pytest.raises(NotAuthorised, match="does not accept this token"):
            async with car_of(daemon):
                pass
        daemon.pages["/"] = (421, "this Host is not known here")
        with pytest.raises(Unreachable, match="421: this Host is not known here"):
            async with car_of(daemon):
                pass


async def test_the_methods_of_the_daemon_are_typed_and_by_namespace() -> None:
    with FakeDaemon(
        {"runs.create": snapshot(), "server.ping": {"now_ms": 1}, "tools.list": {"tools": [], "count": 0}}
    ) as daemon:
        async with car_of(daemon) as car:
            assert (await car.runs.create("do it", idempotency_key="k")).prompt == "do it"
            assert (await car.tools.list()).count == 0
            assert (await car.server.ping()).now_ms == 1
        assert daemon.params_of("runs.create") == [{"prompt": "do it", "session_id": "", "idempotency_key": "k"}]
