"""Sessions and the daemon itself on the wire: `session.auth` and `server.*` (contract, sections 5 and 9)."""

from typing import Literal

from msgspec import Struct

Role = Literal["client", "agent", "host"]


class Auth(Struct, frozen=True, kw_only=True):
    """Params of `session.auth`: `token` (with `agent_id`, if one likes), or `host_token`."""

    token: str | None = None
    agent_id: str | None = None  # not looked at but beside an agent's token, so of whatever form
    host_token: str | None = None


class Authenticated(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who the session acts as from now on."""

    ok: bool
    auth_enabled: bool
    role: Role
    client_id: str
    agent_id: str | None = None


class Pong(Struct, frozen=True, kw_only=True):
    """The daemon's clock, milliseconds since 1970."""

    now_ms: int


class Counts(Struct, frozen=True, kw_only=True):
    """What is open now."""

    connections: int
    subscriptions: int
    attended_runs: int


class OutboxDepths(Struct, frozen=True, kw_only=True):
    """Bytes that wait for peers: in all, and for the slowest of them."""

    total_bytes: int
    largest_bytes: int


class StorageStatus(Struct, frozen=True, kw_only=True):
    """The database: its mode, its sizes, and what waits for it. `problem` is null while it takes writes."""

    durability: str
    database_bytes: int
    log_bytes: int
    waiting_commands: int
    problem: str | None


class ServerStatus(Struct, frozen=True, kw_only=True):
    """The daemon at a glance."""

    version: str
    boot_id: str
    uptime_ms: int
    draining: bool
    counts: Counts
    outboxes: OutboxDepths
    storage: StorageStatus


class Backup(Struct, frozen=True, kw_only=True):
    """Params of `server.backup`: where the backup is to be, as the daemon's machine names it."""

    path: str


class BackedUp(Struct, frozen=True, kw_only=True):
    """A backup that is complete and on disk: where it is, its size, and how many runs are in it."""

    path: str
    bytes: int
    runs: int


class Draining(Struct, frozen=True, kw_only=True):
    """Params of the notification `server.draining`: the connection is about to be closed with 1012."""

    retry_after_ms: int


class Closing(Struct, frozen=True, kw_only=True):
    """Params of `server.closing`, the last line to a peer that speaks in lines: a WebSocket's close code and reason."""

    code: int
    reason: str
