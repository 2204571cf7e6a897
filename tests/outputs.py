"""Outputs as a peer sends and reads them, for tests over a socket."""

import base64
import hashlib
from typing import Any

import pytest

from tests.peer import Peer, Refused


def inline(value: Any) -> dict[str, Any]:
    """Content that is a value."""
    return {"kind": "inline", "value": value}


def final(content: dict[str, Any]) -> dict[str, Any]:
    """An event."""
    return {"type": "final", "content": content, "ok": True}


def file_ref(path: str, **members: Any) -> dict[str, Any]:
    """Content that is a file."""
    return {"kind": "file_ref", "path": path, **members}


def params(event: dict[str, Any], task: str = "t", **more: Any) -> dict[str, Any]:
    """The params of an append."""
    return {"task_id": task, "attempt": 1, "producer_agent": "a", "event": event, **more}


async def append(client: Peer, event: dict[str, Any], task: str = "t", **more: Any) -> str:
    """The id of a new output."""
    id_: str = (await client.call("outputs.append", params(event, task, **more)))["id"]
    return id_


async def refused(client: Peer, method: str, given: Any) -> Refused:
    """The refusal of a call, after which the connection still answers."""
    with pytest.raises(Refused) as caught:
        await client.call(method, given)
    await client.call("server.ping")
    return caught.value


async def read(client: Peer, id_: str, **more: Any) -> dict[str, Any]:
    """A slice."""
    part: dict[str, Any] = await client.call("outputs.read", {"id": id_, **more})
    return part


async def read_whole(client: Peer, id_: str, length: int) -> bytes:
    """The content, slice by slice."""
    content = b""
    while True:
        part = await read(client, id_, offset=len(content), length=length)
        content += part["data"].encode() if part["encoding"] == "utf8" else base64.b64decode(part["data"])
        if part["eof"]:
            break
    assert (part["size"], part["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    return content
