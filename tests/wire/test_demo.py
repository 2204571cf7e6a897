"""scripts/demo, as fast as it goes: it shows what it promises, and leaves nothing behind. And its picture."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.daemon import ROOT

EXIT_S = 40.0


def started(tmp_path: Path, speed: float) -> "subprocess.Popen[str]":
    """The demo without the setting up of .venv, its temporary folder in one of the test's."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--speed", str(speed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def left(tmp_path: Path) -> list[str]:
    """Folders, and processes that were started with them."""
    found = [str(path) for path in tmp_path.iterdir()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [command] if str(tmp_path) in command else []
    return found


async def test_the_demo_shows_a_run_and_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    demo = started(tmp_path, 40)
    said, _ = await asyncio.to_thread(demo.communicate, timeout=EXIT_S)
    assert demo.returncode == 0, said
    assert "8 ms, 2 ms and 904 ms; here they go in slow motion" in said
    assert "tool_start           bash  call_0_91358" in said, "without a terminal it is lines"
    assert "completed: All done. The final answer is forty-two." in said
    assert "$ carserver runs watch" in said
    assert said.endswith("--help\n")
    assert left(tmp_path) == []


async def test_the_demo_stops_at_ctrl_c_and_leaves_nothing(tmp_path: Path) -> None:
    demo = started(tmp_path, 1)
    assert demo.stdout is not None
    said = ""
    while "$ carserver runs trace" not in said:
        line = await asyncio.to_thread(demo.stdout.readline)
        assert line, said
        said += line
    demo.send_signal(signal.SIGINT)
    rest, _ = await asyncio.to_thread(demo.communicate, timeout=EXIT_S)
    assert demo.returncode == 130, rest
    assert "nothing is left of the demo" in rest
    assert left(tmp_path) == []


def test_the_picture_is_the_view_as_it_is_now_and_needs_nothing_from_the_network(tmp_path: Path) -> None:
    made = tmp_path / "trace.svg"
    command = [sys.executable, str(ROOT / "scripts" / "picture.py"), str(made)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    picture = made.read_text()
    assert picture == (ROOT / "docs" / "pictures" / "trace.svg").read_text(), "make it anew: scripts/picture"
    assert "url(http" not in picture
    assert len(picture) < 100_000
