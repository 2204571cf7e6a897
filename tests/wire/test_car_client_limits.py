"""The bounds of runs in the CAR dialect, as its real client meets them: each with its mark, its word or its error."""

from typing import Any

import pytest

from tests.carclient import CarClient, CarError, car_client, needs_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, peer
from tests.wire.test_car_client_runs import OUTCOME, TURN, heard_until_ended, recorded, started

pytestmark = needs_car

KIB, MIB = 1024, 1024 * 1024
CUT = "…[truncated]"
REPLACED = "…[truncated: turn exceeded 256 KiB]"
PIECE = "x" * 16 * KIB  # the longest string that stays whole


async def events_of(native: Peer, run_id: str, after: int = 0) -> list[dict[str, Any]]:
    """A page of the log, from a cursor on."""
    page = await native.call("runs.events", {"run_id": run_id, "after": after})
    return [entry["event"] for entry in page["events"]]


async def test_what_is_too_large_is_cut_and_marked_and_what_cannot_be_is_dropped_in_a_word(served: Daemon) -> None:
    async with car_client(served) as car, peer(served) as native:
        run = await started(car, "large")
        fits = {"prompt": PIECE, "output": ["é" * 8 * KIB]}
        answer = await recorded(car, run, fits, {"prompt": PIECE + "y", "output": {"deep": ["é" * 8 * KIB + "y"]}})
        assert (answer["count"], answer["ok"]) == (2, True)
        whole, cut = await events_of(native, run)
        assert {name: whole[name] for name in fits} == fits
        assert (cut["prompt"], cut["output"]) == (PIECE + CUT, {"deep": ["é" * 8 * KIB + CUT]})

        halves = {"parameters": [PIECE] * 10, "output": [PIECE] * 12, "tool": "t"}  # 352 KiB; the larger half goes
        assert (await recorded(car, run, halves, {"output": [PIECE] * 15}))["ok"]
        replaced, kept = await events_of(native, run, after=2)
        assert (replaced["output"], replaced["parameters"], replaced["tool"]) == (REPLACED, [PIECE] * 10, "t")
        assert kept["output"] == [PIECE] * 15

        said = {"run_id": run, "turn_index": 1, "assistant_text": "a" + "é" * 8 * KIB, "model_id": "m"}
        assert (await car.call("runs_record_model_turn", said))["ok"]
        (model_turn,) = await events_of(native, run, after=4)
        assert model_turn["assistant_text"] == "a" + "é" * (8 * KIB - 1) + CUT, "not within a character"

        many = {f"m{number}": 0 for number in range(30_000)}
        dropped = {"run_id": run, "base_index": 0, "count": 0, "ok": False, "dropped": "turn_too_large"}
        assert await recorded(car, run, TURN, many) == dropped
        assert (await native.call("runs.get", {"run_id": run}))["event_count"] == 5, "all of a batch, or none"


async def test_a_batch_has_256_turns_and_a_run_2000(served: Daemon) -> None:
    async with car_client(served) as car, peer(served) as native:
        run = await started(car, "many")
        await native.record(run, {"type": "text_delta"})  # is no turn
        turns = [{"output": number} for number in range(2_000)]
        with pytest.raises(CarError) as refused:
            await recorded(car, run, *turns[:257])
        assert refused.value.code == -32012
        assert (refused.value.data["limit"], refused.value.data["value"]) == ("record_turns", 257)
        assert refused.value.data["maximum"] == 256
        for first in range(0, 2_000, 256):
            answer = await recorded(car, run, *turns[first : first + 256])
            assert (answer["base_index"], answer["count"]) == (1 + first, min(256, 2_000 - first))
        for late in (recorded(car, run, TURN), car.call("runs_record_model_turn", {"run_id": run, "model_id": "m"})):
            assert (await late)["dropped"] == "run_turn_limit"
        await native.record(run, {"type": "text_delta"})  # what is no turn goes on
        (listed,) = (await car.call("runs_list", {"agent_id": "name:many"}))["runs"]
        assert listed["turn_count"] == 2_000
        trace = await car.call("runs_get_trace", {"run_id": run})
        assert [record["output"] for record in trace["records"] if record["record"] == "turn"] == [*range(2_000)]


async def test_a_trace_that_is_too_large_for_one_answer_comes_in_parts_and_as_a_stream(served: Daemon) -> None:
    async with car_client(served) as car:
        run = await started(car, "long")
        turn = {"output": [PIECE] * 15}
        for _ in range(4):
            await recorded(car, run, *[turn] * 9)  # 36 turns of 240 KiB are 8.4 MiB
        await car.call("runs_complete", {"run_id": run, "outcome": OUTCOME})
        first = await whole_trace(car, run, 0)
        assert first["has_more"]
        assert 30 < first["cursor"] < 36
        rest = await whole_trace(car, run, first["cursor"])
        assert "has_more" not in rest
        read = first["records"] + rest["records"]
        assert [record["record"] for record in read] == ["started", *["turn"] * 36, "ended"]
        assert [record["index"] for record in read[1:-1]] == [*range(36)]

        await car.listen("runs.trace.event")
        followed = await car.call("runs_subscribe", {"run_id": run})
        cursor = followed["cursor"]
        assert cursor == len(followed["turns_so_far"])
        assert cursor == 4 * MIB // (len(PIECE) * 15 + 200)
        heard = await heard_until_ended(car)
        assert followed["turns_so_far"] + [params["record"] for params in heard] == read[1:]
        assert [params["cursor"] for params in heard] == [*range(cursor + 1, 37), 36]


async def test_a_list_of_runs_that_is_too_large_says_that_there_are_more(start: StartDaemon) -> None:
    daemon = start(page_bytes=6_000)
    async with car_client(daemon) as car:
        runs = [await started(car, "listed", intent="é" * 1_250) for _ in range(3)]
        answer = await car.call("runs_list", {"agent_id": "name:listed"})
        assert [run["run_id"] for run in answer["runs"]] == runs[:0:-1], "the newest two, of 2.7 kB each"
        assert answer["has_more"]


async def whole_trace(car: CarClient, run_id: str, cursor: int) -> dict[str, Any]:
    """A part of a trace, from a cursor on."""
    part: dict[str, Any] = await car.call("runs_get_trace", {"run_id": run_id, "cursor": cursor})
    return part
