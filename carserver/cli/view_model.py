"""A run as a person follows it: the records of its trace, folded into a tree of steps, turns and tools.

No I/O, no clock and no drawing here. Memory is bounded however long the run is (view_tree.py).
"""

from collections.abc import Callable
from typing import Any

from carserver.cli.plain import clipped
from carserver.cli.turns import Outcome, asked, compact, outcome, rejected, verdict
from carserver.cli.view_tree import (
    INPUT_CHARACTERS,
    NEAR,
    OUTPUT_CHARACTERS,
    TEXT_CHARACTERS,
    Kind,
    Node,
    State,
    Tree,
    Writing,
    end_of,
)
from carserver.cli.view_words import (
    TOLD_CHARACTERS,
    Tokens,
    count,
    first_text,
    fraction,
    given,
    key,
    members,
    milliseconds,
    reference,
    text,
    told,
    usage,
)
from carserver.client import Traced
from carserver.protocol.runs import LIVE, Snapshot

_PLANNED_STEPS = 200  # of one plan
_ENDINGS = ("_end", "_completed", "_finished", "_failed")
_STATES = {
    "pending": State.PENDING,
    "in_progress": State.RUNNING,
    "running": State.RUNNING,
    "failed": State.FAILED,
    "error": State.FAILED,
    "skipped": State.SKIPPED,
    "cancelled": State.SKIPPED,
}  # of a step or task, by the agent's word for it; any other word is an end


class RunModel:
    """One run, as far as its records were taken in; `changes` grows with each."""

    def __init__(self, run: Snapshot, *, first: int = 0) -> None:
        """The state to begin with.

        Args:
            run: the run when the view began.
            first: the sequence of the first event that will come; those before it are not shown.
        """
        self.run_id = run.id
        self.agent_id = run.agent_id
        self.session_id = run.session_id
        self.prompt = run.prompt
        self.status: str = run.status
        self.created_ms = run.created_at_ms
        self.newest_ms = run.created_at_ms  # of what was taken in
        self.ended_ms: int | None = None
        self.result_text: str | None = None
        self.error: str | None = None
        self.outcome: Outcome | None = None  # what the agent itself said of it, at its end
        self.reason: str | None = None  # why it was cancelled or interrupted
        self.over = False  # `ended` came, and nothing after it
        self.first = first
        self.cursor = first
        self.known_cursor = run.event_count  # there are at least so many
        self.changes = 0
        self.goal = ""
        self.fraction: float | None = None  # of the whole, where the agent tells
        self.tokens = Tokens()
        self.tree = Tree()
        self.writing = Writing()
        self._latest_tool: Node | None = None
        self._section: Node | None = None  # the planning, step or verification that is under way
        self._turn: Node | None = None
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "agent_start": self._agent_start,
            "agent_end": self._agent_end,
            "error": self._error,
            "planning_start": lambda event: self._open_section(Kind.PLANNING, event),
            "planning_end": self._planning_end,
            "verification_start": lambda event: self._open_section(Kind.VERIFICATION, event),
            "task_updated": lambda event: self._plan(event.get("tasks")),
            "goal_extracted": self._goal,
            "goal_progress": self._goal,
            "goal_achieved": self._goal,
            "step_start": self._step_start,
            "step_end": self._step_end,
            "turn_start": self._turn_start,
            "turn_end": self._turn_end,
            "tool_start": self._tool_start,
            "tool_execution_start": self._tool_start,
            "tool_input_delta": self._tool_input,
            "tool_output_delta": self._tool_output,
            "tool_end": self._tool_end,
            "tool_execution_end": self._tool_end,
        }

    def take(self, traced: Traced) -> None:
        """Takes in one record."""
        self.changes += 1
        self.cursor = max(self.cursor, traced.cursor)
        self.known_cursor = max(self.known_cursor, self.cursor)
        self.status = traced.run_status
        record = traced.record
        match traced.kind:
            case "started":
                self.prompt = self.prompt or text(record.get("intent"))
            case "ended":
                self._ended(record)
            case "event":
                event = record.get("event")
                if isinstance(event, dict):
                    self._event(text(event.get("type")), event, record.get("timestamp_ms"))
            case "turn":
                self._goes_on(None)
                self._whole_turn(record)
            case "model_turn":
                self._goes_on(milliseconds(record.get("recorded_at")))
                self._whole_model_turn(record)
            case kind:  # of a later daemon
                self._event(kind, record, record.get("timestamp_ms"))

    def settle(self, run: Snapshot) -> None:
        """What only the snapshot tells, once the run is over."""
        self.reason = run.cancel_reason or run.interrupted_reason
        self.ended_ms = run.ended_at_ms or self.ended_ms
        self.changes += 1

    def resume(self, run: Snapshot) -> None:
        """An interrupted run goes on: its owner is back, and no event has said so yet."""
        self.status, self.over, self.reason, self.ended_ms = run.status, False, None, None
        self.changes += 1

    def elapsed_ms(self, now_ms: int) -> int:
        """How long it has been going on, or took. A clock that is behind the daemon's does not make it negative."""
        if self.over:
            return max((self.ended_ms or self.newest_ms) - self.created_ms, 0)
        return max(now_ms, self.newest_ms) - self.created_ms

    def _event(self, type_: str, event: dict[str, Any], at_ms: Any) -> None:
        self._goes_on(at_ms)
        handler = self._handlers.get(type_)
        if handler is not None:
            handler(event)
        elif type_.endswith("_delta") and (piece := first_text(event, "text", "delta")) is not None:
            self.writing.write(clipped(type_.removesuffix("_delta"), TOLD_CHARACTERS), piece)
        else:
            self._unknown(clipped(type_, TOLD_CHARACTERS), event)

    def _goes_on(self, at_ms: Any) -> None:
        if self.status in LIVE:
            self.over, self.reason, self.outcome = False, None, None
        if isinstance(at_ms, int):
            self.newest_ms = max(self.newest_ms, at_ms)

    def _ended(self, record: dict[str, Any]) -> None:
        self.over = True
        self.result_text = first_text(record, "result_text")
        self.error = first_text(record, "error")
        self.outcome = outcome(record)
        ended_ms = milliseconds(record.get("ended_at"))
        self.ended_ms = self.newest_ms if ended_ms is None else ended_ms

    def _add(self, parent: Node, node: Node) -> Node:
        node.started_ms = self.newest_ms
        return self.tree.add(parent, node, self._section, self._turn)

    @property
    def _place(self) -> Node:
        """Where what happens now belongs."""
        return self._turn or self._section or self.tree.root

    # ------------------------------------------------------------------------------------------- the whole run

    def _agent_start(self, event: dict[str, Any]) -> None:
        self.prompt = self.prompt or clipped(text(event.get("prompt")), TEXT_CHARACTERS)
        self._turn = None  # a step's agent may follow another's

    def _agent_end(self, event: dict[str, Any]) -> None:
        if (used := usage(event)) is not None:
            self.tokens.raise_to(used)
        self._close(State.DONE)

    def _error(self, event: dict[str, Any]) -> None:
        self.error = clipped(text(event.get("message")), TEXT_CHARACTERS)
        self._close(State.FAILED)

    def _close(self, state: State) -> None:
        """Ends the turn and the section that are under way."""
        for node in (self._turn, self._section):
            if node is not None:
                node.end(state, self.newest_ms)
        self._turn = self._section = None

    def _goal(self, event: dict[str, Any]) -> None:
        given = event.get("goal")
        goal: dict[str, Any] = given if isinstance(given, dict) else {**event, "description": given}
        self.goal = clipped(text(goal.get("description")), TOLD_CHARACTERS)
        found = 1.0 if event.get("type") == "goal_achieved" else fraction(goal)
        self.fraction = self.fraction if found is None else found

    # ---------------------------------------------------------------------------------------------------- steps

    def _open_section(self, kind: Kind, event: dict[str, Any]) -> None:
        detail = clipped(first_text(event, "description", "prompt", "title") or "", TOLD_CHARACTERS)
        self._turn = None
        self._section = self._add(self.tree.root, Node(kind, kind, detail=detail))

    def _planning_end(self, event: dict[str, Any]) -> None:
        self._end_planning()
        plan = event.get("plan")
        if isinstance(plan, dict):
            self._plan(plan.get("steps"))

    def _end_planning(self) -> None:
        if self._section is not None and self._section.kind is Kind.PLANNING:
            self._close(State.DONE)

    def _plan(self, steps: Any) -> None:
        """What is to be done, and how far it is."""
        planned = steps[:_PLANNED_STEPS] if isinstance(steps, list) else []
        for number, step in enumerate(planned, 1):
            if isinstance(step, dict):
                node = self._step(key(step.get("id")), first_text(step, "content", "description", "title") or "")
                node.title = f"step {number}/{len(planned)}"
                state = _STATES.get(text(step.get("status")), State.DONE)
                if state is State.RUNNING and node.state is State.PENDING:
                    node.state, node.started_ms = state, self.newest_ms
                elif state is not State.PENDING:
                    node.end(state, self.newest_ms)

    def _step(self, id_: str, content: str) -> Node:
        node = self.tree.steps.get(id_)
        if node is None:
            node = self._add(self.tree.root, Node(Kind.STEP, "step", State.PENDING, key=id_))
            node.started_ms = None
        node.detail = clipped(content, TOLD_CHARACTERS) or node.detail
        return node

    def _step_start(self, event: dict[str, Any]) -> None:
        self._end_planning()
        node = self._step(key(event.get("step_id")), first_text(event, "description", "content") or "")
        number, total = count(event.get("step_number")), count(event.get("total_steps"))
        if number is not None:
            node.title = f"step {number}" if total is None else f"step {number}/{total}"
        node.state, node.started_ms, node.ended_ms = State.RUNNING, self.newest_ms, None
        self._section, self._turn = node, None

    def _step_end(self, event: dict[str, Any]) -> None:
        node = self.tree.steps.get(key(event.get("step_id"))) or self._section
        if node is None:
            return
        state = _STATES.get(text(event.get("status")), State.DONE)
        node.end(State.DONE if state in {State.PENDING, State.RUNNING} else state, self.newest_ms)
        if node is self._section:
            self._section = self._turn = None

    # ---------------------------------------------------------------------------------------------------- turns

    def _turn_start(self, event: dict[str, Any]) -> None:
        if self._turn is not None:
            self._turn.end(State.DONE, self.newest_ms)
            self._turn = None
        number = count(event.get("turn"))
        self._turn = self._add(self._place, Node(Kind.TURN, "turn" if number is None else f"turn {number}"))
        self.writing.break_line()

    def _turn_end(self, event: dict[str, Any]) -> None:
        used = usage(event)
        if used is not None:
            self.tokens.add(used)
        if self._turn is not None:  # its tools run on, and come to an end under it
            self._turn.tokens = used
            self._turn.end(State.DONE, self.newest_ms)

    def _whole_turn(self, record: dict[str, Any]) -> None:
        """A turn that was recorded when it was over: what a tool was asked, and what it answered.

        That of a proposal's action belongs to the tool that is shown already, which lacks what it was asked.
        """
        handle = key(record.get("handle"))
        if handle and (shown := self.tree.tools.get(handle)) is not None:
            shown.detail = shown.detail or given(record.get("parameters"))
            if record.get("status") == "failed" and shown.state is not State.FAILED:
                self.tree.counts["failed"] += 1
                shown.state = State.FAILED  # when it ended its `tool_end` says, or has said in the words of an error
            return
        index, tool = count(record.get("index")), told(record.get("tool"))
        node = self._add(self._place, Node(Kind.TURN, "turn" if index is None else f"turn {index}"))
        node.remark = "  ".join(said for said in (rejected(record), verdict(record)) if said)
        node.detail = clipped(f"{tool}  {given(record.get('parameters'))}".strip(), TOLD_CHARACTERS) if tool else ""
        node.detail = node.detail or told(record.get("prompt"))
        output = record.get("output")
        said = record.get("cli_outcome") if output is None else output
        node.output = "" if said is None else compact(said)
        node.started_ms = None
        failed = record.get("policy_rejected") or record.get("status") == "failed"
        node.end(State.FAILED if failed else State.DONE, None)

    def _whole_model_turn(self, record: dict[str, Any]) -> None:
        """A turn of a model that was recorded when it was over: what it wrote, and which tools it asked for."""
        number, took, used = count(record.get("turn_index")), count(record.get("duration_ms")), usage(record)
        self.writing.break_line()
        self.writing.write("text", text(record.get("assistant_text")))
        self.writing.break_line()
        node = self._add(self._place, Node(Kind.TURN, "model turn" if number is None else f"model turn {number}"))
        node.detail = told(record.get("model_id"))
        node.started_ms = None if took is None else self.newest_ms - took
        node.tokens = used
        self.tokens.add(used or Tokens())
        for name, arguments in asked(record):
            call = Node(Kind.CALL, f"asks for {name}" if name else "asks for", State.DONE, detail=given(arguments))
            self._add(node, call).started_ms = None
        node.end(State.DONE, self.newest_ms)

    # ---------------------------------------------------------------------------------------------------- tools

    def _tool_start(self, event: dict[str, Any]) -> None:
        node = self.tree.tools.get(key(event.get("id")))
        if node is None or not node.open:
            node = self._tool(event)
        for name in ("args", "arguments", "input", "parameters"):
            if event.get(name):
                node.detail = given(event[name])
        self._latest_tool = node

    def _tool(self, event: dict[str, Any]) -> Node:
        name = first_text(event, "name", "tool", "title") or "tool"
        return self._add(self._place, Node(Kind.TOOL, clipped(name, TOLD_CHARACTERS), key=key(event.get("id"))))

    def _tool_input(self, event: dict[str, Any]) -> None:
        node = self.tree.tools.get(key(event.get("id"))) or self._latest_tool
        if node is not None:
            node.input = (node.input + (first_text(event, "delta", "text") or ""))[:INPUT_CHARACTERS]

    def _tool_output(self, event: dict[str, Any]) -> None:
        node = self.tree.tools.get(key(event.get("id"))) or self._tool(event)
        node.write(first_text(event, "delta", "text") or "")
        node.cut = node.cut or event.get("truncated") is True
        self._progress(node, event)

    def _tool_end(self, event: dict[str, Any]) -> None:
        node = self.tree.tools.get(key(event.get("id")))
        if node is None:  # its start came before what is shown, or was folded
            node = self._tool(event)
            node.started_ms = None
        error, exit_code = told(event.get("error")), event.get("exit_code")
        output = end_of(first_text(event, "output", "result") or "") or reference(event.get("result_ref"))
        if error and error != f"exit code {exit_code}":  # which is shown already
            output = error
        node.output = output or node.output
        if error or (isinstance(exit_code, int) and exit_code != 0):
            self.tree.counts["failed"] += node.open
            node.exit_code = exit_code if isinstance(exit_code, int) else None
            node.end(State.FAILED, self.newest_ms)
        else:
            node.end(State.DONE, self.newest_ms)
        if node.ended_ms is None:  # its turn said before that it failed, but not when
            node.ended_ms = self.newest_ms

    @staticmethod
    def _progress(node: Node, event: dict[str, Any]) -> None:
        found = fraction(event)
        node.fraction = node.fraction if found is None else found

    # ------------------------------------------------------------------------------------------ all other types

    def _unknown(self, type_: str, event: dict[str, Any]) -> None:
        """Shown by what can be told from outside: news of a tool, the start or end of something, or a note."""
        tool = self.tree.tools.get(key(event.get("id")))
        if tool is None and type_.startswith("tool_"):
            tool = self._latest_tool
        if tool is not None:
            self._progress(tool, event)
            tool.output = clipped(first_text(event, "message", "text", "output") or tool.output, OUTPUT_CHARACTERS)
        elif (
            type_.startswith("verification_") and self._section is not None and self._section.kind is Kind.VERIFICATION
        ):
            self._section.detail = members(event)
            if type_.endswith(_ENDINGS):
                self._close(_ending(type_))
        elif type_.endswith("_start"):
            span = self._add(self._place, Node(Kind.SPAN, type_.removesuffix("_start"), detail=members(event)))
            self._progress(span, event)
        elif not self._of_a_span(type_, event):
            self._note(type_, event)

    def _of_a_span(self, type_: str, event: dict[str, Any]) -> bool:
        """Whether an event is news of what began here under its name; then it is shown there."""
        for node in reversed(self._place.children[-NEAR:]):
            if node.kind is Kind.SPAN and node.open and type_.startswith(f"{node.title}_"):
                node.detail = members(event)
                self._progress(node, event)
                if type_.endswith(_ENDINGS):
                    node.end(_ending(type_), self.newest_ms)
                return True
        return False

    def _note(self, type_: str, event: dict[str, Any]) -> None:
        place = self._place
        node = place.children[-1] if place.children else None
        if node is None or node.kind is not Kind.NOTE:
            node = self._add(place, Node(Kind.NOTE, type_, State.DONE, events=0))
        node.title = type_
        node.events += 1
        node.detail = members(event)
        node.fraction = fraction(event)


def _ending(type_: str) -> State:
    return State.FAILED if type_.endswith("_failed") else State.DONE
