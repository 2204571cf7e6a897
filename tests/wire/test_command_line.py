"""The commands against a daemon, as a person types them."""

import subprocess
import sys

import pytest

from tests.daemon import ROOT, Daemon

SECONDS = 30.0


def carserver(daemon: Daemon, *arguments: str, given: str = "") -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "carserver", *arguments, "--state-dir", str(daemon.state)]
    ended = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=SECONDS, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["for people", "as JSON"])
def test_a_run_with_metadata_is_recorded_listed_shown_and_traced(daemon: Daemon, flags: list[str]) -> None:
    events = '{"type":"agent_start","prompt":"p"}\n{"type":"agent_end","text":"done"}\n'
    run_id = carserver(daemon, "runs", "record", "--metadata", '{"n":1.50}', given=events).split()[0]
    assert run_id in carserver(daemon, "runs", "ls", *flags)
    assert '"n":1.50' in carserver(daemon, "runs", "get", run_id, *flags)
    assert "done" in carserver(daemon, "runs", "trace", run_id, *flags)
