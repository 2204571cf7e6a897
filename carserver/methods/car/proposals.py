"""`proposal.submit`: a graph of actions, run by what they depend on (contract, section 10)."""

from carserver.protocol.errors import ErrorKind, conflict
from carserver.protocol.proposals import ProposalResult, SubmitProposal
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session

_TOOLS = ("tools.register", [{"name": "grep"}, {"name": "summarize"}])
_READ = {"id": "a1", "type": "tool_call", "tool": "grep", "parameters": {"pattern": "TODO"}, "dependencies": []}
_SUM_UP = {
    "id": "a2",
    "type": "tool_call",
    "tool": "summarize",
    "parameters": {"text": "$a1.output"},
    "dependencies": ["a1"],
    "timeout_ms": 60_000,
    "failure_behavior": "retry",
    "max_retries": 1,
}


@method(
    "proposal.submit",
    dialect="car",
    waits=True,
    errors=[ErrorKind.FORBIDDEN, ErrorKind.CONFLICT],
    example=Example({"proposal": {"source": "reviewer", "actions": [_READ, _SUM_UP]}}, before=[_TOOLS]),
)
async def submit(session: Session, params: SubmitProposal) -> Encoded[ProposalResult]:
    """Runs the actions of a proposal, each as soon as all that it depends on has succeeded, and answers at the end.

    Where the connection has started or resumed a run, they are part of it: each is a turn of it, and is cancelled with
    it. Once that run is over, by whomever, it is a `conflict` (`run_terminal`) until another one is started.

    An action's `type` is `tool_call`; `dependencies` are ids of other actions. A string in `parameters` that is exactly
    `$<id>.output`, of an action that comes before, stands for its output. `timeout_ms` is a deadline for each try.

    `failure_behavior` says what follows when it fails: `abort` (where it says nothing) cancels what runs and skips the
    rest; `retry` tries it up to `max_retries` times more (3), then aborts; `skip` skips it and what depends on it. What
    is refused before it runs (an unknown tool, wrong parameters, too much at once) is not tried again. An error whose
    `data.terminal` is true aborts whatever it says, and this connection's later proposals are refused.

    With `invocation_mode` `streaming` or `long_running` an action's output is `{tool_handle, status: "running"}` as
    soon as its tool runs; `tools.poll` has the rest, and the proposal does not wait for it, nor end it.

    Where all outputs together would not fit an answer, the largest are `{result_ref: {id, size, preview}}`, and
    `outputs.get` has them. When the connection ends, what runs is cancelled, and nothing more starts.
    """
    proposals, run_id = session.services.proposals, session.current_run
    if run_id is not None and not session.services.runs.attendance.is_live(run_id):
        words = "no tool starts in it; runs.start begins another one, runs.resume goes on with one that was interrupted"
        raise conflict("run_terminal", f"run {run_id!r} is over: {words}")
    submitted = proposals.submit(params.proposal, session.acting, session, run_id)
    del params  # as large as a message, perhaps: not to be kept until the end
    return Encoded(await submitted)
