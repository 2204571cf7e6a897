"""A function as a tool: its JSON Schema, from its type hints, and what it is called with, from the arguments as JSON.

What cannot be said in a schema is refused when the function is given, in words that name the parameter.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.tools import GivenTool

_REFS = "#/$defs/{name}"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_TITLE = "Arguments"


class Kind(Enum):
    """How a tool runs."""

    FUNCTION = "function"
    GENERATOR = "generator"
    COROUTINE = "coroutine"
    ASYNC_GENERATOR = "async generator"

    @property
    def threaded(self) -> bool:
        """Whether it runs in a thread."""
        return self in {Kind.FUNCTION, Kind.GENERATOR}


class Tool(Struct, frozen=True):
    """A function, ready to be offered: how it is registered, and how it is called."""

    given: GivenTool
    kind: Kind
    function: Callable[..., Any]
    arguments: type[Struct]

    @property
    def name(self) -> str:
        """As it is called."""
        return self.given.name

    def decode(self, parameters: Raw) -> dict[str, Any]:
        """What the function is called with; what was not given is left to its own defaults.

        Raises:
            msgspec.ValidationError: the arguments do not fit the hints.
        """
        # The daemon has held them against the schema, for which 1.0 is an integer: it is to be one here, too.
        values = msgspec.json.decode(parameters, type=self.arguments, strict=False)
        given = ((name, getattr(values, name)) for name in self.arguments.__struct_fields__)
        return {name: value for name, value in given if value is not UNSET}


def read_tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    idempotent: bool = False,
) -> Tool:
    """A function, coroutine, generator or async generator as a tool.

    Args:
        function: each of its parameters has a type hint that msgspec knows.
        name: instead of the function's own.
        description: instead of its docstring.
        idempotent: twice does no more than once; callers are told so.

    Raises:
        TypeError: it cannot be a tool, and why.
    """
    called = name if name is not None else str(getattr(function, "__name__", ""))
    if not called or (name is None and not called.isidentifier()):
        raise TypeError("a tool needs a name: give one, @car.tool(name=…)")
    signature = _signature(function, called)
    arguments = msgspec.defstruct(_TITLE, _fields(signature, called), kw_only=True, forbid_unknown_fields=True)
    kind = _kind(function)
    given = GivenTool(
        name=called,
        description=(inspect.getdoc(_whole(function)) or "") if description is None else description,
        parameters=Raw(msgspec.json.encode(_schema(arguments, signature))),
        returns=_returns(signature.return_annotation, kind),
        idempotent=idempotent,
    )
    return Tool(given, kind, function, arguments)


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of which some arguments are given already."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _kind(function: Callable[..., Any]) -> Kind:
    runs = _whole(function)
    if not inspect.isroutine(runs):
        runs = runs.__call__  # type: ignore[operator] # mypy takes it for a function
    if inspect.isasyncgenfunction(runs):
        return Kind.ASYNC_GENERATOR
    if inspect.iscoroutinefunction(runs):
        return Kind.COROUTINE
    return Kind.GENERATOR if inspect.isgeneratorfunction(runs) else Kind.FUNCTION


def _signature(function: Callable[..., Any], called: str) -> inspect.Signature:
    if isinstance(function, type):
        raise TypeError(f"tool {called!r}: a class is no tool; a function is, or a method of an object")
    try:
        return inspect.signature(function, eval_str=True)
    except NameError as error:
        raise TypeError(f"tool {called!r}: {error}: its type hints are to be names that its module has") from None
    except (TypeError, ValueError) as error:
        raise TypeError(f"tool {called!r}: {error}") from None


def _fields(signature: inspect.Signature, called: str) -> Iterator[tuple[str, Any, Any]]:
    """The fields of its arguments; one with a default may be absent, and then the function's own default holds."""
    for name, parameter in signature.parameters.items():
        bare = parameter.replace(annotation=parameter.empty, default=parameter.empty)
        at = f"tool {called!r}, parameter {bare}"
        if parameter.kind not in _NAMED:
            raise TypeError(f"{at}: arguments come by their names, so each needs a parameter that takes it by name")
        hint = parameter.annotation
        if hint is parameter.empty:
            raise TypeError(f"{at}: it has no type hint, and so no schema")
        try:
            msgspec.json.schema(hint)
        except TypeError as error:
            raise TypeError(f"{at}: {_reason(error)}") from None
        if parameter.default is parameter.empty:
            yield name, hint, msgspec.NODEFAULT
        else:
            yield name, hint | UnsetType, UNSET


def _reason(error: TypeError) -> str:
    """What msgspec says of a type, without its advice on hooks."""
    return str(error).rpartition("\n")[2]


def _schema(arguments: type[Struct], signature: inspect.Signature) -> dict[str, Any]:
    """The schema of the arguments; other types that they are made of stand in its `$defs`."""
    (reference,), definitions = msgspec.json.schema_components([arguments], ref_template=_REFS)
    schema: dict[str, Any] = definitions.pop(reference["$ref"].rpartition("/")[2])
    del schema["title"]
    for name, parameter in signature.parameters.items():
        if parameter.default is not parameter.empty:
            _say_default(schema["properties"][name], parameter.default)
    return {**schema, "$defs": definitions} if definitions else schema


def _say_default(schema: dict[str, Any], default: object) -> None:
    try:
        schema["default"] = msgspec.to_builtins(default, str_keys=True)
    except TypeError:  # it stands for something that JSON has no word for
        return


def _returns(hint: Any, kind: Kind) -> Raw | UnsetType:
    """The schema of its result, where there is one to be told; the result itself is not held against it."""
    if hint in (inspect.Signature.empty, None, Any) or kind in {Kind.GENERATOR, Kind.ASYNC_GENERATOR}:
        return UNSET
    try:
        return Raw(msgspec.json.encode(msgspec.json.schema(hint, ref_template=_REFS)))
    except TypeError:
        return UNSET
