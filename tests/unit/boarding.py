"""A host board for tests: its clock stands, its names are numbers, and its loop turns when it is told to."""

import itertools
import json
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec import Raw

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.hostboard import Board, Follower
from carserver.core.outbox import Outbox
from carserver.core.ports import Timer
from carserver.protocol.host import HostAgent, HostDevice, HostIdentity
from tests.unit.storing import NOW_MS


def in_lines(payload: bytes) -> bytes:
    """A transport's framing."""
    return payload + b"\n"


class Clock:
    """Implements `core.runstore.Clock`."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def now_ms(self) -> int:
        return NOW_MS

    def monotonic(self) -> float:
        return 0.0

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        assert delay_s == 0
        self.calls.append(callback)
        return NoTimer()

    def spawn(self, work: Coroutine[Any, Any, None]) -> object:
        raise AssertionError(work)

    def turn(self) -> None:
        """What was to happen later happens."""
        calls, self.calls = self.calls, []
        for callback in calls:
            callback()


class NoTimer:
    """Nobody cancels it."""

    def cancel(self) -> None:
        raise AssertionError


class World:
    """A board."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.counters = Counters()
        self.settings = Settings(**settings)
        names = itertools.count(1)
        identity = HostIdentity(version="0", pid=1)
        self.board = Board(identity, self.clock, lambda: f"id-{next(names)}", self.settings, self.counters)

    def publish(self, message: str = "") -> None:
        """An event."""
        self.board.publish("notification", None, message, Raw(b"null"))

    @property
    def events(self) -> list[dict[str, Any]]:
        """Those that are kept."""
        events: list[dict[str, Any]] = json.loads(self.board.list_events(1_000_000))
        return events


class Peer:
    """A connection that follows; `held` until it is told that it is not."""

    def __init__(self, world: World, *, limit: int = 1_000_000, held: bool = False) -> None:
        self.world = world
        self.outbox = Outbox(in_lines, limit, lambda: None)
        self.follower: Follower = world.board.follow(self.outbox)
        if not held:
            self.follower.release()

    def take(self) -> list[dict[str, Any]]:
        """What is in its outbox, some of it: events."""
        messages = [json.loads(line) for line in self.outbox.take(1).splitlines()]
        assert all(message["method"] == "host.event" for message in messages)
        return [message["params"] for message in messages]

    def read(self) -> list[dict[str, Any]]:
        """All that arrives, with the turns of the loop that it takes."""
        arrived: list[dict[str, Any]] = []
        self.world.clock.turn()
        while taken := self.take():
            arrived += taken
            self.world.clock.turn()
        return arrived

    def sequences(self) -> list[int]:
        """Of what arrives."""
        return [event["sequence"] for event in self.read()]


def agent(id_: str, name: str = "n", metadata: bytes = b"{}") -> HostAgent:
    """An agent, as a method makes it."""
    members: dict[str, Any] = {"session_id": "s", "updated_at": "t", "status": "idle"}
    return HostAgent(id=id_, name=name, kind="k", capabilities=[], metadata=Raw(metadata), **members)


def device(id_: str) -> HostDevice:
    """A device, as a method makes it."""
    members: dict[str, Any] = {"session_id": "s", "updated_at": "t"}
    return HostDevice(id=id_, name="d", kind="k", capabilities=[], metadata=Raw(b"{}"), **members)
