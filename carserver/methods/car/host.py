"""`host.*`: the host board, and approvals, in the forms of the CAR dialect (contract, section 10).

Reads are open to everyone who is authenticated; what a session registered, only that session changes.
"""

from carserver.core import hostintake
from carserver.core.hostboard import Board
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, limit_exceeded
from carserver.protocol.host import (
    AnswerApproval,
    Approval,
    ApprovalList,
    AskApproval,
    HostAgent,
    HostAgentRef,
    HostDevice,
    HostEvent,
    HostEvents,
    HostOk,
    HostState,
    ListApprovals,
    Notify,
    ReadHostEvents,
    RegisterAgent,
    RegisterDevice,
    SetAgentStatus,
    UpdateDevice,
)
from carserver.protocol.trace import rfc3339
from carserver.rpc.method import Encoded, Example, Replied, method
from carserver.rpc.session import Session

NOT_FOUND, CONFLICT, FORBIDDEN = ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.FORBIDDEN

APPROVAL = "6d1f0c2e-3b4a-4c5d-8e7f-9a0b1c2d3e4f"
"""Stands in an example for the approval that was requested before it."""
_AGENT = ("host.register_agent", {"id": "builder", "name": "Builder", "kind": "coder"})
_DEVICE = ("host.register_device", {"id": "phone", "name": "Phone", "kind": "mobile"})
_ASKED = ("host.request_approval", {"action": "delete the branch"})
_NOTICE = ("host.notify", {"message": "the tests pass"})


@method("host.subscribe", dialect="car", again=True)
def subscribe(session: Session) -> Replied[Encoded[HostState]]:
    """The whole host board, and from then on each of its events, as `host.event`.

    `approvals` are the pending ones, `events` the newest 100, `event_sequence` the number of the last event. What
    follows begins behind that one, after the reply.

    It is best effort: where more than 256 events wait for a connection, the oldest are left out. A gap in `sequence`
    shows that, and `host.events` has them, as far as they are kept.
    """
    board, settings = session.services.host, session.services.settings
    before = session.host_events
    if before is not None:
        board.unfollow(before)  # what waits for it is in the state
    follower = session.host_events = board.follow(session.outbox)
    state = _state(board, session.services.approvals.list_pending(), settings.list_entries)

    def replied(as_it_is: bool) -> None:
        if as_it_is or before is not None:
            follower.release()
        elif session.host_events is follower:
            board.unfollow(follower)
            session.host_events = None

    return Replied(Encoded(state), replied)


def _state(board: Board, approvals: bytes, events: int) -> bytes:
    return (
        b'{"subscribed":true,"agents":%b,"devices":%b,"approvals":%b,"events":%b,"pending_signins":[],'
        b'"event_sequence":%d,"identity":%b}'
    ) % (
        board.list_agents(),
        board.list_devices(),
        approvals,
        board.list_events(events),
        board.sequence,
        encode(board.identity),
    )


@method("host.agents", dialect="car", again=True, example=Example(before=[_AGENT]))
def agents(session: Session) -> Encoded[list[HostAgent]]:
    """The agents that sessions have registered, in the order in which they came: an array."""
    return Encoded(session.services.host.list_agents())


@method("host.devices", dialect="car", again=True, example=Example(before=[_DEVICE]))
def devices(session: Session) -> Encoded[list[HostDevice]]:
    """The devices that sessions have registered, in the order in which they came: an array."""
    return Encoded(session.services.host.list_devices())


@method("host.events", dialect="car", again=True, example=Example({"limit": 10}, before=[_NOTICE]))
def events(session: Session, params: ReadHostEvents) -> Encoded[HostEvents]:
    """The newest events of the host board, newest last: `limit`, 100 where that is left out, at most 1,000.

    The newest 1,000 are kept, and 1 MiB of them, for the life of the daemon.
    """
    settings = session.services.settings
    limit = settings.list_entries if params.limit is None else params.limit
    if limit > settings.board_events:
        raise limit_exceeded("board_events", limit, settings.board_events, "limit")
    return Encoded(b'{"events":%b}' % session.services.host.list_events(limit))


@method("host.approvals", dialect="car", again=True, example=Example({}, before=[_ASKED]))
def approvals(session: Session, params: ListApprovals) -> Encoded[ApprovalList]:
    """The approvals that are pending, oldest first; with `all`, those resolved that are kept, too."""
    every = session.services.approvals
    return Encoded(b'{"approvals":%b}' % (every.list_all() if params.all else every.list_pending()))


@method("host.register_agent", dialect="car", errors=[CONFLICT], example=Example(_AGENT[1]))
def register_agent(session: Session, params: RegisterAgent) -> Encoded[HostAgent]:
    """Registers an agent, for as long as this connection lives: `status` is `idle`.

    Without `id` it gets a random one. One's own agent of the same id is replaced; another session's is a `conflict`
    (`name_taken`).
    """
    board, settings = session.services.host, session.services.settings
    agent = hostintake.agent(params, board.new_id(), session.client_id, board.now(), settings)
    return Encoded(board.register_agent(session.take_seat(), agent))


@method(
    "host.unregister_agent",
    dialect="car",
    errors=[NOT_FOUND, FORBIDDEN],
    example=Example({"agent_id": "builder"}, before=[_AGENT]),
)
def unregister_agent(session: Session, params: HostAgentRef) -> HostOk:
    """Takes an agent that this connection has registered off the host board."""
    session.services.host.unregister_agent(session.take_seat(), params.agent_id)
    return HostOk()


@method(
    "host.set_status",
    dialect="car",
    errors=[NOT_FOUND, FORBIDDEN],
    example=Example({"agent_id": "builder", "status": "running", "current_task": "fix the tests"}, before=[_AGENT]),
)
def set_status(session: Session, params: SetAgentStatus) -> Encoded[HostAgent]:
    """Says what an agent of this connection does now; without `current_task` or `message` it has none any more.

    The event's payload is the agent, with `payload` in it.
    """
    board, settings = session.services.host, session.services.settings
    seat = session.take_seat()
    there = board.own_agent(seat, params.agent_id)
    agent = hostintake.with_status(there, params, board.now(), settings)
    return Encoded(board.set_status(seat, agent, hostintake.value(params.payload, settings, "payload")))


@method("host.register_device", dialect="car", errors=[CONFLICT], example=Example(_DEVICE[1]))
def register_device(session: Session, params: RegisterDevice) -> Encoded[HostDevice]:
    """Registers a device, for as long as this connection lives; without `id` it gets a random one.

    One's own device of the same id is replaced; another session's is a `conflict` (`name_taken`).
    """
    board, settings = session.services.host, session.services.settings
    device = hostintake.device(params, board.new_id(), session.client_id, board.now(), settings)
    return Encoded(board.register_device(session.take_seat(), device))


@method(
    "host.update_device",
    dialect="car",
    errors=[NOT_FOUND, FORBIDDEN],
    example=Example({"device_id": "phone", "status": "locked"}, before=[_DEVICE]),
)
def update_device(session: Session, params: UpdateDevice) -> Encoded[HostDevice]:
    """Changes a device of this connection, named by `id` or `device_id`; what is left out stays as it is."""
    board, settings = session.services.host, session.services.settings
    seat = session.take_seat()
    there = board.own_device(seat, hostintake.named(params))
    return Encoded(board.update_device(seat, hostintake.updated(there, params, board.now(), settings)))


@method("host.notify", dialect="car", example=Example(_NOTICE[1]))
def notify(session: Session, params: Notify) -> Encoded[HostEvent]:
    """Tells all who follow the host board something; the answer is the event.

    `kind` is `notification` where it is left out; the kinds of the daemon's own events are refused.
    """
    board, settings = session.services.host, session.services.settings
    kind = hostintake.kind_of(params)
    message = hostintake.text_of(params.message, settings, "message")
    payload = hostintake.value_or_null(params.payload, settings, "payload")
    return Encoded(board.publish(kind, params.agent_id, message, payload))


@method("host.request_approval", dialect="car", example=Example(_ASKED[1]))
async def request_approval(session: Session, params: AskApproval) -> Encoded[Approval]:
    """Asks for a person's word: the approval is stored, `pending`, and outlives this connection and the daemon.

    `options` are `approve` and `deny` where they are left out. 1,000 may be pending, and 4 MiB of them.
    """
    services = session.services
    now_ms = services.clock.now_ms()
    approval = hostintake.approval(params, services.host.new_id(), rfc3339(now_ms), services.settings)
    return Encoded(await services.approvals.request(approval, session.take_seat(), session.acting, now_ms))


@method(
    "host.resolve_approval",
    dialect="car",
    again=True,
    errors=[NOT_FOUND, FORBIDDEN, CONFLICT],
    example=Example({"approval_id": APPROVAL, "resolution": "approve"}, before=[_ASKED]),
)
async def resolve_approval(session: Session, params: AnswerApproval) -> Encoded[Approval]:
    """Gives the word that an approval waits for: one of its `options`, where these are strings; else any.

    Who may: the host; for a `system_level` one everybody; else the session that requested it, and when that has ended
    its principal. The same resolution again is answered again; another one is a `conflict` (`resolved`). The newest
    1,000 that were resolved are kept, and 4 MiB of them: the oldest go as one is resolved.
    """
    services = session.services
    return Encoded(
        await services.approvals.resolve(
            params.approval_id, params.resolution, session.seat, session.acting, services.clock.now_ms()
        )
    )
