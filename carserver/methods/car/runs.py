"""`runs.*` of the CAR dialect that write: the same runs as all others, in its own words (contract, section 10)."""

from collections.abc import Sequence

import msgspec
from msgspec import Raw

from carserver.core.commands import Complete, RecordTurns, Resume, Start
from carserver.core.intake import take_in_outcome
from carserver.core.runs import MODEL_TURN, TURN
from carserver.core.turns import NOT_RUN, Turn, take_in_turn
from carserver.methods.runs import new_head, new_run_id
from carserver.protocol import carruns
from carserver.protocol.carruns import COMPLETES, Completed, Dropped, Resumed, Started, TurnsRecorded
from carserver.protocol.codec import check_name, check_text, decode, encode
from carserver.protocol.errors import ErrorKind, RpcError, invalid_params, limit_exceeded
from carserver.protocol.runs import RunRef, Snapshot, Status
from carserver.protocol.trace import rfc3339
from carserver.rpc.method import Example, method
from carserver.rpc.session import Session

NOT_FOUND, CONFLICT, FORBIDDEN = ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.FORBIDDEN

RUN = "example"
START = ("runs.start", {"intent": "fix the tests", "agent_name": "Fixer", "idempotency_key": RUN})
_TURN = {"prompt": "look", "tool": "grep", "parameters": {"pattern": "TODO"}, "output": {"found": 3}}
_MODEL_TURN = {
    "run_id": RUN,
    "turn_index": 1,
    "assistant_text": "I look for what is left to do.",
    "requested_tool_calls": [{"id": "c1", "name": "grep", "arguments": {"pattern": "TODO"}}],
    "model_id": "a-model",
    "token_usage": {"total_tokens": 120},
    "duration_ms": 800,
}
_OUTCOME = {"status": "success", "summary": "fixed", "evidence": [], "metrics": {"turns": 1, "tool_calls": 1}}
_OURS = "run-"  # ids that the daemon gives begin so

_outcome_decoder = msgspec.json.Decoder(carruns.Outcome)


@method("runs.start", dialect="car", errors=[CONFLICT], example=Example(START[1]))
async def start(session: Session, params: carruns.StartRun) -> Started:
    """Creates a run, which the caller's connection attends, and which its proposals are part of until it is over.

    The run is called its agent's: `agent_id`, else the agent that the connection acts as, else `name:` and
    `agent_name`. An `idempotency_key` is the run's id: the same key with the same other params gives the same run,
    with others a `conflict` (`key_reused`), and one that is somebody else's a `conflict` (`exists`).
    """
    key = params.idempotency_key
    if key is not None and key.startswith(_OURS):
        raise invalid_params("idempotency_key", f"it becomes the run's id, and {_OURS!r} begins the daemon's own")
    check_text(params.intent, "text_bytes", session.services.settings.text_bytes, "intent")
    head = new_head(
        session,
        run_id=new_run_id(session) if key is None else key,
        prompt=params.intent,
        agent_id=_identity(session, params),
        outcome_description=params.outcome_description,
        keyed=key is not None,
    )
    command = Start(run_id=head.run.id, principal=session.acting, now_ms=head.last_at_ms, head=head)
    run: Snapshot = await session.services.runs.change(command, session)
    session.work_in(run.id, command.principal)
    return Started(run_id=run.id, agent_id=run.agent_id)


def _identity(session: Session, params: carruns.StartRun) -> str:
    identity = params.agent_id or session.acting.agent_id
    if identity is None and params.agent_name:
        identity = f"name:{params.agent_name}"
        check_name(identity, session.services.settings.name_chars, "agent_name")
    if not identity:
        raise invalid_params(
            "agent_id", "whose run is it? Give agent_id or agent_name, or connect with an agent's token"
        )
    return identity


@method("runs.record_turns", dialect="car", example=Example({"run_id": RUN, "turns": [_TURN]}, before=[START]))
async def record_turns(session: Session, params: carruns.RecordTurns) -> TurnsRecorded:
    """Appends 1 to 256 turns to a run of one's own: all, or none. The answer means that they are durable.

    Each gets its sequence as `index`. Strings above 16 KiB are cut and end in `…[truncated]`; in a turn above 256 KiB
    the largest members become `…[truncated: turn exceeded 256 KiB]`. What is dropped is told by the answer, which is no
    error then: `ok` is false, and `dropped` says why: `run_not_found` (or somebody else's), `run_terminal`,
    `run_turn_limit` (2,000 turns), `turn_too_large`.
    """
    settings = session.services.settings
    if len(params.turns) > settings.record_turns:
        raise limit_exceeded("record_turns", len(params.turns), settings.record_turns, "turns")
    turns: list[Turn] = []
    for place, given in enumerate(params.turns):
        turn = take_in_turn(given, TURN, NOT_RUN, settings, f"turns[{place}]")
        if turn is None:
            return _dropped(params.run_id, "turn_too_large")
        turns.append(turn)
    return await record(session, params.run_id, turns)


@method("runs.record_model_turn", dialect="car", example=Example(_MODEL_TURN, before=[START]))
async def record_model_turn(session: Session, params: carruns.RecordModelTurn) -> TurnsRecorded:
    """Appends what a model said in a turn to a run of one's own, with its `index` and when it came (`recorded_at`).

    The limits and the answer are those of `runs.record_turns`.
    """
    members = msgspec.structs.asdict(params)
    del members["run_id"]
    given = Raw(encode({name: value for name, value in members.items() if value is not msgspec.UNSET}))
    stamp = Raw(encode(rfc3339(session.services.clock.now_ms())))
    turn = take_in_turn(given, MODEL_TURN, {"recorded_at": stamp}, session.services.settings, "params")
    return _dropped(params.run_id, "turn_too_large") if turn is None else await record(session, params.run_id, [turn])


async def record(session: Session, run_id: str, turns: Sequence[Turn]) -> TurnsRecorded:
    """Appends turns, or says why they are dropped.

    Raises:
        RpcError: what storage raises; limit_exceeded for a log that is full.
    """
    settings = session.services.settings
    command = RecordTurns(
        run_id=run_id,
        principal=session.acting,
        now_ms=session.services.clock.now_ms(),
        turns=list(turns),
        run_turns=settings.turns,
        run_events=settings.run_events,
    )
    try:
        base_index: int = await session.services.runs.change(command, session)
    except RpcError as error:
        if (dropped := _why_dropped(error)) is None:
            raise
        return _dropped(run_id, dropped)
    return TurnsRecorded(run_id=run_id, base_index=base_index, count=len(turns), ok=True)


def _why_dropped(error: RpcError) -> Dropped | None:
    match error.kind, error.data:
        case ((ErrorKind.NOT_FOUND | ErrorKind.FORBIDDEN), _):
            return "run_not_found"
        case ErrorKind.CONFLICT, {"reason": "run_terminal"}:
            return "run_terminal"
        case ErrorKind.LIMIT_EXCEEDED, {"limit": "turns"}:
            return "run_turn_limit"
    return None


def _dropped(run_id: str, why: Dropped) -> TurnsRecorded:
    return TurnsRecorded(run_id=run_id, base_index=0, count=0, ok=False, dropped=why)


@method(
    "runs.complete",
    dialect="car",
    errors=[NOT_FOUND, FORBIDDEN, CONFLICT],
    example=Example({"run_id": RUN, "outcome": _OUTCOME}, before=[START]),
)
async def complete(session: Session, params: carruns.CompleteRun) -> Completed:
    """Ends a run of one's own with an outcome, which comes back whole in the `termination` of its `ended` record.

    `success`, `partial_success` and `done` complete the run, and `summary` is its `result_text`; `give_up`, `timeout`
    and `failure` fail it, and `summary` is its `error`. A run that has a final status: `conflict` (`run_terminal`).
    """
    outcome, raw = _checked_outcome(session, params.outcome)
    completes = outcome.status in COMPLETES
    command = Complete(
        run_id=params.run_id,
        principal=session.acting,
        now_ms=session.services.clock.now_ms(),
        status=Status.COMPLETED if completes else Status.FAILED,
        text=outcome.summary or ("" if completes else outcome.status),
        outcome=raw,
    )
    runs = session.services.runs
    try:
        await runs.change(command, session)
    finally:
        if not runs.attendance.is_live(params.run_id):
            session.work_no_more_in(params.run_id)
    return Completed(run_id=params.run_id)


def _checked_outcome(session: Session, given: Raw) -> tuple[carruns.Outcome, bytes]:
    """What of an outcome is read, and all of it as compact JSON."""
    settings = session.services.settings
    raw = bytes(take_in_outcome(bytes(given), settings, "outcome"))
    outcome = decode(_outcome_decoder, raw, "outcome")
    check_text(outcome.summary or "", "text_bytes", settings.text_bytes, "outcome.summary")
    return outcome, raw


@method(
    "runs.resume",
    dialect="car",
    again=True,
    errors=[NOT_FOUND, FORBIDDEN, CONFLICT],
    example=Example({"run_id": RUN}, before=[START]),
)
async def resume(session: Session, params: RunRef) -> Resumed:
    """Takes over a run of one's own: an interrupted one goes on, and this connection alone attends it.

    `resumed_from_client_id` is the connection that came to attend it last, null where that is not known any more (the
    daemon was restarted). One with a final status: `conflict` (`run_terminal`).
    """
    attendance = session.services.runs.attendance
    last = attendance.last(params.run_id)
    command = Resume(run_id=params.run_id, principal=session.acting, now_ms=session.services.clock.now_ms())
    run: Snapshot = await session.services.runs.change(command, session)
    if session.work_in(run.id, command.principal):
        attendance.attend_alone(run.id, session)
    return Resumed(run_id=run.id, agent_id=run.agent_id, client_id=session.client_id, resumed_from_client_id=last)
