"""`tools.chunk`: what a session that hosts tools says of a call before it answers it (contract, section 6, Hosting)."""

from carserver.protocol.tools import ChunkTaken, HostChunk
from carserver.rpc.method import Example, method
from carserver.rpc.session import Session

REQUEST_ID = "0b9f5f1c5a6d4c0e8d7b6a5f4e3d2c1b"
"""Stands in examples for the id of the `tools.execute` that was sent."""
_BEFORE = [("tools.register", [{"name": "grep"}]), ("tools.invoke", {"tool": "grep"})]


@method(
    "tools.chunk",
    while_draining=True,
    example=Example({"request_id": REQUEST_ID, "chunk": {"kind": "text", "text": "main.py:7: TODO\n"}}, before=_BEFORE),
)
def chunk(session: Session, params: HostChunk) -> ChunkTaken:
    """The next piece of the stream of a `tools.execute` that this connection was sent and has not answered.

    `chunk` is `{kind: "text", text, stream?: "stderr"}`, `{kind: "data", data}`, `{kind: "progress", fraction,
    message?}`, `{kind: "done", result?}` or `{kind: "error", message}`; the last two end the stream, and the request
    is to be answered all the same. Text of any length is split into chunks of 64 KiB; another chunk that is larger, or
    none of these, fails the call. Sent as a notification, mostly; `taken` is false where there is no such request on
    this connection: it is counted, and ignored.
    """
    taken = session.hosting is not None and session.hosting.chunk(params.request_id, bytes(params.chunk))
    session.services.counters.stray_chunks += not taken
    return ChunkTaken(taken=taken)
