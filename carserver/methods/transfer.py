"""`runs.import`: runs and outputs from an export (contract, section 7)."""

from typing import Any

from carserver.core.transfer import Import, OutputPart, Part, take_in_line
from carserver.protocol.errors import ErrorKind, limit_exceeded
from carserver.protocol.transfer import Imported, ImportRuns
from carserver.rpc.method import Example, method
from carserver.rpc.session import Session

_TURN_BYTES = 64 * 1024  # of lines taken in before others have their turn

_RUN: dict[str, Any] = {
    "id": "run-of-another-daemon",
    "session_id": "",
    "agent_id": "",
    "status": "completed",
    "prompt": "fix the tests",
    "created_at_ms": 1_763_000_000_000,
    "updated_at_ms": 1_763_000_001_000,
    "result_text": "done",
    "event_count": 1,
    "ended_at_ms": 1_763_000_001_000,
}
_EVENT = {
    "sequence": 0,
    "timestamp_ms": 1_763_000_001_000,
    "status": "completed",
    "event": {"type": "agent_end", "text": "done"},
}


@method(
    "runs.import",
    role="host",
    waits=True,
    errors=[ErrorKind.CONFLICT, ErrorKind.FORBIDDEN],
    example=Example({"lines": [{"run": _RUN}, {"run_id": _RUN["id"], "events": [_EVENT]}]}),
)
async def import_(session: Session, params: ImportRuns) -> Imported:
    """Takes in runs and outputs as `carserver export` writes them: up to 1,000 lines in their order, all or none.

    A line is `{run}` (a snapshot; its epoch is not looked at; with the `outcome` that it was completed with), a page of
    its events `{run_id, events: [{sequence, timestamp_ms, status, record?, event}]}` (`record` is `turn` or
    `model_turn` where the live trace has it as one), or `{output, size, sha256}`. A run appears with its last event, as
    the host's, in a log of another epoch; its lines may come in several calls, and a `{run}` line begins it anew. What
    is there with the same content is skipped, with other content it is a `conflict` (`exists`); `path` names the line.
    """
    settings = session.services.settings
    if len(params.lines) > settings.import_lines:
        raise limit_exceeded("import_lines", len(params.lines), settings.import_lines, "lines")
    parts: list[Part] = []
    size = turn = 0
    for place, raw in enumerate(params.lines):
        source = bytes(raw)
        part = take_in_line(source, f"lines[{place}]", settings)
        if isinstance(part, OutputPart):
            part = part._replace(output=await session.services.outputs.with_file(part.output))
        parts.append(part)
        size += len(source)
        if size - turn > _TURN_BYTES:
            turn = size
            await session.services.daemon.sleep(0)
    epoch = session.services.daemon.new_id()
    imported: Imported = await session.services.runs.edit(
        Import(principal=session.acting, parts=parts, epoch=epoch, bytes=size)
    )
    session.services.counters.outputs_imported += imported.outputs
    return imported
