"""A run's live trace, through lost connections and restarts of the daemon, without a gap and without a duplicate.

Contract, section 7: the position is cursor and epoch; a subscription that names both goes on from there.
"""

import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct

from carserver.client.connection import Connection, Notification
from carserver.client.errors import ClientError, ConnectionLost, TraceClosed, TraceReset
from carserver.client.pauses import Pauses
from carserver.client.records import Record
from carserver.protocol.closing import Close
from carserver.protocol.runs import RunRef, Subscribed
from carserver.protocol.runs import TraceClosed as ClosedParams

PATIENCE_S = 60.0  # in all, between losing the stream and having it again
STEADY_S = 5.0  # a stream that held that long was one, though there was nothing to tell
ANSWER_S = 30.0  # the daemon's storage answers within 25 s or says so

Opener = Callable[[], AbstractAsyncContextManager[Connection]]


class Traced(Struct, kw_only=True):
    """The params of one `runs.trace.event`; `raw` is the same as the bytes that came, `epoch` the log's name.

    `record` is what it tells, by its kind: see `carserver.client.records`.
    """

    run_id: str
    agent_id: str
    record: dict[str, Any]
    cursor: int
    status: str
    run_status: str
    raw: Raw = Raw(b"")
    epoch: str = ""

    @property
    def kind(self) -> str:
        """`started`, `event`, `turn`, `model_turn`, `ended`, or what later daemons send."""
        return str(self.record.get("record", ""))

    @property
    def typed(self) -> Record:
        """`record`, for a type checker: `typed["record"] == "turn"` tells it the members that there are."""
        return cast("Record", self.record)


class _Position(Struct):
    cursor: int
    epoch: str | None
    started: bool = False  # its record was delivered: a stream that begins at 0 again sends it again


_traced_decoder = msgspec.json.Decoder(Traced)
_closed_decoder = msgspec.json.Decoder(ClosedParams)
_run_decoder = msgspec.json.Decoder(RunRef)


async def trace(
    open_connection: Opener,
    run_id: str,
    *,
    cursor: int = 0,
    epoch: str | None = None,
    patience_s: float = PATIENCE_S,
    insist: bool = False,
) -> AsyncGenerator[Traced, None]:
    """The records of a run from `cursor` on, as they happen, until the run has ended.

    A lost connection is replaced, with growing pauses; so is the first, if it does not come about, where one insists.

    Args:
        open_connection: makes a connection; called again for each new one.
        run_id: the run.
        cursor: where to begin; other than 0 only together with `epoch`.
        epoch: the log that `cursor` counts in.
        patience_s: the longest that is waited in all, from losing the stream to having it again, seconds. One that
            brings nothing, and does not last, is none.
        insist: wait for the first connection, too.

    Raises:
        TraceReset: the daemon's log is another one than that of `epoch`.
        TraceClosed: the run is gone.
        CallError: the subscription was refused.
        ConnectionLost, Unreachable, NotAuthorised, CallTimeout: no connection, and the patience is at its end.
    """
    position = _Position(cursor, epoch)
    pauses = Pauses(patience_s)
    subscribed = False
    while True:
        since = math.inf
        try:
            async with open_connection() as connection:
                await _subscribe(connection, run_id, position)
                subscribed, since = True, time.monotonic()
                async with aclosing(_records(connection, run_id, position)) as records:
                    async for record in records:
                        pauses.reset()
                        yield record
                        if record.kind == "ended":
                            return
                raise ConnectionLost(Close.NORMAL, "closed by this side")
        except ClientError as error:
            if time.monotonic() - since > STEADY_S:
                pauses.reset()
            if not (subscribed or insist) or not error.passing or not await pauses.pause():
                raise


async def _subscribe(connection: Connection, run_id: str, position: _Position) -> None:
    params: dict[str, Any] = {"run_id": run_id, "cursor": position.cursor}
    if position.epoch is not None:
        params["epoch"] = position.epoch
    answer = await connection.call("runs.trace.subscribe", params, ANSWER_S, result_type=Subscribed)
    if position.epoch is not None and not answer.recovered:
        raise TraceReset(f"the log of {run_id} is not the one that was being read: begin again, from cursor 0")
    position.epoch = answer.epoch


async def _records(connection: Connection, run_id: str, position: _Position) -> AsyncGenerator[Traced, None]:
    """The records of one subscription; `position` follows them."""
    async with aclosing(connection.notifications()) as notifications:
        async for notification in notifications:
            record = _traced(notification, run_id)
            if record is None or (record.kind == "started" and position.started):
                continue
            position.started = position.started or record.kind == "started"
            position.cursor = record.cursor
            record.epoch = position.epoch or ""
            yield record


def _traced(notification: Notification, run_id: str) -> Traced | None:
    """What a notification says of the run; None where it is about something else."""
    method, params = notification
    if method not in {"runs.trace.event", "runs.trace.closed"} or _run_decoder.decode(params).run_id != run_id:
        return None
    if method == "runs.trace.closed":
        raise TraceClosed(run_id, _closed_decoder.decode(params).reason)
    record = _traced_decoder.decode(params)
    record.raw = params
    return record
