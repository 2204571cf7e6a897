"""A model that is none: a small server of OpenAI's chat completions that says, and calls, what it is told to.

For agents that speak that protocol, offline: `python -m tests.fakemodel` runs one by itself.
"""

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

NAME = "fake"
KEY = "sk-fake"  # any will do


class Turn(NamedTuple):
    """What the model answers: some text, and then perhaps a tool to be called."""

    text: str = ""
    tool: str | None = None
    arguments: dict[str, Any] | None = None


class FakeModel:
    """Listens on a loopback port for the length of a block. A conversation's n-th answer is the n-th turn.

    Args:
        turns: the answers; the last one is given from then on.
        port: 0 for any.
        pause_s: between two pieces of an answer, seconds.
    """

    def __init__(self, *turns: Turn, port: int = 0, pause_s: float = 0.0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.let_go = threading.Event()  # and until it is set, a turn of no text and no tool says nothing
        self._turns = turns
        self._stopped = threading.Event()
        self._pause_s = pause_s
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.requests.append(body)
                if body.get("stream"):
                    model.stream(self, body)
                else:
                    model.answer(self, body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which OpenAI's clients find it."""
        return {"OPENAI_BASE_URL": f"http://127.0.0.1:{self._server.server_port}/v1", "OPENAI_API_KEY": KEY}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self.let_go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # What it answers.

    def stream(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        """A turn in pieces, as server-sent events."""
        turn = self._turn(body)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        try:
            for piece in self._pieces(turn):
                chunk = {"id": "chat-1", "object": "chat.completion.chunk", "created": 0, "model": NAME, **piece}
                handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                handler.wfile.flush()
                self._stopped.wait(self._pause_s)
            handler.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:  # whoever asked has gone
            return

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        """A turn as a whole."""
        turn = self._turn(body)
        message: dict[str, Any] = {"role": "assistant", "content": turn.text}
        if turn.tool is not None:
            message["tool_calls"] = [_call(turn)]
        choice = {"index": 0, "message": message, "finish_reason": _reason(turn)}
        whole = {"id": "chat-1", "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice]}
        data = json.dumps({**whole, "usage": _USAGE}).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _turn(self, body: dict[str, Any]) -> Turn:
        said: int = sum(message["role"] == "assistant" for message in body["messages"])
        turn = self._turns[min(said, len(self._turns) - 1)]
        if turn == Turn():
            self.let_go.wait()
        return turn

    def _pieces(self, turn: Turn) -> Iterator[dict[str, Any]]:
        for word in turn.text.split():
            yield _delta({"content": f"{word} "})
        if turn.tool is not None:
            call = _call(turn)
            arguments = call["function"].pop("arguments")
            yield _delta({"tool_calls": [call]})
            middle = len(arguments) // 2
            for part in (arguments[:middle], arguments[middle:]):
                yield _delta({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        yield {**_delta({}, _reason(turn)), "usage": _USAGE}


_USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def _delta(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _reason(turn: Turn) -> str:
    return "stop" if turn.tool is None else "tool_calls"


def _call(turn: Turn) -> dict[str, Any]:
    function = {"name": turn.tool, "arguments": json.dumps(turn.arguments or {})}
    return {"index": 0, "id": f"call-{turn.tool}", "type": "function", "function": function}


DEMO = (
    Turn("I will look at what is here.", "bash", {"command": "ls; sleep 1; wc -l *.md | tail -n 1"}),
    Turn("That is a project with documents of its own. Nothing needs to be done."),
)


def main() -> None:
    """Runs the demo's turns until it is stopped."""
    parser = argparse.ArgumentParser(description="A fake of an OpenAI-compatible server, for trying agents offline.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.1, metavar="SECONDS", help="between two pieces of an answer")
    options = parser.parse_args()
    with FakeModel(*DEMO, port=options.port, pause_s=options.pause) as model:
        for name, value in model.environment.items():
            print(f"export {name}={value}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
