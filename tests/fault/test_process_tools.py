"""What becomes of a command: how it ends, what it writes, what it inherits, and what it leaves behind."""

import asyncio
import errno
import os
import resource
import sys
import time
from pathlib import Path

import msgspec
import pytest

from carserver.config import Settings
from carserver.hosts.process import ProcessTool
from carserver.hosts.spec import Output
from carserver.protocol.tools import DataChunk, ErrorChunk, GivenChunk, GivenDone, TextChunk
from tests.fault.tooling import CALL, DESCRIPTORS, MARK, SHORT, WAIT_S, Feed, children, descriptors, rig, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tools need Linux")

MIB = 1024 * 1024


async def test_a_command_that_exits_with_0_succeeds_and_tells_how_long_it_took() -> None:
    async with rig() as pool:
        feed = await pool.run(pool.sh("echo out; echo err >&2; sleep 0.05"))
        assert feed.result["exit_code"] == 0
        assert feed.result["duration_ms"] >= 50
        assert feed.exit_code == 0
        assert feed.text == "out\n"
        assert TextChunk(text="err\n", stream="stderr") in feed.chunks


async def test_a_silent_command_is_its_end_alone() -> None:
    async with rig() as pool:
        assert len((await pool.run(pool.spec("true"))).chunks) == 1


async def test_another_exit_code_or_a_signal_fails_it() -> None:
    async with rig() as pool:
        feed = await pool.run(pool.sh("exit 3"))
        assert (feed.error, feed.exit_code) == ("exit code 3", 3)
        feed = await pool.run(pool.sh("kill -KILL $$"))
        assert (feed.error, feed.exit_code) == ("killed by signal 9", None)
        assert (await pool.run(pool.sh("kill -TERM $$"))).error == "killed by signal 15"


async def test_what_cannot_be_started_says_what_and_why(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    async with rig() as pool:
        for spec, why in (
            (pool.spec("no-such-program"), "no-such-program: No such file or directory"),
            (pool.spec("/no/such"), "/no/such: No such file or directory"),
            (pool.spec(str(plain)), f"{plain}: Permission denied"),
            (pool.spec("true", cwd="/no/such"), "the folder /no/such: No such file or directory"),
            (pool.spec("true", cwd=str(plain)), f"the folder {plain}: Not a directory"),
            (pool.spec("true", "a" * 4 * MIB), "true: Argument list too long"),
        ):
            feed = await pool.run(spec)
            assert feed.error == f"cannot start: {why}"
            assert feed.exit_code is None
        plain.chmod(0o700)
        assert (await pool.run(pool.spec(str(plain)))).error == f"cannot start: {plain}: Exec format error"


async def test_a_program_is_found_by_the_path_of_its_environment(tmp_path: Path) -> None:
    (tmp_path / "one-of-ours").write_text("#!/bin/sh\necho found in $PWD")
    (tmp_path / "one-of-ours").chmod(0o700)
    async with rig() as pool:
        pool.processes._environment = {**pool.processes._environment, "PATH": f"/no/such:{tmp_path}"}
        assert (await pool.run(pool.spec("one-of-ours", cwd=str(tmp_path)))).text == f"found in {tmp_path}\n"


async def test_long_arguments_arrive_whole() -> None:
    argument = "\u20ac" * 40_000  # 120,000 bytes; the kernel takes 128 KiB each
    async with rig() as pool:
        feed = await pool.run(pool.spec("sh", "-c", 'printf %s "$@" | wc -c', "sh", *[argument] * 14))
        assert feed.text.strip() == str(14 * 120_000)


INHERITED = """
import json, resource
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "descriptors": sorted(one for one in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + one)),
    "input": os.readlink("/proc/self/fd/0"),
    "variables": sorted(os.environ),
    "leads": os.getsid(0) == os.getpgrp() == os.getpid(),
    "blocked": int(status["SigBlk"], 16),
    "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "folder": os.getcwd(),
}))
"""


async def test_it_inherits_nothing_but_what_it_should(tmp_path: Path) -> None:
    ours = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(ours, True)
    async with rig() as pool:
        path = os.environ["PATH"]
        pool.processes._environment = {"CARSERVER_HOST_TOKEN": "secret", "PATH": path, "LC_ALL": "C", MARK: pool.mark}
        others = [pool.start(pool.spec("sleep", "1000")) for _ in range(5)]
        spec = pool.python(INHERITED, output="jsonl")
        feed = await pool.run(msgspec.structs.replace(spec, cwd=str(tmp_path)))
        for other, execution in others:
            execution.stop("enough")
            await other.until_told("gone")
    os.close(ours)
    assert isinstance(feed.chunks[0], DataChunk), feed.chunks
    assert msgspec.json.decode(feed.chunks[0].data) == {
        "descriptors": ["0", "1", "2"],
        "input": "/dev/null",
        "variables": [MARK, "LC_ALL", "PATH"],
        "leads": True,
        "blocked": 0,
        "limit": DESCRIPTORS,
        "folder": str(tmp_path),
    }


async def test_it_ignores_no_signal() -> None:
    """Python ignores some, and so would what it starts: `yes | head` would not end."""
    async with rig() as pool:
        assert (await pool.run(pool.sh("grep SigIgn /proc/self/status"))).text.split()[1].strip("0") == ""


async def test_standard_input_is_empty() -> None:
    async with rig() as pool:
        assert (await pool.run(pool.spec("cat"))).result["exit_code"] == 0


async def test_a_flood_arrives_whole() -> None:
    async with rig() as pool:
        feed = await pool.run(pool.spec("sh", "-c", "yes 0123456 | head -c 67108864; echo end >&2"))
        assert feed.result["exit_code"] == 0
        assert sum(len(chunk.text) for chunk in feed.chunks if isinstance(chunk, TextChunk)) == 64 * MIB + 4
        assert pool.counters.tool_output_bytes == 64 * MIB + 4
        assert pool.counters.tool_output_ignored_bytes == 0


async def test_a_flood_leaves_the_loop_to_others() -> None:
    async with rig() as pool:
        floods = [pool.start(pool.spec("yes")) for _ in range(4)]
        for feed, _ in floods:
            await feed.until_text("y")
        feed = await pool.run(pool.sh("echo here"))
        assert feed.text == "here\n"
        for feed, execution in floods:
            execution.stop("enough")
            await feed.until_told("gone")


@pytest.mark.parametrize("output", ["text", "jsonl"])
async def test_a_line_of_ten_mebibytes_arrives_whole(output: Output) -> None:
    async with rig() as pool:
        feed = await pool.run(pool.sh("head -c 10485760 /dev/zero | tr '\\0' x; echo", output))
        assert feed.text == "x" * 10 * MIB + "\n"


async def test_half_a_character_at_the_end_of_a_read_is_joined_with_the_rest() -> None:
    async with rig() as pool:
        spec = pool.python(
            "for byte in '\u20ac\U0001f600'.encode():\n"
            "    os.write(1, bytes([byte])); os.write(2, bytes([byte])); time.sleep(0.02)\n"
        )
        feed = await pool.run(spec)
        errors = "".join(chunk.text for chunk in feed.chunks if isinstance(chunk, TextChunk) and chunk.stream)
        assert (feed.text, errors) == ("\u20ac\U0001f600", "\u20ac\U0001f600")


async def test_what_a_command_wrote_arrives_whole_however_late_the_daemon_reads_it() -> None:
    class Slow(Feed):
        def take(self, chunk: GivenChunk, exit_code: int | None = None) -> None:
            super().take(chunk, exit_code)
            time.sleep(SHORT.settle_s)

    async with rig() as pool:
        feed = Slow()
        ProcessTool(pool.sh("head -c 60000 /dev/zero | tr '\\0' x"), pool.processes).start(CALL, feed)
        await feed.until_told("last", "gone")
        assert feed.text == "x" * 60_000


async def test_lines_of_json_are_chunks_and_standard_error_is_text() -> None:
    async with rig() as pool:
        feed = await pool.run(pool.sh("echo '{\"a\":1}'; echo plain; printf 2; echo '{}' >&2", "jsonl"))
        assert isinstance(feed.chunks[0], DataChunk)
        assert feed.text == "plain\n"
        assert sum(isinstance(chunk, DataChunk) for chunk in feed.chunks) == 2
        assert TextChunk(text="{}\n", stream="stderr") in feed.chunks


async def test_a_command_may_close_its_output_and_live_on() -> None:
    async with rig() as pool:
        feed = await pool.run(pool.sh("exec >&- 2>&-; sleep 0.5; exit 4"))
        assert feed.error == "exit code 4"


async def test_a_last_chunk_of_its_own_is_the_outcome_and_what_follows_is_ignored() -> None:
    async with rig(msgspec.structs.replace(SHORT, settle_s=WAIT_S)) as pool:  # it has its time to exit
        feed = await pool.run(pool.sh('echo \'{"kind":"done","result":7}\'; echo more; echo more >&2; exit 3', "jsonl"))
        assert msgspec.json.encode(feed.chunks[-1]) == b'{"kind":"done","result":7}'
        assert feed.exit_code == 3
        assert "more" not in feed.text
        feed = await pool.run(pool.sh('echo \'{"kind":"error","message":"no"}\'', "jsonl"))
        assert (feed.error, feed.exit_code) == ("no", 0)


async def test_a_command_that_said_its_last_and_lives_on_is_killed_after_a_moment() -> None:
    async with rig() as pool:
        feed = await pool.run(
            pool.sh("trap '' TERM; echo '{\"kind\":\"done\"}'; (setsid sleep 1000 &) ; sleep 1000", "jsonl")
        )
        assert isinstance(feed.chunks[-1], GivenDone)
        assert feed.exit_code is None


async def test_more_output_than_it_may_have_stops_it() -> None:
    async with rig() as pool:
        feed, _ = pool.start(pool.sh("trap '' TERM; yes", max_output=100_000))
        await feed.until_told("last", "gone")
        assert feed.error == "output is more than max_output allows (100000 bytes)"
        assert len(feed.text) == 100_000
        feed = await pool.run(pool.sh("yes | head -c 100000", max_output=100_000))
        assert feed.result["exit_code"] == 0


async def test_no_more_run_at_once_than_may_and_one_that_ended_makes_room() -> None:
    settings = Settings(processes=3, kill_after_s=SHORT.kill_after_s, unconfirmed_s=WAIT_S, settle_s=SHORT.settle_s)
    async with rig(settings) as pool:
        started = [pool.start(pool.spec("sleep", "1000")) for _ in range(3)]
        assert pool.processes.live == 3
        assert str(pool.processes.refuses()) == "3 process tools run, and more may not at once (processes)"
        for feed, execution in started:
            execution.stop("enough")
            await feed.until_told("gone")
        assert pool.processes.live == 0
        await pool.run(pool.spec("true"))


async def test_too_few_descriptors_in_the_daemon_fail_that_one_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with rig() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(os, "memfd_create", none_left)
            feed = await pool.run(pool.spec("true"))
            assert feed.error == "cannot start: Too many open files"
        await pool.run(pool.spec("true"))


async def test_too_few_descriptors_in_the_keeper_fail_that_one_handle() -> None:
    async with rig() as pool:
        limits = resource.prlimit(pool.keeper, resource.RLIMIT_NOFILE)
        await until(lambda: not children(pool.keeper))  # it has closed what it was sent, and waits for more
        used = descriptors(pool.keeper)
        came_to = set()
        for spare in range(16):
            resource.prlimit(pool.keeper, resource.RLIMIT_NOFILE, (used + spare, limits[1]))
            came_to.add(said((await pool.run(pool.spec("true"))).chunks[-1]))
        assert came_to <= {
            "cannot start: the keeper of process tools could not take it; see the daemon's log",
            "cannot start: a process: Too many open files",
            "done",
        }
        assert len(came_to) == 3
        await until(lambda: not children(pool.keeper))
        assert descriptors(pool.keeper) == used


def said(chunk: GivenChunk) -> str:
    return chunk.message if isinstance(chunk, ErrorChunk) else "done"


async def test_an_argument_that_no_program_can_have_fails_the_handle() -> None:
    async with rig() as pool:
        feed = Feed()
        call = msgspec.structs.replace(CALL, parameters=b'{"a":"\\u0000"}')
        ProcessTool(pool.spec("echo", "{a}"), pool.processes).start(call, feed)
        assert feed.told == [], "the caller has the execution before it hears of it"
        await feed.until_told("last", "gone")
        assert feed.error.startswith("cannot start: parameters.a: ")


async def test_many_at_once_all_end_well() -> None:
    async with rig() as pool:
        feeds = await asyncio.gather(*[pool.run(pool.sh(f"echo {n}")) for n in range(64)])
        assert [feed.text for feed in feeds] == [f"{n}\n" for n in range(64)]
