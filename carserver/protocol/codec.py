"""From bytes to values and back: what counts as JSON here, and how a value is typed. Nothing below trusts its input.

`orjson.loads` is the one proof that a message is JSON: it refuses invalid UTF-8, bad escapes, lone surrogates, NaN and
numbers outside a double, all of which `msgspec.Raw` lets pass unseen. What has passed here may be kept as bytes.
"""

import re
from typing import Any, TypeVar

import msgspec
import orjson
from msgspec import Raw

from carserver.protocol.choices import choices
from carserver.protocol.errors import ErrorKind, RpcError, invalid_params, limit_exceeded

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
encode = _encoder.encode
"""A value as compact JSON bytes."""

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>.*)`)?$", re.DOTALL)
# The last may have no end: it is not sought again. Nothing is tried twice, so nothing of it is remembered: 16 MiB of
# escapes would take a gigabyte.
STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BETWEEN_TOKENS = re.compile(rb"[\n\r\t]")  # raw control characters cannot stand inside a JSON string


def parse(message: bytes, nesting: int, brackets: int) -> Any:
    """The value of a message.

    Raises:
        RpcError: limit_exceeded where it has more than `brackets`; parse_error where it is not JSON, or they nest
            deeper than `nesting`.
    """
    opening = message.count(b"{") + message.count(b"[")
    if opening > brackets and (opening := _opening(STRINGS.sub(b"", message))) > brackets:
        raise limit_exceeded("brackets", opening, brackets, "message")
    try:
        value = orjson.loads(message)
    except orjson.JSONDecodeError as error:
        raise RpcError(ErrorKind.PARSE_ERROR, f"not JSON: {error}") from None
    if opening > nesting and _deeper(value, nesting):
        raise RpcError(ErrorKind.PARSE_ERROR, f"brackets nest deeper than {nesting}")
    return value


def too_deep(source: bytes, value: Any, nesting: int) -> bool:
    """Whether `value`, read from `source`, has brackets nested deeper than `nesting`; walks it only if it might."""
    return _opening(source) > nesting and _deeper(value, nesting)


def nests_deeper(source: bytes, nesting: int) -> bool:
    """Whether `source`, known to be JSON, has brackets nested deeper than `nesting`; parses it only if it might."""
    return _opening(source) > nesting and _deeper(orjson.loads(source), nesting)


def _opening(source: bytes) -> int:
    """Its opening brackets, those in strings included."""
    return source.count(b"{") + source.count(b"[")


def _deeper(value: Any, nesting: int) -> bool:
    """Level by level, of each the containers alone; an empty one is a bracket too."""
    level = [value] if type(value) is dict or type(value) is list else []
    for _ in range(nesting):
        # In one piece: a call for each of 100,000 containers takes three times as long.
        level = [
            inner
            for container in level
            for inner in (container.values() if type(container) is dict else container)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def convert(value: Any, type_: type[T], at: str = "") -> T:
    """A parsed value as `type_`.

    Raises:
        RpcError: invalid_params, with the path below `at`.
    """
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise _refused(error, at, type_) from None


def decode(decoder: msgspec.json.Decoder[T], source: bytes | Raw, at: str = "") -> T:
    """JSON bytes that have passed `parse`, as the decoder's type; for types that keep bytes.

    Raises:
        RpcError: invalid_params, with the path below `at`.
    """
    try:
        return decoder.decode(source)
    except msgspec.ValidationError as error:
        raise _refused(error, at, decoder.type) from None


def _refused(error: msgspec.ValidationError, at: str, type_: Any) -> RpcError:
    found = _PLACE.match(str(error))
    what, path = (found["what"], found["path"] or "$") if found else (str(error), "$")
    below = path.removeprefix("$").removeprefix(".")
    joined = f"{at}.{below}" if at and below and not below.startswith("[") else at + below
    known = choices(type_, path) if what.startswith("Invalid enum value") else ()
    return invalid_params(joined, what[:1].lower() + what[1:] + (f"; one of: {', '.join(known)}" if known else ""))


def compact(raw: bytes) -> bytes:
    """`raw` on one line: as it came, unless there are raw line breaks or tabs between its tokens."""
    return msgspec.json.format(raw, indent=-1) if _BETWEEN_TOKENS.search(raw) else raw


def check_text(text: str, limit: str, maximum: int, where: str) -> None:
    """Refuses a text of more than `maximum` bytes of UTF-8.

    Raises:
        RpcError: limit_exceeded.
    """
    # A character has at most four bytes, so most texts need not be encoded to be measured.
    if len(text) * 4 > maximum and (size := len(text.encode())) > maximum:
        raise limit_exceeded(limit, size, maximum, where)


def check_name(name: str, maximum: int, where: str) -> None:
    """Refuses a name, key or foreign id that is long or has unprintable characters.

    Raises:
        RpcError: limit_exceeded, invalid_params.
    """
    if len(name) > maximum:
        raise limit_exceeded("name_chars", len(name), maximum, where)
    if not name.isprintable():
        raise invalid_params(where, "printable characters only, no control characters")
