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
from carserver.core.subscription import Bounds, Mode, Piece, Subscription
from carserver.protocol.codec import encode
from carserver.protocol.trace import TraceFrames


class Topic:
    """One run as the loop knows it: its head, and who watches it."""

    __slots__ = ("_ended", "_frames", "_head", "_snapshot", "pins", "run_id", "subscriptions", "waiting")

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.pins = 0  # subscriptions, and reads under way
        self.subscriptions: dict[Subscription, None] = {}
        self.waiting: dict[int, list[Subscription]] = {}  # by cursor: who needs the page that begins there
        self._head: Head | None = None
        self._snapshot: bytes | None = None
        self._frames: TraceFrames | None = None
        self._ended: Piece | None = None

    @property
    def head(self) -> Head | None:
        """None until it was read; and for a run that does not exist."""
        return self._head

    @property
    def known(self) -> Head:
        """The head of a run that is known to exist."""
        assert self._head is not None  # noqa: S101 - subscriptions and pages exist only for topics with a head
        return self._head

    @property
    def cursor(self) -> int:
        """How many events are committed."""
        return self.known.cursor

    @property
    def over(self) -> bool:
        """Whether the run has a final status or is interrupted."""
        return not self.known.live

    @property
    def endings(self) -> int:
        """How often the run came to be over."""
        return self.known.endings

    @property
    def snapshot(self) -> bytes:
        """The run as JSON, encoded once per change."""
        if self._snapshot is None:
            self._snapshot = encode(self.known.run)
        return self._snapshot

    @property
    def frames(self) -> TraceFrames:
        """The maker of this run's frames."""
        if self._frames is None:
            self._frames = TraceFrames(self.run_id, self.known.run.agent_id)
        return self._frames

    def update(self, head: Head) -> None:
        """What was read or published: the greater wins."""
        if self._head is None or head.revision > self._head.revision:
            self._head = head
            self._snapshot = None
            self._ended = None

    def started(self) -> bytes:
        """The record that a stream from 0 begins with."""
        return self.frames.started(self.known.run)

    def ended(self) -> Piece:
        """The record of the run being over, framed once for all."""
        if self._ended is None:
            self._ended = Piece(self.cursor, [self.frames.ended(self.known.run)])
        return self._ended


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
        frame = self.topic.frames.event(*entry)
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
        if topic.pins == 0:
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
        if subscription.mode is Mode.PENDING:
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
