"""A method module for `serve --methods`: moves the daemon's wall clock from within, where nothing can be preloaded."""

import time
from collections.abc import Callable

from msgspec import Struct

from carserver.rpc.method import method
from carserver.rpc.session import Session


class Jump(Struct, frozen=True):
    """Params of `test.move_clock`."""

    seconds: float


_offset_s = 0.0


def _moved(real: Callable[[], float]) -> Callable[[], float]:
    return lambda: real() + _offset_s


def _moved_ns(real: Callable[[], int]) -> Callable[[], int]:
    return lambda: real() + round(_offset_s * 1e9)


time.time, time.time_ns = _moved(time.time), _moved_ns(time.time_ns)


@method("test.move_clock", while_draining=True)
def move_clock(session: Session, params: Jump) -> None:
    """Sets the wall clock forward, or back."""
    global _offset_s  # noqa: PLW0603 - a process has one clock
    _offset_s += params.seconds
