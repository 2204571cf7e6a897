"""A peer that is not ours: the `websockets` client, and JSON-RPC written by hand."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.daemon import Daemon

ANSWER_S = 20.0


class Refused(Exception):
    """The daemon answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']} {error['data']['type']}: {error['message']}")
        self.error = error
        self.type: str = error["data"]["type"]
        self.data: dict[str, Any] = error["data"]


class Peer:
    """One connection. What arrives is sorted as it is read: answers to their callers, all else into `pushed`."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.pushed: asyncio.Queue[bytes] = asyncio.Queue()
        self._ids = itertools.count(1)
        self._answers: dict[Any, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(Exception):
            async for frame in self.socket:
                data = frame if isinstance(frame, bytes) else frame.encode()
                # A pushed frame is told by its beginning, so that its bytes need not be parsed to be kept.
                if data.startswith(b'{"jsonrpc":"2.0","method"'):
                    self.pushed.put_nowait(data)
                    continue
                answer = json.loads(data)
                waiting = self._answers.pop(answer["id"], None) if isinstance(answer, dict) else None
                if waiting is None:
                    self.pushed.put_nowait(data)
                else:
                    waiting.set_result(answer)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError(f"closed {self.socket.close_code} {self.socket.close_reason}"))

    def start(self, method: str, params: Any = None) -> "asyncio.Task[Any]":
        """Sends a request now; the task gives its result, or raises `Refused`."""
        return asyncio.create_task(self.call(method, params))

    async def call(self, method: str, params: Any = None) -> Any:
        """The result of a call.

        Raises:
            Refused: the daemon answered with an error.
            ConnectionError: the connection ended first.
        """
        answer = await self.request({"method": method, **({} if params is None else {"params": params})})
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    async def request(self, members: dict[str, Any]) -> dict[str, Any]:
        """Sends a request of these members and gives its whole answer."""
        id_ = next(self._ids)
        future = self._answers[id_] = asyncio.get_running_loop().create_future()
        await self.socket.send(json.dumps({"jsonrpc": "2.0", "id": id_, **members}))
        return await asyncio.wait_for(future, ANSWER_S)

    async def raw(self, frame: str | bytes) -> Any:
        """Sends a frame as it is; the next thing that is pushed or answered, parsed."""
        await self.socket.send(frame)
        return json.loads(await self.next_frame())

    async def next_frame(self) -> bytes:
        """The next frame that answers no call, as it came."""
        return await asyncio.wait_for(self.pushed.get(), ANSWER_S)

    async def next(self, method: str) -> dict[str, Any]:
        """The params of the next pushed frame of this method; others are dropped."""
        while True:
            message: dict[str, Any] = json.loads(await self.next_frame())
            if message.get("method") == method:
                params: dict[str, Any] = message["params"]
                return params

    async def closed(self) -> tuple[int | None, str | None]:
        """Waits for the end of the connection: its close code and reason."""
        await asyncio.wait_for(self._reader, ANSWER_S)
        await asyncio.wait_for(self.socket.wait_closed(), ANSWER_S)
        return self.socket.close_code, self.socket.close_reason

    # The runs that tests make.

    async def create(self, prompt: str = "test", **params: Any) -> dict[str, Any]:
        """A new run: its snapshot."""
        run: dict[str, Any] = await self.call("runs.create", {"prompt": prompt, **params})
        return run

    async def record(self, run_id: str, *events: Any, **params: Any) -> dict[str, Any]:
        """Appends events."""
        answer: dict[str, Any] = await self.call("runs.record", {"run_id": run_id, "events": list(events), **params})
        return answer


@contextlib.asynccontextmanager
async def peer(daemon: Daemon, token: str | None = "auth-token", **options: Any) -> AsyncIterator[Peer]:
    """A connection. `token` names a secret file, or is a token itself; None: not authenticated."""
    headers = {}
    if token is not None:
        secret = daemon.token(token) if token in ("auth-token", "host-token") else token
        headers["Authorization"] = f"Bearer {secret}"
    options = {"max_size": None, "max_queue": None, "open_timeout": 10, "ping_interval": None} | options
    async with connect(daemon.url, additional_headers=headers, **options) as socket:
        yield Peer(socket)


def records(frames: list[bytes]) -> list[dict[str, Any]]:
    """The params of `runs.trace.event` frames."""
    return [json.loads(frame)["params"] for frame in frames]
