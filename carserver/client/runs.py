"""`car.runs`: the generated methods, and a run's live trace."""

from collections.abc import AsyncGenerator

from carserver.client import api
from carserver.client.calls import Calls
from carserver.client.trace import Opener, Traced, trace


class Runs(api.Runs):
    """`runs.*`.

    Args:
        calls: what calls.
        another: makes a connection of its own for each trace: a trace is read as fast as its reader takes it, and
            calls must not wait for that.
        patience_s: for which a trace waits for a connection, seconds.
    """

    def __init__(self, calls: Calls, another: Opener, patience_s: float) -> None:
        super().__init__(calls)
        self._another = another
        self._patience_s = patience_s

    def trace(self, run_id: str, *, cursor: int = 0, epoch: str | None = None) -> AsyncGenerator[Traced, None]:
        """The records of a run as they happen, each once and in order, until the run is over.

        From the beginning it is the record `started`, then the log's entries, then `ended`, with which the iteration
        ends. An entry is an `event`, or a `turn` or `model_turn` of an agent of the CAR dialect. Lost connections and
        restarts of the daemon do not show, but as a pause. An interrupted run is over too (`run_status` says so), and
        may go on: to read on then, or in another process, give the `cursor` and the `epoch` of the last record.

        Each trace has a connection of its own, from its first record to its end: leave it by `aclosing` where it is
        left before its end. One that is read slowly makes the daemon wait, and at last disconnect; it goes on all the
        same.

        Args:
            run_id: the run.
            cursor: where to begin; other than 0 only together with `epoch`.
            epoch: the log that `cursor` counts in.

        Raises:
            TraceReset: the log is another one than that of `epoch`.
            TraceClosed: the run was deleted.
            CallError: the daemon refuses it; `not_found` where there is no such run, or it is somebody else's.
            ConnectionLost, Unreachable, NotAuthorised, CallTimeout: no connection, and none within `patience_s`.
        """
        return trace(self._another, run_id, cursor=cursor, epoch=epoch, patience_s=self._patience_s, insist=True)
