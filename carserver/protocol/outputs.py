"""Outputs on the wire: append-only records that programs pass around by a short reference (contract, section 8)."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.runs import Cursor, Id, Limit, Milliseconds, Name

OutputId = Annotated[str, msgspec.Meta(pattern="^out-[0-9a-f]{10}$")]
Attempt = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Inline(Struct, frozen=True, kw_only=True, tag_field="kind", tag="inline"):
    """Content that the record holds: any JSON value.

    In a list a large one comes without `value`: `omitted`, and its `size` (bytes of the string, or of the compact JSON
    of another value). `outputs.get` has it whole, `outputs.read` slice by slice.
    """

    value: Raw | UnsetType = UNSET
    omitted: Literal[True] | UnsetType = UNSET
    size: Size | UnsetType = UNSET


class FileRef(Struct, frozen=True, kw_only=True, tag_field="kind", tag="file_ref"):
    """Content that is a file: its path below the daemon's file root. `mime` and `size_hint` are the producer's word."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    mime: str | None = None
    size_hint: Size | None = None


Content = Inline | FileRef


class Progress(Struct, frozen=True, kw_only=True, tag_field="type", tag="progress"):
    """How far a task is."""

    stage: str
    note: str | None = None


class Partial(Struct, frozen=True, kw_only=True, tag_field="type", tag="partial"):
    """A piece of what is to come."""

    chunk: Content


class Artifact(Struct, frozen=True, kw_only=True, tag_field="type", tag="artifact"):
    """Something made along the way, under a name."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    content: Content


class Final(Struct, frozen=True, kw_only=True, tag_field="type", tag="final"):
    """What a task came to."""

    content: Content
    ok: bool


OutputEvent = Progress | Partial | Artifact | Final


class OutputRecord(Struct, frozen=True, kw_only=True):
    """One output. `run_id` is left out where it belongs to no run.

    `private` is there, and true, where its owner and the host alone see it: it is the result of a handle.
    """

    id: OutputId
    task_id: Annotated[str, msgspec.Meta(min_length=1)]
    attempt: Attempt
    producer_agent: Annotated[str, msgspec.Meta(min_length=1)]
    event: OutputEvent
    parent_refs: list[str]
    created_at_ms: Milliseconds
    run_id: str | UnsetType = UNSET
    private: Literal[True] | UnsetType = UNSET


class GivenInline(Struct, frozen=True, kw_only=True, tag_field="kind", tag="inline"):
    """Content that the record will hold: any JSON value."""

    value: Raw


GivenContent = GivenInline | FileRef


class GivenPartial(Struct, frozen=True, kw_only=True, tag_field="type", tag="partial"):
    """A piece of what is to come."""

    chunk: GivenContent


class GivenArtifact(Struct, frozen=True, kw_only=True, tag_field="type", tag="artifact"):
    """Something made along the way, under a name."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    content: GivenContent


class GivenFinal(Struct, frozen=True, kw_only=True, tag_field="type", tag="final"):
    """What a task came to."""

    content: GivenContent
    ok: bool


GivenEvent = Progress | GivenPartial | GivenArtifact | GivenFinal


class AppendOutput(Struct, frozen=True, kw_only=True):
    """Params of `outputs.append`."""

    task_id: Name
    attempt: Attempt
    producer_agent: Name
    event: GivenEvent
    parent_refs: list[Id] | None = None
    run_id: Id | None = None
    idempotency_key: Name | None = None


class Appended(Struct, frozen=True, kw_only=True):
    """The id of a new output: a name, not a key."""

    id: OutputId


class OutputRef(Struct, frozen=True, kw_only=True):
    """Params of the methods that name an output and no more."""

    id: Id


class LatestOutput(Struct, frozen=True, kw_only=True):
    """Params of `outputs.latest`: `name` (a producer) or `artifact`, one of them."""

    name: str | None = None
    artifact: Id | None = None
    task_id: Id | None = None
    attempt: Attempt | None = None


class ListOutputs(Struct, frozen=True, kw_only=True):
    """Params of `outputs.list`."""

    task_id: Id | None = None
    attempt: Attempt | None = None
    limit: Limit | None = None
    page: str | None = None


class OutputPage(Struct, frozen=True, kw_only=True):
    """A page of outputs in the order of their appending; `next_page` is null on the last."""

    outputs: list[OutputRecord]
    next_page: str | None


class ReadOutput(Struct, frozen=True, kw_only=True):
    """Params of `outputs.read`; bytes."""

    id: Id
    offset: Cursor = 0
    length: Limit | None = None


class OutputSlice(Struct, frozen=True, kw_only=True):
    """A slice of an output's content; `size` and `sha256` (hex) are those of the whole."""

    data: str
    encoding: Literal["utf8", "base64"]
    size: int
    sha256: str
    eof: bool
