"""Process tools without a daemon: the real keeper, a feed that remembers, and a search for what is left of a tool."""

import asyncio
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.execution import CLOSED, Call, Execution
from carserver.hosts.process import Processes, ProcessTool
from carserver.hosts.spec import Output, ProcessSpec
from carserver.protocol.tools import ErrorChunk, GivenChunk, GivenDone, TextChunk

MARK = "CARSERVER_TEST_MARK"  # every process of a rig's tools has it in its environment, with the rig's own value
DESCRIPTORS = 512
WAIT_S = 30.0
MANY_BYTES = 1 << 30
SHORT = Settings(kill_after_s=0.3, unconfirmed_s=WAIT_S, settle_s=0.3)  # a slow machine must not make it unconfirmed
CALL = Call(handle="h", request_id="r", tool="t", parameters=b"{}", action_id="")


class Feed:
    """Remembers what it was told; implements `core.execution.Feed`. `over` only when the test says so."""

    def __init__(self) -> None:
        self.over = False
        self.chunks: list[GivenChunk] = []
        self.exit_code: int | None = None
        self.told: list[str] = []
        self.news = asyncio.Event()

    def take(self, chunk: GivenChunk, exit_code: int | None = None) -> None:
        assert "gone" not in self.told
        self.chunks.append(chunk)
        self.exit_code = exit_code
        if isinstance(chunk, GivenDone | ErrorChunk):
            self.told.append("last")
        self.news.set()

    def close(self, why: str = CLOSED) -> None:
        self.told.append("closed")
        self.news.set()

    def gone(self) -> None:
        self.told.append("gone")
        self.news.set()

    def survives(self) -> None:
        self.told.append("survives")
        self.news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.news.clear()
            await self.news.wait()

    async def until_told(self, *told: str) -> None:
        """Until it ends; and it has ended like this."""
        await self.until(lambda: bool({"gone", "survives"} & set(self.told)))
        assert self.told == list(told)

    async def until_text(self, text: str) -> None:
        await self.until(lambda: text in self.text)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks if isinstance(chunk, TextChunk) and not chunk.stream)

    @property
    def error(self) -> str:
        assert isinstance(self.chunks[-1], ErrorChunk), self.chunks[-1]
        return self.chunks[-1].message

    @property
    def result(self) -> dict[str, int]:
        assert isinstance(self.chunks[-1], GivenDone), self.chunks[-1]
        assert isinstance(self.chunks[-1].result, msgspec.Raw)
        return msgspec.json.decode(self.chunks[-1].result, type=dict[str, int])


class Rig:
    """A pool, and tools that bear its mark."""

    def __init__(self, settings: Settings = SHORT, mark: str = "") -> None:
        self.mark = mark or uuid.uuid4().hex
        self.counters = Counters()
        self.processes = Processes(settings, self.counters, os.environ | {MARK: self.mark}, DESCRIPTORS)

    def spec(self, *command: str, cwd: str = "/", output: Output = "text", max_output: int = MANY_BYTES) -> ProcessSpec:
        return ProcessSpec(
            name="t", command=command, cwd=cwd, env=(MARK,), output=output, max_output=max_output, timeout_ms=None
        )

    def start(self, spec: ProcessSpec) -> tuple[Feed, Execution]:
        feed = Feed()
        tool = ProcessTool(spec, self.processes)
        assert tool.refuses(CALL) is None
        return feed, tool.start(CALL, feed)

    async def run(self, spec: ProcessSpec) -> Feed:
        """Runs a tool to its end, which must be a good one: its last chunk when nothing of it lives."""
        feed, _ = self.start(spec)
        await feed.until_told("last", "gone")
        return feed

    def sh(self, script: str, output: Output = "text", max_output: int = MANY_BYTES) -> ProcessSpec:
        return self.spec("sh", "-c", braced(script), output=output, max_output=max_output)

    def python(self, script: str, output: Output = "text", max_output: int = MANY_BYTES) -> ProcessSpec:
        script = f"import os, signal, sys, time\n{script}"
        return self.spec(sys.executable, "-ISc", braced(script), output=output, max_output=max_output)

    @property
    def keeper(self) -> int:
        return self.processes.start().pid

    @property
    def reapers(self) -> list[int]:
        return children(self.keeper)


def braced(script: str) -> str:
    """With the braces that a tools file would need."""
    return script.replace("{", "{{")


@asynccontextmanager
async def rig(settings: Settings = SHORT) -> AsyncIterator[Rig]:
    """A rig with a keeper; when the test is through, nothing of it may be left: no process, zombie or descriptor."""
    before = descriptors()
    pool = Rig(settings)
    keeper = pool.keeper
    try:
        await pool.run(pool.spec("true"))
        during = descriptors()
        yield pool
        await until_nothing_is_left(pool)
        if pool.keeper == keeper:
            assert descriptors() == during
    finally:
        await pool.processes.close(WAIT_S)
    assert children(os.getpid(), {keeper}) == []
    assert descriptors() == before


def descriptors(pid: int | None = None) -> int:
    """How many a process has; this one, while it looks."""
    return len(list(Path(f"/proc/{pid or 'self'}/fd").iterdir()))


def children(parent: int, among: set[int] | None = None) -> list[int]:
    """The children of a process, zombies too."""
    found = []
    for pid in pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and (among is None or pid in among):
            found.append(pid)
    return found


def lives(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of one that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in {b"Z", b"X"}
    except OSError:
        return False


def marked(mark: str) -> list[int]:
    """Every process with this mark in its environment."""
    found = []
    for pid in pids():
        try:
            if f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def pids() -> list[int]:
    return [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what nobody tells."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def until_nothing_is_left(pool: Rig) -> None:
    """No process and no zombie of its tools; what the keeper has yet to wait for has a moment."""
    await until(lambda: not marked(pool.mark) and not children(pool.keeper))
