"""A real daemon process for tests: started on its state folder, and seen to end without defects."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

STARTED = re.compile(r"listening on (ws://\S+)")
ROOT = Path(__file__).parent.parent
START_S = 30.0
EXIT_S = 30.0
DEFECTS = ("internal_errors", "undeclared_errors")


class NotStarted(Exception):
    """The daemon exited instead of listening; the message is what it said."""


class Daemon:
    """One `carserver serve` at a time on one state folder; settings go by their names, as in `config.Settings`.

    `wrapper` is a command that becomes the daemon: `env` or `nsenter` with their arguments.
    """

    def __init__(self, state: Path, *args: str, wrapper: Sequence[str] = (), **settings: object) -> None:
        self.state = state
        self.args = args
        self.wrapper = wrapper
        self.settings = settings
        self.expects_defects = False
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)

    # Its life.

    def start(self, *args: str) -> "Daemon":
        """Starts it and waits until it listens.

        Raises:
            NotStarted: it exited.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER", "CAR_"))}
        environment |= {f"CARSERVER_{name.upper()}": _text(value) for name, value in self.settings.items()}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
        )
        command = [sys.executable, "-m", "carserver", "serve", "--state-dir", str(self.state)]
        if "port" not in self.settings:
            command += ["--port", "0"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, *command, *self.args, *args], stdout=subprocess.PIPE, stderr=log, env=environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()  # ends when the daemon listens, or exits
        found = STARTED.match(line)
        if found is None:
            code = self.process.wait(START_S)
            self.process.stdout.close()
            self.process = None
            raise NotStarted(f"exit {code}: {line}{self.log}")
        self.url = found[1]
        return self

    def kill(self) -> None:
        """As a crash would end it."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> int:
        """As an operator ends it; the exit code."""
        return self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(EXIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self.process is not None
        return self.process.pid

    # What it says.

    @property
    def log_path(self) -> Path:
        """Its standard error, of all its starts."""
        return self.state.with_name(f"{self.state.name}.log")

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def http(self) -> str:
        """The base of its pages."""
        return self.url.replace("ws://", "http://")

    def token(self, name: str = "auth-token") -> str:
        """A secret of its state folder: `auth-token`, `host-token`, `agent-key`."""
        return (self.state / name).read_text().strip()

    def get(self, path: str) -> str:
        """One of its pages."""
        with urllib.request.urlopen(f"{self.http}{path}", timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def metrics(self) -> dict[str, float]:
        """Every figure without labels, by its name without `carserver_` and `_total`."""
        found = (
            re.fullmatch(r"carserver_(\w+?)(?:_total)? ([-+.e\d]+)", line) for line in self.get("/metrics").splitlines()
        )
        return {match[1]: float(match[2]) for match in found if match}

    async def until(self, name: str, at_least: float) -> float:
        """Waits for a figure to reach a value; the figure. The test's own timeout bounds it."""
        while (figure := (await asyncio.to_thread(self.metrics))[name]) < at_least:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
        return figure


@contextlib.contextmanager
def running(state: Path, *args: str, wrapper: Sequence[str] = (), **settings: object) -> Iterator[Daemon]:
    """A daemon for the length of a block. At its end it must still be there, without defects, and obey TERM."""
    daemon = Daemon(state, *args, wrapper=wrapper, **settings)
    daemon.start()
    try:
        yield daemon
        if daemon.process is not None:
            assert daemon.process.poll() is None, f"the daemon died:\n{daemon.log}"
            if not daemon.expects_defects:
                figures = daemon.metrics()
                assert {name: figures[name] for name in DEFECTS} == dict.fromkeys(DEFECTS, 0), daemon.log
            assert daemon.terminate() == 0, daemon.log
    finally:
        if daemon.process is not None:
            daemon.kill()


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
