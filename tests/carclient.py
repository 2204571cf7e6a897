"""The real CAR client as a process: what a test has it do, and what happens to it.

    @needs_car
    async def test_something(daemon: Daemon) -> None:
        async with car_client(daemon) as car:
            await car.call("register_tool", "echo")
            submitted = car.start("submit_proposal", {"actions": [...]})
            await (await car.asked()).answers({"said": "hello"})
            assert (await submitted)["results"][0]["status"] == "succeeded"

Started in some 40 ms, so each test has its own. `OLD` is the version that speaks protocol version 1: it knows the runs,
proposals and handlers, and no `daemon_call`, `connection_epoch`, poll, cancel or host.
"""

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.daemon import ROOT, Daemon

NEW = "car-0.58"
OLD = "car-0.31"
WAIT_S = 20.0
LINE_BYTES = 64 << 20  # of what the driver says at once: the client takes answers of 16 MiB


def _is_installed(version: str) -> bool:
    release = version.replace("car-", "car_runtime-")
    return any(_environment(version).glob(f"lib/python*/site-packages/{release}.*.dist-info"))


def _environment(version: str) -> Path:
    return Path(sys.prefix) / version  # scripts/_venv's `apart`


def _needs(version: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not _is_installed(version),
        reason=f"the real client is not installed (requirements/{version}.in; scripts/test installs it)",
    )


needs_car = _needs(NEW)
needs_old_car = _needs(OLD)


class CarError(Exception):
    """What a call raised in the client's process: `type` is the exception's name there."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['type']}: {error['message']}")
        self.type: str = error["type"]
        self.message: str = error["message"]
        self.code: int | None = error["code"]
        self.data: Any = error["data"]


class Notified(NamedTuple):
    """A notification that the client has handed to its handler."""

    method: str
    params: Any


@dataclass
class Asked:
    """The client's tool handler, called: it waits for an answer, and no other call is served meanwhile."""

    call: dict[str, Any]
    _car: "CarClient"
    _number: int

    async def answers(self, result: Any) -> None:
        """The handler returns this as JSON."""
        await self.returns(json.dumps(result))

    async def returns(self, text: object) -> None:
        """The handler returns this as it is."""
        await self._car.send({"answer": self._number, "result": text})

    async def raises(self, type_: str, message: str) -> None:
        """The handler raises an exception of the package, as `TerminalToolError`, or of Python."""
        await self._car.send({"answer": self._number, "raises": type_, "message": message})


class CarClient:
    """A process of the real client. Its runtimes go by names, `on`; one is made, unconnected, when first named."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.tools: dict[str, Callable[[Any], Any]] = {}  # answered at once, from the parameters; no others are
        self._answering: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()
        self._notified: asyncio.Queue[Notified] = asyncio.Queue()
        self._cancelled: asyncio.Queue[str] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())

    # Calls.

    async def call(self, name: str, *args: Any, on: str = "runtime", **kwargs: Any) -> Any:
        """The result of a method. Objects and arrays go as JSON text, and text that comes is read as JSON.

        Raises:
            CarError: it raised.
        """
        result = await self._do(on, name, args, kwargs)
        return json.loads(result) if isinstance(result, str) else result

    def start(self, name: str, *args: Any, on: str = "runtime", **kwargs: Any) -> "asyncio.Task[Any]":
        """Likewise, not waited for."""
        return asyncio.create_task(self.call(name, *args, on=on, **kwargs))

    async def daemon_call(self, method: str, params: Any = None, on: str = "runtime") -> Any:
        """Any method of the daemon by its name."""
        return await self.call("daemon_call", method, json.dumps({} if params is None else params), on=on)

    async def listen(self, *methods: str, on: str = "runtime", pause_s: float = 0.0) -> None:
        """Registers a handler for notifications; `tools.cancel` then goes there, and no longer to `cancelled`.

        It takes so long for each, until `hurry`.
        """
        for method in methods:
            await self._do("driver", "listen", (method,), {"on": on, "pause_s": pause_s})

    async def hurry(self) -> None:
        """Handlers of notifications take no time any more."""
        await self._do("driver", "hurry", (), {})

    async def execute_proposal(self, proposal: Any, on: str = "runtime") -> Any:
        """As `submit_proposal`, with a handler of this call alone; what it is asked comes to `asked` too."""
        return json.loads(await self._do("driver", "execute_proposal", (proposal,), {"on": on}))

    async def host(self, name: str, params: Any, on: str = "runtime") -> Any:
        """A method of `HostClient`: a connection of its own, with the host token of the home."""
        return json.loads(await self._do("driver", "host", (name, params), {"on": on}))

    async def run_agent(self, config: Any, goal: str, turns: list[Any] | None = None, on: str = "runtime") -> Any:
        """The package's agent loop with a scripted model, its outcome; calls of the config's `tool_schemas` are asked.

        A turn is `{"tool_calls": [{"id", "name", "arguments"}], "text"?}`; the last calls `finish` with an `answer`.
        Without turns the daemon is the model: `serve --methods tests.car_methods`.
        """
        return await self._do("driver", "run_agent", (config, goal, turns), {"on": on})

    # What happens to it.

    async def asked(self) -> Asked:
        """The next call of the tool handler, or of a tool of `run_agent`, that is not one of `tools`."""
        return await asyncio.wait_for(self._asked.get(), WAIT_S)

    async def notified(self) -> Notified:
        """The next notification of those listened to; in the daemon's order within one method, and only there."""
        return await asyncio.wait_for(self._notified.get(), WAIT_S)

    def notified_so_far(self) -> list[Notified]:
        """The notifications that have come and were not asked for yet."""
        return [self._notified.get_nowait() for _ in range(self._notified.qsize())]

    async def cancelled(self) -> str:
        """The next `request_id` that the cancel handler was called with."""
        return await asyncio.wait_for(self._cancelled.get(), WAIT_S)

    async def reconnected(self, epoch: int) -> None:
        """Its calls go to another connection than that one; those made in the moment of the loss may fail."""
        while True:
            with contextlib.suppress(CarError):
                if await self.call("connection_epoch") > epoch:
                    return

    # Its process.

    def pause(self) -> None:
        """It reads nothing any more."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """As a crash would end it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self._reader
        await self.process.wait()

    async def send(self, line: dict[str, Any]) -> None:
        """A line to the driver."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        await self.process.stdin.drain()

    async def _do(self, on: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        id_ = next(self._ids)
        future = self._calls[id_] = asyncio.get_running_loop().create_future()
        given = {"args": [_text(value) for value in args], "kwargs": {key: _text(kwargs[key]) for key in kwargs}}
        await self.send({"id": id_, "on": on, "call": name} | given)
        return await future

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while text := await self.process.stdout.readline():
            self._take(json.loads(text))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(ConnectionError(f"the client's process has ended: {self.log.read_text()}"))

    def _take(self, line: dict[str, Any]) -> None:
        if "asked" in line:
            self._take_call(Asked(line["call"], self, line["asked"]))
        elif "notified" in line:
            self._notified.put_nowait(Notified(line["notified"], line["params"]))
        elif "cancelled" in line:
            self._cancelled.put_nowait(line["cancelled"])
        else:
            future = self._calls.pop(line["id"])
            if future.done():  # the test has given up on it
                return
            if "error" in line:
                future.set_exception(CarError(line["error"]))
            else:
                future.set_result(line["result"])

    def _take_call(self, asked: Asked) -> None:
        if (tool := self.tools.get(asked.call["tool"])) is None:
            self._asked.put_nowait(asked)
            return
        task = asyncio.create_task(asked.answers(tool(asked.call["params"])))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)


@contextlib.asynccontextmanager
async def car_client(
    daemon: Daemon, version: str = NEW, *, token: str | None = "", **environment: str
) -> AsyncIterator[CarClient]:
    """A client for the length of a block; it connects at its first call.

    `token` is the daemon's where it is empty; None: none is given, and the client looks into its home, the folder
    `home` beside the daemon's state. It knows no other variable than those it is given.
    """
    home = daemon.state.with_name("home")
    home.mkdir(exist_ok=True)
    variables = {"HOME": str(home), "CAR_DAEMON_URL": daemon.url, "CAR_NO_VERSION_WARNING": "1"} | environment
    if token is not None:
        variables["CAR_AUTH_TOKEN"] = token or daemon.token()
    log = home / f"{version}.log"
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            str(_environment(version) / "bin" / "python"),
            "-I",
            str(ROOT / "tests" / "cardriver.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=variables,
            limit=LINE_BYTES,
        )
    car = CarClient(process, log)
    try:
        yield car
    finally:
        await car.kill()


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value
