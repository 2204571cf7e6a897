"""Turns of the CAR dialect before they are stored: what fits stays as it is, what does not is cut and marked."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from carserver.config import Settings
from carserver.core import turns as turns_module
from carserver.core.runs import MODEL_TURN, TURN
from carserver.core.turns import CUT, Turn, take_in_turn
from carserver.protocol.errors import ErrorKind, RpcError

SETTINGS = Settings(recorded_string_bytes=64, recorded_turn_bytes=1024)
JOINED = turns_module._joined
MARK = "…[truncated: turn exceeded 1 KiB]"
NOT_RUN = {"verifier_verdict": Raw(b'"not_run"')}
OURS = ("type", "record", "index", "recorded_at")

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=100),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=40,
)
members = st.sampled_from(["prompt", "tool", "parameters", "output", "cli_outcome", "policy_rejected", "more", *OURS])
turns = st.dictionaries(members, values, max_size=8)


def taken_in(turn: Any, kind: int = TURN, settings: Settings = SETTINGS) -> Turn | None:
    """A turn as it is taken in."""
    return take_in_turn(Raw(json.dumps(turn).encode()), kind, NOT_RUN, settings, "turns[0]")


def taken(turn: Any, kind: int = TURN, settings: Settings = SETTINGS) -> dict[str, Any] | None:
    """The event of a turn whose sequence is 7."""
    found = taken_in(turn, kind, settings)
    if found is None:
        return None
    event: dict[str, Any] = json.loads(found.event(7).raw)
    return event


def strings(value: Any) -> Iterator[str]:
    """Every string in a value, but for names of members."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)


def test_a_turn_that_fits_is_kept_as_it_is_with_its_type_and_its_sequence() -> None:
    given_ = {"prompt": "p", "parameters": {"a": [1.5, None]}, "output": {"k": 1}, "of its own": True}
    assert taken(given_) == {"type": "turn", "index": 7, **given_, "verifier_verdict": "not_run"}
    assert taken({}, MODEL_TURN) == {"type": "model_turn", "index": 7, "verifier_verdict": "not_run"}


@pytest.mark.parametrize("more", [b"", b",0" * SETTINGS.recorded_string_bytes])
def test_numbers_keep_their_own_digits_where_no_string_is_cut_beside_them(more: bytes) -> None:
    found = take_in_turn(Raw(b'{"output": [1.50, 12345678901234567890, 1e5%b]}' % more), TURN, {}, SETTINGS, "")
    assert found is not None
    assert found.event(0).raw == b'{"type":"turn","index":0,"output":[1.50,12345678901234567890,1e5%b]}' % more


def test_what_the_daemon_says_of_a_turn_is_not_taken_from_it() -> None:
    assert taken({"type": "error", "record": "ended", "index": 99, "recorded_at": "never", "message": "m"}) == {
        "type": "turn",
        "index": 7,
        "message": "m",
        "verifier_verdict": "not_run",
    }


def test_a_verdict_that_was_given_stays() -> None:
    event = taken({"verifier_verdict": "passed"})
    assert event is not None
    assert event["verifier_verdict"] == "passed"


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_a_long_string_is_cut_at_a_character_and_says_so_wherever_it_stands(character: str) -> None:
    settings = Settings(recorded_string_bytes=64, recorded_turn_bytes=100_000)
    fits = character * (64 // len(character.encode()))
    event = taken({"output": {"deep": [fits + character, fits]}, "prompt": fits + character}, settings=settings)
    assert event is not None
    assert event["output"] == {"deep": [fits + CUT, fits]}
    assert event["prompt"] == fits + CUT


def test_in_a_turn_that_is_too_large_the_largest_members_make_room() -> None:
    event = taken({"output": list(range(300)), "parameters": list(range(200)), "prompt": "short", "tool": "t"})
    assert event is not None
    assert event["output"] == MARK
    assert event["parameters"] == list(range(200))  # there is room for it then
    assert (event["prompt"], event["tool"]) == ("short", "t")


def test_a_turn_of_many_members_is_put_together_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []

    def counted(members: dict[str, Raw]) -> bytes:
        joined.append(len(members))
        return JOINED(members)

    monkeypatch.setattr(turns_module, "_joined", counted)
    assert taken({f"{place}": "x" * 60 for place in range(100)}) is None
    assert taken({"long": "x" * 2_000, **{f"{place}": [0] * 40 for place in range(12)}}) is not None
    assert len(joined) <= 4


def test_a_member_of_more_values_than_could_fit_becomes_a_mark_and_the_others_stay() -> None:
    manies: list[Any] = [[0] * 1_000, {f"{place}": 0 for place in range(1_000)}, [[[], {}] * 30] * 30]
    for many in manies:
        event = taken({"output": many, "prompt": "p"})
        assert event is not None
        assert (event["output"], event["prompt"]) == (MARK, "p")


def test_a_turn_of_more_members_than_could_fit_is_not_looked_into() -> None:
    assert taken({f"{place}": 0 for place in range(1024 // 5 + 1)}) is None


def test_a_turn_of_nothing_but_small_members_may_be_too_large_for_any_mark() -> None:
    assert taken({f"m{number}": 0 for number in range(200)}) is None


@given(turns)
def test_any_turn_comes_out_within_the_limits_and_whole_where_it_was_within_them(turn: dict[str, Any]) -> None:
    found = taken_in(turn)
    assert found is not None  # so few members always fit
    assert len(found.members) <= 1024
    event = json.loads(found.event(7).raw)
    assert (event.pop("type"), event.pop("index")) == ("turn", 7)
    said = {name: value for name, value in turn.items() if name not in OURS}
    assert event.keys() - {"verifier_verdict"} == said.keys() - {"verifier_verdict"}
    assert all(len(text.encode()) <= 64 + len(CUT.encode()) for text in strings(event))
    small = len(json.dumps(said).encode()) < 64
    if small:
        assert event == {**said, "verifier_verdict": "not_run"}


@pytest.mark.parametrize("turn", [[], "turn", 1, None])
def test_a_turn_that_is_no_object_is_refused_with_its_place(turn: Any) -> None:
    with pytest.raises(RpcError) as refused:
        taken(turn)
    assert refused.value.kind is ErrorKind.INVALID_PARAMS
    assert refused.value.data["path"] == "turns[0]"


def test_a_turn_that_nests_too_deep_is_refused() -> None:
    deep: Any = "x"
    for _ in range(48):
        deep = [deep]
    with pytest.raises(RpcError) as refused:
        taken({"output": deep})
    assert refused.value.data["limit"] == "value_nesting"
