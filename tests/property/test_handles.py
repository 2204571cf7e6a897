"""Any sequence of what may happen to a handle, against a model that is a list of what was said.

Safety: the first end wins and is the one last chunk; what readers get is the stream in order; what a poll does not give
it counts; the bounds hold; the live stream and the run's log are told what the polls are told. Liveness: whatever came
before, a cancel ends it at once, a host's last word ends it, and nothing that is stopped stays without a proof.
"""

import json
from collections.abc import Callable, Coroutine, Generator
from typing import Any, cast

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Raw

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.execution import Call, Execution, Feed, ToolHost
from carserver.core.handles import Handle
from carserver.core.life import Around, Life
from carserver.core.outputs import Output
from carserver.core.outputstore import OutputStore
from carserver.core.principals import CLIENT, Principal
from carserver.core.runstore import Clock
from carserver.core.toolstream import ToolStreams
from carserver.protocol.errors import RpcError, unavailable
from carserver.protocol.outputs import Final, Inline, OutputRecord
from carserver.protocol.tools import DataChunk, ErrorChunk, GivenDone, ProgressChunk, ResultRef, TextChunk, ToolStatus

TIGHT = Settings(
    handle_chunks=4, handle_bytes=400, chunk_bytes=60, result_inline_bytes=40, result_bytes=200, text_bytes=80
)
DEADLINE_MS = 5_000


class Wait:
    """Something that a coroutine of the core waits for, until the test says how it ends."""

    def __await__(self) -> Generator["Wait", Any, Any]:
        return (yield self)


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class World:
    """All that a life knows of the world: each part notes what it is told."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.storing: list[Coroutine[Any, Any, None]] = []
        self.published: list[tuple[int, dict[str, Any], bool]] = []
        self.recorded: list[str] = []
        self.recorded_end: list[tuple[str, int | None, str | None, ResultRef | None]] = []
        self.ended: list[Life] = []
        self.started = self.settled = 0
        self.stops: list[str] = []

    # Clock.

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        assert delay_s == DEADLINE_MS / 1000
        self.timers.append(Timer(callback))
        return self.timers[-1]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert isinstance(work.send(None), Wait)
        self.storing.append(work)

    # ToolStreams.

    def publish(self, handle: str, owner: str, sequence: int, chunk: bytes, *, last: bool) -> None:
        self.published.append((sequence, json.loads(chunk), last))

    # OutputStore.

    async def keep_result(self, owner: Principal, handle: str, tool: str, value: Raw, run_id: str | None) -> Output:
        await Wait()
        record = OutputRecord(
            id="out-0123456789",
            task_id=handle,
            attempt=0,
            producer_agent=f"tool:{tool}",
            event=Final(content=Inline(value=value), ok=True),
            parent_refs=[],
            created_at_ms=1,
        )
        return Output(owner=owner.name, record=record)

    # Recording.

    def text(self, text: str) -> None:
        assert not self.recorded_end
        self.recorded.append(text)

    def end(self, output: str, exit_code: int | None, error: str | None, result_ref: ResultRef | None) -> None:
        self.recorded_end.append((output, exit_code, error, result_ref))

    # ToolHost and Execution.

    def refuses(self, call: Call, *, admitted: bool = False) -> RpcError | None:
        return None

    def start(self, call: Call, feed: Feed) -> Execution:
        return self

    def stop(self, reason: str) -> None:
        self.stops.append(reason)


class Handles(RuleBasedStateMachine):
    """One handle, and what may happen to it."""

    @initialize(deadline=st.booleans(), recorded=st.booleans())
    def begin(self, deadline: bool, recorded: bool) -> None:
        self.world = World()
        self.counters = Counters()
        around = Around(
            settings=TIGHT,
            counters=self.counters,
            clock=cast("Clock", self.world),
            streams=cast("ToolStreams", self.world),
            outputs=cast("OutputStore", self.world),
            started=self._started,
            settled=self._settled,
            ended=self.world.ended.append,
        )
        self.handle = Handle(
            "h", tool="t", action_id="a", principal=CLIENT, run_id=None, started_at_ms=1, settings=TIGHT
        )
        self.life = Life(self.handle, around)
        if recorded:
            self.life.record(self.world)
        self.recorded = recorded
        call = Call(
            handle="h",
            request_id="r",
            tool="t",
            parameters=b"{}",
            action_id="a",
            timeout_ms=DEADLINE_MS if deadline else None,
        )
        self.life.start(cast("ToolHost", self.world), call)
        self.said: list[dict[str, Any]] = []  # the model: the stream so far
        self.outcome: ToolStatus | None = None
        self.large: Any = None  # a result on its way to storage
        self.was_gone = False
        self.was_stopped = False
        self.read = 0  # chunks that plain polls have given or counted
        self.floor = 0  # below this, chunks were freed by `after`
        self.lost = 0  # counted as dropped, by the polls
        self.given: list[int] = []
        self.endings = 0  # plain polls that saw the end

    def _started(self) -> None:
        self.world.started += 1

    def _settled(self, _: Life) -> None:
        self.world.settled += 1

    # The model.

    @property
    def hears(self) -> bool:
        return self.outcome is None and self.large is None

    def says(self, chunk: dict[str, Any]) -> None:
        if self.hears:
            self.said.append(chunk)

    def ends(self, status: ToolStatus, chunk: dict[str, Any], *, stopped: bool = False) -> None:
        if self.outcome is None:
            self.said.append(chunk)
            self.outcome = status
            self.was_stopped = stopped
            self.large = None

    def fails(self, message: str, *, stopped: bool = False) -> None:
        if self.hears:
            self.ends(ToolStatus.FAILED, {"kind": "error", "message": message}, stopped=stopped)

    # What a host says.

    @rule(text=st.text(max_size=50), stderr=st.booleans())
    def text(self, text: str, stderr: bool) -> None:
        over = not self.hears
        self.life.take(TextChunk(text=text, stream="stderr") if stderr else TextChunk(text=text))
        if over:
            return
        pieces = [published["text"] for _, published, _ in self.world.published[len(self.said) :]]
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= TIGHT.chunk_bytes for piece in pieces)
        for piece in pieces:
            self.says({"kind": "text", "text": piece} | ({"stream": "stderr"} if stderr else {}))

    @rule(size=st.integers(0, 80))
    def data(self, size: int) -> None:
        raw = b'[ "%b" ]' % (b"x" * size)
        self.life.take(DataChunk(data=Raw(raw)))
        kept = len(b'{"kind":"data","data":[""]}') + size
        if kept <= TIGHT.chunk_bytes:
            self.says({"kind": "data", "data": ["x" * size]})
        else:
            self.fails(f"a data chunk of {kept} bytes is more than chunk_bytes allows (60)", stopped=True)

    @rule(fraction=st.floats(0, 1))
    def progress(self, fraction: float) -> None:
        self.life.take(ProgressChunk(fraction=fraction))
        self.says({"kind": "progress", "fraction": fraction})

    @rule(size=st.sampled_from([None, 0, 10, 38, 39, 150, 198, 199]), exit_code=st.sampled_from([None, 0]))
    def done(self, size: int | None, exit_code: int | None) -> None:
        result = None if size is None else "r" * size
        self.life.take(GivenDone(result=Raw(json.dumps(result).encode())), exit_code)
        if not self.hears:
            return
        if size is None:
            self.ends(ToolStatus.SUCCEEDED, {"kind": "done"})
        elif size + 2 <= TIGHT.result_inline_bytes:
            self.ends(ToolStatus.SUCCEEDED, {"kind": "done", "result": result})
        elif size + 2 <= TIGHT.result_bytes:
            self.large = result
        else:
            self.fails(f"a result of {size + 2} bytes is more than result_bytes allows (200)", stopped=True)

    @rule(size=st.sampled_from([0, 10, 80, 81]))
    def error(self, size: int) -> None:
        self.life.take(ErrorChunk(message="e" * size))
        if size <= TIGHT.text_bytes:
            self.fails("e" * size)
        else:
            self.fails("it failed, with an error message of 81 bytes, more than text_bytes allows (80)")

    @rule()
    def close(self) -> None:
        self.life.close()
        self.fails("tool stream closed without a terminal chunk")

    @precondition(lambda self: not self.was_gone)
    @rule(proved=st.booleans())
    def gone(self, proved: bool) -> None:
        self.was_gone = True
        if proved:
            self.life.gone()
        else:
            self.life.survives()
        self.fails("tool stream closed without a terminal chunk")
        if self.was_stopped:
            assert self.handle.proof == ("confirmed" if proved else "unconfirmed")

    # What the daemon does.

    @rule(stored=st.booleans())
    def storage_answers(self, stored: bool) -> None:
        for work in self.world.storing:
            try:
                if stored:
                    work.send(None)
                else:
                    work.throw(unavailable("the disk is full"))
            except StopIteration:
                pass
        if self.world.storing and self.large is not None:
            reference = {"id": "out-0123456789", "size": len(self.large) + 2, "preview": self.large}
            if stored:
                self.ends(ToolStatus.SUCCEEDED, {"kind": "done", "result_ref": reference})
            else:
                message = f"its result of {len(self.large) + 2} bytes could not be stored: the disk is full"
                self.ends(ToolStatus.FAILED, {"kind": "error", "message": message})
        self.world.storing = []

    @rule()
    def cancel(self) -> None:
        heard = self.outcome is None
        assert self.life.cancel("not needed") is heard
        if heard:
            self.ends(ToolStatus.CANCELLED, {"kind": "error", "message": "not needed"}, stopped=True)
            assert self.handle.proof == ("confirmed" if self.was_gone else "requested")

    @precondition(lambda self: self.world.timers and not self.world.timers[0].cancelled)
    @rule()
    def deadline(self) -> None:
        assert self.hears, "a deadline that is not cancelled at the end"
        self.world.timers[0].callback()
        self.fails(f"deadline of {DEADLINE_MS} ms", stopped=True)

    # Readers.

    def take_in(self, answer: dict[str, Any], first: int) -> None:
        assert answer["chunks"] == self.said[first : first + len(answer["chunks"])]
        assert first + len(answer["chunks"]) == len(self.said)
        assert answer["status"] == (self.outcome or ToolStatus.RUNNING)
        self.lost += answer.get("dropped_chunks", 0)

    @rule()
    def poll(self) -> None:
        if self.endings == 2:
            return
        polled = self.handle.poll(None)
        answer = json.loads(polled.answer)
        first = len(self.said) - len(answer["chunks"])
        self.take_in(answer, first)
        self.given += range(first, len(self.said))
        self.floor = len(self.said)
        self.endings += self.outcome is not None
        assert polled.last is (self.endings == 2)

    @rule(back=st.integers(0, 6))
    def poll_after(self, back: int) -> None:
        after = max(len(self.said) - back, 0)
        answer = json.loads(self.handle.poll(after).answer)
        assert answer["first_sequence"] >= after
        self.take_in(answer, answer["first_sequence"])
        self.floor = max(self.floor, after)
        self.given += range(answer["first_sequence"], len(self.said))

    @rule()
    def look(self) -> None:
        before = self.handle.size
        answer = json.loads(self.handle.poll(None, peek=True).answer)
        assert answer["chunks"] == self.said[answer["first_sequence"] :]
        assert self.handle.size == before

    # What holds at any time.

    @invariant()
    def the_stream_is_what_was_said_and_ends_once(self) -> None:
        if not hasattr(self, "world"):
            return
        assert [sequence for sequence, _, _ in self.world.published] == list(range(len(self.said)))
        assert [chunk for _, chunk, _ in self.world.published] == self.said
        lasts = [last for _, _, last in self.world.published]
        assert lasts.count(True) == (self.outcome is not None)
        assert not any(lasts[:-1])
        assert len(self.world.ended) == (self.outcome is not None)
        assert self.handle.status == (self.outcome or ToolStatus.RUNNING)
        assert len(self.world.recorded_end) == (self.recorded and self.outcome is not None)

    @invariant()
    def what_runs_is_stopped_once_and_only_by_the_daemon(self) -> None:
        if not hasattr(self, "world"):
            return
        assert len(self.world.stops) <= 1
        if self.was_stopped and not self.was_gone:
            assert len(self.world.stops) == 1
            assert self.handle.proof == "requested"
        if not self.was_stopped:
            assert not self.world.stops
            assert self.handle.proof is None
        assert self.world.settled == self.was_gone
        assert self.life.running is not self.was_gone

    @invariant()
    def the_bounds_hold_and_what_is_missing_is_counted(self) -> None:
        if not hasattr(self, "world"):
            return
        waiting = json.loads(self.handle.poll(None, peek=True).answer)
        assert len(waiting["chunks"]) <= TIGHT.handle_chunks
        missing = set(range(waiting["first_sequence"])) - set(self.given)
        freed_unread = {sequence for sequence in missing if sequence < self.floor}
        counted = self.lost + waiting.get("dropped_chunks", 0)
        assert counted >= len(missing - freed_unread)
        assert self.counters.chunks_dropped >= counted

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.cancel()
        if not self.was_gone:
            self.gone(proved=True)
        assert self.handle.ended
        assert self.handle.proof != "requested"
        for work in self.world.storing:
            work.close()


Handles.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyHandle = Handles.TestCase
