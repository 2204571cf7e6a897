"""Answers of peers to requests of the daemon, in process: which one they answer, and what is wrong with a wrong one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from carserver.core.hosting import _NO_WORDS
from carserver.core.principals import CLIENT, Principal
from carserver.protocol.codec import encode
from carserver.protocol.tools import ErrorChunk, GivenDone, GivenTool
from tests.rig import Rig, rigged
from tests.unit.hosted import Feed, call, sent

DEEPEST = 48


class Host:
    """A session that was sent requests."""

    def __init__(self, rig: Rig, runner: Any) -> None:
        self.rig = rig
        self.runner = runner
        self.counters = rig.daemon.counters

    def asked(self, request_id: str = "r1") -> Feed:
        """A request that waits for an answer."""
        feed = Feed()
        feed.execution = self.rig.session.host_tools().start(call(request_id), feed)
        return feed

    def says(self, message: Any) -> list[Any]:
        """What a message is answered."""
        text = message if isinstance(message, bytes) else encode(message)
        return [json.loads(frame) for frame in self.runner.run(self.rig.receive(text))]

    def hosts(self, name: str) -> None:
        toolbox = self.rig.session.services.toolbox
        assert toolbox.register(self.rig.session.host_tools(), [toolbox.define(GivenTool(name=name), 0)]) == 1

    def finds(self, name: str) -> bool:
        return self.rig.session.services.toolbox.find(name) is not None


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with rigged(tmp_path) as (rig, runner):
        yield Host(rig, runner)


def reply(request_id: Any = "r1", **members: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, **members}


NESTED = b'{"jsonrpc":"2.0","id":"r1","result":%b}'
GOOD: dict[str, tuple[Any, Any]] = {
    "a value": (reply(result={"a": [1, "x"]}), GivenDone(result=Raw(b'{"a":[1,"x"]}'))),
    "a string": (reply(result="x"), GivenDone(result=Raw(b'"x"'))),
    "false": (reply(result=False), GivenDone(result=Raw(b"false"))),
    "and a null error, as version 1 has it": (reply(result=1, error=None), GivenDone(result=Raw(b"1"))),
    "null": (reply(result=None), GivenDone()),
    "numbers and their digits": (NESTED % b"[1.50,1e3,%d]" % 2**70, GivenDone(result=Raw(b"[1.50,1e3,%d]" % 2**70))),
    "the deepest": (
        NESTED % (b"[" * DEEPEST + b"]" * DEEPEST),
        GivenDone(result=Raw(b"[" * DEEPEST + b"]" * DEEPEST)),
    ),
    "a name in escapes": (b'{"id":"r1","res\\u0075lt":7}', GivenDone(result=Raw(b"7"))),
    "a name twice": (b'{"id":"r1","result":1,"result":2}', GivenDone(result=Raw(b"2"))),
    "no version": ({"id": "r1", "result": 1}, GivenDone(result=Raw(b"1"))),
    "members that nobody knows": (reply(result=1, more=[1]), GivenDone(result=Raw(b"1"))),
    "an error": (reply(error={"code": -1, "message": "it broke"}), ErrorChunk(message="it broke")),
    "an error by its message alone": (
        reply(error={"message": ""}),
        ErrorChunk(message=_NO_WORDS),
    ),
    "an error with a code that is none": (
        reply(error={"code": "x", "message": "m", "data": [1]}),
        ErrorChunk(message="m"),
    ),
}
BAD: dict[str, tuple[Any, str]] = {
    "both": (reply(result=1, error={"code": 1, "message": "m"}), "both result and error"),
    "neither": (reply(), "neither result nor error"),
    "null as the error, and no result": (reply(error=None), "neither result nor error"),
    "text as the error": (reply(error="it broke"), "no object with a string `message`"),
    "an error without a message": (reply(error={"code": 1}), "no object with a string `message`"),
    "a message that is no string": (reply(error={"code": 1, "message": 1}), "no object with a string `message`"),
    "too deep": (NESTED % (b"[" * 49 + b"]" * 49), "nest deeper than 48 (value_nesting)"),
}


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(("message", "last"), [pytest.param(*case, id=name) for name, case in GOOD.items()])
def test_a_reply_goes_to_the_request_with_its_id_by_its_own_bytes(
    host: Host, message: Any, last: Any, batch: bool
) -> None:
    feed, other = host.asked(), host.asked("r2")
    text = message if isinstance(message, bytes) else encode(message)
    before = host.counters.requests
    assert host.says(b"[%b]" % text if batch else text) == []
    assert (feed.said, feed.ends) == ([last], ["gone"])
    assert (other.said, other.ends) == ([], [])
    assert (host.counters.stray_replies, host.counters.requests) == (0, before)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(("message", "words"), [pytest.param(*case, id=name) for name, case in BAD.items()])
def test_a_reply_that_is_none_fails_the_call_in_words_that_say_why(
    host: Host, message: Any, words: str, batch: bool
) -> None:
    feed = host.asked()
    text = message if isinstance(message, bytes) else encode(message)
    assert host.says(b"[%b]" % text if batch else text) == []
    (failed,) = feed.said
    assert isinstance(failed, ErrorChunk)
    assert words in failed.message
    assert (feed.ends, host.counters.stray_replies, host.counters.errors) == (["gone"], 0, 0)


def test_replies_may_stand_in_a_batch_with_requests(host: Host) -> None:
    feeds = [host.asked(f"r{number}") for number in range(3)]
    batch = [reply("r2", result=2), {"jsonrpc": "2.0", "id": 7, "method": "sum", "params": [1, 2]}, reply("r0")]
    assert host.says(batch) == [[{"jsonrpc": "2.0", "id": 7, "result": 3}]]
    assert [feed.ends for feed in feeds] == [["gone"], [], ["gone"]]


@pytest.mark.parametrize("id_", [1, None, True, 1.5, ["r1"], {"r1": 1}, "r2", "R1", "x" * 10_000])
def test_a_reply_with_any_other_id_is_a_stray_and_the_request_waits_on(host: Host, id_: Any) -> None:
    feed = host.asked()
    assert host.says(reply(id_, result=1)) == []
    assert host.says([reply(id_, error={"code": 1, "message": "m"}), reply(id_, result=None)]) == []
    assert (feed.said, host.counters.stray_replies) == ([], 3)
    assert host.says(reply(result=1)) == []
    assert feed.ends == ["gone"]


def test_a_second_reply_is_a_stray(host: Host) -> None:
    feed = host.asked()
    assert host.says([reply(result=1), reply(result=2)]) == []
    assert (feed.said, host.counters.stray_replies) == ([GivenDone(result=Raw(b"1"))], 1)


def test_what_is_neither_a_reply_of_ours_nor_a_request_is_refused_as_ever(host: Host) -> None:
    feed = host.asked()
    ((answer),) = host.says(reply("r2"))
    assert (answer["id"], answer["error"]["code"]) == ("r2", -32600)
    (answer,) = host.says({"jsonrpc": "2.0", "id": "r1", "method": 1, "result": 1})
    assert (answer["id"], answer["error"]["code"]) == ("r1", -32600), "what has a method is a request"
    assert feed.said == []


def test_what_is_not_json_answers_nothing(host: Host) -> None:
    feed = host.asked()
    (answer,) = host.says(b'{"jsonrpc":"2.0","id":"r1","result":1e999}')
    assert (answer["id"], answer["error"]["code"]) == (None, -32700)
    assert (feed.said, feed.ends) == ([], [])


def test_a_defect_in_what_takes_a_reply_is_counted_and_costs_nobody_else_anything(host: Host) -> None:
    class Broken(Feed):
        def gone(self) -> None:
            raise RuntimeError("a defect")

    feed = Broken()
    host.rig.session.host_tools().start(call("broken"), feed)
    other = host.asked()
    assert host.says([reply("broken", result=1), reply(result=1)]) == []
    assert host.counters.internal_errors == 1
    assert other.ends == ["gone"]


def test_a_session_that_becomes_somebody_else_hosts_nothing_any_more(host: Host) -> None:
    host.hosts("echo")
    feed = host.asked()
    sent(host.rig.outbox)
    host.rig.session.authenticate(Principal("agent", "a"))
    why = "this connection acts as agent:a now"
    assert (feed.said, feed.ends) == ([why], ["survives"])
    (told,) = sent(host.rig.outbox)
    assert (told["method"], told["params"]["reason"]) == ("tools.cancel", why)
    assert not host.finds("echo")
    assert host.says(reply(result=1)) == []
    assert host.counters.stray_replies == 1
    host.hosts("other")
    again = host.asked("r2")
    host.rig.session.authenticate(Principal("agent", "a"))
    assert host.says(reply("r2", result=1)) == []
    assert (again.ends, host.finds("other")) == (["gone"], True), "who stays the same hosts on"
    assert host.rig.session.principal != CLIENT


def test_when_a_session_closes_its_tools_go_and_its_calls_fail_at_once(host: Host) -> None:
    host.hosts("echo")
    feed = host.asked()
    host.rig.session.close()
    assert not host.finds("echo")
    assert (feed.said, feed.ends) == (["the host's connection ended"], ["survives"])


def test_requests_of_the_daemon_and_their_answers_count_among_no_requests_of_the_peer(host: Host) -> None:
    feeds = [host.asked(f"r{number}") for number in range(200)]
    assert (host.rig.session.in_flight, host.rig.session.waiting) == (0, 0)
    for number in range(200):
        assert host.says(reply(f"r{number}", result=number)) == []
    assert {len(feed.ends) for feed in feeds} == {1}
