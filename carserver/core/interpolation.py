"""`$<id>.output` in an action's parameters: a string value that is exactly that stands for another action's output.

Pure. The parameters stay bytes, so that every number in them keeps its own literal; they are known to be JSON.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import orjson

from carserver.config import Settings
from carserver.protocol.errors import limit_exceeded

REFERENCES = 10_000
"""Strings in one action's parameters that look like a reference: each is looked at."""
_ENDS = ".output"
_AT = "parameters"


@cache  # it takes as long to compile as many modules take to import
def _looks_so() -> re.Pattern[bytes]:
    """A whole string, and no name of a member, which begins as a reference, and ends so or has escapes.

    An escaped quote stands behind a backslash, and behind a quote that ends a string comes neither $ nor a backslash.
    """
    return re.compile(
        rb'(?<!\\)"(?:\$|\\u0024)(?:[^"\\]*\.output|(?=[^"\\]*+\\)[^"\\]*+(?:\\.[^"\\]*+)*+)"(?!\s*:)', re.DOTALL
    )


class Reference(NamedTuple):
    """Where one stands, with its quotes, and the place of the action that it names."""

    start: int
    end: int
    place: int


def references(raw: bytes, places: Mapping[str, int]) -> list[Reference]:
    """The references to actions of these ids, in order; whatever else looks like one stays as it is.

    Raises:
        RpcError: limit_exceeded.
    """
    found: list[Reference] = []
    if not places:
        return found
    for number, token in enumerate(_looks_so().finditer(raw), 1):
        if number > REFERENCES:
            raise limit_exceeded("references", number, REFERENCES, _AT)
        text: str = orjson.loads(token[0])
        place = places.get(text[1 : -len(_ENDS)]) if text.endswith(_ENDS) else None
        if place is not None:
            found.append(Reference(token.start(), token.end(), place))
    return found


def filled_size(raw: bytes, found: Sequence[Reference], sizes: Mapping[int, int], settings: Settings) -> int:
    """How large parameters are with outputs of these sizes in them.

    Raises:
        RpcError: limit_exceeded, where that is larger than a message.
    """
    size = len(raw) + sum(sizes[one.place] - (one.end - one.start) for one in found)
    if size > settings.message_bytes:
        raise limit_exceeded("message_bytes", size, settings.message_bytes, _AT)
    return size


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
    brackets = made.count(b"{") + made.count(b"[")
    if brackets > settings.brackets:
        raise limit_exceeded("brackets", brackets, settings.brackets, _AT)
    return made
