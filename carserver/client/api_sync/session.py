"""`session.*` of the daemon, typed, blocking: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""

from carserver.client.calls import BlockingCalls, given
from carserver.protocol.server import Authenticated


class Session:
    """`session.*`."""

    def __init__(self, calls: BlockingCalls) -> None:
        self._calls = calls

    def auth(
        self, *, token: str | None = None, agent_id: str | None = None, host_token: str | None = None
    ) -> Authenticated:
        """Authenticates the connection, unless the upgrade request did already.

        `token` is the auth token (role `client`) or an agent's token (role `agent`); `agent_id` beside an agent's token
        must match it, beside the auth token it is ignored. `host_token` gives the role `host`. A wrong token is
        answered after a second with `auth_failed` and may be tried again on the same connection; a connection that
        authenticates again as somebody else is `forbidden`, but on a Unix socket, where it acts as `client` from the
        start, it is not: there, what it subscribed to or watched until then ends, with `runs.trace.closed` or
        `runs.watch.reset`.

        Raises:
            CallError: `auth_failed`, `forbidden`, and what any call may raise.
        """
        answer: Authenticated = self._calls.call(
            "session.auth",
            given({}, token=token, agent_id=agent_id, host_token=host_token),
            result_type=Authenticated,
            again=True,
        )
        return answer
