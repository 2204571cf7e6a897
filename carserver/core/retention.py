"""Retention: the daemon prunes by itself, by the criteria of its settings, a while after its start and every so often.

Age is counted by the wall clock, and that may jump: a jump of a year forward would make everything old. So before each
turn the wall clock's progress since the last one is compared with the monotonic clock's. Where they disagree, nothing
is pruned and both are looked at anew; only when they have agreed for one whole period does it go on. A machine that
slept loses a turn in that way, no more. A clock that was wrong before the daemon started is not seen: its right time
has to come before the first turn.
"""

import logging
from typing import NamedTuple

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.ports import Criteria
from carserver.core.prune import Pruner
from carserver.core.runstore import Clock
from carserver.protocol.errors import RpcError

log = logging.getLogger("carserver.retention")

CLOCKS_AGREE_MS = 5 * 60 * 1000  # a clock is set right by less than this, and by more where it was wrong


class _Look(NamedTuple):
    wall_ms: int
    monotonic_s: float


class Retention:
    """Prunes by age, number and size, as far as the settings say.

    Args:
        pruner: Prunes.
        clock: Time, timers.
        settings: `retention_…`.
        counters: What is counted.
    """

    def __init__(self, pruner: Pruner, clock: Clock, settings: Settings, counters: Counters) -> None:
        self._pruner = pruner
        self._clock = clock
        self._settings = settings
        self._counters = counters
        self._look = self._looked()

    def start(self) -> None:
        """Begins, if there is anything to prune by."""
        settings = self._settings
        wanted = (settings.retention_age_s, settings.retention_runs, settings.retention_bytes)
        if any(criterion is not None for criterion in wanted):
            self._clock.call_later(min(settings.retention_first_s, settings.retention_every_s), self._due)

    def _due(self) -> None:
        self._clock.spawn(self._turn())

    async def _turn(self) -> None:
        try:
            if self._clocks_agree():
                await self._prune()
        except RpcError as error:  # storage fails, or the daemon drains: the next turn does it
            log.warning("retention: %s", error.message)
        finally:
            self._clock.call_later(self._settings.retention_every_s, self._due)

    async def _prune(self) -> None:
        settings = self._settings
        age_s = settings.retention_age_s
        criteria = Criteria(
            before_ms=None if age_s is None else self._before_ms(age_s),
            max_runs=settings.retention_runs,
            max_bytes=settings.retention_bytes,
        )
        pruned = await self._pruner.prune(criteria)
        if pruned.runs or pruned.outputs or pruned.damaged_runs:
            log.info(
                "retention: %d runs and %d outputs deleted, %d bytes; %d runs are damaged and stay",
                pruned.runs,
                pruned.outputs,
                pruned.bytes,
                pruned.damaged_runs,
            )

    def _before_ms(self, age_s: float) -> int:
        """What ended before that time is older than `age_s`; where that is before 1970, nothing is."""
        now_ms = self._clock.now_ms()
        return now_ms - round(min(age_s * 1000, now_ms))

    def _looked(self) -> _Look:
        return _Look(self._clock.now_ms(), self._clock.monotonic())

    def _clocks_agree(self) -> bool:
        before, self._look = self._look, self._looked()
        went_ms = self._look.wall_ms - before.wall_ms
        jumped_ms = went_ms - (self._look.monotonic_s - before.monotonic_s) * 1000
        if self._settings.retention_age_s is None or abs(jumped_ms) <= CLOCKS_AGREE_MS:
            return True
        self._counters.retention_skips += 1
        log.warning(
            "retention: the clock has jumped by %.0f s, so nothing is pruned before it has gone right for %.0f s",
            jumped_ms / 1000,
            self._settings.retention_every_s,
        )
        return False
