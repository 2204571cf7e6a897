"""The frames of JSON-RPC 2.0: the envelope of a request, and how replies and notifications are put together.

A result that is already JSON is spliced in, never decoded and encoded again.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.codec import encode, too_deep
from carserver.protocol.errors import ErrorKind, RpcError

ID_INTEGER_MAXIMUM = 2**53  # the integers that every JSON reader keeps exactly
_ABSENT = object()


class _WithParams(Struct):
    params: Raw


_params_decoder = msgspec.json.Decoder(_WithParams)
raw_list_decoder = msgspec.json.Decoder(list[Raw])


class _ShortRequest(Struct, forbid_unknown_fields=True, gc=False):
    """A request without members that nobody asked for: then msgspec alone has read, and proved, all of it."""

    jsonrpc: Literal["2.0"]
    method: str
    id: int | str | UnsetType = UNSET
    params: Raw = Raw(b"{}")


_short_decoder = msgspec.json.Decoder(_ShortRequest)

SHORT_BYTES = 300
"""Of a short request: no number in it is outside a double for its length alone."""
_SHORT_ARRAYS = 8  # and no bracket nests too deep


def read_short(message: bytes, id_chars: int) -> tuple[bytes | None, str, Raw] | None:
    """The id, method and params of a short request; None for whatever has to be looked at more closely."""
    if b"\\" in message or message.count(b'"params"') > 1 or message.count(b"[") > _SHORT_ARRAYS:
        return None  # params given twice, and the first of them not proved by anyone
    try:
        request = _short_decoder.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    given = request.id
    if type(given) is int and -ID_INTEGER_MAXIMUM <= given <= ID_INTEGER_MAXIMUM:
        return b"%d" % given, request.method, request.params
    if type(given) is str and len(given) <= id_chars:
        return encode(given), request.method, request.params
    return (None, request.method, request.params) if given is UNSET else None


def raw_params(message: bytes | Raw) -> bytes:
    """The params of a request as their own bytes; it is known to have some."""
    return bytes(_params_decoder.decode(message).params)


class InvalidRequest(RpcError):
    """JSON that is no request; `id_` is the id to answer to (JSON-RPC 2.0, section 5: null where it cannot be told)."""

    def __init__(self, id_: bytes, message: str) -> None:
        super().__init__(ErrorKind.INVALID_REQUEST, message)
        self.id_ = id_


Params = dict[str, Any] | list[Any] | None
"""Parsed; None where there are none."""


def read_request(
    value: dict[str, Any], id_chars: int, *, null_params: bool = False
) -> tuple[bytes | None, str, Params]:
    """The id of a request as JSON bytes (None: a notification), its method, its params (JSON-RPC 2.0, section 4).

    `null_params`: they may be null, which says that there are none; the CAR client sends that.

    Raises:
        InvalidRequest: naming the member.
    """
    given = value.get("id", _ABSENT)
    id_: bytes | None
    if given is _ABSENT:
        id_ = None
    elif type(given) is int and -ID_INTEGER_MAXIMUM <= given <= ID_INTEGER_MAXIMUM:
        id_ = b"%d" % given
    elif type(given) is str and len(given) <= id_chars:
        id_ = encode(given)
    elif given is None:
        id_ = b"null"
    else:
        raise InvalidRequest(
            b"null", f"id: a string of at most {id_chars} characters, an integer within ±2^53, or null"
        )
    if value.get("jsonrpc") != "2.0":
        raise InvalidRequest(id_ or b"null", 'jsonrpc: must be "2.0"')
    method = value.get("method")
    if type(method) is not str:
        raise InvalidRequest(id_ or b"null", "method: must be a string")
    params = value.get("params")
    left_out = params is None and (null_params or "params" not in value)
    if type(params) is not dict and type(params) is not list and not left_out:
        raise InvalidRequest(id_ or b"null", "params: must be an object or an array, or be left out")
    return id_, method, params


class _Answers(Struct):
    id: str
    method: str | UnsetType = UNSET


_answers_decoder = msgspec.json.Decoder(_Answers)


def answers(message: bytes) -> str | None:
    """The id that a message answers which is not to be read as a whole; None where it is no answer, or none is seen."""
    try:
        found = _answers_decoder.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found.id if found.method is UNSET else None


class _Reply(Struct):
    result: Raw


_reply_decoder = msgspec.json.Decoder(_Reply)


def read_reply(value: dict[str, Any], message: bytes | Raw, nesting: int) -> tuple[bytes | None, str | None]:
    """What a reply to a request of ours says: its result as its own bytes, or the words of its error.

    A reply that is none (JSON-RPC 2.0, section 5) is an error, too, in words that say what is wrong with it. An `error`
    that is null is as if it were left out: version 1 of the protocol has it so, and there are libraries that mix them.

    Args:
        value: What came, parsed.
        message: And its bytes.
        nesting: Brackets that may be within the result.
    """
    error = value.get("error")
    if ("result" in value) == (error is not None):
        return None, f"the answer has {'both result and error' if 'result' in value else 'neither result nor error'}"
    if "result" in value:
        result = bytes(_reply_decoder.decode(message).result)
        if too_deep(result, value["result"], nesting):
            return None, f"the answer's result has brackets that nest deeper than {nesting} (value_nesting)"
        return result, None
    if type(error) is not dict or type(error.get("message")) is not str:
        return None, "the answer's error is no object with a string `message`"
    return None, error["message"]


def is_terminal(value: dict[str, Any]) -> bool:
    """Whether a reply is an error after which, its host says, trying again will not help: `error.data.terminal`."""
    error = value.get("error")
    data = error.get("data") if type(error) is dict else None
    return type(data) is dict and data.get("terminal") is True


def result_frame(id_: bytes, result: bytes) -> bytes:
    """A reply, from an id and a result that are JSON already."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (id_, result)


def error_frame(id_: bytes, error: RpcError) -> bytes:
    """An error reply; `id_` is `null` where the request's could not be read."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (id_, encode(error.to_wire()))


def request(id_: str, method: str, params: Any) -> bytes:
    """A request of the daemon's own, to a peer that is to answer it."""
    return b'{"jsonrpc":"2.0","method":%b,"id":%b,"params":%b}' % (encode(method), encode(id_), encode(params))


def notification(method: str, params: Any) -> bytes:
    """A message of the daemon's own that wants no answer."""
    return b'{"jsonrpc":"2.0","method":%b,"params":%b}' % (encode(method), encode(params))


def batch_frame(replies: list[bytes]) -> bytes:
    """The reply to a batch."""
    return b"[%b]" % b",".join(replies)
