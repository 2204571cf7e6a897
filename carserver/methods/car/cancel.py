"""`runs.cancel` of the CAR dialect: it answers with a receipt, when what ran is known to be gone (`core.receipts`)."""

from carserver.core.receipts import CancelForReceipt, Finish, Receipted
from carserver.methods.car.runs import RUN, START
from carserver.protocol.carruns import CancelByKey, Receipt
from carserver.protocol.codec import check_text
from carserver.protocol.errors import ErrorKind
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session


@method(
    "runs.cancel",
    dialect="car",
    waits=True,
    errors=[ErrorKind.NOT_FOUND, ErrorKind.CONFLICT],
    example=Example({"run_id": RUN, "idempotency_key": "first", "reason": "not needed"}, before=[START]),
)
async def cancel(session: Session, params: CancelByKey) -> Encoded[Receipt]:
    """Cancels a run: one's own, any for the host; answers when nothing that ran in it lives, or when that was given up.

    `status`: `cancelled_confirmed`; `termination_unconfirmed` where something may still live; `already_terminal` where
    the run had a final status before. The same key gives the same receipt; with another run or reason it is a
    `conflict` (`key_reused`).
    """
    services, principal = session.services, session.acting
    run_id, key, reason = params.run_id, params.idempotency_key, params.reason
    check_text(reason, "text_bytes", services.settings.text_bytes, "reason")
    first = CancelForReceipt(principal=principal, run_id=run_id, key=key, reason=reason, now_ms=services.clock.now_ms())
    receipted: Receipted = await services.runs.edit(first, session)
    if receipted.final:
        return Encoded(receipted.receipt)
    stopping = services.tools.stopping(run_id)
    # Of a key that was used before, and of which nothing is under way, nobody knows any more what became of it.
    confirmed = await services.tools.are_gone(stopping) and bool(receipted.is_new or stopping)
    last = Finish(principal=principal, run_id=run_id, key=key, reason=reason, confirmed=confirmed)
    receipt: bytes = await services.runs.edit(last, session)
    return Encoded(receipt)
