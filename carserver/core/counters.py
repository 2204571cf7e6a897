"""What is counted. Plain integers on the loop's thread: a hot path adds one; `/metrics` reads them all."""

from dataclasses import dataclass, field, fields


def _count(help_: str) -> int:
    counted: int = field(default=0, metadata={"help": help_})
    return counted


@dataclass(slots=True)
class Counters:
    """Since the start of the daemon. The name is the metric's (`carserver_<name>_total`), the text its help."""

    requests: int = _count("Messages taken from peers as calls")
    errors: int = _count("Requests answered with an error")
    internal_errors: int = _count("Requests answered with internal_error: defects")
    undeclared_errors: int = _count("Errors that a method raised without declaring them: defects")
    stray_replies: int = _count("Answers from peers to requests that the daemon never sent, or gave up; ignored")
    stray_chunks: int = _count("Chunks from peers to requests that the daemon never sent them, or gave up; ignored")
    overloads: int = _count("Requests answered with overloaded")
    events_recorded: int = _count("Events stored")
    events_delivered: int = _count("Events handed to sockets, all viewers together")
    subscription_overflows: int = _count("Live subscriptions turned to catching up because a bound was reached")
    catch_up_pages: int = _count("Pages of logs read for subscriptions that catch up")
    catch_up_retries: int = _count("Pages of logs that could not be read, and were asked for again")
    catch_up_rejoins: int = _count("Subscriptions that came level with their run's log and went live")
    subscriptions_closed: int = _count("Subscriptions closed by the daemon: the log could not be read, or was deleted")
    watch_changes: int = _count("Changed runs handed to sockets, all who watch together")
    watch_resets: int = _count("Times that who watches was told to list again: too much waited, or runs were deleted")
    stream_events: int = _count("Chunks of tools handed to sockets by the live stream, all who follow together")
    stream_skips: int = _count("Chunks of tools that the live stream left out because too much waited for a peer")
    tool_texts_truncated: int = _count("Handles with more text than their run's log keeps")
    tool_record_retries: int = _count("Times that what a handle leaves in its run's log was refused, and tried again")
    tool_records_given_up: int = _count("Times that text or the end of a handle could not be recorded in its run's log")
    reading_pauses: int = _count("Times that reading from a peer paused: its outbox was full, or too much in flight")
    write_timeouts: int = _count("Connections aborted because the peer did not read")
    ping_timeouts: int = _count("Connections closed because the peer did not answer a ping")
    handshakes_refused: int = _count("Opening handshakes answered with an error or not finished in time")
    unix_peers_refused: int = _count("Connections to the Unix socket closed because another user made them")
    unauthenticated_dropped: int = _count("Connections closed because they did not authenticate in time or in number")
    wrong_tokens: int = _count("Wrong tokens presented")
    protocol_violations: int = _count("Connections closed for breaking the WebSocket protocol or a limit on messages")
    runs_interrupted: int = _count("Runs interrupted because nobody attended them")
    runs_deleted: int = _count("Runs deleted, one by one or by pruning")
    runs_imported: int = _count("Runs imported")
    outputs_imported: int = _count("Outputs imported")
    prunes: int = _count("Times that runs and outputs were pruned, by hand or by retention")
    outputs_pruned: int = _count("Outputs deleted by pruning")
    retention_skips: int = _count("Times that retention did not prune because the clock had jumped")
    outputs_appended: int = _count("Outputs stored")
    file_bytes_read: int = _count("Bytes read from files that outputs refer to")
    files_refused: int = _count("References to files that were refused: not a plain file below the root")
    files_changed: int = _count("Files that were not read because they are not what was appended")
    handles_started: int = _count("Handles: invocations of tools")
    handles_succeeded: int = _count("Handles that succeeded")
    handles_failed: int = _count("Handles that failed")
    handles_cancelled: int = _count("Handles that were cancelled")
    handle_deadlines: int = _count("Handles that failed by their deadline")
    handles_orphaned: int = _count("Handles cancelled because nobody waited for them any more")
    handles_crowded_out: int = _count("Finished handles forgotten before their time: by age, or for newer ones")
    stops_unconfirmed: int = _count("Stopped tools of which could not be seen in time that nothing lives")
    chunks: int = _count("Chunks of handles, the last ones included")
    chunks_dropped: int = _count("Chunks that went because more waited for a poll than may")
    late_chunks: int = _count("Chunks that came after the end of their handle; ignored")
    commits: int = _count("Transactions committed")
    commands: int = _count("Commands that went through the writer")
    backups: int = _count("Backups made")
    storage_failures: int = _count("Transactions that failed and were rolled back")
    storage_deadlines: int = _count("Requests answered with deadline_exceeded")
    tool_processes_started: int = _count("Commands of process tools started")
    tool_processes_killed: int = _count("Processes of tools that had to be killed: stopped, or left behind")
    keepers_replaced: int = _count("Times that the keeper of process tools died and was started again")
    tool_output_bytes: int = _count("Bytes read from process tools")
    tool_output_ignored_bytes: int = _count("Bytes of these thrown away because their handle had ended")
    hook_calls: int = _count("Calls of hooks")
    hook_failures: int = _count("Calls of hooks that raised an exception")
    hook_timeouts: int = _count("Calls of hooks that took too long and were given up")
    hook_overflows: int = _count("Calls of hooks that were left out because too many waited")

    def help(self) -> dict[str, str]:
        """The text of each counter, by its name."""
        return {counter.name: counter.metadata["help"] for counter in fields(self)}
