"""`server.*` of the daemon, typed: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""

from carserver.client.calls import Calls, given
from carserver.protocol.pruning import Pruned
from carserver.protocol.server import BackedUp, Pong, ServerStatus


class Server:
    """`server.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def status(self) -> ServerStatus:
        """The daemon at a glance: version, uptime, boot id, what is open, how much waits for peers, and its storage."""
        answer: ServerStatus = await self._calls.call("server.status", None, result_type=ServerStatus, again=True)
        return answer

    async def ping(self) -> Pong:
        """The daemon's clock, in milliseconds since 1970; a sign of life, and the cheapest call there is."""
        answer: Pong = await self._calls.call("server.ping", None, result_type=Pong, again=True)
        return answer

    async def backup(self, path: str) -> BackedUp:
        """Copies all that is stored into a new file, while work goes on: what was acknowledged before is in it.

        `path` is absolute, on the daemon's machine; its folder is there, the file is not. It is for its owner alone
        (0600), and checked before it gets its name. To restore it, put it as `carserver.db` into an empty state folder;
        the tokens are not in it. One at a time.

        For the host.
        """
        answer: BackedUp = await self._calls.call("server.backup", {"path": path}, result_type=BackedUp, again=False)
        return answer

    async def prune(
        self,
        *,
        older_than_ms: int | None = None,
        max_runs: int | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Deletes runs that are over, with their outputs, oldest ended first: as many as must go. Never a live run.

        `older_than_ms`: those that ended longer ago than that, and outputs without a run that are older. `max_runs`: as
        many as are more than that, live ones counted. `max_bytes`: as many as take more than that, events and inline
        outputs of runs counted. At least one of them is wanted. `dry_run` changes nothing, and answers what would go.

        For the host.
        """
        answer: Pruned = await self._calls.call(
            "server.prune",
            given({"dry_run": dry_run}, older_than_ms=older_than_ms, max_runs=max_runs, max_bytes=max_bytes),
            result_type=Pruned,
            again=False,
        )
        return answer
