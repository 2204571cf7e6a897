"""What the daemon itself writes into a run's log about a handle, and the frame of the live stream.

Contract, section 6, In a run. The events are as an agent's own of these types would be; `source` tells them apart.
"""

from typing import Final, Literal

from msgspec import UNSET, Struct, UnsetType

from carserver.protocol.codec import encode
from carserver.protocol.tools import ResultRef

SOURCE: Final = "carserver"


class ToolStart(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_start"):
    """A tool is about to run; `id` is its handle, `name` the tool's."""

    id: str
    name: str
    source: Literal["carserver"] = SOURCE


class ToolOutputDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_output_delta"):
    """The next piece of its text; `truncated`: what follows is not recorded."""

    id: str
    name: str
    delta: str
    truncated: Literal[True] | UnsetType = UNSET
    source: Literal["carserver"] = SOURCE


class ToolEnd(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_end"):
    """What it came to. `output` is the result as text; empty where there is none, or `result_ref` stands for it."""

    id: str
    name: str
    output: str
    exit_code: int | UnsetType = UNSET
    error: str | UnsetType = UNSET
    result_ref: ResultRef | UnsetType = UNSET
    source: Literal["carserver"] = SOURCE


def stream_message(handle: str, chunk: bytes, sequence: int) -> bytes:
    """`tools.stream.event` with a `ToolStreamEvent`; `chunk` is JSON already."""
    return b'{"jsonrpc":"2.0","method":"tools.stream.event","params":{"handle":%b,"chunk":%b,"sequence":%d}}' % (
        encode(handle),
        chunk,
        sequence,
    )
