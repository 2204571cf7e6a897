"""The handles, as methods use them: invoked, polled, stopped, and forgotten.

Nothing starts before what must be durable is: an idempotency key, and `tool_start` in the run's log. That goes on by
itself once it has begun (`_open`), so an invocation with a key is not lost with the connection that made it. What a
handle goes through then is `core.life`; here is who may see it, and how long it is kept (contract, section 6).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Raw, UnsetType

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.callers import Callers
from carserver.core.counters import Counters
from carserver.core.edits import UsedKey
from carserver.core.execution import Call, ToolHost
from carserver.core.finished import Finished
from carserver.core.handleedits import Open, Opened
from carserver.core.handles import Handle, Polled, Signal
from carserver.core.life import Around, Life
from carserver.core.outputstore import OutputStore
from carserver.core.ports import Hooks
from carserver.core.principals import Principal
from carserver.core.runstore import Clock, RunStore
from carserver.core.toolbox import Entry, Toolbox
from carserver.core.toolrecord import Recorders, tool_start
from carserver.core.toolstream import ToolStreams
from carserver.protocol.errors import ErrorKind, RpcError, conflict, limit_exceeded, not_found

RUN_OVER = "its run is over"
CALLER_GONE = "the connection that called it has ended"
NOT_STORED = "storage did not answer in time"

Cancel = Callable[[str], object]
"""Cancels a handle, for a reason in words, unless it has ended."""
Key = tuple[str, str, str]
"""An idempotency key, with the principal and the method that it belongs to."""


class Order(NamedTuple):
    """An invocation, as it was asked for by the method `method`."""

    method: str
    tool: str
    parameters: Raw | UnsetType = UNSET
    action_id: str = ""
    run_id: str | None = None
    timeout_ms: int | None = None
    key: str | None = None
    attempt: int = 1

    def digest(self) -> bytes:
        """Of what was said; what means the same is the same, however it was spaced and ordered."""
        parameters = {} if isinstance(self.parameters, UnsetType) else msgspec.json.decode(self.parameters)
        said = [self.tool, parameters, self.action_id, self.run_id, self.timeout_ms]
        return hashlib.sha256(msgspec.json.encode(said, order="sorted")).digest()


class Invoker(Attendant, Protocol):
    """A connection that invokes tools."""

    @property
    def hosting(self) -> ToolHost | None:
        """What runs the tools that it hosts itself, if it does."""
        ...

    @property
    def hosts_for_itself(self) -> bool:
        """Whether the names of these are its own affair, and nobody else's tools of that kind are for it."""
        ...


class _Opening:
    """An invocation on its way to storage. Whoever comes with the same key meanwhile waits for the same one."""

    def __init__(self, life: Life, digest: bytes) -> None:
        self.life = life
        self.digest = digest
        self.outcome: Life | Exception | None = None
        self.waiting: list[Signal] = []


class HandleStore:
    """All handles.

    Args:
        runs: Whose logs they are recorded in, and who attends these.
        outputs: Where large results go.
        toolbox: The tools.
        recorders: What records.
        streams: The live streams.
        clock: Time, timers.
        settings: The bounds.
        counters: What is counted.
        new_handle: 32 hex characters, of a cryptographic source.
        new_signal: Something to wait for.
        hooks: What else is told of handles.
    """

    def __init__(
        self,
        runs: RunStore,
        outputs: OutputStore,
        toolbox: Toolbox,
        recorders: Recorders,
        streams: ToolStreams,
        clock: Clock,
        settings: Settings,
        counters: Counters,
        new_handle: Callable[[], str],
        new_signal: Callable[[], Signal],
        hooks: Hooks | None = None,
    ) -> None:
        self.streams = streams
        self._runs = runs
        self._toolbox = toolbox
        self._recorders = recorders
        self._clock = clock
        self._settings = settings
        self._counters = counters
        self._new_handle = new_handle
        self._new_signal = new_signal
        self._hooks = hooks
        self._around = Around(
            settings=settings,
            counters=counters,
            clock=clock,
            streams=streams,
            outputs=outputs,
            started=self._started,
            ended=self._ended,
            settled=self._settled,
        )
        self._lives: dict[str, Life] = {}
        self._live: dict[str, dict[str, Life]] = {}  # of each principal, those that have not ended
        self._running = 0  # executions that were started, and are not known to be gone
        self._of_runs: dict[str, dict[str, Life]] = {}  # the live ones
        self._stopping: dict[str | None, list[Handle]] = {}  # of runs: what is stopped, or lost, and not known as gone
        self._openings: dict[Key, _Opening] = {}
        self._keys: dict[Key, tuple[bytes, str]] = {}
        self._key_of: dict[str, Key] = {}
        self._finished = Finished(settings, clock.monotonic, clock.call_later, self._crowded_out)
        self.callers = Callers(runs.attendance, self._is_live, clock, settings, counters)
        runs.on_over(self._run_is_over)

    # Figures.

    @property
    def live(self) -> int:
        """Handles that have not ended."""
        return sum(len(lives) for lives in self._live.values())

    @property
    def running(self) -> int:
        """Tools that run, as far as is known: those of handles that were stopped, too."""
        return self._running

    @property
    def finished(self) -> Finished:
        """Handles that have ended."""
        return self._finished

    # Invoking.

    async def invoke(
        self, order: Order, principal: Principal, by: Invoker, begun: Callable[[Cancel], None] = lambda _: None
    ) -> Handle:
        """Starts a tool, once what has to be durable is; or gives the handle that the same key has made before.

        `begun` is called with what cancels a new one, as soon as there is something to cancel: before it is durable.

        Raises:
            RpcError: not_found (tool, run), forbidden, conflict, invalid_params, limit_exceeded, overloaded; what
                storage raises. With deadline_exceeded the same key leads to the handle, if there is one.
        """
        key = None if order.key is None else (principal.name, order.method, order.key)
        digest = b"" if key is None else order.digest()
        known = None if key is None else self._known(key, digest)
        if isinstance(known, _Opening):
            return await self._opened(known, order, by)
        if known is not None:
            self.callers.attach(known, by)
            return known.handle
        entry, call = self._admit(order, principal, by)
        life = self._begin(call, principal)
        begun(life.cancel)
        if key is None and order.run_id is None:
            self._start(life, entry, call)
            self.callers.attach(life, by)
            return life.handle
        opening = _Opening(life, digest)
        if key is not None:
            self._openings[key] = opening
        self._clock.spawn(self._open(opening, entry, call, principal, by, key))
        return await self._opened(opening, order, by)

    def _known(self, key: Key, digest: bytes) -> _Opening | Life | None:
        """What this key has made, as far as the loop knows."""
        opening = self._openings.get(key)
        made, handle_id = (opening.digest, "") if opening is not None else self._keys.get(key, (digest, ""))
        if made != digest:
            raise conflict("key_reused", "idempotency_key was used before with other params")
        return opening or self._lives.get(handle_id)

    def _admit(self, order: Order, principal: Principal, by: Invoker) -> tuple[Entry, Call]:
        """What is to be run, if it may be."""
        entry = self._toolbox.find(order.tool, by.hosting, for_itself=by.hosts_for_itself)
        if entry is None:
            raise not_found("tool", order.tool)
        parameters = entry.arguments.check(b"{}" if order.parameters is UNSET else bytes(order.parameters))
        live = len(self._live.get(principal.name, ()))
        if live >= self._settings.handles:
            raise limit_exceeded("handles", live + 1, self._settings.handles, "tool")
        timeouts = [timeout for timeout in (order.timeout_ms, entry.timeout_ms) if timeout is not None]
        call = Call(
            handle=self._new_handle(),
            request_id=self._new_handle(),
            tool=order.tool,
            parameters=parameters,
            action_id=order.action_id,
            timeout_ms=min(timeouts, default=None),
            run_id=order.run_id,
            attempt=order.attempt,
        )
        if (refusal := entry.host.refuses(call)) is not None:
            try:
                raise refusal
            finally:
                del refusal  # its traceback has this frame: as a cycle, parameters as large as a message would stay
        return entry, call

    def _begin(self, call: Call, principal: Principal) -> Life:
        """A handle that nobody knows of yet, but who looks at all of a principal's or a run's."""
        handle = Handle(
            call.handle,
            tool=call.tool,
            action_id=call.action_id,
            principal=principal,
            run_id=call.run_id,
            started_at_ms=self._clock.now_ms(),
            settings=self._settings,
        )
        life = Life(handle, self._around)
        self._live.setdefault(handle.owner, {})[handle.id] = life
        if handle.run_id is not None:
            self._of_runs.setdefault(handle.run_id, {})[handle.id] = life
        return life

    async def _open(
        self, opening: _Opening, entry: Entry, call: Call, principal: Principal, by: Attendant, key: Key | None
    ) -> None:
        """Makes an invocation durable, then starts it; whoever wants to know is told."""
        life = opening.life
        handle = life.handle
        try:
            opening.outcome = await self._opened_as(opening, call, principal, by, key)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is those who wait that are told
            opening.outcome = error
        if key is not None:
            del self._openings[key]
        if opening.outcome is not life:
            self._remove_live(life)
        else:
            if key is not None:
                self._keys[key] = (opening.digest, handle.id)
                self._key_of[handle.id] = key
            if handle.run_id is not None:
                life.record(self._recorders.begin(handle.id, handle.tool, handle.run_id))
            self._start(life, entry, call)
        for signal in opening.waiting:
            signal.set()

    async def _opened_as(
        self, opening: _Opening, call: Call, principal: Principal, by: Attendant, key: Key | None
    ) -> Life:
        now_ms = self._clock.now_ms()
        edit = Open(
            principal=principal,
            handle=call.handle,
            tool=call.tool,
            now_ms=now_ms,
            run_id=call.run_id,
            start=None if call.run_id is None else tool_start(call.handle, call.tool),
            key=None if key is None else UsedKey(*key, digest=opening.digest, at_ms=now_ms, handle=call.handle),
            key_ms=round(self._settings.tool_key_s * 1000),
        )
        opened: Opened = await self._runs.edit(edit, by, patient=True)
        if opened.is_new:
            return opening.life
        life = self._lives.get(opened.handle)
        if life is None:
            raise conflict(
                "exists",
                "idempotency_key was used before, and the handle that it made is gone: nothing is run again",
                handle=opened.handle,
            )
        return life

    async def _opened(self, opening: _Opening, order: Order, by: Attendant) -> Handle:
        """Waits until an invocation is durable. Without a key nobody else can come to know of it: it is called off."""
        signal = self._new_signal()
        outcome: Life | Exception | None = None
        try:
            if opening.outcome is None:
                opening.waiting.append(signal)
                await signal.wait(self._settings.storage_s)
            outcome = opening.outcome
        finally:
            if signal in opening.waiting:
                opening.waiting.remove(signal)
            if outcome is None and order.key is None:
                opening.life.cancel(CALLER_GONE if by.closed else NOT_STORED)
            elif outcome is None:
                self.callers.orphan(opening.life)
        if outcome is None:
            self._counters.storage_deadlines += 1
            raise RpcError(
                ErrorKind.DEADLINE_EXCEEDED,
                f"storage did not answer within {self._settings.storage_s:g} s; the same request leads to the handle if"
                " it has an idempotency_key, else nothing is run",
            )
        if isinstance(outcome, Exception):
            raise outcome
        self.callers.attach(outcome, by)
        return outcome.handle

    def _start(self, life: Life, entry: Entry, call: Call) -> None:
        handle = life.handle
        self._lives[handle.id] = life
        self._counters.handles_started += 1
        if self._hooks is not None:
            self._hooks.tool_started(handle.id, handle.tool, handle.run_id or "")
        life.start(entry.host, call)

    async def call(self, order: Order, principal: Principal, by: Invoker) -> Handle:
        """Starts a tool and waits for its end; without a key it does not outlive the caller's connection.

        It raises as `invoke` does.
        """
        has_key = order.key is not None
        handle = await self.invoke(order, principal, by)
        del order  # its parameters may be as large as a message, and it may last
        ended = False
        try:
            ended = await handle.until(lambda: handle.ended, None, handle.awaiting, self._new_signal())
        finally:
            if not ended and not has_key and (life := self._lives.get(handle.id)) is not None:
                life.cancel(CALLER_GONE)
        return handle

    # What ends it.

    def _is_live(self, life: Life) -> bool:
        return life.handle.id in self._live.get(life.handle.owner, ())

    def _run_is_over(self, run_id: str) -> None:
        """A run failed, was cancelled, interrupted or deleted: what runs in it ends."""
        for life in list(self._of_runs.get(run_id, {}).values()):
            life.cancel(RUN_OVER)

    def stopping(self, run_id: str) -> list[Handle]:
        """What ran in a run and was stopped, for whatever reason, or lost, and is not known to be gone."""
        return self._stopping.get(run_id, []).copy()

    async def are_gone(self, handles: Sequence[Handle]) -> bool:
        """Waits until each of these stops is proven, or was given up; whether all are proven."""
        for handle in handles:
            await handle.until(handle.is_settled, None, handle.awaiting, self._new_signal())
        return not any(handle.lost for handle in handles)

    # Looking.

    def find(self, handle_id: str, principal: Principal) -> Handle | None:
        """A handle that `principal` may see: its own; any for the host."""
        life = self._lives.get(handle_id)
        return life.handle if life is not None and principal.sees(life.handle.owner) else None

    async def poll(
        self, handle_id: str, principal: Principal, by: Attendant, wait_ms: int, after: int | None
    ) -> Polled | None:
        """What is there of a handle; it waits for that up to `wait_ms`. None where it is unknown, or forgotten.

        The host sees what is somebody else's and takes nothing of it.

        Raises:
            RpcError: invalid_params.
        """
        handle = self.find(handle_id, principal)
        if handle is None:
            return None
        handle.check(after)
        own = handle.owner == principal.name
        if own:
            self.callers.polls(handle, by)
        if wait_ms and not handle.has_news(after):
            handle.polling += own
            try:
                await handle.until(lambda: handle.has_news(after), wait_ms / 1000, handle.watching, self._new_signal())
            finally:
                handle.polling -= own
                if own:
                    handle.polled_s = self._clock.monotonic()
            if self.find(handle_id, principal) is not handle:
                return None
        polled = handle.poll(after, peek=not own)
        if polled.last:
            self._finished.remove(handle)
            self._forget(handle)
        else:
            self._finished.changed(handle)
        return polled

    def live_of(self, principal: Principal | None) -> Iterable[Handle]:
        """The live handles of a principal, or of everyone, oldest first."""
        of = self._live.values() if principal is None else [self._live.get(principal.name, {})]
        found = [life.handle for lives in of for life in lives.values() if life.handle.id in self._lives]
        return sorted(found, key=lambda handle: handle.started_at_ms)

    # Stopping.

    async def cancel(self, handle_id: str, principal: Principal, wait_ms: int) -> Handle | None:
        """Cancels a handle, unless it has ended; waits up to `wait_ms` for the proof. None where it is unknown."""
        handle = self.find(handle_id, principal)
        if handle is None:
            return None
        self._lives[handle.id].cancel(f"cancelled by {principal.name}")
        if wait_ms:
            await handle.until(handle.is_settled, wait_ms / 1000, handle.awaiting, self._new_signal())
        return handle

    def cancel_all(self, principal: Principal | None, reason: str) -> int:
        """Cancels all live handles of a principal, or of everyone; how many these were."""
        of = list(self._live.values()) if principal is None else [self._live.get(principal.name, {})]
        return sum(life.cancel(reason) for lives in of for life in list(lives.values()))

    # Ends, as lives tell them.

    def _ended(self, life: Life) -> None:
        handle = life.handle
        self._remove_live(life)
        if handle.run_id is not None and handle.proof == "requested":
            self._stopping.setdefault(handle.run_id, []).append(handle)
        self.callers.ended(life)
        if handle.id not in self._lives:
            return  # nobody knows of it
        if self._hooks is not None:
            self._hooks.tool_ended(handle.id, handle.tool, handle.status, handle.run_id or "")
        self._finished.add(handle)

    def _remove_live(self, life: Life) -> None:
        handle = life.handle
        _remove(self._live, handle.owner, handle.id)
        if handle.run_id is not None:
            _remove(self._of_runs, handle.run_id, handle.id)

    def _started(self) -> None:
        self._running += 1

    def _settled(self, life: Life) -> None:
        self._running -= 1
        handle = life.handle
        if handle.lost and handle.proof is None and handle.run_id is not None:
            self._stopping.setdefault(handle.run_id, []).append(handle)
        self._stops_no_more(handle)

    def _stops_no_more(self, handle: Handle) -> None:
        """Unless it is still awaited, or known not to have stopped."""
        if handle.proof == "requested" or (handle.lost and handle.id in self._lives):
            return
        stopping = self._stopping.get(handle.run_id, [])
        if handle in stopping:
            stopping.remove(handle)
            if not stopping:
                del self._stopping[handle.run_id]

    def _crowded_out(self, handle: Handle) -> None:
        self._counters.handles_crowded_out += 1
        self._forget(handle)

    def _forget(self, handle: Handle) -> None:
        del self._lives[handle.id]
        self._stops_no_more(handle)
        key = self._key_of.pop(handle.id, None)
        if key is not None:
            del self._keys[key]


def _remove(groups: dict[str, dict[str, Life]], name: str, handle_id: str) -> None:
    """Takes a handle out of its group, and the group where it was the last."""
    group = groups.get(name)
    if group is not None and group.pop(handle_id, None) is not None and not group:
        del groups[name]
