"""`carserver runs trace`: a run's live log, a line for each event, for a person or a pipe."""

import sys
from contextlib import aclosing, suppress
from typing import Any

import click
import msgspec

from carserver.cli.output import in_colour, json_data, note
from carserver.cli.plain import clipped, visible, visible_lines
from carserver.cli.talk import ANSWER_S
from carserver.cli.turns import asked, compact, figures, outcome, rejected, verdict
from carserver.cli.view_words import count, first_text, milliseconds, reference, told
from carserver.client import CallError, ClientError, Traced, TraceReset
from carserver.client.trace import Opener, trace
from carserver.protocol.errors import ErrorKind
from carserver.protocol.runs import Snapshot, Status

_TEXT_CHARACTERS = 400  # of an event that is not text itself; the whole is in --json
_TYPE_WIDTH = 20
_STOPPED = {Status.CANCELLED, Status.INTERRUPTED}  # for a reason that its records do not say
# What of an event is worth a line; the first that it has. Other types show their members as JSON.
_TELLING: dict[str, tuple[str, ...]] = {
    "agent_start": ("prompt",),
    "planning_start": ("prompt",),
    "agent_end": ("text",),
    "error": ("message",),
    "tool_start": ("name", "id"),
    "tool_end": ("name", "exit_code", "error", "output", "result_ref"),
    "step_start": ("step_number", "description"),
    "step_end": ("step_number", "status"),
}
_COLOURS = (  # by how the type begins; the first that fits
    ("error", "red"),
    ("tool_", "cyan"),
    ("agent_", "green"),
    ("planning_", "magenta"),
    ("step_", "magenta"),
    ("goal_", "magenta"),
    ("verification_", "blue"),
)


async def follow(open_connection: Opener, run_id: str, *, cursor: int, epoch: str | None, as_json: bool) -> None:
    """Prints the records of a run until it has ended; the position goes to standard error if it breaks off."""
    view = TraceView(coloured=in_colour())
    last: Traced | None = None
    records = trace(open_connection, run_id, cursor=cursor, epoch=epoch)
    try:
        async with aclosing(records):
            async for record in records:
                last = record
                if as_json:
                    json_data(record.raw, indented=False)
                else:
                    stopped = record.kind == "ended" and record.run_status in _STOPPED
                    why = await _why(open_connection, run_id) if stopped else None
                    sys.stdout.write(view.show(record, why))
                    sys.stdout.flush()
    except ClientError as error:
        note_position(last, error)
        raise
    finally:
        sys.stdout.write(view.close())


async def _why(open_connection: Opener, run_id: str) -> str | None:
    """Why a run was cancelled or interrupted, which its records do not say; None where it cannot be asked any more."""
    with suppress(ClientError):
        async with open_connection() as connection:
            run = await connection.call("runs.get", {"run_id": run_id}, ANSWER_S, result_type=Snapshot)
        return run.cancel_reason or run.interrupted_reason
    return None


def note_position(last: Traced | None, error: ClientError) -> None:
    """How to go on where a trace broke off; nothing where there is no such log any more."""
    gone = isinstance(error, TraceReset) or (isinstance(error, CallError) and error.type == ErrorKind.NOT_FOUND.type)
    if last is not None and not gone:
        note(f"to go on from here: --cursor {last.cursor} --epoch {visible(last.epoch)}")


class TraceView:
    """Records as text. Text that streams in pieces is joined; the pieces of one text stand below each other."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured
        self._first_ms: int | None = None
        self._stream: tuple[str, str] | None = None  # type and id of the text that is being joined
        self._at_line_start = True

    def show(self, record: Traced, why: str | None = None) -> str:
        """What is to be written for one record; `why` is the reason of the end that it says."""
        match record.kind:
            case "started":
                return self._started(record)
            case "ended":
                return self.close() + self._ended(record, why)
            case "turn":
                style = "error" if rejected(record.record) else "turn"
                return self.close() + self._line(record, self._styled(style, _turn(record.record)))
            case "model_turn":
                return self.close() + self._line(record, *_model_turn(record.record))
        content = record.record.get("event") if record.kind == "event" else None
        event: dict[str, Any] = content if isinstance(content, dict) else record.record
        type_ = str(event.get("type", record.kind))
        piece = _piece(type_, event)
        if piece is None:
            return self.close() + self._prefix(record, type_) + self._styled(type_, _told(type_, event)) + "\n"
        stream = (type_, str(event.get("id", "")))
        before = ""
        if event.get("truncated") is True:
            piece += "\n… (more was not recorded)\n"
        if stream != self._stream:
            before = self.close() + self._prefix(record, type_)
            self._stream = stream
            self._at_line_start = False
        return before + self._joined(piece)

    def close(self) -> str:
        """What ends a line that is still open."""
        ending = "" if self._stream is None or self._at_line_start else "\n"
        self._stream = None
        self._at_line_start = True
        return ending

    def _line(self, record: Traced, *lines: str) -> str:
        """A turn that was recorded whole: the first line beside its name, further ones below each other."""
        kind = record.kind
        return self._prefix(record, kind) + f"\n{_INDENT}".join(lines) + "\n"

    def _joined(self, piece: str) -> str:
        """A piece of text, its further lines below the first; an indent is written when something follows it."""
        written = []
        for line in visible_lines(piece).splitlines(keepends=True):
            written.append(_INDENT + line if self._at_line_start else line)
            self._at_line_start = line.endswith("\n")
        return "".join(written)

    def _prefix(self, record: Traced, type_: str) -> str:
        members = record.record
        whole = record.kind in {"turn", "model_turn"}  # of which an agent may have named members as it likes
        time_ms = milliseconds(members.get("recorded_at")) if whole else members.get("timestamp_ms")
        offset = ""
        if isinstance(time_ms, int):
            if self._first_ms is None:
                self._first_ms = time_ms
            offset = f"+{(time_ms - self._first_ms) / 1000:.3f}"
        sequence = count(members.get("index" if whole else "sequence"))
        name = self._styled(type_, f"{visible(type_):<{_TYPE_WIDTH}}")
        return self._dim(f"{'' if sequence is None else sequence:>7} {offset:>10}  ") + name + " "

    def _started(self, record: Traced) -> str:
        agent = f" by {visible(record.agent_id)}" if record.agent_id else ""
        intent = visible(clipped(str(record.record.get("intent", "")), _TEXT_CHARACTERS))
        when = visible(str(record.record.get("started_at", "")))
        return self._dim(f"{visible(record.run_id)}{agent}, {when}") + (f": {intent}\n" if intent else "\n")

    def _ended(self, record: Traced, why: str | None) -> str:
        text = why or str(record.record.get("error") or record.record.get("result_text") or "")
        said = f": {visible(clipped(text, _TEXT_CHARACTERS))}" if text else ""
        colour = {"completed": "green", "failed": "red"}.get(record.run_status, "yellow")
        status = visible(record.run_status)
        end = f"{click.style(status, fg=colour, bold=True) if self._coloured else status}{said}\n"
        if (found := outcome(record.record)) is not None:
            lines = [("outcome", found.status), *found.lines]
            end += "".join(f"  {self._dim(visible(name) + ':')} {visible(text)}\n" for name, text in lines)
        return end

    def _styled(self, type_: str, text: str) -> str:
        colour = next((colour for begin, colour in _COLOURS if type_.startswith(begin)), None)
        return click.style(text, fg=colour) if self._coloured and colour else text

    def _dim(self, text: str) -> str:
        return click.style(text, dim=True) if self._coloured else text


_INDENT = " " * (7 + 1 + 10 + 2 + _TYPE_WIDTH + 1)


def _piece(type_: str, event: dict[str, Any]) -> str | None:
    """The text of an event that is a piece of a longer one."""
    if not type_.endswith("_delta"):
        return None
    return next((event[name] for name in ("text", "delta") if isinstance(event.get(name), str)), None)


def _told(type_: str, event: dict[str, Any]) -> str:
    """An event's content on one line; what is cut ends with an ellipsis."""
    if type_ in _TELLING:
        values = [event[name] for name in _TELLING[type_] if event.get(name) not in (None, "")]
        text = "  ".join(reference(value) or str(value) for value in values)
    else:
        rest = {name: value for name, value in event.items() if name != "type"}
        text = msgspec.json.encode(rest).decode() if rest else ""
    return visible(clipped(text, _TEXT_CHARACTERS))


def _turn(turn: dict[str, Any]) -> str:
    """What an agent did and what came of it, on one line; what the policy and the verifier said of it comes first."""
    tool = told(turn.get("tool"))
    given = turn.get("parameters") if tool else turn.get("prompt")
    said = [rejected(turn), verdict(turn), tool, "" if given is None else compact(given)]
    said += ["" if one is None else f"→ {compact(one)}" for one in (turn.get("output"), turn.get("cli_outcome"))]
    return visible("  ".join(one for one in said if one))


def _model_turn(turn: dict[str, Any]) -> list[str]:
    """What a model wrote, the tools that it asked for, and its figures."""
    written = visible_lines(first_text(turn, "assistant_text") or "").rstrip("\n")
    lines = written.split("\n") if written else []
    for name, arguments in asked(turn):
        lines.append(visible(f"→ {name}  {compact(arguments)}" if name else f"→ {arguments}"))
    said = visible(figures(turn))
    return [*lines, said] if said or not lines else lines
