"""`carserver runs watch`: which runs there are, as it changes; a line for each change, or what the live table shows.

The subscription comes first and the list second, so no change falls between them; of two states of a run the newer one
counts, whichever comes first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from heapq import nlargest
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from carserver.cli.output import data, json_data
from carserver.cli.plain import visible
from carserver.cli.talk import ANSWER_S
from carserver.client import ClientError, Connection, Pauses
from carserver.client.trace import PATIENCE_S, Opener
from carserver.protocol.runs import LIVE, Snapshot, Status

KEPT = 5_000  # runs; beyond twice as many those go that changed longest ago
LATELY = 100  # runs that are over, of the newest ones, to begin with
_PAGE = 1_000  # the daemon's own bound


class _Page(Struct):
    runs: list[Raw]
    next_page: str | None = None


class _Changed(Struct):
    run: Raw


class Seen(NamedTuple):
    """A run's state, and the very bytes that it came in."""

    run: Snapshot
    raw: Raw

    @property
    def age(self) -> tuple[int, int, bool]:
        """Grows with every change. An end without an event may share its millisecond with what went before."""
        return self.run.updated_at_ms, self.run.event_count, self.run.status not in LIVE


class Runs:
    """The runs that are known; `changes` grows with each change."""

    def __init__(self, status: str | None = None) -> None:
        """None yet.

        Args:
            status: the only one that is wanted. A run that leaves it is shown once more, and then not kept.
        """
        self.changes = 0
        self.dropped = 0  # runs that are not kept because there are too many
        self._status = status
        self._seen: dict[str, Seen] = {}

    def __iter__(self) -> Iterator[Seen]:
        return iter(self._seen.values())

    def take(self, seen: Seen) -> bool:
        """One state of one run; whether it is news."""
        known = self._seen.get(seen.run.id)
        if known is not None and known.age >= seen.age:
            return False
        self.changes += 1
        if self._status is not None and seen.run.status != self._status:
            return self._seen.pop(seen.run.id, None) is not None
        self._seen[seen.run.id] = seen
        if len(self._seen) > 2 * KEPT:
            kept = nlargest(KEPT, self._seen.values(), key=lambda one: (one.run.status in LIVE, one.age))
            self.dropped += len(self._seen) - len(kept)
            self._seen = {one.run.id: one for one in kept}
        return True

    def replace(self, listed: list[Seen]) -> list[Seen]:
        """All runs that there are, in place of those known; the news among them, the latest last."""
        before, self._seen = self._seen, {}
        for seen in listed:
            self.take(seen)
        self.changes += 1
        news = [one for one in self if one.run.id not in before or before[one.run.id].age < one.age]
        return sorted(news, key=lambda one: one.age)


async def watch(
    open_connection: Opener,
    filters: Mapping[str, str],
    runs: Runs,
    told: Callable[[Seen], None],
    *,
    patience_s: float = PATIENCE_S,
) -> None:
    """Keeps `runs` as they are at the daemon, through lost connections and restarts; ends with an error only.

    Args:
        open_connection: makes a connection; called again for each new one. The first is not tried again.
        filters: those of `runs.watch`.
        runs: what is kept up to date.
        told: called with each news; at first with the live ones alone.
        patience_s: the longest that is waited in all for a connection, seconds.

    Raises:
        CallError: the daemon does not serve it, or refuses it.
        ConnectionLost, Unreachable, NotAuthorised, CallTimeout: no connection, and the patience is at its end.
    """
    pauses = Pauses(patience_s)
    listed = False
    while True:
        try:
            async with open_connection() as connection:
                await connection.call("runs.watch", filters, ANSWER_S)
                for one in runs.replace(await _list(connection, filters)):
                    if listed or one.run.status in LIVE:
                        told(one)
                listed = True
                pauses.reset()
                await _follow(connection, filters, runs, told)
        except ClientError as error:
            if not listed or not error.passing or not await pauses.pause():
                raise


async def _follow(connection: Connection, filters: Mapping[str, str], runs: Runs, told: Callable[[Seen], None]) -> None:
    async with aclosing(connection.notifications()) as notifications:
        async for method, params in notifications:
            news: list[Seen] = []
            if method == "runs.changed":
                seen = _seen(msgspec.json.decode(params, type=_Changed).run)
                news = [seen] if runs.take(seen) else []
            elif method == "runs.watch.reset":
                news = runs.replace(await _list(connection, filters))
            for one in news:
                told(one)


async def _list(connection: Connection, filters: Mapping[str, str]) -> list[Seen]:
    """All live runs, and of those that are over some; or all in the one status that is wanted. At most KEPT of each."""
    if "status" in filters:
        found = await newest(connection, filters, KEPT)
    else:
        found = await newest(connection, filters, LATELY)
        for status in Status:
            if status in LIVE:
                found += await newest(connection, {**filters, "status": status}, KEPT)
    return [_seen(raw) for raw in found]


async def newest(connection: Connection, filters: Mapping[str, str], most: int) -> list[Raw]:
    """The newest runs that the filters of `runs.list` mean, newest first; at most so many."""
    found: list[Raw] = []
    params: dict[str, Any] = dict(filters)
    while True:
        params["limit"] = min(most - len(found), _PAGE)
        page = await connection.call("runs.list", params, ANSWER_S, result_type=_Page)
        found += page.runs
        if page.next_page is None or len(found) >= most:
            return found
        params["page"] = page.next_page


def _seen(raw: Raw) -> Seen:
    return Seen(msgspec.json.decode(raw, type=Snapshot), raw)


async def print_changes(
    open_connection: Opener, filters: Mapping[str, str], cells: Callable[[Snapshot], list[str]], *, as_json: bool
) -> None:
    """A line for each change: tab-separated cells, or the snapshot as the daemon has it."""

    def told(seen: Seen) -> None:
        if as_json:
            json_data(seen.raw, indented=False)
        else:
            data("\t".join(visible(cell) for cell in cells(seen.run)))

    await watch(open_connection, filters, Runs(filters.get("status")), told)
