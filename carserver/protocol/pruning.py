"""Pruning on the wire: `server.prune` (contract, section 9)."""

from typing import Annotated

import msgspec
from msgspec import Struct

from carserver.protocol.runs import Milliseconds

Maximum = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Prune(Struct, frozen=True, kw_only=True):
    """Params of `server.prune`: what is to stay. At least one of the first three is wanted."""

    older_than_ms: Milliseconds | None = None
    max_runs: Maximum | None = None
    max_bytes: Maximum | None = None
    dry_run: bool = False


class Pruned(Struct, frozen=True, kw_only=True):
    """What went, or would go: counts, bytes of events and inline outputs, and the ids of the first runs.

    `more_runs` counts those whose ids do not stand in `run_ids`, `damaged_runs` those that stay because their rows
    cannot be read.
    """

    runs: int
    outputs: int
    bytes: int
    dry_run: bool
    run_ids: list[str]
    more_runs: int
    damaged_runs: int = 0
