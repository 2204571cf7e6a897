"""The demo behind scripts/demo: it does nothing that a user could not do with the command `carserver`."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

LOGS = Path(__file__).resolve().parent.parent / "tests" / "data" / "agent-runs.json"
CARSERVER = [sys.executable, "-m", "carserver"]
LENGTHS_S = {"tools": 18.0, "plan": 28.0, "cancel": 25.0}  # of the replays; the first is the one that is watched
GAP_MS = 10  # a longer pause in a log counts as this
READING_S = 2.5  # for a look at what was printed
LEAST_WATCH_S = 1.0  # the command has to start
EXIT_S = 10.0
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended
ERRORS = "errors"  # in the folder: what the commands in the background say

INTRODUCTION = """\
carserver records what AI agents do, and lets you watch it live.

A daemon runs in a temporary folder, at {url}.
Three agents record in it: logs of real runs, replayed. Their model answered at
once, so they took {took}; here they go in slow motion,
with the long pauses shortened.
"""
GOODBYE = """\
That was the demo; its daemon and its folder are gone. A daemon of your own:
scripts/serve. All commands: .venv/bin/carserver --help"""


class Replay(NamedTuple):
    """A run that is being recorded, and the thread that feeds it."""

    run_id: str
    thread: threading.Thread


def main() -> int:
    """Runs the demo; 130 where it was stopped."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="What carserver is, within a minute.")
    parser.add_argument("--speed", type=float, default=1.0, help="How many times faster. [1]")
    speed = max(parser.parse_args().speed, 0.1)
    for variable in ("CARSERVER_URL", "CAR_DAEMON_URL"):  # another daemon is none of our business
        os.environ.pop(variable, None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="carserver-demo-") as folder:
            show(Path(folder), speed)
    except KeyboardInterrupt:
        say("Stopped; nothing is left of the demo.")
        return INTERRUPTED
    return 0


def show(folder: Path, speed: float) -> None:
    """The demo, in a folder of its own."""
    logs = {name: json.loads(LOGS.read_bytes())[name][0] for name in LENGTHS_S}
    with daemon(folder) as url, contextlib.ExitStack() as stack:
        replays = [stack.enter_context(replay(folder, name, log, speed)) for name, log in logs.items()]
        took = [f"{log['events'][-1]['timestamp_ms'] - log['events'][0]['timestamp_ms']} ms" for log in logs.values()]
        say(INTRODUCTION.format(url=url, took=f"{', '.join(took[:-1])} and {took[-1]}"))
        run_id = replays[0].run_id
        say(f"$ carserver runs trace {run_id}")
        time.sleep(READING_S / speed)
        with attached("runs", "trace", run_id, folder=folder) as process:
            ended_well(process.wait(), 0)
        say("\n$ carserver runs watch")
        time.sleep(READING_S / speed)
        with attached("runs", "watch", folder=folder) as process:
            for one in replays:
                one.thread.join()
            time.sleep(max(READING_S / speed, LEAST_WATCH_S))
            process.send_signal(signal.SIGINT)
            ended_well(process.wait(EXIT_S), INTERRUPTED, -signal.SIGINT)
    say(GOODBYE)


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """A daemon for the length of the block: its address."""
    with background("serve", "--port", "0", folder=folder, stdout=subprocess.PIPE) as process:
        yield line_of(process, folder).removeprefix("listening on ")


@contextlib.contextmanager
def replay(folder: Path, name: str, log: dict[str, Any], speed: float) -> Iterator[Replay]:
    """Records a log through `carserver runs record`, at its pace."""
    prompt = log["snapshot"]["prompt"]
    options = ["--input", "events", "--agent", name, "--session", "demo", "--prompt", prompt]
    with background(
        "runs", "record", *options, folder=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        run_id = line_of(process, folder)

        def work() -> None:
            feed(process.stdin, log, LENGTHS_S[name] / speed)
            if log["snapshot"]["status"] == "cancelled":
                with background("runs", "cancel", run_id, folder=folder, stdout=subprocess.DEVNULL) as cancelling:
                    cancelling.wait()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield Replay(run_id, thread)


def feed(pipe: IO[bytes] | None, log: dict[str, Any], length_s: float) -> None:
    """Writes a log's events, each after its pause, and leaves the pipe open: the run is attended."""
    with contextlib.suppress(BrokenPipeError, ValueError):  # the demo is being stopped
        for entry, pause in zip(log["events"], pauses(log, length_s), strict=True):
            time.sleep(pause)
            if pipe is not None:
                pipe.write(json.dumps(entry["event"]).encode() + b"\n")
                pipe.flush()


def pauses(log: dict[str, Any], length_s: float) -> list[float]:
    """What to wait before each event, `length_s` in all: in the proportions of the log, but for a least pause."""
    times = [entry["timestamp_ms"] for entry in log["events"]]
    weights = [1 + min(after - before, GAP_MS) for before, after in zip(times[:1] + times[:-1], times, strict=True)]
    return [length_s * weight / sum(weights) for weight in weights]


@contextlib.contextmanager
def attached(*arguments: str, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A command at this terminal; what it says last is waited for."""
    process = subprocess.Popen([*CARSERVER, *arguments, "--state-dir", str(folder / "state")])
    try:
        yield process
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(READING_S)  # Ctrl-C reaches it too
        end(process)


@contextlib.contextmanager
def background(*arguments: str, folder: Path, **pipes: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that Ctrl-C at this terminal does not reach; it ends with the block."""
    command = [*CARSERVER, *arguments, "--state-dir", str(folder / "state")]
    with (folder / ERRORS).open("ab") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        end(process)


def line_of(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    """The first line that a command prints."""
    line = process.stdout.readline().decode().strip() if process.stdout is not None else ""
    if not line:
        process.wait(EXIT_S)
        raise SystemExit((folder / ERRORS).read_text().strip() or "a command of the demo ended without a word")
    return line


def ended_well(code: int, *good: int) -> None:
    """A command of the demo that failed has said why."""
    if code not in good:
        raise SystemExit(f"the command failed with exit code {code}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command that has not ended yet."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def say(text: str) -> None:
    """Something for the reader."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
