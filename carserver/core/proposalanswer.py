"""The answer to a proposal: every output whole, as long as all of it fits a frame (contract, section 6, Large results).

What has no room is announced, never cut: the largest outputs are told by reference, the largest error messages by size.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

from msgspec import UNSET, Raw, Struct
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.chunks import preview
from carserver.core.handles import Handle
from carserver.core.outputs import content_of
from carserver.core.outputstore import OutputStore
from carserver.core.principals import Principal
from carserver.protocol.codec import encode
from carserver.protocol.errors import RpcError
from carserver.protocol.outputs import Inline
from carserver.protocol.proposals import ActionResult, ActionStatus, Cost, ProposalResult
from carserver.protocol.tools import ResultRef
from carserver.protocol.trace import rfc3339

_ENVELOPE = 1024  # bytes of a reply around its result, with the longest id
_MEMBER = len(b',"output":')


class _Detached(Struct, frozen=True):
    """The output of an action that was not waited for."""

    tool_handle: str
    status: str = "running"


class _Referred(Struct, frozen=True):
    """Stands in place of an output."""

    result_ref: ResultRef


class Output(NamedTuple):
    """What an action that succeeded came to: all that is kept of its handle, which may hold much more.

    `detached`: it was not waited for, so there is no result.
    """

    handle: str
    tool: str
    principal: Principal
    run_id: str | None
    result: bytes | None
    result_ref: ResultRef | None
    detached: bool

    @classmethod
    def of(cls, handle: Handle, *, detached: bool) -> "Output":
        """What is there of a handle now."""
        result, reference = (None, None) if detached else (handle.result, handle.result_ref)
        return cls(handle.id, handle.tool, handle.principal, handle.run_id, result, reference, detached)

    @property
    def size(self) -> int:
        """How many bytes it has whole, at most."""
        return len(self._kept()) if self.result_ref is None else self.result_ref.size

    @property
    def is_none(self) -> bool:
        """Whether its tool gave none."""
        return self.result is None and self.result_ref is None and not self.detached

    def _kept(self) -> bytes:
        return encode(_Detached(self.handle)) if self.detached else self.result or b"null"

    def told(self) -> bytes:
        """It, as JSON, or a reference to it."""
        return self._kept() if self.result_ref is None else encode(_Referred(self.result_ref))

    async def whole(self, outputs: OutputStore) -> bytes:
        """All of it, as JSON; `null` where its tool gave none.

        Raises:
            RpcError: not_found, or what reading raises, where it is an output record.
        """
        if self.result_ref is None:
            return self._kept()
        output = await outputs.get(self.result_ref.id, self.principal)
        return bytes(cast("Raw", cast("Inline", content_of(output.record.event)).value))


class Ending(NamedTuple):
    """What became of an action; `output` is there where it has succeeded.

    `not_recorded` says why the run that it is part of has no turn of it, where that is so.
    """

    action_id: str
    status: ActionStatus
    output: Output | None
    error: str | None
    duration_ms: int
    ended_at_ms: int
    not_recorded: str | None = None


async def encoded(
    proposal_id: str, endings: Sequence[Ending], cost: Cost, outputs: OutputStore, settings: Settings
) -> bytes:
    """A `ProposalResult`, as JSON.

    Raises:
        RpcError: what storing raises, where outputs that no record has are too many for a frame.
    """
    results = _fitting([_without_output(ending) for ending in endings], settings.frame_bytes // 2)
    answer = ProposalResult(proposal_id=proposal_id, results=results, cost=cost)
    room = settings.frame_bytes - _ENVELOPE - len(encode(answer))
    for place, output in (await _outputs(endings, room, outputs, settings)).items():
        results[place] = replace(results[place], output=Raw(output))
    return encode(answer)


def _without_output(ending: Ending) -> ActionResult:
    result = ActionResult(
        action_id=ending.action_id,
        status=ending.status,
        duration_ms=ending.duration_ms,
        timestamp=rfc3339(ending.ended_at_ms),
        not_recorded=UNSET if ending.not_recorded is None else ending.not_recorded,
    )
    return result if ending.error is None else replace(result, error=ending.error)


def _fitting(results: list[ActionResult], most: int) -> list[ActionResult]:
    """With the largest error messages told by their sizes, where all of them are more than `most` bytes."""
    sizes = {place: len(encode(result.error)) for place, result in enumerate(results) if isinstance(result.error, str)}
    total = sum(sizes.values())
    for place in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total <= most:
            break
        words = f"an error message of {sizes[place]} bytes, for which the answer has no room (frame_bytes)"
        results[place] = replace(results[place], error=words)
        total += len(words) - sizes[place]
    return results


async def _outputs(endings: Sequence[Ending], room: int, outputs: OutputStore, settings: Settings) -> dict[int, bytes]:
    """The outputs by the places of their actions: whole, or what refers to them."""
    given = {
        place: ending.output for place, ending in enumerate(endings) if ending.output and not ending.output.is_none
    }
    sizes = {place: output.size for place, output in given.items()}
    total = sum(sizes.values()) + _MEMBER * len(sizes)
    shown: dict[int, bytes] = {}
    for place in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total <= room or given[place].detached:
            break
        shown[place] = encode(_Referred(await _reference(given[place], outputs, settings)))
        total += len(shown[place]) - sizes[place]
    for place, output in given.items():
        if place not in shown:
            shown[place] = await _whole_or_reference(output, outputs)
    return shown


async def _whole_or_reference(output: Output, outputs: OutputStore) -> bytes:
    """What storage cannot read now can be read later, by its reference."""
    try:
        return await output.whole(outputs)
    except RpcError:
        return encode(_Referred(cast("ResultRef", output.result_ref)))


async def _reference(output: Output, outputs: OutputStore, settings: Settings) -> ResultRef:
    """To the record of an output; one that was small enough to have none gets one."""
    if output.result_ref is not None:
        return output.result_ref
    result = output.result or b"null"
    stored = await outputs.keep_result(output.principal, output.handle, output.tool, Raw(result), output.run_id)
    shown = preview(result, settings.result_preview_chars)
    return ResultRef(id=stored.record.id, size=len(result), preview=shown)
