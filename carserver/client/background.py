"""An event loop in a thread of its own, for those who have none: they hand it work, and wait for what becomes of it."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """The thread and its loop. Any thread but that one may use it; a daemon thread, it keeps no program from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # what is under way was begun before the loop stopped
        self._under_way: set[Future[Any]] = set()

    @property
    def runs(self) -> bool:
        """Whether it was started, and not stopped."""
        return self._loop is not None

    def start(self) -> None:
        """Starts the thread, and waits until its loop runs.

        Raises:
            RuntimeError: it runs already.
        """
        if self.runs:
            raise RuntimeError("open already")
        ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name=self._name, daemon=True)
        self._thread.start()
        self._loop = ready.result()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of `work`, which is cancelled where the caller is interrupted from the keyboard.

        Raises:
            RuntimeError: the thread is not running, or this is that thread, which would wait for itself.
            Exception: what `work` raises.
        """
        with self._lock:
            if self._loop is None or threading.current_thread() is self._thread:
                work.close()
                why = "not open: use `with connect() as car`" if self._loop is None else "not in the car's own thread"
                raise RuntimeError(why)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._under_way.add(future)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the car was closed meanwhile") from None
        except BaseException:
            future.cancel()  # no more than a no-op where it is done
            raise
        finally:
            with self._lock:
                self._under_way.discard(future)

    def stop(self) -> None:
        """Ends what still runs, the loop and the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
        with self._lock:
            for future in self._under_way:  # that the loop has not even begun
                future.cancel()

    def _serve(self, ready: "Future[asyncio.AbstractEventLoop]") -> None:
        with asyncio.Runner() as runner:  # which at its end cancels the tasks that are left, and waits for them
            try:
                loop = runner.get_loop()
            except BaseException as error:  # noqa: BLE001 - no file descriptors: who started this waits to hear of it
                ready.set_exception(error)
                return
            asyncio.set_event_loop(loop)
            ready.set_result(loop)
            loop.run_forever()
