"""`car.runs.trace` and its patience, against a fake daemon: a stream that is long in coming, and one that holds."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from carserver.client import CallError, Traced, Unreachable
from carserver.client.connection import Connection, open_connection
from carserver.client.pauses import Pauses
from carserver.client.runs import Runs
from carserver.protocol.errors import not_found, unavailable
from tests.unit.fakedaemon import FakeDaemon, Session, snapshot, trace_ended, trace_event, trace_started

Opener = Callable[[], AbstractAsyncContextManager[Connection]]


class Nobody:
    """Calls that a trace does not make."""

    async def call(self, method: str, params: Any, *, result_type: Any, again: bool) -> Any:
        raise AssertionError(method)


def runs(opener: Opener, patience_s: float = 10.0) -> Runs:
    return Runs(Nobody(), opener, patience_s)


def opener(url: str, away: int = 0) -> Opener:
    """Connections to `url`, after so many attempts at which there is nobody."""
    attempts = itertools.count()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Connection]:
        if next(attempts) < away:
            raise Unreachable("away")
        async with open_connection(url) as connection:
            yield connection

    return opened


async def shown(records: AsyncIterator[Traced]) -> list[tuple[str, int, str]]:
    return [(record.kind, record.cursor, record.epoch) async for record in records]


def subscribed(params: Any) -> dict[str, Any]:
    return {"run": snapshot(), "cursor": params["cursor"], "epoch": "e1", "recovered": params.get("epoch") == "e1"}


def whole(session: Session, params: Any) -> Any:
    """A run of one event, that is over."""

    def stream() -> None:
        session.notify("runs.trace.event", trace_started())
        session.notify("runs.trace.event", trace_event(0, {"type": "x"}))
        session.notify("runs.trace.event", trace_ended(1))

    session.later(stream)
    return subscribed(params)


WHOLE = [("started", 0, "e1"), ("event", 1, "e1"), ("ended", 1, "e1")]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are too short to notice."""
    counted = Pauses.__init__

    def hurry(self: Pauses, total_s: float, **_: float) -> None:
        counted(self, total_s, first_s=0.001, longest_s=0.01)

    monkeypatch.setattr(Pauses, "__init__", hurry)


async def test_a_trace_that_begins_while_the_daemon_is_away_or_drains_waits_for_it() -> None:
    refusals = itertools.count()

    def subscribe(session: Session, params: Any) -> Any:
        if next(refusals) < 2:
            raise unavailable("draining")
        return whole(session, params)

    with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon:
        assert await shown(runs(opener(daemon.url, away=3)).trace("run-1")) == WHOLE


async def test_a_trace_that_begins_waits_no_longer_than_its_patience_and_not_for_what_is_refused() -> None:
    with FakeDaemon() as daemon:
        with pytest.raises(Unreachable, match="away"):
            await shown(runs(opener(daemon.url, away=10**9), patience_s=0.02).trace("run-1"))

        def unknown(session: Session, params: Any) -> Any:
            raise not_found("run", params["run_id"])

        daemon.answers["runs.trace.subscribe"] = unknown
        with pytest.raises(CallError, match="unknown run 'run-1'"):
            await shown(runs(opener(daemon.url)).trace("run-1"))
        assert len(daemon.params_of("runs.trace.subscribe")) == 1


async def test_a_quiet_stream_that_held_for_a_while_does_not_use_up_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten restarts of the daemon, with nothing to tell in between: each of them is waited for as the first was."""
    monkeypatch.setattr("carserver.client.trace.STEADY_S", 0.0)
    losses = itertools.count()

    def subscribe(session: Session, params: Any) -> Any:
        if next(losses) < 10:
            session.later(lambda: session.close(1012))
            return subscribed(params)
        return whole(session, params)

    with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon:
        assert await shown(runs(opener(daemon.url), patience_s=0.0015).trace("run-1")) == WHOLE


async def test_a_trace_goes_on_from_the_position_that_another_one_ended_at() -> None:
    def rest(session: Session, params: Any) -> Any:
        session.later(lambda: session.notify("runs.trace.event", trace_ended(params["cursor"])))
        return subscribed(params)

    with FakeDaemon({"runs.trace.subscribe": rest}) as daemon:
        records = runs(opener(daemon.url)).trace("run-1", cursor=7, epoch="e1")
        assert await shown(records) == [("ended", 7, "e1")]
        assert daemon.params_of("runs.trace.subscribe") == [{"run_id": "run-1", "cursor": 7, "epoch": "e1"}]


async def test_a_trace_that_is_left_gives_its_connection_back() -> None:
    closed = asyncio.Event()
    with FakeDaemon({"runs.trace.subscribe": whole}) as daemon:

        @asynccontextmanager
        async def watched() -> AsyncIterator[Connection]:
            async with open_connection(daemon.url) as connection:
                try:
                    yield connection
                finally:
                    closed.set()

        records = runs(watched).trace("run-1")
        assert (await anext(records)).kind == "started"
        await records.aclose()
        assert closed.is_set()
