"""Answers that storage owes: who is given up, when, and that nothing of the others is kept."""

import asyncio
import gc
import weakref
from typing import Any

from carserver.stores import deadlines
from carserver.stores.deadlines import Deadlines

SOON_S, NEVER_S = 0.01, 3_600.0


class Page:
    """A result; nobody but its future holds it."""


class Late(Exception):
    """What a future is given up with."""


class Owed:
    """Deadlines, and whom they gave up."""

    def __init__(self, after_s: float) -> None:
        self.given_up: list[asyncio.Future[Any]] = []
        self.deadlines = Deadlines(after_s, self.give_up)
        self.open = 0

    def give_up(self, future: "asyncio.Future[Any]") -> None:
        """As the store does."""
        self.given_up.append(future)
        future.set_exception(Late())

    def one(self) -> "asyncio.Future[Any]":
        """One more that is expected."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.open += 1
        self.deadlines.expect(future, self.open)
        return future

    def answer(self, future: "asyncio.Future[Any]", result: Any = None) -> None:
        """In time."""
        self.open -= 1
        future.set_result(result)

    def timers(self) -> set[asyncio.TimerHandle]:
        """The one that is set, if one is."""
        timer = self.deadlines._timer
        return set() if timer is None else {timer}

    @property
    def entries(self) -> int:
        """How many are remembered."""
        return len(self.deadlines._due)


async def test_those_that_are_late_are_given_up_in_their_order() -> None:
    owed = Owed(SOON_S)
    futures = [owed.one() for _ in range(5)]
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Late] * 5
    assert owed.given_up == futures
    assert owed.entries == 0


async def test_one_that_was_answered_or_that_nobody_wants_any_more_is_not_given_up() -> None:
    owed = Owed(SOON_S)
    answered, abandoned, late = owed.one(), owed.one(), owed.one()
    owed.answer(answered, "in time")
    abandoned.cancel()
    await asyncio.wait([late])
    assert owed.given_up == [late]
    assert answered.result() == "in time"
    assert abandoned.cancelled()
    assert isinstance(late.exception(), Late)


async def test_one_that_is_answered_by_the_giving_up_of_another_is_not_given_up() -> None:
    owed = Owed(SOON_S)
    first, second = owed.one(), owed.one()
    first.add_done_callback(lambda _: None)
    give_up = owed.deadlines._give_up

    def give_up_and_answer(future: "asyncio.Future[Any]") -> None:
        give_up(future)
        if not second.done():
            second.set_result("after all")

    owed.deadlines._give_up = give_up_and_answer
    await asyncio.wait([first, second])
    assert owed.given_up == [first]
    assert second.result() == "after all"


async def test_each_has_its_whole_time_and_the_timer_goes_on_to_the_next() -> None:
    owed = Owed(SOON_S)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        asked = loop.time()
        late = owed.one()
        await asyncio.wait([late])
        assert isinstance(late.exception(), Late)
        assert loop.time() >= asked + SOON_S


async def test_one_that_comes_while_others_are_owed_is_given_up_too() -> None:
    owed = Owed(SOON_S)
    first = owed.one()
    second: list[asyncio.Future[Any]] = []
    asyncio.get_running_loop().call_later(SOON_S / 2, lambda: second.append(owed.one()))
    await asyncio.wait([first])
    await asyncio.wait(second)
    assert owed.given_up == [first, *second]


async def test_a_result_is_not_kept_while_an_older_answer_is_owed() -> None:
    owed = Owed(NEVER_S)
    oldest = owed.one()
    answered = owed.one()
    page = Page()
    kept = weakref.ref(page)
    owed.answer(answered, page)
    del page, answered
    gc.collect()
    assert kept() is None
    assert not oldest.done()
    owed.deadlines.close()


async def test_the_entries_stay_about_twice_what_is_owed_while_the_oldest_is_open() -> None:
    owed = Owed(NEVER_S)
    kept_open = [owed.one() for _ in range(300)]
    for _ in range(5_000):
        owed.answer(owed.one())
        assert owed.entries <= 2 * len(kept_open) + deadlines._SLACK + 3
    # And what was swept out was none that is owed.
    held = {id(due.future()) for due in owed.deadlines._due}
    assert all(id(future) in held for future in kept_open)
    owed.deadlines.close()


async def test_those_that_were_answered_go_when_the_oldest_is_answered_or_given_up() -> None:
    owed = Owed(SOON_S)
    oldest = owed.one()
    for _ in range(100):
        owed.answer(owed.one())
    await asyncio.wait([oldest])
    assert (owed.given_up, owed.entries) == ([oldest], 0)


async def test_there_is_one_timer_and_none_where_nothing_is_owed_or_after_the_end() -> None:
    owed = Owed(SOON_S)
    assert owed.timers() == set()
    late = owed.one()
    (timer,) = owed.timers()
    for _ in range(10):
        owed.answer(owed.one())
        assert owed.timers() == {timer}
    await asyncio.wait([late])
    assert owed.timers() == set()
    assert isinstance(late.exception(), Late)
    owed.one()
    owed.deadlines.close()
    (timer,) = owed.timers()
    assert timer.cancelled()
