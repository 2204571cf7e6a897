"""Runs the tools that the tools file declares: the daemon's side of the keeper, and what the core sees of all this.

The daemon starts no command itself. It makes the pipes, and hands them to the keeper (`hosts.keeper`), a small process
with nothing in it that a command could inherit; `hosts.running` has what becomes of one execution.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.execution import Call, Execution, Feed
from carserver.hosts.packets import LOST, PACKET_BYTES, START, packet, plan, read_packet
from carserver.hosts.running import KEEPER_DIED, Running
from carserver.hosts.spec import BadArgument, ProcessSpec
from carserver.protocol.errors import RpcError, invalid_params, overloaded, unavailable
from carserver.protocol.tools import ErrorChunk

log = logging.getLogger("carserver")

_KEEPER = "import sys; sys.path.append(sys.argv[1]); from carserver.hosts.keeper import main; main(*sys.argv[2:])"
_ROOT = Path(__file__).parents[2]  # where the package lies
_KEEPERS_VARIABLES = ("LD_LIBRARY_PATH",)  # without which some interpreters do not start
_STEADY_S = 10.0  # a keeper that lived so long did not die of how it was started
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0  # before the third keeper in a row, and before any
_POLL_S = 0.005  # between two looks at a keeper that is ending
_LAST_SHARE = 1 / 4  # of the time to close in: for what did not end by then to be killed


class ProcessTool:
    """One tool of the tools file; implements `core.execution.ToolHost`."""

    def __init__(self, spec: ProcessSpec, processes: "Processes") -> None:
        self._spec = spec
        self._processes = processes

    def refuses(self, call: Call, *, admitted: bool = False) -> RpcError | None:
        try:
            self._spec.argv(call.parameters)
        except BadArgument as error:
            return invalid_params(f"parameters.{error.name}", error.message)
        return self._processes.refuses()

    def start(self, call: Call, feed: Feed) -> Execution:
        return self._processes.run(self._spec, call, feed)


class _NotStarted:
    """What could not be started has nothing to stop; implements `core.execution.Execution`."""

    def stop(self, reason: str) -> None:
        pass


class _Waiting(NamedTuple):
    """A message for the keeper, and the descriptors that go with it."""

    message: bytes
    descriptors: tuple[int, ...]

    def close(self) -> None:
        _close(self.descriptors)


class Processes:
    """All executions of process tools, and their keeper. Used on one running loop; to be closed.

    Args:
        settings: `processes` is how many may run at once; the durations.
        counters: `tool_…`, `keepers_replaced`.
        environment: The daemon's, of which each tool has what it may have.
        descriptors: The soft limit of descriptors that a command gets: the daemon's own before it raised it.
    """

    def __init__(
        self, settings: Settings, counters: Counters, environment: Mapping[str, str], descriptors: int
    ) -> None:
        self.settings = settings
        self.counters = counters
        self._environment = environment
        self._descriptors = descriptors
        self._running: dict[int, Running] = {}
        self._numbers = 0
        self._keeper: _Keeper | None = None
        self._ending: list[subprocess.Popen[bytes]] = []  # keepers that died, until they are waited for
        self._deaths = 0  # of keepers, in a row
        self._died_s = 0.0
        self._is_closing = False

    @property
    def live(self) -> int:
        """Executions of which something lives, or might."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Starts that the keeper has not been told of: its socket is full."""
        return len(self._keeper.waiting) if self._keeper else 0

    def refuses(self) -> RpcError | None:
        """Why nothing can be started now; None if it can."""
        if sys.platform != "linux":
            return unavailable("process tools need Linux")
        if self._is_closing:
            return unavailable("the daemon is ending")
        if self.live >= self.settings.processes:
            words = f"{self.live} process tools run, and more may not at once (processes)"
            return overloaded(words, self.settings.retry_after_ms)
        if self._keeper is None and (pause_s := self._pause_s()) > 0:
            words = f"{KEEPER_DIED} {self._deaths} times in a row: it is started again in {pause_s:.1f} s"
            return overloaded(words, max(round(pause_s * 1000), 1))
        return None

    def start(self) -> "_Keeper":
        """Starts the keeper, unless it is there; called early, the first tool need not wait for it.

        Raises:
            OSError: it cannot be started.
        """
        if self._keeper is None:
            self._keeper = _Keeper(self, self._environment, self._descriptors)
            self.counters.keepers_replaced += self._deaths > 0
        return self._keeper

    def run(self, spec: ProcessSpec, call: Call, feed: Feed) -> Execution:
        """Starts a command; never raises."""
        try:
            argv = spec.argv(call.parameters)
            environment = spec.environment(self._environment)
            planned = plan(
                [os.fsencode(argument) for argument in argv],
                os.fsencode(spec.cwd),
                [os.fsencode(f"{name}={value}") for name, value in environment.items()],
            )
            return self._start(spec, argv[0], planned, feed)
        except OSError as error:
            why = f"{error.strerror}"
        except ValueError as error:
            why = str(error)

        def tell() -> None:
            feed.take(ErrorChunk(message=f"cannot start: {why}"))
            feed.gone()

        asyncio.get_running_loop().call_soon(tell)  # not before the caller has what it started
        return _NotStarted()

    def _start(self, spec: ProcessSpec, program: str, planned: bytes, feed: Feed) -> Running:
        keeper = self.start()
        with ExitStack() as undone:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undone.callback(control.close)
            sent = [theirs.detach()]
            undone.callback(lambda: _close(sent))
            ours = []
            for _ in range(2):
                reading, writing = os.pipe()
                undone.callback(os.close, reading)
                os.set_blocking(reading, False)
                ours.append(reading)
                sent.append(writing)
            sent.append(_in_memory(planned))
            control.setblocking(False)
            undone.pop_all()
        self._numbers += 1
        running = Running(self._numbers, spec, program, feed, self, (control, ours[0], ours[1]))
        self._running[self._numbers] = running
        keeper.send(_Waiting(packet(START, self._numbers), tuple(sent)))
        return running

    async def close(self, within_s: float) -> None:
        """Ends the keeper, and with it everything that has not ended by itself until then. Nothing starts any more."""
        self._is_closing = True
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        await _until(lambda: not self._running, deadline_s - within_s * _LAST_SHARE)
        if self._running:
            log.warning("%d process tools have not ended: they are killed", self.live)
        if self._keeper:
            self._ending.append(self._keeper.let_go())  # it ends when nothing of them lives
            self._keeper = None
        await _until(lambda: not self._running, deadline_s)
        for running in list(self._running.values()):
            running.let_go()
        await _until(lambda: not self._are_ending(), deadline_s)
        if self._ending:
            log.error("something of a process tool does not end: its keeper is left behind")

    # For the executions: `hosts.running.Pool`.

    def tell(self, message: bytes) -> None:
        if self._keeper:
            self._keeper.send(_Waiting(message, ()))

    def closed(self, number: int) -> None:
        self._running.pop(number, None)

    # For the keeper.

    def heard(self, message: bytes) -> None:
        """The keeper says something."""
        word, number, _ = read_packet(message)
        if word == LOST and (running := self._running.get(number)):
            running.lost()

    def keeper_died(self) -> None:
        """Its end of the socket has closed."""
        if self._keeper is None:
            return
        lived_s = self._keeper.lived_s
        self._ending.append(self._keeper.let_go())
        self._ending[-1].kill()  # if it only closed its socket
        self._keeper = None
        self._deaths = 1 if lived_s > _STEADY_S else self._deaths + 1
        self._died_s = asyncio.get_running_loop().time()
        log.error("%s: %d process tools fail", KEEPER_DIED, self.live)
        for running in list(self._running.values()):
            running.keeper_died()
        self._reap_keepers()

    def _pause_s(self) -> float:
        """Before the next keeper is started: none after the first death, then longer each time."""
        if self._deaths < 2:
            return 0.0
        pause_s: float = min(_FIRST_PAUSE_S * 2.0 ** (self._deaths - 2), _LONGEST_PAUSE_S)
        return self._died_s + pause_s - asyncio.get_running_loop().time()

    def _reap_keepers(self) -> None:
        if self._are_ending() and not self._is_closing:
            asyncio.get_running_loop().call_later(_POLL_S, self._reap_keepers)

    def _are_ending(self) -> bool:
        """Waits for keepers that have ended; whether one has not."""
        self._ending = [process for process in self._ending if process.poll() is None]
        return bool(self._ending)


class _Keeper:
    """The keeper's process, and the socket to it."""

    def __init__(self, processes: Processes, environment: Mapping[str, str], descriptors: int) -> None:
        self._processes = processes
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self.waiting: deque[_Waiting] = deque()  # no more than executions, each of which says two things at most
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, ExitStack() as undone:
            undone.callback(self._socket.close)
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, and nothing that anybody said
                [*_interpreter(), "-c", _KEEPER, str(_ROOT), str(theirs.fileno()), str(descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the daemon's may be a peer's; what the keeper says goes to the log
                env={name: environment[name] for name in _KEEPERS_VARIABLES if name in environment},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is for the daemon alone
            )
            undone.pop_all()
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._readable)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def lived_s(self) -> float:
        """For how long it has been there."""
        return self._loop.time() - self._started_s

    def send(self, waiting: _Waiting) -> None:
        """Tells it something, now or when there is room; the descriptors are its own from here on."""
        self.waiting.append(waiting)
        if len(self.waiting) == 1:
            self._write()

    def let_go(self) -> "subprocess.Popen[bytes]":
        """Closes the socket, so that it ends; its process, to be waited for."""
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        while self.waiting:
            self.waiting.popleft().close()
        return self._process

    def _write(self) -> None:
        while self.waiting:
            first = self.waiting[0]
            given = array("i", first.descriptors)
            try:
                self._socket.sendmsg([first.message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)] if given else [])
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._write)
                return
            except ConnectionError:
                self._loop.call_soon(self._readable)  # it has died; not while somebody starts something
                return
            except OSError as error:
                log.error("the keeper of process tools cannot be told: %s", error.strerror)  # noqa: TRY400
                # Closed unsent: the execution sees that nobody has taken it.
            self.waiting.popleft().close()
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                message = self._socket.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it left something unread, which is told first; the loop tells it once, so all is read here
            if not message:
                self._processes.keeper_died()
                return
            self._processes.heard(message)


def _interpreter() -> list[str]:
    """Python by itself, without what is installed; as for bytecode, as the daemon was told by its environment."""
    return [sys.executable, "-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]


async def _until(done: Callable[[], bool], deadline_s: float) -> None:
    while not done() and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110 - at the very end, once
        await asyncio.sleep(_POLL_S)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _in_memory(data: bytes) -> int:
    """A descriptor of an unnamed file in memory that holds this.

    Raises:
        OSError: too many descriptors, or no memory.
    """
    descriptor = os.memfd_create("carserver-tool")
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
