"""`tools.stream.subscribe`, `tools.stream.unsubscribe`: chunks as they come, best effort (contract, section 6)."""

from carserver.protocol.tools import StreamRef, StreamSubscribed, StreamUnsubscribed
from carserver.rpc.method import Example, Replied, method
from carserver.rpc.session import Session


@method("tools.stream.subscribe", again=True, example=Example({}))
def subscribe(session: Session, params: StreamRef) -> Replied[StreamSubscribed]:
    """Sends the chunks of a handle as they come, by `tools.stream.event`; without `handle`, of all that one sees.

    These are one's own, everyone's for the host, those to come included. It begins after the reply: a poll has what was
    before. For an unknown handle, and one that has ended, nothing follows. A handle's stream ends with its last chunk
    (`done` or `error`).

    It is best effort: where more than 256 chunks wait for a connection, the oldest are left out. A gap in `sequence`
    shows that, and `tools.poll` with `after` has them, as far as the handle keeps them. A chunk comes once on a
    connection, however often it was asked for.
    """
    tools = session.services.tools
    if params.handle is not None:
        handle = tools.find(params.handle, session.acting)
        if handle is None or handle.ended:
            return Replied(StreamSubscribed(), lambda _: None)
    if session.tool_stream is None:
        session.tool_stream = tools.streams.open(session.outbox, session.acting)
    stream = session.tool_stream
    is_new = tools.streams.follow(stream, params.handle)

    def replied(as_it_is: bool) -> None:
        if as_it_is:
            tools.streams.activate(stream, params.handle)
        elif is_new:
            tools.streams.unfollow(stream, params.handle)

    return Replied(StreamSubscribed(), replied)


@method("tools.stream.unsubscribe", again=True, example=Example({}, before=[("tools.stream.subscribe", {})]))
def unsubscribe(session: Session, params: StreamRef) -> StreamUnsubscribed:
    """Ends what a `tools.stream.subscribe` with the same params began; `removed`: whether there was anything."""
    stream = session.tool_stream
    return StreamUnsubscribed(
        removed=stream is not None and session.services.tools.streams.unfollow(stream, params.handle)
    )
