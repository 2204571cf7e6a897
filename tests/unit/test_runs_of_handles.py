"""What the loop makes of handles' events and of runs that end: who attends, who is told, and who sees the events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from carserver.config import Settings
from carserver.core.commands import Cancel, Interrupt
from carserver.core.counters import Counters
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.runs import Entry, Event, Head
from carserver.core.runstore import RunStore
from carserver.core.transfer import Import
from carserver.protocol.errors import RpcError
from tests.unit.editing import delete, fail, imported
from tests.unit.handling import close_handle, open_handle
from tests.unit.storing import NOW_MS, Opened, create, event, opened, record, write_lock
from tests.unit.test_attendance import Peer

END = Event(b'{"type":"agent_end","text":"done"}', "agent_end", "done")


class Clock:
    """Implements `core.runstore.Clock`: its timers are never due."""

    def now_ms(self) -> int:
        return NOW_MS

    def monotonic(self) -> float:
        return 0.0

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        del delay_s, callback

    def spawn(self, work: Coroutine[Any, Any, None]) -> object:
        return asyncio.ensure_future(work)


class Served:
    """A store, its runs, and of which it was told that they are over."""

    def __init__(self, store: Opened) -> None:
        self.store = store
        self.counters = Counters()
        self.runs = RunStore(store.store, Clock(), Settings(), self.counters)
        self.over: list[str] = []
        self.runs.on_over(self.over.append)
        store.store.on_commit(self.runs.committed)


@contextlib.asynccontextmanager
async def served(path: Path) -> AsyncIterator[Served]:
    async with opened(path) as store:
        yield Served(store)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def test_who_starts_a_tool_in_a_run_attends_it_and_the_daemons_own_events_attend_nothing(path: Path) -> None:
    async with served(path) as here:
        creator, invoker = Peer(), Peer()
        runs, attendance = here.runs, here.runs.attendance
        await runs.change(create("run"), creator)
        await runs.edit(open_handle("a", "run"), invoker)
        assert set(attendance.attendants("run")) == {creator, invoker}
        creator.closed = invoker.closed = True
        attendance.leave(creator)
        attendance.leave(invoker)
        other = Peer()
        await runs.edit(close_handle("a", "run"), other)
        assert attendance.attendants("run") == []
        assert attendance.is_live("run")
        await runs.edit(open_handle("b", "run"), invoker)
        assert attendance.attendants("run") == [], "a connection that has ended attends nothing"


async def test_the_events_of_a_handle_are_published_and_counted_in_the_order_of_the_log(path: Path) -> None:
    async with served(path) as here:
        await here.runs.change(create("run"), None)
        publish = here.runs.hub.publish
        sequences: list[int] = []

        def look(changes: Iterable[tuple[Head, Sequence[Entry], bool]]) -> None:
            found = list(changes)
            sequences.extend(entry.sequence for _, entries, _ in found for entry in entries)
            publish(found)

        here.runs.hub.publish = look  # type: ignore[method-assign]
        with write_lock(path):
            work = [
                asyncio.ensure_future(doing)
                for doing in (
                    here.runs.change(record("run", event(0)), None),  # it may have a commit of its own
                    here.runs.edit(open_handle("a", "run")),
                    here.runs.change(record("run", event(1)), None),
                    here.runs.edit(close_handle("a", "run", ends=3)),
                )
            ]
            await asyncio.sleep(0)
        await asyncio.gather(*work)
        assert sequences == list(range(6))
        assert here.counters.events_recorded == 6
        topic = await here.runs.topic("run", CLIENT)
        assert topic.head == await here.store.head("run")


async def test_a_run_is_not_interrupted_while_a_tool_is_about_to_start_in_it(path: Path) -> None:
    async with served(path) as here:
        await here.runs.change(create("run"), None)
        arriving = here.runs.attendance._arriving
        with write_lock(path):
            starting = asyncio.ensure_future(here.runs.edit(open_handle("a", "run"), Peer()))
            without = asyncio.ensure_future(here.runs.edit(open_handle("b"), Peer()))
            strange = asyncio.ensure_future(here.runs.edit(open_handle("c", "run", by=Principal("agent", "a"))))
            await asyncio.sleep(0)
            assert arriving == {"run": 1}
        await starting
        await without
        with pytest.raises(RpcError):
            await strange
        assert arriving == {}


@pytest.mark.parametrize(
    "ends",
    [
        fail("run"),
        Cancel(run_id="run", principal=CLIENT, now_ms=NOW_MS, reason="r"),
        Interrupt(run_id="run", principal=HOST, now_ms=NOW_MS, revision=1, reason="r"),
        record("run", Event(b'{"type":"error","message":"e"}', "error", "e")),
    ],
    ids=["failed", "cancelled", "interrupted", "an error"],
)
async def test_what_runs_for_a_run_that_does_not_complete_is_told_that_it_is_over(path: Path, ends: Any) -> None:
    async with served(path) as here:
        await here.runs.change(create("run"), None)
        await here.runs.change(create("other"), None)
        assert here.over == []
        await here.runs.change(ends, None)
        assert here.over == ["run"]
        await here.runs.change(ends, None)
        assert here.over == ["run"], "once"
        await here.runs.edit(delete("run"))
        assert here.over == ["run", "run"], "and when it is no more"


async def test_of_a_run_that_completes_or_goes_on_or_comes_from_elsewhere_nothing_is_told(path: Path) -> None:
    async with served(path) as here:
        await here.runs.change(create("run"), None)
        await here.runs.edit(open_handle("a", "run"))
        await here.runs.change(record("run", event(0), END), None)
        await here.runs.edit(close_handle("a", "run"))
        part = imported("new", event_count=0, status="failed", ended_at_ms=NOW_MS)
        await here.runs.edit(Import(principal=HOST, parts=[part], epoch="e", bytes=1))
        assert here.over == []
        assert not here.runs.attendance.is_live("run")
