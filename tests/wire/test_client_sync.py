"""The client for programs without an event loop, and a real daemon."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from carserver.client import CallError, ConnectionLost, RunCancelled, Unreachable, sync
from carserver.client.logs import LoggingHandler
from carserver.protocol.runs import Status
from tests.daemon import ROOT, Daemon, running

EVENTS = 2_000  # more than are read ahead
THREADS = 8
END_S = 20.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that lives on."""
    with running(tmp_path_factory.mktemp("sync") / "state") as daemon:
        yield daemon


@pytest.fixture
def car(shared: Daemon) -> Iterator[sync.Car]:
    """A car that leaves no thread behind."""
    before = set(threading.enumerate())
    with sync.connect(state_dir=shared.state) as car:
        yield car
    assert set(threading.enumerate()) <= before


def numbers(car: sync.Car, run_id: str) -> list[int]:
    events = (record.record.get("event", {}) for record in car.runs.trace(run_id))
    return [event["n"] for event in events if "n" in event]


def test_a_run_is_recorded_in_a_block_and_read_back(car: sync.Car) -> None:
    with car.run("do it", session_id="s") as run:
        for number in range(EVENTS):
            run.record({"type": "step", "n": number})
        run.text("Looking. ")
        run.flush()
        assert car.runs.get(run.id).event_count == EVENTS + 2
        run.result = "Done."
    assert numbers(car, run.id) == list(range(EVENTS))
    found = car.runs.get(run.id)
    assert (found.status, found.result_text, found.session_id) == (Status.COMPLETED, "Done.", "s")


def test_an_exception_fails_the_run_and_goes_on(car: sync.Car) -> None:
    with pytest.raises(ZeroDivisionError), car.run("do it") as run:
        _ = 1 / 0
    found = car.runs.get(run.id)
    assert (found.status, found.error) == (Status.FAILED, "ZeroDivisionError: division by zero")


def test_a_run_that_is_cancelled_from_outside_ends_the_block_where_it_records_next(car: sync.Car) -> None:
    def go_on() -> None:
        car.runs.cancel(run.id, reason="enough")
        while True:
            run.record({"type": "step"})

    with pytest.raises(RunCancelled, match="enough"), car.run("do it") as run:
        go_on()
    assert (run.cancelled, run.cancel_reason) == (True, "enough")
    assert car.runs.get(run.id).status == Status.CANCELLED


def test_what_is_logged_in_the_block_is_recorded(car: sync.Car) -> None:
    import logging  # noqa: PLC0415 - for this test alone

    logger = logging.getLogger("test.sync")
    handler = LoggingHandler()
    logger.addHandler(handler)
    try:
        with car.run("do it") as run:
            logger.warning("look out")
    finally:
        logger.removeHandler(handler)
    records = [msgspec.json.encode(record.record).decode() for record in car.runs.trace(run.id)]
    assert sum("look out" in record for record in records) == 1


def test_a_trace_that_is_left_ends_and_errors_reach_the_reader(car: sync.Car) -> None:
    with car.run("do it") as run:
        for number in range(EVENTS):
            run.record({"type": "step", "n": number})
        run.flush()
        with closing(car.runs.trace(run.id)) as records:
            assert [next(records).cursor for _ in range(10)] == [0, *range(1, 10)]
    with pytest.raises(CallError, match="unknown run"):
        next(car.runs.trace("none"))
    while car.server.status().counts.connections > 1:  # the daemon hears of their end a little later
        pass


def test_many_threads_share_a_car(car: sync.Car) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        runs = list(threads.map(lambda n: car.runs.create(f"{n}", idempotency_key=f"many-{n}"), range(50)))
    assert [run.prompt for run in runs] == [f"{n}" for n in range(50)]


def test_functions_are_offered_as_tools_before_and_while_connected(shared: Daemon) -> None:
    car = sync.connect(state_dir=shared.state)

    @car.tool
    def double(n: int) -> int:
        return 2 * n

    with car:

        @car.tool(name="half")
        def other(n: int) -> float:
            return n / 2

        for tool, result in (("double", b"8"), ("half", b"2.0")):
            assert bytes(car.tools.call(tool, parameters={"n": 4}).result) == result  # type: ignore[arg-type]
        assert double(1) == 2


def test_a_restart_of_the_daemon_is_waited_for(daemon: Daemon) -> None:
    with sync.connect(state_dir=daemon.state) as car, car.run("do it") as run:
        run.record({"type": "step", "n": 0})
        run.flush()
        with closing(car.runs.trace(run.id)) as records:
            seen = [next(records) for _ in range(3)]
            daemon.kill()
            daemon.start()
            run.record({"type": "step", "n": 1})
            assert next(records).cursor == seen[-1].cursor + 1


def test_why_there_is_no_daemon_is_said_and_a_closed_car_says_so(shared: Daemon, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no daemon found"), sync.connect(state_dir=tmp_path):
        pass
    car = sync.connect(state_dir=shared.state)
    with pytest.raises(RuntimeError, match="not open: use `with"):
        car.runs.list()
    with car, pytest.raises(RuntimeError, match="open already"):
        car.open()
    car.close()
    with pytest.raises(RuntimeError, match="not open"):
        car.runs.list()
    with pytest.raises(RuntimeError, match="opened once"):
        car.open()


def test_the_cars_own_thread_does_not_wait_for_itself(car: sync.Car) -> None:
    @car.tool
    async def wrong() -> str:
        return str(car.runs.list())

    answer = car.tools.call("wrong")
    assert "not in the car's own thread" in str(answer.error)


def test_closing_in_another_thread_ends_what_waits(shared: Daemon) -> None:
    car = sync.connect(state_dir=shared.state)
    car.open()
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as thread:

        def follow() -> None:
            for _ in car.runs.trace(run_id):
                waiting.set()

        run_id = car.runs.create("never ends").id
        following = thread.submit(follow)
        assert waiting.wait(END_S)
        car.close()
        with pytest.raises((ConnectionLost, RuntimeError)):
            following.result(END_S)


INTERRUPTED = """
import sys
from carserver.client import sync
with sync.connect(state_dir=sys.argv[1]) as car:
    with car.run("to be interrupted") as run:
        print(run.id, flush=True)
        for record in car.runs.trace(run.id):
            pass
"""


def test_the_keyboard_interrupts_what_waits_and_the_run_is_cancelled(shared: Daemon, car: sync.Car) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(shared.state)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as program:
        assert program.stdout is not None
        run_id = program.stdout.readline().strip()
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=END_S)
    assert program.returncode == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said
    assert car.runs.get(run_id).status == Status.CANCELLED
