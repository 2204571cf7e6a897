"""A document's code blocks, run one after another as somebody would who reads it from top to bottom.

`sh` blocks run in a folder that looks like the repository's, with a home of their own; a line "until Ctrl-C" gets that
once it has shown something; `serve` starts the daemon anew, as another terminal would. `python` blocks are programs or,
where they have an `await` of their own, what is typed at `python -m asyncio`. A `text` block is wscat's session, or
what the block before it prints, where … stands for anything. Words in CAPITALS are filled in.
"""

import ast
import asyncio
import contextlib
import inspect
import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from websockets.asyncio.client import ClientConnection, connect

from carserver.config import Settings
from tests.daemon import ROOT, Daemon

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (docker|the network|root)\b.*")
SERVES = re.compile(r"^(?:scripts/serve|carserver serve)\b(.*)$", re.MULTILINE)
SAVED = re.compile(r"# (\w+\.py)\n")
OUTSIDE = re.compile(r"\b(docker|sudo|npx|pip install)\b")  # a block with one of these is to say what it needs
UNTIL = "until Ctrl-C"
LINKED = ("README.md", "CHANGELOG.md", "carserver", "docs", "examples")
COMMAND_S = 30.0


class Block(NamedTuple):
    """One fenced block of a document."""

    document: str
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """Its first line, where that says that it needs what a test has not."""
        first = self.text.partition("\n")[0]
        return first if NEEDS.fullmatch(first) else None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    """The blocks of a document, by its path in the repository."""
    text = (ROOT / document).read_text()
    return [
        Block(document, text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in FENCE.finditer(text)
    ]


class Reader:
    """Who follows a document word by word."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder / "carserver"
        self.folder.mkdir()
        for name in LINKED:
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / ".venv").symlink_to(sys.prefix)
        self.environment = {
            **{name: value for name, value in environment.items() if not name.startswith(("CARSERVER", "CAR_"))},
            "HOME": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "PATH": f"{sys.prefix}/bin:{environment['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.daemon = Daemon(folder / "state" / "carserver")
        self._prompt: dict[str, Any] = {"__name__": "__main__"}
        self._printed = ""

    async def read(self, block: Block) -> None:
        """Does what the block says."""
        text = await self._filled_in(block.text)
        if block.language == "text" and not text.startswith("$ wscat "):
            same(text, self._printed)
            return
        runs = {"sh": self._sh, "python": self._python, "text": self._wscat}
        self._printed = await runs[block.language](text)

    # Shells.

    async def _sh(self, text: str) -> str:
        assert not OUTSIDE.search(text)
        served = SERVES.search(text)
        if served is not None:
            await self.serve(*shlex.split(served[1], comments=True))
            text = SERVES.sub(":", text)
        lasting = [line for line in text.splitlines() if UNTIL in line]
        printed = await self._command("\n".join(line for line in text.splitlines() if UNTIL not in line))
        for line in lasting:
            await self._interrupted(line)
        return printed

    async def serve(self, *args: str) -> None:
        """Starts the daemon, or starts it anew."""
        if self.daemon.process is not None:
            assert await asyncio.to_thread(self.daemon.terminate) == 0, self.daemon.log
        await asyncio.to_thread(self.daemon.start, *args)

    async def _command(self, text: str) -> str:
        shell = await self._shell(f"set -euo pipefail\n{text}")
        async with asyncio.timeout(COMMAND_S):
            printed, said = await shell.communicate()
        assert shell.returncode == 0, f"exit {shell.returncode} of:\n{text}\n{printed.decode()}{said.decode()}"
        return printed.decode()

    async def _interrupted(self, line: str) -> None:
        """Ctrl-C, once the command has something to show."""
        command = await self._shell(f"exec {line}")
        assert command.stdout is not None
        async with asyncio.timeout(COMMAND_S):
            if " watch" in line:  # there is something to show when something happens
                await self.daemon.until("watches", 1)
                await self._command("""carserver call runs.create '{"prompt":"be seen"}'""")
            shown = await command.stdout.readline()
            if command.returncode is None:
                command.send_signal(signal.SIGINT)
            _, said = await command.communicate()
        assert shown, f"nothing was shown by: {line}\n{said.decode()}"
        assert command.returncode in {0, 128 + signal.SIGINT, -signal.SIGINT}, f"{line}: {said.decode()}"

    async def _shell(self, text: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *("bash", "-c", text),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.folder,
            env=self.environment,
        )

    # Python.

    async def _python(self, text: str) -> str:
        if saved := SAVED.match(text):
            (self.folder / saved[1]).write_text(text)
            return ""  # a block that follows runs it
        try:
            compile(text, "block", "exec")
        except SyntaxError:
            return await self._typed(text)
        (self.folder / "block.py").write_text(text)
        return await self._command("python block.py")

    async def _typed(self, text: str) -> str:
        code = compile(text, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = eval(code, self._prompt)
            if inspect.iscoroutine(result):
                await result
        return printed.getvalue()

    # A WebSocket.

    async def _wscat(self, text: str) -> str:
        first, *lines = text.splitlines()
        words = shlex.split(first)[2:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options["-c"] == f"ws://127.0.0.1:{Settings().port}"
        headers = dict([options["-H"].split(": ", 1)]) if "-H" in options else {}
        answer = ""
        async with connect(self.daemon.url, additional_headers=headers) as socket:
            for line in lines:
                if line.startswith("> "):
                    answer = await answered(socket, line[2:])
                else:
                    same(line.removeprefix("< "), answer)
        return answer

    # What is to be filled in.

    async def _filled_in(self, text: str) -> str:
        for word, value in (("RUN", self._run), ("OUTPUT", self._output), ("TOKEN", self._token)):
            if re.search(rf"\b{word}\b", text):
                text = re.sub(rf"\b{word}\b", await value(), text)
        return text

    async def _token(self) -> str:
        return self.daemon.token()

    async def _run(self) -> str:
        listed = json.loads(await self._command("carserver call runs.list '{\"limit\":1}'"))
        return str(listed["runs"][0]["id"])

    async def _output(self) -> str:
        return str(json.loads(await self._command("carserver call outputs.list"))["outputs"][0]["id"])


async def answered(socket: ClientConnection, request: str) -> str:
    """The answer to a request, which is not an error."""
    await socket.send(request)
    async with asyncio.timeout(COMMAND_S):
        while True:
            answer = str(await socket.recv())
            if (told := json.loads(answer)).get("id") == json.loads(request)["id"]:
                assert "result" in told, f"{request}: {answer}"
                return answer


def same(expected: str, printed: str) -> None:
    """Whether a block's text is what was printed; … stands for anything within a line."""
    pattern = ".*".join(map(re.escape, expected.strip().split("…")))
    assert re.fullmatch(pattern, printed.strip()), f"the document says:\n{expected}\nand this was printed:\n{printed}"
