"""The HTTP request before the WebSocket: the matrix of Host, Origin, token and path, and everything malformed."""

import itertools
import logging
from email.parser import BytesParser
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.http11 import Request

from carserver.config import Settings
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.front import handshake
from carserver.front.handshake import Answer, Decision, Handshake, Page, Policy, Upgrade, decide, http_answer, policy_of

HANDSHAKE_BYTES = 16 * 1024
TOKEN = "the-right-token-0123456789"
WRONG = "some-wrong-token-9876543210"
AGENT = "a b: 7.0123456789abcdef"
UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",  # 1.3 of the RFC, with the answer
    "Sec-WebSocket-Version: 13",
)
KEY_ANSWER = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def principal_of(token: str) -> Principal | None:
    return {TOKEN: CLIENT, AGENT: Principal("agent", "a b: 7")}.get(token)


SETTINGS = Settings(
    allow_host=("Car.Example", "box.example:9100", "192.168.1.7", "fd00::7"), allow_origin=("https://App.example/",)
)
POLICY = policy_of(SETTINGS, principal_of)


def head(*lines: str, start: str = "GET / HTTP/1.1") -> bytes:
    return "\r\n".join((start, *lines, "", "")).encode("latin-1")


def outcome(data: bytes, policy: Policy = POLICY, full: str | None = None) -> Decision:
    request = Handshake(HANDSHAKE_BYTES).feed(data)
    assert request is not None
    return request if isinstance(request, Answer) else decide(request, policy, full)


class Parsed(NamedTuple):
    """An answer as a client sees it."""

    status: int
    headers: dict[str, str]
    body: str


def parsed(response: bytes) -> Parsed:
    first, _, rest = response.partition(b"\r\n")
    raw, _, body = rest.partition(b"\r\n\r\n")
    pairs = BytesParser().parsebytes(raw + b"\r\n\r\n").items()
    assert len({name.lower() for name, _ in pairs}) == len(pairs)
    return Parsed(int(first.split()[1]), {name.lower(): value for name, value in pairs}, body.decode())


def refusal(data: bytes, policy: Policy = POLICY, full: str | None = None) -> Parsed:
    """The answer; it has all that every refusal has, and nothing of a token."""
    answer = outcome(data, policy, full)
    assert isinstance(answer, Answer), answer
    seen = parsed(answer.response)
    assert seen.status == answer.status
    assert seen.headers["connection"] == "close"
    assert seen.headers["content-type"] == "text/plain; charset=utf-8"
    assert seen.headers["content-length"] == str(len(seen.body.encode()))
    assert seen.headers["x-content-type-options"] == "nosniff"
    assert seen.headers["cache-control"] == "no-store"
    assert seen.body.startswith(answer.reason)
    assert len(seen.body) < 400
    assert answer.reason.isprintable()
    for secret in (TOKEN, WRONG, AGENT):
        assert secret not in answer.response.decode()
    return seen


# The matrix

HOSTS = {
    "localhost:9100": True,
    "LOCALHOST": True,
    "127.0.0.1": True,
    "127.8.9.10:80": True,
    "[::1]:9100": True,
    "[0:0:0:0:0:0:0:1]": True,
    "car.example:1": True,
    "evil.example": False,
    "localhost.evil.example": False,
    "": False,
}
ORIGINS = {None: True, "https://app.example": True, "http://localhost:9100": False, "null": False}
TOKENS = {None: "absent", f"Bearer {TOKEN}": "right", f"Bearer {WRONG}": "wrong"}
PATHS = ["/", "/any/where?token=x", "/healthz", "/readyz", "/metrics", "/openrpc.json"]


def expected(host: str, origin: str | None, token: str | None, path: str, *, upgrade: bool) -> str:
    """The contract's words as a table of outcomes; `upgrade` is whether the request asks for a WebSocket."""
    if path in ("/healthz", "/readyz"):
        return f"page {path}"
    if not HOSTS[host]:
        return "421"
    if not ORIGINS[origin]:
        return "403"
    if path in ("/metrics", "/openrpc.json"):
        return f"page {path}"
    if TOKENS[token] == "wrong":
        return "401"
    if not upgrade:
        return "426"
    return "upgrade client" if TOKENS[token] == "right" else "upgrade nobody"


def in_words(decision: Decision) -> str:
    if isinstance(decision, Page):
        return f"page {decision.path}"
    if isinstance(decision, Answer):
        return str(decision.status)
    return f"upgrade {decision.principal.name if decision.principal else 'nobody'}"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_host_origin_token_and_path_decide_as_the_contract_says(host: str, origin: str | None) -> None:
    for token, path, upgrade in itertools.product(TOKENS, PATHS, [True, False]):
        lines = [f"Host: {host}"]
        lines += [f"Origin: {origin}"] if origin is not None else []
        lines += [f"Authorization: {token}"] if token is not None else []
        lines += UPGRADE if upgrade else []
        decision = outcome(head(*lines, start=f"GET {path} HTTP/1.1"))
        assert in_words(decision) == expected(host, origin, token, path, upgrade=upgrade), (token, path, upgrade)


def test_the_matrix_has_every_outcome() -> None:
    """Otherwise the matrix could pass with an oracle, and a decision, that always say the same."""
    rows = itertools.product(HOSTS, ORIGINS, TOKENS, PATHS, [True, False])
    seen = {expected(*row, upgrade=upgrade) for *row, upgrade in rows}  # type: ignore[arg-type]
    pages = {f"page {path}" for path in PATHS[2:]}
    assert seen == {"421", "403", "401", "426", "upgrade client", "upgrade nobody"} | pages


# Host


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("start", ["GET / HTTP/1.1", "GET /metrics HTTP/1.1", "POST / HTTP/1.1"])
def test_no_host_header_or_two_are_400(count: int, start: str) -> None:
    seen = refusal(head(*["Host: localhost"] * count, *UPGRADE, start=start))
    assert seen.status == 400
    assert f"exactly one Host header, not {count}" in seen.body


def test_a_configured_host_is_allowed_with_any_port() -> None:
    names = ("car.example", "CAR.EXAMPLE:80", "box.example", "box.example:1")
    for host in (*names, "192.168.1.7:9100", "[fd00::7]", "[FD00:0::7]:9"):
        assert isinstance(outcome(head(f"Host: {host}", *UPGRADE)), Upgrade), host


NO_HOST = ("localhost:evil.example", "localhost:80:80", "localhost@evil.example", "evil.example, localhost", "*", "")
NO_LOOPBACK = ("a.localhost", "localhost.", "127.0.0.1.evil.example", "127.1", "0127.0.0.1", "0.0.0.0", "128.0.0.1")
NO_V6_LOOPBACK = ("::1", "[::1", "[::2]", "[::ffff:1.2.3.4]", "[localhost]", "[fd00::8]")
NOT_CONFIGURED = ("evil.example", "car.example.evil", "xcar.example", "l\u00f6calhost")


@pytest.mark.parametrize("host", NO_HOST + NO_LOOPBACK + NO_V6_LOOPBACK + NOT_CONFIGURED)
def test_any_other_host_is_421_and_told_the_setting(host: str) -> None:
    seen = refusal(head(f"Host: {host}", f"Authorization: Bearer {TOKEN}", *UPGRADE))
    assert seen.status == 421
    assert ascii(host) in seen.body
    assert "--allow-host NAME" in seen.body


@pytest.mark.parametrize("entry", ["*", "*.example", "", " ", "//car.example", "a b"])
def test_a_setting_that_is_no_host_or_no_origin_is_an_error(entry: str) -> None:
    with pytest.raises(ValueError, match="allow_host"):
        policy_of(Settings(allow_host=(entry,)), principal_of)
    with pytest.raises(ValueError, match="allow_origin"):
        policy_of(Settings(allow_origin=(entry,)), principal_of)


# Origin


NO_ORIGIN = ("https://app.example/", "null", "*", "")
OTHER_ORIGINS = ("https://evil.example", "http://app.example", "https://app.example:8443", "https://app.example.evil")


@pytest.mark.parametrize("origin", NO_ORIGIN + OTHER_ORIGINS)
@pytest.mark.parametrize("path", ["/", "/metrics", "/openrpc.json"])
def test_an_origin_that_is_not_configured_is_403_and_told_the_setting(origin: str, path: str) -> None:
    lines = ["Host: localhost", f"Origin: {origin}", f"Authorization: Bearer {TOKEN}", *UPGRADE]
    seen = refusal(head(*lines, start=f"GET {path} HTTP/1.1"))
    assert seen.status == 403
    assert ascii(origin) in seen.body
    assert "--allow-origin ORIGIN" in seen.body


def test_two_origins_are_403_even_if_each_is_allowed() -> None:
    seen = refusal(head("Host: localhost", *["Origin: https://app.example"] * 2, *UPGRADE))
    assert seen.status == 403


def test_without_a_configured_origin_every_origin_is_refused() -> None:
    policy = policy_of(Settings(), principal_of)
    for origin in ("https://app.example", "http://localhost", "null", ""):
        assert refusal(head("Host: localhost", f"Origin: {origin}", *UPGRADE), policy).status == 403


# Room


def test_without_room_it_is_503_after_host_and_origin_and_before_the_token() -> None:
    wrong = f"Authorization: Bearer {WRONG}"
    full = "connections (10000)"
    seen = refusal(head("Host: localhost", wrong, *UPGRADE), full=full)
    assert seen.status == 503
    assert seen.headers["retry-after"] == "1"
    assert full in seen.body
    assert refusal(head("Host: evil.example", wrong, *UPGRADE), full=full).status == 421
    assert refusal(head("Host: localhost", "Origin: https://evil.example", *UPGRADE), full=full).status == 403


def test_without_room_the_pages_are_still_served() -> None:
    for path in PATHS[2:]:
        assert outcome(head("Host: localhost", start=f"GET {path} HTTP/1.1"), full="connections (1)") == Page(path)


@pytest.mark.parametrize(("retry_after_ms", "header"), [(1, "1"), (1_000, "1"), (1_001, "2"), (30_000, "30")])
def test_retry_after_is_in_whole_seconds_rounded_up(retry_after_ms: int, header: str) -> None:
    policy = policy_of(Settings(retry_after_ms=retry_after_ms), principal_of)
    assert refusal(head("Host: localhost", *UPGRADE), policy, "x").headers["retry-after"] == header


# Token


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}  ", f"Bearer {AGENT}"])
def test_a_right_token_upgrades_as_its_principal_even_with_spaces_in_it(value: str) -> None:
    decision = outcome(head("Host: localhost", f"Authorization: {value}", *UPGRADE))
    assert isinstance(decision, Upgrade)
    assert decision.principal == (Principal("agent", "a b: 7") if AGENT in value else CLIENT)


MALFORMED = ("Bearer", "Bearer ", "", TOKEN, f"Basic {TOKEN}", f"Bearer,{TOKEN}", f"Bearer {TOKEN}x", "\xff")


@pytest.mark.parametrize("value", [f"Bearer {WRONG}", *MALFORMED])
def test_a_wrong_or_malformed_token_is_401_and_never_repeated(value: str) -> None:
    for upgrade in (UPGRADE, ()):
        seen = refusal(head("Host: localhost", f"Authorization: {value}", *upgrade))
        assert seen.status == 401
        assert seen.headers["www-authenticate"] == "Bearer"


def test_an_empty_token_is_nobodys_whatever_the_check_says() -> None:
    policy = policy_of(SETTINGS, lambda token: HOST if not token else None)
    for value in ("Bearer", "Bearer ", ""):
        assert refusal(head("Host: localhost", f"Authorization: {value}", *UPGRADE), policy).status == 401


def test_two_tokens_are_401_even_if_each_is_right() -> None:
    lines = [f"Authorization: Bearer {TOKEN}"] * 2
    assert refusal(head("Host: localhost", *lines, *UPGRADE)).status == 401


@pytest.mark.parametrize("value", [None, f"Bearer {WRONG}", f"Bearer {TOKEN}", "nonsense"])
def test_without_authentication_everyone_is_host_and_no_token_is_looked_at(value: str | None) -> None:
    def asked(token: str) -> Principal | None:
        raise AssertionError(token)

    policy = policy_of(Settings(auth=False), asked)
    lines = [] if value is None else [f"Authorization: {value}"]
    decision = outcome(head("Host: localhost", *lines, *UPGRADE), policy)
    assert isinstance(decision, Upgrade)
    assert decision.principal == HOST
    assert refusal(head("Host: evil.example", *lines, *UPGRADE), policy).status == 421
    assert refusal(head("Host: localhost", "Origin: null", *lines, *UPGRADE), policy).status == 403


# The upgrade


def test_the_upgrade_is_the_one_of_the_rfc_without_extension_or_subprotocol() -> None:
    offers = ("Sec-WebSocket-Extensions: permessage-deflate", "Sec-WebSocket-Protocol: chat, jsonrpc")
    decision = outcome(head("Host: localhost", *offers, *UPGRADE))
    assert isinstance(decision, Upgrade)
    seen = parsed(decision.response)
    assert seen.status == 101
    assert seen.headers["upgrade"] == "websocket"
    assert seen.headers["connection"] == "Upgrade"
    assert seen.headers["sec-websocket-accept"] == KEY_ANSWER
    assert "sec-websocket-extensions" not in seen.headers
    assert "sec-websocket-protocol" not in seen.headers
    assert seen.body == ""


def test_a_plain_get_is_told_in_words_that_this_is_a_websocket() -> None:
    seen = refusal(head("Host: localhost:9100", start="GET /page HTTP/1.1"))
    assert seen.status == 426
    assert seen.headers["upgrade"] == "websocket"
    assert "WebSocket" in seen.body
    assert "JSON-RPC 2.0" in seen.body
    assert "wscat -c ws://localhost:9100/" in seen.body


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "PUT", "CONNECT"])
@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics"])
def test_any_method_but_get_is_405(method: str, path: str) -> None:
    for lines in ((), UPGRADE, ("Content-Length: 5",), ("transfer-encoding: chunked",)):
        seen = refusal(head("Host: localhost", *lines, start=f"{method} {path} HTTP/1.1") + b"hello")
        assert seen.status == 405
        assert seen.headers["allow"] == "GET"


def test_a_post_with_a_body_is_judged_by_its_host_and_origin_first() -> None:
    body = ("Content-Type: text/plain", "Content-Length: 5", "Content-Length: 5")
    start = "POST / HTTP/1.1"
    assert refusal(head("Host: evil.example", *body, start=start) + b"hello").status == 421
    assert refusal(head("Host: localhost", "Origin: null", *body, start=start) + b"hello").status == 403


def replaced(at: int, *lines: str) -> tuple[str, ...]:
    return (*UPGRADE[:at], *lines, *UPGRADE[at + 1 :])


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (replaced(0), 426),
        (replaced(0, "Upgrade: h2c"), 426),
        (replaced(0, "Upgrade: websocket", "Upgrade: websocket"), 426),
        (replaced(1), 426),
        (replaced(1, "Connection: keep-alive"), 426),
        (replaced(1, "Connection: @@"), 400),
        (replaced(2), 400),
        (replaced(2, "Sec-WebSocket-Key: short"), 400),
        (replaced(2, "Sec-WebSocket-Key: \xe9\xe9\xe9\xe9"), 400),
        (replaced(2, UPGRADE[2], UPGRADE[2]), 400),
        (replaced(3), 400),
        (replaced(3, "Sec-WebSocket-Version: 8"), 400),
        (replaced(3, UPGRADE[3], UPGRADE[3]), 400),
        ((*UPGRADE, "Sec-WebSocket-Protocol: @"), 400),
    ],
)
def test_half_an_upgrade_is_refused_with_the_version_that_would_do(lines: tuple[str, ...], status: int) -> None:
    seen = refusal(head("Host: localhost", *lines))
    assert seen.status == status
    assert seen.headers["sec-websocket-version"] == "13"


def test_an_upgrade_by_http_1_0_is_505_and_a_page_is_served() -> None:
    assert refusal(head("Host: localhost", *UPGRADE, start="GET / HTTP/1.0")).status == 505
    assert outcome(head(start="GET /healthz HTTP/1.0")) == Page("/healthz")
    assert outcome(head("Host: localhost", start="GET /metrics HTTP/1.0")) == Page("/metrics")


def test_a_page_is_its_path_and_no_other() -> None:
    assert outcome(head(start="GET /healthz?verbose=1 HTTP/1.1")) == Page("/healthz")
    for path in ("/healthz/", "//healthz", "/Healthz", "/healthz;x", "/%68ealthz", "http://localhost/healthz"):
        assert refusal(head("Host: evil.example", start=f"GET {path} HTTP/1.1")).status == 421
        assert refusal(head("Host: localhost", start=f"GET {path} HTTP/1.1")).status == 426


# What a peer sends is shown short and printable, or not at all


@pytest.mark.parametrize("value", ["x" * 5_000, "\x80\xff" * 100, "<script>alert(1)</script>", "a\tb"])
@pytest.mark.parametrize("name", ["Host", "Origin"])
def test_a_refused_value_is_shown_short_and_printable(name: str, value: str) -> None:
    host = () if name == "Host" else ("Host: localhost",)
    answer = outcome(head(*host, f"{name}: {value}", *UPGRADE))
    assert isinstance(answer, Answer)
    assert answer.status in (421, 403)
    assert answer.reason.isascii()
    assert answer.reason.isprintable()
    assert len(answer.reason) < 500


def test_no_logger_sees_a_header(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="websockets")
    caplog.set_level(logging.DEBUG, logger="websockets.server")
    outcome(head("Host: localhost", f"Authorization: Bearer {TOKEN}", *UPGRADE))
    outcome(head("Host: localhost", f"Authorization: Bearer {TOKEN}", "bad header"))
    assert caplog.records == []
    assert not handshake._SILENT.isEnabledFor(logging.CRITICAL)


# The head


def test_a_head_may_come_in_any_pieces_and_the_rest_is_left_over() -> None:
    data = head("Host: localhost", *UPGRADE)
    for size in (1, 2, 3, 7, len(data)):
        reader = Handshake(HANDSHAKE_BYTES)
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        for piece in pieces[:-1]:
            assert reader.feed(piece) is None
        request = reader.feed(pieces[-1] + b"\x81\x80first frame")
        assert isinstance(request, Request)
        assert isinstance(decide(request, POLICY), Upgrade)
        assert reader.leftover == b"\x81\x80first frame"
        assert type(reader.leftover) is bytes


def test_a_head_at_the_limit_passes_and_one_byte_more_is_431() -> None:
    data = head("Host: localhost", *UPGRADE)
    assert isinstance(Handshake(len(data)).feed(data + b"frames"), Request)
    answer = Handshake(len(data) - 1).feed(data)
    assert isinstance(answer, Answer)
    assert answer.status == 431
    assert f"handshake_bytes ({len(data) - 1})" in answer.reason


def test_a_head_without_end_is_431_as_soon_as_it_is_over_the_limit() -> None:
    reader = Handshake(1_000)
    assert reader.feed(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 164) is None
    answer = reader.feed(b"A")
    assert isinstance(answer, Answer)
    assert answer.status == 431


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # a TLS client: answered without waiting for more
        (b"\x00", 400),
        (b"\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\n", 400),
        (b"G\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),  # HTTP/0.9
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\n\r\n", 400),
        (b"GET / FTP/1.1\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\n\nX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: local\x00host\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\n\r\n", 505),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 129 + b"\r\n", 431),
    ],
)
def test_what_is_no_request_is_answered_and_never_raises(data: bytes, status: int) -> None:
    assert refusal(data).status == status


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.one_of(
                st.sampled_from([line.encode() for line in UPGRADE]),
                st.sampled_from([b"Host: localhost", b"Host: evil", b"Origin: null", b"Authorization: Bearer " + b"x"]),
                st.binary(max_size=20),
            ),
            max_size=8,
        ).map(lambda lines: b"\r\n".join([b"GET / HTTP/1.1", *lines, b"", b""])),
    )
)
def test_any_bytes_have_an_outcome_or_wait(data: bytes) -> None:
    reader = Handshake(1_000)
    result = reader.feed(data)
    if result is None:
        assert b"\n\r\n" not in data
        return
    decision = decide(result, POLICY) if isinstance(result, Request) else result
    assert isinstance(decision, Upgrade | Answer | Page)


def test_an_answer_is_whole_and_has_the_headers_it_was_given() -> None:
    assert http_answer(200, b'{"a":1}', "application/json", [("X-A", "b")]) == (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 7\r\n"
        b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nX-A: b\r\n\r\n"
        b'{"a":1}'
    )
