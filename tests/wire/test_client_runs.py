"""Runs of the client's, recorded by a real daemon: which is killed and restarted, and cancels, and refuses."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from carserver.client.car import Car
from carserver.client.errors import EventRefused, NotRecorded, Unreachable
from carserver.client.finding import Target
from carserver.client.pauses import Pauses
from carserver.client.run import Run, RunCancelled
from carserver.protocol.runs import Status
from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.peer import peer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that lives on."""
    with running(tmp_path_factory.mktemp("runs") / "state") as daemon:
        yield daemon


END = {"type": "agent_end", "text": ""}


PATIENCE_S = 45.0  # a daemon of ours is back sooner, on a busy machine, too


class Finder:
    """Finds the daemon wherever it is after a restart; not while it is told not to."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.finds = True

    def __call__(self) -> Target:
        if not self.finds:
            raise Unreachable("the test has cut it off")
        return Target(self.daemon.url, self.daemon.token())


@contextlib.asynccontextmanager
async def car_of(daemon: Daemon, finder: Finder | None = None) -> AsyncIterator[Car]:
    """One that makes no long pauses."""
    car = Car(finder or Finder(daemon), patience_s=PATIENCE_S)
    car.link._pauses = Pauses(1_000, first_s=0.02, longest_s=0.1)
    async with car:
        yield car


def run_of(car: Car, **options: Any) -> Run:
    return Run(car, "do it", **{"starts": False, **options})


async def log_of(car: Car, run_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    more = True
    while more:
        page = await car.runs.events(run_id, after=len(events))
        events += [msgspec.json.decode(entry.event) for entry in page.events]
        more = page.has_more
    return events


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"type": "step", "n": number} for number in range(first, first + count)]


async def restart(daemon: Daemon) -> None:
    """Killed, and started again; the loop goes on meanwhile."""
    await asyncio.to_thread(daemon.kill)
    await asyncio.to_thread(daemon.start)


async def test_a_run_is_created_recorded_and_completed(shared: Daemon) -> None:
    async with car_of(shared) as car:
        async with Run(car, "do it", session_id="s", agent_id="me", metadata={"a": 1}) as run:
            assert (await car.runs.get(run.id)).status is Status.CREATED
            await run.text("Looking")
            await run.flush()
            assert (await car.runs.get(run.id)).status is Status.EXECUTING
            await run.text(" at it.")
            run.result = "done"
        snapshot = await car.runs.get(run.id)
        assert (snapshot.status, snapshot.result_text, snapshot.session_id) == (Status.COMPLETED, "done", "s")
        log = await log_of(car, run.id)
    assert log[0] == {"type": "agent_start", "prompt": "do it"}
    assert "".join(event["text"] for event in log[1:-1]) == "Looking at it."


async def test_nothing_is_lost_or_doubled_when_the_daemon_is_killed_in_the_middle_of_a_flush(daemon: Daemon) -> None:
    """Again and again, while a batch is under way: it may have been stored, or not, and nobody was told."""
    rounds, each = 6, 3_000
    async with car_of(daemon) as car:
        async with run_of(car) as run:
            for number in range(rounds):
                recording = asyncio.create_task(_record(run, number * each, each))
                while not run.recorder._batches:  # noqa: ASYNC110 - until one is being sent
                    await asyncio.sleep(0)
                await asyncio.sleep(0.002 * number)  # for nothing: it is another moment each time
                daemon.kill()  # at once, whatever the loop has to do
                await asyncio.to_thread(daemon.start)
                await recording
        log = await log_of(car, run.id)
        snapshot = await car.runs.get(run.id)
    assert [event.get("n") for event in log[:-1]] == list(range(rounds * each))
    assert log[-1] == END
    assert snapshot.status is Status.COMPLETED


async def _record(run: Run, first: int, count: int) -> None:
    for event in numbered(count, first):
        await run.record(event)
        if event["n"] % 100 == 0:
            await asyncio.sleep(0)


async def test_twenty_thousand_small_events_come_in_order_through_a_small_buffer(shared: Daemon) -> None:
    async with car_of(shared) as car:
        async with run_of(car, buffer_events=2_000) as run:
            for event in numbered(20_000):
                await run.record(event)
        log = await log_of(car, run.id)
    assert log == [*numbered(20_000), END]


async def test_events_wait_while_the_daemon_is_away_and_so_does_the_end_of_the_block(daemon: Daemon) -> None:
    async with car_of(daemon) as car:
        async with run_of(car) as run:
            await run.record(*numbered(3))
            await run.flush()
            await asyncio.to_thread(daemon.kill)
            await run.record(*numbered(3, first=3))
            starting = asyncio.create_task(asyncio.to_thread(daemon.start))
        await starting
        assert await log_of(car, run.id) == [*numbered(6), END]


async def test_a_daemon_that_does_not_come_back_is_told_of_with_the_number_of_events(daemon: Daemon) -> None:
    async def agent() -> None:
        async with car_of(daemon) as car, run_of(car, patience_s=2.0) as run:
            await asyncio.to_thread(daemon.kill)
            await run.record(*numbered(7))

    with pytest.raises(
        NotRecorded, match=r"8 events of run-\S+ were not recorded: (cannot connect|connection lost)"
    ) as caught:
        await agent()
    assert caught.value.events == 8


async def until_status(daemon: Daemon, run_id: str, status: str) -> None:
    async with peer(daemon, "host-token") as host:
        while (await host.call("runs.get", {"run_id": run_id}))["status"] != status:  # noqa: ASYNC110 - far away
            await asyncio.sleep(0.02)


async def test_an_idle_run_is_attended_again_after_a_restart_and_does_not_stay_interrupted(start: StartDaemon) -> None:
    daemon = start(grace_s=0.3)
    async with car_of(daemon) as car, run_of(car) as run:
        await run.record({"type": "turn_start", "turn": 1})
        await run.flush()
        await restart(daemon)
        async with peer(daemon) as other:
            marker = await other.create("which nobody attends, from a later time on")
        await until_status(daemon, marker["id"], "interrupted")
        await until_status(daemon, run.id, "executing")


async def test_a_run_that_was_interrupted_while_the_link_was_down_goes_on(start: StartDaemon) -> None:
    daemon = start(grace_s=0.2)
    finder = Finder(daemon)
    async with car_of(daemon, finder=finder) as car:
        async with run_of(car) as run:
            await run.record(*numbered(2))
            await run.flush()
            finder.finds = False
            await (await car.link.connection()).close()
            await until_status(daemon, run.id, "interrupted")
            await run.record(*numbered(2, first=2))
            finder.finds = True
        snapshot = await car.runs.get(run.id)
        assert (snapshot.status, snapshot.interrupted_reason) == (Status.COMPLETED, None)
        assert await log_of(car, run.id) == [*numbered(4), END]


async def test_the_host_cancels_a_run_and_its_task_is_cancelled(shared: Daemon) -> None:
    async with car_of(shared) as car:
        run = run_of(car)
        begun = asyncio.Event()

        async def agent() -> None:
            async with run:
                await run.record(*numbered(2))
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(agent())
        await begun.wait()
        async with peer(shared, "host-token") as host:
            await host.call("runs.cancel", {"run_id": run.id, "reason": "enough"})
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value, RunCancelled)
        snapshot = await car.runs.get(run.id)
        assert (snapshot.status, snapshot.cancel_reason) == (Status.CANCELLED, "enough")
        assert await log_of(car, run.id) == numbered(2)


async def test_a_run_that_was_cancelled_while_the_daemon_was_out_of_reach_is_known_to_be(shared: Daemon) -> None:
    async with car_of(shared) as car:
        run = run_of(car)

        async def agent() -> None:
            async with run:
                async with peer(shared, "host-token") as host:
                    car.link._told.clear()  # the notification is lost, as it is when it is sent to a dead connection
                    await host.call("runs.cancel", {"run_id": run.id, "reason": "enough"})
                await (await car.link.connection()).close()
                await asyncio.Event().wait()

        with pytest.raises(RunCancelled, match="enough"):
            await agent()


async def test_an_exception_fails_the_run_and_a_cancelled_task_cancels_it(shared: Daemon) -> None:
    async with car_of(shared) as car:
        failing, cancelled = run_of(car), run_of(car)

        async def agent(run: Run, error: BaseException) -> None:
            async with run:
                await run.record(*numbered(1))
                raise error

        with pytest.raises(ValueError, match="wrong"):
            await agent(failing, ValueError("wrong"))
        with pytest.raises(asyncio.CancelledError):
            await agent(cancelled, asyncio.CancelledError())
        assert not cancelled.cancelled  # but by itself
        first, second = [await car.runs.get(run.id) for run in (failing, cancelled)]
        assert (first.status, first.error, first.event_count) == (Status.FAILED, "ValueError: wrong", 1)
        assert (second.status, second.cancel_reason) == (Status.CANCELLED, "its task was cancelled")


async def test_an_event_that_is_too_large_is_told_of_by_itself(start: StartDaemon) -> None:
    daemon = start(event_bytes=1_000)
    async with car_of(daemon) as car:
        run = run_of(car)

        async def agent() -> None:
            async with run:
                await run.record(*numbered(2), {"type": "large", "x": "x" * 2_000}, *numbered(2, first=2))

        with pytest.raises(EventRefused, match=r"event_bytes allows \(1000\): \{\"type\":\"large\",\"x\":\"xxx"):
            await agent()
        assert await log_of(car, run.id) == [*numbered(4), END]


async def test_a_result_that_is_too_long_fails_the_run_by_name(start: StartDaemon) -> None:
    daemon = start(text_bytes=1_000)
    async with car_of(daemon) as car:
        run = run_of(car)

        async def agent() -> None:
            async with run:
                run.result = "x" * 2_000

        with pytest.raises(EventRefused, match=r"text_bytes allows"):
            await agent()
        snapshot = await car.runs.get(run.id)
        assert snapshot.status is Status.FAILED
        assert snapshot.error is not None
        assert snapshot.error.startswith("not everything was recorded: an event was refused: events[0].text: 2000")


async def test_a_run_that_was_deleted_ends_the_block_with_the_daemons_words(shared: Daemon) -> None:
    async with car_of(shared) as car:
        run = run_of(car)

        async def agent() -> None:
            async with run:
                await run.record(END)
                await run.flush()
                await car.runs.delete(run.id)
                await run.record(*numbered(3))

        with pytest.raises(NotRecorded, match=r"3 events of run-\S+ were not recorded: unknown run"):
            await agent()


async def test_the_same_key_is_the_same_run_in_another_process(shared: Daemon) -> None:
    async with car_of(shared) as first:
        run = run_of(first, key="job-1")
        await run.open(None)
        await run.record(*numbered(2))
        await run.flush()
        id_ = run.id
    async with car_of(shared) as second:
        async with run_of(second, key="job-1") as again:
            await again.record(*numbered(2, first=2))
        assert again.id == id_
        assert await log_of(second, id_) == [*numbered(4), END]
