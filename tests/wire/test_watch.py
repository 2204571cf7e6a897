"""`runs.watch` over real sockets: who is told of what, when it begins and ends, and what a slow reader costs."""

import asyncio
import json
from typing import Any

import pytest

from carserver.core.principals import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer
from tests.rawpeer import RawPeer, raw_peer
from tests.trace import ask, nothing_waits, until_answer, until_at_most

KIB = 1024
SMALL = 4_096  # bytes of the kernel's buffers, about
HIGH_WATER = 64 * KIB
PIECE = 64 * KIB  # the default of `watch_piece_bytes`
WAITING = 1_024  # the default of `watch_runs`
RUNS = 2_000
AT_ONCE = 200  # of them, a fraction of what a watch may hold
PROMPT = "x" * 2 * KIB
START, END = {"type": "agent_start", "prompt": ""}, {"type": "agent_end", "text": "done"}


async def changed(watcher: Peer, count: int) -> list[tuple[str, str]]:
    """The next so many frames, which must be `runs.changed`: ids and statuses."""
    messages = [json.loads(await watcher.next_frame()) for _ in range(count)]
    assert {message["method"] for message in messages} <= {"runs.changed"}
    return [(message["params"]["run"]["id"], message["params"]["run"]["status"]) for message in messages]


def congesting(start: StartDaemon, **settings: object) -> Daemon:
    """A daemon whose peers' bytes do not vanish in the kernel."""
    fixed = {"high_water_bytes": HIGH_WATER, "send_buffer_bytes": SMALL, "durability": "memory"}
    return start(**(fixed | settings))


def stop_reading(client: RawPeer) -> None:
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket, so a transport that reads


def go_on_reading(client: RawPeer) -> None:
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]


async def create_many(owner: Peer, count: int, **params: Any) -> list[str]:
    """So many runs, as fast as they are taken: their ids."""
    runs = await asyncio.gather(*[owner.start("runs.create", {"prompt": PROMPT, **params}) for _ in range(count)])
    return [run["id"] for run in runs]


# What is told, and to whom.


async def test_a_watcher_is_told_of_every_change_with_the_snapshot_that_get_gives(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as watcher:
        assert await watcher.call("runs.watch") == {"watching": True}
        run = await owner.create("watch me", metadata={"a": 1}, session_id="s")
        assert (await watcher.next("runs.changed"))["run"] == run
        await owner.record(run["id"], {"type": "agent_start", "prompt": "p"}, {"type": "text_delta"})
        assert (await watcher.next("runs.changed"))["run"] == await owner.call("runs.get", {"run_id": run["id"]})
        await owner.call("runs.fail", {"run_id": run["id"], "error": "no"})
        assert (await watcher.next("runs.changed"))["run"]["error"] == "no"
        assert (await owner.call("runs.cancel", {"run_id": run["id"]}))["cancelled"] is False
        await nothing_waits(watcher)


async def test_everyone_hears_of_ones_own_runs_alone_and_the_host_of_all(daemon: Daemon) -> None:
    key = daemon.token("agent-key")
    tokens = ["host-token", "auth-token", agent_token(key, "a"), agent_token(key, "b")]
    async with (
        peer(daemon, tokens[0]) as host,
        peer(daemon, tokens[1]) as client,
        peer(daemon, tokens[2]) as a,
        peer(daemon, tokens[3]) as b,
    ):
        everyone = [host, client, a, b]
        for watcher in everyone:
            await watcher.call("runs.watch")
        runs = [await owner.create("mine") for owner in everyone]
        for run, owner in zip(runs, everyone, strict=True):
            await owner.call("runs.fail", {"run_id": run["id"], "error": ""})
            await owner.call("runs.delete", {"run_id": run["id"]})
        ids = [run["id"] for run in runs]
        assert await changed(host, 4) == [(id_, "created") for id_ in ids]
        for id_ in ids:
            assert await changed(host, 1) == [(id_, "failed")]
            assert json.loads(await host.next_frame())["method"] == "runs.watch.reset"
        for watcher, id_ in zip(everyone[1:], ids[1:], strict=True):
            assert await changed(watcher, 2) == [(id_, "created"), (id_, "failed")]
            assert json.loads(await watcher.next_frame())["method"] == "runs.watch.reset"
        for watcher in everyone:
            await nothing_waits(watcher)


async def test_filters_are_those_of_list_and_a_run_that_leaves_them_is_told_of_once_more(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as watcher:
        first = await owner.create("before", session_id="s", agent_id="coder")
        meant = {"session_id": "s", "agent_id": "coder", "parent_run_id": "p", "status": "created"}
        await watcher.call("runs.watch", meant | {"created_after_ms": first["created_at_ms"] - 1})
        for other in ({"session_id": "t"}, {"agent_id": "other"}, {"parent_run_id": "q"}, {"session_id": ""}):
            await owner.create("other", **({"session_id": "s", "agent_id": "coder", "parent_run_id": "p"} | other))
        await owner.record(first["id"], {"type": "text_delta"})  # without a parent
        run_id = (await owner.create("this one", session_id="s", agent_id="coder", parent_run_id="p"))["id"]
        await owner.record(run_id, {"type": "text_delta"})
        await owner.record(run_id, START)
        await owner.record(run_id, {"type": "text_delta"}, END)
        assert await changed(watcher, 3) == [(run_id, "created"), (run_id, "created"), (run_id, "executing")]
        await nothing_waits(watcher)
        await watcher.call("runs.watch", {"created_before_ms": first["created_at_ms"]})
        await owner.create("later than that")
        await owner.record(first["id"], {"type": "text_delta"})  # not before itself
        await nothing_waits(watcher)
        for wrong in ({"status": "done"}, {"session_id": 1}, {"session_id": "x" * 300}):
            with pytest.raises(Refused):
                await watcher.call("runs.watch", wrong)


async def test_a_deletion_is_a_word_to_list_again_for_those_who_could_see_the_run(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as watcher, peer(daemon) as other:
        run_id = (await owner.create("to be deleted", session_id="s"))["id"]
        await owner.record(run_id, END)
        await watcher.call("runs.watch", {"session_id": "s"})
        await other.call("runs.watch", {"session_id": "t"})
        await owner.call("runs.delete", {"run_id": run_id})
        assert (await watcher.next("runs.watch.reset")) == {"reason": "runs were deleted"}
        assert (await watcher.call("runs.list", {"session_id": "s"}))["runs"] == []
        again = await owner.create("another", session_id="s")
        assert await changed(watcher, 1) == [(again["id"], "created")]
        await nothing_waits(watcher)
        await nothing_waits(other)


# Where it begins and ends.


async def test_the_stream_begins_after_the_reply_in_a_batch_too(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as watcher:
        calls = [("runs.create", {"prompt": "in the batch"}), ("runs.watch", {}), ("runs.create", {"prompt": "too"})]
        frames = [{"jsonrpc": "2.0", "id": n, "method": name, "params": of} for n, (name, of) in enumerate(calls)]
        replies = {reply["id"]: reply["result"] for reply in await watcher.raw(json.dumps(frames))}
        assert replies[1] == {"watching": True}
        await nothing_waits(watcher)  # the runs of the batch were there before its reply: a list has them
        assert len((await watcher.call("runs.list"))["runs"]) == 2
        after = await owner.create("after")
        assert await changed(watcher, 1) == [(after["id"], "created")]


async def test_the_last_of_a_batch_counts(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as watcher:
        for calls, told in (
            ([("runs.watch", {"session_id": "s"}), ("runs.watch", {"session_id": "t"})], "t"),
            ([("runs.watch", {"session_id": "t"}), ("runs.unwatch", {})], None),
        ):
            frames = [{"jsonrpc": "2.0", "id": n, "method": name, "params": of} for n, (name, of) in enumerate(calls)]
            await watcher.raw(json.dumps(frames))
            ids = {session_id: (await owner.create("one", session_id=session_id))["id"] for session_id in "st"}
            if told is not None:
                assert await changed(watcher, 1) == [(ids[told], "created")]
            await nothing_waits(watcher)


async def test_unwatch_says_whether_there_was_a_watch_and_a_peer_that_goes_takes_its_own_along(daemon: Daemon) -> None:
    async with peer(daemon) as owner:
        async with peer(daemon) as politely, peer(daemon) as abruptly:
            assert await politely.call("runs.unwatch") == {"watching": False, "removed": False}
            for watcher in (politely, politely, abruptly):
                await watcher.call("runs.watch")
            assert (await asyncio.to_thread(daemon.metrics))["watches"] == 2, "one per connection"
            assert await politely.call("runs.unwatch") == {"watching": False, "removed": True}
            assert await politely.call("runs.unwatch") == {"watching": False, "removed": False}
            await owner.create("nobody")
            await nothing_waits(politely)
            assert (await asyncio.to_thread(daemon.metrics))["watches"] == 1
            abruptly.socket.transport.abort()
            await until_at_most(daemon, "watches", 0)
            await politely.call("runs.watch")
        await until_at_most(daemon, "watches", 0)


@pytest.mark.parametrize("method", ["runs.unwatch", "runs.watch"])
async def test_a_watch_that_ends_in_the_middle_of_its_queue_says_nothing_after_the_reply(
    method: str, start: StartDaemon
) -> None:
    daemon = congesting(start, write_s=60)
    async with peer(daemon) as owner, raw_peer(daemon, receive_buffer=SMALL) as slow:
        slow.send_call("first", "runs.watch", {"session_id": "old"})
        assert (await slow.message())["id"] == "first"
        stop_reading(slow)
        runs = 400
        await create_many(owner, runs, session_id="old")
        await daemon.until("watch_waiting", 1)
        slow.send_call("then", method, {"session_id": "new"} if method == "runs.watch" else None)
        await until_at_most(daemon, "watch_waiting", 0)
        go_on_reading(slow)
        told = 0
        while (message := await slow.message()).get("id") != "then":
            assert message["params"]["run"]["session_id"] == "old"
            told += 1
        assert 0 < told < runs
        await create_many(owner, 2, session_id="old")
        (new,) = await create_many(owner, 1, session_id="new")
        if method == "runs.watch":
            assert (await slow.message())["params"]["run"]["id"] == new
        slow.send_call("ping", "server.ping")
        assert (await slow.message())["id"] == "ping"


# Slow readers.


class Picture:
    """What a client makes of what it is told, as `runs.watch` says it should."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.told = 0
        self.resets = 0
        self._told_since: set[str] = set()
        self._listed: dict[str, str] = {}

    def ask(self) -> dict[str, Any]:
        """Params of a new list, from its first page."""
        self._told_since, self._listed = set(), {}
        return {"limit": 1_000}

    def changed(self, run: dict[str, Any]) -> None:
        self.told += 1
        self.statuses[run["id"]] = run["status"]
        self._told_since.add(run["id"])

    def page(self, page: dict[str, Any]) -> dict[str, Any] | None:
        """Takes a page; params of the next."""
        self._listed |= {run["id"]: run["status"] for run in page["runs"]}
        if page["next_page"]:
            return {"limit": 1_000, "page": page["next_page"]}
        newer = {run_id: status for run_id, status in self.statuses.items() if run_id in self._told_since}
        self.statuses = self._listed | newer
        return None


async def catch_up(slow: RawPeer, picture: Picture, truth: dict[str, str]) -> None:
    """Reads until the picture is the truth."""
    lists = 0
    listing = False
    while listing or picture.statuses != truth:
        message = await slow.message()
        if message.get("method") == "runs.changed":
            picture.changed(message["params"]["run"])
            continue
        if message.get("method") == "runs.watch.reset":
            picture.resets += 1
            lists += 1
            params: dict[str, Any] | None = picture.ask()
        elif message["id"] != lists:
            continue  # a page that is not wanted any more
        else:
            params = picture.page(message["result"])
        listing = params is not None
        if params is not None:
            slow.send_call(lists, "runs.list", params)


async def test_a_slow_reader_of_2000_changing_runs_costs_little_is_reset_and_comes_to_know_the_truth(
    start: StartDaemon,
) -> None:
    daemon = congesting(start, write_s=60, ping_s=60)
    async with (
        peer(daemon) as owner,
        peer(daemon) as fast,
        raw_peer(daemon, receive_buffer=SMALL) as slow,
    ):
        await fast.call("runs.watch")
        slow.send_call("watch", "runs.watch")
        assert (await slow.message())["result"] == {"watching": True}
        stop_reading(slow)
        truth: dict[str, str] = {}
        quick = Picture()
        for _ in range(0, RUNS, AT_ONCE):  # what the fast one has read by then, so that it is never the slow one
            created = await create_many(owner, AT_ONCE)
            cancelled = created[: AT_ONCE // 4]
            await asyncio.gather(*[owner.start("runs.cancel", {"run_id": run_id}) for run_id in cancelled])
            truth |= dict.fromkeys(created, "created") | dict.fromkeys(cancelled, "cancelled")
            while quick.statuses != truth:
                quick.changed((await fast.next("runs.changed"))["run"])
        figures = await asyncio.to_thread(daemon.metrics)
        assert figures["watch_resets"] == 1, "the slow one's"
        assert figures["watch_waiting"] <= WAITING
        assert figures["outbox_bytes"] < 2 * HIGH_WATER + 2 * PIECE, "of what would be megabytes"

        go_on_reading(slow)
        picture = Picture()
        await catch_up(slow, picture, truth)
        assert picture.resets == 1
        assert picture.told < RUNS
        await owner.create("level again")
        while (message := await slow.message())["params"]["run"]["prompt"] != "level again":
            picture.changed(message["params"]["run"])
        assert picture.statuses == truth
        figures = await asyncio.to_thread(daemon.metrics)
        assert (figures["watch_waiting"], figures["write_timeouts"]) == (0, 0)


async def test_a_watcher_that_does_not_read_is_aborted_like_any_other_and_costs_nobody_else_anything(
    start: StartDaemon,
) -> None:
    daemon = congesting(start, write_s=2)  # in which the others read, though this process may stand still for a while
    async with peer(daemon) as owner, peer(daemon) as fast, raw_peer(daemon, receive_buffer=SMALL) as stalled:
        await fast.call("runs.watch")
        stalled.send_call("watch", "runs.watch")
        assert (await stalled.message())["id"] == "watch"
        stop_reading(stalled)
        runs = await create_many(owner, 400)
        assert sorted(await changed(fast, 400)) == sorted((run_id, "created") for run_id in runs)
        await daemon.until("write_timeouts", 1)
        await until_at_most(daemon, "watches", 1)
        await ask(fast, "here", "server.ping", {})
        before, answer = await until_answer(fast, "here")
        assert (before, "result" in answer) == ([], True)
