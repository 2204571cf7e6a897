"""Proposals on their way: every action runs as a handle, as soon as what it depends on has succeeded.

What follows from what is decided in `core.proposals`; here it is done. Each try of an action is a task of the daemon's
own, so that none waits for another, and tries never follow each other without a pause in which others have their turn.
A proposal lives no longer than the connection that submitted it (contract, section 10).
"""

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Raw, Struct

from carserver.config import Settings
from carserver.core.actionturns import ActionTurns
from carserver.core.budget import Budget
from carserver.core.counters import Counters
from carserver.core.handles import Handle, Signal
from carserver.core.handlestore import CALLER_GONE, Cancel, HandleStore, Invoker, Order
from carserver.core.interpolation import Reference, filled, filled_size, references
from carserver.core.outputstore import OutputStore
from carserver.core.principals import Principal
from carserver.core.proposalanswer import Ending, Output, encoded
from carserver.core.proposals import Happened, Plan, Progress, plan
from carserver.core.runstore import Clock
from carserver.protocol.errors import ErrorKind, RpcError, forbidden, overloaded
from carserver.protocol.proposals import ActionStatus, Cost, GivenProposal
from carserver.protocol.tools import ToolStatus

METHOD = "proposal.submit"
STOPS = "the daemon stops"


class Submitter(Invoker, Protocol):
    """A connection that submits proposals; `halted` names the action that failed for good, if one has."""

    halted: str | None


class Tried(NamedTuple):
    """How the try of an action ended."""

    happened: Happened
    output: Output | None = None
    error: str | None = None
    handle: str | None = None
    not_recorded: str | None = None  # why the run has no turn of it, where that is so

    @property
    def size(self) -> int:
        """About how many bytes it keeps."""
        return len(self.error or "") + (0 if self.output is None else len(self.output.result or b""))


_NEVER = Tried(Happened.STOPPED)


class _ReturnedError(Struct, frozen=True, forbid_unknown_fields=True):
    """How a tool of that client says that it failed, if it does not raise (the client's documents)."""

    error: str


_returned_error_decoder = msgspec.json.Decoder(_ReturnedError)


def _returned_error(handle: Handle) -> str | None:
    """The error that a handle's result is; None where it is another result."""
    if handle.result is None or not handle.result.startswith(b'{"error":'):
        return None
    try:
        return _returned_error_decoder.decode(handle.result).error
    except msgspec.DecodeError:
        return None


class Proposals:
    """All that were submitted and are not answered.

    Args:
        tools: What runs the actions.
        outputs: Where large results are.
        turns: What records them in their runs.
        clock: Time, tasks.
        settings: `proposal_actions`, `proposals_bytes`, `frame_bytes`, `message_bytes`, and those of parameters.
        counters: What is counted.
        new_id: Random hexadecimal characters.
        new_signal: Something to wait for.
        draining: Whether the daemon takes no new work.
    """

    def __init__(
        self,
        tools: HandleStore,
        outputs: OutputStore,
        turns: ActionTurns,
        clock: Clock,
        settings: Settings,
        counters: Counters,
        new_id: Callable[[], str],
        new_signal: Callable[[], Signal],
        draining: Callable[[], bool],
    ) -> None:
        self.tools = tools
        self.outputs = outputs
        self.turns = turns
        self.clock = clock
        self.settings = settings
        self.counters = counters
        self.new_signal = new_signal
        self.draining = draining
        self.filling = Budget(settings.message_bytes, clock.call_later, new_signal)  # for outputs in parameters
        self.open = 0
        self.bytes = 0  # of their parameters, outputs and errors, about
        self._new_id = new_id

    def submit(
        self, given: GivenProposal, principal: Principal, by: Submitter, run_id: str | None
    ) -> Coroutine[Any, Any, bytes]:
        """A `ProposalResult`, as JSON, to be awaited; when that is given up, what runs is cancelled.

        Its actions are part of the run `run_id`, if that is one.

        Raises:
            RpcError: forbidden after a terminal error; invalid_params, limit_exceeded, overloaded.
        """
        if by.halted is not None:
            raise forbidden(
                f"{by.halted} failed for good, so this connection's proposals are refused: reconnect to submit again"
            )
        of = plan(given, self.settings, self._new_id)
        if self.bytes and self.bytes + of.size > self.settings.proposals_bytes:
            words = f"open proposals keep {self.bytes} bytes (proposals_bytes)"
            raise overloaded(words, self.settings.retry_after_ms)
        return self._run(of, principal, by, run_id)

    async def _run(self, of: Plan, principal: Principal, by: Submitter, run_id: str | None) -> bytes:
        self.counters.proposals += 1
        self.open += 1
        submission = _Submission(self, of, principal, by, run_id)
        try:
            began_s = self.clock.monotonic()
            await submission.run()
            total_ms = round((self.clock.monotonic() - began_s) * 1000)
            return await encoded(of.id, submission.endings(), submission.cost(total_ms), self.outputs, self.settings)
        finally:
            self.open -= 1
            self.bytes -= submission.bytes


class _Submission:
    """One proposal."""

    def __init__(self, proposals: Proposals, of: Plan, principal: Principal, by: Submitter, run_id: str | None) -> None:
        self._around = proposals
        self._tools = proposals.tools
        self._clock = proposals.clock
        self._plan = of
        self._principal = principal
        self._by = by
        self._run_id = run_id
        self.bytes = 0  # that it keeps, about
        self._keep(of.size)
        self._places = {action.id: place for place, action in enumerate(of.actions)}
        self._progress = Progress(of)
        self._over = proposals.new_signal()
        self._left = False  # nobody wants it to go on
        self._unrecorded = 0  # tries that have ended, and of which a turn is on its way to storage
        self._defect: Exception | None = None
        self._running: dict[int, Cancel] = {}  # what is waited for, by what cancels it
        self._waiting: deque[Signal] = deque()  # what was overloaded; at most all actions
        self._tried: list[Tried | None] = [None] * len(of.actions)
        self._calls = [0] * len(of.actions)
        self._began_s: dict[int, float] = {}
        self._ended: dict[int, tuple[float, int]] = {}  # monotonic, and milliseconds since 1970

    async def run(self) -> None:
        """Returns when every action has its status. What runs when it is given up is cancelled."""
        try:
            self._start(self._progress.begin().start)
            if not self._progress.over:
                await self._over.wait(None)
        finally:
            self._left = True
            for cancel in list(self._running.values()):
                cancel(CALLER_GONE)
        if self._defect is not None:
            raise self._defect

    def _keep(self, size: int) -> None:
        self.bytes += size
        self._around.bytes += size

    def _start(self, places: Sequence[int]) -> None:
        for place in places:
            self._clock.spawn(self._try(place))

    async def _try(self, place: int) -> None:
        try:
            tried = self._fitting(place, await self._ends(place))
            following = () if self._left else self._take(place, tried)
            await self._record(place, tried)
            self._start(following)
            if self._progress.over and not self._unrecorded:
                self._over.set()
        except Exception as defect:
            if self._left:
                raise  # it is said where all defects are
            self._defect = defect  # the proposal is answered with it
            self._over.set()

    def _fitting(self, place: int, tried: Tried) -> Tried:
        """A try as it can be kept. What has no room beside other proposals is told by its size."""
        around = self._around
        more = tried.size - (self._tried[place] or _NEVER).size
        alone = around.bytes == self.bytes
        if more <= 0 or alone or around.bytes + more <= around.settings.proposals_bytes:
            return tried
        what = "error message" if tried.output is None else "output"
        words = f"an {what} of {tried.size} bytes has no room: open proposals keep {around.bytes} (proposals_bytes)"
        if len(words) >= tried.size:
            return tried
        # Its tool has run, and is not to run again.
        happened = Happened.REFUSED if tried.happened is Happened.SUCCEEDED else tried.happened
        return tried._replace(happened=happened, output=None, error=words)

    def _take(self, place: int, tried: Tried) -> Sequence[int]:
        """A try has ended: what is to stop is stopped, and what is to start comes out."""
        action = self._plan.actions[place]
        if tried.happened is Happened.TERMINAL:
            self._by.halted = f"tool {action.tool!r} (action {action.id!r})"
        self._keep(tried.size - (self._tried[place] or _NEVER).size)
        self._tried[place] = tried
        self._ended[place] = self._clock.monotonic(), self._clock.now_ms()
        step = self._progress.take(place, tried.happened)
        for other in step.stop:
            if other in self._running:
                self._running[other](self._end_of_it())
        return step.start

    async def _record(self, place: int, tried: Tried) -> None:
        """The run gets a turn of a try, before anything starts that follows from it, and before the answer."""
        if self._run_id is None or tried.happened is Happened.STOPPED:
            return
        outcome = tried.output if tried.output is not None else tried.error or ""
        action, turns = self._plan.actions[place], self._around.turns
        self._unrecorded += 1
        try:
            why_not = await turns.record(
                *(self._run_id, action, tried.happened.status, outcome, tried.handle),
                *(self._principal, self._by),
            )
        finally:
            self._unrecorded -= 1
        self._tried[place] = tried._replace(not_recorded=why_not)

    async def _ends(self, place: int) -> Tried:
        """One try, from what its parameters refer to up to its end."""
        self._began_s.setdefault(place, self._clock.monotonic())
        try:
            while (begun := await self._begins(place)) is None:
                await self._room()
            if isinstance(begun, Tried):
                return begun
            self._let_next()
            return await self._came_to(place, begun)
        except RpcError as error:
            return Tried(Happened.REFUSED, error=error.message)
        finally:
            self._running.pop(place, None)
            self._let_next()

    async def _begins(self, place: int) -> Handle | Tried | None:
        """What runs now, or how the try has ended before; None where others of this proposal take all the room.

        Raises:
            RpcError: it is refused.
        """
        found = self._references(place)
        if not found:
            return await self._begins_with(place, self._plan.actions[place].parameters)
        sizes = {one.place: self._output(one.place).size for one in found}
        size = filled_size(self._plan.actions[place].parameters, found, sizes, self._around.settings)
        await self._around.filling.enter(size)
        try:
            return self._unwanted(place) or await self._begins_with(place, await self._filled(place, found))
        finally:
            self._around.filling.leave(size)

    async def _begins_with(self, place: int, parameters: bytes) -> Handle | Tried | None:
        """The same, with the parameters."""
        if (unwanted := self._unwanted(place)) is not None:
            return unwanted
        order = self._order(place, parameters)
        begun = partial(self._running.__setitem__, place)
        try:
            return await self._tools.invoke(order, self._principal, self._by, begun)
        except RpcError as error:
            self._running.pop(place, None)
            if error.kind is ErrorKind.OVERLOADED and self._running:
                return None
            raise

    async def _room(self) -> None:
        """Waits until another one has ended, or has begun, so that there may be room for the next, too."""
        signal = self._around.new_signal()
        self._waiting.append(signal)
        await signal.wait(None)

    def _let_next(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()

    async def _came_to(self, place: int, handle: Handle) -> Tried:
        """How the try ends that runs as `handle`."""
        self._calls[place] += 1
        self._around.counters.action_retries += self._calls[place] > 1
        if self._plan.actions[place].detached and handle.error is None:
            return Tried(Happened.SUCCEEDED, Output.of(handle, detached=True), handle=handle.id)
        await handle.until(lambda: handle.ended, None, handle.awaiting, self._around.new_signal())
        if handle.status is ToolStatus.SUCCEEDED:
            if (error := _returned_error(handle)) is not None:
                return Tried(Happened.FAILED, error=error, handle=handle.id)
            return Tried(Happened.SUCCEEDED, Output.of(handle, detached=False), handle=handle.id)
        if handle.status is ToolStatus.CANCELLED:
            return Tried(Happened.CANCELLED, error=handle.error, handle=handle.id)
        happened = Happened.TERMINAL if handle.terminal else Happened.FAILED
        return Tried(happened, error=handle.error, handle=handle.id)

    def _unwanted(self, place: int) -> Tried | None:
        """How a try ends that does not begin any more; one that is not the first leaves what the last one came to."""
        draining = self._around.draining()
        if self._progress.ended_by is None and not self._left and not draining:
            return None
        last = self._tried[place]
        if last is not None:
            return Tried(Happened.REFUSED, error=last.error)
        return Tried(Happened.STOPPED, error=f"not started: {STOPS}" if draining else None)

    def _order(self, place: int, parameters: bytes) -> Order:
        action = self._plan.actions[place]
        return Order(
            method=METHOD,
            tool=action.tool,
            parameters=Raw(parameters),
            action_id=action.id,
            run_id=self._run_id,
            timeout_ms=action.timeout_ms,
            attempt=self._progress.tries[place],
        )

    def _references(self, place: int) -> Sequence[Reference]:
        """To outputs of actions that came before.

        Raises:
            RpcError: limit_exceeded.
        """
        action, before = self._plan.actions[place], self._plan.before[place]
        known = {id_: other for id_, other in self._places.items() if before >> other & 1} if before else {}
        return references(action.parameters, known)

    async def _filled(self, place: int, found: Sequence[Reference]) -> bytes:
        """The parameters, with the outputs that they refer to.

        Raises:
            RpcError: limit_exceeded; what reading an output raises.
        """
        places = {one.place for one in found}
        outputs = {other: await self._output(other).whole(self._around.outputs) for other in sorted(places)}
        return filled(self._plan.actions[place].parameters, found, outputs, self._around.settings)

    def _output(self, place: int) -> Output:
        """That of an action that has succeeded."""
        tried = self._tried[place]
        assert tried is not None  # noqa: S101 - what depends on it runs
        assert tried.output is not None  # noqa: S101
        return tried.output

    # What it came to.

    def endings(self) -> list[Ending]:
        """What became of each action."""
        now_ms = self._clock.now_ms()
        return [self._ending(place, now_ms) for place in range(len(self._plan.actions))]

    def _ending(self, place: int, now_ms: int) -> Ending:
        action, status, tried = self._plan.actions[place], self._progress.statuses[place], self._tried[place]
        assert status is not None  # noqa: S101 - it is over
        ended_s, ended_ms = self._ended.get(place, (0.0, now_ms))
        took_s = ended_s - self._began_s[place] if place in self._ended else 0.0
        return Ending(
            action_id=action.id,
            status=status,
            output=None if tried is None else tried.output,
            error=tried.error if tried is not None and tried.error is not None else self._not_started(place),
            not_recorded=None if tried is None else tried.not_recorded,
            duration_ms=round(took_s * 1000),
            ended_at_ms=ended_ms,
        )

    def _not_started(self, place: int) -> str | None:
        cause = self._progress.causes[place]
        if cause is None:
            return None
        if cause == self._progress.ended_by:
            return f"not started: {self._end_of_it()}"
        return f"not started: action {self._plan.actions[cause].id!r}, which it depends on, was skipped"

    def _end_of_it(self) -> str:
        """What ended the proposal, in words."""
        place = self._progress.ended_by
        assert place is not None  # noqa: S101 - it is asked for afterwards
        status = self._progress.statuses[place]
        came_to = "failed" if status is ActionStatus.FAILED else f"was {status}"
        return f"action {self._plan.actions[place].id!r} {came_to}, which ended the proposal"

    def cost(self, total_ms: int) -> Cost:
        """What it took; it has been so long."""
        executed = sum(calls > 0 for calls in self._calls)
        rejected = sum(
            tried is not None and tried.happened is Happened.REFUSED and not calls
            for tried, calls in zip(self._tried, self._calls, strict=True)
        )
        return Cost(
            tool_calls=sum(self._calls),
            actions_executed=executed,
            actions_rejected=rejected,
            actions_skipped=len(self._calls) - executed - rejected,
            total_duration_ms=total_ms,
            retries=sum(max(calls - 1, 0) for calls in self._calls),
        )
