"""Approvals: what a session asks a person to decide, and what was decided (contract, section 10). They are durable.

The table has them, and the loop keeps a copy of all: what is committed is told on the host board, in the log's order,
before it is answered. A session that requested one resolves it, while it lives; then its principal does.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, Stored, StoredApproval
from carserver.core.hostboard import Board, Seat
from carserver.core.hostintake import words_of
from carserver.core.ports import Committed, Done
from carserver.core.principals import Principal
from carserver.protocol.codec import encode
from carserver.protocol.errors import conflict, forbidden, invalid_params, limit_exceeded, not_found
from carserver.protocol.host import Approval
from carserver.protocol.trace import rfc3339

_decoder = msgspec.json.Decoder(Approval)


class Resolved(NamedTuple):
    """What resolving came to: the approval, whether it was pending until now, and which old ones went for it."""

    row: StoredApproval
    is_new: bool
    forgotten: Sequence[str] = ()


class RequestApproval(Edit, frozen=True, kw_only=True):
    """`host.request_approval`. Answers with `row`, which is `seat`'s to resolve."""

    row: StoredApproval
    seat: Seat
    maximum: int
    maximum_bytes: int

    @property
    def size(self) -> int:
        return 1024 + len(self.row.approval)

    def edit(self, stored: Stored) -> Edited:
        count, size = stored.approvals.pending()
        if count >= self.maximum:
            raise limit_exceeded("approvals", count + 1, self.maximum)
        if size + len(self.row.approval) > self.maximum_bytes:
            raise limit_exceeded("approvals_bytes", size + len(self.row.approval), self.maximum_bytes)
        stored.approvals.add(self.row)
        return Edited(self.row)


class ResolveApproval(Edit, frozen=True, kw_only=True):
    """`host.resolve_approval`. Answers with a `Resolved`.

    `is_anothers`: another session that lives requested it. `keep` resolved ones stay, and `keep_bytes` of them.
    """

    approval_id: str
    resolution: str
    is_anothers: bool
    now_ms: int
    keep: int
    keep_bytes: int

    def edit(self, stored: Stored) -> Edited:
        row = stored.approvals.get(self.approval_id)
        if row is None:
            raise not_found("approval", self.approval_id)
        approval = _decoder.decode(row.approval)
        self._check_who(row, approval)
        if approval.status == "resolved":
            if approval.resolution != self.resolution:
                words = f"it was resolved already, as {approval.resolution!r}, by {approval.resolved_by}"
                raise conflict("resolved", words, resolution=approval.resolution)
            return Edited(Resolved(row, is_new=False))
        words_there = words_of(approval.options)
        if words_there and self.resolution not in words_there:
            raise invalid_params("resolution", f"{self.resolution!r} is none of {', '.join(map(repr, words_there))}")
        after = replace(
            approval,
            status="resolved",
            resolution=self.resolution,
            resolved_at=rfc3339(self.now_ms),
            resolved_by=self.principal.name,
        )
        row = row._replace(resolved_at_ms=self.now_ms, approval=encode(after))
        stored.approvals.resolve(row)
        forgotten = stored.approvals.forget(row.id, self.keep, self.keep_bytes)
        return Edited(Resolved(row, is_new=True, forgotten=forgotten))

    def _check_who(self, row: StoredApproval, approval: Approval) -> None:
        if approval.system_level or self.principal.role == "host":
            return
        if self.is_anothers:
            words = "the session that requested it is connected: that one resolves it, or the host"
            raise forbidden(f"{words} (anyone, if it were requested with system_level)")
        if row.owner != self.principal.name:
            raise forbidden(f"it was requested by {row.owner}: that one resolves it, or the host")


class ApprovalLog(Protocol):
    """Keeps approvals. What it acknowledges is durable, and was handed to `Approvals.committed`."""

    async def edit(self, edit: Edit) -> Any:
        """See `core.ports.RunLog`."""
        ...


class _Kept(NamedTuple):
    """One, as the loop has it; `seat` is whose it is to resolve, None since that session has ended."""

    row: StoredApproval
    seat: Seat | None


class Approvals:
    """All approvals.

    Args:
        log: Where they are kept.
        board: Where their events are told.
        settings: `approvals`, `approvals_bytes`.
        counters: What is counted.
        found: Those that are stored when the daemon starts.
    """

    def __init__(
        self,
        log: ApprovalLog,
        board: Board,
        settings: Settings,
        counters: Counters,
        found: Iterable[StoredApproval] = (),
    ) -> None:
        self._log = log
        self._board = board
        self._settings = settings
        self._counters = counters
        self._kept: dict[str, _Kept] = {}
        self._pending: dict[str, None] = {}  # in the order in which they were requested
        for row in sorted(found, key=lambda row: row.created_at_ms):
            self._kept[row.id] = _Kept(row, None)
            if row.resolved_at_ms is None:
                self._pending[row.id] = None

    @property
    def pending(self) -> int:
        """How many are pending."""
        return len(self._pending)

    @property
    def resolved(self) -> int:
        """How many are kept that are not pending any more."""
        return len(self._kept) - len(self._pending)

    async def request(self, approval: Approval, seat: Seat, principal: Principal, now_ms: int) -> bytes:
        """The approval as JSON, once it is durable and told.

        Raises:
            RpcError: limit_exceeded; deadline_exceeded, overloaded, unavailable.
        """
        row = StoredApproval(approval.id, principal.name, now_ms, None, encode(approval))
        settings = self._settings
        request = RequestApproval(
            principal=principal,
            row=row,
            seat=seat,
            maximum=settings.approvals,
            maximum_bytes=settings.approvals_bytes,
        )
        await self._log.edit(request)
        return row.approval

    async def resolve(
        self, approval_id: str, resolution: str, seat: Seat | None, principal: Principal, now_ms: int
    ) -> bytes:
        """The approval as JSON, once its resolution is durable and told.

        Raises:
            RpcError: not_found, forbidden, conflict (resolved), invalid_params; deadline_exceeded, overloaded,
                unavailable.
        """
        there = self._kept.get(approval_id)
        requester = None if there is None else there.seat
        edit = ResolveApproval(
            principal=principal,
            approval_id=approval_id,
            resolution=resolution,
            is_anothers=requester is not None and not requester.closed and requester is not seat,
            now_ms=now_ms,
            keep=self._settings.approvals,
            keep_bytes=self._settings.approvals_bytes,
        )
        resolved: Resolved = await self._log.edit(edit)
        return resolved.row.approval

    def list_pending(self) -> bytes:
        """Those that are pending, as JSON, oldest first."""
        return b"[%b]" % b",".join(self._kept[id_].row.approval for id_ in self._pending)

    def list_all(self) -> bytes:
        """All that are kept, as JSON, oldest first."""
        return b"[%b]" % b",".join(kept.row.approval for kept in self._kept.values())

    def committed(self, changes: Sequence[Committed | Done]) -> None:
        """What one commit made, before any of it is acknowledged; called on the loop, in the log's order."""
        for change in changes:
            if isinstance(change, Done) and isinstance(change.edit, RequestApproval):
                self._requested(change.edit)
            elif isinstance(change, Done) and isinstance(change.edit, ResolveApproval):
                self._resolved(change.edited.answer)

    def _requested(self, edit: RequestApproval) -> None:
        row = edit.row
        self._kept[row.id] = _Kept(row, edit.seat)
        self._pending[row.id] = None
        self._counters.approvals_requested += 1
        approval = _decoder.decode(row.approval)
        self._board.publish("approval.requested", approval.agent_id, approval.action, Raw(row.approval))

    def _resolved(self, resolved: Resolved) -> None:
        if not resolved.is_new:
            return
        row = resolved.row
        self._kept[row.id] = self._kept[row.id]._replace(row=row)
        del self._pending[row.id]
        for id_ in resolved.forgotten:
            del self._kept[id_]
        self._counters.approvals_resolved += 1
        approval = _decoder.decode(row.approval)
        message = f"{approval.resolution}: {approval.action}"
        self._board.publish("approval.resolved", approval.agent_id, message, Raw(row.approval))
