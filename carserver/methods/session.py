"""`session.*`: who a connection acts as (contract, section 5)."""

from carserver.core.principals import HOST, Principal
from carserver.protocol.errors import ErrorKind, RpcError, forbidden, invalid_params
from carserver.protocol.server import Auth, Authenticated
from carserver.rpc.method import Example, method
from carserver.rpc.session import Session


@method(
    "session.auth",
    again=True,
    role="anyone",
    while_draining=True,
    errors=[ErrorKind.AUTH_FAILED, ErrorKind.FORBIDDEN],
    example=Example({"token": "AUTH_TOKEN"}),
)
async def auth(session: Session, params: Auth) -> Authenticated:
    """Authenticates the connection, unless the upgrade request did already.

    `token` is the auth token (role `client`) or an agent's token (role `agent`); `agent_id` beside an agent's token
    must match it, beside the auth token it is ignored. `host_token` gives the role `host`. A wrong token is answered
    after a second with `auth_failed` and may be tried again on the same connection; a connection that authenticates
    again as somebody else is `forbidden`, but on a Unix socket, where it acts as `client` from the start, it is not:
    there, what it subscribed to or watched until then ends, with `runs.trace.closed` or `runs.watch.reset`.
    """
    if not session.services.settings.auth:
        return _answer(session, HOST, enabled=False)
    principal = await _prove(session, params)
    if session.principal is None or session.provisional:
        session.authenticate(principal)
    elif session.principal != principal:
        raise forbidden(f"this connection acts as {session.principal.name} already; open another one")
    return _answer(session, principal, enabled=True)


async def _prove(session: Session, params: Auth) -> Principal:
    """Whose token it is."""
    if (params.token is None) == (params.host_token is None):
        raise invalid_params("token", "give either token or host_token")
    principal = session.services.authority.principal_of(params.token or params.host_token or "")
    right = principal is not None and (principal.role == "host") == (params.host_token is not None)
    if right and principal is not None and principal.role == "agent" and params.agent_id is not None:
        right = principal.agent_id == params.agent_id
    if principal is None or not right:
        session.services.counters.wrong_tokens += 1
        await session.services.daemon.sleep(session.services.settings.wrong_token_s)
        raise RpcError(ErrorKind.AUTH_FAILED, "token mismatch: this is not the token of this daemon; try another one")
    return principal


def _answer(session: Session, principal: Principal, *, enabled: bool) -> Authenticated:
    return Authenticated(
        ok=True,
        auth_enabled=enabled,
        role=principal.role,
        client_id=session.client_id,
        agent_id=principal.agent_id,
    )
