"""The HTTP request before a socket becomes a WebSocket: who may open one, decided without I/O.

`Handshake` collects the head of the request, `decide` judges it, in the contract's order: Host, Origin, room, token,
upgrade (sections 5 and 9). Host stops DNS rebinding, Origin stops the web pages of other sites; both come before
anything that could tell such a page something. What the four HTTP pages contain is another module's.

`websockets` parses and computes the upgrade, by its Sans-I/O `ServerProtocol`; everything it answers in words is
replaced by ours, because its own texts echo header values at their full length.
"""

import logging
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

from msgspec import Struct
from websockets.exceptions import HeaderLineTooLong, RequestLineTooLong, TooManyHeaders
from websockets.http11 import MAX_LINE_LENGTH, MAX_NUM_HEADERS, Request
from websockets.server import ServerProtocol

from carserver.config import Settings
from carserver.core.principals import HOST, Principal

UNCHECKED_PAGES: Final = frozenset({"/healthz", "/readyz"})  # probes of a container send any Host; they tell nothing
CHECKED_PAGES: Final = frozenset({"/metrics", "/openrpc.json"})
PAGES: Final = UNCHECKED_PAGES | CHECKED_PAGES

PLAIN_TEXT: Final = "text/plain; charset=utf-8"
SHOWN_CHARS: Final = 64  # of a refused value, in the words that refuse it

# At DEBUG, `websockets` logs every header, Authorization included, so it gets a logger that cannot be switched on: one
# that no configuration knows by name, without parent or handler, above every level. We log decisions, not requests.
_SILENT: Final = logging.Logger(  # noqa: LOG001 - a configuration must not reach it by name
    "carserver.front.handshake.websockets", level=logging.CRITICAL + 1
)
_SILENT.propagate = False
_SILENT.disabled = True

_BLANK_LINE = re.compile(rb"\n\r?\n")
_REQUEST_LINE = re.compile(rb"[!-~]+ [!-~]+ HTTP/(?P<version>\d\.\d)\r?\n")
_BODY_HEADERS = re.compile(rb"^(?:content-length|transfer-encoding):[^\n]*\n", re.IGNORECASE | re.MULTILINE)
_METHOD_START = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# RFC 3986, 3.2.2, as far as names go in practice: an address in brackets, or a name; then a port, not looked at.
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{0,5})?")

Headers = Iterable[tuple[str, str]]


class Policy(Struct, frozen=True, kw_only=True):
    """What `decide` goes by. `allow_host` and `allow_origin` are normalised: see `policy_of`."""

    allow_host: frozenset[str]
    allow_origin: frozenset[str]
    auth: bool
    principal_of: Callable[[str], Principal | None]
    retry_after_s: int = 1


class Upgrade(Struct, frozen=True):
    """Send `response`, and the socket is a WebSocket; without a principal it has yet to authenticate."""

    response: bytes
    principal: Principal | None


class Answer(Struct, frozen=True):
    """Send `response`, close. `reason` is the same in short, fit for a log: no token, no control character."""

    status: int
    reason: str
    response: bytes


class Page(Struct, frozen=True):
    """Serve the page at `path`, one of PAGES, then close."""

    path: str


Decision = Upgrade | Answer | Page


def policy_of(settings: Settings, principal_of: Callable[[str], Principal | None]) -> Policy:
    """The policy that the settings describe; `principal_of` tells whose a token is.

    Raises:
        ValueError: an entry of `allow_host` is no name or address, or one of `allow_origin` no origin. `*` is neither.
    """
    return Policy(
        allow_host=frozenset(_allowed_host(entry) for entry in settings.allow_host),
        allow_origin=frozenset(_allowed_origin(entry) for entry in settings.allow_origin),
        auth=settings.auth,
        principal_of=principal_of,
        retry_after_s=max(1, -(-settings.retry_after_ms // 1000)),
    )


def http_answer(status: int, body: bytes, content_type: str = PLAIN_TEXT, headers: Headers = ()) -> bytes:
    """A whole HTTP/1.1 answer, after which the connection is closed. `headers` are ours, never the peer's words."""
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Connection: close",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
        "Cache-Control: no-store",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body


class Handshake:
    """Collects the head of one request. Bounded by `max_bytes`; the time it may take is its caller's to bound."""

    __slots__ = ("_held", "_max_bytes", "leftover")

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is the setting `handshake_bytes`: request line and headers together."""
        self._max_bytes = max_bytes
        self._held = bytearray()
        self.leftover = b""  # what came behind the head: the first bytes of a FrameReader

    def feed(self, data: bytes) -> Request | Answer | None:
        """Takes what was read; None until the head is complete. Not to be called again after a result."""
        held = self._held
        searched = max(0, len(held) - 2)  # the blank line may begin in what came before
        held += data
        if held and held[0] not in _METHOD_START:
            # What is not HTTP, TLS above all, would otherwise wait for a blank line until the time is over.
            return _refuse(400, "not an HTTP request: this port speaks plain HTTP/1.1 and WebSocket (ws://, no TLS)")
        blank = _BLANK_LINE.search(held, searched)
        if (len(held) if blank is None else blank.end()) > self._max_bytes:
            return _refuse(431, f"request line and headers are over handshake_bytes ({self._max_bytes})")
        if blank is None:
            return None
        self.leftover = bytes(memoryview(held)[blank.end() :])
        return _parse(bytes(memoryview(held)[: blank.end()]))


def decide(request: Request, policy: Policy, full: str | None = None) -> Decision:
    """What becomes of a request. `full` names the limit that leaves no room for one more connection, if one does.

    Pure: the same for the same arguments, no token and no unbounded value in what it returns.
    """
    path = request.path.partition("?")[0]
    if path not in UNCHECKED_PAGES:
        refusal = _check_host(request, policy) or _check_origin(request, policy)
        if refusal is not None:
            return refusal
    if path in PAGES:
        return Page(path) if request.method == "GET" else _not_get()
    if full is not None:
        words = f"no room for another connection: {full}; come back in {policy.retry_after_s} s"
        return _refuse(503, words, [("Retry-After", str(policy.retry_after_s))])
    principal = _principal(request, policy)
    return principal if isinstance(principal, Answer) else _upgrade(request, principal)


def _allowed_host(entry: str) -> str:
    try:
        return IPv6Address(entry).compressed  # without the brackets that a Host header has
    except AddressValueError:
        name = _host_name(entry)
    if name is None:
        raise ValueError(f"allow_host: {entry!r} is not a host name or address")
    return name


def _allowed_origin(entry: str) -> str:
    if "://" not in entry and entry != "null":  # "null" is what sandboxed frames and files send
        raise ValueError(f"allow_origin: {entry!r} is not a whole origin, such as https://example.org")
    return entry.rstrip("/").lower()


def _host_name(value: str) -> str | None:
    """The name in a Host header, in lower case and an IPv6 address in its short form; None for what is none."""
    match = _HOST.fullmatch(value)
    if match is None:
        return None
    if match["v6"] is None:
        return match["name"].lower()
    try:
        return IPv6Address(match["v6"]).compressed
    except AddressValueError:
        return None


def _is_loopback(name: str) -> bool:
    """`localhost`, 127.0.0.0/8 and ::1; not `*.localhost`, which not every resolver keeps at home."""
    if name in ("localhost", "::1"):
        return True
    try:
        return IPv4Address(name).is_loopback
    except AddressValueError:
        return False


def _check_host(request: Request, policy: Policy) -> Answer | None:
    values = request.headers.get_all("Host")
    if len(values) != 1:
        return _refuse(400, f"there must be exactly one Host header, not {len(values)}")
    name = _host_name(values[0])
    if name is not None and (_is_loopback(name) or name in policy.allow_host):
        return None
    return _refuse(
        421,
        f"Host {_shown(values[0])} is not a name of this server: connect to a loopback name,"
        " or start the server with --allow-host NAME",
    )


def _check_origin(request: Request, policy: Policy) -> Answer | None:
    values = request.headers.get_all("Origin")
    if not values:
        return None  # not a browser
    if len(values) > 1:
        return _refuse(403, f"there must be at most one Origin header, not {len(values)}")
    # Browsers send scheme and host in lower case (RFC 6454, 6.2); a person who configures one may not.
    if values[0].lower() in policy.allow_origin:
        return None
    return _refuse(
        403,
        f"Origin {_shown(values[0])} is not allowed to connect:"
        " to allow that web page, start the server with --allow-origin ORIGIN",
    )


def _principal(request: Request, policy: Policy) -> Principal | Answer | None:
    """Who the request acts as; None for a peer that brought no token."""
    if not policy.auth:
        return HOST
    values = request.headers.get_all("Authorization")
    if not values:
        return None
    if len(values) == 1:
        scheme, _, token = values[0].partition(" ")
        # An agent's id may begin with a space; more than one behind the scheme is legal too (RFC 9110, 11.4).
        for form in (token, token.strip(" ")):
            principal = policy.principal_of(form) if form and scheme.lower() == "bearer" else None
            if principal is not None:
                return principal
    return _refuse(
        401,
        "Authorization is not one header 'Bearer TOKEN' with a token of this server:"
        " 'carserver token' prints the right one",
        [("WWW-Authenticate", "Bearer")],
    )


def _upgrade(request: Request, principal: Principal | None) -> Upgrade | Answer:
    """The last step: is it an upgrade that RFC 6455, 4.2.1 accepts? No extension, no subprotocol."""
    response = _protocol().accept(request)
    if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
        return Upgrade(response.serialize(), principal)
    if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return _not_get()
    if response.status_code == HTTPStatus.UPGRADE_REQUIRED:
        host = request.headers["Host"]  # exactly one, and of a form without surprises: _check_host has seen it
        return _refuse(
            426,
            "this is a WebSocket endpoint that speaks JSON-RPC 2.0 (carserver), not a web page.\n"
            f"Connect with a WebSocket client, for example: wscat -c ws://{host}/\n"
            "Plain HTTP is at /healthz, /readyz, /metrics and /openrpc.json",
            [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")],
        )
    if response.status_code == HTTPStatus.HTTP_VERSION_NOT_SUPPORTED:
        return _refuse(505, "a WebSocket needs HTTP/1.1")
    return _refuse(
        400,
        "not a valid WebSocket upgrade: it needs one Sec-WebSocket-Key, 16 bytes in base64,"
        " and one Sec-WebSocket-Version, 13",
        [("Sec-WebSocket-Version", "13")],  # 4.4: a refusal tells the versions that would do
    )


def _parse(head: bytes) -> Request | Answer:
    """`head` ends with its blank line, so the parser has a result or an error and never waits."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        return _refuse(400, "not an HTTP request: its first line must be METHOD PATH HTTP/1.1")
    if line["version"] not in (b"1.1", b"1.0"):
        return _refuse(505, "this port speaks HTTP/1.1")
    if not head.startswith(b"GET "):
        # The parser refuses every body, before it tells the headers. What is not GET is refused in any case, but
        # by the same order as the rest, Host first; and its body is never read.
        head = _BODY_HEADERS.sub(b"", head)
    protocol = _protocol()
    protocol.receive_data(head)
    events = protocol.events_received()
    if events and isinstance(events[0], Request):
        return events[0]
    error = protocol.handshake_exc
    if isinstance(error, RequestLineTooLong):
        return _refuse(414, f"the request line is over {MAX_LINE_LENGTH} bytes")
    if isinstance(error, HeaderLineTooLong | TooManyHeaders):
        return _refuse(431, f"a header is over {MAX_LINE_LENGTH} bytes, or there are over {MAX_NUM_HEADERS}")
    return _refuse(400, "not a valid HTTP request: malformed headers, or a GET with a body")


def _protocol() -> ServerProtocol:
    return ServerProtocol(extensions=None, subprotocols=None, logger=_SILENT)


def _not_get() -> Answer:
    return _refuse(405, "only GET is served here", [("Allow", "GET")])


def _refuse(status: int, words: str, headers: Headers = ()) -> Answer:
    return Answer(status, words.partition("\n")[0], http_answer(status, f"{words}\n".encode(), headers=headers))


def _shown(value: str) -> str:
    """A peer's value in quotes, printable and short: it ends in terminals and logs."""
    return ascii(value if len(value) <= SHOWN_CHARS else f"{value[:SHOWN_CHARS]}...")
