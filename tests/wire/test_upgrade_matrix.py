"""The matrix Host x Origin x token x path, by raw HTTP over real sockets (contract, section 5).

What should be answered is written down here once more, in the contract's order: Host, then Origin, then the token.
"""

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from carserver.core.principals import agent_token
from tests.daemon import Daemon, running
from tests.rawpeer import raw_socket, request

PROBES = ("/healthz", "/readyz")
PAGES = ("/metrics", "/openrpc.json")
PATHS = ("/", "/any/where?x=1", *PROBES, *PAGES)

# Host headers; PORT is the daemon's. The name counts, the port does not.
GOOD_HOSTS = (
    ("127.0.0.1:PORT",),
    ("127.0.0.1",),
    ("127.8.9.10:1",),
    ("localhost:PORT",),
    ("LocalHost",),
    ("[::1]:PORT",),
    ("[0:0:0:0:0:0:0:1]",),
    ("car.example",),
    ("CAR.example:443",),
)
WRONG_HOSTS = (
    ("evil.example",),
    ("evil.example:PORT",),
    ("127.0.0.1.evil.example",),
    ("localhost.evil.example",),
    ("x.localhost",),
    ("car.example.evil.example",),
    ("evil-car.example",),
    ("192.168.0.1:PORT",),
    ("0.0.0.0:PORT",),
    ("[::]:PORT",),
    ("[::ffff:127.0.0.1]",),
    ("0x7f000001",),
    ("2130706433",),
    ("",),
    ("user@127.0.0.1",),
    ("127.0.0.1, evil.example",),
    ("127.0.0.1 evil.example",),
)
NO_HOST: tuple[tuple[str, ...], ...] = ((), ("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "evil.example"))
GOOD_ORIGINS: tuple[tuple[str, ...], ...] = ((), ("https://app.example",), ("http://localhost:5173",))
WRONG_ORIGINS = (
    ("https://evil.example",),
    ("http://app.example",),
    ("https://app.example:8443",),
    ("https://app.example.evil.example",),
    ("https://evil.example/https://app.example",),
    ("http://localhost",),
    ("http://127.0.0.1",),
    ("null",),
    ("",),
    ("*",),
    ("https://app.example", "https://app.example"),
    ("https://app.example https://evil.example",),
)
TOKENS = ("none", "auth", "host", "agent", "wrong", "no scheme", "another scheme", "twice", "empty")
RIGHT_TOKENS = ("none", "auth", "host", "agent")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    allowed = {"allow_host": ["car.example"], "allow_origin": ["https://app.example", "http://localhost:5173"]}
    with running(tmp_path_factory.mktemp("matrix") / "state", **allowed) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("matrix") / "state", "--no-auth") as daemon:
        yield daemon


def authorization(daemon: Daemon, kind: str) -> tuple[str, ...]:
    """The header lines of a kind of token."""
    token = daemon.token()
    values = {
        "none": (),
        "auth": (f"Bearer {token}",),
        "host": (f"bearer {daemon.token('host-token')}",),
        "agent": (f"Bearer {agent_token(daemon.token('agent-key'), 'a b')}",),
        "wrong": (f"Bearer {token}x",),
        "no scheme": (token,),
        "another scheme": (f"Basic {token}",),
        "twice": (f"Bearer {token}", f"Bearer {token}"),
        "empty": ("Bearer ",),
    }
    return tuple(f"Authorization: {value}" for value in values[kind])


def expected(host: tuple[str, ...], origin: tuple[str, ...], token: str, path: str) -> int:
    """The status of the answer."""
    if path in PROBES:
        return 200
    if len(host) != 1:
        return 400
    if host not in GOOD_HOSTS:
        return 421
    if origin not in GOOD_ORIGINS:
        return 403
    if path in PAGES:
        return 200
    return 101 if token in RIGHT_TOKENS else 401


async def status(daemon: Daemon, host: tuple[str, ...], origin: tuple[str, ...], token: str, path: str) -> int:
    """The status of the answer to an upgrade request; a refusal ends the socket and holds no secret."""
    port = daemon.url.rpartition(":")[2]
    lines = [f"Host: {value.replace('PORT', port)}" for value in host] + [f"Origin: {value}" for value in origin]
    lines += authorization(daemon, token)
    data = request(path, headers=tuple(lines)).replace(b"Host: localhost\r\n", b"", 1)
    async with raw_socket(daemon) as client:
        client.send(data)
        head = await client.head()
        code = int(head.split()[1])
        if code != 101:
            body = await client.rest()
            assert b"Sec-WebSocket-Accept" not in head
            for secret in (daemon.token(), daemon.token("host-token")):
                assert secret.encode() not in head + body
        return code


async def check(daemon: Daemon, cases: list[tuple[tuple[str, ...], tuple[str, ...], str, str]]) -> None:
    """Every case is answered as expected, twenty at a time."""
    gate = asyncio.Semaphore(20)

    async def one(case: tuple[tuple[str, ...], tuple[str, ...], str, str]) -> None:
        async with gate:
            assert await status(daemon, *case) == expected(*case), case

    await asyncio.gather(*(one(case) for case in cases))


async def test_every_host_and_origin_is_judged_in_that_order_before_token_and_path(served: Daemon) -> None:
    requests = served.metrics()["requests"]
    hosts, origins = (*GOOD_HOSTS, *WRONG_HOSTS, *NO_HOST), (*GOOD_ORIGINS, *WRONG_ORIGINS)
    cases = list(itertools.product(hosts, origins, ("auth",), ("/",)))
    assert len(cases) == 29 * 15
    assert {expected(*case) for case in cases} == {101, 400, 403, 421}
    await check(served, cases)
    assert served.metrics()["requests"] == requests  # nobody came as far as a handler


async def test_every_token_on_every_path_is_judged_after_host_and_origin(served: Daemon) -> None:
    hosts = (GOOD_HOSTS[0], ("car.example",), ("evil.example",), ())
    origins = ((), ("https://app.example",), ("https://evil.example",))
    cases = list(itertools.product(hosts, origins, TOKENS, PATHS))
    assert len(cases) == 4 * 3 * 9 * 6
    assert {expected(*case) for case in cases} == {101, 200, 400, 401, 403, 421}
    await check(served, cases)


async def test_without_authentication_host_and_origin_are_judged_as_ever_and_no_list_means_none(
    open_to_all: Daemon,
) -> None:
    for host, origin, code in (
        (("127.0.0.1",), (), 101),
        (("localhost",), (), 101),
        (("car.example",), (), 421),
        (("127.0.0.1",), ("https://app.example",), 403),
        (("127.0.0.1",), ("http://127.0.0.1",), 403),
        (("127.0.0.1",), ("null",), 403),
        ((), (), 400),
    ):
        assert await status(open_to_all, host, origin, "wrong", "/") == code


@pytest.mark.parametrize("path", ["/", "/any", *PROBES, *PAGES])
async def test_what_is_no_upgrade_is_a_page_or_is_told_what_this_is(path: str, served: Daemon) -> None:
    async with raw_socket(served) as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = await client.rest()
        if path in (*PROBES, *PAGES):
            assert answer.startswith(b"HTTP/1.1 200 ")
        else:
            assert answer.startswith(b"HTTP/1.1 426 ")
            assert b"WebSocket" in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "PUT", "CONNECT"])
async def test_only_get_is_served_and_host_is_looked_at_first(method: str, served: Daemon) -> None:
    for host, code in (("localhost", 405), ("evil.example", 421)):
        async with raw_socket(served) as client:
            client.send(f"{method} / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            assert (await client.head()).split()[1] == b"%d" % code


async def test_no_answer_lets_a_web_page_of_another_origin_read_it(served: Daemon) -> None:
    for path in PATHS:
        async with raw_socket(served) as client:
            client.send(request(path, headers=("Origin: https://app.example",)))
            assert b"access-control" not in (await client.head()).lower()
