"""A `Car` for tests of what records: its daemon is a list, and does with each call what the test has in store."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import msgspec
from msgspec import Raw

from carserver.client.connection import Connection
from carserver.client.errors import CallError, ConnectionLost
from carserver.client.finding import Target
from carserver.client.link import Link
from carserver.client.run import Run
from carserver.protocol.errors import RpcError, not_found
from tests.unit.fakedaemon import snapshot

LOST = ConnectionLost(1006)
Act = Callable[[dict[str, Any]], None]


def refusal(error: RpcError) -> CallError:
    """As a connection raises it."""
    wire = error.to_wire()
    return CallError(wire["code"], wire["data"]["type"], wire["message"], wire["data"])


class FakeCar:
    """`calls` are all that came; `log` is what is stored, each event once, whatever is sent again."""

    def __init__(self, patience_s: float = 5.0) -> None:
        self.link = Link(lambda: Target("ws://nowhere", None), patience_s=patience_s)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.log: list[dict[str, Any]] = []
        self.at_ms: list[int] = []
        self.batches: dict[str, Any] = {}
        self.status = "executing"
        self.run: dict[str, Any] = snapshot(id="run-1")
        self.before: list[Exception | Act] = []  # what happens instead of, or before, storing the next batches
        self.after: list[Exception] = []  # and after it
        self.errors: dict[str, list[Exception]] = {}  # of other methods
        self.open = asyncio.Event()  # batches get through
        self.open.set()
        self.asked = asyncio.Event()  # a batch came

    async def call(self, method: str, params: Any, *, result_type: Any, again: bool) -> Any:
        assert again
        sent = msgspec.json.decode(msgspec.json.encode(params))
        self.calls.append((method, sent))
        await asyncio.sleep(0)
        if self.errors.get(method):
            raise self.errors[method].pop(0)
        return msgspec.convert(await self._answer(method, sent), result_type)

    async def _answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method == "runs.record":
            return await self._record(params)
        if method == "runs.cancel":
            self.status = "cancelled"
            return {"cancelled": True, "status": self.status}
        if method == "runs.fail":
            self.status, self.run["error"] = "failed", params["error"]
        return {**self.run, "status": self.status} if method != "runs.create" else self.run

    async def _record(self, params: dict[str, Any]) -> dict[str, Any]:
        self.asked.set()
        await self.open.wait()
        if self.before:
            act = self.before.pop(0)
            if isinstance(act, Exception):
                raise act
            act(params)
        known = self.batches.setdefault(params["batch_id"], params["events"])
        assert known == params["events"], "another batch under the same id"
        if known is params["events"]:
            self.log += known
            self.at_ms += params["at_ms"]
        if self.after:
            raise self.after.pop(0)
        for event in known:
            self.status = {"agent_end": "completed", "error": "failed"}.get(event["type"], self.status)
        counted = {"first_sequence": len(self.log) - len(known), "count": len(known), "cursor": len(self.log)}
        return {"run_id": params["run_id"], "status": self.status, **counted}

    def made(self, method: str) -> list[dict[str, Any]]:
        return [params for called, params in self.calls if called == method]

    def cancel(self, reason: str, run_id: str = "run-1") -> None:
        """As the daemon tells it."""
        self.status = "cancelled"
        for callback in self.link._told["runs.cancelled"]:
            callback(Raw(msgspec.json.encode({"run_id": run_id, "reason": reason})))

    async def reconnect(self) -> None:
        for callback in self.link._up:
            await callback(cast("Connection", None))  # nobody looks at it

    def gone(self) -> CallError:
        return refusal(not_found("run", "run-1"))


def run_of(car: FakeCar, prompt: str = "do it", **options: Any) -> Run:
    """A run without an `agent_start`, unless the test wants it."""
    return Run(car, prompt, **{"starts": False, **options})


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"type": "step", "n": number} for number in range(first, first + count)]


async def until(true: Callable[[], object]) -> None:
    """Lets the loop turn until something is so; the test's own timeout bounds it."""
    while not true():  # noqa: ASYNC110 - what happens in the background tells nobody
        await asyncio.sleep(0.001)
