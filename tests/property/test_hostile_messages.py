"""Generated messages against the dispatcher, in process: it never raises, and answers in JSON-RPC as often as due.

What is JSON, and what has to be answered, is told by the standard library and by a model of a few lines, not by the
code under test. The frames below messages are `tests/unit/test_frames.py`'s.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from carserver.methods.runs import RUN
from carserver.protocol.errors import ErrorKind
from carserver.protocol.frames import SHORT_BYTES
from tests.rig import Rig, rigged
from tests.unit.hosted import Feed, call

ASKED = ("r0", "r1", "r2")  # requests of the daemon to this peer, open before each message
EXAMPLES = 300
ID_MAXIMUM = 2**53
TYPES = {kind.type: kind.code for kind in ErrorKind}
CREATE = {"prompt": "p", "idempotency_key": "example", "metadata": {"a": [1, 2.5]}}
EVENTS = [{"type": "agent_start", "prompt": "p"}, {"type": "x", "n": 1.50}, {"type": "error", "message": "m"}]

CALLS: list[tuple[str, Any]] = [
    ("runs.create", CREATE),
    ("runs.create", ["p", "session"]),
    ("runs.record", {"run_id": RUN, "events": EVENTS, "batch_id": "b", "at_ms": [1, 2, 3], "expected_sequence": 0}),
    ("runs.record", [RUN, [{"type": "x"}]]),
    ("runs.get", {"run_id": RUN}),
    ("runs.events", {"run_id": RUN, "after": 0, "limit": 2, "types": ["x"]}),
    ("runs.list", {"session_id": "s", "status": "created", "limit": 3, "created_after_ms": 0}),
    ("runs.list", {"page": b'{"created_at_ms":1,"no":1,"filters":{}}'.hex()}),
    ("runs.fail", {"run_id": RUN, "error": "e"}),
    ("runs.cancel", {"run_id": RUN, "reason": "r"}),
    ("runs.resume", {"run_id": RUN}),
    ("runs.trace.subscribe", {"run_id": RUN, "cursor": 1, "epoch": "e"}),
    ("runs.trace.unsubscribe", {"run_id": RUN}),
    ("session.auth", {"token": "t", "agent_id": "a"}),
    ("session.auth", {"host_token": "t"}),
    ("server.ping", {}),
    ("server.status", {}),
    ("tools.chunk", {"request_id": "r0", "chunk": {"kind": "text", "text": "t"}}),
    ("tools.chunk", {"request_id": "r1", "chunk": {"kind": "done", "result": {"a": 1.50}}}),
    ("tools.chunk", ["r2", {"kind": "progress", "fraction": 0.5, "message": "m"}]),
    ("tools.chunk", {"request_id": "r9", "chunk": {"kind": "data", "data": [None]}}),
    ("subtract", [1, 2]),
    ("sum", [1, 2, 3]),
    ("get_data", []),
    ("no.such.method", {}),
]
REQUESTS = [
    {"jsonrpc": "2.0", "id": place, "method": method, "params": params} for place, (method, params) in enumerate(CALLS)
]
SEEDS: list[Any] = [
    *REQUESTS,
    {"jsonrpc": "2.0", "method": "sum", "params": [1]},
    {"jsonrpc": "2.0", "id": None, "method": "sum"},
    {"jsonrpc": "2.0", "id": "1", "result": 1},
    {"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "m"}},
    {"jsonrpc": "2.0", "id": "r0", "result": {"a": [1.50]}},
    {"jsonrpc": "2.0", "id": "r1", "error": {"code": 1, "message": "m", "data": [1]}},
    {"jsonrpc": "2.0", "id": "r2", "result": None},
]

seeds = st.one_of(st.sampled_from(SEEDS), st.lists(st.sampled_from(SEEDS), max_size=5))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
known_words = st.sampled_from(
    sorted({word for _, params in CALLS if isinstance(params, dict) for word in params} | {"id", "result", "error"})
)
tokens = st.sampled_from(
    ["[", "]", "{", "}", ",", ":", '"', "\\", r"\ud800", r"\u0000", "NaN", "1e999", "-", "0", "null", "\n", "\ufeff"]
)


@st.composite
def mutated_values(draw: st.DrawFn) -> bytes:
    """A valid message of which one part, anywhere in it, was replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(draw(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(containers(value))
        if not places:
            break
        container = draw(st.sampled_from(places))
        key = draw(st.sampled_from(list(container) if isinstance(container, dict) else range(len(container))))
        change = draw(st.sampled_from(["replace", "remove", "rename", "nest"]))
        old = container.pop(key)
        if change == "replace":
            put(container, key, draw(values))
        elif change == "rename":
            put(container, draw(known_words), old)
        elif change == "nest":
            for _ in range(draw(st.integers(1, 80))):
                old = [old]
            put(container, key, old)
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


def put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, dict):
        container[key] = value
    else:
        container.append(value)


def containers(value: Any) -> Iterator[Any]:
    """Every container that is not empty, from the outermost on."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if inside:
        yield value
        for child in inside:
            yield from containers(child)


@st.composite
def mutated_texts(draw: st.DrawFn) -> bytes:
    """The text of a valid message in which something was cut out, put in, or cut off."""
    text = json.dumps(draw(seeds))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        to = draw(st.integers(at, min(len(text), at + 20)))
        new = draw(st.one_of(st.just(""), tokens, st.text(max_size=5), st.just(text[at:to] * 2)))
        text = text[:at] + new + text[to:]
    return text.encode("utf-8", "surrogatepass")


messages = st.one_of(
    mutated_values(), mutated_texts(), values.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40)
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Any]]:
    folder = tmp_path_factory.mktemp("rig")
    with rigged(folder, wrong_token_s=1e-6, kill_after_s=86_400.0) as (made, runner):
        for request in REQUESTS[:3]:
            runner.run(made.receive(json.dumps(request).encode()))
        yield made, runner


# The model.


class NotJson(Exception):
    """What the contract answers with -32700."""


def parsed(message: bytes) -> Any:
    """RFC 8259, with the contract's narrower numbers, strings and nesting."""

    def number(text: str) -> float:
        if math.isinf(float(text)):
            raise NotJson
        return float(text) if set(text) & set(".eE") else int(text)

    def constant(text: str) -> float:
        raise NotJson

    try:
        text = message.decode()
        value = json.loads(text, parse_int=number, parse_float=number, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError):
        raise NotJson from None
    if depth(value) > 64:
        raise NotJson
    return value


def depth(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth, inside), default=0)


def due(call: Any, asked: set[str]) -> list[str]:
    """The id that a call must be answered to, as JSON; nothing where it wants no answer, or answers what was asked."""
    if not isinstance(call, dict):
        return ["null"]
    id_ = call.get("id")
    if "method" not in call:
        if type(id_) is str and id_ in asked:
            asked.discard(id_)
            return []
        if "result" in call or "error" in call:
            return []  # an answer to what was never asked
    if not (id_ is None or is_integer_id(id_) or (type(id_) is str and len(id_) <= 128)):
        return ["null"]
    right = call.get("jsonrpc") == "2.0" and type(call.get("method")) is str
    right &= "params" not in call or type(call["params"]) in (dict, list)
    return [json.dumps(id_)] if "id" in call or not right else []


def is_integer_id(id_: Any) -> bool:
    return type(id_) is int and abs(id_) <= ID_MAXIMUM


def ask(one: Rig, feeds: dict[str, Feed]) -> None:
    """What was answered is asked again."""
    hosting = one.session.host_tools()
    for id_ in ASKED:
        if not hosting.expects(id_):
            feeds[id_] = Feed()
            feeds[id_].execution = hosting.start(call(id_), feeds[id_])
    while one.outbox.size:
        one.outbox.take(1)


def check_reply(reply: Any) -> None:
    """JSON-RPC 2.0, section 5, and the contract's form of errors."""
    assert isinstance(reply, dict)
    assert reply["jsonrpc"] == "2.0"
    assert set(reply) in ({"jsonrpc", "id", "result"}, {"jsonrpc", "id", "error"})
    if "error" in reply:
        error = reply["error"]
        assert set(error) == {"code", "message", "data"}
        assert isinstance(error["message"], str)
        assert error["message"]
        assert TYPES[error["data"]["type"]] == error["code"]


def listing(page: bytes) -> bytes:
    """A `runs.list` with a page of a peer's own making."""
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "runs.list", "params": {"page": page.hex()}}).encode()


def kept(value: bytes, method: str = "runs.record") -> bytes:
    """A short request that has a value whose bytes would be kept."""
    if method == "runs.record":
        params = b'{"run_id":"%b","events":[{"type":"x","n":%b}]}' % (RUN.encode(), value)
    else:
        params = b'{"request_id":"r0","chunk":{"kind":"data","data":%b}}' % value
    message = b'{"jsonrpc":"2.0","id":1,"method":"%b","params":%b}' % (method.encode(), params)
    assert len(message) <= SHORT_BYTES
    return message


UNPROVED = [b"1e999", b"-1e400", b'"\xff"', b'"\xed\xa0\x80"', b"NaN", b"01", b"[1,]", b'"\t"', b"{'a':1}"]


@pytest.mark.parametrize("method", ["runs.record", "tools.chunk"])
@pytest.mark.parametrize("value", UNPROVED)
def test_bytes_that_are_kept_are_proved_in_a_short_message_too(rig: tuple[Rig, Any], value: bytes, method: str) -> None:
    one, runner = rig
    ask(one, {})
    (frame,) = runner.run(one.receive(kept(b"1.50", method)))
    assert "result" in json.loads(frame)
    (frame,) = runner.run(one.receive(kept(value, method)))
    reply = json.loads(frame)
    assert (reply["id"], reply["error"]["code"]) == (None, -32700)


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(message=messages)
@example(message=listing(b'{"x":' + b"[" * 100_000))
@example(message=listing(b'{"created_at_ms":1,"no":%d,"filters":{}}' % 2**70))
@example(message=listing(b'{"created_at_ms":%d,"no":1,"filters":{}}' % 2**70))
def test_whatever_comes_is_answered_in_json_rpc_as_often_as_due(rig: tuple[Rig, Any], message: bytes) -> None:
    one, runner = rig
    feeds: dict[str, Feed] = {}
    one.session.host_tools().close("a new example")
    one.session.hosting = None
    ask(one, feeds)
    frames = runner.run(one.receive(message))
    open_ = {id_ for id_ in ASKED if one.session.host_tools().expects(id_)}
    figures = asdict(one.daemon.counters)
    assert (figures["internal_errors"], figures["undeclared_errors"]) == (0, 0)
    assert (one.session.in_flight, one.session.waiting, one.connection.ended) == (0, 0, None)
    try:
        value = parsed(message)
    except NotJson:
        (frame,) = frames
        reply = json.loads(frame)
        assert (reply["id"], reply["error"]["code"]) == (None, -32700)
        assert open_ == set(ASKED)
        return
    is_batch = isinstance(value, list) and bool(value)
    waiting = set(ASKED)
    wanted = [id_ for part in value for id_ in due(part, waiting)] if is_batch else due(value, waiting)
    assert open_ == waiting
    for id_, feed in feeds.items():
        assert feed.ends == ([] if id_ in open_ else ["gone"])
        assert feed.said or id_ in open_, "who is gone has said how it ended"
    assert len(frames) == bool(wanted)
    if not frames:
        return
    answer = json.loads(frames[0])
    replies = answer if is_batch else [answer]
    for reply in replies:
        check_reply(reply)
    assert Counter(json.dumps(reply["id"]) for reply in replies) == Counter(wanted)


VARIES = re.compile(
    rb'"(now_ms|first_sequence|cursor|event_count|uptime_ms|updated_at_ms|created_at_ms|ended_at_ms|log_bytes|incident)":("[^"]*"|\d+)'
    rb'|"next_page":"[^"]*"|[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}'
    rb'|"message":"not JSON(?:[^"\\]|\\.)*"'  # it says where
)
# Not batches: the replies in them stand as they were finished, and none of them goes the short way.
short_messages = messages.filter(lambda message: len(message) <= SHORT_BYTES and not message.lstrip().startswith(b"["))


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(message=short_messages)
@example(message=b'{"jsonrpc":"2.0","id":9007199254740993,"method":"server.ping"}')
@example(message=b'{"jsonrpc":"2.0","id":1,"method":"runs.events","params":{"run_id":"%b","after":-1}}' % RUN.encode())
@example(message=b'{"jsonrpc":"2.0","id":1,"method":"server.ping","params":{"x":"\\ud800"}}')
@example(message=b'{"jsonrpc":"2.0","id":1,"method":"server.ping","params":{"x":1e999},"params":{}}')
@example(message=b'{"jsonrpc":"2.0","id":1,"method":"server.ping","p\\u0061rams":{"x":1e999},"params":{}}')
@example(message=b'{"jsonrpc":"2.0","id":1,"method":"runs.list","params":{"limit":%d}}' % (2**64 + 1))
@example(message=listing(b'{"created_at_ms":1,"no":1,"filters":{}}'))
@example(message=kept(b'{"":' * 30 + b"1" + b"}" * 30, "tools.chunk"))
@example(message=b'{"jsonrpc":"2.0","id":1,"method":"sum","params":' + b"[" * 100 + b"]" * 100 + b"}")
def test_a_short_message_is_answered_as_if_it_were_long(rig: tuple[Rig, Any], message: bytes) -> None:
    one, runner = rig
    ask(one, {})
    # First as it is, so that what it changes is changed; then twice more, with and without white space behind it.
    runner.run(one.receive(message))
    short, long = (runner.run(one.receive(message + b" " * padding)) for padding in (0, SHORT_BYTES))
    assert [VARIES.sub(b"", frame) for frame in short] == [VARIES.sub(b"", frame) for frame in long]
