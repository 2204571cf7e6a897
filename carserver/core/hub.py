"""The loop's copy of the runs that are watched or in use, and how what was committed reaches the viewers.

Rules 1, 4, 6 and 7 of the live trace. Nothing here waits: every call is atomic on the loop, so there are no locks. A
topic's head is the greater of what was read and what was published; the log up to its cursor can be read by anyone.
"""

from collections.abc import Iterable, Sequence

from carserver.config import Settings
from carserver.core.cache import SizedCache
from carserver.core.catchup import CatchUp
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.ports import CallLater, PageReader
from carserver.core.runs import Entry, Head
from carserver.core.subscription import Bounds, Mode, Piece, Subscription, Topic
from carserver.protocol.trace import closed_frame


class Burst:
    """The frames of one topic in one commit, until they are offered."""

    __slots__ = ("first", "payloads", "size", "topic")

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.first = 0
        self.payloads: list[bytes] = []
        self.size = 0

    def add(self, entry: Entry, limit: int) -> None:
        """One more event; what is there goes out first if it would grow over `limit` bytes."""
        frame = self.topic.frames.entry(*entry)
        if self.payloads and self.size + len(frame) > limit:
            self.offer()
        if not self.payloads:
            self.first = entry.sequence
        self.payloads.append(frame)
        self.size += len(frame)

    def offer(self) -> None:
        """Hands what has gathered to every subscription."""
        if not self.payloads:
            return
        piece = Piece(self.first, self.payloads)
        self.payloads, self.size = [], 0
        for subscription in self.topic.subscriptions:
            subscription.offer(piece)

    def offer_ending(self) -> None:
        """Tells every subscription that the run is over, if it is; nobody is told twice."""
        if self.topic.over:
            for subscription in self.topic.subscriptions:
                subscription.offer_ending()


class Hub:
    """The topics, and the subscriptions to them."""

    def __init__(self, pages: PageReader, call_later: CallLater, settings: Settings, counters: Counters) -> None:
        self._pinned: dict[str, Topic] = {}
        self._idle: SizedCache[str, Topic] = SizedCache(settings.topics, settings.topics_bytes)
        self._burst_bytes = settings.burst_bytes
        self._bounds = Bounds(settings.subscription_events, settings.subscription_bytes)
        self._counters = counters
        self._catch_up = CatchUp(pages, call_later, settings, counters, self.drop)
        self.subscriptions = 0

    @property
    def topics(self) -> int:
        """How many runs the loop has a copy of."""
        return len(self._pinned) + len(self._idle)

    @property
    def waiting(self) -> int:
        """Subscriptions that wait for a page of their log."""
        return self._catch_up.waiting

    def find(self, run_id: str) -> Topic | None:
        """The topic, if the loop has it."""
        return self._pinned.get(run_id) or self._idle.get(run_id)

    def pin(self, run_id: str) -> Topic:
        """The topic, made if need be, and kept until it is unpinned: so what is published meanwhile is not missed."""
        topic = self._pinned.get(run_id)
        if topic is None:
            topic = self._pinned[run_id] = self._idle.pop(run_id) or Topic(run_id)
        topic.pins += 1
        return topic

    def unpin(self, topic: Topic) -> None:
        """One reason less to keep it."""
        topic.pins -= 1
        if topic.pins == 0 and not topic.closed:
            del self._pinned[topic.run_id]
            if topic.head is not None:
                self._keep(topic, topic.head)

    def publish(self, changes: Iterable[tuple[Head, Sequence[Entry], bool]]) -> None:
        """What one commit made, in its order: each head, the events that led to it, whether the run came to be over."""
        bursts: dict[Topic, Burst] = {}
        for head, entries, ended in changes:
            topic = self._published(head)
            if not topic.subscriptions:
                continue
            burst = bursts.get(topic) or bursts.setdefault(topic, Burst(topic))
            for entry in entries:
                burst.add(entry, self._burst_bytes)
            if ended:
                burst.offer()
                burst.offer_ending()
        for burst in bursts.values():
            burst.offer()
            burst.offer_ending()  # for those whose head was ahead of this commit until now

    def close(self, run_id: str, reason: str) -> None:
        """The run is no more: its viewers are told, and who holds its topic finds it closed."""
        self._idle.pop(run_id)
        topic = self._pinned.pop(run_id, None)
        if topic is None:
            return
        topic.closed = reason
        for subscription in list(topic.subscriptions):
            if subscription.mode is not Mode.PENDING:
                self.end(subscription, reason)

    def end(self, subscription: Subscription, reason: str) -> None:
        """Ends a subscription, and tells its peer why."""
        self._counters.subscriptions_closed += 1
        self.drop(subscription)
        subscription.outbox.send(closed_frame(subscription.topic.run_id, reason))

    def _published(self, head: Head) -> Topic:
        run_id = head.run.id
        topic = self._pinned.get(run_id)
        if topic is not None:
            topic.update(head)
            return topic
        topic = self._idle.pop(run_id) or Topic(run_id)
        topic.update(head)
        self._keep(topic, head)
        return topic

    def _keep(self, topic: Topic, head: Head) -> None:
        """Nobody watches it: it stays while there is room for its texts and for them as JSON."""
        self._idle.put(topic.run_id, topic, 2 * head.size)

    def subscribe(self, topic: Topic, outbox: Outbox, cursor: int, subscribed: dict[str, Subscription]) -> Subscription:
        """A subscription from `cursor`, pending until `activate`.

        It keeps the topic, and stands in `subscribed` (the connection's, by run id), until `drop`.
        """
        known = topic.known
        topic = self.pin(topic.run_id)
        topic.update(known)  # in case it is another object by now
        subscription = Subscription(
            topic, outbox, cursor, bounds=self._bounds, counters=self._counters, want=self._catch_up.want
        )
        subscribed[topic.run_id] = subscription
        subscription.subscribed = subscribed
        topic.subscriptions[subscription] = None
        self.subscriptions += 1
        return subscription

    def activate(self, subscription: Subscription) -> None:
        """Its reply is queued: the stream begins."""
        if subscription.mode is not Mode.PENDING:
            return
        if subscription.topic.closed:
            self.end(subscription, subscription.topic.closed)
        else:
            subscription.mode = Mode.CATCHING_UP
            self._catch_up.want(subscription)

    def drop(self, subscription: Subscription) -> None:
        """Ends a subscription; the second time nothing happens."""
        if subscription.mode is not Mode.CLOSED:
            subscription.mode = Mode.CLOSED
            del subscription.subscribed[subscription.topic.run_id]
            del subscription.topic.subscriptions[subscription]
            self.subscriptions -= 1
            self.unpin(subscription.topic)
