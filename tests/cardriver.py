"""Drives the real CAR client: runs in its interpreter, and does what the lines say that `tests/carclient.py` sends.

A line in is a call, {id, on, call, args, kwargs}, or the answer to a question, {answer, result} or {answer, raises,
message}. A line out is what a call gave, {id, result} or {id, error}, or what happened: {asked, call} (the tool handler
waits for the answer), {notified, params}, {cancelled}. Each call has a thread of its own.
"""

import builtins
import functools
import importlib
import itertools
import json
import os
import queue
import sys
import threading
import time
from typing import Any

car_runtime: Any = importlib.import_module("car_runtime")  # not in the environment that type-checks this


class Driver:
    """The objects of the client by name, each made when it is first spoken to, and the questions that are open."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {"driver": self, "module": car_runtime}
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._hurries = threading.Event()
        # What the client prints must not come between the lines.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def serve(self) -> None:
        """Until standard input ends."""
        car_runtime.register_tool_handler(self._ask)
        car_runtime.register_tool_cancel_handler(lambda request_id: self._say(cancelled=request_id))
        for text in sys.stdin:
            line = json.loads(text)
            if "answer" in line:
                self._answers.pop(line["answer"]).put(line)
            else:
                threading.Thread(target=self._do, args=(line,), daemon=True).start()

    # What the lines ask for: a method of an object, or of this one (`on` is "driver").

    def listen(self, method: str, on: str, pause_s: float) -> None:
        """Has the notifications of a method said; before each its handler takes its time, until told to `hurry`."""

        def handle(params: str) -> None:
            if not self._hurries.is_set():
                time.sleep(pause_s)
            self._say(notified=method, params=json.loads(params))

        self._object(on).register_daemon_notification_handler(method, handle)

    def hurry(self) -> None:
        """No handler of notifications takes its time any more."""
        self._hurries.set()

    def execute_proposal(self, proposal: str, on: str) -> Any:
        """With a handler of this call alone."""
        return self._object(on).execute_proposal(proposal, self._ask)

    def host(self, name: str, params: str, on: str) -> Any:
        """A method of `HostClient`."""
        return getattr(car_runtime.HostClient(self._object(on)), name)(params)

    def run_agent(self, config: str, goal: str, turns: str | None, on: str) -> Any:
        """The package's own loop; a tool is asked about like any other call.

        `turns` is what the model says; None: the daemon is asked for that, and for what the loop verifies.
        """
        settings = json.loads(config)
        settings["tools"] = {
            schema["name"]: functools.partial(self._run_tool, schema["name"]) for schema in settings["tool_schemas"]
        }
        settings["runtime"] = self._object(on) if turns is None else Thinking(self._object(on), json.loads(turns))
        return importlib.import_module("car_runtime.agent_loop").run_agent(settings, goal)

    # The machinery.

    def _object(self, name: str) -> Any:
        with self._lock:
            if name not in self._objects:
                self._objects[name] = car_runtime.CarRuntime()
            return self._objects[name]

    def _do(self, line: dict[str, Any]) -> None:
        try:
            result = getattr(self._object(line["on"]), line["call"])(*line["args"], **line["kwargs"])
        except BaseException as raised:  # noqa: BLE001 - whatever it is, the test is told
            error = {"type": type(raised).__name__, "message": str(raised)}
            more = {name: getattr(raised, name, None) for name in ("code", "data")}
            self._say(id=line["id"], error=error | more)
        else:
            self._say(id=line["id"], result=result)

    def _ask(self, call: str) -> Any:
        answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        number = next(self._numbers)
        self._answers[number] = answer
        self._say(asked=number, call=json.loads(call))
        line = answer.get()
        if "raises" in line:
            kind = getattr(car_runtime, line["raises"], None) or getattr(builtins, line["raises"])
            raise kind(line["message"])
        return line["result"]

    def _run_tool(self, name: str, params: Any) -> Any:
        return json.loads(self._ask(json.dumps({"tool": name, "params": params})))

    def _say(self, **members: Any) -> None:
        text = json.dumps(members)
        with self._lock:
            self._out.write(text + "\n")
            self._out.flush()


class Thinking:
    """A runtime whose model says what was written for it, and that finds every proposal valid; else the real one."""

    def __init__(self, runtime: Any, turns: list[dict[str, Any]]) -> None:
        self._runtime = runtime
        self._turns = iter(turns)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def infer_tracked_with_request(self, request: str) -> str:
        """The next turn."""
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return json.dumps({"text": "", "model_used": "scripted", "latency_ms": 5, "usage": usage} | next(self._turns))

    def verify_proposal(self, proposal: str) -> str:
        """Without a look."""
        return '{"valid": true, "issues": []}'


if __name__ == "__main__":
    Driver().serve()
    os._exit(0)  # threads of the client may wait for answers that nobody gives
