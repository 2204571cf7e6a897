"""Who wants to know of every run that changes, and how they are told: `runs.watch` (contract, section 7).

A watch is a queue of runs, not of changes: what waits is each run's newest head, and where that grows over its bounds
it is dropped for the word that the peer lists again. So a peer that does not read costs a bounded queue, and whoever
reads comes to know how every run is by now, though not each step on the way. Like the hub, all of this is atomic on
the loop.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outbox import Framing, Outbox
from carserver.core.piecebypiece import PieceByPiece
from carserver.core.principals import Principal
from carserver.core.runs import Head
from carserver.protocol.frames import notification
from carserver.protocol.runs import RunChanged, RunFilters, Snapshot, WatchReset

OVERFLOW = "more changed than can wait for this connection"
DELETED = "runs were deleted"


def matches(filters: RunFilters, run: Snapshot) -> bool:
    """Whether a run is among those that are meant. `stores.rows.read_list` says the same in SQL."""
    return (
        (filters.session_id is None or filters.session_id == run.session_id)
        and (filters.agent_id is None or filters.agent_id == run.agent_id)
        and (filters.parent_run_id is None or filters.parent_run_id == run.parent_run_id)
        and (filters.status is None or filters.status is run.status)
        and (filters.created_after_ms is None or run.created_at_ms > filters.created_after_ms)
        and (filters.created_before_ms is None or run.created_at_ms < filters.created_before_ms)
    )


class Change:
    """What one commit made of a run: its head before (None: there was none) and after, framed once for all watchers."""

    __slots__ = ("_framed", "before", "head", "size")

    def __init__(self, before: Head | None, head: Head) -> None:
        self.before = before
        self.head = head
        self.size = head.size
        self._framed: dict[Framing, bytes] = {}

    def framed(self, framing: Framing) -> bytes:
        """`runs.changed`, as `framing` frames it."""
        frame = self._framed.get(framing)
        if frame is None:
            frame = framing(notification("runs.changed", RunChanged(run=self.head.run)))
            self._framed[framing] = frame
        return frame


class Watch(PieceByPiece):
    """One connection's.

    Args:
        outbox: Where its frames go.
        principal: Who asked; it is told of what that one sees.
        filters: Which runs are meant.
        settings: `watch_runs`, `watch_bytes`, `watch_piece_bytes`.
        counters: What is counted.
    """

    __slots__ = (
        "_bytes",
        "_counters",
        "_filters",
        "_maximum",
        "_maximum_bytes",
        "_piece_bytes",
        "_principal",
        "_queue",
        "_reset",
    )

    def __init__(
        self, outbox: Outbox, principal: Principal, filters: RunFilters, settings: Settings, counters: Counters
    ) -> None:
        super().__init__(outbox)
        self._principal = principal
        self._filters = filters
        self._maximum = settings.watch_runs
        self._maximum_bytes = settings.watch_bytes
        self._piece_bytes = settings.watch_piece_bytes
        self._counters = counters
        self._queue: OrderedDict[str, Change] = OrderedDict()
        self._bytes = 0  # of the heads in the queue, about
        self._reset = ""  # why the peer is to list again; it goes out before the queue

    @property
    def waiting(self) -> int:
        """How many runs are in the queue."""
        return len(self._queue)

    def _wants(self, head: Head) -> bool:
        return self._principal.sees(head.owner) and matches(self._filters, head.run)

    def offer(self, change: Change) -> None:
        """A run changed: it is queued if it is meant, or was until now; in place of what is queued of it."""
        run_id = change.head.run.id
        queued = self._queue.get(run_id)
        if queued is not None:
            self._bytes -= queued.size
        elif not self._wants(change.head) and (change.before is None or not self._wants(change.before)):
            return
        self._queue[run_id] = change
        self._bytes += change.size
        runs = len(self._queue)
        if runs > self._maximum or (self._bytes > self._maximum_bytes and runs > 1):
            self._begin_anew(OVERFLOW)

    def offer_deleted(self, heads: Iterable[Head]) -> None:
        """Runs are no more; if any of them is meant, or is queued for it was, the peer is to list again."""
        if any(head.run.id in self._queue or self._wants(head) for head in heads):
            self._begin_anew(DELETED)

    def _begin_anew(self, reason: str) -> None:
        """What is queued is for nothing: what the peer will list is newer. Until it is told, one word is enough."""
        self._queue.clear()
        self._bytes = 0
        if not self._reset:
            self._reset = reason
            self._counters.watch_resets += 1

    def has_more(self) -> bool:
        """See `core.piecebypiece`."""
        return bool(self._reset or self._queue)

    def take_piece(self) -> tuple[bytes, int]:
        """See `core.piecebypiece`."""
        framing = self._outbox.framing
        piece: list[bytes] = []
        size = runs = 0
        if self._reset:
            piece.append(framing(notification("runs.watch.reset", WatchReset(reason=self._reset))))
            self._reset = ""
        while self._queue and size < self._piece_bytes:
            _, change = self._queue.popitem(last=False)
            self._bytes -= change.size
            frame = change.framed(framing)
            piece.append(frame)
            size += len(frame)
            runs += 1
        return b"".join(piece), runs

    def count_sent(self, messages: int) -> None:
        """See `core.piecebypiece`."""
        self._counters.watch_changes += messages

    def close(self) -> None:
        """Nothing more enters the outbox."""
        self.closed = True
        self._queue.clear()


class Watchers:
    """All watches.

    Args:
        settings: Their bounds.
        counters: What is counted.
    """

    def __init__(self, settings: Settings, counters: Counters) -> None:
        self._settings = settings
        self._counters = counters
        self._active: dict[Watch, None] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Changed runs that wait for their peers, all together."""
        return sum(watch.waiting for watch in self._active)

    def watch(self, outbox: Outbox, principal: Principal, filters: RunFilters) -> Watch:
        """A watch that is told of nothing before `activate`."""
        return Watch(outbox, principal, filters, self._settings, self._counters)

    def activate(self, watch: Watch) -> None:
        """Its reply is queued: every commit from now on."""
        if not watch.closed:
            self._active[watch] = None

    def drop(self, watch: Watch) -> None:
        """Ends a watch; the second time nothing happens."""
        watch.close()
        self._active.pop(watch, None)

    def publish(self, changes: Iterable[tuple[Head | None, Head]]) -> None:
        """Changes of one commit, in its order: each run's head before and after. Only the last of a run counts."""
        if not self._active:
            return
        newest: dict[str, tuple[Head | None, Head]] = {}
        for before, head in changes:
            if before is None or head.revision > before.revision:
                first, _ = newest.get(head.run.id, (before, head))
                newest[head.run.id] = first, head
        for before, head in newest.values():
            change = Change(before, head)
            for watch in self._active:
                watch.offer(change)

    def deleted(self, heads: Sequence[Head]) -> None:
        """Runs are no more."""
        for watch in self._active if heads else ():
            watch.offer_deleted(heads)

    def move(self) -> None:
        """The commit is published: its changes go out, where there is room."""
        for watch in self._active:
            watch.move()
