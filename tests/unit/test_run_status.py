"""The status machine, over every pair of a status and an event or operation.

The tables here are written from the contract, section 7, and not from the code: two writers must agree.
"""

import itertools

import pytest
from msgspec.structs import replace

from carserver.core import runs
from carserver.core.runs import Event, Head, advance
from carserver.protocol.errors import RpcError
from carserver.protocol.runs import STATUSES, Snapshot, Status

NOW = 5_000

# From the status of the column, the event of the row leads to: c(reated), p(lanning), e(xecuting), v(erifying),
# C(ompleted), F(ailed), X (cancelled). The last column is an interrupted run, which its owner's record reopens:
# executing, then the table.
STATUS_OF = dict(zip("cpevCFXI", STATUSES, strict=True))
EVENTS = """
event                 c p e v C F X I
agent_start           e e e e C F X e
planning_start        p p p p C F X p
step_start            e p e e C F X e
turn_start            e p e e C F X e
tool_start            e p e e C F X e
tool_execution_start  e p e e C F X e
verification_start    v v v v C F X v
agent_end             C C C C C F X C
error                 F F F F C F X F
text_delta            c p e v C F X e
turn                  c p e v C F X e
turn_end              c p e v C F X e
agent_start_          c p e v C F X e
"""
OPERATIONS = """
operation             c p e v C F X I
fail                  F F F F C F X F
cancel                X X X X C F X X
resume                c p e v ! ! ! e
complete              C C C C ! ! ! C
complete_failed       F F F F ! ! ! F
interrupt             I I I I C F X I
"""


def table(text: str) -> list[tuple[str, Status, str]]:
    """Rows of (what, status before, letter of the status after)."""
    head, *rows = [line.split() for line in text.strip().splitlines()]
    return [(row[0], STATUS_OF[before], after) for row in rows for before, after in zip(head[1:], row[1:], strict=True)]


def head(status: Status = Status.EXECUTING, *, prompt: str = "asked", count: int = 3, error: str | None = None) -> Head:
    """A run as it may be in that status, with three events, changed last at 2,000."""
    over = status in ("completed", "failed", "cancelled", "interrupted")
    run = Snapshot(
        id="run-1",
        session_id="",
        agent_id="",
        status=status,
        prompt=prompt,
        created_at_ms=1_000,
        updated_at_ms=2_000,
        event_count=count,
        error=error if error is not None else ("broke" if status is Status.FAILED else None),
        result_text="made" if status is Status.COMPLETED else None,
        cancel_reason="stop" if status is Status.CANCELLED else None,
        interrupted_reason="owner gone" if status is Status.INTERRUPTED else None,
        ended_at_ms=2_000 if over else None,
        epoch="epoch",
    )
    return Head(no=7, owner="client", run=run, revision=11, endings=int(over), last_at_ms=1_900)


def event(type_: str, text: str | None = None) -> Event:
    """An event that has passed intake."""
    if text is None:
        text = {"agent_start": "prompt of the event", "agent_end": "text of the event", "error": "message"}.get(type_)
    return Event(b'{"type":"%b"}' % type_.encode(), type_, text)


def operate(operation: str, before: Head, now_ms: int = NOW) -> Head:
    """One of the operations."""
    if operation == "resume":
        return runs.resume(before, now_ms)
    if operation.startswith("complete"):
        status = Status.FAILED if operation == "complete_failed" else Status.COMPLETED
        return runs.complete(before, status, "because", b'{"status":"as it says"}', now_ms)
    return {"fail": runs.fail, "cancel": runs.cancel, "interrupt": runs.interrupt}[operation](before, "because", now_ms)


def over(status: Status) -> bool:
    return status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.INTERRUPTED)


@pytest.mark.parametrize(("type_", "before", "after"), table(EVENTS))
def test_an_event_moves_a_run_as_the_contracts_table_says(type_: str, before: Status, after: str) -> None:
    was = head(before)
    became, entries = advance(was, [event(type_)], NOW)
    assert became.run.status is STATUS_OF[after]
    assert [(entry.sequence, STATUSES[entry.status], entry.raw) for entry in entries] == [
        (3, STATUS_OF[after], event(type_).raw)
    ]
    assert became.cursor == 4
    assert became.revision == 12
    assert became.run.updated_at_ms == NOW
    came_to_be_over = over(STATUS_OF[after]) and (not over(before) or before is Status.INTERRUPTED)
    assert became.endings == was.endings + came_to_be_over
    if not over(STATUS_OF[after]):
        assert became.run.ended_at_ms is None
    else:
        assert became.run.ended_at_ms == (NOW if came_to_be_over else 2_000)
    assert became.run.interrupted_reason is None


@pytest.mark.parametrize(("_", "before", "after"), [row for row in table(EVENTS) if row[0] == "turn_start"])
def test_a_turn_of_the_car_dialect_moves_a_run_as_one_that_begins(_: str, before: Status, after: str) -> None:
    turn = Event(b'{"type":"turn","index":3}', "turn", None, runs.TURN)
    became, entries = advance(head(before), [turn], NOW)
    assert became.run.status is STATUS_OF[after]
    assert became.turns == 1
    assert entries[0].kind == runs.TURN


@pytest.mark.parametrize(("operation", "before", "after"), table(OPERATIONS))
def test_an_operation_moves_a_run_as_the_contracts_table_says(operation: str, before: Status, after: str) -> None:
    was = head(before)
    if after == "!":
        with pytest.raises(RpcError) as refused:
            operate(operation, was)
        assert (refused.value.kind.type, refused.value.data["reason"]) == ("conflict", "run_terminal")
        return
    became = operate(operation, was)
    assert became.run.status is STATUS_OF[after]
    if STATUS_OF[after] is before:
        assert became is was, "nothing is stored where nothing changes"
        return
    assert became.cursor == was.cursor
    assert became.revision == 12
    assert became.run.updated_at_ms == NOW
    assert became.endings == was.endings + over(STATUS_OF[after])
    assert became.run.ended_at_ms == (NOW if over(STATUS_OF[after]) else None)
    kept = {
        "fail": became.run.error,
        "cancel": became.run.cancel_reason,
        "interrupt": became.run.interrupted_reason,
        "complete": became.run.result_text,
        "complete_failed": became.run.error,
    }
    assert kept.get(operation, "because") == "because"
    assert became.outcome == (b'{"status":"as it says"}' if operation.startswith("complete") else None)
    assert became.last_at_ms == was.last_at_ms, "an operation is no event"


@pytest.mark.parametrize("first", ["agent_end", "error", "fail", "cancel"])
@pytest.mark.parametrize("second", ["agent_end", "error", "fail", "cancel", "interrupt"])
def test_the_first_final_status_wins_and_its_texts_stay(first: str, second: str) -> None:
    def step(before: Head, what: str) -> Head:
        return advance(before, [event(what)], NOW).head if what in ("agent_end", "error") else operate(what, before)

    ended = step(head(), first)
    later = step(ended, second)
    kept = ("status", "error", "result_text", "cancel_reason", "interrupted_reason", "ended_at_ms")
    assert [getattr(later.run, name) for name in kept] == [getattr(ended.run, name) for name in kept]
    assert later.endings == ended.endings == 1


def test_in_one_batch_too_the_first_final_status_wins_and_late_events_are_stored() -> None:
    batch = [event("agent_start"), event("error"), event("agent_end"), event("planning_start")]
    became, entries = advance(head(Status.CREATED), batch, NOW)
    assert [STATUSES[entry.status] for entry in entries] == ["executing", "failed", "failed", "failed"]
    assert [entry.sequence for entry in entries] == [3, 4, 5, 6]
    assert (became.run.status, became.run.error, became.run.result_text) == ("failed", "message", None)
    assert became.endings == 1


def test_agent_end_keeps_its_text_and_clears_an_error() -> None:
    became = advance(head(error="of an earlier attempt"), [event("agent_end", "all is well")], NOW).head
    assert (became.run.result_text, became.run.error) == ("all is well", None)


@pytest.mark.parametrize(("prompt", "after"), [("asked", "asked"), ("", "of the event")])
def test_agent_start_fills_the_prompt_only_if_it_is_empty(prompt: str, after: str) -> None:
    assert advance(head(prompt=prompt), [event("agent_start", "of the event")], NOW).head.run.prompt == after


def test_a_second_agent_start_does_not_change_what_the_first_has_filled() -> None:
    batch = [event("agent_start", "first"), event("agent_start", "second")]
    assert advance(head(prompt=""), batch, NOW).head.run.prompt == "first"


def test_a_late_agent_start_does_not_fill_the_prompt() -> None:
    assert advance(head(Status.CANCELLED, prompt=""), [event("agent_start", "late")], NOW).head.run.prompt == ""


def test_a_run_that_is_reopened_and_ends_again_in_one_batch_counts_another_ending() -> None:
    became, entries = advance(head(Status.INTERRUPTED), [event("text_delta"), event("agent_end")], NOW)
    assert [STATUSES[entry.status] for entry in entries] == ["executing", "completed"]
    assert (became.run.status, became.endings, became.run.ended_at_ms) == ("completed", 2, NOW)


def test_a_run_that_is_interrupted_resumed_and_interrupted_counts_both() -> None:
    became = head(Status.CREATED)
    for operation in ("interrupt", "resume", "interrupt", "fail"):
        became = operate(operation, became)
    assert (became.run.status, became.endings, became.revision) == ("failed", 3, 15)


@pytest.mark.parametrize("operation", ["fail", "cancel", "interrupt", "record"])
def test_times_never_go_back_whatever_the_clock_says(operation: str) -> None:
    before = head(Status.EXECUTING)
    became = advance(before, [event("error")], 10).head if operation == "record" else operate(operation, before, 10)
    assert (became.run.updated_at_ms, became.run.ended_at_ms) == (2_000, 2_000)
    assert became.run.created_at_ms == 1_000


def test_a_resume_does_not_go_back_in_time_either() -> None:
    assert operate("resume", head(Status.INTERRUPTED), 10).run.updated_at_ms == 2_000


def test_events_without_times_have_the_time_of_their_taking_in() -> None:
    became, entries = advance(head(), [event("a"), event("b")], NOW)
    assert [entry.timestamp_ms for entry in entries] == [NOW, NOW]
    assert became.last_at_ms == NOW


@pytest.mark.parametrize(
    ("at_ms", "kept"),
    [
        ([3_000, 4_000, 4_500], [3_000, 4_000, 4_500]),  # as said
        ([0, 1_000, 1_950], [1_900, 1_900, 1_950]),  # not before the last event's
        ([4_000, 3_000, 4_100], [4_000, 4_000, 4_100]),  # nor before the one in front
        ([4_000, 9_000, 4_100], [4_000, 5_000, 5_000]),  # nor after now
    ],
)
def test_a_given_time_is_clamped_between_the_last_events_and_now(at_ms: list[int], kept: list[int]) -> None:
    became, entries = advance(head(), [event("a"), event("b"), event("c")], NOW, at_ms)
    assert [entry.timestamp_ms for entry in entries] == kept
    assert became.last_at_ms == kept[-1]
    assert became.run.updated_at_ms == NOW, "that is when it was changed"
    later = advance(became, [event("d")], NOW, [0])
    assert later.entries[0].timestamp_ms == kept[-1]


def test_an_event_has_a_time_that_never_goes_back_though_the_clock_did() -> None:
    became, _ = advance(head(), [event("a")], NOW)
    again, entries = advance(became, [event("b")], 10)
    assert (entries[0].timestamp_ms, again.run.updated_at_ms) == (NOW, NOW)


def test_every_status_of_the_protocol_stands_in_the_tables() -> None:
    for text in (EVENTS, OPERATIONS):
        rows = table(text)
        assert {before for _, before, _ in rows} == set(STATUSES)
        assert len(rows) == len({what for what, _, _ in rows}) * len(STATUSES)
    assert {what for what, _, _ in table(EVENTS)} >= set(runs.EFFECTS)


def test_a_head_is_never_changed_in_place() -> None:
    for (_, before, _), operation in itertools.product(
        table("x c p e v C F X I\nx c p e v C F X I"), ["fail", "cancel"]
    ):
        was = head(before)
        copy = replace(was)
        operate(operation, was)
        advance(was, [event("agent_end")], NOW)
        assert was == copy
