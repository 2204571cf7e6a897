"""What a turn that was recorded whole tells a person, and the outcome that its run was completed with.

Such records come from the methods of the CAR dialect (contract, section 10). What is told is bounded, and nothing of it
is made visible: that is done where it is printed.
"""

from itertools import islice
from typing import Any, NamedTuple

import msgspec

from carserver.cli.output import counted, duration
from carserver.cli.plain import clipped
from carserver.cli.view_words import TOLD_CHARACTERS, count, text, told, usage

_ASKED = 20  # tool calls of one turn, each of them on a line
_EVIDENCE = 20  # likewise, of one outcome
_MEMBERS = 16  # of an outcome or its metrics
_TOLD_ELSEWHERE = frozenset({"status", "summary", "evidence", "metrics", "timestamp"})


class Asked(NamedTuple):
    """A tool call that a model asked for; `name` is empty where this stands for the rest of many."""

    name: str
    arguments: Any


class Outcome(NamedTuple):
    """What a run came to in its agent's own words; `lines` are names and what there is to say."""

    status: str
    lines: list[tuple[str, str]]


def compact(value: Any) -> str:
    """A value as the JSON that it is, or the beginning of that; a text as it is."""
    if isinstance(value, str):
        return clipped(value, TOLD_CHARACTERS)
    return clipped(msgspec.json.encode(value).decode(), TOLD_CHARACTERS)


def rejected(turn: dict[str, Any]) -> str:
    """That the policy refused a turn, and why where that is told; else nothing."""
    value = turn.get("policy_rejected")
    if not value:
        return ""
    return "rejected by policy" if value is True else f"rejected by policy: {told(value)}"


def verdict(turn: dict[str, Any]) -> str:
    """What the verifier said of a turn; nothing where it was not asked."""
    value = turn.get("verifier_verdict")
    return "" if value is None or value == "not_run" else f"verifier: {told(value)}"


def asked(model_turn: dict[str, Any]) -> list[Asked]:
    """The tool calls that a model asked for, as many as are worth a line, and then how many more."""
    given = model_turn.get("requested_tool_calls")
    calls = given if isinstance(given, list) else []
    shown = [
        Asked(told(call.get("name")) or "tool", call.get("arguments"))
        if isinstance(call, dict)
        else Asked("tool", call)
        for call in calls[:_ASKED]
    ]
    return [*shown, Asked("", counted(len(calls) - _ASKED, "more call"))] if len(calls) > _ASKED else shown


def figures(model_turn: dict[str, Any]) -> str:
    """Which model it was, what it used, how long it took."""
    used, took = usage(model_turn), count(model_turn.get("duration_ms"))
    said = [told(model_turn.get("model_id"))]
    said += [str(used)] if used is not None and used.total else []
    said += [] if took is None else [duration(took)]
    return " · ".join(one for one in said if one)


def outcome(ended: dict[str, Any]) -> Outcome | None:
    """The outcome in the record `ended` of a run, where it was completed with one."""
    termination = ended.get("termination")
    given = termination.get("outcome") if isinstance(termination, dict) else None
    if not isinstance(given, dict):
        return None
    lines = []
    summary = text(given.get("summary"))
    if summary not in {"", ended.get("result_text"), ended.get("error")}:  # which stands there already
        lines.append(("summary", told(summary)))
    evidence = given.get("evidence")
    if isinstance(evidence, list):
        lines += [("evidence", _evidence(one)) for one in evidence[:_EVIDENCE]]
        if len(evidence) > _EVIDENCE:
            lines.append(("evidence", f"… {len(evidence) - _EVIDENCE:,} more"))
    metrics = given.get("metrics")
    if isinstance(metrics, dict) and metrics:
        lines.append(("metrics", " · ".join(_metric(*one) for one in islice(metrics.items(), _MEMBERS))))
    rest = ((name, value) for name, value in given.items() if name not in _TOLD_ELSEWHERE and value is not None)
    lines += [(told(name), compact(value)) for name, value in islice(rest, _MEMBERS)]
    return Outcome(told(given.get("status")), lines)


def _evidence(value: Any) -> str:
    if not isinstance(value, dict):
        return compact(value)
    kind, description, data = told(value.get("kind")), told(value.get("description")), value.get("data")
    said = ": ".join(one for one in (kind, description) if one)
    return said if data is None else f"{said}  {compact(data)}"


def _metric(name: str, value: Any) -> str:
    number = count(value)
    if number is not None and name.endswith("_ms"):
        return f"{_words(name.removesuffix('_ms'))} {duration(number)}"
    return f"{_words(name)} {told(value) if number is None else f'{number:,}'}"


def _words(name: str) -> str:
    return told(name).replace("_", " ")
