"""Both vocabularies on one run, in any order and by anybody, against a small model: no sockets, no storage.

Safety: sequences are contiguous, a turn's `index` is its sequence, the first final status wins and all that it says
stays, an outcome is what `runs.complete` gave and nothing else, and what is refused changes nothing. Liveness: what the
model allows is done.
"""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import orjson
from hypothesis import given, settings

from carserver.core.commands import (
    Cancel,
    Command,
    Complete,
    Fail,
    Interrupt,
    Record,
    RecordAside,
    RecordTurns,
    Resume,
)
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.runs import EVENT, MODEL_TURN, TURN, Entry, Event, Head
from carserver.core.turns import Turn
from carserver.protocol.errors import RpcError
from carserver.protocol.runs import FINAL, LIVE, RECORDS, Status
from carserver.protocol.trace import entry_record
from tests.unit.storing import NOW_MS, create

RUN = "run"
STRANGER = Principal("agent", "stranger")

EVENTS = {
    "text_delta": None,
    "turn": None,  # recorded natively it is an event like any other
    "turn_start": Status.EXECUTING,
    "agent_end": Status.COMPLETED,
    "error": Status.FAILED,
}
"""Types of events, and where they lead a live run."""

TEXTS = {Status.COMPLETED: "result_text", Status.FAILED: "error", Status.CANCELLED: "cancel_reason"}
"""Where a run has the words that came with its final status."""
KEPT = ("status", "ended_at_ms", *TEXTS.values())
"""What a final status settles."""


class Done(NamedTuple):
    """An operation, who does it, and what the clock says then."""

    name: str
    said: Any
    by: Principal
    now_ms: int


def operation(name: str, said: st.SearchStrategy[Any]) -> st.SearchStrategy[Done]:
    """One that mostly the owner does."""
    by = st.sampled_from([CLIENT] * 8 + [HOST, STRANGER])
    return st.builds(Done, st.just(name), said, by, st.integers(NOW_MS - 5, NOW_MS + 50))


kinds = st.lists(st.sampled_from([TURN, MODEL_TURN]), min_size=1, max_size=4)
recording = operation("turns", kinds) | operation("record", st.lists(st.sampled_from(sorted(EVENTS)), min_size=1))
ending = operation("complete", st.sampled_from([Status.COMPLETED, Status.FAILED])) | operation("fail", st.none())
over = ending | operation("cancel", st.none())
moving = operation("resume", st.none()) | operation("interrupt", st.integers(0, 1)) | operation("aside", st.none())
operations = st.lists(recording | recording | moving | moving | over, max_size=25)


class World:
    """The run as the commands leave it, and as the model says that it is."""

    def __init__(self, most_turns: int, most_events: int) -> None:
        self.most_turns, self.most_events = most_turns, most_events
        command = create(RUN)
        self.head: Head = command.apply(None, None).head
        self.log: list[Entry] = []
        self.status = Status.CREATED
        self.kinds: list[int] = []
        self.text = ""  # of the final status
        self.endings = 0
        self.outcome: bytes | None = None

    def does(self, done: Done, number: int) -> None:
        """One operation, and what must be true of it."""
        before = self.head
        refusal = self.refusal(done)
        try:
            applied = self.command(done, number).apply(before, None)
        except RpcError as error:
            words = str(error.data.get("reason") or error.data.get("limit") or error.kind.name)
            assert words == refusal, "refused, and by this name"
            assert self.head is before
            return
        assert refusal is None, "done, and not refused"
        self.moves(done, number)
        self.head = applied.head
        assert [entry.sequence for entry in applied.entries] == list(range(before.cursor, applied.head.cursor))
        assert applied.ended == (applied.head.endings > before.endings)
        self.log += applied.entries
        self.agrees(before)

    def command(self, done: Done, number: int) -> Command:
        """As the methods would make it."""
        common: dict[str, Any] = {"run_id": RUN, "principal": done.by, "now_ms": done.now_ms}
        match done.name:
            case "turns":
                turns = [Turn(kind, b',"n":%d}' % number) for kind in done.said]
                return RecordTurns(**common, turns=turns, run_turns=self.most_turns, run_events=self.most_events)
            case "record":
                events = [Event(b'{"type":"%b"}' % name.encode(), name, f"{number}") for name in done.said]
                return Record(**common, events=events, run_events=self.most_events)
            case "complete":
                return Complete(**common, status=done.said, text=f"{number}", outcome=b'{"n":%d}' % number)
            case "fail":
                return Fail(**common, error=f"{number}")
            case "cancel":
                return Cancel(**common, reason=f"{number}")
            case "resume":
                return Resume(**common)
            case "interrupt":
                common["principal"] = HOST
                return Interrupt(**common, revision=self.head.revision - done.said, reason="gone")
            case _:
                common["principal"] = HOST
                return RecordAside(**common, events=[Event(b'{"type":"tool_end"}', "tool_end", None)])

    # The model.

    def refusal(self, done: Done) -> str | None:
        """Why it is refused; None where it is done."""
        if done.name in ("interrupt", "aside"):
            return None
        if done.by is STRANGER:
            return "NOT_FOUND"
        if done.by is HOST and done.name != "cancel":
            return "FORBIDDEN"
        if done.name in ("turns", "complete", "resume") and self.status in FINAL:
            return "run_terminal"
        if done.name == "turns" and sum(kind != EVENT for kind in self.kinds) + len(done.said) > self.most_turns:
            return "turns"
        if done.name in ("turns", "record") and len(self.kinds) + len(done.said) > self.most_events:
            return "run_events"
        return None

    def moves(self, done: Done, number: int) -> None:
        """What it comes to."""
        was = self.status
        match done.name:
            case "turns" | "record":
                self.reopens()
                for one in done.said:
                    self.kinds.append(EVENT if done.name == "record" else one)
                    leads_to = EVENTS[one] if done.name == "record" else Status.EXECUTING
                    if self.status in LIVE and leads_to is not None:
                        self.status = leads_to
                was = Status.EXECUTING if was is Status.INTERRUPTED else was
            case "complete":
                self.status, self.outcome = done.said, b'{"n":%d}' % number
            case "fail" | "cancel" if was not in FINAL:
                self.status = Status.FAILED if done.name == "fail" else Status.CANCELLED
            case "resume":
                self.reopens()
            case "interrupt" if was in LIVE and done.said == 0:
                self.status = Status.INTERRUPTED
            case "aside":
                self.kinds.append(EVENT)
        self.endings += self.status is not was and self.status not in LIVE
        if self.status is not was and self.status in FINAL:
            self.text = f"{number}"

    def reopens(self) -> None:
        """An interrupted run goes on."""
        if self.status is Status.INTERRUPTED:
            self.status = Status.EXECUTING

    def agrees(self, before: Head) -> None:
        """The head is what the model says, and what was settled has stayed."""
        head, run = self.head, self.head.run
        assert (run.status, head.cursor, head.endings) == (self.status, len(self.kinds), self.endings)
        assert head.turns == sum(kind != EVENT for kind in self.kinds)
        assert (head.live, run.ended_at_ms is None) == (run.status in LIVE,) * 2
        assert head.outcome == self.outcome
        if run.status in FINAL:
            assert getattr(run, TEXTS[run.status]) == self.text
        assert run.updated_at_ms >= before.run.updated_at_ms
        assert head.last_at_ms >= before.last_at_ms
        if before.run.status in FINAL:
            assert [getattr(run, name) for name in KEPT] == [getattr(before.run, name) for name in KEPT]

    def is_whole(self) -> None:
        """The log at the end, as the stream has it."""
        assert [entry.sequence for entry in self.log] == list(range(len(self.kinds)))
        assert [entry.kind for entry in self.log] == self.kinds
        for entry in self.log:
            record = orjson.loads(entry_record(entry.sequence, entry.timestamp_ms, entry.raw, entry.kind))
            assert record["record"] == RECORDS[entry.kind]
            assert record["sequence" if entry.kind == EVENT else "index"] == entry.sequence
        times = [entry.timestamp_ms for entry in self.log]
        assert times == sorted(times)
        assert sum(len(entry.raw) for entry in self.log) == self.head.log_bytes


@settings(max_examples=300, deadline=None)
@given(sequence=operations, most_turns=st.integers(1, 12), most_events=st.integers(1, 12))
def test_whatever_both_vocabularies_do_to_a_run_it_is_what_the_model_says(
    sequence: list[Done], most_turns: int, most_events: int
) -> None:
    world = World(most_turns, most_events)
    for number, done in enumerate(sequence):
        world.does(done, number)
    world.is_whole()
