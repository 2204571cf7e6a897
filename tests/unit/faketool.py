"""An invocation for tests of the client side, as a daemon has it."""

import os
import signal
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.unit.fakedaemon import Session, Unanswered

Act = Callable[[Session], object]
HANDLE = "0123456789abcdef" * 2
HOSTILE = "[red]x[/]\x1b]0;title\x07\u202e\nsecond"
VISIBLE = "[red]x[/]\\x1b]0;title\\x07\\u202e\\nsecond"
BARE = {"exit_code": 0, "duration_ms": 1234}


def text(piece: str, **members: Any) -> dict[str, Any]:
    return {"kind": "text", "text": piece, **members}


def done(result: Any = None) -> dict[str, Any]:
    return {"kind": "done"} if result is None else {"kind": "done", "result": result}


def failure(message: str) -> dict[str, Any]:
    return {"kind": "error", "message": message}


def lost(session: Session) -> None:
    session.close(1012)
    raise Unanswered


def interrupt(number: signal.Signals = signal.SIGINT) -> Act:
    return lambda _: os.kill(os.getpid(), number)


class FakeTool:
    """One invocation, as a daemon has it: each poll brings the next scene; after the last of them it waits."""

    def __init__(self, *scenes: "list[dict[str, Any]] | Act", proof: str = "confirmed", **members: Any) -> None:
        self.scenes = deque(scenes)
        self.chunks: list[dict[str, Any]] = []
        self.dropped = 0  # of the oldest
        self.status = "running"
        self.members = members
        self.proof = proof
        self.stopped = False  # by a cancel
        self.invoked: Any = {"handle": HANDLE, "status": "running"}
        self.answers = {
            "tools.invoke": lambda _, __: self.invoked,
            "tools.poll": self._poll,
            "tools.cancel": self._cancel,
        }

    def _poll(self, session: Session, params: Any) -> Any:
        assert params["handle"] == HANDLE
        while self.scenes and self.status == "running":
            scene = self.scenes.popleft()
            if isinstance(scene, list):
                self._push(*scene)
                break
            scene(session)
        first = max(params["after"], self.dropped)
        if first == len(self.chunks) and self.status == "running":
            raise Unanswered
        answer = {"handle": HANDLE, "tool": "t", "action_id": "", "status": self.status, "first_sequence": first}
        return answer | {"chunks": self.chunks[first:]} | (self.members if self.status != "running" else {})

    def _push(self, *chunks: dict[str, Any], status: str = "failed") -> None:
        self.chunks += chunks
        last = self.chunks[-1]
        if last["kind"] in {"done", "error"}:
            self.status = "succeeded" if last["kind"] == "done" else status
            self.members.setdefault("error", last.get("message"))
            self.members = {k: v for k, v in {**self.members, "result": last.get("result")}.items() if v is not None}

    def _cancel(self, _: Session, params: Any) -> Any:
        assert params == {"handle": HANDLE, "wait_ms": 30_000}
        if self.status == "running":
            self._push(text("and goodbye\n"), failure("cancelled"), status="cancelled")
            self.stopped = True
        # A client whose connection ended may be answered a second time only, and is told the same.
        return {"cancelled": True, "cancel": self.proof} if self.stopped else {"cancelled": True}
