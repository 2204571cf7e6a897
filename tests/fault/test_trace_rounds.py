"""A trace through cuts and kills is whole: five rounds; 50 by `scripts/trace_rounds`."""

import random

import pytest

from carserver.client import Traced
from tests.conftest import StartDaemon
from tests.fault.cutting import Frames
from tests.fault.tracing import GRACE_S, KILLS, Figures, audit, trace_round


@pytest.mark.parametrize("round_", range(5))
async def test_a_trace_through_cuts_and_kills_yields_every_event_once_in_order_and_the_end(
    start: StartDaemon, round_: int, chance: random.Random
) -> None:
    figures = Figures()
    await trace_round(start(grace_s=GRACE_S), chance, figures)
    print(figures)
    assert not figures.wrong
    assert figures.kills == KILLS
    assert sum(figures.cuts.values()) > 0  # some megabytes went through, and no connection lets through one
    assert figures.within_frames > 0


# The negative controls: what the rounds rely on finds what a wrong client would do.

WANTED = [{"type": "text_delta", "n": number} for number in range(4)]


def _traced(kind: str, cursor: int, **record: object) -> Traced:
    status = "completed" if kind == "ended" else "executing"
    record = {"record": kind, **record}
    return Traced(run_id="run", agent_id="", record=record, cursor=cursor, status="", run_status=status)


def _whole() -> list[Traced]:
    events = [_traced("event", place + 1, sequence=place, event=event) for place, event in enumerate(WANTED)]
    return [_traced("started", 0), *events, _traced("ended", len(WANTED))]


def test_the_checker_finds_nothing_in_a_trace_as_it_must_be() -> None:
    assert audit(_whole(), WANTED) == []


def test_the_checker_finds_a_hole_a_repetition_a_second_beginning_and_a_missing_end() -> None:
    whole = _whole()
    assert "3" in audit(whole[:2] + whole[3:], WANTED)[0]
    assert "5" in audit(whole[:2] + whole[1:], WANTED)[0]
    assert "'started': 2" in audit(whole[:1] + whole, WANTED)[0]
    assert "last ['event']" in audit(whole[:-1], WANTED)[0]


def test_the_checker_finds_another_order_other_content_and_another_end() -> None:
    whole = _whole()
    assert audit([whole[0], whole[2], whole[1], *whole[3:]], WANTED) == ["record 0 has sequence and cursor (1, 2)"]
    assert "another event" in audit(whole, [*WANTED[:3], {"type": "text_delta", "n": 7}])[0]
    assert audit([*whole[:-1], _traced("ended", 3)], WANTED)[-1] == "the end is at 3, completed"


def test_the_proxy_knows_where_frames_end() -> None:
    answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
    frames = [b"\x81\x02ok", b"\x81\x7e\x01\x00" + b"x" * 256, b"\x81\x7f" + (70_000).to_bytes(8) + b"y" * 70_000]
    ends = {len(answer)} | {len(answer) + sum(map(len, frames[: count + 1])) for count in range(3)}
    bytes_ = answer + b"".join(frames)
    follower = Frames()
    complete = {0}
    for place in range(len(bytes_)):
        follower.feed(bytes_[place : place + 1])
        if place >= len(answer) - 1 and not follower.within:
            complete.add(place + 1)
    assert complete == {0} | ends
    whole = Frames()
    whole.feed(bytes_)
    assert not whole.within
