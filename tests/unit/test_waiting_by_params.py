"""Methods that wait on someone only where a param says so: they count among the waiting requests only then."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from carserver.config import Settings
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.method import Table, method
from carserver.rpc.session import Session
from tests.methods_for_tests import get_data
from tests.rig import Rig, rigged

AT_MOST = 3


class Poll(Struct, frozen=True):
    """Params of `look`."""

    wait_ms: int = 0
    stored: bool = False


_gates: list["asyncio.Future[str]"] = []


async def _open() -> str:
    gate = asyncio.get_running_loop().create_future()
    _gates.append(gate)
    return str(await gate)


@method("look", waits="wait_ms", pages=True)
async def look(session: Session, params: Poll) -> str:
    """Waits on someone with `wait_ms`, on storage with `stored`, and not at all without."""
    if params.wait_ms or params.stored:
        return await _open()
    return "at once"


class Peer:
    """A session of a dispatcher that has `look`."""

    def __init__(self, rig: Rig, runner: asyncio.Runner) -> None:
        self.rig = rig
        self.runner = runner
        self.dispatcher = Dispatcher(Table([look.method, get_data.method]), rig.daemon.front.services)  # type: ignore[attr-defined]

    def begins(self, *calls: dict[str, Any]) -> list[Any]:
        """What is answered at once, and when what waits has begun."""

        async def begin() -> None:
            messages = [{"jsonrpc": "2.0", "id": 1, "method": "look", "params": call} for call in calls]
            self.dispatcher.receive(
                self.rig.session, json.dumps(messages[0] if len(messages) == 1 else messages).encode()
            )
            self.at_once = self.answers()
            await asyncio.sleep(0)

        self.runner.run(begin())
        return self.at_once

    def answers(self) -> list[Any]:
        frames = []
        while self.rig.outbox.size:
            frames.append(json.loads(self.rig.outbox.take(1)))
        return frames

    def release(self) -> list[Any]:
        """What is answered when all that waits comes."""

        async def release() -> None:
            for gate in _gates:
                gate.set_result("waited")
            _gates.clear()
            while self.rig.connection.tasks:
                await asyncio.wait(self.rig.connection.tasks)

        self.runner.run(release())
        return self.answers()

    @property
    def counts(self) -> tuple[int, int]:
        return self.rig.session.waiting, self.rig.session.in_flight


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    _gates.clear()
    with rigged(tmp_path, waiting=AT_MOST) as (rig, runner):
        yield Peer(rig, runner)


def result(value: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "result": value}


@pytest.mark.parametrize("params", [{}, {"wait_ms": 0}, {"wait_ms": 0, "unknown": "\n"}])
def test_without_the_param_it_is_answered_in_place(peer: Peer, params: dict[str, Any]) -> None:
    assert peer.begins(params) == [result("at once")]
    assert (peer.rig.connection.tasks, peer.counts) == (set(), (0, 0))


def test_with_the_param_it_is_one_of_those_that_wait(peer: Peer) -> None:
    assert peer.begins({"wait_ms": 5}) == []
    assert (peer.counts, peer.rig.outbox.reserved) == ((1, 0), 0), "reading goes on: this peer may be who it waits on"
    assert peer.release() == [result("waited")]
    assert (peer.counts, peer.rig.outbox.reserved) == ((0, 0), 0)


def test_without_the_param_it_may_still_wait_for_storage_as_a_short_request(peer: Peer) -> None:
    assert peer.begins({"stored": True}) == []
    assert (peer.counts, peer.rig.outbox.reserved) == ((0, 1), Settings().page_bytes)
    assert peer.release() == [result("waited")]
    assert (peer.counts, peer.rig.outbox.reserved) == ((0, 0), 0)


def test_one_more_than_may_wait_is_overloaded_and_one_that_does_not_wait_is_answered(peer: Peer) -> None:
    for _ in range(AT_MOST):
        assert peer.begins({"wait_ms": 5}) == []
    (refused,) = peer.begins({"wait_ms": 5})
    assert refused["error"]["data"]["type"] == "overloaded"
    assert f"{AT_MOST} requests of this connection wait already (waiting)" in refused["error"]["message"]
    assert peer.begins({}) == [result("at once")]
    assert peer.counts == (AT_MOST, 0)
    assert peer.release() == [result("waited")] * AT_MOST
    assert peer.begins({"wait_ms": 5}) == [], "there is room again"
    assert peer.release() == [result("waited")]


def test_those_of_a_batch_count_one_by_one(peer: Peer) -> None:
    assert peer.begins({"wait_ms": 1}, {}, *[{"wait_ms": 1}] * AT_MOST) == []
    assert peer.counts == (AT_MOST, 0)
    (batch,) = peer.release()
    said = sorted(answer.get("result", "overloaded") for answer in batch)
    assert said == ["at once", "overloaded", *["waited"] * AT_MOST]


def test_a_value_of_the_wrong_type_is_refused_as_such_whoever_waits(peer: Peer) -> None:
    for _ in range(AT_MOST):
        peer.begins({"wait_ms": 5})
    (refused,) = peer.begins({"wait_ms": "5"})
    assert refused["error"]["data"] == {"type": "invalid_params", "path": "wait_ms"}
    peer.release()


def test_a_method_cannot_wait_by_a_param_that_it_has_not_or_without_a_coroutine() -> None:
    with pytest.raises(TypeError, match="waits='later'"):

        @method("no.such.param", waits="later")
        async def no_such_param(session: Session, params: Poll) -> str:
            """Has no such param."""
            return ""

    with pytest.raises(TypeError, match="waits=True"):

        @method("no.coroutine", waits=True)
        def no_coroutine(session: Session, params: Poll) -> str:
            """Cannot wait."""
            return ""
