"""How long to wait before trying again: growing, jittered, and bounded in all."""

import asyncio
import random


class Pauses:
    """The pauses of one effort to get through; `reset` when it got through."""

    def __init__(self, total_s: float, *, first_s: float = 0.1, longest_s: float = 5.0) -> None:
        self._total_s = total_s
        self._first_s = first_s
        self._longest_s = longest_s
        self.reset()

    def reset(self) -> None:
        """Begins anew: the next pause is a short one, and the whole of `total_s` is left."""
        self._next_s = self._first_s
        self._left_s = self._total_s

    async def pause(self, at_least_s: float = 0.0) -> bool:
        """Waits, or answers False at once where the patience is used up.

        Args:
            at_least_s: what the other side asked for (`retry_after_ms`), seconds.
        """
        if self._left_s <= 0:
            return False
        # Full jitter, but never none: many clients of a restarted daemon come back one by one.
        wanted = self._next_s * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, hides nothing
        wait = min(at_least_s + wanted, self._left_s)
        self._left_s -= wait
        self._next_s = min(self._next_s * 2, self._longest_s)
        await asyncio.sleep(wait)
        return True
