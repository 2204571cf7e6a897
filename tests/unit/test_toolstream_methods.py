"""`tools.stream.subscribe` and `.unsubscribe`: what they answer, and what follows from it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.principals import CLIENT, Principal
from carserver.core.toolstream import ToolStreams
from carserver.methods.toolstream import subscribe, unsubscribe
from carserver.protocol.errors import RpcError
from carserver.protocol.tools import StreamRef, StreamSubscribed
from carserver.rpc.session import Session

LIVE, OTHER, ENDED, UNKNOWN = "1" * 32, "2" * 32, "3" * 32, "4" * 32


class Tools:
    """What the methods want of the handles."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.streams = ToolStreams(self._call_later, Settings(subscriptions=1), Counters())

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def find(self, handle: str, principal: Principal) -> SimpleNamespace | None:
        assert principal is CLIENT
        return SimpleNamespace(ended=handle == ENDED) if handle in (LIVE, OTHER, ENDED) else None

    def publish(self, handle: str) -> None:
        self.streams.publish(handle, CLIENT.name, 0, b"{}", last=False)
        while self.calls:
            self.calls.pop()()


@pytest.fixture
def tools() -> Tools:
    return Tools()


@pytest.fixture
def session(tools: Tools) -> Session:
    services = SimpleNamespace(tools=tools)
    outbox = Outbox(bytes, 10_000, lambda: None)
    return cast("Session", SimpleNamespace(services=services, acting=CLIENT, outbox=outbox, tool_stream=None))


def ask(session: Session, handle: str | None, *, as_it_is: bool = True) -> None:
    replied = subscribe(session, StreamRef(handle=handle))
    assert replied.result == StreamSubscribed()
    replied.then(as_it_is)


@pytest.mark.parametrize("asked", [LIVE, None])
def test_chunks_follow_the_answer_until_the_end_is_asked_for(session: Session, tools: Tools, asked: str | None) -> None:
    replied = subscribe(session, StreamRef(handle=asked))
    tools.publish(LIVE)
    assert not session.outbox.size
    replied.then(True)
    tools.publish(LIVE)
    assert session.outbox.take(1)
    assert unsubscribe(session, StreamRef(handle=asked)).removed
    assert not unsubscribe(session, StreamRef(handle=asked)).removed
    tools.publish(LIVE)
    assert not session.outbox.size


@pytest.mark.parametrize("handle", [UNKNOWN, ENDED])
def test_what_is_unknown_or_has_ended_is_answered_alike_and_keeps_nothing(
    session: Session, tools: Tools, handle: str
) -> None:
    ask(session, handle)
    tools.publish(handle)
    assert not session.outbox.size
    assert len(tools.streams) == 0
    assert not unsubscribe(session, StreamRef(handle=handle)).removed


def test_an_answer_that_could_not_be_sent_began_nothing(session: Session, tools: Tools) -> None:
    ask(session, LIVE, as_it_is=False)
    tools.publish(LIVE)
    assert not session.outbox.size
    assert not unsubscribe(session, StreamRef(handle=LIVE)).removed


def test_what_was_followed_before_goes_on_where_a_second_answer_could_not_be_sent(
    session: Session, tools: Tools
) -> None:
    ask(session, LIVE)
    ask(session, LIVE, as_it_is=False)
    tools.publish(LIVE)
    assert session.outbox.size


def test_too_many_handles_are_refused_and_all_of_ones_own_never(session: Session, tools: Tools) -> None:
    ask(session, LIVE)
    with pytest.raises(RpcError, match="subscriptions"):
        subscribe(session, StreamRef(handle=OTHER))
    ask(session, LIVE)
    ask(session, None)
    tools.publish(OTHER)
    assert session.outbox.size
