"""A function as a tool: the schema that its hints make, what it is called with, and what is refused."""

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, Raw, Struct

from carserver.client.signatures import Kind, Tool, read_tool


class Place(Struct):
    """Where in a file."""

    path: str
    line: Annotated[int, Meta(ge=1)] = 1


@dataclass
class Limits:
    seconds: float
    matches: int | None = None


_NOWHERE = object()


def schema(function: Callable[..., Any]) -> Any:
    parameters = read_tool(function).given.parameters
    assert isinstance(parameters, Raw)
    return json.loads(bytes(parameters))


def decoded(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    return read_tool(function).decode(Raw(json.dumps(arguments).encode()))


def refused(function: Callable[..., Any]) -> str:
    with pytest.raises(TypeError) as caught:
        read_tool(function)
    return str(caught.value)


# The schema.


def test_a_parameter_without_a_default_is_required_and_unknown_arguments_are_not_allowed() -> None:
    def grep(pattern: str, folder: str = ".") -> None: ...

    assert schema(grep) == {
        "type": "object",
        "properties": {"pattern": {"type": "string"}, "folder": {"type": "string", "default": "."}},
        "required": ["pattern"],
        "additionalProperties": False,
    }


def test_descriptions_and_bounds_come_from_annotations_also_where_there_is_a_default() -> None:
    def count(
        to: Annotated[int, Meta(ge=1, description="The last number.")],
        step: Annotated[int, Meta(ge=1, le=9, description="From one to the next.")] = 1,
    ) -> None: ...

    assert schema(count)["properties"] == {
        "to": {"type": "integer", "minimum": 1, "description": "The last number."},
        "step": {
            "type": "integer",
            "minimum": 1,
            "maximum": 9,
            "description": "From one to the next.",
            "default": 1,
        },
    }


def test_optional_and_literal_parameters_say_what_they_take() -> None:
    def grep(case: Literal["ignore", "match"], include: str | None = None) -> None: ...

    assert schema(grep)["properties"] == {
        "case": {"enum": ["ignore", "match"]},
        "include": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    }


def test_structs_and_dataclasses_stand_in_the_schema_itself() -> None:
    def edit(at: Place, within: Limits = Limits(2.5)) -> None: ...  # noqa: B008 - a default is what is tested

    whole = schema(edit)
    assert whole["properties"] == {
        "at": {"$ref": "#/$defs/Place"},
        "within": {"$ref": "#/$defs/Limits", "default": {"seconds": 2.5, "matches": None}},
    }
    assert set(whole["$defs"]) == {"Place", "Limits"}
    assert whole["$defs"]["Place"]["properties"]["line"] == {"type": "integer", "minimum": 1, "default": 1}


def test_a_default_that_json_has_no_word_for_is_left_out_of_the_schema_and_still_holds() -> None:
    def look(where: Any = _NOWHERE) -> None: ...

    assert schema(look)["properties"] == {"where": {}}
    assert decoded(look) == {}


def test_hints_may_be_written_as_text() -> None:
    def grep(pattern: "str", at: "Place") -> None: ...

    assert schema(grep)["properties"] == {"pattern": {"type": "string"}, "at": {"$ref": "#/$defs/Place"}}


def test_a_tool_without_parameters_takes_an_empty_object() -> None:
    def now() -> str:
        return ""

    assert schema(now)["properties"] == {}
    assert decoded(now) == {}


# What it is called, and returns.


def test_name_and_description_are_the_functions_own_or_those_that_are_given() -> None:
    def grep(pattern: str) -> None:
        """Searches a tree.

        Slowly.
        """

    own = read_tool(grep).given
    other = read_tool(grep, name="code.grep", description="Finds it.", idempotent=True).given
    assert (own.name, own.description, own.idempotent) == ("grep", "Searches a tree.\n\nSlowly.", False)
    assert (other.name, other.description, other.idempotent) == ("code.grep", "Finds it.", True)


def test_the_result_has_a_schema_where_its_hint_makes_one() -> None:
    def figures() -> dict[str, int]:
        return {}

    def nothing() -> None: ...

    def odd() -> Callable[[], None]:
        raise NotImplementedError

    def lines() -> Iterator[str]:
        yield ""

    returns = read_tool(figures).given.returns
    assert isinstance(returns, Raw)
    assert json.loads(bytes(returns)) == {"type": "object", "additionalProperties": {"type": "integer"}}
    assert [read_tool(function).given.returns for function in (nothing, odd, lines)] == [UNSET] * 3


class Editor:
    def undo(self, steps: int) -> None:
        """Takes steps back."""

    def __call__(self, text: str) -> None: ...


def test_methods_partials_and_objects_that_are_called_are_tools_too() -> None:
    def grep(pattern: str, folder: str) -> None:
        """Searches."""

    tools: list[Tool] = [
        read_tool(Editor().undo),
        read_tool(Editor(), name="edit"),
        read_tool(functools.partial(grep, folder="/src"), name="grep_src"),
    ]
    assert [tool.name for tool in tools] == ["undo", "edit", "grep_src"]
    assert [tool.given.description for tool in tools] == ["Takes steps back.", "", "Searches."]
    assert [tool.arguments.__struct_fields__ for tool in tools] == [("steps",), ("text",), ("pattern", "folder")]


def test_how_it_runs_is_seen_from_the_function() -> None:
    def function() -> None: ...
    def generator() -> Iterator[str]:
        yield ""

    async def coroutine() -> None: ...
    async def stream() -> AsyncIterator[str]:
        yield ""

    kinds = [read_tool(one, name="x").kind for one in (function, generator, coroutine, stream)]
    assert kinds == [Kind.FUNCTION, Kind.GENERATOR, Kind.COROUTINE, Kind.ASYNC_GENERATOR]
    assert read_tool(functools.partial(coroutine), name="x").kind is Kind.COROUTINE


# Arguments.


def test_arguments_arrive_as_what_the_hints_say() -> None:
    def edit(at: Place, within: Limits, mode: Literal["a", "b"]) -> None: ...

    given = decoded(edit, at={"path": "x.py", "line": 3}, within={"seconds": 1}, mode="b")
    assert given == {"at": Place("x.py", 3), "within": Limits(1.0), "mode": "b"}


def test_what_is_an_integer_for_a_schema_is_one_for_the_function() -> None:
    def wait(seconds: int) -> None: ...

    assert read_tool(wait).decode(Raw(b'{"seconds":2.0}')) == {"seconds": 2}


def test_arguments_that_do_not_fit_are_named() -> None:
    def edit(at: Place) -> None: ...

    with pytest.raises(msgspec.ValidationError, match=r"\$\.at\.line"):
        decoded(edit, at={"path": "x.py", "line": 0})


# What is refused.


def test_what_takes_arguments_without_names_is_refused() -> None:
    def several(*paths: str) -> None: ...
    def named(**options: str) -> None: ...
    def placed(path: str, /) -> None: ...

    told = [refused(function) for function in (several, named, placed)]
    assert [words.partition(":")[0] for words in told] == [
        "tool 'several', parameter *paths",
        "tool 'named', parameter **options",
        "tool 'placed', parameter path",
    ]
    assert all("arguments come by their names" in words for words in told)


def test_a_parameter_without_a_hint_is_refused() -> None:
    def grep(pattern) -> None: ...  # type: ignore[no-untyped-def] # noqa: ANN001 - that is tested

    assert refused(grep) == "tool 'grep', parameter pattern: it has no type hint, and so no schema"
    assert refused(Editor.undo) == "tool 'undo', parameter self: it has no type hint, and so no schema"


def test_a_hint_that_no_schema_can_be_made_of_is_refused() -> None:
    def call(back: Callable[[], None]) -> None: ...
    def edit(editor: "Editor | None" = None) -> None: ...
    def look(where: "Nowhere") -> None: ...  # type: ignore[name-defined] # noqa: F821 - that is tested

    assert "parameter back: " in refused(call)
    assert "not supported" in refused(call)
    assert "parameter editor: " in refused(edit)
    assert "name 'Nowhere' is not defined" in refused(look)


def test_what_has_no_name_or_is_a_class_is_refused() -> None:
    assert "needs a name" in refused(lambda: None)
    assert "needs a name" in refused(Editor())
    assert "a class is no tool" in refused(Editor)
