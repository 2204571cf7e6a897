"""A cancel with a receipt (contract, section 10): what was cancelled, by whom, and whether nothing of it runs any more.

The run is cancelled, and the key used, in one transaction. What ran in the run is stopped by that, and its proof comes
later: so the receipt of that transaction says no more than `termination_unconfirmed`, and the final one, made when the
proofs are in, takes its place. What a killed daemon left behind is therefore true as it stands.
"""

import hashlib
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import msgspec
import orjson

from carserver.core.commands import Cancel
from carserver.core.edits import Change, Edit, Edited, KeptReceipt, Stored
from carserver.core.principals import Principal, visible
from carserver.core.runs import Head
from carserver.protocol.carruns import Receipt, ReceiptStatus
from carserver.protocol.codec import encode
from carserver.protocol.errors import conflict, not_found
from carserver.protocol.runs import FINAL
from carserver.protocol.trace import ended_record


class Receipted(NamedTuple):
    """A receipt as JSON; whether there will be no other for this key, and whether the key was new."""

    receipt: bytes
    final: bool
    is_new: bool


def receipt_of(head: Head, principal: Principal, key: str, reason: str, status: ReceiptStatus) -> bytes:
    """The receipt of a run that is over, as JSON.

    `receipt_digest` is that of the canonical JSON (RFC 8785) of the members before it: sorted by name, no spaces,
    strings escaped no more than must be, which is how orjson writes strings, integers and null.
    """
    receipt = Receipt(
        receipt_version=1,
        run_id=head.run.id,
        idempotency_key=key,
        reason_digest=_sha256(reason.encode()),
        principal=principal.name,
        status=status,
        terminal_digest=_sha256(encode(ended_record(head.run, head.outcome))),
        action_id=None,
        request_id=None,
        receipt_digest="",
    )
    members = msgspec.structs.asdict(receipt)
    del members["receipt_digest"]
    canonical = orjson.dumps(members, option=orjson.OPT_SORT_KEYS)
    return encode(msgspec.structs.replace(receipt, receipt_digest=_sha256(canonical)))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class CancelForReceipt(Edit, frozen=True, kw_only=True):
    """`runs.cancel` of the CAR dialect, its first part. Answers with a `Receipted`.

    The same key again gets what it made; with another run or reason it is a conflict.
    """

    run_id: str
    key: str
    reason: str
    now_ms: int
    changes_runs: ClassVar[bool] = False

    @property
    def size(self) -> int:
        return 1024 + len(self.reason)

    def edit(self, stored: Stored) -> Edited:
        digest = _params_digest(self.run_id, self.reason)
        prior = stored.receipts.get(self.principal.name, self.key)
        if prior is not None:
            if prior.digest != digest:
                used = msgspec.json.decode(prior.receipt, type=Receipt).run_id
                words = f"idempotency_key was used before, for run {used!r}, with another run_id or reason"
                raise conflict("key_reused", words, run_id=used)
            return Edited(Receipted(prior.receipt, prior.final, is_new=False))
        head = visible(stored.runs.head(self.run_id), self.principal, "run", self.run_id)
        final = head.run.status in FINAL
        applied: Sequence[Change] = ()
        status: ReceiptStatus = "already_terminal"
        if not final:
            command = Cancel(run_id=self.run_id, principal=self.principal, now_ms=self.now_ms, reason=self.reason)
            applied = [stored.runs.apply(command)]
            head, status = applied[0].applied.head, "termination_unconfirmed"
        receipt = receipt_of(head, self.principal, self.key, self.reason, status)
        stored.receipts.put(KeptReceipt(self.principal.name, self.key, head.no, digest, final, receipt))
        return Edited(Receipted(receipt, final, is_new=True), applied=applied)


class Finish(Edit, frozen=True, kw_only=True):
    """Its second part: what ran in the run is gone, or could not be seen to be. Answers with the receipt.

    Where there is a final one already, that is it; where the run was deleted meanwhile, with it went the receipt.
    """

    run_id: str
    key: str
    reason: str
    confirmed: bool

    def edit(self, stored: Stored) -> Edited:
        owner = self.principal.name
        head = visible(stored.runs.head(self.run_id), self.principal, "run", self.run_id)
        prior = stored.receipts.get(owner, self.key)
        if prior is None or prior.no != head.no:
            raise not_found("run", self.run_id)  # what has its id now is another
        if prior.final:
            return Edited(prior.receipt)
        status: ReceiptStatus = "cancelled_confirmed" if self.confirmed else "termination_unconfirmed"
        receipt = receipt_of(head, self.principal, self.key, self.reason, status)
        digest = _params_digest(self.run_id, self.reason)
        stored.receipts.put(KeptReceipt(owner, self.key, head.no, digest, final=True, receipt=receipt))
        return Edited(receipt)


def _params_digest(run_id: str, reason: str) -> bytes:
    return hashlib.sha256(encode([run_id, reason])).digest()
