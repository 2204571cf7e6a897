"""What counts as JSON, and how much of it: `protocol.codec`."""

from typing import Any, Literal

import msgspec
import pytest

from carserver.protocol import codec
from carserver.protocol.carruns import Outcome
from carserver.protocol.codec import parse, too_deep
from carserver.protocol.errors import RpcError
from carserver.protocol.proposals import SubmitProposal
from carserver.protocol.runs import ListRuns

BRACKETS = 50


def refusal(message: bytes, nesting: int = 64) -> RpcError:
    with pytest.raises(RpcError) as refused:
        parse(message, nesting, BRACKETS)
    return refused.value


def test_so_many_brackets_are_read_and_one_more_is_refused_by_name() -> None:
    assert parse(b"[" + b",".join([b"{}"] * (BRACKETS - 1)) + b"]", 64, BRACKETS) == [{}] * (BRACKETS - 1)
    error = refusal(b"[" + b",".join([b"{}"] * BRACKETS) + b"]")
    assert error.kind.type == "limit_exceeded"
    assert error.data == {"limit": "brackets", "value": BRACKETS + 1, "maximum": BRACKETS}


@pytest.mark.parametrize("text", [b"[" * 500, rb"{\"" * 500, rb"\\" + b"[" * 500, b"{" * 500 + rb"\\"])
def test_brackets_in_strings_are_no_brackets(text: bytes) -> None:
    assert len(parse(b'{"text":"' + text + b'"}', 64, BRACKETS)) == 1


@pytest.mark.parametrize("tail", [b'"' + b'\\"' * 500_000, b'"' * 500_001, b'"' + b"\\" * 1_000_001])
def test_a_string_without_end_is_looked_for_once(tail: bytes) -> None:
    # Where every quote began the search anew this would take hours, and the test's timeout ends it.
    assert refusal(b"[" * (BRACKETS + 1) + tail).kind.type in ("limit_exceeded", "parse_error")


@pytest.mark.parametrize("nesting", [1, 2, 64])
def test_brackets_nest_so_deep_and_no_deeper(nesting: int) -> None:
    right, wrong = (b"[" * depth + b"]" * depth for depth in (nesting, nesting + 1))
    assert not too_deep(right, parse(right, 1_000, 1_000), nesting)
    assert too_deep(wrong, parse(wrong, 1_000, 1_000), nesting)


@pytest.mark.parametrize(
    ("type_", "value", "words"),
    [
        (ListRuns, {"status": "dead"}, "status: invalid enum value 'dead'; one of: created, planning, executing,"),
        (SubmitProposal, {"proposal": {"actions": [{"type": "tool_cal"}]}}, "actions[0].type: invalid enum value"),
        (SubmitProposal, {"proposal": {"actions": [{"type": "x"}]}}, "; one of: tool_call, state_write, "),
        (Outcome, {"status": "great"}, "status: invalid enum value 'great'; one of: success, partial_success, done,"),
        (list[Literal["a", "b"]], ["c"], "[0]: invalid enum value 'c'; one of: a, b"),
    ],
)
def test_a_value_that_is_none_of_a_few_is_refused_with_those(type_: Any, value: Any, words: str) -> None:
    with pytest.raises(RpcError) as refused:
        codec.convert(value, type_)
    assert words in refused.value.message
    with pytest.raises(RpcError) as refused:
        codec.decode(msgspec.json.Decoder(type_), msgspec.json.encode(value))
    assert words in refused.value.message
