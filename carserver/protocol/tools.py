"""Tools on the wire: their definitions, handles, chunks, and what goes to and comes from a session that hosts them.

Contract, section 6.
"""

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.runs import Cursor, Id, Name


class ToolStatus(StrEnum):
    """A handle's status: `running`, then exactly one of the others."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


Source = Literal["client", "process"]
Proof = Literal["requested", "confirmed", "unconfirmed"]
"""How far a stop is: asked for; nothing of it lives; or that could not be seen in time."""
WaitMs = Annotated[int, msgspec.Meta(ge=0, le=30_000)]
TimeoutMs = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
ToolName = Name


# Chunks.


class TextChunk(Struct, frozen=True, kw_only=True, tag_field="kind", tag="text"):
    """A piece of text; of the standard error stream, where it says so."""

    text: str
    stream: Literal["stderr"] | UnsetType = UNSET


class DataChunk(Struct, frozen=True, kw_only=True, tag_field="kind", tag="data"):
    """A JSON value."""

    data: Raw


class ProgressChunk(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="progress"):
    """How far it is: `fraction` from 0 to 1."""

    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)]
    message: str | None = None


class GivenDone(Struct, frozen=True, kw_only=True, tag_field="kind", tag="done"):
    """The end, as a host says it: it succeeded. A null result is none."""

    result: Raw | UnsetType = UNSET


class ErrorChunk(Struct, frozen=True, kw_only=True, tag_field="kind", tag="error"):
    """The end: it failed, or was cancelled."""

    message: str


class ResultRef(Struct, frozen=True, kw_only=True):
    """Stands in place of a large result: the output that has it, its bytes (of the compact JSON), and how it begins."""

    id: str
    size: int
    preview: str


class DoneChunk(Struct, frozen=True, kw_only=True, tag_field="kind", tag="done"):
    """The end: it succeeded. A large result is an output, and `result_ref` leads to it."""

    result: Raw | UnsetType = UNSET
    result_ref: ResultRef | UnsetType = UNSET


GivenChunk = TextChunk | DataChunk | ProgressChunk | GivenDone | ErrorChunk
"""What a host may say."""
Chunk = TextChunk | DataChunk | ProgressChunk | DoneChunk | ErrorChunk
"""What a reader gets."""


# Definitions.


class GivenTool(Struct, frozen=True, kw_only=True):
    """A tool that a session hosts: `parameters` and `returns` are JSON Schemas."""

    name: ToolName
    description: str = ""
    parameters: Raw | UnsetType = UNSET
    returns: Raw | UnsetType = UNSET
    idempotent: bool = False


class Tool(Struct, frozen=True, kw_only=True):
    """A tool as it is listed; `source` is `client` (a session hosts it) or `process` (the tools file declares it)."""

    name: str
    source: Source
    description: str
    parameters: Raw
    returns: Raw | UnsetType = UNSET
    idempotent: bool


class ToolList(Struct, frozen=True, kw_only=True):
    """All tools, by name."""

    tools: list[Tool]
    count: int


class ToolRef(Struct, frozen=True, kw_only=True):
    """Params of `tools.unregister`."""

    name: Id


class Unregistered(Struct, frozen=True, kw_only=True):
    """The name, and how many tools went: 0 or 1."""

    unregistered: str
    removed: int


# Invocations.


class InvokeTool(Struct, frozen=True, kw_only=True):
    """Params of `tools.invoke` and `tools.call`."""

    tool: Id
    parameters: Raw | UnsetType = UNSET
    action_id: Id = ""
    run_id: Id | None = None
    timeout_ms: TimeoutMs | None = None
    idempotency_key: Name | None = None


class Invoked(Struct, frozen=True, kw_only=True):
    """A handle, and its status by now."""

    handle: str
    status: ToolStatus


class Called(Struct, frozen=True, kw_only=True):
    """What a tool came to."""

    handle: str
    status: ToolStatus
    result: Raw | UnsetType = UNSET
    result_ref: ResultRef | UnsetType = UNSET
    error: str | UnsetType = UNSET


class PollTool(Struct, frozen=True, kw_only=True):
    """Params of `tools.poll`; `after` is a chunk's sequence."""

    handle: Id
    wait_ms: WaitMs = 0
    after: Cursor | None = None


class HandlePoll(Struct, frozen=True, kw_only=True):
    """A handle and what of its chunks was asked for; with `after`, `first_sequence` is that of the first of them.

    `dropped_chunks` counts what was lost since the last poll because more waited than may.
    """

    handle: str
    tool: str
    action_id: str
    status: ToolStatus
    chunks: list[Chunk]
    first_sequence: int | UnsetType = UNSET
    dropped_chunks: int | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    result_ref: ResultRef | UnsetType = UNSET
    error: str | UnsetType = UNSET


class CancelTool(Struct, frozen=True, kw_only=True):
    """Params of `tools.cancel`."""

    handle: Id
    wait_ms: WaitMs = 0


class ToolCancelled(Struct, frozen=True, kw_only=True):
    """Whether the handle is known; and how far the stop is, if the daemon stopped it."""

    cancelled: bool
    cancel: Proof | UnsetType = UNSET


class AllCancelled(Struct, frozen=True, kw_only=True):
    """How many handles were cancelled."""

    cancelled: int


class HandleRef(Struct, frozen=True, kw_only=True):
    """Params of `tools.status`."""

    handle: Id


class HandleStatus(Struct, frozen=True, kw_only=True):
    """A handle's status; and how far the stop is, if the daemon stopped it."""

    handle: str
    status: ToolStatus
    cancel: Proof | UnsetType = UNSET


class ListHandles(Struct, frozen=True, kw_only=True):
    """Params of `tools.handles`; `all`, for the host: everyone's."""

    all: bool = False


class LiveHandle(Struct, frozen=True, kw_only=True):
    """A handle that runs; `owner` only where everyone's were asked for."""

    handle: str
    tool: str
    action_id: str
    status: ToolStatus
    started_at_ms: int
    run_id: str | UnsetType = UNSET
    owner: str | UnsetType = UNSET


class HandleList(Struct, frozen=True, kw_only=True):
    """Live handles, oldest first."""

    handles: list[LiveHandle]


# The live stream.


class StreamRef(Struct, frozen=True, kw_only=True):
    """Params of `tools.stream.subscribe` and `.unsubscribe`; without `handle`: all of one's own."""

    handle: Id | None = None


class StreamSubscribed(Struct, frozen=True, kw_only=True):
    """The stream goes from here on."""

    subscribed: Literal[True] = True


class StreamUnsubscribed(Struct, frozen=True, kw_only=True):
    """Whether there was one."""

    removed: bool


class ToolStreamEvent(Struct, frozen=True, kw_only=True):
    """Params of `tools.stream.event`: a chunk and its sequence. A gap is what was skipped: a poll has it."""

    handle: str
    chunk: Chunk
    sequence: int


# To and from a session that hosts tools.


class ExecuteTool(Struct, frozen=True, kw_only=True):
    """Params of the request `tools.execute`; its id is `request_id`.

    `session_id` is the `client_id` of the session that hosts the tool; `timeout_ms` is null where there is no deadline.
    """

    request_id: str
    tool: str
    parameters: Raw
    action_id: str
    attempt: int
    timeout_ms: int | None
    session_id: str
    run_id: str | UnsetType = UNSET


class CancelExecution(Struct, frozen=True, kw_only=True):
    """Params of the notification `tools.cancel` to a host: it is to stop, and to answer the request."""

    request_id: str
    action_id: str
    reason: str


class HostChunk(Struct, frozen=True, kw_only=True):
    """Params of `tools.chunk`, from a host: a piece of the stream of the `tools.execute` with this id."""

    request_id: Id
    chunk: Raw


class ChunkTaken(Struct, frozen=True, kw_only=True):
    """Whether the chunk was for a request of this connection that is under way."""

    taken: bool
