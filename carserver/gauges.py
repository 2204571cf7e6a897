"""What `/metrics` shows beside the counters: how much there is of everything now, and how much waits."""

from typing import NamedTuple

from carserver.core.approvals import Approvals
from carserver.core.hostboard import Board
from carserver.core.runstore import RunStore
from carserver.core.toolrecord import Recorders
from carserver.front.front import Front
from carserver.hooks import InstalledHooks
from carserver.hosts.process import Processes
from carserver.rpc.session import Services
from carserver.stores.files import FilePool
from carserver.stores.sqlite import SqliteStore

Gauges = dict[str, tuple[float, str]]
"""A figure and its help, by the metric's name."""


class Measured(NamedTuple):
    """What is looked at."""

    front: Front
    services: Services
    recorders: Recorders
    processes: Processes
    files: FilePool | None
    hooks: InstalledHooks
    store: SqliteStore


def gauges(of: Measured, lag_s: float) -> Gauges:
    """All figures; `lag_s` is how late the loop was at most since they were asked for last."""
    return {
        **_of_connections(of.front),
        **_of_runs(of.services.runs),
        **_of_tools(of),
        **_of_board(of.services.host, of.services.approvals),
        "files_waiting": (of.files.waiting if of.files else 0, "Files that wait to be read, or are read"),
        "hook_waiting": (of.hooks.waiting, "Calls of hooks that wait or are being made"),
        "hook_hanging": (of.hooks.hanging, "Calls of hooks that were given up and have not come back"),
        **_of_storage(of.store),
        "loop_lag_seconds": (lag_s, "How late the event loop was at most since the last scrape"),
    }


def _of_connections(front: Front) -> Gauges:
    total, largest = front.unsent()
    return {
        "connections": (len(front.connections), "Open sockets"),
        "connections_unauthenticated": (front.waiting_for_authentication, "Connections without a principal"),
        "requests_in_flight": (front.in_flight(), "Requests that were started and are not answered"),
        "outbox_bytes": (total, "Bytes that wait for peers, all together"),
        "outbox_largest_bytes": (largest, "Bytes that wait for the slowest peer"),
    }


def _of_runs(runs: RunStore) -> Gauges:
    return {
        "subscriptions": (runs.hub.subscriptions, "Subscriptions to live traces"),
        "attended_runs": (runs.attendance.attended_runs(), "Live runs that somebody attends"),
        "topics": (runs.hub.topics, "Runs of which the loop keeps its copy"),
        "watches": (len(runs.watchers), "Connections that watch all runs"),
        "watch_waiting": (runs.watchers.waiting, "Changed runs that wait for who watches, all together"),
        "catch_up_waiting": (runs.hub.waiting, "Subscriptions that wait for a page of their log"),
    }


def _of_tools(of: Measured) -> Gauges:
    tools, toolbox = of.services.tools, of.services.toolbox
    return {
        "tools": (len(toolbox), "Tools that may be invoked"),
        "tools_bytes": (toolbox.size, "Bytes of their definitions"),
        "handles_live": (tools.live, "Handles that have not ended"),
        "handles_running": (tools.running, "Tools that run, as far as is known: those that were stopped, too"),
        "handles_asked_of_hosts": (of.front.asked_of_hosts(), "Requests to sessions that host tools, unanswered"),
        "handles_finished": (len(tools.finished), "Handles that have ended and are kept"),
        "handles_finished_bytes": (tools.finished.bytes, "Bytes that these keep, about"),
        "proposals_open": (of.services.proposals.open, "Proposals that are not answered"),
        "proposals_bytes": (of.services.proposals.bytes, "Bytes of parameters and outputs that these keep, about"),
        "proposal_fills_waiting": (of.services.proposals.filling.waiting, "Actions that wait to be given outputs"),
        "tool_processes": (of.processes.live, "Executions of process tools of which something lives, or might"),
        "tool_process_starts_waiting": (of.processes.waiting, "Process tools that the keeper was not told of yet"),
        "tool_streams": (len(tools.streams), "Connections that follow handles live"),
        "tool_stream_waiting": (tools.streams.waiting, "Chunks that wait for these, all together"),
        "tool_records_waiting": (len(of.recorders), "Handles whose end is not in their run's log yet"),
        "tool_records_waiting_bytes": (of.recorders.waiting_bytes, "Bytes of text that wait to be recorded there"),
    }


def _of_board(board: Board, approvals: Approvals) -> Gauges:
    return {
        "board_agents": (len(board.agents), "Agents that sessions have registered at the host board"),
        "board_devices": (len(board.devices), "Devices that sessions have registered there"),
        "board_bytes": (board.bytes, "Bytes of these as JSON"),
        "board_followers": (board.followers, "Connections that follow the host board"),
        "board_events_waiting": (board.waiting, "Events that wait for these, all together"),
        "approvals_pending": (approvals.pending, "Approvals that wait for a person's word"),
        "approvals_kept": (approvals.resolved, "Approvals that were resolved and are kept"),
    }


def _of_storage(store: SqliteStore) -> Gauges:
    status = store.status()
    return {
        "storage_waiting_bytes": (store.waiting_bytes, "Bytes of changes that wait for the writer"),
        "storage_waiting_commands": (status.waiting_commands, "Changes that wait for the writer"),
        "storage_waiting_reads": (store.waiting_reads, "Reads that wait for a reader"),
        "storage_sweep_waiting": (store.sweeping, "1 while events of deleted runs wait to be removed"),
        "storage_imports_given_up": (store.imports_given_up, "Unfinished imports dropped for newer ones"),
        "storage_database_bytes": (status.database_bytes, "Size of the database file"),
        "storage_log_bytes": (status.log_bytes, "Size of the write-ahead log"),
        "storage_damage": (store.damage.count, "Times that a read or a change met damage"),
        "storage_writable": (status.problem is None, "1 while storage takes writes"),
    }
