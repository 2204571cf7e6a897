"""Threads that read the database, each call with a connection of its own; they never write and never checkpoint."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from carserver.core.ports import Damaged
from carserver.protocol.errors import RpcError, unavailable
from carserver.stores.damage import Unreadable, in_words, is_damage
from carserver.stores.schema import open_reader

T = TypeVar("T")

log = logging.getLogger("carserver.storage")


class Readers:
    """A pool of `threads`, and as many connections, opened at once: later there may be no descriptors left.

    `damaged` is called in a thread of it with what was found damaged, before its caller is told.
    """

    def __init__(self, path: Path, threads: int, name: str, damaged: Callable[[Damaged], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._connections = [open_reader(path) for _ in range(threads)]
        self._free: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        for connection in self._connections:
            self._free.put(connection)
        self._damaged = damaged
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.waiting = 0

    def read(self, read: Callable[..., T], args: tuple[Any, ...], done: Callable[[T | Exception], None]) -> None:
        """Runs `read(connection, *args)` in a thread; `done` is called later, on the loop, with its result or error."""
        self.waiting += 1

        def work() -> None:
            connection = self._free.get()
            result: T | Exception
            try:
                result = read(connection, *args)
            except Unreadable as error:
                result = _unreadable(error)
                if isinstance(result, Damaged):
                    self._damaged(result)
            except Damaged as error:
                self._damaged(error)
                result = error
            except RpcError as error:
                result = error
            except Exception as error:
                log.exception("a defect in a reader")
                result = error
            finally:
                self._free.put(connection)
            self._loop.call_soon_threadsafe(self._finish, done, result)

        try:
            self._pool.submit(work)
        except RuntimeError as error:  # it is closed, or there can be no thread
            self._loop.call_soon(self._finish, done, unavailable(f"storage cannot be read: {error}"))

    def _finish(self, done: Callable[[T | Exception], None], result: T | Exception) -> None:
        self.waiting -= 1
        done(result)

    def close(self) -> None:
        """Waits for what is being read; what has not begun is given up."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for connection in self._connections:
            connection.close()


def _unreadable(error: Exception) -> RpcError:
    if is_damage(error):
        return Damaged(f"storage is damaged: {in_words(error)}")
    return unavailable(f"storage cannot be read: {error}")
