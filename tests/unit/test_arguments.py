"""A tool's arguments and its schema: what fits, what is said of what does not, and that nothing takes long."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carserver.config import Settings
from carserver.core.arguments import Arguments
from carserver.protocol.errors import ErrorKind, RpcError

SETTINGS = Settings()
DRAFT = "$schema"
DRAFTS = {
    "4": "http://json-schema.org/draft-04/schema#",
    "6": "http://json-schema.org/draft-06/schema#",
    "7": "http://json-schema.org/draft-07/schema#",
    "2019-09": "https://json-schema.org/draft/2019-09/schema",
    "2020-12": "https://json-schema.org/draft/2020-12/schema",
}
TAKES_A_SECOND = 5.0  # of this thread, for what is meant to take a quarter of one; without bound: hours


def arguments(schema: Any) -> Arguments:
    return Arguments(json.dumps(schema).encode(), SETTINGS)


def of(schema: Any) -> Arguments:
    """With this schema for the member `a`."""
    return arguments({"properties": {"a": schema}})


def raw(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def refused(schema: Arguments, value: bytes) -> RpcError:
    with pytest.raises(RpcError) as caught:
        schema.check(value)
    return caught.value


# What fits.


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_what_is_passed_on_is_what_came_as_compact_json(value: dict[str, Any]) -> None:
    assert json.loads(arguments({}).check(json.dumps(value, indent=1).encode())) == value


def test_numbers_keep_their_literals() -> None:
    given = b'{"a":1.50,"b":1E3,"c":123456789012345678901234567890,"d":-0}'
    assert arguments({"type": "object"}).check(given) == given


def test_a_large_integer_is_compared_as_it_is() -> None:
    schema = of({"const": 2**64 + 1})
    assert schema.check(b'{"a":18446744073709551617}')
    assert refused(schema, b'{"a":18446744073709551616}').data == {"path": "parameters.a"}


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
def test_all_drafts_are_spoken(draft: str) -> None:
    schema = arguments({DRAFT: draft, "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert schema.check(b'{"a":1}')
    assert refused(schema, b"{}").data == {"path": "parameters.a"}


def test_a_keyword_means_what_its_draft_says() -> None:
    four = arguments({DRAFT: DRAFTS["4"], "properties": {"a": {"minimum": 3, "exclusiveMinimum": True}}})
    assert refused(four, b'{"a":3}').message == "parameters.a: more than 3 is wanted"
    seven = arguments({DRAFT: DRAFTS["7"], "properties": {"a": {"items": [{"type": "null"}]}}})
    assert refused(seven, b'{"a":[1]}').message == "parameters.a[0]: null is wanted"


@pytest.mark.parametrize("reference", ["#/$defs/t", "#/%24defs/t", "#there", "#/properties/b", "#/$defs/x~1y~0z"])
def test_references_within_the_schema_are_followed(reference: str) -> None:
    text = {"type": "string", "$anchor": "there"}
    schema = arguments(
        {
            "$id": "https://tools.example/one",
            "$defs": {"t": text, "x/y~z": {"type": "string"}},
            "properties": {"a": {"$ref": reference}, "b": {"type": "string"}},
        }
    )
    assert schema.check(b'{"a":"x"}')
    assert refused(schema, b'{"a":1}').message == "parameters.a: a string is wanted"


def test_a_member_may_be_called_what_a_keyword_is() -> None:
    schema = arguments({"properties": {name: {"type": "string"} for name in ("$ref", "enum", "pattern", "$id")}})
    assert schema.check(b'{"$ref":"http://x","enum":"y","pattern":"(","$id":"z"}')
    assert arguments({"default": {"$ref": "http://x"}, "const": {"a": 1}}).check(b'{"a":1}')


def test_true_and_false_are_schemas() -> None:
    assert arguments(True).check(b'{"a":1}')
    assert refused(arguments(False), b"{}").message == "parameters: nothing may stand here"


def test_a_format_is_an_annotation() -> None:
    assert arguments({DRAFT: DRAFTS["7"], "properties": {"a": {"format": "email"}}}).check(b'{"a":"none"}')


# What does not, and what is said of it.


WORDS: dict[str, tuple[Any, Any, str]] = {
    "type": ({"type": ["string", "null"]}, 3, "a: null or a string is wanted"),
    "integer": ({"type": "integer"}, 1.5, "a: an integer is wanted"),
    "required": ({"required": ["b"]}, {}, "a.b: it is missing"),
    "dependent": ({"dependentRequired": {"b": ["c"]}}, {"b": 1}, "a.c: it is missing"),
    "additional": (
        {"properties": {"b": {}}, "additionalProperties": False},
        {"x": 1},
        "a.x: there is none of this name",
    ),
    "unevaluated": ({"unevaluatedProperties": False}, {"x": 1}, "a.x: there is none of this name"),
    "enum": ({"enum": ["x", {"y": 1}]}, 3, 'a: one of "x", {"y":1} is wanted'),
    "const": ({"const": [1]}, 3, "a: [1] is wanted"),
    "minimum": ({"minimum": 3}, 1, "a: at least 3 is wanted"),
    "multiple": ({"multipleOf": 2}, 3, "a: a multiple of 2 is wanted"),
    "length": ({"maxLength": 2}, "abc", "a: a text of at most 2 characters is wanted"),
    "items": ({"minItems": 2}, [1], "a: at least 2 elements are wanted"),
    "unique": ({"uniqueItems": True}, [1, 1], "a: two elements are the same"),
    "pattern": ({"pattern": "^x$"}, "y", "a: a text is wanted that matches `^x$`"),
    "names": (
        {"propertyNames": {"maxLength": 1}},
        {"bb": 1},
        "a: a member's name does not fit: a text of at most 1 characters is wanted",
    ),
    "any": (
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
        3,
        "a: it fits none of the forms that the schema allows (anyOf)",
    ),
    "false": ({"properties": {"b": False}}, {"b": 1}, "a.b: nothing may stand here"),
    "contains": ({"contains": {"type": "null"}}, [1], "a: it does not fit `contains` of the tool's schema"),
    "deep": (
        {"items": {"properties": {"x y": {"items": {"type": "null"}}}}},
        [{}, {"x y": [None, 1]}],
        'a[1]["x y"][1]: null is wanted',
    ),
}


@pytest.mark.parametrize(("schema", "value", "words"), WORDS.values(), ids=WORDS.keys())
def test_what_does_not_fit_is_said_with_its_place(schema: Any, value: Any, words: str) -> None:
    error = refused(of(schema), raw({"a": value}))
    assert error.kind is ErrorKind.INVALID_PARAMS
    assert error.message == f"parameters.{words}"
    assert error.data == {"path": error.message.split(": ")[0]}


def test_a_message_has_neither_a_large_value_nor_a_large_schema() -> None:
    long = "x" * 20_000
    for schema, value in (
        ({"type": "null"}, long),
        ({"enum": [long, *range(5_000)]}, 1.5),
        ({"const": long}, [long] * 50),
        ({"additionalProperties": False}, {long: 1}),
        ({"required": [long]}, {}),
        ({"pattern": f"^{long}$"}, "a"),
        ({"anyOf": [{"const": long}] * 10}, long[1:]),
    ):
        assert len(refused(of(schema), raw({"a": value})).message) < 600


@pytest.mark.parametrize("given", ["[]", "null", '"a"', "1"])
def test_parameters_are_an_object(given: str) -> None:
    assert refused(arguments({}), given.encode()).message == "parameters: an object is wanted"


@pytest.mark.parametrize("given", ['{"a":1,"a":2}', '{"b":[{"a":":","a":{}}]}', '{"a":1,"\\u0061":2}'])
def test_two_members_of_a_name_are_refused_because_the_tool_might_read_the_other_one(given: str) -> None:
    assert refused(arguments({}), given.encode()).message == "parameters: an object has two members of the same name"
    assert arguments({}).check(b'{"a:":":","b":[{"b":"\\":"}]}')


def test_what_nests_too_deep_is_refused() -> None:
    deepest = b'{"a":' + b"[" * 47 + b"]" * 47 + b"}"
    assert arguments({}).check(deepest) == deepest
    error = refused(arguments({}), b'{"a":' + b"[" * 48 + b"]" * 48 + b"}")
    assert error.data["limit"] == "value_nesting"


def test_where_the_place_would_take_too_long_to_find_it_is_not_sought() -> None:
    node = {"anyOf": [{"properties": {"a": {"$ref": "#"}}, "required": [name]} for name in ("b", "c")]}
    deep: Any = {}
    for _ in range(40):
        deep = {"a": deep}
    begun = time.thread_time()
    error = refused(arguments(node), raw(deep))
    assert time.thread_time() - begun < TAKES_A_SECOND
    assert error.data == {"path": "parameters"}
    assert "take too long" in error.message
    assert refused(arguments(node), b"{}").message.endswith("forms that the schema allows (anyOf)")
