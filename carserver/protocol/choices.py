"""What a value could have been, where it is one of a few: for the words of a refusal."""

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Struct

_STEPS = re.compile(r"\.(?P<name>[^.\[]+)|\[[^\]]*\]")


def choices(type_: Any, path: str) -> list[str]:
    """The values of an enumeration; none where there is another type.

    Args:
        type_: What was to be decoded.
        path: The place below it, as msgspec has it: `$.actions[2].kind`.
    """
    types = [*_alternatives(type_)]
    for step in _STEPS.finditer(path):
        types = [alternative for below in _below(types, step["name"]) for alternative in _alternatives(below)]
    return [str(value) for one in types for value in _values(one)]


def _alternatives(type_: Any) -> Iterator[Any]:
    origin = get_origin(type_)
    if origin is Annotated:
        yield from _alternatives(get_args(type_)[0])
    elif origin in (Union, UnionType):
        for alternative in get_args(type_):
            yield from _alternatives(alternative)
    else:
        yield type_


def _below(types: Iterable[Any], name: str | None) -> Iterator[Any]:
    """The types of the members `name`; of the items, where there is no name."""
    for one in types:
        if name is None:
            yield from get_args(one)[-1:]
        elif isinstance(one, type) and issubclass(one, Struct):
            yield from (field.type for field in msgspec.structs.fields(one) if field.encode_name == name)


def _values(type_: Any) -> Iterable[Any]:
    if get_origin(type_) is Literal:
        return get_args(type_)
    return [member.value for member in type_] if isinstance(type_, type) and issubclass(type_, Enum) else ()
