"""`runs.*`: recording agent runs and reading them (contract, section 7). The live trace is in `methods.trace`."""

import hashlib
from typing import Annotated, Any
from uuid import NAMESPACE_URL, uuid5

import msgspec
import orjson
from msgspec import UNSET, Raw, UnsetType

from carserver.config import Settings
from carserver.core.commands import Cancel, Create, Fail, Record, Resume
from carserver.core.intake import take_in, take_in_metadata
from carserver.core.ports import Place
from carserver.core.principals import Principal
from carserver.core.prune import Delete
from carserver.core.runs import Head
from carserver.protocol.codec import check_text, encode
from carserver.protocol.errors import ErrorKind, invalid_params, limit_exceeded
from carserver.protocol.runs import (
    Cancelled,
    CancelRun,
    CreateRun,
    Deleted,
    EventPage,
    FailRun,
    ListRuns,
    Milliseconds,
    ReadEvents,
    Recorded,
    RecordEvents,
    RunPage,
    RunRef,
    Snapshot,
    Status,
)
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session

NOT_FOUND, CONFLICT, FORBIDDEN = ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.FORBIDDEN

_KEYED = uuid5(NAMESPACE_URL, "carserver:runs")
"""The name space of run ids that are made from an idempotency key."""


def keyed_run_id(principal: Principal, key: str) -> str:
    """The id of the run that `principal` creates with `key`."""
    return f"run-{uuid5(_KEYED, chr(10).join((principal.name, key)))}"


RUN = keyed_run_id(Principal("client"), "example")
CREATE = ("runs.create", {"prompt": "fix the tests", "session_id": "demo", "idempotency_key": "example"})
_EVENTS = [
    {"type": "agent_start", "prompt": "fix the tests"},
    {"type": "text_delta", "text": "Looking at the failures."},
]
_RECORD = ("runs.record", {"run_id": RUN, "events": _EVENTS, "batch_id": "first"})


@method("runs.create", errors=[CONFLICT], example=Example(CREATE[1]))
async def create(session: Session, params: CreateRun) -> Snapshot:
    """Creates a run, which the caller's connection attends from then on.

    With an `idempotency_key` the run's id follows from it: the same key with the same other params gives the same run,
    with others a `conflict` (`key_reused`). An agent's runs carry its id; a client may name any, which grants nothing.
    """
    principal, key = session.acting, params.idempotency_key
    check_text(params.prompt, "text_bytes", session.services.settings.text_bytes, "prompt")
    head = new_head(
        session,
        run_id=new_run_id(session) if key is None else keyed_run_id(principal, key),
        prompt=params.prompt,
        agent_id=principal.agent_id if principal.agent_id is not None else params.agent_id or "",
        outcome_description=params.outcome_description,
        keyed=key is not None,
        session_id=params.session_id,
        parent_run_id=params.parent_run_id,
        metadata=_metadata(params.metadata, session.services.settings),
    )
    command = Create(run_id=head.run.id, principal=principal, now_ms=head.last_at_ms, head=head)
    created: Snapshot = await session.services.runs.change(command, session)
    return created


def new_run_id(session: Session) -> str:
    """The id of a run that is created without a key."""
    return f"run-{session.services.daemon.new_id()}"


def new_head(
    session: Session,
    *,
    run_id: str,
    prompt: str,
    agent_id: str,
    outcome_description: str | None,
    keyed: bool,
    session_id: str = "",
    parent_run_id: str | None = None,
    metadata: Raw | UnsetType = UNSET,
) -> Head:
    """A run to be, of the session's principal. `keyed`: its id follows from an idempotency key.

    Raises:
        RpcError: limit_exceeded.
    """
    if outcome_description is not None:
        maximum = session.services.settings.text_bytes
        check_text(outcome_description, "text_bytes", maximum, "outcome_description")
    now_ms = session.services.clock.now_ms()
    run = Snapshot(
        id=run_id,
        session_id=session_id,
        agent_id=agent_id,
        status=Status.CREATED,
        prompt=prompt,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        event_count=0,
        parent_run_id=parent_run_id,
        metadata=metadata,
        outcome_description=outcome_description,
        epoch=session.services.daemon.new_id(),
    )
    return Head(
        no=0,
        owner=session.acting.name,
        run=run,
        revision=1,
        endings=0,
        last_at_ms=now_ms,
        key_digest=_digest(run) if keyed else None,
    )


def _metadata(given: Raw | UnsetType, settings: Settings) -> Raw | UnsetType:
    """An explicit null is as if it were left out."""
    if isinstance(given, UnsetType) or bytes(given).strip() == b"null":
        return UNSET
    return take_in_metadata(bytes(given), settings, "metadata")


def _digest(run: Snapshot) -> bytes:
    """Of what a caller said of a run; what it means the same is the same, however it was spaced and ordered."""
    said: list[Any] = [run.prompt, run.session_id, run.agent_id, run.parent_run_id, run.outcome_description]
    said.append(orjson.loads(bytes(run.metadata)) if run.metadata else None)
    return hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).digest()


@method(
    "runs.record",
    errors=[NOT_FOUND, FORBIDDEN, CONFLICT],
    example=Example(_RECORD[1], before=[CREATE]),
)
async def record(session: Session, params: RecordEvents) -> Recorded:
    """Appends 1 to 1,000 events to a run of one's own: all, or none. The answer means that they are durable.

    An event is an object with a string `type`; it is kept and delivered by the very bytes it came in. `batch_id` makes
    a resend harmless: the same events again get the first answer again, others a `conflict` (`batch_reused`).
    `expected_sequence` is for a single writer: a `conflict` (`sequence`) says where the log is. `at_ms` has one time
    per event, clamped between the last event's time and now. An interrupted run goes on; the log of a run that has a
    final status takes late events, and its status stays.
    """
    settings = session.services.settings
    if params.at_ms is not None and len(params.at_ms) != len(params.events):
        raise invalid_params("at_ms", f"one time per event is wanted: {len(params.events)}, not {len(params.at_ms)}")
    command = Record(
        run_id=params.run_id,
        principal=session.acting,
        now_ms=session.services.clock.now_ms(),
        events=take_in(params.events, settings),
        at_ms=params.at_ms,
        expected_sequence=params.expected_sequence,
        batch_id=params.batch_id,
        run_events=settings.run_events,
    )
    recorded: Recorded = await session.services.runs.change(command, session)
    return recorded


@method("runs.get", again=True, pages=True, errors=[NOT_FOUND], example=Example({"run_id": RUN}, before=[CREATE]))
async def get(session: Session, params: RunRef) -> Encoded[Snapshot]:
    """The snapshot of a run: its state now."""
    topic = await session.services.runs.topic(params.run_id, session.acting)
    return Encoded(topic.snapshot)


@method(
    "runs.events",
    again=True,
    pages=True,
    errors=[NOT_FOUND],
    example=Example({"run_id": RUN, "after": 0, "limit": 2}, before=[CREATE, _RECORD]),
)
async def events(session: Session, params: ReadEvents) -> Encoded[EventPage]:
    """A page of a run's log, from the cursor `after`, of these `types` if given.

    At most 1,000 entries or 1 MiB, at least one entry. `cursor` is past the last entry looked at (a filtered call looks
    at 10,000 at most), `has_more` whether the log goes on there.
    """
    settings = session.services.settings
    limit = _page_limit(params.limit, settings.page_entries, settings.page_entries)
    topic = await session.services.runs.topic(params.run_id, session.acting)
    head = topic.known
    if params.after > head.cursor:
        raise invalid_params("after", f"the log is at {head.cursor}, there is nothing after {params.after}")
    found = await session.services.runs.scan(head, params.after, limit, params.types)
    entries = b",".join(
        b'{"sequence":%d,"timestamp_ms":%d,"event":%b}' % (entry.sequence, entry.timestamp_ms, entry.raw)
        for entry in found.entries
    )
    more = b"true" if found.cursor < head.cursor else b"false"
    return Encoded(
        b'{"events":[%b],"cursor":%d,"has_more":%b,"epoch":%b}' % (entries, found.cursor, more, encode(head.run.epoch))
    )


def _page_limit(given: int | None, default: int, maximum: int) -> int:
    if given is not None and given > maximum:
        raise limit_exceeded("page_entries", given, maximum, "limit")
    return default if given is None else given


@method("runs.list", again=True, pages=True, example=Example({"session_id": "demo", "limit": 1}, before=[CREATE]))
async def list_(session: Session, params: ListRuns) -> Encoded[RunPage]:
    """Runs, newest first: one's own, or all of them for the host.

    At most `limit` (100; up to 1,000) or 1 MiB. `next_page` asks for the next page; it carries the filters, so it is
    sent alone, or with the same ones.
    """
    settings = session.services.settings
    filters, after = (params, None) if params.page is None else _read_page(params)
    limit = _page_limit(params.limit, settings.list_entries, settings.page_entries)
    heads = await session.services.runs.list(session.acting, filters, after, limit + 1)
    shown: list[bytes] = []
    size = 0
    for head in heads[:limit]:
        snapshot = encode(head.run)
        if shown and size + len(snapshot) > settings.page_bytes:
            break
        shown.append(snapshot)
        size += len(snapshot)
    more = len(heads) > len(shown)
    next_page = encode(_write_page(filters, heads[len(shown) - 1])) if more else b"null"
    return Encoded(b'{"runs":[%b],"next_page":%b}' % (b",".join(shown), next_page))


class _Page(msgspec.Struct, frozen=True):
    """What `page` holds: where the list goes on, and its filters."""

    created_at_ms: Milliseconds
    no: Annotated[int, msgspec.Meta(ge=1, le=2**53)]  # whatever comes back here must be a number that storage takes
    filters: ListRuns


_page_decoder = msgspec.json.Decoder(_Page)


def _write_page(filters: ListRuns, last: Head) -> str:
    kept = msgspec.structs.replace(filters, limit=None, page=None)
    return encode(_Page(last.run.created_at_ms, last.no, kept)).hex()


def _read_page(params: ListRuns) -> tuple[ListRuns, Place]:
    try:
        page = _page_decoder.decode(bytes.fromhex(params.page or ""))
    except (ValueError, RecursionError):  # what msgspec raises is a ValueError too, but for brackets without end
        raise invalid_params("page", "not a next_page of this daemon") from None
    given = msgspec.structs.replace(params, limit=None, page=None)
    if given not in (ListRuns(), page.filters):
        raise invalid_params("page", "it carries the filters: send it alone, or with the same ones")
    return page.filters, Place(page.created_at_ms, page.no)


@method(
    "runs.fail",
    again=True,
    errors=[NOT_FOUND, FORBIDDEN],
    example=Example({"run_id": RUN, "error": "out of budget"}, before=[CREATE]),
)
async def fail(session: Session, params: FailRun) -> Snapshot:
    """Fails a run of one's own; one that has a final status stays as it is."""
    settings = session.services.settings
    check_text(params.error, "text_bytes", settings.text_bytes, "error")
    command = Fail(
        run_id=params.run_id,
        principal=session.acting,
        now_ms=session.services.clock.now_ms(),
        error=params.error,
    )
    failed: Snapshot = await session.services.runs.change(command, session)
    return failed


@method(
    "runs.cancel",
    again=True,
    errors=[NOT_FOUND],
    example=Example({"run_id": RUN, "reason": "not needed"}, before=[CREATE]),
)
async def cancel(session: Session, params: CancelRun) -> Cancelled:
    """Cancels a run: one's own, any for the host. Who attends it gets `runs.cancelled`.

    `cancelled` is false where the run had a final status already.
    """
    check_text(params.reason, "text_bytes", session.services.settings.text_bytes, "reason")
    command = Cancel(
        run_id=params.run_id,
        principal=session.acting,
        now_ms=session.services.clock.now_ms(),
        reason=params.reason,
    )
    cancelled: Cancelled = await session.services.runs.change(command, session)
    return cancelled


@method(
    "runs.resume",
    again=True,
    errors=[NOT_FOUND, FORBIDDEN, CONFLICT],
    example=Example({"run_id": RUN}, before=[CREATE]),
)
async def resume(session: Session, params: RunRef) -> Snapshot:
    """Attends a run of one's own again; an interrupted one goes on. One with a final status: `conflict`."""
    command = Resume(run_id=params.run_id, principal=session.acting, now_ms=session.services.clock.now_ms())
    resumed: Snapshot = await session.services.runs.change(command, session)
    return resumed


@method(
    "runs.delete",
    errors=[NOT_FOUND, FORBIDDEN, CONFLICT],
    example=Example({"run_id": RUN}, before=[CREATE, ("runs.cancel", {"run_id": RUN})]),
)
async def delete(session: Session, params: RunRef) -> Deleted:
    """Deletes a run of one's own that is over, with its outputs. A live one: `conflict` (`run_live`).

    Its viewers get `runs.trace.closed`. The same idempotency key makes a new run afterwards, with another epoch.
    """
    outputs = session.services.settings.prune_outputs
    edit = Delete(principal=session.acting, run_id=params.run_id, outputs=outputs)
    deleted: Deleted | None = None
    while deleted is None:
        deleted = await session.services.runs.edit(edit)
    return deleted
