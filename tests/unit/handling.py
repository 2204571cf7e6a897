"""Handles for unit tests: the edits that open and close them, as the daemon would make them."""

from typing import Any

from carserver.core.edits import UsedKey
from carserver.core.handleedits import Close, Open
from carserver.core.principals import CLIENT, Principal
from tests.unit.storing import NOW_MS, event

DAY_MS = 86_400_000


def used(key: str, handle: str = "h", *, said: bytes = b"said", at_ms: int = NOW_MS, owner: str = "client") -> UsedKey:
    """A key of `tools.invoke`; `said` stands for the digest of its params."""
    return UsedKey(owner, "tools.invoke", key, said, at_ms, handle)


def open_handle(
    handle: str, run_id: str | None = None, *, by: Principal = CLIENT, key: UsedKey | None = None, now_ms: int = NOW_MS
) -> Open:
    """Before a tool starts."""
    start = None if run_id is None else event(0, type_="tool_start")
    said: dict[str, Any] = {"run_id": run_id, "start": start, "key": key, "key_ms": DAY_MS}
    return Open(principal=by, handle=handle, tool="grep", now_ms=now_ms, **said)


def close_handle(handle: str, run_id: str, ends: int = 1) -> Close:
    """After its end: an event of what it wrote, and its last."""
    events = [event(number, type_="tool_output_delta") for number in range(1, ends)]
    return Close(handle=handle, run_id=run_id, events=[*events, event(ends, type_="tool_end")], now_ms=NOW_MS + 5)
