"""Descriptors: the daemon asks for as many as `connections` needs, and lives where it does not get them."""

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from carserver.config import Settings
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, peer
from tests.trace import ask, subscribe, take

USUAL = 1_024
FEW = 64
CONNECTS = 200
LINES = 5  # of the log, that so many refused connections may cost


@contextlib.contextmanager
def limited(soft: int) -> Iterator[int]:
    """What is started meanwhile has this soft limit; the hard one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def limits(daemon: Daemon) -> tuple[int, int]:
    """Soft and hard, as the kernel has them."""
    for line in Path(f"/proc/{daemon.pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            return int(soft), int(hard)
    raise AssertionError("no such limit")


def descriptors(daemon: Daemon) -> int:
    """How many it has open."""
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


# At the start.


@pytest.mark.parametrize("connections", [500, 2_000])
def test_a_low_soft_limit_is_raised_to_what_the_connections_need_and_no_further(
    connections: int, start: StartDaemon
) -> None:
    with limited(USUAL) as hard:
        if hard <= connections + FEW:
            pytest.skip(f"the hard limit is {hard}")
        daemon = start(connections=connections)
    tools = 4 * 1_024  # descriptors of each, and how many may run
    assert limits(daemon) == (min(max(USUAL, connections + tools + 64), hard), hard)
    assert "ulimit" not in daemon.log


def test_with_the_settings_as_they_are_it_is_enough_for_all_connections_or_the_log_says_that_it_is_not(
    start: StartDaemon,
) -> None:
    with limited(USUAL) as hard:
        daemon = start()
    soft, _ = limits(daemon)
    assert soft > min(Settings().connections, hard - 1)
    wanted = Settings().connections + 4 * Settings().processes + 64
    assert ("ulimit" in daemon.log) == (soft < wanted)


def test_where_the_hard_limit_is_lower_it_is_raised_to_that_and_the_log_says_so(start: StartDaemon) -> None:
    with limited(USUAL) as hard:
        daemon = start(connections=hard)
    assert limits(daemon) == (hard, hard)
    (line,) = [line for line in daemon.log.splitlines() if "ulimit" in line]
    assert f"only {hard} descriptors" in line


# When there are no more.


@contextlib.contextmanager
def flooded(daemon: Daemon) -> Iterator[None]:
    """Many more connect than it has descriptors for."""
    at = urlsplit(daemon.url)
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTS):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex((at.hostname, at.port))
        yield


async def used_up(daemon: Daemon, known: Peer) -> None:
    """Waits until the daemon has as many descriptors as it may."""
    while descriptors(daemon) < FEW:
        await known.call("server.ping")


async def test_without_descriptors_it_serves_who_is_there_says_little_and_takes_others_again_later(
    start: StartDaemon,
) -> None:
    daemon = start(wal_bytes=64 * 1024, topics=1)
    async with peer(daemon) as agent, peer(daemon) as viewer:
        runs = [(await agent.create())["id"] for _ in range(8)]
        for run_id in runs:
            await agent.record(run_id, *({"type": "x", "n": n} for n in range(10)))
        daemon.metrics()  # the first answer imports, and what is imported stays
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (FEW, FEW))
        lines, before = len(daemon.log.splitlines()), descriptors(daemon)
        with flooded(daemon):
            await used_up(daemon, agent)
            # Every reader thread reads, though none of them has read before.
            pages = [agent.start("runs.events", {"run_id": run_id}) for run_id in runs]
            heads = [viewer.start("runs.get", {"run_id": run_id}) for run_id in runs]
            for page, head in zip(pages, heads, strict=True):
                assert (len((await page)["events"]), (await head)["event_count"]) == (10, 10)
            # So do those for viewers who are behind, and the writer writes, checkpoints too.
            for run_id in runs:
                await ask(viewer, run_id, "runs.trace.subscribe", {"run_id": run_id})
            got: list[tuple[str, int]] = []
            while len(got) < len(runs) * 11:
                params = await viewer.next("runs.trace.event")
                got.append((params["run_id"], params["cursor"]))
            assert sorted(got) == sorted((run_id, cursor) for run_id in runs for cursor in range(11))
            for n in range(5):
                assert (await agent.record(runs[0], {"type": "x", "text": "x" * 50_000}))["cursor"] == 11 + n
                assert (await take(viewer, 1))[0]["cursor"] == 11 + n
            assert (await agent.create())["status"] == "created"
            assert descriptors(daemon) <= FEW
        assert len(daemon.log.splitlines()) - lines <= LINES, daemon.log
        while descriptors(daemon) > before:  # the others are gone as soon as it has seen it
            await agent.call("server.ping")
        async with peer(daemon) as late:
            assert (await subscribe(late, runs[0]))["cursor"] == 0
            figures = daemon.metrics()
        assert (figures["catch_up_retries"], figures["errors"], figures["storage_failures"]) == (0, 0, 0)
    assert len(daemon.log.splitlines()) - lines <= LINES, daemon.log
