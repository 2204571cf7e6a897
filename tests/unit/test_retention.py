"""Retention by itself: when it looks, what it prunes by, and that a clock that jumps deletes nothing."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.ports import Criteria
from carserver.core.prune import Pruner
from carserver.core.retention import CLOCKS_AGREE_MS, Retention
from carserver.protocol.errors import unavailable
from carserver.protocol.pruning import Pruned

YEAR_S = 365 * 86_400
HOUR_S, FIRST_S = 3_600.0, 60.0


class Clock:
    """Implements `core.runstore.Clock`: both clocks are set by hand, and one timer is waited for."""

    def __init__(self) -> None:
        self.wall_s = 1_700_000_000.0
        self.monotonic_s = 1_000.0
        self.timer: tuple[float, Callable[[], None]] | None = None

    def now_ms(self) -> int:
        return round(self.wall_s * 1000)

    def monotonic(self) -> float:
        return self.monotonic_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Clock":
        assert self.timer is None
        self.timer = (delay_s, callback)
        return self

    def cancel(self) -> None:
        self.timer = None

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)

    def pass_until_due(self, jump_s: float = 0.0) -> float:
        """The time until the timer passes, and on the wall so much more; how long it was."""
        assert self.timer is not None
        delay_s, callback = self.timer
        self.timer = None
        self.monotonic_s += delay_s
        self.wall_s += delay_s + jump_s
        callback()
        return delay_s


class FakePruner(Pruner):
    """Remembers by what it was to prune."""

    def __init__(self) -> None:
        self.criteria: list[Criteria] = []
        self.error: Exception | None = None

    async def prune(self, criteria: Criteria, *, dry_run: bool = False) -> Pruned:
        assert not dry_run
        if self.error is not None:
            raise self.error
        self.criteria.append(criteria)
        return Pruned(runs=1, outputs=2, bytes=3, dry_run=False, run_ids=["r"], more_runs=0)


class World:
    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.pruner = FakePruner()
        self.counters = Counters()
        chosen = Settings(retention_every_s=HOUR_S, retention_first_s=FIRST_S, **settings)
        Retention(self.pruner, self.clock, chosen, self.counters).start()


def test_it_looks_a_while_after_the_start_and_then_every_so_often() -> None:
    world = World(retention_age_s=86_400.0, retention_runs=5, retention_bytes=7)
    assert [world.clock.pass_until_due() for _ in range(3)] == [FIRST_S, HOUR_S, HOUR_S]
    assert len(world.pruner.criteria) == 3
    assert world.pruner.criteria[-1] == Criteria(world.clock.now_ms() - 86_400_000, 5, 7)


@pytest.mark.parametrize("age_s", [float("inf"), 1e300, 1e18, 1_800_000_000.0])
def test_nothing_is_older_than_an_age_that_reaches_back_before_1970(age_s: float) -> None:
    world = World(retention_age_s=age_s)
    world.clock.pass_until_due()
    assert world.pruner.criteria == [Criteria(0, None, None)]


def test_without_a_criterion_it_does_not_begin() -> None:
    assert World().clock.timer is None


@pytest.mark.parametrize("jump_s", [YEAR_S, HOUR_S, CLOCKS_AGREE_MS / 1000 + 1, -HOUR_S, -YEAR_S])
def test_a_clock_that_jumps_deletes_nothing_until_it_has_gone_right_for_a_period(
    jump_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(retention_age_s=86_400.0)
    world.clock.pass_until_due()
    world.clock.pass_until_due(jump_s)
    world.clock.pass_until_due(-jump_s)  # set right again: a jump, too
    assert (len(world.pruner.criteria), world.counters.retention_skips) == (1, 2)
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2
    world.clock.pass_until_due()
    assert len(world.pruner.criteria) == 2


def test_a_jump_before_the_first_look_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    world = World(retention_age_s=86_400.0)
    world.clock.pass_until_due(YEAR_S)
    assert world.pruner.criteria == []


def test_a_clock_that_is_set_right_by_a_little_is_none_that_jumps() -> None:
    world = World(retention_age_s=86_400.0)
    for jump_s in (60, -60, CLOCKS_AGREE_MS / 1000, 0):
        world.clock.pass_until_due(jump_s)
    assert len(world.pruner.criteria) == 4


def test_number_and_size_do_not_depend_on_the_clock() -> None:
    world = World(retention_runs=1)
    world.clock.pass_until_due(YEAR_S)
    assert world.pruner.criteria == [Criteria(None, 1, None)]


def test_what_it_did_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "carserver.retention")
    World(retention_runs=1).clock.pass_until_due()
    (line,) = caplog.messages
    assert "1 runs and 2 outputs deleted, 3 bytes" in line


def test_storage_that_fails_is_said_and_the_next_turn_comes(caplog: pytest.LogCaptureFixture) -> None:
    world = World(retention_runs=1)
    world.pruner.error = unavailable("storage fails: disk full")
    world.clock.pass_until_due()
    assert "disk full" in caplog.text
    world.pruner.error = None
    assert world.clock.pass_until_due() == HOUR_S
    assert len(world.pruner.criteria) == 1
