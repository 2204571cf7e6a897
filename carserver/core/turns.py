"""A turn as the CAR dialect records it, before it is stored: what is too large is cut, and marked.

This is the one place where something is cut: its client expects it (contract, section 10). Everything else of a turn
is kept as it came, also members that nobody here knows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from carserver.config import Settings
from carserver.core.runs import Event
from carserver.protocol.codec import encode, nests_deeper
from carserver.protocol.errors import invalid_params, limit_exceeded
from carserver.protocol.runs import RECORDS
from carserver.protocol.trace import turn_event

CUT = "…[truncated]"
REPLACED = "…[truncated: turn exceeded {kib} KiB]"

NOT_RUN: Mapping[str, Raw] = {"verifier_verdict": Raw(b'"not_run"')}
"""What a turn says of its verifier where it says nothing."""
_NULL = Raw(b"null")
_LEAST_MEMBER, _LEAST_ITEM = len(b',"":0'), len(b",0")
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
    if not raw.startswith(b"{"):
        raise invalid_params(at, "a turn is an object")
    if nests_deeper(raw, settings.value_nesting):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, at)
    members = _members.decode(raw)
    if len(members) * _LEAST_MEMBER > settings.recorded_turn_bytes:
        return None
    for name, member in members.items():
        if len(member) > settings.recorded_string_bytes:
            members[name] = _cut(member, settings)
    for name in _SAID_BY_US:
        members.pop(name, None)
    for name, default in defaults.items():
        if members.get(name, _NULL) == _NULL:
            members[name] = default
    return _fitted(kind, members, settings.recorded_turn_bytes)


def _cut(member: Raw, settings: Settings) -> Raw:
    """A large member whose strings are cut; one that has none to cut stays by its own bytes, as small ones do."""
    value = _whole.decode(member)
    if _has_more(value, settings.recorded_turn_bytes // _LEAST_ITEM):
        return member  # too large however its strings are cut
    cut = _cut_strings(value, settings.recorded_string_bytes)
    return member if cut == value else Raw(encode(cut))


def _has_more(value: Any, most: int) -> bool:
    """Whether there are more values than that within it."""
    level = [value] if type(value) is list or type(value) is dict else []
    while level:
        most -= sum(map(len, level))
        if most < 0:
            return True
        level = [
            inner
            for container in level
            for inner in (container.values() if type(container) is dict else container)
            if type(inner) is list or type(inner) is dict
        ]
    return False


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


def _fitted(kind: int, members: dict[str, Raw], maximum: int) -> Turn | None:
    """The largest members make room for a mark, one by one, until the turn fits."""
    mark = Raw(encode(REPLACED.format(kib=maximum // 1024)))
    size = len(_joined(members))
    for name in sorted(members, key=lambda name: len(members[name]), reverse=True):
        if size <= maximum or len(members[name]) <= len(mark):
            break
        size += len(mark) - len(members[name])
        members[name] = mark
    return Turn(kind, _joined(members)) if size <= maximum else None


def _joined(members: dict[str, Raw]) -> bytes:
    return b",%b" % encode(members)[1:] if members else b"}"


def events_of(turns: Sequence[Turn], first: int) -> list[Event]:
    """Turns as the log's entries from `first` on."""
    return [turn.event(first + place) for place, turn in enumerate(turns)]
