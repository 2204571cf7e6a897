"""`runs.trace.*`: watching runs live (contract, section 7, The live trace)."""

from typing import TypeVar

from msgspec import Raw

from carserver.core.principals import visible
from carserver.core.subscription import Topic
from carserver.methods.runs import CREATE, RUN
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, invalid_params, limit_exceeded
from carserver.protocol.runs import RunRef, Subscribed, SubscribeTrace, Termination, Unsubscribed
from carserver.rpc.method import Encoded, Example, Replied, method
from carserver.rpc.session import Session

T = TypeVar("T")


@method(
    "runs.trace.subscribe",
    again=True,
    pages=True,
    errors=[ErrorKind.NOT_FOUND],
    example=Example({"run_id": RUN}, before=[CREATE]),
)
async def subscribe(session: Session, params: SubscribeTrace) -> Replied[Encoded[Subscribed]]:
    """Streams a run's log from `cursor` on, then live: every event once, in order, as `runs.trace.event`.

    The stream begins after the reply; from cursor 0 with the record `started`. Whenever the run is over it says so with
    the record `ended`. To go on after a lost connection, send the `cursor` of the last frame and the `epoch` of the
    subscription: `recovered` is true, and nothing is missing or repeated. Where the log is not that one any more,
    `recovered` is false and everything comes again from 0. A second subscription to the same run replaces the first.
    """
    if params.cursor and params.epoch is None:
        raise invalid_params("epoch", "wanted with a cursor other than 0: the epoch that came with the subscription")
    topic = await session.services.runs.topic(params.run_id, session.acting)
    run = topic.known.run
    recovered = params.epoch == run.epoch and params.cursor <= topic.cursor
    cursor = params.cursor if recovered else 0
    outcome = topic.known.outcome
    reply = b'{"run":%b,"cursor":%d,"epoch":%b,"recovered":%b%b}' % (
        topic.snapshot,
        cursor,
        encode(run.epoch),
        encode(recovered),
        b"" if outcome is None else b',"termination":%b' % encode(Termination(outcome=Raw(outcome))),
    )
    return follow(session, topic, cursor, Encoded(reply))


def follow(session: Session, topic: Topic, cursor: int, reply: T) -> Replied[T]:
    """Subscribes to a run from `cursor` on, in place of an earlier subscription; the stream begins after `reply`.

    Raises:
        RpcError: not_found, for a connection that has come to act as somebody else meanwhile; limit_exceeded.
    """
    visible(topic.head, session.acting, "run", topic.run_id)
    hub, subscriptions = session.services.runs.hub, session.subscriptions
    maximum = session.services.settings.subscriptions
    previous = subscriptions.get(topic.run_id)
    if previous is not None:
        hub.drop(previous)
    elif len(subscriptions) >= maximum:
        raise limit_exceeded("subscriptions", len(subscriptions) + 1, maximum, "run_id")
    subscription = hub.subscribe(topic, session.outbox, cursor, subscriptions)

    def replied(as_it_is: bool) -> None:
        if as_it_is:
            hub.activate(subscription)
        else:
            hub.drop(subscription)

    return Replied(reply, replied)


@method("runs.trace.unsubscribe", again=True, example=Example({"run_id": RUN}))
def unsubscribe(session: Session, params: RunRef) -> Unsubscribed:
    """Ends the subscription to a run; `removed` is false where there was none."""
    subscription = session.subscriptions.get(params.run_id)
    if subscription is not None:
        session.services.runs.hub.drop(subscription)
    return Unsubscribed(run_id=params.run_id, removed=subscription is not None)
