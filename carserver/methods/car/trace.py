"""`runs.*` of the CAR dialect that read: the records of a run, and the runs of an agent (contract, section 10)."""

from typing import NamedTuple

from msgspec import UNSET, Raw

from carserver.core.runs import Head
from carserver.core.subscription import Topic
from carserver.methods import trace
from carserver.methods.car.runs import RUN, START
from carserver.protocol.carruns import (
    AgentRun,
    AgentRuns,
    FollowedRun,
    GetTrace,
    ListAgentRuns,
    NoTrace,
    RunTrace,
)
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, RpcError, invalid_params
from carserver.protocol.runs import ListRuns, RunRef, Unsubscribed
from carserver.protocol.trace import ended_record, entry_record, live_status, rfc3339, started_record
from carserver.rpc.method import Encoded, Example, Replied, method
from carserver.rpc.session import Session


class _Read(NamedTuple):
    """A run as it is by now, and the records of what was asked of its log: `cursor` is past them."""

    topic: Topic
    head: Head
    records: list[Raw]
    cursor: int


async def _read(session: Session, run_id: str, after: int, limit: int, size: int) -> _Read:
    """A run's log from the cursor `after` on: at most `limit` records and `size` bytes of them, at least one.

    Each page is made records as it comes: of a log of many small events they take much longer than their bytes say.

    Raises:
        RpcError: not_found, invalid_params; what storage raises.
    """
    runs = session.services.runs
    topic = await runs.topic(run_id, session.acting)
    head = topic.known
    if after > head.cursor:
        raise invalid_params("cursor", f"the log is at {head.cursor}, there is nothing after {after}")
    records: list[Raw] = []
    cursor, left = after, size
    while cursor < head.cursor and len(records) < limit and left > 0:
        found = await runs.scan(head, cursor, limit - len(records), None)
        for entry in found.entries:
            record = entry_record(entry.sequence, entry.timestamp_ms, entry.raw, entry.kind)
            left -= len(record)
            if left < 0 and records:
                break
            records.append(Raw(record))
        cursor = after + len(records)
    topic = await runs.topic(run_id, session.acting)
    if topic.known.no != head.no:
        return await _read(session, run_id, after, limit, size)  # it was deleted meanwhile, and made anew
    return _Read(topic, topic.known, records, cursor)


@method(
    "runs.subscribe",
    dialect="car",
    again=True,
    pages=True,
    errors=[ErrorKind.NOT_FOUND],
    example=Example({"run_id": RUN}, before=[START]),
)
async def subscribe(session: Session, params: RunRef) -> Replied[FollowedRun]:
    """The beginning of a run's log, up to 1,000 records and 4 MiB, and the rest as `runs.trace.event`, then live.

    `cursor` is where the stream begins: every record once, in order; where the log is empty, with `started`. A second
    subscription to the same run replaces the first.
    """
    settings = session.services.settings
    topic, head, records, cursor = await _read(session, params.run_id, 0, settings.so_far_turns, settings.so_far_bytes)
    followed = FollowedRun(
        run_id=head.run.id,
        agent_id=head.run.agent_id,
        turns_so_far=records,
        cursor=cursor,
        status=live_status(head.run.status),
    )
    return trace.follow(session, topic, cursor, followed)


@method("runs.unsubscribe", dialect="car", again=True, example=Example({"run_id": RUN}))
def unsubscribe(session: Session, params: RunRef) -> Unsubscribed:
    """Ends the subscription to a run; `removed` is false where there was none."""
    return trace.unsubscribe(session, params)


@method(
    "runs.get_trace",
    dialect="car",
    again=True,
    pages=True,
    example=Example({"run_id": RUN}, before=[START]),
)
async def get_trace(session: Session, params: GetTrace) -> RunTrace | NoTrace:
    """The records of a run from `cursor` (0) on, as its stream has them: `started` before them all, `ended` at the end.

    8 MiB of them at most: where there are more it says `has_more`, and `cursor` asks for the rest. A run that is
    unknown, or not one's own, is `not_found`, which is no error here.
    """
    settings = session.services.settings
    try:
        _, head, records, cursor = await _read(
            session, params.run_id, params.cursor, settings.run_events, settings.whole_trace_bytes
        )
    except RpcError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise
        return NoTrace(run_id=params.run_id)
    if not params.cursor:
        records.insert(0, Raw(encode(started_record(head.run))))
    if cursor == head.cursor and not head.live:
        records.append(Raw(encode(ended_record(head.run, head.outcome))))
    return RunTrace(
        run_id=head.run.id,
        agent_id=head.run.agent_id,
        records=records,
        cursor=cursor,
        has_more=True if cursor < head.cursor else UNSET,
    )


@method("runs.list", dialect="car", again=True, pages=True, example=Example({"agent_id": "name:Fixer"}, before=[START]))
async def list_(session: Session, params: ListAgentRuns) -> Encoded[AgentRuns]:
    """The runs of an agent that one may see, newest first: up to 1,000, or 1 MiB; `has_more`: there are others.

    `turn_count` is the number of turns that were recorded; what else its log has is not counted.
    """
    settings = session.services.settings
    filters = ListRuns(agent_id=params.agent_id)
    limit = settings.page_entries
    heads = await session.services.runs.list(session.acting, filters, None, limit + 1)
    shown: list[bytes] = []
    size = 0
    for head in heads[:limit]:
        listed = encode(_listed(head))
        if shown and size + len(listed) > settings.page_bytes:
            break
        shown.append(listed)
        size += len(listed)
    more = b',"has_more":true' if len(heads) > len(shown) else b""
    return Encoded(b'{"agent_id":%b,"runs":[%b]%b}' % (encode(params.agent_id), b",".join(shown), more))


def _listed(head: Head) -> AgentRun:
    run = head.run
    return AgentRun(
        run_id=run.id,
        agent_id=run.agent_id,
        intent=run.prompt,
        started_at=rfc3339(run.created_at_ms),
        ended_at=UNSET if run.ended_at_ms is None else rfc3339(run.ended_at_ms),
        status=live_status(run.status),
        turn_count=head.turns,
    )
