"""Subscriptions that are behind read pages of their run's log until they are level. Rules 1 and 3 of the live trace.

Fair: connections take turns, and within one its subscriptions do. A page is read and framed once for all subscriptions
that wait at its cursor. A subscription asks for a page only when its peer's outbox is low, so a peer that does not read
costs nothing here.
"""

from collections import deque
from collections.abc import Callable

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.ports import CallLater, Damaged, PageReader
from carserver.core.runs import Entry
from carserver.core.subscription import Mode, Piece, Subscription, Topic
from carserver.protocol.errors import RpcError
from carserver.protocol.trace import closed_frame


class CatchUp:
    """Reads pages for those who are behind.

    Args:
        pages: Where pages come from.
        call_later: A timer.
        settings: `catch_up_bytes`, `page_entries`, `catch_up_reads`, `catch_up_retry_s`.
        counters: What is counted.
        drop: Ends a subscription whose log cannot be read.
    """

    def __init__(
        self,
        pages: PageReader,
        call_later: CallLater,
        settings: Settings,
        counters: Counters,
        drop: Callable[[Subscription], None],
    ) -> None:
        self._pages = pages
        self._call_later = call_later
        self._retry_s = settings.catch_up_retry_s
        self._page_entries = settings.page_entries
        self._page_bytes = settings.catch_up_bytes
        self._free_reads = settings.catch_up_reads
        self._counters = counters
        self._drop = drop
        self._turns: deque[Outbox] = deque()
        self._lanes: dict[Outbox, deque[tuple[Subscription, int]]] = {}  # who waits, and for the page at which cursor

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(map(len, self._lanes.values()))

    def want(self, subscription: Subscription) -> None:
        """Moves a subscription on that is catching up: to live if it is level, else it waits for a turn or for room."""
        self._move_on(subscription)
        self._read()

    def _move_on(self, subscription: Subscription) -> None:
        if subscription.mode is not Mode.CATCHING_UP:
            return
        if not subscription.outbox.low:
            self._wait_for_room(subscription)
        elif not subscription.settle():
            if subscription.started_due or subscription.next == subscription.topic.cursor:
                self._wait_for_room(subscription)
            else:
                self._queue(subscription)

    def _wait_for_room(self, subscription: Subscription) -> None:
        subscription.outbox.when_low(lambda: self.want(subscription))

    def _queue(self, subscription: Subscription) -> None:
        subscription.topic.waiting.setdefault(subscription.next, []).append(subscription)
        lane = self._lanes.get(subscription.outbox)
        if lane is None:
            lane = self._lanes[subscription.outbox] = deque()
            self._turns.append(subscription.outbox)
        lane.append((subscription, subscription.next))

    def _read(self) -> None:
        while self._free_reads and self._turns:
            subscription, place = self._next()
            # None: a page that another one asked for has served it.
            asked = subscription.topic.waiting.pop(place, None) or ()
            waiting = [other for other in asked if other.mode is Mode.CATCHING_UP]
            if waiting:
                self._free_reads -= 1
                self._read_for(subscription.topic, place, waiting)

    def _next(self) -> tuple[Subscription, int]:
        outbox = self._turns.popleft()
        lane = self._lanes[outbox]
        first = lane.popleft()
        if lane:
            self._turns.append(outbox)
        else:
            del self._lanes[outbox]
        return first

    def _read_for(self, topic: Topic, start: int, waiting: list[Subscription]) -> None:
        def done(page: list[Entry] | Exception) -> None:
            self._free_reads += 1
            if isinstance(page, RpcError) and not isinstance(page, Damaged):
                self._try_later(waiting)
            elif isinstance(page, Exception):
                self._give_up(topic, waiting, page)
            else:
                self._serve(topic, start, page, waiting)
            self._read()

        self._counters.catch_up_pages += 1
        self._pages.page(topic.known, start, topic.cursor, self._page_entries, self._page_bytes, done)

    def _serve(self, topic: Topic, start: int, page: list[Entry], waiting: list[Subscription]) -> None:
        piece = Piece(start, [topic.frames.entry(*entry) for entry in page])
        for subscription in waiting:
            if subscription.mode is not Mode.CATCHING_UP:
                continue
            if subscription.catch_up(piece):
                self._move_on(subscription)
            else:
                self._wait_with(subscription, piece)

    def _wait_with(self, subscription: Subscription, piece: Piece) -> None:
        """The outbox filled while the page was read: it is kept, and goes first when there is room."""

        def there_is_room() -> None:
            if subscription.mode is Mode.CATCHING_UP and not subscription.catch_up(piece):
                self._wait_with(subscription, piece)
            else:
                self.want(subscription)

        subscription.outbox.when_low(there_is_room)

    def _try_later(self, waiting: list[Subscription]) -> None:
        """Storage could not be read now. The viewers wait; nothing of their logs is lost."""

        def try_again() -> None:
            for subscription in waiting:
                self._move_on(subscription)
            self._read()

        self._counters.catch_up_retries += 1
        self._call_later(self._retry_s, try_again)

    def _give_up(self, topic: Topic, waiting: list[Subscription], error: Exception) -> None:
        words = error.message if isinstance(error, RpcError) else "a defect of the daemon; its log has the details"
        frame = closed_frame(topic.run_id, words)
        for subscription in waiting:
            if subscription.mode is Mode.CATCHING_UP:
                self._counters.subscriptions_closed += 1
                self._drop(subscription)
                subscription.outbox.send(frame)
