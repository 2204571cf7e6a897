"""The `carserver` command as a process, for tests that start it where it must fail, or beside a daemon."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
COMMAND_S = 20.0


def environment() -> dict[str, str]:
    """Ours, without settings of carserver."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER", "CAR_"))}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])}


def command(*args: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "carserver", *args]


def carserver(*args: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        command(*args), env=environment(), capture_output=True, text=True, timeout=COMMAND_S, check=False
    )


def call(state: Path, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """`carserver call`, as the client; its result."""
    done = carserver("call", method, json.dumps(params), "--state-dir", str(state))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def serve(state: Path, *args: str) -> subprocess.Popen[str]:
    """Starts a daemon that may fail to start."""
    return subprocess.Popen(
        command("serve", "--state-dir", str(state), "--port", "0", *args),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
