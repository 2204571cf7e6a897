"""A session that hosts tools, as the core sees it: what it is sent, what it may say, and how each request ends."""

from typing import Any

import msgspec
import pytest
from msgspec import Raw

from carserver.config import Settings
from carserver.core.hosting import GONE, Hosting
from carserver.core.outbox import Outbox
from carserver.protocol.errors import ErrorKind
from carserver.protocol.tools import DataChunk, ErrorChunk, GivenDone, ProgressChunk, TextChunk
from tests.unit.hosted import Clock, Feed, call, sent

SETTINGS = Settings()
IN_TIME_S = SETTINGS.kill_after_s + SETTINGS.unconfirmed_s
LIMIT = 2_000


class Host:
    """A session that hosts tools, its outbox, and its time."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.clock = Clock()
        self.outbox = Outbox(lambda payload: payload, LIMIT, lambda: None)
        self.hosting = Hosting(self.outbox, "client-1", self.clock, settings)

    def start(self, request_id: str = "r1", **members: Any) -> Feed:
        """A call that is under way, and has been sent."""
        feed = Feed()
        feed.execution = self.hosting.start(call(request_id, **members), feed)
        sent(self.outbox)
        return feed

    def chunk(self, value: Any, request_id: str = "r1") -> bool:
        return self.hosting.chunk(request_id, msgspec.json.encode(value))


@pytest.fixture
def host() -> Host:
    return Host()


def cancelled(request_id: str, reason: str) -> dict[str, Any]:
    params = {"request_id": request_id, "action_id": "act", "reason": reason}
    return {"jsonrpc": "2.0", "method": "tools.cancel", "params": params}


@pytest.mark.parametrize("run", [{}, {"run_id": "run-1"}])
@pytest.mark.parametrize("timeout_ms", [None, 5_000])
def test_a_call_is_a_request_whose_id_is_its_request_id(
    host: Host, run: dict[str, Any], timeout_ms: int | None
) -> None:
    asked = call(parameters=b'{"n":1.50}', timeout_ms=timeout_ms, **run)
    assert host.hosting.refuses(asked) is None
    assert not host.outbox.size, "to be asked is not to be sent"
    host.hosting.start(asked, Feed())
    assert b'"parameters":{"n":1.50}' in host.outbox.take(1), "a number keeps its digits"
    host.hosting.start(call("r2", timeout_ms=timeout_ms, **run), Feed())
    params = {"request_id": "r2", "tool": "echo", "parameters": {}, "action_id": "act", "attempt": 1}
    params |= {"timeout_ms": timeout_ms, "session_id": "client-1", **run}
    assert sent(host.outbox) == [{"jsonrpc": "2.0", "id": "r2", "method": "tools.execute", "params": params}]


@pytest.mark.parametrize(
    ("result", "error", "last"),
    [
        (b'{"n":1.50}', None, GivenDone(result=Raw(b'{"n":1.50}'))),
        (b"null", None, GivenDone()),
        (None, None, GivenDone()),
        (None, "it broke", ErrorChunk(message="it broke")),
    ],
)
def test_an_answer_is_the_last_chunk_and_the_proof_that_nothing_lives(
    host: Host, result: bytes | None, error: str | None, last: Any
) -> None:
    feed = host.start()
    assert host.hosting.expects("r1")
    host.hosting.answered("r1", result, error)
    assert (feed.said, feed.ends) == ([last], ["gone"])
    assert (host.hosting.expects("r1"), host.hosting.asked, host.clock.timers) == (False, 0, [])


def test_chunks_are_fed_in_their_order(host: Host) -> None:
    feed = host.start()
    chunks = [
        {"kind": "text", "text": "a"},
        {"kind": "text", "text": "b", "stream": "stderr"},
        {"kind": "data", "data": [1]},
        {"kind": "progress", "fraction": 0.5},
    ]
    assert [host.chunk(chunk) for chunk in chunks] == [True] * 4
    assert feed.said == [
        TextChunk(text="a"),
        TextChunk(text="b", stream="stderr"),
        DataChunk(data=Raw(b"[1]")),
        ProgressChunk(fraction=0.5),
    ]
    assert feed.ends == []


def test_a_chunk_for_a_request_that_does_not_wait_is_refused(host: Host) -> None:
    feed = host.start()
    host.hosting.answered("r1", None, None)
    assert not host.chunk({"kind": "text", "text": "late"})
    assert not host.chunk({"kind": "text", "text": "never asked"}, "r2")
    assert not host.chunk({"kind": "no such"}, "r2")
    assert feed.said == [GivenDone()]


@pytest.mark.parametrize(
    "last", [{"kind": "done", "result": 1}, {"kind": "done"}, {"kind": "error", "message": "it broke"}]
)
def test_an_answer_after_the_last_chunk_is_the_proof_alone(host: Host, last: Any) -> None:
    feed = host.start()
    assert host.chunk(last)
    assert len(feed.said) == 1
    assert feed.ends == []
    host.hosting.answered("r1", b"2", None)
    assert (len(feed.said), feed.ends, feed.late, sent(host.outbox)) == (1, ["gone"], 0, [])


def test_a_host_that_ends_its_stream_and_never_answers_is_given_up(host: Host) -> None:
    feed = host.start()
    host.chunk({"kind": "done"})
    host.clock.advance(IN_TIME_S - 0.1)
    assert feed.ends == []
    host.clock.advance(0.2)
    assert (feed.said, feed.ends, host.hosting.asked) == ([GivenDone()], ["survives"], 0)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ({"kind": "no such"}, "chunk.kind"),
        ({"kind": "text", "text": 1}, "chunk.text"),
        ({"kind": "progress", "fraction": 2}, "chunk.fraction"),
        ({"text": "a"}, "kind"),
        (["text"], "chunk"),
        (None, "chunk"),
        ({"kind": "data", "data": Raw(b"[" * 60 + b"]" * 60)}, "value_nesting"),
    ],
)
def test_a_chunk_that_is_none_fails_the_call_by_the_place_and_the_host_is_to_stop(
    host: Host, chunk: Any, words: str
) -> None:
    feed = host.start()
    assert host.chunk(chunk)
    (failed,) = feed.said
    assert isinstance(failed, ErrorChunk)
    assert failed.message.startswith("the host's chunk is none: ")
    assert words in failed.message
    assert sent(host.outbox) == [cancelled("r1", failed.message)], "who has to mend it is told, too"
    assert host.chunk(chunk), "once is enough"
    assert (len(feed.said), sent(host.outbox), feed.ends) == (1, [], [])
    host.hosting.answered("r1", None, "cancelled")
    assert feed.ends == ["gone"]


def test_a_call_that_is_stopped_while_its_chunk_is_taken_is_stopped_once(host: Host) -> None:
    feed = host.start()
    feed.stops_at = DataChunk
    assert host.chunk({"kind": "data", "data": 1})
    assert sent(host.outbox) == [cancelled("r1", "too large")]
    feed.stops_at = GivenDone
    host.hosting.answered("r1", b"1", None)
    assert (feed.ends, sent(host.outbox), len(host.clock.timers)) == (["gone"], [], 0)


def test_a_result_that_the_daemon_refuses_stops_nothing_any_more(host: Host) -> None:
    feed = host.start()
    feed.stops_at = GivenDone
    host.hosting.answered("r1", b"1", None)
    assert (feed.ends, sent(host.outbox)) == (["gone"], [])


def test_a_stopped_host_that_answers_in_time_is_gone(host: Host) -> None:
    feed = host.start()
    feed.stop("why not")
    feed.stop("again")
    assert sent(host.outbox) == [cancelled("r1", "why not")]
    host.clock.advance(IN_TIME_S - 0.1)
    host.hosting.answered("r1", b'"too late to be heard"', None)
    host.clock.advance(1)
    assert (feed.said, feed.ends) == ([], ["gone"])


def test_a_stopped_host_that_does_not_answer_in_time_survives_and_its_answer_is_not_expected(host: Host) -> None:
    feed = host.start()
    other = host.start("r2")
    feed.stop("why not")
    host.clock.advance(IN_TIME_S + 0.1)
    assert (feed.ends, host.hosting.expects("r1")) == (["survives"], False)
    assert not host.chunk({"kind": "text", "text": "late"})
    assert (other.ends, host.hosting.expects("r2")) == ([], True), "nobody stopped that one"


@pytest.mark.parametrize("before", ["runs", "stopped", "ended"])
def test_when_the_connection_ends_its_calls_fail_and_nothing_is_known_of_them(host: Host, before: str) -> None:
    feed = host.start()
    if before == "stopped":
        feed.stop("why not")
    elif before == "ended":
        host.chunk({"kind": "done"})
    host.outbox.discard()
    host.hosting.close(GONE)
    host.clock.advance(100)
    assert feed.said == {"runs": [GONE], "stopped": [], "ended": [GivenDone()]}[before]
    assert (feed.ends, host.hosting.asked) == (["survives"], 0)
    assert not host.chunk({"kind": "text", "text": "late"})


def test_who_hosts_no_more_but_is_still_there_is_told_to_stop(host: Host) -> None:
    feed, stopped = host.start(), host.start("r2")
    stopped.stop("why not")
    sent(host.outbox)
    host.hosting.close("it acts as somebody else now")
    assert sent(host.outbox) == [cancelled("r1", "it acts as somebody else now")]
    assert (feed.said, feed.ends) == (["it acts as somebody else now"], ["survives"])


def refused(host: Host, words: str, kind: ErrorKind = ErrorKind.OVERLOADED, **members: Any) -> None:
    """It says so when it is asked, and through the feed when it is started all the same."""
    asked = call("rx", **members)  # as long as the others
    why = host.hosting.refuses(asked)
    assert why is not None
    assert why.kind is kind
    assert words in why.message
    before, feed = (host.outbox.size, host.hosting.asked), Feed()
    feed.execution = host.hosting.start(asked, feed)
    assert (feed.said, feed.ends) == ([ErrorChunk(message=f"cannot start: {why.message}")], ["gone"])
    feed.execution.stop("of no use")
    assert (host.outbox.size, host.hosting.asked) == before


def without_room(host: Host) -> None:
    """It says so when it is asked; what it was asked before that waits, and nothing of it lives when it is stopped."""
    asked = call("rx")
    why = host.hosting.refuses(asked)
    assert why is not None
    assert why.kind is ErrorKind.OVERLOADED
    assert "reads too slowly" in why.message
    assert host.hosting.refuses(asked, admitted=True) is None
    before, feed = (host.outbox.size, host.hosting.asked), Feed()
    feed.execution = host.hosting.start(asked, feed)
    assert (feed.said, feed.ends, host.outbox.size) == ([], [], before[0])
    feed.stop("not wanted any more")
    assert (feed.said, feed.ends) == ([], ["gone"])
    assert (host.outbox.size, host.hosting.asked) == before


def test_a_call_that_makes_too_large_a_frame_is_refused_and_the_largest_that_fits_is_sent() -> None:
    host = Host(Settings(frame_bytes=1_000))
    host.hosting.start(call(), Feed())
    room = 1_000 - len(host.outbox.take(1)) + 2
    largest = b'{"x":"%b"}' % (b"y" * (room - 8))
    assert host.hosting.refuses(call(parameters=largest)) is None
    host.hosting.start(call(parameters=largest), Feed())
    assert len(host.outbox.take(1)) == 1_000
    refused(host, "1001 is more than frame_bytes allows (1000)", ErrorKind.LIMIT_EXCEEDED, parameters=largest + b" ")


def test_a_host_that_does_not_read_is_refused_and_one_that_has_read_is_asked_again(host: Host) -> None:
    host.outbox.send(b"x" * (LIMIT - 10))
    without_room(host)
    host.outbox.take(1)
    assert host.hosting.refuses(call()) is None


def test_calls_that_were_admitted_before_there_was_no_room_are_sent_in_their_order_as_it_comes(host: Host) -> None:
    host.outbox.send(b'"%b"' % (b"x" * LIMIT))
    calls = [call(f"r{number}", parameters=b'{"x":"%b"}' % (b"y" * 1_000)) for number in range(4)]
    feeds = [Feed() for _ in calls]
    for asked, feed in zip(calls, feeds, strict=True):
        feed.execution = host.hosting.start(asked, feed)
    assert host.outbox.size == LIMIT + 2, "they wait outside"
    feeds[1].stop("not wanted any more")
    assert [frame["id"] for frame in sent(host.outbox)[1:]] == ["r0", "r2", "r3"]
    assert [feed.ends for feed in feeds] == [[], ["gone"], [], []]
    assert host.hosting.refuses(call("r4")) is None
    host.hosting.answered("r2", None, None)
    assert (feeds[2].said, feeds[2].ends) == ([GivenDone()], ["gone"])


@pytest.mark.parametrize("is_there", [False, True])
def test_a_call_that_waits_for_room_when_its_host_hosts_no_more_was_never_made(host: Host, is_there: bool) -> None:
    running, feed = host.start("r1"), Feed()
    for size in (LIMIT - 600, 600):
        host.outbox.send(b'"%b"' % (b"x" * size))
    feed.execution = host.hosting.start(call("r2"), feed)
    host.outbox.take(1)  # there is room again, and nobody was told yet
    if not is_there:
        host.outbox.discard()
    host.hosting.close(GONE)
    assert (feed.said, feed.ends, running.ends, host.hosting.asked) == ([GONE], ["gone"], ["survives"], 0)
    assert sent(host.outbox)[1:] == ([cancelled("r1", GONE)] if is_there else [])


def test_a_host_has_so_many_calls_and_no_more_until_it_answers_one() -> None:
    host = Host(Settings(handles=2))
    host.start("r1")
    stopped = host.start("r2")
    stopped.stop("to be stopped is not to be answered")
    sent(host.outbox)
    refused(host, "2 requests to answer already (handles)")
    host.hosting.answered("r1", None, None)
    assert host.hosting.refuses(call("r3")) is None


def test_a_connection_that_is_ending_or_has_ended_is_refused(host: Host) -> None:
    host.outbox.seal()
    refused(host, "connection has ended", ErrorKind.UNAVAILABLE)
    over = Host()
    over.hosting.close(GONE)
    refused(over, "connection has ended", ErrorKind.UNAVAILABLE)


def test_stops_wait_for_room_in_their_order_and_until_then_nothing_is_started(host: Host) -> None:
    feeds = {f"r{n}": host.start(f"r{n}") for n in range(20)}
    host.outbox.send(b'"%b"' % (b"x" * LIMIT))
    for feed in feeds.values():
        feed.stop("w" * 300)
    assert host.outbox.size == LIMIT + 2, "they wait outside"
    host.hosting.answered("r3", None, None)
    host.hosting.answered("r0", None, None)
    host.outbox.take(1)
    assert host.outbox.size <= LIMIT
    without_room(host)
    told = sent(host.outbox)
    assert told == [cancelled(f"r{n}", "w" * 300) for n in range(20) if n not in (0, 3)]
    assert host.hosting.refuses(call()) is None
    host.clock.advance(IN_TIME_S + 0.1)
    assert {request_id for request_id, feed in feeds.items() if feed.ends == ["gone"]} == {"r0", "r3"}


def test_a_small_call_does_not_slip_in_before_a_large_stop_that_waits(host: Host) -> None:
    feed = host.start()
    host.outbox.send(b'"%b"' % (b"x" * (LIMIT - 500)))
    assert host.hosting.refuses(call()) is None
    feed.stop("w" * 500)
    without_room(host)
    assert sent(host.outbox)[1:] == [cancelled("r1", "w" * 500)]
    assert host.hosting.refuses(call()) is None


def test_a_stop_that_was_given_up_before_there_was_room_is_told_all_the_same(host: Host) -> None:
    feed = host.start()
    host.outbox.send(b'"%b"' % (b"x" * LIMIT))
    feed.stop("why not")
    host.clock.advance(IN_TIME_S + 0.1)
    assert feed.ends == ["survives"]
    assert sent(host.outbox)[1:] == [cancelled("r1", "why not")]
