"""Rounds of TERM under load, with peers that do not read and tools that do not want to end; `scripts/tool_rounds`."""

import asyncio
import contextlib
import random
import signal
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from tests.daemon import Daemon
from tests.fault.audit import Batch, Producer, audit_runs, read_log
from tests.fault.test_drain import drained, exit_code, stalled_peer, tell
from tests.fault.zoo import ALL, descendants, identities, marked, until_none
from tests.peer import Peer, Refused, peer

PRODUCERS, VIEWERS, CALLERS = 4, 4, 3
ENDED = 1012
SLACK_S = 2.0  # beyond `drain_s`, for a process to come to its end


@dataclass
class Drains:
    """What the rounds came to."""

    rounds: int = 0
    acknowledged: int = 0
    tools: int = 0
    late: int = 0  # rounds in which something lived for a moment after the daemon's exit
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} times TERM under load: {self.acknowledged} events acknowledged, {self.tools} tools live,"
            f" {self.late} rounds with one of them for a moment after the exit, slowest exit {self.slowest_s:.1f} s,"
            f" {len(self.wrong)} wrong"
        )


async def drain_round(
    daemon: Daemon, drain_s: float, chance: random.Random, drains: Drains, slack_s: float = SLACK_S
) -> None:
    """Loads the daemon, which runs, with the tools of `zoo.write_zoo`; ends it, compares, and starts it again."""
    flock = uuid.uuid4().hex  # no other round on this machine has it
    acknowledgements = asyncio.Semaphore(0)
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer(daemon)) for _ in range(PRODUCERS + VIEWERS + CALLERS)]
        producing, viewing, calling = peers[:PRODUCERS], peers[PRODUCERS:-CALLERS], peers[-CALLERS:]
        runs = [(await producing[0].create())["id"] for _ in range(2)]
        for place, viewer in enumerate(viewing):
            await viewer.call("runs.trace.subscribe", {"run_id": runs[place % 2]})
            await viewer.call("tools.stream.subscribe", {})
        await stack.enter_async_context(stalled_peer(daemon))
        producers = [Producer(f"p{n}", one, runs, acknowledgements=acknowledgements) for n, one in enumerate(producing)]
        work = [asyncio.create_task(producer.run()) for producer in producers]
        tool_runs = [(await one.create())["id"] for one in calling]
        calls = [
            one.start(
                chance.choice(("tools.call", "tools.invoke")),
                {"tool": animal.name, "parameters": {"mark": f"{flock}.{place}", **animal.arguments}, "run_id": run_id},
            )
            for place, animal in enumerate(chance.sample(ALL, len(ALL)))
            for one, run_id in [chance.choice([*zip(calling, tool_runs, strict=True)])]
        ]
        for _ in range(10 * PRODUCERS):
            await acknowledgements.acquire()
        await daemon.until("handles_started", len(ALL) / 2)
        await asyncio.sleep(chance.uniform(0, 0.3))
        processes = identities(descendants(daemon.pid))
        drains.tools += len(marked(flock))

        told_s = tell(daemon, signal.SIGTERM)
        ends = await asyncio.gather(*[drained(reader) for reader in peers])
        code = await asyncio.to_thread(exit_code, daemon, drain_s * 3)
        took_s = time.monotonic() - told_s
        left = marked(flock)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*work)

    drains.rounds += 1
    drains.slowest_s = max(drains.slowest_s, took_s)
    drains.late += bool(left)
    if code != 0 or took_s > drain_s + slack_s:
        drains.wrong.append(f"exit {code} after {took_s:.1f} s")
    if any(end != (ENDED, 1) for end in ends):
        drains.wrong.append(f"peers that read ended with {ends}")
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Refused | ConnectionError):
            drains.wrong.append(f"a tool was answered {outcome!r}")
    if found := await until_none(lambda: marked(flock)):
        drains.wrong.append(f"processes of the tools: {found}")
    if found := await until_none(lambda: [pid for pid, _ in processes & identities([one for one, _ in processes])]):
        drains.wrong.append(f"processes of the daemon: {found}")

    daemon.start()
    async with peer(daemon) as client:
        drains.wrong += await _compare(client, [batch for one in producers for batch in one.sent], drains)
        for run_id in tool_runs:
            drains.wrong += _open(await read_log(client, run_id), [one for one in outcomes if isinstance(one, dict)])


async def _compare(client: Peer, sent: list[Batch], drains: Drains) -> list[str]:
    found = await audit_runs(client, sent)
    drains.acknowledged += found.acknowledged
    return [] if found.good else [f"{found}"]


def _open(log: list[dict[str, Any]], told: list[dict[str, Any]]) -> list[str]:
    """Handles that have a start in their run's log, and not one end; or an end other than what was answered."""
    events = [entry["event"] for entry in log]
    ends = [event["id"] for event in events if event["type"] == "tool_end"]
    starts = [event["id"] for event in events if event["type"] == "tool_start"]
    if sorted(ends) != sorted(starts):
        return [f"a run's log has the starts {starts} and the ends {ends}"]
    errors = {event["id"]: event.get("error", "") for event in events if event["type"] == "tool_end"}
    return [
        f"{one['handle']} was answered {one['error']!r}, and its log says {errors[one['handle']]!r}"
        for one in told
        if one["handle"] in errors and one.get("error", errors[one["handle"]]) != errors[one["handle"]]
    ]
