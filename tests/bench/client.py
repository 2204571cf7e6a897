"""What the client costs an agent: an event recorded through it beside the raw connection, and its import.

`scripts/client_bench [EVENTS]`. Each way has its turn in each round, on a run of its own, against one daemon with its
default settings; the figures are medians of rounds. Time is what this process takes of its CPU and, as a whole, of the
clock; ratios are to the raw connection that sends the same events in batches of 1,000, one after another.
"""

import asyncio
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from carserver.client.car import Car
from carserver.client.connection import Connection, open_connection
from carserver.client.finding import Target
from carserver.client.logs import LoggingHandler
from carserver.client.run import Run
from tests.daemon import ROOT, Daemon, running

EVENTS = 20_000
ROUNDS = 5
BATCH = 1_000
SINGLE = 1_000  # events, where each is a call of its own
IMPORTS = 11

Event = dict[str, Any]


class Cost(NamedTuple):
    """Of one event, microseconds."""

    cpu: float
    clock: float


def main() -> None:
    """Runs it."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "state") as daemon:
        asyncio.run(_costs(daemon, events))
    _imports()


def _event(number: int) -> Event:
    return {
        "type": "tool_output_delta",
        "id": "call_0_91358",
        "name": "bash",
        "delta": f"line {number} of its output\n",
    }


async def _costs(daemon: Daemon, events: int) -> None:
    given = [_event(number) for number in range(events)]
    logger = logging.getLogger("agent")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    async with (
        open_connection(daemon.url, daemon.token()) as connection,
        Car(lambda: Target(daemon.url, daemon.token())) as car,
    ):
        ways: dict[str, tuple[int, Callable[[], Awaitable[Cost]]]] = {
            "raw connection, 1,000 events a call": (events, lambda: _raw(connection, given, BATCH)),
            "raw connection, an event a call": (SINGLE, lambda: _raw(connection, given[:SINGLE], 1)),
            "await run.record(event)": (events, lambda: _recorded(car, given)),
            "await run.text(piece)": (events, lambda: _written(car, given)),
            "logger.info(message)": (events, lambda: _logged(car, given, logger)),
        }
        found: dict[str, list[Cost]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (_, way) in ways.items():
                found[name].append(await way())
    base = _median(found["raw connection, 1,000 events a call"])
    print(f"{'recorded':<40}{'events':>8}{'CPU':>10}{'ratio':>8}{'clock':>10}{'ratio':>8}")
    for name, (count, _) in ways.items():
        cost = _median(found[name])
        print(
            f"{name:<40}{count:>8,}{cost.cpu:>7.1f} µs{cost.cpu / base.cpu:>8.1f}"
            f"{cost.clock:>7.1f} µs{cost.clock / base.clock:>8.1f}"
        )


def _median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.cpu for cost in costs), statistics.median(cost.clock for cost in costs))


class _Clock:
    """Between its making and `cost`."""

    def __init__(self) -> None:
        self._cpu, self._clock = time.process_time(), time.perf_counter()

    def cost(self, events: int) -> Cost:
        cpu, clock = time.process_time() - self._cpu, time.perf_counter() - self._clock
        return Cost(cpu / events * 1e6, clock / events * 1e6)


async def _raw(connection: Connection, events: list[Event], batch: int) -> Cost:
    run = await connection.call("runs.create", {"prompt": "raw"})
    clock = _Clock()
    for start in range(0, len(events), batch):
        await connection.call("runs.record", {"run_id": run["id"], "events": events[start : start + batch]})
    return clock.cost(len(events))


async def _recorded(car: Car, events: list[Event]) -> Cost:
    async with Run(car, "recorded") as run:
        clock = _Clock()
        for event in events:
            await run.record(event)
        await run.flush()
        return clock.cost(len(events))


async def _written(car: Car, events: list[Event]) -> Cost:
    async with Run(car, "written") as run:
        clock = _Clock()
        for event in events:
            await run.text(event["delta"])
        await run.flush()
        return clock.cost(len(events))


async def _logged(car: Car, events: list[Event], logger: logging.Logger) -> Cost:
    """From a thread, which may wait for room."""
    async with Run(car, "logged") as run:
        handler = LoggingHandler(run)
        logger.addHandler(handler)

        def log() -> None:
            for event in events:
                logger.info("%s says: %s", event["name"], event["delta"])

        clock = _Clock()
        await asyncio.to_thread(log)
        await run.flush()
        logger.removeHandler(handler)
        return clock.cost(len(events))


def _imports() -> None:
    """Of a process that does nothing else, beside one that does nothing at all."""
    programs = {
        "nothing": "pass",
        "asyncio, msgspec and websockets": "import asyncio, msgspec, websockets.asyncio.client",
        "from carserver.client import connect": "from carserver.client import connect",
        "and LoggingHandler, recorded": "from carserver.client import connect\nimport carserver.client.logs",
    }
    took: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(IMPORTS):
        for name, program in programs.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
            took[name].append((time.perf_counter() - began) * 1e3)
    print(f"\n{'a process that imports':<40}{'whole':>10}{'more':>10}")
    nothing = statistics.median(took["nothing"])
    for name, times in took.items():
        whole = statistics.median(times)
        print(f"{name:<40}{whole:>7.0f} ms{whole - nothing:>7.0f} ms")


if __name__ == "__main__":
    main()
