"""`$<id>.output` in an action's parameters: a string value that is exactly that stands for another action's output.

Pure. The parameters stay bytes, so that every number in them keeps its own literal; they are known to be JSON.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import orjson

from carserver.config import Settings
from carserver.protocol.codec import STRINGS
from carserver.protocol.errors import limit_exceeded

_BEGINS = (b'"$', b'"\\u0024')
_ENDS = ".output"
_IS_KEY = re.compile(rb"\s*:")
_AT = "parameters"


class Reference(NamedTuple):
    """Where one stands, with its quotes, and the place of the action that it names."""

    start: int
    end: int
    place: int


def references(raw: bytes, places: Mapping[str, int]) -> list[Reference]:
    """The references to actions of these ids, in order; whatever else looks like one stays as it is."""
    if not places or not any(begin in raw for begin in _BEGINS):
        return []
    found = []
    for token in STRINGS.finditer(raw):
        if not token[0].startswith(_BEGINS) or _IS_KEY.match(raw, token.end()):
            continue
        text: str = orjson.loads(token[0])
        place = places.get(text[1 : -len(_ENDS)]) if text.endswith(_ENDS) else None
        if place is not None:
            found.append(Reference(token.start(), token.end(), place))
    return found


def check_size(raw: bytes, found: Sequence[Reference], sizes: Mapping[int, int], settings: Settings) -> None:
    """Refuses parameters that would be larger than a message, with outputs of these sizes in them.

    Raises:
        RpcError: limit_exceeded.
    """
    size = len(raw) + sum(sizes[one.place] - (one.end - one.start) for one in found)
    if found and size > settings.message_bytes:
        raise limit_exceeded("message_bytes", size, settings.message_bytes, _AT)


def filled(raw: bytes, found: Sequence[Reference], outputs: Mapping[int, bytes], settings: Settings) -> bytes:
    """The parameters with the outputs, JSON, in place of what refers to them.

    Raises:
        RpcError: limit_exceeded, as for a message with so many brackets.
    """
    pieces, at = [], 0
    for one in found:
        pieces += [raw[at : one.start], outputs[one.place]]
        at = one.end
    made = b"".join([*pieces, raw[at:]])
    brackets = made.count(b"{") + made.count(b"[") if found else 0
    if brackets > settings.brackets:
        raise limit_exceeded("brackets", brackets, settings.brackets, _AT)
    return made
