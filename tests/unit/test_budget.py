"""A budget: so many bytes at once, first come, first served, and never more in one turn of the loop."""

import asyncio
from collections.abc import Callable

from carserver.core.budget import Budget
from carserver.loop import LoopSignal


class Turns:
    """A loop whose next turn is when the test says."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def call_later(self, _: float, callback: Callable[[], None]) -> None:
        self._due.append(callback)

    async def next(self) -> None:
        due, self._due = self._due, []
        for callback in due:
            callback()
        await asyncio.sleep(0)  # those that were let in go on


async def test_no_more_comes_in_than_there_is_room_for_and_first_come_is_first_served() -> None:
    turns, entered = Turns(), []
    budget = Budget(10, turns.call_later, LoopSignal)

    async def enter(size: int) -> None:
        await budget.enter(size)
        entered.append(size)

    tasks = [asyncio.create_task(enter(size)) for size in (6, 4, 5, 25, 1, 2)]
    await asyncio.sleep(0)
    assert entered == [6, 4]
    assert (budget.taken, budget.waiting) == (10, 4)
    budget.leave(6)
    assert budget.taken == 10, "what is given back is there from the next turn on"
    await turns.next()
    assert entered == [6, 4, 5]
    budget.leave(4)
    await turns.next()
    assert entered == [6, 4, 5], "one that is larger than all of it waits until it is alone, and nobody overtakes it"
    budget.leave(5)
    await turns.next()
    assert entered == [6, 4, 5, 25]
    budget.leave(25)
    await turns.next()
    assert entered == [6, 4, 5, 25, 1, 2]
    await asyncio.gather(*tasks)


async def test_what_takes_its_share_without_a_wait_still_leaves_the_next_to_another_turn() -> None:
    turns = Turns()
    budget = Budget(10, turns.call_later, LoopSignal)
    await budget.enter(8)
    budget.leave(8)
    waits = asyncio.create_task(budget.enter(8))
    await asyncio.sleep(0)
    assert not waits.done()
    await turns.next()
    await waits
    assert (budget.taken, budget.waiting) == (8, 0)
