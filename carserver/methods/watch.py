"""`runs.watch`, `runs.unwatch`: being told of every run that changes (contract, section 7)."""

from carserver.methods.runs import CREATE
from carserver.protocol.runs import RunFilters, Unwatched, Watching
from carserver.rpc.method import Example, Replied, method
from carserver.rpc.session import Session


@method("runs.watch", again=True, example=Example({"session_id": "demo"}))
def watch(session: Session, params: RunFilters) -> Replied[Watching]:
    """Tells of every run that appears or changes, by `runs.changed` with its snapshot: one's own, all for the host.

    The params are the filters of `runs.list`. A run that is no longer meant because its status changed is told of once
    more. A run's newest snapshot takes the place of one that still waits, so a slow reader misses steps, never the
    last one. Where more than 1,024 runs wait, and where runs were deleted, `runs.watch.reset` comes instead: list
    again.

    Watch first, then list, and no change is missed. What `runs.changed` says of a run between the request and the
    answer of a list is newer than the list; after a `runs.watch.reset` there, ask for the list again. A second watch
    on a connection replaces the first.
    """
    watchers = session.services.runs.watchers
    if session.watch is not None:
        watchers.drop(session.watch)
    watching = session.watch = watchers.watch(session.outbox, session.acting, params)

    def replied(as_it_is: bool) -> None:
        if as_it_is:
            watchers.activate(watching)
        else:
            watchers.drop(watching)
            session.watch = None if session.watch is watching else session.watch

    return Replied(Watching(), replied)


@method("runs.unwatch", again=True, example=Example(before=[CREATE, ("runs.watch", {"session_id": "demo"})]))
def unwatch(session: Session) -> Unwatched:
    """Ends the watch; `removed` is false where there was none."""
    watching, session.watch = session.watch, None
    if watching is not None:
        session.services.runs.watchers.drop(watching)
    return Unwatched(removed=watching is not None)
