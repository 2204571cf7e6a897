"""`carserver export`, `import` and `prune` on real daemons: there and back, equal to the byte."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from carserver.cli.app import run
from carserver.core.principals import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, peer

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable says where a daemon is."""
    for name in [name for name in os.environ if name.startswith(("CARSERVER_", "CAR_"))]:
        monkeypatch.delenv(name)


async def command(daemon: Daemon, *arguments: str) -> int:
    """A command for this daemon; its exit code."""
    return await asyncio.to_thread(run, [*arguments, "--state-dir", str(daemon.state)])


async def raw(client: Peer, method: str, params: bytes) -> None:
    """A call whose params are sent by their bytes."""
    request = b'{"jsonrpc":"2.0","id":900,"method":"%b","params":%b}' % (method.encode(), params)
    await client.socket.send(request.decode())
    while b'"id":900' not in (answer := await client.next_frame()):
        pass
    assert b'"result"' in answer


async def fill(daemon: Daemon, root: Path) -> None:
    """Runs in every status, of every kind of owner, with few and many and large events, and outputs of every kind."""
    token = agent_token(daemon.token("agent-key"), "a")
    async with peer(daemon) as client, peer(daemon, "host-token") as host, peer(daemon, token) as agent:
        for owner in (client, host, agent):
            async with statuses(owner) as runs:
                for run_id in runs:
                    await owner.record(run_id, {"type": "é\U0001f600", "text": '\u2028"\\'})
        empty = (await client.create("", metadata={"k": "ü"}, outcome_description="o", parent_run_id="p"))["id"]
        await raw(client, "runs.create", b'{"prompt":"n","metadata":{"n":1.50,"big":123456789012345678901234567890}}')
        numbers = (await client.create())["id"]
        event = b'{"type":"x",  "n": 1.0, "e":1E5, "s":"\\u00e9\\/", "deep":[[[[{}]]]]}'
        await raw(client, "runs.record", b'{"run_id":"%b","events":[%b]}' % (numbers.encode(), event))
        large = (await agent.create("large"))["id"]
        for _ in range(7):
            await agent.record(large, {"type": "text", "text": "x" * 1_040_000})
        many = (await host.create("many"))["id"]
        for first in range(0, 5_000, 1_000):
            await host.record(many, *({"type": "text", "n": n} for n in range(first, first + 1_000)))
        brackets = (await host.create("brackets"))["id"]
        for _ in range(5):
            await host.record(brackets, {"type": "x", "list": [[] for _ in range(40_000)]})
        for content in (
            {"kind": "inline", "value": "short"},
            {"kind": "inline", "value": ["long" * 5_000, {"é": None}]},
            {"kind": "file_ref", "path": "file"},
            {"kind": "file_ref", "path": "changes", "mime": "text/plain", "size_hint": 3},
        ):
            event_ = {"type": "artifact", "name": "n", "content": content}
            await client.call(
                "outputs.append",
                {"task_id": "t", "attempt": 1, "producer_agent": "p", "event": event_, "run_id": empty},
            )
        progress = {"type": "progress", "stage": "s", "note": "n"}
        await agent.call("outputs.append", {"task_id": "t", "attempt": 2, "producer_agent": "p", "event": progress})
        final = {"type": "final", "content": {"kind": "inline", "value": "private" * 5_000}, "ok": True}
        record = {"id": "out-0123456789", "task_id": "0" * 32, "attempt": 0, "producer_agent": "tool:t"}
        line = {"output": record | {"event": final, "parent_refs": [], "created_at_ms": 1, "private": True}}
        await host.call("runs.import", {"lines": [line]})
        (root / "changes").write_text("changed")


@asynccontextmanager
async def statuses(owner: Peer) -> AsyncIterator[list[str]]:
    """A run in each status."""
    runs = [(await owner.create("prompt é", session_id="s", agent_id="b"))["id"] for _ in range(7)]
    for run_id, event in zip(
        runs,
        (
            {"type": "agent_start", "prompt": "p"},
            {"type": "planning_start"},
            {"type": "verification_start"},
            {"type": "agent_end", "text": "t"},
            {"type": "error", "message": "m"},
        ),
        strict=False,
    ):
        await owner.record(run_id, event)
    await owner.call("runs.cancel", {"run_id": runs[5], "reason": "r"})
    yield runs


async def two(start: StartDaemon, tmp_path: Path) -> tuple[Daemon, Daemon, Path]:
    """A daemon that is filled, an empty one with the same file root, and that root."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("file", "changes"):
        (root / name).write_text(f"content of {name}")
    settings: dict[str, Any] = {"file_root": str(root), "grace_s": 600}
    full, empty = start(name="full", **settings), start(name="empty", **settings)
    await fill(full, root)
    return full, empty, root


async def test_there_and_back_it_is_equal_to_the_byte_and_the_same_again_is_skipped(
    start: StartDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full, empty, _ = await two(start, tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    assert await command(full, "export", str(first)) == 0
    told = capfd.readouterr().err
    assert "goes without its file's size and digest" in told
    assert "27 runs" in told
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert await command(empty, "import", str(first)) == 0
    assert "27 runs, 5,049 events and 6 outputs imported; 0 were there already" in capfd.readouterr().err
    assert first.read_bytes().count(b',"private":true},"size":') == 1
    assert await command(empty, "export", str(second)) == 0
    assert first.read_bytes() == second.read_bytes()
    for daemon in (empty, full):
        capfd.readouterr()
        assert await command(daemon, "import", str(first)) == 0
        assert "0 runs, 0 events and 0 outputs imported; 33 were there already" in capfd.readouterr().err
    async with peer(empty, "host-token") as host:
        kinds = [line.keys() for line in map(json.loads, first.read_text().splitlines())]
        assert sum("run" in kind for kind in kinds) == len((await host.call("runs.list", {"limit": 100}))["runs"]) == 27


async def test_one_event_that_was_changed_ends_the_import_at_its_line(
    start: StartDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full, empty, _ = await two(start, tmp_path)
    file = tmp_path / "file"
    assert await command(full, "export", str(file)) == 0
    assert await command(empty, "import", str(file)) == 0
    lines = file.read_bytes().split(b"\n")
    number = next(n for n, line in enumerate(lines) if b'"n": 1234}' in line)
    lines[number] = lines[number].replace(b'"n": 1234}', b'"n": 1235}')
    file.write_bytes(b"\n".join(lines))
    capfd.readouterr()
    assert await command(empty, "import", str(file)) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"carserver: line {number + 1}: run 'run-")
    assert said.endswith("exists with another event 1234\n")


async def test_an_import_that_broke_off_is_run_again(
    start: StartDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full, empty, _ = await two(start, tmp_path)
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert await command(full, "export", str(whole)) == 0
    data = whole.read_bytes()
    half.write_bytes(data[: len(data) * 2 // 3])
    assert await command(empty, "import", str(half)) == 1
    assert "is no JSON" in capfd.readouterr().err
    assert await command(empty, "import", str(whole)) == 0
    assert await command(empty, "export", str(half), "--force") == 0
    assert half.read_bytes() == data


async def test_a_daemon_that_closes_in_the_middle_of_a_line_is_one_line_of_error(
    start: StartDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    daemon, file = start(message_bytes=1024 * 1024), tmp_path / "file"
    file.write_text(f'"{"x" * 15 * 1024 * 1024}"\n')
    for _ in range(3):
        assert await command(daemon, "import", str(file)) == 69
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("carserver: connection lost (")


async def test_what_is_recorded_and_deleted_during_an_export_spoils_none_of_its_runs(
    start: StartDaemon, tmp_path: Path
) -> None:
    daemon, empty = start(name="full"), start(name="empty", grace_s=600)
    file = tmp_path / "file"
    async with peer(daemon) as client:
        runs = [(await client.create())["id"] for _ in range(300)]
        for run_id in runs:
            await client.record(run_id, *({"type": "text", "n": n} for n in range(20)))
        exporting = asyncio.create_task(command(daemon, "export", str(file)))
        turn = 0
        while not exporting.done():
            run_id = runs[turn * 7 % len(runs)]
            if turn % 10 == 9 and len(runs) > 100:
                gone = runs.pop()
                await client.call("runs.cancel", {"run_id": gone})
                await client.call("runs.delete", {"run_id": gone})
            else:
                await client.record(run_id, {"type": "text", "n": -1})
            turn += 1
        assert await exporting == 0
    assert await command(empty, "import", str(file)) == 0
    again = tmp_path / "again"
    assert await command(empty, "export", str(again)) == 0
    assert again.read_bytes() == file.read_bytes()


async def test_prune_and_delete_by_command(start: StartDaemon, capfd: pytest.CaptureFixture[str]) -> None:
    daemon = start()
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        runs = [(await client.create())["id"] for _ in range(4)]
        for run_id in runs:
            await client.call("runs.cancel", {"run_id": run_id})
        assert await command(daemon, "prune", "--max-runs", "3", "--dry-run") == 0
        out, err = capfd.readouterr()
        assert (out, "1 run and 0 outputs would be deleted" in err) == (f"{runs[0]}\n", True)
        assert await command(daemon, "prune", "--max-runs", "3") == 2
        assert "--yes" in capfd.readouterr().err
        assert len((await host.call("runs.list"))["runs"]) == 4
        assert await command(daemon, "prune", "--older-than", "1d", "--max-runs", "3", "--yes") == 0
        assert capfd.readouterr().out == f"{runs[0]}\n"
        assert await command(daemon, "runs", "delete", runs[1], runs[2]) == 0
        assert capfd.readouterr().out == f"{runs[1]}: deleted\n{runs[2]}: deleted\n"
        assert await command(daemon, "runs", "delete", runs[1]) == 3
        assert await command(daemon, "runs", "delete", runs[3], "--as", "host") == 77
        assert [found["id"] for found in (await host.call("runs.list"))["runs"]] == runs[3:]
