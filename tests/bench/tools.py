"""What an invocation and a chunk cost, and what many handles take: `scripts/tool_bench [HANDLES [CONNECTIONS]]`.

Every figure is taken by clients over sockets, of a daemon with its default settings. The costs are medians of rounds in
which every kind has its turn, beside `server.ping` and a durable `runs.record`; CPU is the daemon's alone, all threads.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon import Daemon, running
from tests.hosting import until_ended
from tests.peer import Peer, peer
from tests.rawpeer import TEXT, RawPeer, frame, raw_peer

HANDLES, CONNECTIONS = 1_000, 50
CHUNKS = 100  # of each of these
HOSTS = 5  # connections that host
ROUNDS = 5
CALLS = 300  # of a kind, in a round
PROCESS_CALLS = 40
AT_ONCE = 64
STREAMED = 20_000  # chunks of one handle, in a round
WINDOW = 500  # chunks, that a host is ahead of who reads: half of what a handle keeps, for those read wait to be freed
SAMPLE_S = 0.05
MIB = 1024 * 1024

Work = Callable[[], Awaitable[Any]]


def main() -> None:
    """Runs it."""
    handles, connections = (
        int(given) for given in (*sys.argv[1:], *map(str, (HANDLES, CONNECTIONS)[len(sys.argv) - 1 :]))
    )
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_many_handles(Path(folder) / "many", handles, connections))
        asyncio.run(_costs(Path(folder)))
        asyncio.run(_streams(Path(folder) / "streams"))


# A host that answers by itself.


class EchoHost:
    """Hosts a tool and does with each request what it is told to."""

    def __init__(self, host: RawPeer, serve: Callable[["EchoHost", str], Awaitable[None]]) -> None:
        self._host = host
        self._serve = serve
        self.work: asyncio.Task[None] | None = None

    async def register(self, tool: str) -> None:
        """Begins."""
        self._host.send_call(1, "tools.register", [{"name": tool}])
        assert (await self._host.message())["result"] == 1
        self.work = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            message = await self._host.message()
            if message.get("method") == "tools.execute":
                await self._serve(self, message["id"])

    def write(self, *messages: bytes) -> None:
        """Frames, in one write."""
        self._host.send(b"".join(frame(TEXT, message) for message in messages))

    async def drain(self) -> None:
        """Until the socket has taken what was written."""
        await self._host.writer.drain()


def _answer(id_: str) -> bytes:
    return b'{"jsonrpc":"2.0","id":"%b","result":1}' % id_.encode()


def _chunk(id_: str, number: int) -> bytes:
    return (
        b'{"jsonrpc":"2.0","method":"tools.chunk","params":{"request_id":"%b",'
        b'"chunk":{"kind":"text","text":"%d words of a tool"}}}' % (id_.encode(), number)
    )


async def _answers(host: EchoHost, id_: str) -> None:
    host.write(_answer(id_))


@contextlib.asynccontextmanager
async def _hosted(
    daemon: Daemon, tool: str, serve: Callable[[EchoHost, str], Awaitable[None]]
) -> AsyncIterator[EchoHost]:
    """A host of one tool, on a connection of its own."""
    async with raw_peer(daemon) as socket:
        host = EchoHost(socket, serve)
        await host.register(tool)
        assert host.work is not None
        try:
            yield host
        finally:
            host.work.cancel()


# Many handles at once.


class Memory(NamedTuple):
    """Of a process, in MiB."""

    rss: float
    pss: float

    def __str__(self) -> str:
        return f"{self.rss:.1f} MiB resident, {self.pss:.1f} MiB its own share"


async def _many_handles(state: Path, handles: int, connections: int) -> None:
    """All are live before the first is streamed to; every chunk is looked at."""
    with running(state) as daemon:
        async with contextlib.AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(peer(daemon)) for _ in range(connections)]
            asked: list[tuple[EchoHost, str]] = []
            all_asked = asyncio.Event()

            async def note(host: EchoHost, id_: str) -> None:
                asked.append((host, id_))
                if len(asked) == handles:
                    all_asked.set()

            for number in range(HOSTS):
                await stack.enter_async_context(_hosted(daemon, f"many{number}", note))
            before, watch = _memory(daemon.pid), Watch(daemon)
            await watch.figures()
            watch.lag_s = 0.0  # from here on
            began, cpu = time.perf_counter(), _cpu_s(daemon.pid)
            users = [
                asyncio.create_task(_use(callers[number % connections], f"many{number % HOSTS}"))
                for number in range(handles)
            ]
            await all_asked.wait()
            live_s = time.perf_counter() - began
            assert (await watch.figures())["handles_live"] == handles
            for piece in range(CHUNKS):
                for host, id_ in asked:
                    host.write(_chunk(id_, piece))
                for host in {host for host, _ in asked}:
                    await host.drain()
            for host, id_ in asked:
                host.write(_answer(id_))
            await asyncio.gather(*users)
            took_s, spent_s = time.perf_counter() - began, _cpu_s(daemon.pid) - cpu
            figures, after = await watch.figures(), _memory(daemon.pid)
            most = watch.end()
    count = handles * (CHUNKS + 1)
    assert (figures["chunks"], figures["chunks_dropped"]) == (count, 0)
    print(f"{handles:,} handles at once of {connections} connections, {CHUNKS} chunks each: every chunk once")
    print(f"  all live after {live_s:.2f} s, all ended after {took_s:.2f} s: {count / took_s:,.0f} chunks/s")
    print(f"  the daemon's CPU {spent_s:.2f} s, {spent_s / count * 1e6:.1f} us a chunk")
    print(f"  the loop was {watch.lag_s * 1000:.0f} ms late at most")
    print(f"  memory before: {before}")
    print(f"  at most:       {most}")
    print(f"  after:         {after}, {figures['handles_finished_bytes'] / MIB:.1f} MiB of it finished handles")


async def _use(caller: Peer, tool: str) -> None:
    handle = (await caller.call("tools.invoke", {"tool": tool}))["handle"]
    after = 0
    while True:
        # At most so many polls may wait on one connection, so none waits on the daemon: they come again.
        answer = await caller.call("tools.poll", {"handle": handle, "after": after})
        assert "dropped_chunks" not in answer
        for chunk in answer["chunks"]:
            if chunk["kind"] == "text":
                assert chunk["text"] == f"{after} words of a tool", "every chunk once, in order"
            after += 1
        if answer["status"] != "running":
            assert (after, answer["status"]) == (CHUNKS + 1, "succeeded")
            return
        await asyncio.sleep(SAMPLE_S)


class Watch:
    """Looks at the daemon's memory from time to time, and at its figures when it is asked to."""

    def __init__(self, daemon: Daemon) -> None:
        self.lag_s = 0.0
        self._daemon = daemon
        self._most = Memory(0, 0)
        self._work = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            self._most = Memory(*map(max, self._most, _memory(self._daemon.pid)))
            await asyncio.sleep(SAMPLE_S)

    async def figures(self) -> dict[str, float]:
        """The daemon's figures; the loop's lag is since they were looked at last."""
        figures = await asyncio.to_thread(self._daemon.metrics)
        self.lag_s = max(self.lag_s, figures["loop_lag_seconds"])
        return figures

    def end(self) -> Memory:
        """The most memory."""
        self._work.cancel()
        return self._most


def _memory(pid: int) -> Memory:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return Memory(sizes["Rss:"] / 1024, sizes["Pss:"] / 1024)


def _cpu_s(pid: int) -> float:
    """Seconds that its threads have run."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


# What one costs.


class Cost(NamedTuple):
    """Of one of a kind, in microseconds."""

    took: float
    cpu: float


async def _costs(folder: Path) -> None:
    """Each kind one after the other, and many at once; the rounds go over all kinds, so that they share the weather."""
    tools = folder / "tools.toml"
    tools.write_text('[tools.true]\ncommand = ["true"]\n')
    with running(folder / "costs", "--tools", str(tools)) as daemon:
        async with peer(daemon) as caller, _hosted(daemon, "echo", _answers):
            run_id = (await caller.create())["id"]
            kinds = _kinds(caller, run_id)
            costs: dict[tuple[str, int], list[Cost]] = {}
            for _ in range(ROUNDS):
                for name, (work, count) in kinds.items():
                    for at_once in (1, AT_ONCE):
                        costs.setdefault((name, at_once), []).append(await _cost(daemon, work, count, at_once))
    for at_once in (1, AT_ONCE):
        print(
            f"an operation, {at_once} at a time: took; the daemon's CPU, and its ratio to server.ping, to runs.record"
        )
        yardsticks = [costs[name, at_once] for name in ("server.ping", "runs.record")]
        for name in kinds:
            rounds = costs[name, at_once]
            took, cpu = (statistics.median(part) for part in zip(*rounds, strict=True))
            ratios = (
                statistics.median(one.cpu / other.cpu for one, other in zip(rounds, yard, strict=True))
                for yard in yardsticks
            )
            print(f"  {name:<42} {took:9.0f} us {cpu:8.0f} us" + "".join(f" {ratio:7.2f}" for ratio in ratios))


def _kinds(caller: Peer, run_id: str) -> dict[str, tuple[Work, int]]:
    """What is measured, and how often in a round."""

    async def polled(**params: Any) -> None:
        handle = (await caller.call("tools.invoke", {"tool": "echo", **params}))["handle"]
        _, answer = await until_ended(caller, handle)
        assert answer["status"] == "succeeded"

    async def called(tool: str, **params: Any) -> None:
        answer = await caller.call("tools.call", {"tool": tool, **params})
        assert answer["status"] == "succeeded", answer

    async def proposed(actions: int) -> None:
        given = [{"type": "tool_call", "tool": "echo"} for _ in range(actions)]
        answer = await caller.call("proposal.submit", {"proposal": {"actions": given}})
        assert {result["status"] for result in answer["results"]} == {"succeeded"}, answer

    return {
        "server.ping": (lambda: caller.call("server.ping"), CALLS),
        "runs.record": (lambda: caller.record(run_id, {"type": "text_delta", "text": "words"}), CALLS),
        "tools.call, hosted": (lambda: called("echo"), CALLS),
        "tools.invoke and tools.poll, hosted": (polled, CALLS),
        "tools.call, hosted, in a run": (lambda: called("echo", run_id=run_id), CALLS),
        "proposal.submit, of one action": (lambda: proposed(1), CALLS),
        "proposal.submit, of ten actions": (lambda: proposed(10), CALLS // 10),
        "tools.call, the command true": (lambda: called("true"), PROCESS_CALLS),
    }


async def _cost(daemon: Daemon, work: Work, count: int, at_once: int) -> Cost:
    left = iter(range(count))

    async def one_after_the_other() -> None:
        for _ in left:
            await work()

    began, cpu = time.perf_counter(), _cpu_s(daemon.pid)
    await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    took_s, spent_s = time.perf_counter() - began, _cpu_s(daemon.pid) - cpu
    return Cost(took_s / count * 1e6, spent_s / count * 1e6)


# What a chunk costs.


async def _streams(state: Path) -> None:
    """From one host to who polls with `after`; the host is never further ahead than a window."""
    with running(state) as daemon:
        async with peer(daemon) as caller, peer(daemon) as viewer:
            reader = Reader(caller)
            async with _hosted(daemon, "stream", reader.stream_to):
                alone = [await _stream(daemon, reader) for _ in range(ROUNDS)]
                await viewer.call("tools.stream.subscribe", {})
                followed = [await _stream(daemon, reader) for _ in range(ROUNDS)]
    print(f"{STREAMED:,} chunks of a handle from its host to who polls with after")
    for name, costs in (("polled", alone), ("polled, and followed live by another", followed)):
        took, cpu = (statistics.median(part) for part in zip(*costs, strict=True))
        print(f"  {name:<42} {1e6 / took:9,.0f} chunks/s {cpu:8.1f} us of the daemon's CPU a chunk")


class Reader:
    """Polls with `after`, and says how far it is."""

    def __init__(self, caller: Peer) -> None:
        self.caller = caller
        self.read = 0
        self._news = asyncio.Event()

    async def poll(self, handle: str) -> None:
        """To the end; nothing may be missing."""
        self.read = 0
        while True:
            params = {"handle": handle, "wait_ms": 10_000, "after": self.read}
            answer = await self.caller.call("tools.poll", params)
            assert (answer["first_sequence"], answer.get("dropped_chunks", 0)) == (self.read, 0)
            self.read += len(answer["chunks"])
            self._news.set()
            if answer["status"] != "running":
                assert self.read == STREAMED + 1
                return

    async def stream_to(self, host: EchoHost, id_: str) -> None:
        """All chunks, a part of the window at a time."""
        part = WINDOW // 4
        for first in range(0, STREAMED, part):
            while self.read < first + part - WINDOW:
                self._news.clear()
                await self._news.wait()
            host.write(*(_chunk(id_, number) for number in range(first, first + part)))
        host.write(_answer(id_))


async def _stream(daemon: Daemon, reader: Reader) -> Cost:
    reader.read = 0
    began, cpu = time.perf_counter(), _cpu_s(daemon.pid)
    await reader.poll((await reader.caller.call("tools.invoke", {"tool": "stream"}))["handle"])
    took_s, spent_s = time.perf_counter() - began, _cpu_s(daemon.pid) - cpu
    return Cost(took_s / STREAMED * 1e6, spent_s / STREAMED * 1e6)


if __name__ == "__main__":
    main()
