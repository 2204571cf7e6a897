"""What is no schema that can be used, and schemas and arguments that were made to take long."""

import json
import time
from typing import Any

import pytest

from carserver.config import Settings
from carserver.core.arguments import Arguments
from carserver.core.schemas import BadSchema, below, weigh
from carserver.protocol.errors import RpcError

SETTINGS = Settings()
SECONDS = 5.0  # of this thread, for what is meant to take a quarter of one; unbounded it is hours
DEFS = "#/$defs/"


def of(schema: Any) -> Any:
    return {"properties": {"a": schema}}


def compiled(schema: Any) -> Arguments:
    return Arguments(schema if isinstance(schema, bytes) else json.dumps(schema).encode(), SETTINGS)


BAD: dict[str, tuple[Any, str]] = {
    "a number": (3, "a JSON Schema is wanted, an object"),
    "a list": ([], "a JSON Schema is wanted, an object"),
    "an unknown type": (of({"type": "strin"}), "properties.a.type: no JSON Schema: it is none of what may stand here"),
    "a bound that is a text": ({"minimum": "x"}, "minimum: no JSON Schema: a number is wanted"),
    "another draft": ({"$schema": "http://foo.bar/"}, "no JSON Schema: Unknown meta-schema: 'http://foo.bar/'"),
    "a reference to nothing": ({"$ref": "#/$defs/x"}, "no JSON Schema: Pointer '/$defs/x' does not exist"),
    "a reference to the network": (
        of({"$ref": "http://127.0.0.1:1/x"}),
        "properties.a.$ref: it refers to another document: only `#…` is followed",
    ),
    "a reference to a file": ({"$ref": "file:///etc/passwd"}, "$ref: it refers to another document"),
    "a reference by a relative name": ({"items": [{"$ref": "other.json"}]}, "items[0].$ref: it refers to another"),
    "a reference into a value": ({"$ref": "#/default", "default": {"pattern": "("}}, "`#/default` leads to a value"),
    "a document within": (of({"$id": "https://x.example/"}), "properties.a.$id: only the whole schema may have one"),
    "no pattern": (of({"pattern": "("}), "properties.a.pattern: `(` is no pattern"),
    "look-around": (
        of({"pattern": "^(?=a)"}),
        "properties.a.pattern: `^(?=a)` is no pattern that is matched in bounded",
    ),
    "a back-reference": ({"patternProperties": {"(a)\\1": {}}}, "patternProperties: `(a)\\1` is no pattern"),
    "a pattern that grows": (of({"pattern": "((a{1,99}){1,99}){1,99}"}), "properties.a.pattern: `((a{1,99})"),
    "many that do": (
        {"patternProperties": {f"\\p{{L}}a{{{number}}}": True for number in range(3_000)}},
        "patternProperties: the patterns up to here take more than 16777216 bytes",
    ),
    "members of one name": (b'{"pattern":"a","pattern":"b"}', "an object has two members of the same name"),
    "a long chain": (
        {"$ref": DEFS + "0", "$defs": {f"{number}": {"$ref": f"{DEFS}{number + 1}"} for number in range(1_000)}},
        "its references lead from one to the next more than 32 times",
    ),
}


@pytest.mark.parametrize(("schema", "words"), BAD.values(), ids=BAD.keys())
def test_a_schema_that_cannot_be_used_is_refused_with_the_place(schema: Any, words: str) -> None:
    begun = time.thread_time()
    with pytest.raises(BadSchema) as caught:
        compiled(schema)
    assert time.thread_time() - begun < SECONDS
    assert str(caught.value).startswith(words)
    assert len(str(caught.value)) < 500


def doubled(times: int) -> dict[str, Any]:
    """Each part tries the next one twice."""
    parts = {f"{part}": {"allOf": [{"$ref": f"{DEFS}{part + 1}"}] * 2} for part in range(times)}
    return {"$ref": DEFS + "0", "$defs": {**parts, f"{times}": {"type": "object"}}}


def unevaluated(times: int) -> dict[str, Any]:
    """Each part tries the one within nearly three times."""
    schema: dict[str, Any] = {"properties": {"a": True}}
    for _ in range(times):
        schema = {"anyOf": [schema, False], "unevaluatedProperties": {"type": "integer"}}
    return schema


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


AGAIN = [{"properties": {"a": {"$ref": "#"}}}] * 3
TEXT = "ab" * 500_000
HOSTILE: dict[str, tuple[Any, Any]] = {
    "parts that double": (doubled(31), {}),
    "what is left of what is left": (unevaluated(20), {"a": 1, "b": 2}),
    "all of itself": ({"allOf": AGAIN}, nested(47)),
    "any of itself, and none": ({"anyOf": [*AGAIN, False], "not": {"$ref": "#"}}, nested(47)),
    "a circle": (
        {"$defs": {"a": {"allOf": [{"$ref": DEFS + "b"}]}, "b": {"$ref": DEFS + "a"}}, "$ref": DEFS + "a"},
        {},
    ),
    "itself": ({"$ref": "#"}, nested(47)),
    "not itself": ({"not": {"$ref": "#"}}, {}),
    "dynamically itself": (
        {"$dynamicAnchor": "n", "allOf": [{"properties": {"a": {"$dynamicRef": "#n"}}}] * 2},
        nested(47),
    ),
    "a pattern with nested repetitions": (of({"pattern": "(a+)+$"}), {"a": "a" * 1_000_000 + "!"}),
    "a pattern with many states": (of({"pattern": "([ab]{1,100}){1,30}c"}), {"a": TEXT}),
    "many patterns": (of({"allOf": [{"pattern": f"(a|b{number})+z"} for number in range(500)]}), {"a": TEXT + "z"}),
    "patterns for many names": (
        {"patternProperties": {"([ab]{1,100}){1,9}c": {}}},
        {"ab" * 50 + str(n): n for n in range(9_999)},
    ),
    "many alternatives for many": (
        of({"items": {"anyOf": [{"const": n} for n in range(3_000)]}}),
        {"a": [2_999] * 9_999},
    ),
    "unique large integers": (of({"uniqueItems": True}), {"a": [2**80 + number for number in range(9_999)]}),
    "unique texts, again and again": (
        of({"allOf": [{"uniqueItems": True}] * 900}),
        {"a": [f"{n}{TEXT[:200]}" for n in range(9_999)]},
    ),
    "a thousand errors with a large value": (of({"anyOf": [{"type": "null"}] * 1_000}), {"a": TEXT}),
}


@pytest.mark.parametrize(("schema", "value"), HOSTILE.values(), ids=HOSTILE.keys())
def test_no_schema_with_no_arguments_takes_long(schema: Any, value: Any) -> None:
    begun = time.thread_time()
    arguments = compiled(schema)
    try:
        arguments.check(json.dumps(value).encode())
    except RpcError as error:
        assert len(error.message) < 500  # noqa: PT017 - whether it fits is not what is asked
    assert time.thread_time() - begun < SECONDS


@pytest.mark.parametrize(
    "case",
    [
        "parts that double",
        "what is left of what is left",
        "a pattern with many states",
        "patterns for many names",
        "many alternatives for many",
        "unique large integers",
        "unique texts, again and again",
    ],
)
def test_what_could_take_long_is_refused_as_too_much(case: str) -> None:
    schema, value = HOSTILE[case]
    with pytest.raises(RpcError) as caught:
        compiled(schema).check(json.dumps(value).encode())
    assert caught.value.data["limit"] == "schema_work"


def test_a_large_value_is_not_copied_for_every_part_that_does_not_fit() -> None:
    schema, value = HOSTILE["a thousand errors with a large value"]
    with pytest.raises(RpcError, match="too long to find out"):
        compiled(schema).check(json.dumps(value).encode())


ORDINARY: dict[str, tuple[Any, Any]] = {
    "a large text beside a pattern": (
        {"properties": {"path": {"pattern": "^[^/]{1,255}$"}, "content": {"type": "string"}}},
        {"path": "a.txt", "content": "x" * 10_000_000},
    ),
    "many numbers": (of({"items": {"type": "number"}, "uniqueItems": True}), {"a": list(range(200_000))}),
    "a long enumeration": (of({"enum": [f"zone {number}" for number in range(3_000)]}), {"a": "zone 2999"}),
    "names by pattern": ({"patternProperties": {"^[a-z_]+$": {"type": "string"}}}, {"a_b": "x" * 100_000}),
    "a tree": (
        {"properties": {"children": {"items": {"$ref": "#"}}, "name": {"type": "string"}}, "required": ["name"]},
        {"name": "a", "children": [{"name": "b", "children": [{"name": f"{number}"} for number in range(10_000)]}]},
    ),
    "objects that take no more than they say": (
        {"allOf": [{"properties": {"a": {"type": "integer"}}}], "unevaluatedProperties": False},
        {"a": 1},
    ),
    "an address": (of({"pattern": "^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\\.[A-Za-z]{2,}$"}), {"a": "who@there.example"}),
    "a link": (of({"pattern": "^https?://[^\\s]{1,1000}$"}), {"a": "https://there.example/" + "x" * 900}),
    "letters of any script": (of({"pattern": "^[\\p{L}\\p{N} _-]{1,64}$"}), {"a": "Ünïcödé 7"}),
}


@pytest.mark.parametrize(("schema", "value"), ORDINARY.values(), ids=ORDINARY.keys())
def test_an_ordinary_schema_with_large_arguments_is_no_trouble(schema: Any, value: Any) -> None:
    given = json.dumps(value, separators=(",", ":")).encode()
    assert compiled(schema).check(given) == given


def test_a_part_counts_as_often_as_it_is_tried() -> None:
    assert weigh(doubled(10)).weight > 2**10
    assert weigh(doubled(30)).weight > 2**30
    assert weigh({"$defs": doubled(10)["$defs"]}).weight < 10
    assert weigh({"allOf": AGAIN}).recursive
    assert not weigh(doubled(10)).recursive


def test_a_place_is_short_and_has_no_control_characters() -> None:
    assert below("", "a") == "a"
    assert below("a", 3) == "a[3]"
    assert below("a", "$ref") == "a.$ref"
    assert below("a", "x.y") == 'a["x.y"]'
    assert below("a", "\x1b[2J") == 'a["\\u001b[2J"]'
    place = ""
    for _ in range(48):
        place = below(place, "n" * 1_000)
    assert len(place) < 260
