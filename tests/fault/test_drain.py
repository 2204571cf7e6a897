"""TERM: what is under way is finished, every peer is told, nothing acknowledged is lost."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import pytest

from tests.conftest import StartDaemon
from tests.daemon import EXIT_S, Daemon
from tests.fault.audit import Producer, audit_runs
from tests.peer import Peer, Refused, peer
from tests.rawpeer import RawPeer, raw_peer, raw_socket
from tests.unit.storing import write_lock

PRODUCERS, VIEWERS, RUNS = 16, 20, 4
LONG_S = 60.0  # what would be waited for, if it were
SOON_S = 15.0  # as soon as a machine allows that stands still for a while
DRAINING = b'{"jsonrpc":"2.0","method":"server.draining","params":{"retry_after_ms":1000}}'


def exit_code(daemon: Daemon, seconds: float) -> int:
    """Waits for the end of a daemon that was told to stop, at most so long."""
    assert daemon.process is not None
    code = daemon.process.wait(seconds)
    assert daemon.process.stdout is not None
    daemon.process.stdout.close()
    daemon.process = None
    return code


def tell(daemon: Daemon, number: signal.Signals) -> float:
    """Sends a signal; when."""
    assert daemon.process is not None
    daemon.process.send_signal(number)
    return time.monotonic()


@contextlib.asynccontextmanager
async def stalled_peer(daemon: Daemon) -> AsyncIterator[RawPeer]:
    """A viewer with a tiny receive buffer that reads nothing, and for which the daemon has bytes it cannot send."""
    async with peer(daemon) as owner, raw_peer(daemon, receive_buffer=4096) as stalled:
        run_id = (await owner.create())["id"]
        for _ in range(4):
            await owner.record(run_id, {"type": "text_delta", "text": "x" * 500_000})
        stalled.send_call("subscribe", "runs.trace.subscribe", {"run_id": run_id})
        await daemon.until("outbox_largest_bytes", 256 * 1024)
        yield stalled


async def drained(reader: Peer) -> tuple[int | None, int]:
    """The close code of a peer that reads, and how often it was told that the daemon drains."""
    code, _ = await reader.closed()
    frames = []
    while not reader.pushed.empty():
        frames.append(reader.pushed.get_nowait())
    return code, frames.count(DRAINING)


async def test_under_load_every_reading_peer_is_told_the_daemon_ends_in_time_and_nothing_acknowledged_is_lost(
    start: StartDaemon,
) -> None:
    drain_s = 8.0  # an eighth of it is all that storage has in the end, on whatever disk
    daemon = start(drain_s=drain_s, write_s=LONG_S)
    acknowledgements = asyncio.Semaphore(0)
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(peer(daemon)) for _ in range(PRODUCERS)]
        runs = [(await connections[0].create())["id"] for _ in range(RUNS)]
        viewers = [await stack.enter_async_context(peer(daemon)) for _ in range(VIEWERS)]
        for place, viewer in enumerate(viewers):
            await viewer.call("runs.trace.subscribe", {"run_id": runs[place % RUNS]})
        await stack.enter_async_context(stalled_peer(daemon))
        producers = [
            Producer(f"p{n}", connection, [runs[n % RUNS]], acknowledgements=acknowledgements)
            for n, connection in enumerate(connections)
        ]
        work = [asyncio.create_task(producer.run()) for producer in producers]
        for _ in range(20 * PRODUCERS):
            await acknowledgements.acquire()

        told = tell(daemon, signal.SIGTERM)
        ends = await asyncio.gather(*[drained(reader) for reader in [*connections, *viewers]])
        code = await asyncio.to_thread(exit_code, daemon, drain_s + SOON_S)
        elapsed = time.monotonic() - told
        await asyncio.gather(*work)

    sent = [batch for producer in producers for batch in producer.sent]
    acknowledged = sum(len(batch.events) for batch in sent if batch.answer is not None)
    refusals = [refusal for producer in producers for refusal in producer.refusals]
    print(f"exit after {elapsed:.2f} s of {drain_s:g}: {acknowledged} events acknowledged, {len(refusals)} refusals")
    assert code == 0, daemon.log
    assert drain_s / 2 < elapsed, "it waited for the stalled one"
    assert elapsed < drain_s + SOON_S, "and not for as long as a write may wait"
    assert ends == [(1012, 1)] * (PRODUCERS + VIEWERS)
    assert {(refusal.type, refusal.data["outcome"]) for refusal in refusals} <= {("unavailable", "not_done")}
    assert "Traceback" not in daemon.log
    assert not (daemon.state / "endpoint.json").exists()

    daemon.start()
    async with peer(daemon) as client:
        found = await audit_runs(client, sent)
        assert found.good, found
        assert found.acknowledged == acknowledged
        for batch in sent:  # a refusal was true: what was not done is done now, and only now
            if batch.answer is None:
                batch.answer = await client.call("runs.record", batch.params)
        assert (await audit_runs(client, sent)).good


async def test_new_requests_during_the_drain_are_unavailable_and_not_done_while_what_was_begun_is_finished(
    start: StartDaemon,
) -> None:
    daemon = start(drain_s=LONG_S)
    async with peer(daemon) as client, peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        with write_lock(daemon.state / "carserver.db"):
            begun = owner.start("runs.record", {"run_id": run_id, "events": [{"type": "text_delta"}]})
            await daemon.until("storage_waiting_commands", 1)  # and the drain waits for it
            tell(daemon, signal.SIGTERM)
            assert await client.next("server.draining") == {"retry_after_ms": 1000}
            for method, params in (
                ("runs.create", {"prompt": "late"}),
                ("runs.record", {"run_id": run_id, "events": [{"type": "text_delta"}]}),
                ("runs.get", {"run_id": run_id}),
            ):
                with pytest.raises(Refused) as refused:
                    await client.call(method, params)
                assert refused.value.type == "unavailable"
                assert (refused.value.data["outcome"], refused.value.data["retry_after_ms"]) == ("not_done", 1000)
            assert (await client.call("server.status"))["draining"] is True
            with pytest.raises(OSError, match="Connect call failed"):
                async with peer(daemon):
                    pass
        assert (await begun)["cursor"] == 1
        assert (await client.closed())[0] == 1012
        assert (await owner.closed())[0] == 1012
    assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 0
    daemon.start()
    async with peer(daemon) as client:
        assert (await client.call("runs.get", {"run_id": run_id}))["event_count"] == 1
        assert len((await client.call("runs.list"))["runs"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_daemon_ends_at_once_with_its_peers_told(start: StartDaemon, number: signal.Signals) -> None:
    daemon = start(drain_s=LONG_S)
    async with peer(daemon) as client, peer(daemon, token=None) as stranger:
        await client.call("server.ping")
        told = tell(daemon, number)
        assert await drained(client) == (1012, 1)
        assert await drained(stranger) == (1012, 0)
        assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 0
        elapsed = time.monotonic() - told
    print(f"{number.name}: exit after {elapsed * 1000:.0f} ms")
    assert elapsed < SOON_S


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_a_drain_that_waits_for_a_stalled_peer_at_once(
    start: StartDaemon, first: signal.Signals
) -> None:
    daemon = start(drain_s=LONG_S, write_s=LONG_S)
    async with stalled_peer(daemon), peer(daemon) as client:
        run_id = (await client.create())["id"]
        tell(daemon, first)
        assert await drained(client) == (1012, 1)  # so the first signal has arrived
        assert daemon.process is not None
        assert daemon.process.poll() is None
        told = tell(daemon, signal.SIGTERM)
        assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 1
        assert time.monotonic() - told < SOON_S
    daemon.start()  # the folder is free, and what was acknowledged is there
    async with peer(daemon) as client:
        assert (await client.call("runs.get", {"run_id": run_id}))["status"] == "created"


async def test_storage_that_hangs_does_not_hold_the_exit_and_nothing_of_it_was_acknowledged(start: StartDaemon) -> None:
    drain_s = 1.0
    daemon = start(drain_s=drain_s)
    async with peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        await owner.record(run_id, {"type": "text_delta"})
        with write_lock(daemon.state / "carserver.db"):
            hanging = owner.start("runs.record", {"run_id": run_id, "events": [{"type": "text_delta"}]})
            await daemon.until("storage_waiting_commands", 1)
            told = tell(daemon, signal.SIGTERM)
            with pytest.raises(ConnectionError, match="closed 1012"):
                await hanging
            assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 1
            assert time.monotonic() - told < drain_s + SOON_S
    assert "storage did not come to an end" in daemon.log
    daemon.start()
    async with peer(daemon) as client:
        assert (await client.call("runs.get", {"run_id": run_id}))["event_count"] == 1


async def test_half_open_handshakes_and_silent_sockets_do_not_hold_the_exit(start: StartDaemon) -> None:
    daemon = start(drain_s=LONG_S, handshake_s=LONG_S)
    async with raw_socket(daemon) as half, raw_socket(daemon) as silent:
        half.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgr")
        await daemon.until("connections", 3)  # and the one that asks
        told = tell(daemon, signal.SIGTERM)
        assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 0
        assert time.monotonic() - told < SOON_S
        for ended in (half, silent):
            with contextlib.suppress(ConnectionResetError):
                assert await ended.rest() == b""


async def test_a_peer_that_never_answers_the_close_frame_holds_the_exit_no_longer_than_close_s(
    start: StartDaemon,
) -> None:
    daemon = start(close_s=0.5, drain_s=LONG_S)
    async with raw_peer(daemon) as rude:
        told = tell(daemon, signal.SIGTERM)
        assert (await rude.close_frame()).code == 1012
        assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 0
        assert 0.4 < time.monotonic() - told < 0.5 + SOON_S
