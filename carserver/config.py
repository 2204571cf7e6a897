"""Every limit, duration and bound that can be set: its unit, its default, its reason.

What is a fact of a format or of the code that uses it, and no choice of an operator's, stands as a constant there.

This module is data: it reads no file and no environment (`cli.settings` does that) and every room may import it.
A field is set by `--flag` where the command line has one, else by `CARSERVER_<FIELD>`, else by the key of the same
name in `carserver.toml`. The source of each default is the contract, section 3, unless the comment says otherwise.
"""

from typing import Annotated, Literal

import msgspec

KIB = 1024
MIB = 1024 * KIB

Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]

Durability = Literal["full", "normal", "memory"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one daemon. `_bytes` are bytes, `_s` seconds, `_ms` milliseconds, everything else a count."""

    # Where it listens, and for whom.
    host: str = "127.0.0.1"
    port: Port = 9100  # 0 picks a free one
    unix: str = ""  # path of a Unix socket to listen on, too; empty: none
    stdio: bool = False  # the parent process is a peer, the host: a frame a line on standard input and output
    state_dir: str = ""  # empty: $XDG_STATE_HOME/carserver
    durability: Durability = "full"
    auth: bool = True  # false is --no-auth: everyone is host; loopback only
    allow_host: tuple[str, ...] = ()  # names beside the loopback ones; the port is not looked at
    allow_origin: tuple[str, ...] = ()  # whole origins; an empty list refuses every Origin
    methods: tuple[str, ...] = ()  # modules of @method functions beside carserver's own
    auth_token: str | None = None  # instead of the state folder's file of that name
    auth_token_file: str | None = None
    host_token: str | None = None
    host_token_file: str | None = None
    log_level: LogLevel = "info"

    # Messages and JSON.
    message_bytes: Bytes = 16 * MIB  # one message of an authenticated peer; above: close 1009
    message_bytes_before_auth: Bytes = 64 * KIB
    brackets: Count = 131_072  # opening ones in a message: each is an object to make, and 16 MiB of them stop the loop
    nesting: Count = 64  # brackets in a message, from its outermost one
    value_nesting: Count = 48  # brackets within an event, parameters or a value
    batch_calls: Count = 64
    id_chars: Count = 128
    frame_bytes: Bytes = 16 * MIB  # a frame to a peer; what does not fit is answered limit_exceeded

    # Runs.
    event_bytes: Bytes = 1 * MIB
    text_bytes: Bytes = 256 * KIB  # prompt, result text, error, each as UTF-8
    metadata_bytes: Bytes = 64 * KIB
    name_chars: Count = 256  # names, keys, foreign ids: printable characters
    record_events: Count = 1_000  # events in one runs.record
    run_events: Count = 1_000_000
    page_entries: Count = 1_000
    page_bytes: Bytes = 1 * MIB
    list_entries: Count = 100  # of a runs.list that names no limit
    scan_entries: Count = 10_000  # entries that one filtered runs.events looks at
    scan_bytes: Bytes = 16 * MIB  # and their bytes: an entry may be 1 MiB, so the count alone bounds nothing
    grace_s: Seconds = 30.0  # before a run that nobody attends is interrupted
    interrupts_at_once: Count = 100  # runs interrupted in one go, so that the loop and the writer have others between
    interrupts_pause_s: Seconds = 0.02  # between two goes

    # The live trace.
    subscription_events: Count = 1_024  # undelivered live events of one subscription
    subscription_bytes: Bytes = 1 * MIB
    subscriptions: Count = 1_024  # of one connection
    burst_bytes: Bytes = 64 * KIB  # frames of one commit joined for all viewers; a piece that a viewer takes or not
    catch_up_bytes: Bytes = 256 * KIB  # one page of a viewer that catches up; read when its outbox is a quarter full
    catch_up_reads: Count = 2  # pages read at a time, by threads of their own: one is framed while the next is read
    catch_up_retry_s: Seconds = 1.0  # before a page that could not be read is asked for again
    topics: Count = 10_000  # runs of which the loop keeps its copy though nobody watches them
    topics_bytes: Bytes = 64 * MIB  # and the bytes of their snapshots

    # Connections.
    connections: Count = 10_000
    connections_per_address: Count = 256  # of one address other than loopback
    unauthenticated: Count = 64  # open ones; the oldest is dropped for the new one. Handshakes count as connections
    in_flight: Count = 64  # short requests of one connection; then its reading pauses
    waiting: Count = 64  # requests of one connection that wait on someone; one more is overloaded
    turn_messages: Count = 64  # taken from one connection before the others have their turn
    turn_bytes: Bytes = 64 * KIB  # a read of at least this much ends the turn, too
    outbox_bytes: Bytes = 1 * MIB  # frames that wait for one socket; then its reading pauses
    high_water_bytes: Bytes = 256 * KIB  # of a socket's write buffer, in user space
    send_buffer_bytes: Bytes = 256 * KIB  # SO_SNDBUF: a stalled peer shows itself after this, not after megabytes
    handshake_bytes: Bytes = 16 * KIB  # request line and headers
    handshake_s: Seconds = 10.0
    auth_s: Seconds = 10.0
    wrong_token_s: Seconds = 1.0  # before a wrong token is answered; a right one never waits
    write_s: Seconds = 10.0  # a write that waits this long for the high-water mark aborts the transport
    ping_s: Seconds = 20.0
    pong_s: Seconds = 20.0
    close_s: Seconds = 2.0  # for the peer's half of the closing handshake; then the transport is aborted
    backlog: Count = 1_024  # connections that the kernel holds until they are accepted

    # Storage.
    storage_s: Seconds = 25.0  # after which a request is answered deadline_exceeded; under the CAR client's 30
    write_queue: Count = 65_536  # commands that wait for the writer; one more is overloaded
    write_queue_bytes: Bytes = 128 * MIB
    read_queue: Count = 4_096  # reads that wait for a reader thread; one more is overloaded
    commit_commands: Count = 4_096  # in one transaction
    commit_bytes: Bytes = 16 * MIB
    writer_heads: Count = 4_096  # run heads that the writer keeps
    writer_heads_bytes: Bytes = 64 * MIB
    wal_bytes: Bytes = 16 * MIB  # written, about, between two checkpoints
    read_threads: Count = 2
    probe_s: Seconds = 1.0  # how often storage that failed is tried when nobody writes
    sweep_events: Count = 2_000  # of deleted runs, removed in one transaction
    sweep_pages: Count = 2_000  # of the file, given back in one transaction
    sweep_pause_s: Seconds = 0.05  # between two of these, so that what is recorded meanwhile does not wait
    retry_after_ms: Count = 1_000  # told to a peer that is asked to come back

    # The end.
    drain_s: Seconds = 8.0  # from TERM to exit
