"""Every method of the client, called as a program would: a type checker reads this, nobody runs it.

A line that must not pass says so (`type: ignore`): one that did pass would be an ignore that nobody needs, which is an
error of `mypy --strict`.
"""

from typing import Any, assert_type

from msgspec import Raw

from carserver.client.api import Outputs, Rpc, Runs, Server, Session, Tools
from carserver.client.api_sync import Outputs as BlockingOutputs
from carserver.client.api_sync import Rpc as BlockingRpc
from carserver.client.api_sync import Runs as BlockingRuns
from carserver.client.api_sync import Server as BlockingServer
from carserver.client.api_sync import Session as BlockingSession
from carserver.client.api_sync import Tools as BlockingTools
from carserver.protocol.outputs import Appended, GivenFinal, GivenInline, OutputPage, OutputRecord, OutputSlice
from carserver.protocol.pruning import Pruned
from carserver.protocol.runs import (
    Cancelled,
    Deleted,
    EventPage,
    Recorded,
    RunPage,
    Snapshot,
    Status,
    Subscribed,
    Unsubscribed,
    Unwatched,
    Watching,
)
from carserver.protocol.server import Authenticated, BackedUp, Pong, ServerStatus
from carserver.protocol.tools import (
    AllCancelled,
    Called,
    ChunkTaken,
    GivenTool,
    HandleList,
    HandlePoll,
    HandleStatus,
    Invoked,
    StreamSubscribed,
    StreamUnsubscribed,
    ToolCancelled,
    ToolList,
    Unregistered,
)
from carserver.protocol.transfer import Imported

EVENTS: list[dict[str, str]] = [{"type": "agent_start"}]


async def runs(runs: Runs) -> None:
    run = await runs.create("do it", session_id="s", metadata={"ticket": [1, None]}, idempotency_key="k")
    assert_type(run, Snapshot)
    assert_type(run.status, Status)
    assert_type(await runs.record(run.id, EVENTS, at_ms=(1,), expected_sequence=0, batch_id="b"), Recorded)
    assert_type(await runs.record(run.id, [Raw(b"{}"), {"type": "x"}]), Recorded)
    assert_type(await runs.get(run.id), Snapshot)
    assert_type(await runs.events(run.id, after=0, limit=1, types=["error"]), EventPage)
    assert_type(await runs.list(status=Status.FAILED, limit=1), RunPage)
    assert_type(await runs.fail(run.id, "no"), Snapshot)
    assert_type(await runs.cancel(run.id, reason="no"), Cancelled)
    assert_type(await runs.resume(run.id), Snapshot)
    assert_type(await runs.delete(run.id), Deleted)
    assert_type(await runs.trace_subscribe(run.id, cursor=1, epoch="e"), Subscribed)
    assert_type(await runs.trace_unsubscribe(run.id), Unsubscribed)
    assert_type(await runs.watch(session_id="s"), Watching)
    assert_type(await runs.unwatch(), Unwatched)
    assert_type(await runs.import_([{"run": {}}]), Imported)
    await runs.create()  # type: ignore[call-arg]
    await runs.create("do it", "s")  # type: ignore[call-arg]
    await runs.get(1)  # type: ignore[arg-type]
    await runs.list(state="failed")  # type: ignore[call-arg]
    await runs.record(run.id, {"type": "x"})  # type: ignore[arg-type]


async def tools(tools: Tools) -> None:
    definitions: list[dict[str, Any]] = [{"name": "grep"}]
    assert_type(await tools.register(definitions), int)
    assert_type(await tools.register([GivenTool(name="grep"), {"name": "sed"}]), int)
    assert_type(await tools.unregister("grep"), Unregistered)
    assert_type(await tools.list(), ToolList)
    invoked = await tools.invoke("grep", parameters={"pattern": "x"}, timeout_ms=1, idempotency_key="k")
    assert_type(invoked, Invoked)
    assert_type(await tools.call("grep", parameters=Raw(b"{}"), run_id="r"), Called)
    polled = await tools.poll(invoked.handle, wait_ms=1, after=0)
    assert_type(polled, HandlePoll | None)
    polled.status  # type: ignore[union-attr]  # noqa: B018 - an unknown handle is None
    assert_type(await tools.cancel(invoked.handle, wait_ms=1), ToolCancelled)
    assert_type(await tools.cancel_all(), AllCancelled)
    assert_type(await tools.status(invoked.handle), HandleStatus | None)
    assert_type(await tools.handles(all=True), HandleList)
    assert_type(await tools.stream_subscribe(handle=invoked.handle), StreamSubscribed)
    assert_type(await tools.stream_unsubscribe(), StreamUnsubscribed)
    assert_type(await tools.chunk("r", {"kind": "text", "text": "x"}), ChunkTaken)
    await tools.poll(invoked.handle, after="first")  # type: ignore[arg-type]


async def outputs(outputs: Outputs) -> None:
    final = GivenFinal(content=GivenInline(value=Raw(b'"done"')), ok=True)
    assert_type(await outputs.append("task", 1, "coder", final, idempotency_key="k"), Appended)
    assert_type(await outputs.append("task", 1, "coder", {"type": "progress", "stage": "x"}), Appended)
    assert_type(await outputs.get("out-0123456789"), OutputRecord)
    assert_type(await outputs.latest(artifact="report"), OutputRecord)
    assert_type(await outputs.list(task_id="task", attempt=1), OutputPage)
    assert_type(await outputs.read("out-0123456789", offset=1, length=2), OutputSlice)
    await outputs.append("task", "1", "coder", final)  # type: ignore[arg-type]


async def rest(session: Session, server: Server, rpc: Rpc) -> None:
    assert_type(await session.auth(token="t", agent_id="a"), Authenticated)
    assert_type(await session.auth(host_token="t"), Authenticated)
    assert_type(await rpc.discover(), dict[str, Any])
    assert_type(await server.status(), ServerStatus)
    assert_type(await server.ping(), Pong)
    assert_type(await server.backup("/tmp/backup.db"), BackedUp)
    assert_type(await server.prune(max_runs=1, dry_run=True), Pruned)


def blocking_runs(runs: BlockingRuns) -> None:
    run = runs.create("do it", session_id="s", metadata=[1], idempotency_key="k")
    assert_type(run, Snapshot)
    assert_type(runs.record(run.id, EVENTS, batch_id="b"), Recorded)
    assert_type(runs.get(run.id), Snapshot)
    assert_type(runs.events(run.id, types=("error",)), EventPage)
    assert_type(runs.list(), RunPage)
    assert_type(runs.fail(run.id, "no"), Snapshot)
    assert_type(runs.cancel(run.id), Cancelled)
    assert_type(runs.resume(run.id), Snapshot)
    assert_type(runs.delete(run.id), Deleted)
    assert_type(runs.trace_subscribe(run.id), Subscribed)
    assert_type(runs.trace_unsubscribe(run.id), Unsubscribed)
    assert_type(runs.watch(), Watching)
    assert_type(runs.unwatch(), Unwatched)
    assert_type(runs.import_([Raw(b"{}")]), Imported)
    runs.fail(run.id)  # type: ignore[call-arg]


def blocking_tools(tools: BlockingTools) -> None:
    assert_type(tools.register([{"name": "grep"}]), int)
    assert_type(tools.unregister("grep"), Unregistered)
    assert_type(tools.list(), ToolList)
    assert_type(tools.invoke("grep", parameters={}), Invoked)
    assert_type(tools.call("grep"), Called)
    assert_type(tools.poll("h", after=0), HandlePoll | None)
    assert_type(tools.cancel("h"), ToolCancelled)
    assert_type(tools.cancel_all(), AllCancelled)
    assert_type(tools.status("h"), HandleStatus | None)
    assert_type(tools.handles(), HandleList)
    assert_type(tools.stream_subscribe(), StreamSubscribed)
    assert_type(tools.stream_unsubscribe(handle="h"), StreamUnsubscribed)
    assert_type(tools.chunk("r", {"kind": "done"}), ChunkTaken)


def blocking_outputs(outputs: BlockingOutputs) -> None:
    assert_type(outputs.append("task", 1, "coder", {"type": "progress", "stage": "x"}), Appended)
    assert_type(outputs.get("out-0123456789"), OutputRecord)
    assert_type(outputs.latest(name="coder"), OutputRecord)
    assert_type(outputs.list(), OutputPage)
    assert_type(outputs.read("out-0123456789"), OutputSlice)


def blocking_rest(session: BlockingSession, server: BlockingServer, rpc: BlockingRpc) -> None:
    assert_type(session.auth(token="t"), Authenticated)
    assert_type(rpc.discover(), dict[str, Any])
    assert_type(server.status(), ServerStatus)
    assert_type(server.ping(), Pong)
    assert_type(server.backup("/tmp/backup.db"), BackedUp)
    assert_type(server.prune(older_than_ms=1), Pruned)
