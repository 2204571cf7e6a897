"""A turn as the CAR dialect records it, before it is stored: what is too large is cut, and marked.

This is the one place where something is cut: its client expects it (contract, section 10). Everything else of a turn
is kept as it came, also members that nobody here knows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import orjson
from msgspec import Raw

from carserver.config import Settings
from carserver.core.runs import Event
from carserver.protocol.codec import encode, too_deep
from carserver.protocol.errors import invalid_params, limit_exceeded
from carserver.protocol.runs import RECORDS
from carserver.protocol.trace import turn_event

CUT = "…[truncated]"
REPLACED = "…[truncated: turn exceeded {kib} KiB]"

NOT_RUN: Mapping[str, Raw] = {"verifier_verdict": Raw(b'"not_run"')}
"""What a turn says of its verifier where it says nothing."""
_SAID_BY_US = ("type", "record", "index", "recorded_at")
_members = msgspec.json.Decoder(dict[str, Raw])
_whole = msgspec.json.Decoder()


class Turn(NamedTuple):
    """A turn that has passed: its place in RECORDS, and its members as `protocol.trace.turn_event` wants them."""

    kind: int
    members: bytes

    def event(self, sequence: int) -> Event:
        """As the log's entry `sequence`."""
        return Event(turn_event(self.kind, sequence, self.members), RECORDS[self.kind], None, self.kind)


def take_in_turn(given: Raw, kind: int, defaults: Mapping[str, Raw], settings: Settings, at: str) -> Turn | None:
    """A turn, known to be JSON, within the limits; None where it cannot be made to fit.

    Args:
        given: The turn. What the daemon says of it (`type`, `record`, `index`, `recorded_at`) is left out.
        kind: Its place in RECORDS.
        defaults: Members of those that it lacks, or has as null.
        settings: `recorded_turn_bytes`, `recorded_string_bytes`, `value_nesting`.
        at: Its place in params.

    Raises:
        RpcError: invalid_params, limit_exceeded.
    """
    raw = msgspec.json.format(bytes(given), indent=-1)
    value = orjson.loads(raw)
    if type(value) is not dict:
        raise invalid_params(at, "a turn is an object")
    if too_deep(raw, value, settings.value_nesting):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, at)
    members = {name: _cut(bytes(member), settings) for name, member in _members.decode(raw).items()}
    for name in _SAID_BY_US:
        members.pop(name, None)
    for name, default in defaults.items():
        if members.get(name, b"null") == b"null":
            members[name] = bytes(default)
    return _fitted(kind, members, settings.recorded_turn_bytes)


def _cut(member: bytes, settings: Settings) -> bytes:
    """A member whose strings are cut; most are short, and stay by their own bytes."""
    maximum = settings.recorded_string_bytes
    return member if len(member) <= maximum else encode(_cut_strings(_whole.decode(member), maximum))


def _cut_strings(value: Any, maximum: int) -> Any:
    if type(value) is str:
        if len(value) * 4 <= maximum:
            return value
        data = value.encode()
        return value if len(data) <= maximum else data[:maximum].decode(errors="ignore") + CUT
    if type(value) is list:
        return [_cut_strings(item, maximum) for item in value]
    if type(value) is dict:
        return {name: _cut_strings(item, maximum) for name, item in value.items()}
    return value


def _fitted(kind: int, members: dict[str, bytes], maximum: int) -> Turn | None:
    """The largest members make room for a mark, one by one, until the turn fits."""
    mark = encode(REPLACED.format(kib=maximum // 1024))
    turn = Turn(kind, _joined(members))
    for name in sorted(members, key=lambda name: len(members[name]), reverse=True):
        if len(turn.members) <= maximum or len(members[name]) <= len(mark):
            break
        members[name] = mark
        turn = Turn(kind, _joined(members))
    return turn if len(turn.members) <= maximum else None


def _joined(members: dict[str, bytes]) -> bytes:
    return b"".join(b",%b:%b" % (encode(name), member) for name, member in members.items()) + b"}"


def events_of(turns: Sequence[Turn], first: int) -> list[Event]:
    """Turns as the log's entries from `first` on."""
    return [turn.event(first + place) for place, turn in enumerate(turns)]
