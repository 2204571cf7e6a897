"""The link: one connection that is kept up, against real sockets."""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from msgspec import Raw

from carserver.client.connection import Connection, Request
from carserver.client.errors import CallError, ConnectionLost, NotAuthorised, Unreachable
from carserver.client.finding import Target
from carserver.client.link import Link
from carserver.client.pauses import Pauses
from carserver.protocol.errors import ErrorKind, RpcError, conflict, unavailable
from tests.unit.fakedaemon import PATIENCE_S, FakeDaemon, Session, Unanswered

TOKEN = "a-token"
KEEPALIVE_S = 20.0  # for which websockets sleeps between two pings


class Finder:
    """Finds the daemon that it is told, or raises what it is told; `attempts` are counted."""

    def __init__(self, daemon: FakeDaemon | None = None) -> None:
        self.url = daemon.url if daemon else ""
        self.token: str | None = TOKEN
        self.failure: Exception | None = None
        self.attempts = 0
        self.asked = asyncio.Event()

    def __call__(self) -> Target:
        self.attempts += 1
        self.asked.set()
        if self.failure is not None:
            raise self.failure
        return Target(self.url, self.token)


def link_to(find: Finder, *, patience_s: float = PATIENCE_S) -> Link:
    """One that does not wait long between attempts."""
    return Link(find, patience_s=patience_s, pauses=Pauses(math.inf, first_s=0.001, longest_s=0.01))


def leave(session: Session, params: Any) -> Any:
    session.close(1012, "restarting")
    raise Unanswered


def silence(session: Session, params: Any) -> Any:
    raise Unanswered


async def until(true: Callable[[], object]) -> None:
    """Lets time pass until something is so; the test's own timeout bounds it."""
    while not true():
        await asyncio.to_thread(time.sleep, 0.005)


async def lose(link: Link) -> None:
    with pytest.raises(ConnectionLost):
        await (await link.connection()).call("leave")


def answers(**more: Any) -> dict[str, Any]:
    return {"m": 1, "leave": leave, **more}


def notify(method: str, *params: Any) -> Callable[[Session, Any], None]:
    def act(session: Session, _: Any) -> None:
        for one in params:
            session.notify(method, one)

    return act


# ------------------------------------------------------------------------------------------------------ being kept up


async def test_a_lost_connection_is_replaced_by_one_to_where_the_daemon_is_then() -> None:
    with FakeDaemon(answers()) as first, FakeDaemon(answers(m=2)) as second:
        find = Finder(first)
        link = link_to(find)
        await link.open()
        before = await link.connection()
        assert await before.call("m") == 1
        find.url = second.url
        await lose(link)
        after = await link.connection()
        assert await after.call("m") == 2
        assert after is not before
        assert second.sessions[0].authorization == f"Bearer {TOKEN}"
        await link.close()


async def test_who_waits_for_a_connection_gets_the_next_one() -> None:
    with FakeDaemon(answers()) as daemon:
        find = Finder(daemon)
        link = link_to(find)
        await link.open()
        find.failure = Unreachable("away")
        await lose(link)
        waiting = [asyncio.create_task(link.connection()) for _ in range(10)]
        while find.attempts < 5:
            find.asked.clear()
            await find.asked.wait()
        assert not any(task.done() for task in waiting)
        find.failure = None
        assert len(set(await asyncio.gather(*waiting))) == 1
        await link.close()


async def test_a_wait_ends_with_the_patience_and_the_reason_and_the_link_lives_on() -> None:
    with FakeDaemon(answers()) as daemon:
        find = Finder(daemon)
        link = link_to(find, patience_s=0.05)
        await link.open()
        find.failure = Unreachable("the daemon of /state is not running")
        await lose(link)
        await until(lambda: link.failure is find.failure)  # or the reason may still be the loss
        with pytest.raises(Unreachable, match=r"no connection within 0.05 s: the daemon of /state is not running"):
            await link.connection()
        find.failure = None
        link.patience_s = PATIENCE_S
        assert await (await link.connection()).call("m") == 1
        await link.close()


async def test_a_token_that_is_not_taken_any_more_ends_the_waits_and_a_new_one_is_tried() -> None:
    with FakeDaemon(answers(), token=TOKEN) as daemon:
        find = Finder(daemon)
        link = link_to(find)
        await link.open()
        find.token = "an-old-one"
        await lose(link)
        with pytest.raises(NotAuthorised, match="does not accept this token") as caught:
            await link.connection()
        assert "an-old-one" not in str(caught.value)
        find.token = TOKEN
        connection = None
        while connection is None:
            with suppress(NotAuthorised):  # the attempt with the new one is still under way
                connection = await link.connection()
            await asyncio.sleep(0.001)
        assert await connection.call("m") == 1
        await link.close()


async def test_a_defect_in_looking_for_the_daemon_does_not_end_the_link(caplog: pytest.LogCaptureFixture) -> None:
    with FakeDaemon(answers()) as daemon:
        find = Finder(daemon)
        link = link_to(find)
        await link.open()
        find.failure = ValueError("a defect")
        await lose(link)
        while find.attempts < 4:
            find.asked.clear()
            await find.asked.wait()
        find.failure = None
        assert await (await link.connection()).call("m") == 1
        assert "no connection" in caplog.text
        await link.close()


# ------------------------------------------------------------------------------------------------------------- pauses


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the pauses asked for; no time passes."""
    asked: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds < KEEPALIVE_S:
            asked.append(seconds)
        await sleep(0 if seconds < KEEPALIVE_S else seconds)

    monkeypatch.setattr("carserver.client.pauses.asyncio.sleep", note)
    return asked


async def test_pauses_grow_to_their_longest_with_jitter_and_begin_anew_once_the_daemon_has_spoken(
    slept: list[float],
) -> None:
    with FakeDaemon(answers()) as daemon:
        find = Finder(daemon)
        link = Link(find)
        await link.open()
        await (await link.connection()).call("m")
        find.failure = Unreachable("away")
        await lose(link)
        while len(slept) < 12:
            find.asked.clear()
            await find.asked.wait()
        find.failure = None
        await (await link.connection()).call("m")
        for number, seconds in enumerate(slept[:12]):
            longest = min(0.1 * 2**number, 5.0)
            assert longest / 2 <= seconds <= longest
        assert len({seconds / min(0.1 * 2**n, 5.0) for n, seconds in enumerate(slept[:12])}) > 6, "they differ"
        slept.clear()
        await lose(link)
        await link.connection()
        assert slept[0] <= 0.1
        await link.close()


async def test_a_daemon_that_hangs_up_before_it_says_anything_is_not_called_again_in_a_hurry(
    slept: list[float],
) -> None:
    class Mute(FakeDaemon):
        def _serve(self, connection: Any) -> None:
            connection.close(1008, "go away")

    with Mute() as daemon:
        link = Link(Finder(daemon))
        await link.open()
        await until(lambda: len(slept) >= 8)
        assert slept[7] > 2.0
        await link.close()


async def test_a_daemon_that_drains_is_left_alone_for_as_long_as_it_asks(slept: list[float]) -> None:
    def drain(session: Session, params: Any) -> Any:
        session.notify("server.draining", {"retry_after_ms": 1_500})
        return leave(session, params)

    with FakeDaemon(answers(leave=drain)) as daemon:
        link = Link(Finder(daemon))
        await link.open()
        await lose(link)
        await link.connection()
        assert 1.5 < slept[0] <= 1.6
        await link.close()


# ----------------------------------------------------------------------------------------------- what holds on each


async def test_on_up_has_every_connection_before_anybody_else() -> None:
    with FakeDaemon(answers(hello=None)) as daemon:
        link = link_to(Finder(daemon))

        async def up(connection: Connection) -> None:
            await connection.call("hello")

        remove = link.on_up(up)
        await link.open()
        for _ in range(3):
            await (await link.connection()).call("m")
            await lose(link)
        await link.connection()
        assert [method for method, _ in daemon.calls] == ["hello", "m", "leave"] * 3 + ["hello"]
        remove()
        remove()
        await lose(link)
        await link.connection()
        assert len(daemon.params_of("hello")) == 4
        await link.close()


async def test_what_on_up_raises_at_the_beginning_ends_the_beginning() -> None:
    with FakeDaemon(answers()) as daemon:
        link = link_to(Finder(daemon))

        async def up(connection: Connection) -> None:
            await connection.call("unknown")

        link.on_up(up)
        with pytest.raises(CallError, match="no method 'unknown'"):
            await link.open()
        assert not others()


async def test_what_on_up_raises_later_is_tried_again_where_it_passes_and_logged_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals: list[RpcError] = []

    def hello(session: Session, params: Any) -> Any:
        if refusals:
            raise refusals.pop(0)

    with FakeDaemon(answers(hello=hello)) as daemon:
        link = link_to(Finder(daemon))

        async def up(connection: Connection) -> None:
            await connection.call("hello")

        link.on_up(up)
        await link.open()
        refusals += [unavailable("draining"), conflict("name_taken", "somebody else's")]
        await lose(link)
        assert await (await link.connection()).call("m") == 1
        assert len(daemon.params_of("hello")) == 3
        assert "not all is as it was: somebody else's" in caplog.text
        await link.close()


# --------------------------------------------------------------------------------------------------- being spoken to


async def test_notifications_reach_those_who_asked_for_them_in_order_on_every_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeDaemon(answers(say=notify("n", 1, 2, 3))) as daemon:
        link = link_to(Finder(daemon))
        heard: list[int] = []
        more = asyncio.Event()

        def hear(params: Raw) -> None:
            heard.append(int(bytes(params)))
            more.set()

        async def fail(params: Raw) -> None:
            raise ValueError("a defect")

        link.on("n", fail)
        remove = link.on("n", hear)
        link.on("others", hear)
        await link.open()
        for times in (1, 2):
            await (await link.connection()).call("say")
            while len(heard) < 3 * times:
                more.clear()
                await more.wait()
            await lose(link)
        assert heard == [1, 2, 3] * 2
        assert "a callback for n failed" in caplog.text
        remove()
        await (await link.connection()).call("say")
        await link.close()
        assert len(heard) == 6


async def test_requests_of_the_daemon_are_served_on_every_connection_and_answered_where_they_came_from() -> None:
    def ask(session: Session, method: Any) -> Any:
        session.send(f'{{"jsonrpc":"2.0","id":"q-{len(daemon.frames)}","method":"{method[0]}","params":[7]}}')

    async def replied(method: str) -> dict[str, Any]:
        daemon.replied.clear()
        await (await link.connection()).call("ask", [method])
        assert await asyncio.to_thread(daemon.replied.wait, PATIENCE_S)
        return daemon.frames[-1]

    def handle(connection: Connection, request: Request) -> None:
        tasks.append(asyncio.create_task(connection.answer(request.id, [bytes(request.params).decode()])))

    def fail(connection: Connection, request: Request) -> None:
        raise ValueError("a secret")

    tasks: list[asyncio.Task[None]] = []
    with FakeDaemon(answers(ask=ask)) as daemon:
        link = link_to(Finder(daemon))
        link.serve("do", handle)
        link.serve("fail", fail)
        with pytest.raises(ValueError, match="do is served already"):
            link.serve("do", handle)
        await link.open()
        assert await replied("do") == {"jsonrpc": "2.0", "id": "q-0", "result": ["[7]"]}
        await lose(link)
        assert (await replied("do"))["id"] == "q-1"
        failed = (await replied("fail"))["error"]
        assert failed["data"]["type"] == "internal_error"
        assert "secret" not in failed["message"]
        assert (await replied("else"))["error"]["code"] == ErrorKind.METHOD_NOT_FOUND.code
        await link.close()
        await asyncio.gather(*tasks)


# -------------------------------------------------------------------------------------------------------------- ends


def others() -> set[asyncio.Task[Any]]:
    """The tasks that are left beside the test's own."""
    current = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not current}


async def test_closing_while_connecting_again_ends_the_waits_and_leaves_nothing() -> None:
    with FakeDaemon(answers()) as daemon:
        find = Finder(daemon)
        link = link_to(find)
        await link.open()
        find.failure = Unreachable("away")
        await lose(link)
        waiting = asyncio.create_task(link.connection())
        find.asked.clear()
        await find.asked.wait()
        await link.close()
        with pytest.raises(ConnectionLost, match="closed by this side"):
            await waiting
        assert not others()
        await link.close()
        with pytest.raises(ConnectionLost, match="closed by this side"):
            await link.connection()
        with pytest.raises(RuntimeError, match="opened once"):
            await link.open()


async def test_closing_ends_what_is_under_way_and_connections_of_ones_own() -> None:
    with FakeDaemon(answers(silent=silence)) as daemon:
        link = link_to(Finder(daemon))
        await link.open()
        asked = asyncio.create_task((await link.connection()).call("silent"))
        async with link.another() as another:
            assert await another.call("m") == 1
            assert await (await link.connection()).call("m") == 1
            await link.close()
            assert another.lost
        with pytest.raises(ConnectionLost, match="closed by this side"):
            await asked
        with pytest.raises(ConnectionLost):
            async with link.another():
                pass
        assert not others()


async def test_a_callback_at_the_end_still_has_the_connection_and_one_that_fails_keeps_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeDaemon(answers(bye=None)) as daemon:
        link = link_to(Finder(daemon))

        async def bye() -> None:
            await (await link.connection()).call("bye")

        async def fail() -> None:
            raise ValueError("a defect")

        link.on_close(bye)
        link.on_close(fail)
        await link.open()
        await link.close()
        assert len(daemon.params_of("bye")) == 1
        assert "a callback failed at the link's end" in caplog.text
        assert not others()


async def test_one_who_does_not_wait_any_longer_takes_nothing_from_the_others() -> None:
    with FakeDaemon(answers()) as daemon:
        find = Finder(daemon)
        link = link_to(find)
        await link.open()
        find.failure = Unreachable("away")
        await lose(link)
        first, second = (asyncio.create_task(link.connection()) for _ in range(2))
        find.asked.clear()
        await find.asked.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        find.failure = None
        assert await (await second).call("m") == 1
        await link.close()


async def test_before_it_is_open_it_says_so() -> None:
    link = link_to(Finder())
    with pytest.raises(ConnectionLost, match="not open yet"):
        await link.connection()
    await link.close()


async def test_without_a_token_a_daemon_that_wants_one_is_not_authorised_and_one_that_does_not_serves() -> None:
    def refuse(session: Session, params: Any) -> Any:
        raise RpcError(ErrorKind.INVALID_PARAMS, "token: give either token or host_token", path="token")

    for answer, right in ((refuse, False), ({"ok": True}, True)):
        with FakeDaemon(answers(**{"session.auth": answer})) as daemon:
            find = Finder(daemon)
            find.token = None
            link = link_to(find)
            if right:
                await link.open()
            else:
                with pytest.raises(NotAuthorised, match=r"no token for ws://.* was found: give one, set CARSERVER"):
                    await link.open()
            await link.close()
            assert not others()
