"""The logs of real agents, recorded, watched and read back (tests/data/agent-runs.json)."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.peer import Peer, peer, records

LOGS: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent.parent / "data/agent-runs.json").read_text())
RUNS = [pytest.param(run, id=f"{name}-{number}") for name, runs in LOGS.items() for number, run in enumerate(runs)]


def raw_events(run: dict[str, Any]) -> list[str]:
    """The events as an agent might write them: compact, or spaced as Python does."""
    return [
        json.dumps(entry["event"], separators=(",", ":") if place % 2 else None, ensure_ascii=bool(place % 3))
        for place, entry in enumerate(run["events"])
    ]


async def record_raw(agent: Peer, run_id: str, events: list[str], batch: int = 5) -> None:
    """Records events by their bytes, in batches."""
    for start in range(0, len(events), batch):
        params = f'{{"run_id":"{run_id}","events":[{",".join(events[start : start + batch])}]}}'
        answer = await agent.raw(f'{{"jsonrpc":"2.0","id":"raw-{start}","method":"runs.record","params":{params}}}')
        assert answer["result"]["count"] == len(events[start : start + batch])


async def frames_until_ended(viewer: Peer) -> list[bytes]:
    """The pushed frames up to the record `ended`."""
    frames: list[bytes] = []
    while not frames or records(frames[-1:])[0]["record"]["record"] != "ended":
        frames.append(await viewer.next_frame())
    return frames


@pytest.mark.parametrize("run", RUNS)
async def test_a_recorded_log_ends_as_its_agent_said_and_is_seen_and_read_by_its_very_bytes(
    daemon: Daemon, run: dict[str, Any]
) -> None:
    said = run["snapshot"]
    events = raw_events(run)
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = (await agent.create(said["prompt"], session_id=said["session_id"]))["id"]
        await viewer.call("runs.trace.subscribe", {"run_id": run_id})
        await record_raw(agent, run_id, events)
        if said["status"] == "cancelled":
            assert (await agent.call("runs.cancel", {"run_id": run_id}))["cancelled"]
        snapshot = await agent.call("runs.get", {"run_id": run_id})
        live = await frames_until_ended(viewer)

        for member in ("status", "prompt", "event_count"):
            assert snapshot[member] == said[member]
        assert snapshot.get("result_text") == said.get("result_text")
        if said["status"] == "failed":
            assert snapshot["error"] == said["error"]
        kinds = [record["record"]["record"] for record in records(live)]
        assert kinds == ["started", *["event"] * len(events), "ended"]
        assert [record["cursor"] for record in records(live)] == [*range(len(events) + 1), len(events)]

        await check_bytes(agent, run_id, events)
        async with peer(daemon) as late:
            await late.call("runs.trace.subscribe", {"run_id": run_id})
            again = await frames_until_ended(late)
        # `started` and `ended` tell of the run, an event's frame must be the same to the byte.
        assert again[1:-1] == live[1:-1]


async def check_bytes(agent: Peer, run_id: str, events: list[str]) -> None:
    """`runs.events` gives the events' very bytes."""
    await agent.socket.send(
        json.dumps({"jsonrpc": "2.0", "id": "events", "method": "runs.events", "params": {"run_id": run_id}})
    )
    answer = (await agent.next_frame()).decode()
    while '"id":"events"' not in answer:
        answer = (await agent.next_frame()).decode()
    at = 0
    for event in events:
        at = answer.index(f'"event":{event}}}', at) + len(event)


async def test_a_burst_like_a_real_agents_is_taken_in_whole_and_in_order(daemon: Daemon) -> None:
    count, batch = 18_000, 100
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = (await agent.create())["id"]
        await viewer.call("runs.trace.subscribe", {"run_id": run_id})
        batches = [
            agent.start(
                "runs.record",
                {"run_id": run_id, "events": [{"type": "text_delta", "n": n} for n in range(at, at + batch)]},
            )
            for at in range(0, count, batch)
        ]
        answers = await asyncio.gather(*batches)
        assert [answer["first_sequence"] for answer in answers] == list(range(0, count, batch))
        assert (await viewer.next("runs.trace.event"))["record"]["record"] == "started"
        for n in range(count):
            params = await viewer.next("runs.trace.event")
            assert (params["cursor"], params["record"]["event"]["n"]) == (n + 1, n)
    figures = await asyncio.to_thread(daemon.metrics)
    assert figures["events_recorded"] == figures["events_delivered"] == count
