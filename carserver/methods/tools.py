"""`tools.*`: running tools as handles that stream, are polled and can be stopped (contract, section 6).

What tools there are is in `methods.toolbox`, the live stream in `methods.toolstream`, what hosts say in
`methods.hosting`.
"""

from carserver.core.handlestore import Order
from carserver.protocol.errors import ErrorKind, forbidden
from carserver.protocol.tools import (
    AllCancelled,
    Called,
    CancelTool,
    HandleList,
    HandlePoll,
    HandleRef,
    HandleStatus,
    Invoked,
    InvokeTool,
    ListHandles,
    PollTool,
    ToolCancelled,
)
from carserver.rpc.method import Encoded, Example, Replied, method
from carserver.rpc.session import Session

NOT_FOUND, CONFLICT, FORBIDDEN = ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.FORBIDDEN

HANDLE = "5f0c1d9e8a7b4c3d2e1f0a9b8c7d6e5f"
"""Stands in examples for the handle that an invocation was answered."""
_TOOL = ("tools.register", [{"name": "grep", "parameters": {"type": "object", "required": ["pattern"]}}])
_INVOKE = {"tool": "grep", "parameters": {"pattern": "TODO"}, "timeout_ms": 60_000, "idempotency_key": "first"}


def _order(name: str, params: InvokeTool) -> Order:
    return Order(
        method=name,
        tool=params.tool,
        parameters=params.parameters,
        action_id=params.action_id,
        run_id=params.run_id,
        timeout_ms=params.timeout_ms,
        key=params.idempotency_key,
    )


@method("tools.invoke", errors=[NOT_FOUND, FORBIDDEN, CONFLICT], example=Example(_INVOKE, before=[_TOOL]))
async def invoke(session: Session, params: InvokeTool) -> Invoked:
    """Starts a tool and answers at once with its handle, a name of 32 hex characters.

    `parameters` are checked against the tool's schema before anything runs. `timeout_ms` is a deadline, after which
    the handle fails; a tool of the tools file may have a shorter one of its own. With `run_id`, a live run of one's
    own, the tool's start, output and end are recorded there. The same `idempotency_key` with the same other params
    gives the same handle for 24 hours, whatever was restarted meanwhile; where that is forgotten it is a `conflict`
    (`exists`), never a second execution.

    A handle without a live run is cancelled when the connection that invoked it has ended and nobody of its principal
    has polled it for the grace (30 s).
    """
    handle = await session.services.tools.invoke(_order("tools.invoke", params), session.acting, session)
    return Invoked(handle=handle.id, status=handle.status)


@method("tools.call", waits=True, errors=[NOT_FOUND, FORBIDDEN, CONFLICT], example=Example(_INVOKE, before=[_TOOL]))
async def call(session: Session, params: InvokeTool) -> Encoded[Called]:
    """Starts a tool as `tools.invoke` does, and answers when it has ended, with what it came to.

    What it wrote is not in the answer, and of a command that is all but its exit code: `tools.poll` has that.

    Without an `idempotency_key` the handle is cancelled when this connection ends first. With one the same call on
    another connection waits for the same handle, which is cancelled when nobody has come for it within the grace.
    """
    called = session.services.tools.call(_order("tools.call", params), session.acting, session)
    del params  # as large as a message, perhaps: not to be kept until the end
    handle = await called
    return Encoded(handle.called())


@method(
    "tools.poll",
    again="after",
    waits="wait_ms",
    pages=True,
    while_draining=True,
    example=Example({"handle": HANDLE, "wait_ms": 10_000, "after": 0}, before=[_TOOL, ("tools.invoke", _INVOKE)]),
)
async def poll(session: Session, params: PollTool) -> Replied[Encoded[HandlePoll | None]]:
    """What there is of a handle by now; null where it is unknown, or forgotten.

    A poll takes the chunks that wait; beyond 1,024, or 1 MiB, the oldest go, and the next poll tells how many
    (`dropped_chunks`). With `wait_ms` it is answered at the first news. The first poll that sees the end is followed by
    one more answer; then the handle is forgotten.

    With `after`, a chunk's sequence, nothing is lost with a connection: the answer has the chunks from there on and
    their `first_sequence`, only those before it are freed, and a finished handle stays. Ask next with `first_sequence`
    and the number of chunks, added. What the host polls of somebody else's stays as it is.
    """
    tools = session.services.tools
    polled = await tools.poll(params.handle, session.acting, session, params.wait_ms, params.after)

    def replied(as_it_is: bool) -> None:
        handle = tools.find(params.handle, session.acting)
        if not as_it_is and polled is not None and handle is not None:
            handle.was_not_told(polled)

    return Replied(Encoded(b"null" if polled is None else polled.answer), replied)


@method(
    "tools.cancel",
    again=True,
    waits="wait_ms",
    while_draining=True,
    example=Example({"handle": HANDLE, "wait_ms": 10_000}),
)
async def cancel(session: Session, params: CancelTool) -> ToolCancelled:
    """Cancels a handle: one's own, any for the host. `cancelled` is true for one that is known, finished or not.

    The handle is `cancelled` at once, and `cancel` says how far the stop is: `requested`, then `confirmed` when nothing
    of the tool lives, or `unconfirmed` where that could not be seen in time (for a process: 2 s after it was killed).
    With `wait_ms` it is answered when that is decided.
    """
    handle = await session.services.tools.cancel(params.handle, session.acting, params.wait_ms)
    if handle is None:
        return ToolCancelled(cancelled=False)
    return ToolCancelled(cancelled=True, cancel=handle.told_proof)


@method("tools.cancel_all", while_draining=True, example=Example())
def cancel_all(session: Session) -> AllCancelled:
    """Cancels all of one's own live handles; how many these were."""
    principal = session.acting
    return AllCancelled(cancelled=session.services.tools.cancel_all(principal, f"cancelled by {principal.name}"))


@method("tools.status", again=True, while_draining=True, example=Example({"handle": HANDLE}))
def status(session: Session, params: HandleRef) -> HandleStatus | None:
    """The status of a handle, and how far its stop is if the daemon stopped it; null where it is unknown.

    It takes nothing, and does not count as a poll.
    """
    handle = session.services.tools.find(params.handle, session.acting)
    if handle is None:
        return None
    return HandleStatus(handle=handle.id, status=handle.status, cancel=handle.told_proof)


@method(
    "tools.handles",
    again=True,
    errors=[FORBIDDEN],
    pages=True,
    example=Example({}, before=[_TOOL, ("tools.invoke", _INVOKE)]),
)
def handles(session: Session, params: ListHandles) -> HandleList:
    """One's own live handles, oldest first; with `all`, which is for the host, everyone's and whose they are."""
    if params.all and session.acting.role != "host":
        raise forbidden("all: everyone's handles are for the host; without it, one's own are listed")
    live = session.services.tools.live_of(None if params.all else session.acting)
    return HandleList(handles=[handle.listed(with_owner=params.all) for handle in live])
