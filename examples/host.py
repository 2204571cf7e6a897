"""Hosts a tool, `count`, over a bare WebSocket: all that a host has to do, in any language. README.md runs it."""

import asyncio
import json
import os
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

PARAMETERS = {"type": "object", "properties": {"to": {"type": "integer", "minimum": 1}}, "required": ["to"]}
COUNT = {"name": "count", "description": "Counts aloud.", "parameters": PARAMETERS}


async def main() -> None:
    """Hosts the tool for as long as this process lives: after a restart of the daemon it offers it again."""
    headers = {"Authorization": f"Bearer {os.environ['CAR_AUTH_TOKEN']}"}
    async for socket in connect(os.environ["CAR_DAEMON_URL"], additional_headers=headers):
        with suppress(ConnectionClosed):
            await host(socket)


async def host(socket: ClientConnection) -> None:
    """Registers, then takes frames: requests to run the tool, news that nobody wants that any more, an answer."""
    running: dict[str, asyncio.Task[None]] = {}  # by request
    await send(socket, id=1, method="tools.register", params=[COUNT])
    async for frame in socket:
        message = json.loads(frame)
        if message.get("method") == "tools.execute":
            running[message["id"]] = asyncio.create_task(execute(socket, message["params"], running))
            await asyncio.sleep(0)  # it begins, and from now on it hears that it is cancelled
        elif message.get("method") == "tools.cancel" and (id_ := message["params"]["request_id"]) in running:
            running[id_].cancel()
        elif message.get("id") == 1:
            print("hosting count" if "result" in message else f"refused: {message['error']['message']}", flush=True)


async def execute(socket: ClientConnection, params: dict[str, Any], running: dict[str, asyncio.Task[None]]) -> None:
    """One request, and its answer. One that is cancelled is answered, too: that proves that nothing of it lives."""
    request_id, to = params["request_id"], params["parameters"]["to"]
    try:
        for n in range(1, to + 1):
            for chunk in ({"kind": "text", "text": f"{n}\n"}, {"kind": "progress", "fraction": n / to}):
                await send(socket, method="tools.chunk", params={"request_id": request_id, "chunk": chunk})
            await asyncio.sleep(0.5)
        await send(socket, id=request_id, result={"counted_to": to})
    except asyncio.CancelledError:
        await send(socket, id=request_id, error={"code": -32000, "message": "stopped counting"})
    running.pop(request_id)


async def send(socket: ClientConnection, **message: Any) -> None:
    """A request, a notification or an answer."""
    await socket.send(json.dumps({"jsonrpc": "2.0", **message}))


if __name__ == "__main__":
    asyncio.run(main())
