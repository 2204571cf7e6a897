"""A peer that hosts tools, written by hand: it registers them, is asked, streams, answers."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer


class Asked:
    """A `tools.execute` that the host has got."""

    def __init__(self, host: "Host", request: dict[str, Any]) -> None:
        self._host = host
        self.id: str = request["id"]
        self.params: dict[str, Any] = request["params"]

    async def chunk(self, chunk: dict[str, Any]) -> None:
        """Streams a piece."""
        await self._host.send({"method": "tools.chunk", "params": {"request_id": self.id, "chunk": chunk}})

    async def text(self, *texts: str) -> None:
        """Streams pieces of text."""
        for text in texts:
            await self.chunk({"kind": "text", "text": text})

    async def answer(self, result: Any = None) -> None:
        """Ends it well."""
        await self._host.send({"id": self.id, "result": result})

    async def fail(self, message: str) -> None:
        """Ends it badly."""
        await self._host.send({"id": self.id, "error": {"code": -32000, "message": message}})


class Host:
    """Hosts tools on a connection."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    async def register(self, *tools: str | dict[str, Any]) -> int:
        """Registers tools, by name or whole."""
        given = [{"name": tool} if isinstance(tool, str) else tool for tool in tools]
        registered: int = await self.peer.call("tools.register", given)
        return registered

    async def asked(self) -> Asked:
        """The next `tools.execute`; what else comes is dropped."""
        while True:
            message = json.loads(await self.peer.next_frame())
            if message.get("method") == "tools.execute":
                assert message["id"] == message["params"]["request_id"]
                return Asked(self, message)

    async def told_to_stop(self) -> dict[str, Any]:
        """The params of the next `tools.cancel`."""
        return await self.peer.next("tools.cancel")

    async def send(self, members: dict[str, Any]) -> None:
        """A frame of its own."""
        await self.peer.socket.send(json.dumps({"jsonrpc": "2.0", **members}))


@asynccontextmanager
async def hosted(daemon: Daemon, *tools: str | dict[str, Any]) -> AsyncIterator[tuple[Peer, Host]]:
    """A caller, and the host of some tools (none named: `tail`) on another connection."""
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register(*(tools or ("tail",)))
        yield caller, host


async def begun(caller: Peer, host: Host, tool: str = "tail", **params: Any) -> tuple[str, Asked]:
    """A handle, and the request that its host has got."""
    invoked = await caller.call("tools.invoke", {"tool": tool, **params})
    assert invoked["status"] == "running"
    return invoked["handle"], await host.asked()


LARGE = {"x": "x" * 200_000}
"""Parameters of which a few fill the outbox of a host that does not read."""


async def invoked_until_refused(caller: Peer, tool: str) -> tuple[list[str], Refused]:
    """Invokes a tool with `LARGE` parameters, again and again: the handles, and what refused the last one."""
    handles: list[str] = []
    while True:
        try:
            handles.append((await caller.call("tools.invoke", {"tool": tool, "parameters": LARGE}))["handle"])
        except Refused as refused:
            return handles, refused


async def polled(peer: Peer, handle: str, **params: Any) -> Any:
    """A poll of a handle."""
    return await peer.call("tools.poll", {"handle": handle, **params})


async def until_ended(peer: Peer, handle: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Polls with `after` until the handle has ended: all its chunks, and the last answer. Nothing is dropped."""
    chunks: list[dict[str, Any]] = []
    while True:
        answer = await polled(peer, handle, wait_ms=10_000, after=len(chunks))
        assert answer["first_sequence"] == len(chunks)
        assert "dropped_chunks" not in answer
        chunks += answer["chunks"]
        if answer["status"] != "running":
            return chunks, answer
