"""A handle: one invocation of a tool, from its start until nobody remembers it. Pure; contract, section 6, seed 000.

`HEARD` is the whole of its life: a state and what happens, and the state that follows. What is not in it is not heard:
chunks after the end, a host that dies after it has answered. The first end wins, and it is the last chunk.
"""

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from itertools import islice
from typing import Any, NamedTuple, Protocol

from msgspec import UNSET, Raw, UnsetType

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.principals import Principal
from carserver.protocol.codec import encode
from carserver.protocol.errors import invalid_params
from carserver.protocol.tools import Called, LiveHandle, Proof, ResultRef, ToolStatus


class State(Enum):
    """How far a handle is; `status` is what peers are told."""

    RUNNING = ToolStatus.RUNNING, False
    STORING = ToolStatus.RUNNING, True  # it has succeeded, and its large result is on its way to storage
    SUCCEEDED = ToolStatus.SUCCEEDED, True
    FAILED = ToolStatus.FAILED, True
    CANCELLED = ToolStatus.CANCELLED, True

    def __init__(self, status: ToolStatus, over: bool) -> None:
        self.status = status
        self.over = over  # its stream has ended: nothing that its host says is heard


class Input(Enum):
    """What may happen to a handle."""

    PIECE = auto()  # text, data, progress
    DONE = auto()  # the last chunk: a result that stays with the handle, or none
    LARGE = auto()  # the last chunk: a result that is to become an output
    ERROR = auto()  # the last chunk; or a deadline, a host that is gone, a chunk that is none
    CANCEL = auto()
    STORED = auto()  # the large result is durable
    UNSTORED = auto()  # it cannot be


HEARD: dict[tuple[State, Input], State] = {
    (State.RUNNING, Input.PIECE): State.RUNNING,
    (State.RUNNING, Input.DONE): State.SUCCEEDED,
    (State.RUNNING, Input.LARGE): State.STORING,
    (State.RUNNING, Input.ERROR): State.FAILED,
    (State.RUNNING, Input.CANCEL): State.CANCELLED,
    (State.STORING, Input.CANCEL): State.CANCELLED,
    (State.STORING, Input.STORED): State.SUCCEEDED,
    (State.STORING, Input.UNSTORED): State.FAILED,
}


class Signal(Protocol):
    """Something that one waits for; it happens once."""

    def set(self) -> None:
        """It has happened."""
        ...

    async def wait(self, timeout_s: float | None) -> bool:
        """Waits for it; False where it has not happened in time."""
        ...


class Recording(Protocol):
    """What keeps a handle's output in its run's log (`core.toolrecord`)."""

    def text(self, text: str) -> None:
        """The next of it."""
        ...

    def end(self, output: str, exit_code: int | None, error: str | None, result_ref: ResultRef | None) -> None:
        """The end of it."""
        ...


class Polled(NamedTuple):
    """What a poll answers, as JSON; whether it was the last one, after which the handle is forgotten.

    `missing` chunks are lost, or not known to be, where nobody gets the answer.
    """

    answer: bytes
    last: bool
    missing: int = 0


class Handle:
    """One invocation.

    Args:
        handle: Its key, 32 hex characters.
        tool: The tool's name.
        action_id: The caller's word for it.
        principal: Who invoked it.
        run_id: The run that it is part of, if it is.
        started_at_ms: When it was invoked.
        settings: `handle_chunks`, `handle_bytes`.
    """

    def __init__(
        self,
        handle: str,
        *,
        tool: str,
        action_id: str,
        principal: Principal,
        run_id: str | None,
        started_at_ms: int,
        settings: Settings,
    ) -> None:
        self.id = handle
        self.tool = tool
        self.action_id = action_id
        self.principal = principal
        self.run_id = run_id
        self.started_at_ms = started_at_ms
        self.state = State.RUNNING
        self.result: bytes | None = None  # compact JSON
        self.result_ref: ResultRef | None = None
        self.error: str | None = None
        self.terminal = False  # its host says that trying again will not help
        self.exit_code: int | None = None
        self.proof: Proof | None = None  # of a stop by the daemon
        self.lost = False  # who ran it is gone, so it will not be known whether anything of it lives
        self._maximum = settings.handle_chunks
        self._maximum_bytes = settings.handle_bytes
        self._chunks: deque[bytes] = deque()
        self._bytes = 0
        self._next = 0  # the sequence of the next chunk
        self._dropped = 0  # since the last poll
        self._seen_end = False  # by a poll that takes the chunks
        # Who waits for it, kept by `core.handlestore`.
        self.invokers: set[Attendant] = set()  # connections that invoked it, and live
        self.polled_s = 0.0  # when its principal last asked for it, monotonic
        self.polling = 0  # polls of its principal that wait
        self.has_grace = False  # a timer will look whether anybody still wants it
        self.watching: list[Signal] = []  # who waits for news
        self.awaiting: list[Signal] = []  # who waits for the end, or the proof

    @property
    def owner(self) -> str:
        """The name of who invoked it."""
        return self.principal.name

    @property
    def status(self) -> ToolStatus:
        """What peers are told."""
        return self.state.status

    @property
    def ended(self) -> bool:
        """Whether it has its last status."""
        return self.status is not ToolStatus.RUNNING

    @property
    def size(self) -> int:
        """About how many bytes it keeps."""
        return 1024 + self._bytes + len(self.result or b"") + len(self.error or "")

    @property
    def next_sequence(self) -> int:
        """The sequence of the chunk that comes next."""
        return self._next

    def hears(self, happened: Input) -> State | None:
        """The state that follows; None where it is not heard."""
        return HEARD.get((self.state, happened))

    def push(self, chunk: bytes) -> int:
        """Keeps a chunk, as JSON, after all others; how many of the oldest had to go for it."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        self._next += 1
        dropped = 0
        while len(self._chunks) > self._maximum or (self._bytes > self._maximum_bytes and len(self._chunks) > 1):
            self._bytes -= len(self._chunks.popleft())
            dropped += 1
        self._dropped += dropped
        return dropped

    def has_news(self, after: int | None) -> bool:
        """Whether a poll has something to say now."""
        return self.ended or (bool(self._chunks) if after is None else self._next > after and bool(self._chunks))

    def check(self, after: int | None) -> None:
        """Refuses an `after` that is beyond the next chunk.

        Raises:
            RpcError: invalid_params.
        """
        if after is not None and after > self._next:
            raise invalid_params("after", f"the next chunk is {self._next}, there is nothing from {after} on")

    def poll(self, after: int | None, *, peek: bool = False) -> Polled:
        """What is there by now: all chunks, which go; with `after` those from there on, which stay, and the others go.

        Of what had to go before it was read, with `after` that is told which the reader misses, else what went since
        the last poll. With `peek` nothing goes, and nothing counts as told.
        """
        first = self._next - len(self._chunks)
        behind = 0 if after is None else max(after - first, 0)  # so many are known to the reader
        chunks = [*islice(self._chunks, behind, None)]
        dropped = self._dropped if after is None else min(max(first - after, 0), self._dropped)
        if peek:
            return Polled(self._answer(chunks, first + behind, dropped), last=False)
        self._dropped = 0
        if after is not None:
            self._free(behind)
            return Polled(self._answer(chunks, first + behind, dropped), last=False)
        self._free(len(self._chunks))
        last, self._seen_end = self._seen_end, self.ended
        return Polled(self._answer(chunks, None, dropped), last, dropped + len(chunks))

    def _free(self, count: int) -> None:
        for _ in range(count):
            self._bytes -= len(self._chunks.popleft())

    def was_not_told(self, polled: Polled) -> None:
        """The answer of a poll was too large to be sent: what it took counts as dropped, and the next one says so."""
        self._dropped += polled.missing

    def _answer(self, chunks: list[bytes], first: int | None, dropped: int) -> bytes:
        """`protocol.tools.HandlePoll`."""
        more = b""
        if first is not None:
            more += b',"first_sequence":%d' % first
        if dropped:
            more += b',"dropped_chunks":%d' % dropped
        return b'{"handle":%b,"tool":%b,"action_id":%b,"status":%b,"chunks":[%b]%b%b}' % (
            encode(self.id),
            encode(self.tool),
            encode(self.action_id),
            encode(self.status),
            b",".join(chunks),
            more,
            b"".join(b',"%b":%b' % (name.encode(), encode(value)) for name, value in self._outcome().items()),
        )

    def called(self) -> bytes:
        """`protocol.tools.Called`."""
        return encode(Called(handle=self.id, status=self.status, **self._outcome()))

    def _outcome(self) -> dict[str, Any]:
        """What it came to, as far as there is something to say."""
        outcome: dict[str, Any] = {}
        if self.ended and self.result is not None:
            outcome["result"] = Raw(self.result)
        if self.ended and self.result_ref is not None:
            outcome["result_ref"] = self.result_ref
        if self.error is not None:
            outcome["error"] = self.error
        return outcome

    def listed(self, *, with_owner: bool) -> LiveHandle:
        """As `tools.handles` has it."""
        return LiveHandle(
            handle=self.id,
            tool=self.tool,
            action_id=self.action_id,
            status=self.status,
            started_at_ms=self.started_at_ms,
            run_id=UNSET if self.run_id is None else self.run_id,
            owner=self.owner if with_owner else UNSET,
        )

    @property
    def told_proof(self) -> Proof | UnsetType:
        """How far a stop by the daemon is, where there was one."""
        return UNSET if self.proof is None else self.proof

    def is_settled(self) -> bool:
        """Whether no proof of a stop is awaited."""
        return self.proof != "requested"

    def wake(self) -> None:
        """There is news; also for those who wait for the end or its proof, where it has ended."""
        if self.watching:
            _set(self.watching)
        if self.awaiting and self.ended:
            _set(self.awaiting)

    async def until(
        self, ready: Callable[[], bool], timeout_s: float | None, waiting: list[Signal], signal: Signal
    ) -> bool:
        """Waits in `waiting` until `ready`, or `signal` is told; whether it is ready."""
        if ready():
            return True
        waiting.append(signal)
        try:
            await signal.wait(timeout_s)
        finally:
            if signal in waiting:
                waiting.remove(signal)
        return ready()


def _set(waiting: list[Signal]) -> None:
    told = waiting.copy()
    waiting.clear()
    for signal in told:
        signal.set()
