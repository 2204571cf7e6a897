"""Generated params for every method of the CAR dialect, in process: each is answered once, and no answer is a defect.

They are the examples of the documents, of which parts were replaced, removed, doubled or renamed; with the handshake
and without it, as clients up to 0.20.0 come.
"""

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from carserver.config import Settings
from carserver.methods.served import METHOD_MODULES
from carserver.rpc.method import Table
from tests.property.test_hostile_messages import check_reply, containers, depth, put, values
from tests.rig import Rig, rigged

EXAMPLES = 400
NESTING = Settings().nesting
METHODS = {entry.name: entry.example for entry in Table.of(METHOD_MODULES).all().values() if entry.dialect == "car"}
BEFORE = [call for shown in METHODS.values() for call in shown.before]
SHOWN = [
    *((name, {} if shown.params is msgspec.UNSET else shown.params) for name, shown in METHODS.items()),
    ("server.handshake", {"protocol_version": 3, "required_capabilities": ["runs.cancel.v1"]}),
    ("tools.cancel", {"handle": "0" * 32}),
    ("tools.unregister", {"name": "grep"}),
]
words = st.sampled_from(
    sorted({word for _, params in SHOWN if isinstance(params, dict) for word in params} | {"type", "actions", "error"})
)
odd = st.one_of(
    values,
    st.sampled_from([-1, 0, 2**31, 2**53, 2**63, 2**64, 1e308, "", "run-1", "example", "a\nb", "\u202e", "\u0000"]),
    st.sampled_from(["x" * 257, "x" * 20_000, "é" * 140_000, ["x"] * 300, [{}] * 300, {str(n): n for n in range(300)}]),
    st.sampled_from(["$a1.output", "$.output", ["$a1.output"] * 20, {"$a1.output": "$a2.output"}, "$a1.output"]),
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, Any]:
    """A method, and params that it may not have been made for."""
    method, shown = draw(st.sampled_from(SHOWN))
    if draw(st.integers(0, 9)) == 0:
        return method, draw(st.lists(odd, max_size=4) | st.dictionaries(words, odd, max_size=4) | st.none())
    params = json.loads(json.dumps(shown))
    for _ in range(draw(st.integers(0, 3))):
        places = list(containers(params))
        if not places:
            break
        container = draw(st.sampled_from(places))
        key = draw(st.sampled_from(list(container) if isinstance(container, dict) else range(len(container))))
        change = draw(st.sampled_from(["replace", "remove", "rename", "double", "null", "nest"]))
        old = container.pop(key)
        if change == "replace":
            put(container, key, copy.deepcopy(draw(odd)))
        elif change == "rename":
            put(container, draw(words), old)
        elif change == "double":
            put(container, key, [old, copy.deepcopy(old)])
        elif change == "null":
            put(container, key, None)
        elif change == "nest":
            for _ in range(draw(st.integers(1, 56))):
                old = [old]
            put(container, key, old)
    return method, params


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Any]]:
    with rigged(tmp_path_factory.mktemp("rig"), kill_after_s=0.0, unconfirmed_s=0.0) as (made, runner):
        made.session.dialect = "car"
        for number, (method, params) in enumerate(BEFORE):
            runner.run(exchanged(made, request(number, method, params)))
        yield made, runner


def request(id_: Any, method: str, params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": params}).encode()


async def exchanged(one: Rig, message: bytes) -> list[bytes]:
    """What a message is answered, when all of it is done; the tools that are called meanwhile end well at once."""
    receive, replies = one.daemon.front.dispatcher.receive, []
    receive(one.session, message)
    while one.outbox.size or one.connection.tasks:
        while one.outbox.size:
            frame = one.outbox.take(1)
            if b'"method":"tools.execute"' in frame:
                receive(one.session, ended(frame))
            elif not frame.startswith(b'{"jsonrpc":"2.0","method"'):
                replies.append(frame)
        if one.connection.tasks:
            await asyncio.wait(one.connection.tasks, timeout=0.01)
    return replies


def ended(frame: bytes) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": json.loads(frame)["id"], "result": {"found": 3}}).encode()


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(call=calls(), dialect=st.sampled_from(["car", "car", ""]))
@example(call=("runs.start", {"intent": "i", "agent_name": "n", "idempotency_key": ""}), dialect="car")
@example(call=("host.subscribe", None), dialect="car")
def test_whatever_its_params_a_method_of_the_dialect_is_answered_once_and_by_no_defect(
    rig: tuple[Rig, Any], call: tuple[str, Any], dialect: str
) -> None:
    one, runner = rig
    one.session.dialect = dialect
    message = request("z", *call)
    frames = runner.run(exchanged(one, message))
    figures = asdict(one.daemon.counters)
    assert (figures["internal_errors"], figures["undeclared_errors"]) == (0, 0)
    assert (one.session.in_flight, one.session.waiting, one.connection.ended) == (0, 0, None)
    (frame,) = frames
    reply = json.loads(frame)
    check_reply(reply)
    assert reply["id"] == ("z" if depth(json.loads(message)) <= NESTING else None)
