"""Proposals: what is read, what `$<id>.output` stands for, how an answer is made to fit; and waits for storage."""

import itertools
import json
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carserver.config import Settings
from carserver.core.interpolation import REFERENCES, filled, filled_size, references
from carserver.core.outputstore import OutputStore
from carserver.core.principals import CLIENT
from carserver.core.proposalanswer import Ending, Output, encoded
from carserver.core.proposals import RETRIES, Action, plan
from carserver.protocol.errors import RpcError, unavailable
from carserver.protocol.proposals import ActionStatus, Cost, FailureBehavior
from carserver.protocol.tools import ResultRef
from tests.unit.proposing import action, proposal

SETTINGS = Settings()
COST = Cost(tool_calls=0, actions_executed=0, actions_rejected=0, actions_skipped=0, total_duration_ms=0, retries=0)


def planned(*actions: dict[str, Any], **members: Any) -> Any:
    numbers = itertools.count()
    return plan(proposal([*actions], **members), SETTINGS, lambda: f"{next(numbers):012x}{'f' * 20}")


def test_what_an_action_does_not_say_is_as_the_documents_of_the_client_have_it() -> None:
    (one,) = planned({"type": "tool_call", "tool": "grep"}).actions
    assert one == Action("000000000000", "grep", b"{}", (), None, RETRIES, FailureBehavior.ABORT, False)
    names = ("id", "parameters", "timeout_ms", "max_retries", "failure_behavior", "invocation_mode", "dependencies")
    nulls = dict.fromkeys(names)
    assert planned({"type": "tool_call", "tool": "grep", "idempotent": True, **nulls}).actions == [one]
    assert planned().id == "000000000000"
    assert planned(id="p").id == "p"


def test_a_dependency_that_is_named_twice_counts_once_and_what_comes_before_is_transitive() -> None:
    of = planned(action("c", dependencies=["b", "b"]), action("a"), action("b", dependencies=["a"]))
    assert [one.dependencies for one in of.actions] == [(2,), (), (1,)]
    assert of.before == [0b110, 0, 0b010]


@pytest.mark.parametrize("ids", [["a", "b"], [f"a{number}" for number in range(20)]])
def test_a_circle_is_shown_but_not_all_of_a_long_one(ids: list[str]) -> None:
    circle = [action(id_, dependencies=[after]) for id_, after in zip(ids, [*ids[1:], ids[0]], strict=True)]
    with pytest.raises(RpcError) as caught:
        planned(action("x", dependencies=["a" if "a" in ids else "a0"]), *circle)
    shown = " → ".join([*ids[:8], *(["… (20 in all)"] if len(ids) > 8 else []), ids[0]])
    assert caught.value.message.endswith(f"they go in a circle: {shown}")
    assert caught.value.data["path"] == "proposal.actions[1].dependencies"


@pytest.mark.parametrize("id_", ["", "a\nb", "x" * 257])
def test_an_id_is_a_name(id_: str) -> None:
    with pytest.raises(RpcError, match=r"^proposal\.actions\[0\]\.id: "):
        planned(action(id_))


# References.

PLACES = {"a": 0, 'b"\\é': 1}
OUTPUTS = {0: b"[1e400]", 1: b'"two"'}


@pytest.mark.parametrize(
    ("raw", "made"),
    [
        (b'{"x":"$a.output"}', b'{"x":[1e400]}'),
        (b'{"x" : [ "$a.output" ,"$a.output"]}', b'{"x" : [ [1e400] ,[1e400]]}'),
        (b'{"x":"\\u0024a\\u002eoutput"}', b'{"x":[1e400]}'),
        (b'{"x":"$b\\"\\\\\\u00e9.output"}', b'{"x":"two"}'),
        (b'{"$a.output":1,"x":{"$a.output" :2}}', None),
        (b'{"x":"$a.output ","y":" $a.output","z":"$a.outputs","n":1.10}', None),
        (b'{"x":"$c.output","y":"\\"$a.output\\"","z":"$.output","s":"$"}', None),
    ],
)
def test_a_string_that_is_exactly_a_reference_is_replaced_and_nothing_else(raw: bytes, made: bytes | None) -> None:
    found = references(raw, PLACES)
    assert filled(raw, found, OUTPUTS, SETTINGS) == (raw if made is None else made)


looks = st.sampled_from(['"', "\\", "$", "a", ".output", "$a.output", "é", " :", "\n", "x"])
texts = st.lists(looks, max_size=6).map("".join)
parameters = st.recursive(
    texts | st.integers(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)


@given(value=parameters, ascii_=st.booleans(), indent=st.sampled_from([None, 1]))
def test_whatever_stands_around_them_references_are_the_strings_that_are_such(
    value: Any, ascii_: bool, indent: int | None
) -> None:
    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: replaced(inner) for name, inner in part.items()}
        if isinstance(part, list):
            return [replaced(inner) for inner in part]
        return [1] if part == "$a.output" else part

    raw = json.dumps({"x": value}, ensure_ascii=ascii_, indent=indent).encode()
    for given_ in (raw, raw.replace(b"$", b"\\u0024"), raw.replace(b".output", b"\\u002eoutput")):
        made = filled(given_, references(given_, {"a": 0}), {0: b"[1]"}, SETTINGS)
        assert json.loads(made) == {"x": replaced(value)}


def test_only_so_many_strings_may_look_like_references() -> None:
    raw = json.dumps(["$c.output", *["$"] * 20_000, *["$a.output"] * (REFERENCES - 1)]).encode()
    assert len(references(raw, PLACES)) == REFERENCES - 1
    with pytest.raises(RpcError, match="10001 is more than references allows"):
        references(b'["$a.output","$a.output",%b' % raw[1:], PLACES)
    assert references(raw + raw, {}) == [], "where nothing comes before there is none"


def test_parameters_do_not_grow_beyond_what_a_message_may_be() -> None:
    raw = b'["$a.output","$a.output"]'
    found = references(raw, PLACES)
    assert filled_size(raw, found, {0: 48}, Settings(message_bytes=99)) == 99
    with pytest.raises(RpcError, match="101 is more than message_bytes allows"):
        filled_size(raw, found, {0: 49}, Settings(message_bytes=99))
    assert filled(raw, found, {0: b"[]"}, Settings(brackets=3)) == b"[[],[]]"
    with pytest.raises(RpcError, match="3 is more than brackets allows"):
        filled(raw, found, {0: b"[]"}, Settings(brackets=2))


# The answer.


class Outputs:
    """What is used of `OutputStore`."""

    def __init__(self, error: RpcError | None = None) -> None:
        self.error = error
        self.kept: list[str] = []

    async def get(self, id_: str, principal: Any) -> Any:
        assert self.error is not None
        raise self.error

    async def keep_result(self, owner: Any, handle: str, tool: str, value: Any, run_id: str | None) -> Any:
        self.kept.append(handle)
        return SimpleNamespace(record=SimpleNamespace(id=f"out-{len(self.kept)}"))


def succeeded(name: str, result: bytes | None = None, reference: ResultRef | None = None) -> Ending:
    output = Output(name, "tool", CLIENT, None, result, reference, detached=False)
    return Ending(name, ActionStatus.SUCCEEDED, output, None, 0, 0)


async def answered(outputs: Outputs, settings: Settings, *endings: Ending) -> list[dict[str, Any]]:
    answer = await encoded("p", endings, COST, cast("OutputStore", outputs), settings)
    assert len(answer) <= settings.frame_bytes - 512, "with its envelope it fits"
    results: list[dict[str, Any]] = orjson.loads(answer)["results"]
    return results


async def test_an_output_that_cannot_be_read_now_stays_a_reference() -> None:
    reference = ResultRef(id="out-1", size=100_000, preview="x")
    results = await answered(Outputs(unavailable("storage is slow")), SETTINGS, succeeded("a", reference=reference))
    assert results[0]["output"] == {"result_ref": {"id": "out-1", "size": 100_000, "preview": "x"}}


async def test_only_so_many_outputs_become_records_as_have_to() -> None:
    outputs = Outputs()
    sizes = [3_000, 9_000, 1_000, 8_000]
    endings = [succeeded(f"h{size}", result=json.dumps("x" * (size - 2)).encode()) for size in sizes]
    results = await answered(outputs, Settings(frame_bytes=8_000), *endings)
    assert outputs.kept == ["h9000", "h8000"]
    assert [type(result["output"]) for result in results] == [str, dict, str, dict]


async def test_error_messages_that_have_no_room_are_told_by_size_the_largest_first() -> None:
    endings = [Ending(f"a{size}", ActionStatus.SKIPPED, None, "é" * size, 0, 0) for size in (400, 3_000, 2_000, 500)]
    results = await answered(Outputs(), Settings(frame_bytes=8_000), *endings)
    told = "an error message of 6002 bytes, for which the answer has no room (frame_bytes)"
    assert results[1]["error"] == told
    assert results[2]["error"].startswith("an error message of 4002 bytes")
    assert [results[place]["error"] for place in (0, 3)] == ["é" * 400, "é" * 500]
