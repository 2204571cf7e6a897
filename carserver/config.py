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
    host: str = "127.0.0.1"  # an address of this machine; what peers call it by otherwise goes into allow_host
    port: Port = 9100  # 0 picks a free one
    unix: str = ""  # path of a Unix socket to listen on, too; empty: none
    stdio: bool = False  # the parent process is a peer, the host: a frame a line on standard input and output
    state_dir: str = ""  # empty: $XDG_STATE_HOME/carserver
    durability: Durability = "full"  # an acknowledgement survives: a power cut; normal: a kill; memory: nothing
    auth: bool = True  # false is --no-auth: everyone is host; loopback only
    allow_host: tuple[str, ...] = ()  # names beside the loopback ones; the port is not looked at
    allow_origin: tuple[str, ...] = ()  # whole origins; an empty list refuses every Origin
    methods: tuple[str, ...] = ()  # modules of @method functions beside carserver's own
    auth_token: str | None = None  # instead of the state folder's file of that name
    auth_token_file: str | None = None  # a file that holds it
    host_token: str | None = None  # likewise
    host_token_file: str | None = None  # a file that holds it
    log_level: LogLevel = "info"  # debug, info, warning or error

    # Messages and JSON.
    message_bytes: Bytes = 16 * MIB  # one message of an authenticated peer; above: close 1009
    message_bytes_before_auth: Bytes = 64 * KIB  # one message of anybody else
    brackets: Count = 131_072  # opening ones in a message: each is an object to make, and 16 MiB of them stop the loop
    nesting: Count = 64  # brackets in a message, from its outermost one
    value_nesting: Count = 48  # brackets within an event, parameters or a value
    batch_calls: Count = 64  # requests in a batch
    id_chars: Count = 128  # of a request's id
    frame_bytes: Bytes = 16 * MIB  # a frame to a peer; what does not fit is answered limit_exceeded

    # Runs.
    event_bytes: Bytes = 1 * MIB  # one event
    text_bytes: Bytes = 256 * KIB  # prompt, result text, error, each as UTF-8
    metadata_bytes: Bytes = 64 * KIB  # of a run
    name_chars: Count = 256  # names, keys, foreign ids: printable characters
    record_events: Count = 1_000  # events in one runs.record
    run_events: Count = 1_000_000  # events of one run
    page_entries: Count = 1_000  # entries of one page
    page_bytes: Bytes = 1 * MIB  # and their bytes; one larger entry is a page
    list_entries: Count = 100  # of a runs.list that names no limit
    scan_entries: Count = 10_000  # entries that one filtered runs.events looks at
    scan_bytes: Bytes = 16 * MIB  # and their bytes: an entry may be 1 MiB, so the count alone bounds nothing
    grace_s: Seconds = 30.0  # before a run that nobody attends is interrupted
    interrupts_at_once: Count = 100  # runs interrupted in one go, so that the loop and the writer have others between
    interrupts_pause_s: Seconds = 0.02  # between two goes

    # Outputs.
    output_bytes: Bytes = 1 * MIB  # of an inline value: of the string, or of the compact JSON of another value
    output_inline_bytes: Bytes = 4 * KIB  # above, outputs.list leaves an inline value out
    output_slice_bytes: Bytes = 1 * MIB  # one outputs.read; as base64 or with escapes it fits a frame
    output_parents: Count = 1_000  # each is looked up in the writer's transaction
    file_root: str = ""  # folder that file references lie below; empty: there are none
    file_bytes: Bytes = 1024 * MIB  # a file; all of it is read when it is appended
    file_threads: Count = 2  # that read whole files, to append them; one more reads slices
    file_queue: Count = 256  # files that wait for these; one more is overloaded

    # Tools.
    tools: str = ""  # path of the file that declares process tools; empty: there are none
    tool_bytes: Bytes = 64 * KIB  # one tool's definition
    tools_bytes: Bytes = 8 * MIB  # and all of them
    hosted_tools: Count = 1_000  # that one connection hosts
    handles: Count = 4_096  # live ones of one principal; and requests that one host has not answered
    handle_chunks: Count = 1_024  # undrained chunks of one handle; then the oldest go
    handle_bytes: Bytes = 1 * MIB  # and their bytes as JSON, or one larger
    chunk_bytes: Bytes = 64 * KIB  # longer text is split; a larger chunk of another kind fails its handle
    result_bytes: Bytes = 15 * MIB  # of a handle; a larger one fails it
    result_inline_bytes: Bytes = 64 * KIB  # above, a result becomes an output
    result_preview_chars: Count = 256  # of such a result, told beside the output's id
    finished_s: Seconds = 900.0  # for which a finished handle is kept
    finished_handles: Count = 4_096  # of one principal; then the one that was finished first goes
    finished_bytes: Bytes = 64 * MIB  # and their bytes
    tool_key_s: Seconds = 86_400.0  # for which an idempotency key of tools.invoke and tools.call is kept
    kill_after_s: Seconds = 5.0  # from TERM to KILL of a process tool; for a host, to answer what was cancelled
    unconfirmed_s: Seconds = 2.0  # after KILL; what lives then may go on living
    settle_s: Seconds = 1.0  # after a command's exit, for what its pipes still hold; then what it left is killed
    max_output: Bytes = 1024 * MIB  # of a process tool, where the tools file says nothing else; beyond it is stopped
    processes: Count = 1_024  # process tools at once; each takes four descriptors
    stream_events: Count = 256  # of tools' live stream, or the host board's, that wait for a peer; then the oldest go
    stream_bytes: Bytes = 1 * MIB  # and their bytes, or one larger
    delta_s: Seconds = 0.05  # between two pieces of a handle's output in its run's log
    delta_bytes: Bytes = 4 * KIB  # such a piece, as UTF-8
    recorded_bytes: Bytes = 256 * KIB  # of a handle's text in its run's log
    proposal_actions: Count = 256  # of one proposal; each may depend on all others
    proposals_bytes: Bytes = 64 * MIB  # parameters and outputs that all open ones keep; one more is overloaded

    # The live trace.
    subscription_events: Count = 1_024  # undelivered live events of one subscription
    subscription_bytes: Bytes = 1 * MIB  # and their bytes, or one larger event; then it catches up from the log
    subscriptions: Count = 1_024  # of one connection
    burst_bytes: Bytes = 64 * KIB  # frames of one commit joined for all viewers; a piece that a viewer takes or not
    catch_up_bytes: Bytes = 256 * KIB  # one page of a viewer that catches up; read when its outbox is a quarter full
    catch_up_reads: Count = 2  # pages read at a time, by threads of their own: one is framed while the next is read
    catch_up_retry_s: Seconds = 1.0  # before a page that could not be read is asked for again
    topics: Count = 10_000  # runs of which the loop keeps its copy though nobody watches them
    topics_bytes: Bytes = 64 * MIB  # and the bytes of their snapshots
    watch_runs: Count = 1_024  # changed runs that wait for one who watches; then it lists again
    watch_bytes: Bytes = 16 * MIB  # and their snapshots, or one larger: texts make one a MiB
    watch_piece_bytes: Bytes = 64 * KIB  # of them in the outbox at a time, so that live traces have their turn

    # The CAR dialect's runs (contract, section 10).
    turns: Count = 2_000  # of one run; then they are dropped, and the answer says so
    record_turns: Count = 256  # in one runs.record_turns
    recorded_string_bytes: Bytes = 16 * KIB  # a string in a turn; what is longer is cut, and marked
    recorded_turn_bytes: Bytes = 256 * KIB  # a turn; in a larger one the largest members are replaced by a mark
    outcome_bytes: Bytes = 1 * MIB  # of runs.complete
    so_far_turns: Count = 1_000  # records in the answer of runs.subscribe
    so_far_bytes: Bytes = 4 * MIB  # and their bytes; the stream has the rest
    whole_trace_bytes: Bytes = 8 * MIB  # of records in the answer of runs.get_trace; a cursor gets the rest

    # The host board (contract, section 10): all of it fits a frame.
    board_entries: Count = 256  # agents and devices that one connection has registered
    board_all_entries: Count = 4_096  # and all connections together
    board_bytes: Bytes = 4 * MIB  # and their bytes as JSON
    board_text_bytes: Bytes = 16 * KIB  # a message, a current task, what an approval is asked for
    board_events: Count = 1_000  # the newest, which are kept
    board_events_bytes: Bytes = 1 * MIB  # and their bytes as JSON, or one larger
    approvals: Count = 1_000  # pending ones; and so many that were resolved are kept
    approvals_bytes: Bytes = 4 * MIB  # of these as JSON; likewise

    # Connections.
    connections: Count = 10_000  # at once
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
    handshake_s: Seconds = 10.0  # for the whole of it
    auth_s: Seconds = 10.0  # from the upgrade to the right token
    wrong_token_s: Seconds = 1.0  # before a wrong token is answered; a right one never waits
    write_s: Seconds = 10.0  # a write that waits this long for the high-water mark aborts the transport
    ping_s: Seconds = 20.0  # between two pings
    pong_s: Seconds = 20.0  # for the answer to one; then the connection is closed
    close_s: Seconds = 2.0  # for the peer's half of the closing handshake; then the transport is aborted
    backlog: Count = 1_024  # connections that the kernel holds until they are accepted

    # Storage.
    storage_s: Seconds = 25.0  # after which a request is answered deadline_exceeded; under the CAR client's 30
    write_queue: Count = 65_536  # commands that wait for the writer; one more is overloaded
    write_queue_bytes: Bytes = 128 * MIB  # and their bytes
    read_queue: Count = 4_096  # reads that wait for a reader thread; one more is overloaded
    commit_commands: Count = 4_096  # in one transaction
    commit_bytes: Bytes = 16 * MIB  # and their bytes
    writer_heads: Count = 4_096  # run heads that the writer keeps
    writer_heads_bytes: Bytes = 64 * MIB  # and their bytes
    wal_bytes: Bytes = 16 * MIB  # written, about, between two checkpoints
    read_threads: Count = 2  # for everything but the pages of those who catch up
    backup_log_bytes: Bytes = 1024 * MIB  # to which the write-ahead log may grow while a backup is made
    check_after_s: Seconds = 5.0  # before the structure of one that is larger is checked, beside the work
    check_bytes: Bytes = 2 * MIB  # a database up to this is checked whole at the start, which takes 30 ms
    probe_s: Seconds = 1.0  # how often storage that failed is tried when nobody writes
    prune_runs: Count = 100  # deleted in one transaction
    prune_outputs: Count = 1_000  # likewise
    imports: Count = 64  # runs that are being imported; one more, and the one that began first is dropped
    import_lines: Count = 1_000  # in one runs.import
    sweep_events: Count = 2_000  # of deleted runs, removed in one transaction
    sweep_bytes: Bytes = 4 * MIB  # and their bytes: every page that they take is looked at
    sweep_pages: Count = 500  # of the file, given back in one transaction
    sweep_pause_s: Seconds = 0.05  # between two of these, so that what is recorded meanwhile does not wait
    retry_after_ms: Count = 1_000  # told to a peer that is asked to come back

    # Retention: what the daemon prunes by itself, oldest ended first, never a live run. Unset: nothing.
    retention_age_s: Annotated[float, msgspec.Meta(gt=0)] | None = None  # since a run's end
    retention_runs: Count | None = None  # that stay
    retention_bytes: Bytes | None = None  # of events and inline outputs that stay
    retention_first_s: Seconds = 60.0  # after the start, when those who come back after a restart have come
    retention_every_s: Seconds = 3_600.0

    # Hooks.
    hook_s: Seconds = 5.0  # for one call; contract, section 9
    hook_queue: Count = 1_024  # calls that wait for one hook; one more is left out
    hook_queue_bytes: Bytes = 16 * MIB  # and their bytes: the reason of a cancel may be text_bytes long
    hook_hanging: Count = 4  # calls of one hook that were given up and hang in their threads; then it rests

    # The end.
    drain_s: Seconds = 8.0  # from TERM to exit
