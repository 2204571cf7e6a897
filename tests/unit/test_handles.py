"""The table of a handle's states, and its buffer: every pair of state and input, and the bounds of seed 000."""

import json
from itertools import product
from typing import Any

import pytest

from carserver.config import Settings
from carserver.core.handles import HEARD, Handle, Input, State
from carserver.core.principals import CLIENT
from carserver.protocol.errors import RpcError
from carserver.protocol.tools import ToolStatus

NOT_OVER = {State.RUNNING}


def handle(**settings: Any) -> Handle:
    return Handle(
        "0" * 32,
        tool="grep",
        action_id="a1",
        principal=CLIENT,
        run_id=None,
        started_at_ms=1,
        settings=Settings(**settings),
    )


def polled(of: Handle, after: int | None = None, *, peek: bool = False) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(of.poll(after, peek=peek).answer)
    return answer


def text(n: int) -> bytes:
    return b'{"kind":"text","text":"%d"}' % n


def texts(answer: dict[str, Any]) -> list[int]:
    return [int(chunk["text"]) for chunk in answer["chunks"]]


# What follows each state, spelled out once more and by hand: a row of the table that moves must be moved here, too.
EXPECTED = {
    State.RUNNING: {
        Input.PIECE: State.RUNNING,
        Input.DONE: State.SUCCEEDED,
        Input.LARGE: State.STORING,
        Input.ERROR: State.FAILED,
        Input.CANCEL: State.CANCELLED,
    },
    State.STORING: {Input.CANCEL: State.CANCELLED, Input.STORED: State.SUCCEEDED, Input.UNSTORED: State.FAILED},
    State.SUCCEEDED: {},
    State.FAILED: {},
    State.CANCELLED: {},
}


@pytest.mark.parametrize(("state", "happened"), list(product(State, Input)), ids=lambda value: value.name)
def test_what_follows_each_state_and_input(state: State, happened: Input) -> None:
    of = handle()
    of.state = state
    assert of.hears(happened) is EXPECTED[state].get(happened)


def test_a_handle_that_is_over_hears_nothing_of_its_host() -> None:
    of_the_host = {Input.PIECE, Input.DONE, Input.LARGE, Input.ERROR}
    for state in State:
        heard = {happened for happened in of_the_host if (state, happened) in HEARD}
        assert heard == (set() if state.over else of_the_host)


def test_only_a_last_status_ends_a_handle_and_every_state_leads_to_one() -> None:
    assert {state for state in State if state.status is not ToolStatus.RUNNING} == {
        state for state in State if not any(before is state for before, _ in HEARD)
    }
    reached = {State.RUNNING}
    while more := {after for (before, _), after in HEARD.items() if before in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_chunks_come_in_order_and_a_poll_takes_them() -> None:
    of = handle()
    for n in (1, 2):
        of.push(text(n))
    assert polled(of) == {
        "handle": "0" * 32,
        "tool": "grep",
        "action_id": "a1",
        "status": "running",
        "chunks": [{"kind": "text", "text": "1"}, {"kind": "text", "text": "2"}],
    }
    assert polled(of)["chunks"] == []


def test_the_first_poll_that_sees_the_end_is_followed_by_one_more() -> None:
    of = handle()
    of.push(text(1))
    assert not of.poll(None).last  # it runs
    of.state = State.SUCCEEDED
    of.result = b'{"exit":0}'
    of.push(b'{"kind":"done","result":{"exit":0}}')
    first, second = of.poll(None), of.poll(None)
    assert not first.last
    assert second.last
    assert json.loads(first.answer)["chunks"] == [{"kind": "done", "result": {"exit": 0}}]
    assert json.loads(second.answer)["chunks"] == []
    assert json.loads(second.answer)["result"] == {"exit": 0}


def test_beyond_the_number_of_chunks_the_oldest_go_and_the_next_poll_says_how_many() -> None:
    of = handle()
    dropped = sum(of.push(text(n)) for n in range(1_024 + 7))
    assert dropped == 7
    answer = polled(of)
    assert answer["dropped_chunks"] == 7
    assert texts(answer) == list(range(7, 1_024 + 7))
    assert "dropped_chunks" not in polled(of)


def test_beyond_the_bytes_the_oldest_go_too_but_never_the_newest() -> None:
    of = handle(handle_bytes=100)
    of.push(b'{"kind":"text","text":"%b"}' % (b"x" * 500))
    assert len(polled(of, 0)["chunks"]) == 1
    of.push(text(1))
    answer = polled(of, 0)
    assert texts(answer) == [1]
    assert answer["dropped_chunks"] == 1
    assert answer["first_sequence"] == 1


def test_with_after_nothing_is_taken_but_what_comes_before() -> None:
    of = handle()
    for n in range(5):
        of.push(text(n))
    for _ in range(3):
        answer = polled(of, 2)
        assert (texts(answer), answer["first_sequence"]) == ([2, 3, 4], 2)
    assert (texts(polled(of, 0)), polled(of, 0)["first_sequence"]) == ([2, 3, 4], 2)  # those before are freed
    assert (texts(polled(of, 5)), polled(of, 5)["first_sequence"]) == ([], 5)


def test_with_after_a_finished_handle_is_not_consumed() -> None:
    of = handle()
    of.state = State.FAILED
    of.error = "exit code 3"
    of.push(b'{"kind":"error","message":"exit code 3"}')
    for _ in range(5):
        assert not of.poll(0).last
        assert polled(of, 0)["error"] == "exit code 3"


def test_with_after_the_number_of_dropped_chunks_is_told_once() -> None:
    of = handle(handle_chunks=2)
    for n in range(5):
        of.push(text(n))
    answer = polled(of, 0)
    assert (answer["dropped_chunks"], answer["first_sequence"], texts(answer)) == (3, 3, [3, 4])
    assert "dropped_chunks" not in polled(of, 3)


def test_an_after_beyond_the_next_chunk_is_refused_by_name() -> None:
    of = handle()
    of.push(text(0))
    of.check(1)
    of.check(None)
    with pytest.raises(RpcError, match=r"after: the next chunk is 1, there is nothing from 2 on"):
        of.check(2)


def test_a_look_leaves_everything_as_it_was() -> None:
    of = handle(handle_chunks=2)
    for n in range(3):
        of.push(text(n))
    of.state = State.SUCCEEDED
    for after, seen, dropped in ((None, [1, 2], 1), (0, [1, 2], 1), (2, [2], 0), (3, [], 0)):
        answer = polled(of, after, peek=True)
        assert (texts(answer), answer.get("dropped_chunks", 0)) == (seen, dropped)
        assert answer["first_sequence"] == (after or 1)
    assert polled(of)["dropped_chunks"] == 1
    assert not of.poll(None, peek=True).last


@pytest.mark.parametrize(
    ("after", "pushed", "state", "news"),
    [
        (None, 0, State.RUNNING, False),
        (None, 1, State.RUNNING, True),
        (0, 0, State.RUNNING, False),
        (0, 1, State.RUNNING, True),
        (1, 1, State.RUNNING, False),
        (1, 2, State.RUNNING, True),
        (1, 1, State.STORING, False),
        (1, 1, State.CANCELLED, True),
        (None, 0, State.FAILED, True),
    ],
)
def test_what_is_news_to_a_poll_that_waits(after: int | None, pushed: int, state: State, news: bool) -> None:
    of = handle()
    for n in range(pushed):
        of.push(text(n))
    of.state = state
    assert of.has_news(after) is news
