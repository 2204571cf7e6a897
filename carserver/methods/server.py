"""`rpc.discover` and `server.*`: the daemon about itself (contract, section 9)."""

from typing import Any

from carserver.core.ports import Criteria
from carserver.protocol.errors import invalid_params
from carserver.protocol.pruning import Prune, Pruned
from carserver.protocol.server import BackedUp, Backup, Pong, ServerStatus
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session

EXAMPLE_PATH = "/var/backups/carserver.db"


@method("rpc.discover", again=True, while_draining=True, example=Example())
def discover(session: Session) -> Encoded[dict[str, Any]]:
    """The OpenRPC 1.3 document of this daemon, generated from its method table; also at `/openrpc.json`."""
    return Encoded(session.services.daemon.discover())


@method("server.status", again=True, while_draining=True, example=Example())
def status(session: Session) -> ServerStatus:
    """The daemon at a glance: version, uptime, boot id, what is open, how much waits for peers, and its storage."""
    return session.services.daemon.status()


@method("server.ping", again=True, while_draining=True, example=Example())
def ping(session: Session) -> Pong:
    """The daemon's clock, in milliseconds since 1970; a sign of life, and the cheapest call there is."""
    return Pong(now_ms=session.services.clock.now_ms())


@method("server.backup", role="host", waits=True, example=Example({"path": EXAMPLE_PATH}))
async def backup(session: Session, params: Backup) -> BackedUp:
    """Copies all that is stored into a new file, while work goes on: what was acknowledged before is in it.

    `path` is absolute, on the daemon's machine; its folder is there, the file is not. It is for its owner alone (0600),
    and checked before it gets its name. To restore it, put it as `carserver.db` into an empty state folder; the tokens
    are not in it. One at a time.
    """
    if not params.path.startswith("/") or "\0" in params.path:
        raise invalid_params("path", "an absolute path is wanted, as the daemon's machine names it")
    return await session.services.daemon.backup(params.path)


@method("server.prune", role="host", waits=True, example=Example({"max_runs": 1_000, "dry_run": True}))
async def prune(session: Session, params: Prune) -> Pruned:
    """Deletes runs that are over, with their outputs, oldest ended first: as many as must go. Never a live run.

    `older_than_ms`: those that ended longer ago than that, and outputs without a run that are older. `max_runs`: as
    many as are more than that, live ones counted. `max_bytes`: as many as take more than that, events and inline
    outputs of runs counted. At least one of them is wanted. `dry_run` changes nothing, and answers what would go.
    """
    if params.older_than_ms is None and params.max_runs is None and params.max_bytes is None:
        raise invalid_params("", "say what goes: older_than_ms, max_runs or max_bytes")
    older, clock = params.older_than_ms, session.services.clock
    before_ms = None if older is None else clock.now_ms() - older
    criteria = Criteria(before_ms, params.max_runs, params.max_bytes)
    return await session.services.pruner.prune(criteria, dry_run=params.dry_run)
