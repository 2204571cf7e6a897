"""What the members of an agent's events may mean: the names in use for texts, progress and tokens.

Everything here is bounded: a value of any size is told in a few words, without being looked at as a whole.
"""

import reprlib
from datetime import datetime
from itertools import islice
from typing import Any

import msgspec
from msgspec import Struct

from carserver.cli.output import size
from carserver.cli.plain import clipped

TOLD_CHARACTERS = 200  # of one value
_MEMBERS = 8  # of an event of an unknown type
_KEY_CHARACTERS = 256  # of an id; the daemon's own bound for names
_NUMBER = 2**53  # beyond it no count means anything, and a float of it may not exist

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxstring = 2, 4, 4, 60


class Tokens(Struct):
    """What the model read and wrote, as far as the events tell."""

    input: int = 0
    output: int = 0
    total: int = 0

    def __str__(self) -> str:
        parts = f" ({self.input:,} in, {self.output:,} out)" if self.input or self.output else ""
        return f"{self.total:,} tokens{parts}"

    def add(self, usage: "Tokens") -> None:
        """One more turn."""
        self.input += usage.input
        self.output += usage.output
        self.total += usage.total

    def raise_to(self, usage: "Tokens") -> None:
        """The agent's own sum, where it is more than what its turns told."""
        self.input = max(self.input, usage.input)
        self.output = max(self.output, usage.output)
        self.total = max(self.total, usage.total)


def text(value: Any) -> str:
    """A text; of anything else, none."""
    return value if isinstance(value, str) else ""


def first_text(members: dict[str, Any], *names: str) -> str | None:
    """The first of these members that is a text."""
    return next((members[name] for name in names if isinstance(members.get(name), str)), None)


def key(value: Any) -> str:
    """An id, as what things are found by; empty where there is none."""
    if isinstance(value, str):
        return clipped(value, _KEY_CHARACTERS)
    number = count(value)
    return "" if number is None else str(number)


def count(value: Any) -> int | None:
    """A whole number from 0 on; a truth value is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _NUMBER else None


def told(value: Any) -> str:
    """A value in a few words."""
    if value is None:
        return ""
    return clipped(value if isinstance(value, str) else _short.repr(value), TOLD_CHARACTERS)


def milliseconds(value: Any) -> int | None:
    """A time of RFC 3339, since 1970."""
    try:
        return int(datetime.fromisoformat(text(value)).timestamp() * 1000)
    except (ValueError, OverflowError):
        return None


def members(event: dict[str, Any]) -> str:
    """The members of an event whose type says nothing to us."""
    pairs = [(name, value) for name, value in event.items() if name not in {"type", "record"} and value is not None]
    return clipped("  ".join(f"{name}: {told(value)}" for name, value in pairs[:_MEMBERS]), TOLD_CHARACTERS)


def arguments(written: str) -> str:
    """A tool's arguments in short: the values of a JSON object, or what there is of it so far."""
    try:
        value = msgspec.json.decode(written.encode("utf-8", "replace"))
    except (msgspec.DecodeError, RecursionError):
        return written
    return given(value)


def given(value: Any) -> str:
    """What a tool was given, in short: the values of an object."""
    if not isinstance(value, dict):
        return told(value)
    return clipped("  ".join(told(one) for one in islice(value.values(), _MEMBERS)), TOLD_CHARACTERS)


def reference(value: Any) -> str:
    """Where a tool's large result is, by its `result_ref`."""
    if not isinstance(value, dict) or not isinstance(value.get("id"), str):
        return ""
    length = count(value.get("size"))
    return f"the result is output {told(value['id'])}" + ("" if length is None else f", {size(length)}")


def fraction(event: dict[str, Any]) -> float | None:
    """How much of something is done, 0 to 1, by any of the names that are in use."""
    progress = event.get("progress")
    if isinstance(progress, dict):
        return fraction({name: value for name, value in progress.items() if name != "progress"})
    found = _number(event, "fraction")
    if found is None and (percent := _number(event, "percent", "percentage")) is not None:
        found = percent / 100
    if found is None and (given := _number(event, "progress")) is not None:
        found = given if given <= 1 else given / 100
    if found is None:
        part, whole = _number(event, "current", "completed", "completed_steps"), _number(event, "total", "total_steps")
        found = part / whole if part is not None and whole else None
    return None if found is None else min(found, 1.0)


def usage(event: dict[str, Any]) -> Tokens | None:
    """The tokens that an event says were used."""
    given = event.get("usage", event.get("token_usage"))
    if not isinstance(given, dict):
        return None
    read = int(_number(given, "prompt_tokens", "input_tokens") or 0)
    wrote = int(_number(given, "completion_tokens", "output_tokens") or 0)
    return Tokens(read, wrote, max(int(_number(given, "total_tokens") or 0), read + wrote))


def _number(event: dict[str, Any], *names: str) -> float | None:
    """The first of these members that is a number from 0 on; NaN is none, nor is a truth value."""
    for name in names:
        value = event.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _NUMBER:
            return value
    return None
