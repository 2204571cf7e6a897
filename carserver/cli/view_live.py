"""The live view of a run: reads its trace as fast as it comes, and paints what there is some ten times a second.

Painting never holds back reading: a frame is made on the loop in a few milliseconds, and written in a thread, so that a
terminal that is slow, or stopped, delays the next frame and nothing else.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol

from rich.text import Text

from carserver.cli.talk import ANSWER_S
from carserver.cli.trace import note_position
from carserver.cli.view import ansi, record, screen
from carserver.cli.view_model import RunModel
from carserver.cli.view_screen import Screen
from carserver.client import ClientError, Connection, Pauses, Traced
from carserver.client.trace import PATIENCE_S, Opener, trace
from carserver.protocol.runs import LIVE, Snapshot, Status

TAIL_EVENTS = (
    100_000  # of a longer log only these are read, unless a cursor is given: it is there within a second or so
)
_FRAME_S = 0.1
_IDLE_FRAMES = 2  # a frame in so many is painted where nothing is new but the time
_SHARE = 4  # making frames takes at most this part of the time, however slow the machine is
_ENDED_S = 0.5  # a run that is over is read without a screen, unless that takes longer
_LOOK_AGAIN_S = 2.0  # whether an interrupted run goes on


class View(Protocol):
    """What is painted."""

    @property
    def changes(self) -> int:
        """Grows when there is something new to be seen."""

    def draw(self, width: int, height: int, now_ms: int) -> list[Text]:
        """At most `height` lines of at most `width` cells."""


# ------------------------------------------------------------------------------------------------------------ painting


async def shown(display: Screen, view: View, work: Coroutine[Any, Any, None], *, after_s: float = 0.0) -> None:
    """Paints `view` until `work` is done, or is cancelled by Ctrl-C or TERM; the terminal is given back in any case.

    Args:
        display: the terminal, closed.
        view: what to paint.
        work: what changes it.
        after_s: the screen is not taken where `work` is done sooner, seconds.
    """
    worker = asyncio.create_task(work, name="carserver view: reading")
    painter = asyncio.create_task(_paint(display, view, after_s), name="carserver view: painting")
    try:
        await asyncio.wait({worker, painter}, return_when=asyncio.FIRST_COMPLETED)
        for task in (painter, worker):
            if task.done():
                task.result()
    finally:
        worker.cancel()
        painter.cancel()
        await asyncio.gather(worker, painter, return_exceptions=True)
        display.close()


async def _paint(display: Screen, view: View, after_s: float) -> None:
    await asyncio.sleep(after_s)
    display.open()
    painted = (-1, (0, 0))
    frame = 0
    while True:
        frame += 1
        began = time.monotonic()
        state = (view.changes, display.size)
        if state != painted or frame % _IDLE_FRAMES == 0:
            painted = state
            columns, lines = state[1]
            picture = ansi(view.draw(columns, lines, now_ms()))
            drawn = time.monotonic()
            await asyncio.to_thread(display.show, picture, state[1])
            await asyncio.sleep(max(_FRAME_S, _SHARE * (drawn - began)))
        else:
            await asyncio.sleep(_FRAME_S)


@contextmanager
def giving_back(display: Screen) -> Iterator[None]:
    """TERM ends the block as Ctrl-C does, then the process; Ctrl-Z gives the terminal back for as long as it lasts."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        if task is not None:
            task.cancel()

    def pause() -> None:
        was_open = display.is_open
        display.close()
        os.kill(os.getpid(), signal.SIGSTOP)  # and here it goes on
        if was_open:
            display.open()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGTSTP, pause)
    try:
        yield
    except asyncio.CancelledError:
        if not terminated:
            raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGTSTP)
    if terminated:
        os.kill(os.getpid(), signal.SIGTERM)


def print_lines(lines: list[Text]) -> None:
    """Lines that stay in the terminal."""
    sys.stdout.write("".join(f"{line}\n" for line in ansi(lines)))
    sys.stdout.flush()


def now_ms() -> int:
    """The time, as events have it."""
    return time.time_ns() // 1_000_000


# ----------------------------------------------------------------------------------------------------------- the trace


async def follow_live(open_connection: Opener, run_id: str, *, cursor: int | None, epoch: str | None) -> None:
    """Shows a run until it has ended, and leaves a record of it in the terminal.

    Args:
        open_connection: as for `trace`.
        run_id: the run.
        cursor: where to begin; None: at the beginning, of a long log at its last TAIL_EVENTS.
        epoch: the log that `cursor` counts in.

    Raises:
        ClientError: as `trace`; what was seen has been printed, and how to go on.
    """
    link = Link(open_connection)
    run = await link.snapshot(run_id)
    if cursor is None and run.event_count > TAIL_EVENTS:
        cursor, epoch = run.event_count - TAIL_EVENTS, run.epoch
    view = RunView(link, run, cursor or 0, epoch)
    display = Screen()
    with giving_back(display):
        try:
            await shown(display, view, view.follow(), after_s=0.0 if run.status in LIVE else _ENDED_S)
        except ClientError as error:
            note_position(view.last, error)
            raise
        finally:
            if view.last is not None:
                print_lines(record(view.model, display.size[0], now_ms()))


class Link:
    """Connections to the daemon, and whether there is one."""

    def __init__(self, open_connection: Opener) -> None:
        self._open = open_connection
        self.up = True

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """One more connection; as an `Opener`."""
        try:
            async with self._open() as connection:
                self.up = True
                yield connection
        finally:
            self.up = False

    async def snapshot(self, run_id: str) -> Snapshot:
        """The run as it is now."""
        async with self.connection() as connection:
            run = await connection.call("runs.get", {"run_id": run_id}, ANSWER_S, result_type=Snapshot)
        self.up = True
        return run


class RunView:
    """One run on the screen: its model, and how it is read."""

    def __init__(self, link: Link, run: Snapshot, cursor: int, epoch: str | None) -> None:
        self.model = RunModel(run, first=cursor)
        self.last: Traced | None = None
        self._link = link
        self._cursor = cursor
        self._epoch = epoch
        self._was_over = run.status not in LIVE

    @property
    def changes(self) -> int:
        """Grows with every record."""
        return self.model.changes

    def draw(self, width: int, height: int, now_ms: int) -> list[Text]:
        """The view of the run."""
        return screen(self.model, width, height, now_ms, self._trouble())

    async def follow(self) -> None:
        """Takes in all there is, until the run is over for good; one that was over already is read once."""
        model = self.model
        while True:
            records = trace(self._link.connection, model.run_id, cursor=self._cursor, epoch=self._epoch)
            async with aclosing(records):
                async for traced in records:
                    self.last = traced
                    model.take(traced)
                    self._cursor, self._epoch = traced.cursor, traced.epoch
            with suppress(ClientError):  # its reason would be missing, nothing else
                model.settle(await self._link.snapshot(model.run_id))
            if self._was_over or model.status != Status.INTERRUPTED:
                return
            run = await self._until_it_goes_on()
            if run.status in LIVE:
                model.resume(run)

    async def _until_it_goes_on(self) -> Snapshot:
        pauses = Pauses(PATIENCE_S)
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            try:
                run = await self._link.snapshot(self.model.run_id)
            except ClientError as error:
                if not error.passing or not await pauses.pause():
                    raise
                continue
            pauses.reset()
            if run.status is not Status.INTERRUPTED or run.event_count > self._cursor:
                return run

    def _trouble(self) -> str:
        if not self._link.up:
            return "connection lost, trying again"
        if self.model.over and self.model.status == Status.INTERRUPTED:
            return "interrupted: it goes on when its owner comes back; Ctrl-C ends the view"
        return ""
