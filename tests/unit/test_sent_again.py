"""What a method's declaration says of sending it again: always, with a param, or by its key."""

from typing import Any

import pytest
from msgspec import Struct

from carserver.rpc.method import Method, method
from carserver.rpc.session import Session


class Params(Struct, frozen=True):
    after: int | None = None


class Keyed(Struct, frozen=True):
    prompt: str = ""
    idempotency_key: str | None = None


class Batch(Struct, frozen=True):
    batch_id: str | None = None


def declared(params: type[Struct], **words: Any) -> Method:
    async def function(session: Session, given: Any) -> int:
        """Does something."""
        return 1

    function.__annotations__["given"] = params
    found: Method = method("m", **words)(function).method  # type: ignore[attr-defined]
    return found


def test_a_method_is_not_sent_again_unless_it_says_so() -> None:
    assert declared(Params).again is False
    assert declared(Params, again=True).again is True
    assert declared(Params, again="after").again == "after"


def test_a_key_says_so_by_itself() -> None:
    assert declared(Keyed).again == "idempotency_key"
    assert declared(Batch).again == "batch_id"


def test_a_param_that_there_is_not_is_an_error() -> None:
    with pytest.raises(TypeError, match="again='before' wants a param of that name"):
        declared(Params, again="before")
