"""Starts a coroutine at once, here, and hands it over only if it has to wait.

Requests of a connection start in the order of their arrival and most are answered without waiting for anything; a task
each would cost more than they do, and would start them later than a plain function that came after them.
"""

from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import coroutine
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Pending(NamedTuple):
    """Work that waits: awaiting what `rest` makes gives its result. It is made when it is awaited, not before.

    `waits`: it waits on someone, so it may last.
    """

    rest: Callable[[], Awaitable[Any]]
    waits: bool = False


def start(work: Coroutine[Any, Any, T]) -> T | Pending:
    """Runs `work` up to its first wait: its result if it never waits, else what is left of it."""
    try:
        awaited = work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    return Pending(lambda: _go_on(work, awaited))


@coroutine
def _go_on(work: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    """Drives `work`, which has yielded `awaited` to nobody yet, as part of the coroutine that awaits this."""
    while True:
        try:
            answer = yield awaited
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:  # noqa: BLE001 - whatever is thrown in, a cancel too, is the work's to handle
            step: Callable[[], Any] = _throwing(work, error)
        else:
            step = _sending(work, answer)
        try:
            awaited = step()
        except StopIteration as stop:
            result: T = stop.value
            return result


def _throwing(work: Coroutine[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: work.throw(error)


def _sending(work: Coroutine[Any, Any, Any], answer: Any) -> Callable[[], Any]:
    return lambda: work.send(answer)
