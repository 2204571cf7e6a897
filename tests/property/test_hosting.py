"""A session that hosts tools, its peer and the daemon in any order: each call ends once, and nothing is left over."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from carserver.config import Settings
from carserver.core.hosting import GONE, Hosting
from carserver.core.outbox import Outbox
from carserver.protocol.tools import DataChunk
from tests.unit.hosted import Clock, Feed, call, sent

AT_MOST = 3
REASON = "w" * 500
LIMIT = 1_500
CHUNKS = [
    b'{"kind":"text","text":"t"}',
    b'{"kind":"data","data":1}',
    b'{"kind":"done"}',
    b'{"kind":"error","message":"m"}',
    b'{"kind":"none"}',
]
places = st.integers(0, 5)  # of a call, the newest first; one that is over, or none, too


class Hosts(RuleBasedStateMachine):
    """The model is what the peer was told, and what it has answered."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.outbox = Outbox(lambda payload: payload, LIMIT, lambda: None)
        self.hosting = Hosting(self.outbox, "client", self.clock, Settings(handles=AT_MOST))
        self.feeds: dict[str, Feed] = {}
        self.executed: list[str] = []
        self.cancelled: list[str] = []
        self.never: set[str] = set()  # that ended before there was room for them
        self.closed = False

    def id_of(self, place: int) -> str:
        return f"r{len(self.feeds) - 1 - place}"

    @rule(
        parameters=st.sampled_from([b"{}", b'{"x":"%b"}' % (b"x" * 400)]), fragile=st.booleans(), admitted=st.booleans()
    )
    def start(self, parameters: bytes, fragile: bool, admitted: bool) -> None:
        """One that was admitted waits where there is no room by now; any other is not started then."""
        id_ = f"r{len(self.feeds)}"
        asked = call(id_, parameters)
        refused = self.hosting.refuses(asked, admitted=True) is not None
        has_room = self.hosting.refuses(asked) is None
        assert not (refused and has_room)
        if not (refused or has_room or admitted):
            return
        feed = self.feeds[id_] = Feed()
        feed.stops_at = DataChunk if fragile else None
        feed.execution = self.hosting.start(asked, feed)
        assert refused == bool(feed.ends)
        assert self.hosting.expects(id_) >= has_room

    @rule(place=places, chunk=st.sampled_from(CHUNKS))
    def chunk(self, place: int, chunk: bytes) -> None:
        id_ = self.id_of(place)
        assert self.hosting.chunk(id_, chunk) == self.hosting.expects(id_)

    @rule(place=places, answer=st.sampled_from([(b"1", None), (None, "broken"), (None, None)]))
    def answer(self, place: int, answer: tuple[bytes | None, str | None]) -> None:
        id_ = self.id_of(place)
        if self.hosting.expects(id_):
            self.hosting.answered(id_, *answer)
            assert self.feeds[id_].ends == ["gone"]

    @rule(place=places)
    def stop(self, place: int) -> None:
        id_ = self.id_of(place)
        feed = self.feeds.get(id_)
        if feed is not None and not feed.over:
            was_sent = self.hosting.expects(id_)
            feed.stop(REASON)
            if not was_sent:
                assert feed.ends == ["gone"]
                self.never.add(id_)

    @rule(seconds=st.sampled_from([0.5, 4.0, 8.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def read(self) -> None:
        for message in sent(self.outbox):
            told = self.executed if message["method"] == "tools.execute" else self.cancelled
            told.append(message["params"]["request_id"])

    @precondition(lambda self: len(self.feeds) > 12 and not self.closed)
    @rule(somebody_else=st.booleans())
    def close(self, somebody_else: bool) -> None:
        self.closed = True
        if not somebody_else:
            self.outbox.discard()
        self.hosting.close(GONE)
        assert self.hosting.asked == 0

    @invariant()
    def each_ends_once_and_what_waits_is_bounded(self) -> None:
        assert self.hosting.asked <= AT_MOST
        assert len(self.clock.timers) <= self.hosting.asked
        assert self.outbox.size <= LIMIT
        for id_, feed in self.feeds.items():
            assert len(feed.ends) <= (not self.hosting.expects(id_))
            assert len(feed.ends) <= feed.over
            if not feed.ends and not self.hosting.expects(id_):
                assert not feed.over, "it waits for room"
                assert id_ not in self.executed
        assert self.hosting.asked == sum(not feed.ends for feed in self.feeds.values())
        assert len(set(self.cancelled)) == len(self.cancelled), "told twice"
        assert set(self.cancelled) <= set(self.executed), "told of what it was never asked"
        assert self.never.isdisjoint(self.executed)
        assert self.executed == sorted(set(self.executed), key=list(self.feeds).index), "once, in their order"

    def teardown(self) -> None:
        self.read()
        self.clock.advance(8.0)
        self.read()
        for id_, feed in self.feeds.items():
            if not feed.over:
                assert self.hosting.expects(id_)
                assert id_ in self.executed
                self.hosting.answered(id_, None, None)
        assert self.hosting.asked == 0
        assert all(len(feed.ends) == 1 for feed in self.feeds.values())


TestHosts = Hosts.TestCase
TestHosts.settings = settings(max_examples=100, stateful_step_count=80, deadline=None)
