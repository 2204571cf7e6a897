"""`scripts/tool_rounds`: many rounds of the zoo, a flood of 1 GiB, and TERM under load, each with a line of figures."""

import asyncio
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carserver.config import Settings
from tests.daemon import Daemon, running
from tests.fault.tooldrains import Drains, drain_round
from tests.fault.zoo import FLOOD_BYTES, memory, write_zoo
from tests.fault.zoorounds import SHORT, Figures, keeper_of, zoo_round
from tests.peer import peer

DRAINS = 20
MOST_FLOODED = 64 << 20  # bytes of memory that a flood may cost
LOOK_S = 0.1


async def _rounds(tools: str, folder: Path, rounds: int, chance: random.Random) -> list[str]:
    figures = Figures()
    with running(folder / "zoo", "--tools", tools, **SHORT) as daemon:
        for _ in range(rounds):
            await zoo_round(daemon, chance, figures)
            if figures.wrong:
                break
    print(figures, flush=True)
    return figures.wrong


async def _flood(tools: str, folder: Path) -> list[str]:
    """As much as `max_output` allows, then one byte more."""
    wrong = []
    with running(folder / "flood", "--tools", tools) as daemon:
        for size, error in (
            (FLOOD_BYTES, ""),
            (FLOOD_BYTES + 1, f"output is more than max_output allows ({FLOOD_BYTES} bytes)"),
        ):
            began_s = time.monotonic()
            told, grown, lag_s = await _flooded(daemon, size)
            took_s = time.monotonic() - began_s
            print(
                f"{size} bytes of output: {told['status']} after {took_s:.1f} s ({size / took_s / 2**20:.0f} MiB/s),"
                f" {grown / 2**20:.0f} MiB of memory more at most, the loop at most {lag_s * 1000:.0f} ms late",
                flush=True,
            )
            if told.get("error", "") != error or grown > MOST_FLOODED:
                wrong.append(f"{size} bytes of output: {told}, {grown} bytes of memory")
    return wrong


async def _flooded(daemon: Daemon, size: int) -> tuple[dict[str, str], int, float]:
    """What a tool that writes that much is answered, how far memory grew, and how late the loop was at most."""
    keeper = await keeper_of(daemon)
    async with peer(daemon) as caller:
        before = most = memory(daemon.pid, keeper)
        lag_s = 0.0
        await asyncio.to_thread(daemon.metrics)
        order = {"tool": "writes", "parameters": {"mark": "flood", "bytes": size}}
        handle = (await caller.call("tools.invoke", order))["handle"]
        while (await caller.call("tools.status", {"handle": handle}))["status"] == "running":
            await asyncio.sleep(LOOK_S)
            most = max(most, memory(daemon.pid, keeper))
            lag_s = max(lag_s, (await asyncio.to_thread(daemon.metrics))["loop_lag_seconds"])
        told = await caller.call("tools.poll", {"handle": handle})
    return told, most - before, lag_s


async def _drains(tools: str, folder: Path, rounds: int, chance: random.Random) -> list[str]:
    drains = Drains()
    with _without_end(folder / "drains", "--tools", tools) as daemon:
        for _ in range(rounds):
            await drain_round(daemon, Settings().drain_s, chance, drains)
            if drains.wrong:
                break
    print(drains, flush=True)
    return drains.wrong


@contextmanager
def _without_end(state: Path, *args: str) -> Iterator[Daemon]:
    """A daemon that is ended and started within."""
    daemon = Daemon(state, *args).start()
    try:
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.kill()


async def _all(rounds: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="carserver-tools-") as name:
        folder = Path(name)
        tools = write_zoo(folder / "zoo.toml")
        return [
            *await _rounds(tools, folder, rounds, chance),
            *await _flood(tools, folder),
            *await _drains(tools, folder, min(rounds, DRAINS), chance),
        ]


def main() -> int:
    """`tool_rounds [ROUNDS [SEED]]`: lines of figures; 0 if nothing was wrong, left, or beyond its bound."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of calls that an end has cut off it would tell each
    wrong = asyncio.run(_all(rounds, seed))
    for one in wrong:
        print(one)
    print(f"{len(wrong)} wrong (seed {seed})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
