"""Params of which parts are kept as their own bytes: in an object, by place, and in the elements of an array."""

import json
from typing import Any

import pytest
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.errors import ErrorKind, RpcError
from carserver.rpc.method import Method, method
from carserver.rpc.session import Session

VALUE = b'{"n": 1.50, "big": 1180591620717411303424}'


class Kept(Struct, frozen=True):
    """A name, and a value that is kept."""

    name: str
    value: Raw | UnsetType = UNSET


@method("kept.one")
def one(session: Session, params: Kept) -> None:
    """Takes one."""


@method("kept.many")
def many(session: Session, params: list[Kept]) -> None:
    """Takes an array of them."""


ONE: Method = one.method  # type: ignore[attr-defined]
MANY: Method = many.method  # type: ignore[attr-defined]


def long(entry: Method, params: bytes) -> Any:
    return entry.arguments(json.loads(params), b'{"jsonrpc":"2.0","method":"x","params":%b}' % params)


@pytest.mark.parametrize(
    ("entry", "params", "wanted"),
    [
        (ONE, b'{"name":"a","value":%b}' % VALUE, Kept("a", Raw(VALUE))),
        (ONE, b'{"name":"a","value":%b,"more":[1]}' % VALUE, Kept("a", Raw(VALUE))),
        (ONE, b'{"name":"a"}', Kept("a")),
        (MANY, b'[{"name":"a","value":%b},{"name":"b"}]' % VALUE, [Kept("a", Raw(VALUE)), Kept("b")]),
        (MANY, b"[]", []),
    ],
)
def test_the_bytes_are_kept_in_a_short_and_in_a_long_message(entry: Method, params: bytes, wanted: Any) -> None:
    assert long(entry, params) == wanted
    assert entry.short_arguments(Raw(params)) == wanted


def test_by_place_they_are_kept_too() -> None:
    assert long(ONE, b'["a",%b]' % VALUE) == Kept("a", Raw(VALUE))


def test_without_params_an_array_is_empty_and_an_object_lacks_what_it_must_have() -> None:
    assert MANY.arguments(None, b"") == []
    with pytest.raises(RpcError, match="name"):
        ONE.arguments(None, b"")


@pytest.mark.parametrize(
    ("entry", "params", "path"),
    [
        (MANY, b'[{"name":"a"},{"name":1}]', "[1].name"),
        (MANY, b'[{"value":1}]', "[0]"),
        (MANY, b'{"name":"a"}', ""),
        (ONE, b'{"name":null}', "name"),
    ],
)
def test_what_is_of_the_wrong_type_is_named_by_its_place(entry: Method, params: bytes, path: str) -> None:
    with pytest.raises(RpcError) as refused:
        long(entry, params)
    assert (refused.value.kind, refused.value.data) == (ErrorKind.INVALID_PARAMS, {"path": path})
