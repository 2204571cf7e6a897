"""Export and import on the wire: the lines of an export, which are those of `runs.import` (contract, section 7).

A file of these is JSON lines: a run, then its events a page each, then the next run, oldest first; then the outputs.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.outputs import Attempt, GivenEvent, OutputId, Size
from carserver.protocol.runs import Cursor, Status

PAGE_EVENTS = 1_000
"""Events of one line, at most."""

Time = Annotated[int, msgspec.Meta(ge=0, le=253_402_214_400_000)]
"""Milliseconds since 1970, up to the last day of the year 9999: later ones no calendar here can show (RFC 3339)."""


class ImportRuns(Struct, frozen=True, kw_only=True):
    """Params of `runs.import`: lines as `carserver export` writes them, in their order."""

    lines: Annotated[list[Raw], msgspec.Meta(min_length=1)]


class Imported(Struct, frozen=True, kw_only=True):
    """What came of these lines: runs that appeared, events and outputs stored; runs and outputs that were there."""

    runs: int
    events: int
    outputs: int
    skipped: int


class ImportedRun(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run's snapshot without its epoch: the log will have another one. The order of the members is the snapshot's.

    `outcome` is what it was completed with, as its `ended` record has it in `termination`.
    """

    id: Annotated[str, msgspec.Meta(min_length=1)]
    session_id: str
    agent_id: str
    status: Status
    prompt: str
    created_at_ms: Time
    updated_at_ms: Time
    result_text: str | None = None
    error: str | None = None
    cancel_reason: str | None = None
    interrupted_reason: str | None = None
    event_count: Cursor
    parent_run_id: str | None = None
    metadata: Raw | UnsetType = UNSET
    ended_at_ms: Time | None = None
    outcome_description: str | None = None
    outcome: Raw | UnsetType = UNSET


class ImportedEvent(Struct, frozen=True, kw_only=True):
    """An entry of a log; `status` is the run's after it, `record` how the live trace has it, where not as an event."""

    sequence: Cursor
    timestamp_ms: Time
    status: Status
    record: Literal["turn", "model_turn"] | UnsetType = UNSET
    event: Raw


class ImportedOutput(Struct, frozen=True, kw_only=True):
    """An output as `outputs.get` answers it."""

    id: OutputId
    task_id: Annotated[str, msgspec.Meta(min_length=1)]
    attempt: Attempt
    producer_agent: Annotated[str, msgspec.Meta(min_length=1)]
    event: GivenEvent
    parent_refs: list[str]
    created_at_ms: Time
    run_id: str | UnsetType = UNSET
    private: Literal[True] | UnsetType = UNSET


class ImportLine(Struct, frozen=True, kw_only=True):
    """One line: a run; or a page of the events of one; or an output, with its file's size and SHA-256 if it has one."""

    run: ImportedRun | UnsetType = UNSET
    run_id: str | UnsetType = UNSET
    events: Annotated[list[ImportedEvent], msgspec.Meta(min_length=1)] | UnsetType = UNSET
    output: ImportedOutput | UnsetType = UNSET
    size: Size | None = None
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
