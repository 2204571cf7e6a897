"""Outputs for unit tests: appends as the method would make them, on a real store."""

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outputs import Output, take_in
from carserver.core.outputstore import Files, OutputStore
from carserver.core.principals import CLIENT, Principal
from carserver.protocol.outputs import Appended, GivenEvent, OutputRecord
from tests.unit.storing import NOW_MS, Opened

_event_decoder = msgspec.json.Decoder(GivenEvent)


def ids(first: int = 0) -> Callable[[], str]:
    """Ids that count."""
    numbers = itertools.count(first)
    return lambda: f"out-{next(numbers):010x}"


def given(**event: Any) -> GivenEvent:
    """An event as it comes."""
    decoded: GivenEvent = _event_decoder.decode(msgspec.json.encode(event))
    return decoded


def final(value: Any, **members: Any) -> dict[str, Any]:
    """The event of a final output with this inline value."""
    return {"type": "final", "content": {"kind": "inline", "value": value}, "ok": True, **members}


def progress(stage: str) -> dict[str, Any]:
    """The event of progress."""
    return {"type": "progress", "stage": stage}


def artifact(name: str, value: Any = "x") -> dict[str, Any]:
    """The event of an artifact with this inline value."""
    return {"type": "artifact", "name": name, "content": {"kind": "inline", "value": value}}


class Outputs:
    """An `OutputStore` on a real store."""

    def __init__(
        self, store: Opened, *, files: Files | None = None, new_id: Callable[[], str] | None = None, **settings: Any
    ) -> None:
        self.settings = Settings(**settings)
        self.counters = Counters()
        self.store = OutputStore(store.store, files, new_id or ids(), lambda: NOW_MS, self.settings, self.counters)

    async def append(
        self,
        event: dict[str, Any],
        *,
        task: str = "t",
        attempt: int = 1,
        by: str = "a",
        parents: tuple[str, ...] = (),
        run_id: str | None = None,
        principal: Principal = CLIENT,
        now_ms: int = NOW_MS,
        key: str | None = None,
        said: bytes = b"",
    ) -> str:
        """The id of a new output; `said` stands for the digest of what was said under a key."""
        taken = take_in(given(**event), self.settings)
        record = OutputRecord(
            id="",
            task_id=task,
            attempt=attempt,
            producer_agent=by,
            event=taken.event,
            parent_refs=list(parents),
            created_at_ms=now_ms,
            run_id=UNSET if run_id is None else run_id,
        )
        output = Output(owner=principal.name, record=record, body=taken.body, key=key, key_digest=said)
        appended: Appended = await self.store.append(output, taken, principal)
        return appended.id
