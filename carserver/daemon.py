"""Builds the daemon, runs it, and ends it: everything is constructed here, and nothing is decided."""

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import uvloop

from carserver import __version__
from carserver.config import Settings
from carserver.core.actionturns import ActionTurns
from carserver.core.approvals import Approvals
from carserver.core.counters import Counters
from carserver.core.handlestore import HandleStore
from carserver.core.hostboard import Board
from carserver.core.outputstore import OutputStore
from carserver.core.principals import Principal, Secrets, principal_of_token
from carserver.core.prune import Pruner
from carserver.core.retention import Retention
from carserver.core.runstore import RunStore
from carserver.core.submissions import Proposals
from carserver.core.toolbox import Toolbox
from carserver.core.toolrecord import Recorders
from carserver.core.toolstream import ToolStreams
from carserver.front.binding import LOOPBACK_OF, CannotListen, bind, url_of
from carserver.front.front import Entrances, Front
from carserver.front.handshake import Policy, policy_of
from carserver.front.notify import READY, STOPPING, notify
from carserver.front.pages import Pages
from carserver.front.stdio import Stdio
from carserver.front.unix import UnixError, listen
from carserver.gauges import Gauges, Measured, gauges
from carserver.hooks import InstalledHooks
from carserver.hosts.process import Processes, ProcessTool
from carserver.hosts.toolsfile import Declared, ToolsFileError, read_tools
from carserver.loop import LoopClock, LoopSignal, new_handle, new_output_id
from carserver.methods.served import METHOD_MODULES
from carserver.protocol.codec import encode
from carserver.protocol.handshake import ServerSchema
from carserver.protocol.host import HostIdentity
from carserver.protocol.server import BackedUp, Counts, OutboxDepths, ServerStatus
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.method import Table
from carserver.rpc.openrpc import car_schema, document
from carserver.rpc.session import Services
from carserver.stores.files import FilePool, FileRoot, FileRootError
from carserver.stores.folder import FolderError, StateFolder, default_state_dir
from carserver.stores.schema import StorageError
from carserver.stores.sqlite import SqliteStore

log = logging.getLogger("carserver")

DATABASE = "carserver.db"
_TOOL_DESCRIPTORS = 4  # two pipes, a control socket, and one on its way
_OTHER_DESCRIPTORS = 64  # files, pipes and what libraries open
_POLL_S = 0.02  # between two looks at what the drain waits for
_GC_THRESHOLDS = (50_000, 20, 50)  # a large message makes that many objects, none of them garbage
_LAST_SHARE = 1 / 8  # of the drain's time: for storage to close, when peers that do not read took all the rest
_HEARTBEAT_S = 0.25  # between two looks at how late the loop is


class StartError(Exception):
    """The daemon cannot start; the message is one line that says why and what to do."""


def run(settings: Settings) -> int:
    """Runs the daemon until it is told to stop; its exit code.

    Raises:
        StartError: a taken port or path, a closed standard stream, a method module that cannot be used, storage that
            cannot be opened.
        FolderError: the state folder is held by another daemon, or is not fit to be used.
    """
    stdio = _stdio() if settings.stdio else None  # before anything else might print, or read
    descriptors = _raise_descriptor_limit(settings)
    folder = StateFolder(Path(settings.state_dir) if settings.state_dir else default_state_dir())
    folder.lock()
    folder.remove_endpoint()  # of a daemon that was killed: somebody else may listen there by now
    try:
        with _database_folder(settings, folder) as database_folder:
            table = _table(settings)
            tools_ = _tools(settings)
            with _entrances(settings, stdio) as entrances:
                secrets = folder.secrets(settings)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    return runner.run(
                        _serve(settings, folder, secrets, database_folder, table, entrances, tools_, descriptors)
                    )
    finally:
        folder.unlock()


def _raise_descriptor_limit(settings: Settings) -> int:
    """The usual limit of 1,024 descriptors is not enough for `connections`; most systems let a process ask for more.

    Returns what it was: programs that are started have that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.connections + settings.processes * _TOOL_DESCRIPTORS + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if allowed < wanted:
            log.warning("only %d descriptors are allowed (ulimit -n): fewer connections and tools than set", allowed)
    return soft


async def _serve(
    settings: Settings,
    folder: StateFolder,
    secrets: Secrets,
    database_folder: Path,
    table: Table,
    entrances: Entrances,
    tools_: Sequence[Declared],
    descriptors: int,
) -> int:
    authority = Authority(secrets)
    try:
        policy = policy_of(settings, authority.principal_of)
        file_root = _file_root(settings, folder.path, database_folder)
        database = database_folder / DATABASE
        daemon = Daemon(settings, authority, policy, database, table, file_root, tools_, descriptors)
    except (StorageError, FileRootError, ValueError) as error:
        raise StartError(str(error)) from None
    return await daemon.serve(entrances, folder)


def _file_root(settings: Settings, *apart: Path) -> FileRoot | None:
    return FileRoot(Path(settings.file_root).expanduser(), settings.file_bytes, apart) if settings.file_root else None


@contextlib.contextmanager
def _database_folder(settings: Settings, folder: StateFolder) -> Iterator[Path]:
    """Where the database is: the state folder; in memory, for `--durability memory`, and gone at exit."""
    if settings.durability != "memory":
        yield folder.path
        return
    memory = Path("/dev/shm")  # noqa: S108 - what is made there is 0700 and has a name of its own
    state = folder.path.stat()
    prefix = f"carserver-{state.st_dev:x}-{state.st_ino:x}-"
    for left in memory.glob(f"{prefix}*"):  # by a daemon of this folder that was killed: we hold its lock now
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=memory))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _table(settings: Settings) -> Table:
    if settings.methods and os.getcwd() not in sys.path:  # noqa: PTH109 - as `python -m` has it
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    modules = list(METHOD_MODULES)
    for name in settings.methods:
        try:
            modules.append(importlib.import_module(name))
        except Exception as error:
            raise StartError(f"--methods {name}: cannot import it: {error!r}") from error
    try:
        return Table.of(modules)
    except TypeError as error:
        raise StartError(f"--methods: {error}") from error


def _tools(settings: Settings) -> list[Declared]:
    if not settings.tools:
        return []
    try:
        return read_tools(Path(settings.tools).expanduser(), settings)
    except ToolsFileError as error:
        raise StartError(f"--tools: {error}") from None


def _stdio() -> Stdio:
    try:
        return Stdio()
    except OSError as error:
        raise StartError(f"--stdio: standard input, output or error is closed: {error.strerror}") from None


@contextlib.contextmanager
def _entrances(settings: Settings, stdio: Stdio | None) -> Iterator[Entrances]:
    """Where peers come in. The file of the Unix socket is gone afterwards."""
    with contextlib.ExitStack() as stack:
        unix = None
        try:
            if settings.unix:
                unix = stack.enter_context(listen(Path(settings.unix).expanduser(), settings.backlog))
            tcp = bind(settings)
        except (UnixError, CannotListen) as error:
            raise StartError(str(error)) from None
        yield Entrances(tcp, unix, stdio)


class Authority:
    """Implements `rpc.session.Authority` with the secrets of the state folder."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    def principal_of(self, token: str) -> Principal | None:
        """Who holds the token."""
        return principal_of_token(self._secrets, token)


class Daemon:
    """One daemon; implements `rpc.session.Daemon`. Made on a running loop."""

    def __init__(
        self,
        settings: Settings,
        authority: Authority,
        policy: Policy,
        database: Path,
        table: Table,
        file_root: FileRoot | None = None,
        tools_: Sequence[Declared] = (),
        descriptors: int = 1024,
    ) -> None:
        self._settings = settings
        self.table = table
        self.boot_id = self.new_id()
        self.draining = False
        self._exit_code = 0
        self._signals = 0
        self._stopping = asyncio.Event()
        self._lag_s = 0.0
        self._document = b""
        self.counters = Counters()
        self.clock = LoopClock()
        self._started_s = self.clock.monotonic()
        self.store = SqliteStore(database, self.boot_id, settings, self.counters, self._storage_is_lost)
        self.hooks = InstalledHooks(settings, self.counters)
        self.runs = RunStore(self.store, self.clock, settings, self.counters, self.hooks)
        self.store.on_commit(self.runs.committed)
        self.files = None if file_root is None else FilePool(file_root, settings, self.counters)
        outputs_ = OutputStore(self.store, self.files, new_output_id, self.clock.now_ms, settings, self.counters)
        pruner = Pruner(self.store, settings, self.counters, lambda: self.draining)
        self.retention = Retention(pruner, self.clock, settings, self.counters)
        self.processes = Processes(settings, self.counters, os.environ, descriptors)
        toolbox_ = Toolbox(settings)
        for declared in tools_:
            host = ProcessTool(declared.spec, self.processes)
            toolbox_.declare(declared.definition, host, declared.spec.timeout_ms)
        self._has_processes = bool(tools_)
        streams = ToolStreams(self.clock.call_later, settings, self.counters)
        self.recorders = Recorders(self.store, self.clock, settings, self.counters)
        self.tools = HandleStore(
            self.runs,
            outputs_,
            toolbox_,
            self.recorders,
            streams,
            self.clock,
            settings,
            self.counters,
            new_handle,
            LoopSignal,
            self.hooks,
        )
        proposals_ = Proposals(
            *(self.tools, outputs_, ActionTurns(self.runs, self.clock, settings), self.clock, settings, self.counters),
            *(new_handle, LoopSignal, lambda: self.draining),
        )
        identity = HostIdentity(version=__version__, pid=os.getpid())
        board = Board(identity, self.clock, self.new_id, settings, self.counters)
        approvals = Approvals(self.store, board, settings, self.counters, self.store.found_approvals)
        self.store.on_commit(approvals.committed)
        services = Services(
            runs=self.runs,
            outputs=outputs_,
            pruner=pruner,
            tools=self.tools,
            toolbox=toolbox_,
            proposals=proposals_,
            host=board,
            approvals=approvals,
            daemon=self,
            authority=authority,
            clock=self.clock,
            counters=self.counters,
            settings=settings,
        )
        pages = Pages(self._problem, self._metrics, self.discover)
        self.front = Front(services, Dispatcher(table, services), policy, pages.answer)
        self._measured = Measured(
            self.front, services, self.recorders, self.processes, self.files, self.hooks, self.store
        )

    async def serve(self, entrances: Entrances, folder: StateFolder) -> int:
        """Listens, says so, and works until a signal, or the end of standard input; the exit code."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._defect)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        await self.front.listen(entrances, self._parent_has_ended)
        self.runs.found_live(self.store.found_live, self.store.old_boot_id or "unknown")
        self.recorders.finish_open(self.store.found_open, "the daemon was restarted while the tool ran")
        host, port = entrances.tcp.getsockname()[:2]
        url = url_of(host, port)
        self._tell_endpoint(folder, url_of(LOOPBACK_OF.get(host, host), port))
        self.retention.start()
        self._beat()
        gc.freeze()  # what is there now stays: the collector need not look at it again
        gc.set_threshold(*_GC_THRESHOLDS)
        gc.enable()
        log.info("carserver %s is ready at %s", __version__, url, extra={"boot_id": self.boot_id})
        announced = sys.stderr if entrances.stdio else sys.stdout
        announced.write(f"listening on {url}\n")
        announced.flush()
        notify(READY, f"listening on {url}")
        self.hooks.start()
        if self._has_processes:
            self._start_keeper()
        await self._stopping.wait()
        try:
            await self._drain(folder)
        finally:
            folder.remove_endpoint()
        return self._exit_code

    def _start_keeper(self) -> None:
        """Early, so that the first tool need not wait for it."""
        try:
            self.processes.start()
        except OSError as error:
            log.warning("the keeper of process tools cannot be started (%s); a tool tries it again", error.strerror)

    def _tell_endpoint(self, folder: StateFolder, url: str, *, again: bool = False) -> None:
        """Tells the commands where this daemon listens; on a full disk, as soon as there is room."""
        if self.draining:
            return
        try:
            folder.write_endpoint(url, os.getpid(), self.boot_id)
        except FolderError as error:
            if not again:
                log.warning(
                    "endpoint.json has to wait (%s): until there is room, the commands need --url %s", error, url
                )
            self.clock.call_later(self._settings.probe_s, lambda: self._tell_endpoint(folder, url, again=True))

    def _signalled(self) -> None:
        if self._signals:
            log.warning("second signal: exiting at once")
            os._exit(1)
        self._signals += 1
        log.info("draining: what is under way has %g s", self._settings.drain_s)
        self._stopping.set()

    def _parent_has_ended(self) -> None:
        """Standard input has ended, or nobody reads standard output."""
        if not self._stopping.is_set():
            log.info("the parent has ended: draining")
            self._stopping.set()

    def _defect(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception that nobody waited for."""
        self.counters.internal_errors += 1
        log.error("defect: %s", context.get("message"), exc_info=context.get("exception"))

    def _storage_is_lost(self, why: str) -> None:
        """Nothing can be acknowledged any more; what waits is answered, then the daemon exits."""
        log.critical("fsync failed (%s): what is on disk is unknown, so the daemon stops", why)
        self._exit_code = 1
        self._stopping.set()

    async def _drain(self, folder: StateFolder) -> None:
        """New work is refused, what is under way is finished, every peer is told: within `drain_s`."""
        self.draining = True
        notify(STOPPING, "draining")
        deadline = self.clock.monotonic() + self._settings.drain_s
        self.front.stop_listening()
        self.front.announce_drain()
        self.store.give_up_backup("the daemon drains")
        self.tools.cancel_all(None, "the daemon stops")
        # Half of the time is for the requests, and for hosts to confirm; the rest for the peers to take their answers.
        front, half = self.front, deadline - self._settings.drain_s / 2
        await self._until(lambda: not front.in_flight() and not front.asked_of_hosts(), half)
        self.front.close_all()
        last_s = self._settings.drain_s * _LAST_SHARE
        await self._until(lambda: self.front.all_gone, deadline - last_s)
        self.front.abort_all()
        await self._until(lambda: not self.tools.running and not len(self.recorders), deadline - last_s)
        await self.processes.close(last_s)
        if self.files:
            self.files.close()
        if not await self.store.close(max(deadline - self.clock.monotonic(), last_s)):
            log.error("storage did not come to an end within drain_s: exiting without it; nothing acknowledged is lost")
            folder.remove_endpoint()
            os._exit(self._exit_code or 1)
        await self._until(lambda: self.hooks.idle, deadline)
        self.hooks.close()

    async def _until(self, done: Callable[[], bool], deadline: float) -> None:
        while not done() and self.clock.monotonic() < deadline:  # noqa: ASYNC110 - it depends on every connection, and
            # fifty looks a second at the very end are simpler than an event that each of them would have to keep
            await asyncio.sleep(_POLL_S)

    def _beat(self) -> None:
        """Sees how late the loop is."""
        due = self.clock.monotonic() + _HEARTBEAT_S

        def beat() -> None:
            self._lag_s = max(self._lag_s, self.clock.monotonic() - due)
            self._beat()

        self.clock.call_later(_HEARTBEAT_S, beat)

    # rpc.session.Daemon.

    def status(self) -> ServerStatus:
        """The daemon at a glance."""
        total, largest = self.front.unsent()
        return ServerStatus(
            version=__version__,
            boot_id=self.boot_id,
            uptime_ms=round((self.clock.monotonic() - self._started_s) * 1000),
            draining=self.draining,
            counts=Counts(
                connections=len(self.front.connections),
                subscriptions=self.runs.hub.subscriptions,
                attended_runs=self.runs.attendance.attended_runs(),
            ),
            outboxes=OutboxDepths(total_bytes=total, largest_bytes=largest),
            storage=self.store.status(),
        )

    def discover(self) -> bytes:
        """The OpenRPC document."""
        self._document = self._document or encode(document(self.table, __version__))
        return self._document

    @cached_property
    def car_schema(self) -> ServerSchema:
        """Of that document, the CAR dialect."""
        return car_schema(document(self.table, __version__), __version__)

    def new_id(self) -> str:
        """A random UUID."""
        return str(uuid.uuid4())

    async def backup(self, path: str) -> BackedUp:
        """A copy of the database."""
        return await self.store.backup(path)

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)

    # Pages.

    def _problem(self) -> str | None:
        return "draining" if self.draining else self.store.problem

    def _metrics(self) -> tuple[bytes, str]:
        # Imported at the first scrape: it takes as long as all the rest of the start together.
        from carserver.front.metrics import Metrics  # noqa: PLC0415

        return Metrics(self.counters, self._gauges).text()

    def _gauges(self) -> Gauges:
        lag, self._lag_s = self._lag_s, 0.0
        return gauges(self._measured, lag)
