"""What a handle leaves in its run's log: its text at a pace, its end, and what happens where storage refuses it."""

import asyncio
import json
from pathlib import Path

import pytest

from carserver.config import Settings
from carserver.core.edits import OpenHandle
from carserver.core.ports import Damaged
from carserver.core.runs import Event
from carserver.core.toolrecord import CLOSED_AT_ONCE, Recorder, Recorders, tool_end, tool_start
from carserver.loop import LoopClock
from carserver.protocol.codec import encode
from carserver.protocol.errors import RpcError, not_found, overloaded, unavailable
from carserver.protocol.runs import Status
from carserver.protocol.toolevents import ToolEnd
from carserver.protocol.tools import ResultRef
from tests.recording import World
from tests.unit.handling import close_handle, open_handle
from tests.unit.storing import create, opened

HANDLE, TOOL, RUN = "f" * 32, "lint", "run-1"
SETTINGS = Settings(delta_s=0.05, delta_bytes=8, recorded_bytes=20, probe_s=1.0)
HEAD = {"id": HANDLE, "name": TOOL, "source": "carserver"}


@pytest.fixture
def world() -> World:
    return World(SETTINGS)


@pytest.fixture
def recorder(world: World) -> Recorder:
    return world.recorders.begin(HANDLE, TOOL, RUN)


def end(recorder: Recorder) -> None:
    recorder.end("done", None, None, None)


def test_the_first_text_goes_at_once_and_what_follows_at_the_pace(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    assert world.asks[0].events == [{"type": "tool_output_delta", **HEAD, "delta": "one"}]
    world.answer()
    recorder.text("two ")
    recorder.text("three")
    assert len(world.timers) == 1
    world.passes(0.049)
    assert not world.asks
    world.passes(0.002)
    assert world.answer().events[0]["delta"] == "two thre"
    assert not world.asks
    world.passes(0.05)
    assert world.answer().events[0]["delta"] == "e"


def test_after_a_silence_text_goes_at_once_again(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    world.answer()
    world.passes(10)
    recorder.text("two")
    world.turn()
    assert world.asks


def test_text_of_one_turn_of_the_loop_is_one_piece(world: World, recorder: Recorder) -> None:
    recorder.text("a")
    recorder.text("b")
    world.turn()
    world.answer()
    assert [recorded.event["delta"] for recorded in world.log] == ["ab"]


def test_one_append_is_under_way_at_a_time_while_storage_is_slow(world: World, recorder: Recorder) -> None:
    recorder.text("a")
    world.turn()
    recorder.text("b")
    world.passes(5)
    assert len(world.asks) == 1
    assert world.recorders.waiting_bytes == 2
    world.answer()
    assert world.answer().events[0]["delta"] == "b"


def test_a_handle_with_nothing_to_say_costs_no_timer_and_no_task(world: World, recorder: Recorder) -> None:
    assert world.is_idle
    recorder.text("a")
    recorder.text("")
    world.turn()
    world.answer()
    assert world.is_idle
    assert world.recorders.waiting_bytes == 0


def test_what_is_left_is_stored_with_the_end_at_once_and_in_one_edit(world: World, recorder: Recorder) -> None:
    recorder.text("abcdefgh")
    world.turn()
    world.answer()
    recorder.text("ijklmnopqr")
    recorder.end("", 3, "exit code 3", None)
    world.turn()
    assert world.answer().events == [
        {"type": "tool_output_delta", **HEAD, "delta": "ijklmnop"},
        {"type": "tool_output_delta", **HEAD, "delta": "qr"},
        {"type": "tool_end", **HEAD, "output": "", "exit_code": 3, "error": "exit code 3"},
    ]
    assert world.closed == [HANDLE]
    assert len(world.recorders) == 0
    world.passes(10)
    assert world.is_idle


def test_an_end_waits_for_the_append_under_way(world: World, recorder: Recorder) -> None:
    recorder.text("a")
    world.turn()
    end(recorder)
    world.turn()
    assert len(world.asks) == 1
    world.answer()
    assert [event["type"] for event in world.answer().events] == ["tool_end"]


def test_a_large_result_is_named_by_its_output(world: World, recorder: Recorder) -> None:
    recorder.end("", None, None, ResultRef(id="out-1", size=70_000, preview="[1,"))
    world.turn()
    assert world.answer().events == [
        {"type": "tool_end", **HEAD, "output": "", "result_ref": {"id": "out-1", "size": 70_000, "preview": "[1,"}}
    ]


def test_only_the_first_end_counts_and_no_text_follows_it(world: World, recorder: Recorder) -> None:
    end(recorder)
    recorder.end("other", None, None, None)
    recorder.text("late")
    world.turn()
    assert world.answer().events == [{"type": "tool_end", **HEAD, "output": "done"}]
    end(recorder)
    recorder.text("late")
    assert world.is_idle


def test_more_than_is_kept_is_announced_once_behind_all_that_is(world: World, recorder: Recorder) -> None:
    recorder.text("x" * 19 + "€ and more")
    recorder.text("more")
    world.turn()
    world.answer()
    world.passes(0.05)
    assert "truncated" not in world.answer().events[0]
    world.passes(0.05)
    assert world.answer().events == [{"type": "tool_output_delta", **HEAD, "delta": "xxx", "truncated": True}]
    recorder.text("more")
    assert world.is_idle
    assert world.counters.tool_texts_truncated == 1


def test_it_is_announced_alone_where_all_that_is_kept_was_stored_before(world: World, recorder: Recorder) -> None:
    recorder.text("x" * 20)
    for _ in range(3):
        world.passes(0.05)
        world.turn()
        world.answer()
    assert not any("truncated" in recorded.event for recorded in world.log)
    recorder.text("y")
    end(recorder)
    world.turn()
    announced, ended = world.answer().events
    assert announced == {"type": "tool_output_delta", **HEAD, "delta": "", "truncated": True}
    assert ended["type"] == "tool_end"


@pytest.mark.parametrize("refusal", [unavailable("storage fails: full"), overloaded("too many", 1_000)])
def test_what_storage_refuses_is_tried_again_after_growing_pauses(
    world: World, recorder: Recorder, refusal: RpcError
) -> None:
    recorder.text("one")
    world.turn()
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        world.answer(refusal)
        world.passes(pause_s - 0.01)
        assert not world.asks
        world.passes(0.02)
        assert len(world.asks) == 1
    assert world.counters.tool_record_retries == 4
    recorder.text(" two")
    world.answer()
    world.passes(0.05)
    world.answer()
    assert world.text == "one two"
    recorder.text("3")
    world.passes(0.05)
    world.answer(refusal)
    world.passes(1.0)
    assert world.asks, "the pause begins anew"


def test_an_end_that_storage_refuses_is_tried_again_with_all_that_is_left(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    world.answer(unavailable("full"))
    recorder.text(" two")
    end(recorder)
    world.turn()
    assert not world.asks, "it keeps the pause"
    world.passes(1)
    world.answer(unavailable("full"))
    assert len(world.recorders) == 1
    world.passes(2)
    world.answer()
    assert world.text == "one two"
    assert world.log[-1].event["type"] == "tool_end"
    assert len(world.recorders) == 0


def test_where_the_run_was_deleted_it_gives_up_quietly_and_its_row_goes(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    world.deleted = True
    world.answer(not_found("run", RUN))
    recorder.text("two")
    assert world.recorders.waiting_bytes == 0
    end(recorder)
    world.passes(0.05)
    world.answer()
    assert world.closed == [HANDLE]
    assert len(world.recorders) == 0
    assert world.counters.tool_records_given_up == 0


def test_a_row_goes_too_where_the_end_came_while_the_text_was_refused(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    end(recorder)
    world.deleted = True
    world.answer(not_found("run", RUN))
    world.passes(0.05)
    world.answer()
    assert world.closed == [HANDLE]
    assert len(world.recorders) == 0


def test_where_an_outcome_is_unknown_it_stops(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    recorder.text("two")
    world.answer(unavailable("fsync failed", outcome="unknown"))
    end(recorder)
    world.passes(100)
    assert world.is_idle
    assert len(world.recorders) == 0


def test_damage_is_not_tried_for_ever_and_is_told(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    for _ in range(3):
        world.passes(4)
        world.turn()
        world.answer(Damaged("damaged"))
    assert world.counters.tool_records_given_up == 1
    end(recorder)
    for _ in range(3):
        world.passes(4)
        world.answer(Damaged("damaged"))
    assert world.counters.tool_records_given_up == 2
    assert len(world.recorders) == 0
    world.passes(100)
    assert world.is_idle


def test_damage_of_a_neighbour_loses_nothing(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    world.answer(Damaged("damaged"))
    world.passes(1)
    world.answer()
    assert world.text == "one"


def test_nobody_waits_for_a_recorder_that_met_a_defect(world: World, recorder: Recorder) -> None:
    recorder.text("one")
    world.turn()
    with pytest.raises(ZeroDivisionError):
        world.answer(ZeroDivisionError())
    end(recorder)
    assert len(world.recorders) == 0
    assert world.is_idle


def test_handles_that_were_left_open_are_closed_some_at_a_time_and_tried_again(world: World) -> None:
    names = [f"handle-{place}" for place in range(CLOSED_AT_ONCE + 10)]
    world.recorders.finish_open([OpenHandle(name, RUN, TOOL) for name in names], "restarted")
    assert not world.asks, "readiness does not wait"
    world.turn()
    assert len(world.asks) == CLOSED_AT_ONCE
    assert len(world.recorders) == len(names)
    world.answer(unavailable("full"))
    assert len(world.asks) == CLOSED_AT_ONCE - 1
    while world.asks:
        world.answer()
        assert len(world.asks) < CLOSED_AT_ONCE
    world.passes(1)
    world.answer()
    assert sorted(world.closed) == sorted(names)
    assert world.log[0].event == {
        "type": "tool_end",
        "id": names[1],
        "name": TOOL,
        "output": "",
        "error": "restarted",
    } | {"source": "carserver"}
    assert len(world.recorders) == 0


def test_with_nothing_left_open_there_is_nothing_to_close(world: World) -> None:
    world.recorders.finish_open([], "restarted")
    assert world.is_idle


def test_a_handle_begins_with_its_name() -> None:
    event = tool_start(HANDLE, TOOL)
    assert json.loads(event.raw) == {"type": "tool_start", **HEAD}
    assert (event.type, event.text) == ("tool_start", None)


def test_the_largest_end_fits_an_event_and_says_where_it_was_cut() -> None:
    settings = Settings()
    quotes = (settings.result_inline_bytes - 4) // 4
    result = b"[" + b",".join([b'""'] * quotes) + b"]"
    assert len(result) <= settings.result_inline_bytes
    whole = "é" * (settings.text_bytes // 2)
    event = tool_end(ToolEnd(id=HANDLE, name=TOOL, output=result.decode(), error=whole), settings.event_bytes)
    assert len(event.raw) <= settings.event_bytes
    assert json.loads(event.raw)["error"] == whole
    assert json.loads(event.raw)["output"] == result.decode()

    hostile = "\x01" * settings.text_bytes
    reference = ResultRef(id="out-1", size=1, preview="\x01" * settings.result_preview_chars)
    largest = ToolEnd(
        id=HANDLE, name='"' * settings.name_chars, output=result.decode(), error=hostile, result_ref=reference
    )
    assert len(encode(largest)) > settings.event_bytes
    event = tool_end(largest, settings.event_bytes)
    assert len(event.raw) <= settings.event_bytes
    assert json.loads(event.raw)["output"] == result.decode()
    assert json.loads(event.raw)["error"].endswith(f"(the first 65536 of {settings.text_bytes} characters)")


def test_a_piece_of_control_characters_fits_an_event() -> None:
    world = World()
    recorder = world.recorders.begin(HANDLE, "t" * 256, RUN)
    recorder.text("\x01" * 4096)
    world.turn()
    (ask,) = world.asks
    assert ask.change.size < Settings().event_bytes
    assert ask.events[0]["delta"] == "\x01" * 4096


async def test_a_real_log_has_all_of_it_also_after_the_run_is_over(tmp_path: Path) -> None:
    async with opened(tmp_path / "carserver.db") as store:
        await store.submit(create(RUN))
        for handle in (HANDLE, "left"):
            await store.store.edit(open_handle(handle, RUN))
        recorders = Recorders(store.store, LoopClock(), Settings(delta_s=0.001), store.counters)
        recorder = recorders.begin(HANDLE, TOOL, RUN)
        recorder.text("é" * 10_000)
        await store.append(RUN, Event(b'{"type":"agent_end","text":""}', "agent_end", ""))
        recorder.end("done", None, None, None)
        recorders.finish_open([OpenHandle("left", RUN, TOOL)], "restarted")
        while len(recorders):  # noqa: ASYNC110 - each of its answers is a turn of its own
            await asyncio.sleep(0)
        head = await store.head(RUN)
        assert head.run.status is Status.COMPLETED
        entries = (await store.store.scan(head, 0, head.cursor, 1_000, None)).entries
        events = [json.loads(entry.raw) for entry in entries]
        assert "".join(event.get("delta", "") for event in events) == "é" * 10_000
        assert sorted(event["id"] for event in events if event["type"] == "tool_end") == [HANDLE, "left"]
        for handle in (HANDLE, "left"):
            before = head.cursor
            await store.store.edit(close_handle(handle, RUN))
            assert (await store.head(RUN)).cursor == before, "its row is gone"
