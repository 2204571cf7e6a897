"""Hooks that are installed, as a daemon process finds and calls them (contract, section 9).

Each test installs packages of its own: a module, and the folder of metadata that names its entry point.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host, until_ended
from tests.peer import Refused, peer
from tests.trace import until_at_most

GRACE_S = 0.2
HOOK_S = 1.0
LAST_S = 2.0  # of a drain that is used up

TELL = """\
import asyncio, json, pathlib, threading, time
HERE = pathlib.Path(__file__).parent

def tell(*what):
    with open(HERE / "told", "a") as file:
        file.write(json.dumps(what) + "\\n")

def wait_for(name):
    while not (HERE / name).exists():
        time.sleep(0.01)
"""
FUNCTIONS = """
def run_created(run_id, session_id):
    tell("created", run_id, session_id)

def run_cancelled(run_id, session_id, reason):
    tell("cancelled", run_id, session_id, reason)

def run_ended(run_id, session_id, status):
    tell("ended", run_id, session_id, status)
"""
OF_TOOLS = """
def tool_started(handle, tool, run_id):
    tell("tool started", handle, tool, run_id)

def tool_ended(handle, tool, status, run_id):
    tell("tool ended", handle, tool, status, run_id)
"""
ASYNC_CLASS = """
class Hooks:
    def __init__(self):
        self.loop = None

    async def run_created(self, run_id, session_id):
        await asyncio.sleep(0)
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        tell("created", run_id, session_id)

    async def run_cancelled(self, run_id, session_id, reason):
        await asyncio.sleep(0)
        tell("cancelled", run_id, session_id, reason)

    def run_ended(self, run_id, session_id, status):
        tell("ended", run_id, session_id, status)
"""


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, source: str, attribute: str = "") -> None:
        """A module whose hook is itself, or this attribute of it."""
        (self.folder / f"{name}.py").write_text(TELL + source)
        metadata = self.folder / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        value = f"{name}:{attribute}" if attribute else name
        (metadata / "entry_points.txt").write_text(f"[carserver.hooks]\n{name}-hook = {value}\n")

    async def told(self, count: int) -> list[Any]:
        """What the hooks wrote down, once it is so much; the test's own timeout bounds it."""
        told = self.folder / "told"
        while len(lines := told.read_text().splitlines() if told.exists() else []) < count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
        return [json.loads(line) for line in lines]

    def open(self, gate: str) -> None:
        """Lets those pass who wait for it."""
        (self.folder / gate).touch()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Packages for the daemons of this test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return Site(folder)


async def create_some(daemon: Daemon, count: int) -> list[str]:
    """Runs, one after the other: their ids."""
    async with peer(daemon) as owner:
        return [(await owner.create("some", session_id="s"))["id"] for _ in range(count)]


# What they are told.


@pytest.mark.parametrize(
    ("source", "attribute"),
    [
        pytest.param(FUNCTIONS, "", id="a module"),
        pytest.param(ASYNC_CLASS, "Hooks", id="a class, async"),
        pytest.param(f"{ASYNC_CLASS}\nhooks = Hooks()\n", "hooks", id="an object"),
    ],
)
async def test_a_hook_is_told_of_runs_in_the_order_of_the_commits(
    source: str, attribute: str, site: Site, start: StartDaemon
) -> None:
    site.install("some", source, attribute)
    daemon = start(grace_s=GRACE_S)
    wanted: list[list[str]] = []
    async with peer(daemon) as owner, peer(daemon, "host-token") as host:
        run_id = (await owner.create("a", session_id="s", idempotency_key="k"))["id"]
        await owner.create("a", session_id="s", idempotency_key="k")
        for _ in range(2):
            await owner.record(run_id, {"type": "agent_end", "text": "done"})
        wanted += [["created", run_id, "s"], ["ended", run_id, "s", "completed"]]
        for session_id, ending, params in (
            ("t", "runs.fail", {"error": "broken"}),
            ("", "runs.cancel", {"reason": "not needed: é"}),
            ("u", "runs.cancel", {}),
        ):
            run_id = (await owner.create("b", session_id=session_id))["id"]
            by = host if ending == "runs.cancel" else owner
            for _ in range(2):
                await by.call(ending, {"run_id": run_id, **params})
            wanted.append(["created", run_id, session_id])
            if ending == "runs.cancel":
                wanted.append(["cancelled", run_id, session_id, params.get("reason", "cancelled by host")])
            wanted.append(["ended", run_id, session_id, "failed" if ending == "runs.fail" else "cancelled"])
        assert await site.told(len(wanted)) == wanted
        async with peer(daemon) as leaving:
            run_id = (await leaving.create("left"))["id"]
        await daemon.until("runs_interrupted", 1)
        await owner.record(run_id, {"type": "agent_end", "text": "done after all"})
    wanted += [["created", run_id, ""], ["ended", run_id, "", "interrupted"], ["ended", run_id, "", "completed"]]
    assert await site.told(len(wanted)) == wanted
    figures = await asyncio.to_thread(daemon.metrics)
    assert figures["hook_calls"] == len(wanted)
    assert (figures["hook_failures"], figures["hook_timeouts"], figures["hook_overflows"]) == (0, 0, 0)


async def test_a_hook_that_has_only_some_of_the_functions_is_called_for_these(site: Site, start: StartDaemon) -> None:
    site.install("some", "def run_cancelled(run_id, session_id, reason):\n    tell(run_id, session_id, reason)\n")
    daemon = start()
    run_id, _ = await create_some(daemon, 2)
    async with peer(daemon, "host-token") as host:
        await host.call("runs.cancel", {"run_id": run_id, "reason": "why not"})
    assert await site.told(1) == [[run_id, "s", "why not"]]
    await until_at_most(daemon, "hook_waiting", 0)
    assert (await asyncio.to_thread(daemon.metrics))["hook_calls"] == 1


# What they are told of tools.


async def test_a_hook_is_told_of_a_tools_start_and_of_its_end_with_its_status(site: Site, start: StartDaemon) -> None:
    site.install("some", OF_TOOLS)
    daemon = start()
    wanted: list[list[str]] = []
    async with peer(daemon) as hosting, peer(daemon) as caller:
        host = Host(hosting)
        await host.register("t")
        run_id = (await caller.create("r"))["id"]
        for given in ("", run_id):
            for status in ("succeeded", "failed", "cancelled"):
                params = {"run_id": given} if given else {}
                handle = (await caller.call("tools.invoke", {"tool": "t", "action_id": "a", **params}))["handle"]
                asked = await host.asked()
                if status == "succeeded":
                    await asked.answer()
                elif status == "failed":
                    await asked.fail("broken")
                else:
                    for _ in range(2):
                        await caller.call("tools.cancel", {"handle": handle})
                _, answer = await until_ended(caller, handle)
                assert answer["status"] == status
                wanted += [["tool started", handle, "t", given], ["tool ended", handle, "t", status, given]]
        assert await site.told(len(wanted)) == wanted
    figures = await asyncio.to_thread(daemon.metrics)
    assert (figures["hook_calls"], figures["hook_failures"], figures["hook_overflows"]) == (len(wanted), 0, 0)


async def test_a_hook_is_told_of_a_key_once_and_of_what_is_refused_never(site: Site, start: StartDaemon) -> None:
    site.install("some", OF_TOOLS)
    daemon = start()
    async with peer(daemon) as hosting, peer(daemon) as caller:
        host = Host(hosting)
        await host.register({"name": "t", "parameters": {"type": "object"}})
        run_id = (await caller.create("r"))["id"]
        await caller.record(run_id, {"type": "agent_end", "text": "done"})
        for params in ({"tool": "unknown"}, {"tool": "t", "parameters": []}, {"tool": "t", "run_id": run_id}):
            with pytest.raises(Refused):
                await caller.call("tools.invoke", params)
        keyed = {"tool": "t", "idempotency_key": "k"}
        handle = (await caller.call("tools.invoke", keyed))["handle"]
        assert (await caller.call("tools.invoke", keyed))["handle"] == handle
        await (await host.asked()).answer()
        await until_ended(caller, handle)
        assert (await caller.call("tools.invoke", keyed))["handle"] == handle
        last = (await caller.call("tools.invoke", {"tool": "t"}))["handle"]
        assert await site.told(3) == [
            ["tool started", handle, "t", ""],
            ["tool ended", handle, "t", "succeeded", ""],
            ["tool started", last, "t", ""],
        ]


async def test_a_run_that_is_cancelled_is_told_of_after_the_tools_that_end_with_it(
    site: Site, start: StartDaemon
) -> None:
    site.install("some", FUNCTIONS + OF_TOOLS)
    daemon = start()
    async with peer(daemon) as hosting, peer(daemon) as caller:
        await Host(hosting).register("t")
        run_id = (await caller.create("r", session_id="s"))["id"]
        handle = (await caller.call("tools.invoke", {"tool": "t", "run_id": run_id}))["handle"]
        await caller.call("runs.cancel", {"run_id": run_id, "reason": "enough"})
        assert await site.told(5) == [
            ["created", run_id, "s"],
            ["tool started", handle, "t", run_id],
            ["tool ended", handle, "t", "cancelled", run_id],
            ["cancelled", run_id, "s", "enough"],
            ["ended", run_id, "s", "cancelled"],
        ]


async def test_the_drain_tells_of_the_tools_that_it_cancels(site: Site, start: StartDaemon) -> None:
    site.install("some", OF_TOOLS)
    daemon = start()
    async with peer(daemon) as hosting, peer(daemon) as caller:
        await Host(hosting).register("t")
        handle = (await caller.call("tools.invoke", {"tool": "t"}))["handle"]
        assert await asyncio.to_thread(daemon.terminate) == 0
    assert await site.told(0) == [["tool started", handle, "t", ""], ["tool ended", handle, "t", "cancelled", ""]]


async def test_a_daemon_tells_of_no_tool_of_the_one_before_though_it_closes_it_in_its_runs_log(
    site: Site, start: StartDaemon
) -> None:
    site.install("some", OF_TOOLS)
    daemon = start()
    async with peer(daemon) as hosting, peer(daemon) as caller:
        await Host(hosting).register("t")
        run_id = (await caller.create("r"))["id"]
        lost = (await caller.call("tools.invoke", {"tool": "t", "run_id": run_id}))["handle"]
        await site.told(1)
        await asyncio.to_thread(daemon.kill)
    daemon.start()
    async with peer(daemon) as hosting, peer(daemon) as caller:
        host = Host(hosting)
        await host.register("t")
        while (await caller.call("runs.get", {"run_id": run_id}))["event_count"] < 2:  # noqa: ASYNC110 - its tool_end
            await asyncio.sleep(0.02)
        handle = (await caller.call("tools.invoke", {"tool": "t", "run_id": run_id}))["handle"]
        await (await host.asked()).answer()
        assert await site.told(3) == [
            ["tool started", lost, "t", run_id],
            ["tool started", handle, "t", run_id],
            ["tool ended", handle, "t", "succeeded", run_id],
        ]


# What goes wrong in them.


async def test_what_a_hook_raises_is_logged_and_counted_and_it_is_called_again(site: Site, start: StartDaemon) -> None:
    site.install("broken", "def run_created(run_id, session_id):\n    tell('broken')\n    raise SystemExit('no way')\n")
    site.install("sound", FUNCTIONS)
    daemon = start()
    runs = await create_some(daemon, 3)
    told = await site.told(6)
    assert [what for what in told if what != ["broken"]] == [["created", run_id, "s"] for run_id in runs]
    await daemon.until("hook_failures", 3)
    warning = next(line for line in map(json.loads, daemon.log.splitlines()) if line["logger"] == "carserver.hooks")
    assert (warning["level"], warning["message"]) == ("warning", "hook broken-hook (broken): run_created failed")
    assert "in run_created" in warning["exception"]
    assert "SystemExit: no way" in warning["exception"]
    assert daemon.log.count("run_created failed") <= 3


async def test_what_cannot_be_loaded_is_named_in_the_log_and_the_others_are_called(
    site: Site, start: StartDaemon
) -> None:
    site.install("unimportable", "raise OSError('not today')\n")
    site.install("empty", "class Hooks:\n    run_created = 'not a function'\n", "Hooks")
    site.install("absent", "", "Nowhere")
    site.install("demanding", "class Hooks:\n    def __init__(self, more):\n        pass\n", "Hooks")
    site.install("sound", FUNCTIONS)
    daemon = start()
    (run_id,) = await create_some(daemon, 1)
    assert await site.told(1) == [["created", run_id, "s"]]
    for name in ("unimportable", "empty:Hooks", "absent:Nowhere", "demanding:Hooks"):
        wanted = f"hook {name.partition(':')[0]}-hook ({name}) cannot be loaded"
        while wanted not in daemon.log:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)
    await until_at_most(daemon, "hook_waiting", 0)


async def test_a_call_that_hangs_is_given_up_by_name_and_the_next_are_made(site: Site, start: StartDaemon) -> None:
    hanging = "def run_created(run_id, session_id):\n    tell('hangs')\n    threading.Event().wait()\n"
    site.install("hanging", hanging + "def run_ended(*arguments):\n    tell(*arguments)\n")
    daemon = start(hook_s=HOOK_S)
    (run_id,) = await create_some(daemon, 1)
    async with peer(daemon, "host-token") as host:
        await host.call("runs.cancel", {"run_id": run_id})
    assert await site.told(2) == [["hangs"], [run_id, "s", "cancelled"]]
    figures = await asyncio.to_thread(daemon.metrics)
    assert min(figures["hook_timeouts"], figures["hook_hanging"]) >= 1
    assert figures["hook_failures"] == 0
    assert f"hook hanging-hook (hanging): run_created took longer than hook_s ({HOOK_S:g})" in daemon.log


async def test_a_call_that_is_async_is_cancelled_when_it_is_given_up(site: Site, start: StartDaemon) -> None:
    source = """
async def run_created(run_id, session_id):
    if not (HERE / "went").exists():
        (HERE / "went").touch()
        try:
            await asyncio.sleep(3_600)
        finally:
            tell("cancelled")
    tell(run_id)
"""
    site.install("waiting", source)
    daemon = start(hook_s=HOOK_S)
    _, second = await create_some(daemon, 2)
    assert sorted(await site.told(2)) == sorted([["cancelled"], [second]])
    await until_at_most(daemon, "hook_hanging", 0)
    assert (await asyncio.to_thread(daemon.metrics))["hook_timeouts"] >= 1


async def test_where_too_many_calls_hang_the_hook_rests_until_one_comes_back_and_nothing_is_lost(
    site: Site, start: StartDaemon
) -> None:
    source = "def run_created(run_id, session_id):\n    tell('begins', run_id)\n    wait_for('gate')\n"
    site.install("stuck", source)
    site.install("sound", FUNCTIONS)
    daemon = start(hook_s=HOOK_S, hook_hanging=2)
    runs = await create_some(daemon, 4)
    await daemon.until("hook_hanging", 2)
    told = await site.told(6)
    assert [run_id for what, run_id, *_ in told if what == "created"] == runs, "other hooks are not held up"
    assert [run_id for what, run_id, *_ in told if what == "begins"] == runs[:2]
    await until_at_most(daemon, "hook_waiting", 2)  # the other hook's last call has come to its end
    assert (await asyncio.to_thread(daemon.metrics))["hook_waiting"] == 2
    assert daemon.log.count("it rests until one of its calls comes back") == 1
    site.open("gate")
    told = await site.told(8)
    assert [run_id for what, run_id, *_ in told if what == "begins"] == runs
    await until_at_most(daemon, "hook_hanging", 0)
    await until_at_most(daemon, "hook_waiting", 0)


async def test_what_waits_for_a_hook_is_bounded_and_what_is_left_out_is_counted_and_said(
    site: Site, start: StartDaemon
) -> None:
    site.install("slow", "def run_created(run_id, session_id):\n    wait_for('gate')\n    tell(run_id)\n")
    daemon = start(hook_queue=3, hook_s=60)
    first = await create_some(daemon, 1)
    await daemon.until("hook_calls", 1)
    runs = first + await create_some(daemon, 10)
    figures = await asyncio.to_thread(daemon.metrics)
    assert (figures["hook_waiting"], figures["hook_overflows"]) == (1 + 3, 7)
    assert "hook slow-hook (slow): more waits than hook_queue allows" in daemon.log
    assert daemon.log.count("more waits than hook_queue allows") < 7
    site.open("gate")
    assert await site.told(4) == [[run_id] for run_id in runs[:4]]
    (last,) = await create_some(daemon, 1)
    assert (await site.told(5))[-1] == [last]


# The end.


async def test_the_drain_gives_what_waits_for_a_hook_its_time(site: Site, start: StartDaemon) -> None:
    site.install("slow", "def run_created(run_id, session_id):\n    time.sleep(0.02)\n    tell(run_id)\n")
    daemon = start()
    runs = await create_some(daemon, 20)
    assert await asyncio.to_thread(daemon.terminate) == 0
    assert await site.told(0) == [[run_id] for run_id in runs]
    assert "left undone" not in daemon.log


async def test_a_hook_that_never_ends_does_not_hold_up_the_end_and_the_log_says_what_is_left(
    site: Site, start: StartDaemon
) -> None:
    site.install("slow", "def run_created(run_id, session_id):\n    threading.Event().wait()\n")
    daemon = start(drain_s=LAST_S, hook_s=60, durability="memory")
    await create_some(daemon, 3)
    await daemon.until("hook_calls", 1)
    assert await asyncio.to_thread(daemon.terminate) == 0
    assert "hook slow-hook (slow): 3 calls are left undone" in daemon.log


async def test_a_hook_that_never_loads_holds_up_nothing(site: Site, start: StartDaemon) -> None:
    site.install("never", "tell('loads')\nthreading.Event().wait()\n")
    site.install("sound", FUNCTIONS)
    daemon = start(hook_s=HOOK_S, drain_s=LAST_S, durability="memory")
    (run_id,) = await create_some(daemon, 1)
    assert sorted(await site.told(2)) == sorted([["loads"], ["created", run_id, "s"]])
    while "hook never-hook (never) is still being loaded" not in daemon.log:  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.02)
    assert await asyncio.to_thread(daemon.terminate) == 0
    assert "hook never-hook (never): 1 calls are left undone" in daemon.log
