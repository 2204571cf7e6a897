"""JSON-RPC 2.0 exactly, by tests/data/jsonrpc-2.0-cases.json, in process and over the socket."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon, running
from tests.methods_for_tests import DEFECT
from tests.peer import Peer, peer
from tests.rig import rigged

MODULE = "tests.methods_for_tests"
CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "data/jsonrpc-2.0-cases.json").read_text())[
    "cases"
]


def named(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in cases]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("cases") / "state", "--methods", MODULE) as daemon:
        yield daemon


def check(case: dict[str, Any], answer: Any) -> None:
    """The answer is the expected one; what an error has beside its code is looked at elsewhere."""
    if "expect_any_order" in case:
        assert isinstance(answer, list)
        expected, got = (sorted(list_, key=by_id) for list_ in (case["expect_any_order"], map(bare, answer)))
        assert got == expected
    elif isinstance(answer, list):
        assert [bare(reply) for reply in answer] == case["expect"]
    else:
        assert bare(answer) == case["expect"]


def by_id(reply: dict[str, Any]) -> str:
    return json.dumps(reply["id"])


def bare(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply whose error is its code alone, in which 1 is not true and 7 is not "7"."""
    assert type(reply.get("id")) in (str, int, type(None))
    if "error" not in reply:
        return reply
    assert set(reply["error"]) == {"code", "message", "data"}
    return {**reply, "error": {"code": reply["error"]["code"]}}


@pytest.mark.parametrize("case", named(CASES))
def test_the_dispatcher_answers_as_the_standard_says(case: dict[str, Any], tmp_path: Path) -> None:
    with rigged(tmp_path) as (rig, runner):
        frames = runner.run(rig.receive(case["send"].encode()))
        assert rig.connection.ended is None
        assert rig.session.in_flight == 0
    if case.get("expect", "something") is None:
        assert frames == []
    else:
        (frame,) = frames
        check(case, json.loads(frame))


@pytest.mark.parametrize("case", named(CASES))
async def test_the_daemon_answers_as_the_standard_says_and_the_connection_lives_on(
    case: dict[str, Any], served: Daemon
) -> None:
    async with peer(served) as client:
        if case.get("expect", "something") is None:
            await client.socket.send(case["send"])
        else:
            check(case, await client.raw(case["send"]))
        assert await client.call("sum", [1, 2]) == 3
        assert client.pushed.empty()


async def test_a_defect_is_answered_with_its_incident_and_nothing_of_the_exception(served: Daemon) -> None:
    async with peer(served) as client:
        for method in ("test.defect", "test.late_defect"):
            error = await refusal(client, method)
            assert (error["code"], error["data"]["type"]) == (-32603, "internal_error")
            assert DEFECT not in json.dumps(error)
            assert error["data"]["incident"] in served.log
        assert DEFECT in served.log
        assert await client.call("sum", [1]) == 1
    served.expects_defects = True


async def test_an_error_that_a_method_does_not_declare_is_answered_and_counted_as_a_defect(served: Daemon) -> None:
    before = served.metrics()["undeclared_errors"]
    async with peer(served) as client:
        assert (await refusal(client, "test.undeclared"))["data"]["type"] == "conflict"
    assert served.metrics()["undeclared_errors"] == before + 1
    served.expects_defects = True


async def test_requests_start_in_their_order_and_are_answered_as_they_finish(served: Daemon) -> None:
    async with peer(served) as client:
        waiting = client.start("test.hold", {"name": "order"})
        batch: list[dict[str, Any]] = [{"method": "test.hold", "params": ["order"]}, {"method": "sum", "params": [4]}]
        await client.socket.send(
            json.dumps([{"jsonrpc": "2.0", "id": f"b{n}", **call} for n, call in enumerate(batch)])
        )
        assert await client.call("sum", [1, 2]) == 3
        assert client.pushed.empty()  # a batch is answered as a whole, so it waits
        assert not waiting.done()
        assert await client.call("test.release", ["order"]) is None
        assert await waiting == "order"
        replies = json.loads(await client.next_frame())
        assert {reply["id"]: reply["result"] for reply in replies} == {"b0": "order", "b1": 4}


async def refusal(client: Peer, method: str, params: Any = None) -> dict[str, Any]:
    answer = await client.request({"method": method, **({} if params is None else {"params": params})})
    error: dict[str, Any] = answer["error"]
    return error


def test_a_subscription_whose_reply_is_refused_for_its_size_is_none(tmp_path: Path) -> None:
    with rigged(tmp_path, frame_bytes=4_096) as (rig, runner):
        (created,) = runner.run(rig.receive(request("runs.create", {"prompt": "p" * 2_500})))
        run_id = json.loads(created)["result"]["id"]
        subscribe = request("runs.trace.subscribe", {"run_id": run_id})
        (batch,) = runner.run(rig.receive(b"[%b,%b]" % (subscribe, subscribe)))
        kinds = ["result" if "result" in reply else reply["error"]["data"]["limit"] for reply in json.loads(batch)]
        assert kinds == ["result", "frame_bytes"]
        assert (rig.daemon.runs.hub.subscriptions, rig.session.subscriptions) == (0, {}), (
            "the second replaced the first"
        )
        (alone,) = runner.run(rig.receive(subscribe))
        assert "result" in json.loads(alone)
        assert rig.daemon.runs.hub.subscriptions == 1


def request(method: str, params: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
