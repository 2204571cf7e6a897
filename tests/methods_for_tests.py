"""Methods that exist for tests alone: `serve --methods tests.methods_for_tests`.

Those of `data/jsonrpc-2.0-cases.json`, and some that wait, break or answer a lot when they are told to.
"""

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Struct

from carserver.protocol.errors import conflict
from carserver.rpc.method import Encoded, method
from carserver.rpc.session import Session

DEFECT = "the words of a defect, which must not get out"

_gates: dict[str, asyncio.Event] = {}


class Difference(Struct, frozen=True):
    """Params of `subtract`."""

    minuend: int
    subtrahend: int


class Gate(Struct, frozen=True):
    """Params of what waits and of what releases it."""

    name: str


class Size(Struct, frozen=True):
    """Params of `test.bytes`."""

    size: Annotated[int, msgspec.Meta(ge=2)]


@method("subtract")
def subtract(session: Session, params: Difference) -> int:
    """The difference."""
    return params.minuend - params.subtrahend


@method("sum")
def sum_(session: Session, params: list[int]) -> int:
    """The sum of all that is given."""
    return sum(params)


@method("update")
def update(session: Session, params: list[int]) -> None:
    """Takes numbers and does nothing with them."""


@method("notify_hello")
def notify_hello(session: Session, params: list[int]) -> None:
    """Takes numbers and does nothing with them."""


@method("notify_sum")
def notify_sum(session: Session, params: list[int]) -> None:
    """Takes numbers and does nothing with them."""


@method("get_data")
def get_data(session: Session) -> list[Any]:
    """A word and a number."""
    return ["hello", 5]


@method("test.wait", waits=True)
async def wait(session: Session, params: Gate) -> str:
    """Waits on whoever calls `test.release` with the same name."""
    return await _pass(params.name)


@method("test.hold")
async def hold(session: Session, params: Gate) -> str:
    """Waits for `test.release` too, but counts as a short request, as one does that waits for storage."""
    return await _pass(params.name)


@method("test.release")
def release(session: Session, params: Gate) -> None:
    """Lets all pass that wait at this gate, or will."""
    _gates.setdefault(params.name, asyncio.Event()).set()


@method("test.bytes")
def bytes_(session: Session, params: Size) -> Encoded[str]:
    """A result of this many bytes of JSON: a string with its quotes."""
    return Encoded(b'"%b"' % (b"x" * (params.size - 2)))


@method("test.defect")
def defect(session: Session) -> None:
    """Breaks."""
    raise RuntimeError(DEFECT)


@method("test.late_defect")
async def late_defect(session: Session) -> None:
    """Breaks after it has waited."""
    await asyncio.sleep(0)
    raise RuntimeError(DEFECT)


@method("test.undeclared")
def undeclared(session: Session) -> None:
    """Raises an error that it does not declare."""
    raise conflict("exists", "an error that is not declared")


@method("test.host_only", role="host")
def host_only(session: Session) -> None:
    """For the host."""


async def _pass(name: str) -> str:
    await _gates.setdefault(name, asyncio.Event()).wait()
    return name
