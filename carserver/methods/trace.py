"""`runs.trace.*`: watching runs live (contract, section 7, The live trace)."""

from carserver.methods.runs import CREATE, RUN
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, invalid_params, limit_exceeded
from carserver.protocol.runs import RunRef, Subscribed, SubscribeTrace, Unsubscribed
from carserver.rpc.method import Encoded, Example, Replied, method
from carserver.rpc.session import Session


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
    runs = session.services.runs
    maximum = session.services.settings.subscriptions
    topic = await runs.topic(params.run_id, session.acting)
    if len(session.subscriptions) >= maximum and params.run_id not in session.subscriptions:
        raise limit_exceeded("subscriptions", len(session.subscriptions) + 1, maximum, "run_id")
    run = topic.known.run
    recovered = params.epoch == run.epoch and params.cursor <= topic.cursor
    cursor = params.cursor if recovered else 0
    previous = session.subscriptions.get(params.run_id)
    if previous is not None:
        runs.hub.drop(previous)
    subscription = runs.hub.subscribe(topic, session.outbox, cursor, session.subscriptions)
    reply = b'{"run":%b,"cursor":%d,"epoch":%b,"recovered":%b}' % (
        topic.snapshot,
        cursor,
        encode(run.epoch),
        encode(recovered),
    )

    def replied(as_it_is: bool) -> None:
        if as_it_is:
            runs.hub.activate(subscription)
        else:
            runs.hub.drop(subscription)

    return Replied(Encoded(reply), replied)


@method("runs.trace.unsubscribe", again=True, example=Example({"run_id": RUN}))
def unsubscribe(session: Session, params: RunRef) -> Unsubscribed:
    """Ends the subscription to a run; `removed` is false where there was none."""
    subscription = session.subscriptions.get(params.run_id)
    if subscription is not None:
        session.services.runs.hub.drop(subscription)
    return Unsubscribed(run_id=params.run_id, removed=subscription is not None)
