"""Any graph of actions, whose tries end in any way and any order.

Safety: every action gets one result; none is tried before all that it depends on has succeeded, nor more often than it
may be; nothing starts after an abort. Liveness: once nothing runs any more, the proposal is over; and it is answered,
whoever hosts, cancels or leaves.
"""

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec import Raw

from carserver.config import Settings
from carserver.core.actionturns import ActionTurns
from carserver.core.execution import Call, TerminalError
from carserver.core.ports import Committed
from carserver.core.principals import CLIENT
from carserver.core.proposals import Action, Happened, Plan, Progress, plan
from carserver.core.submissions import Proposals
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, RpcError, overloaded
from carserver.protocol.outputs import Final, Inline
from carserver.protocol.proposals import ActionStatus, FailureBehavior
from carserver.protocol.tools import ErrorChunk, GivenDone
from tests.property.handleworld import Caller, Execution, Future, Signal, Task, World
from tests.unit.proposing import action, proposal
from tests.unit.storing import create

EVER = {
    Happened.SUCCEEDED: ActionStatus.SUCCEEDED,
    Happened.FAILED: ActionStatus.FAILED,
    Happened.REFUSED: ActionStatus.FAILED,
    Happened.TERMINAL: ActionStatus.FAILED,
    Happened.CANCELLED: ActionStatus.CANCELLED,
    Happened.STOPPED: ActionStatus.SKIPPED,
}


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Actions in any order, each of which depends on some that come earlier in another."""
    count = draw(st.integers(0, 7))
    names = draw(st.permutations([f"a{number}" for number in range(count)]))
    return [
        action(
            name,
            dependencies=sorted(
                draw(st.sets(st.sampled_from(sorted(f"a{n}" for n in range(int(name[1:])))))) if name != "a0" else []
            ),
            failure_behavior=draw(st.sampled_from([*FailureBehavior])).value,
            max_retries=draw(st.integers(0, 2)),
            invocation_mode=draw(st.sampled_from(["one_shot", "one_shot", "one_shot", "streaming"])),
        )
        for name in names
    ]


def planned(actions: list[dict[str, Any]]) -> Plan:
    return plan(proposal(actions), Settings(), lambda: "0" * 32)


def has_succeeded(progress: Progress, one: Action) -> bool:
    return all(progress.statuses[place] is ActionStatus.SUCCEEDED for place in one.dependencies)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=graphs(), data=st.data())
def test_every_action_gets_one_result_and_none_is_tried_before_its_turn(
    actions: list[dict[str, Any]], data: st.DataObject
) -> None:
    of = planned(actions)
    progress = Progress(of)
    step, running, last = progress.begin(), [], {}
    while True:
        for place in step.start:
            assert progress.ended_by is None, "nothing starts after an abort"
            assert has_succeeded(progress, of.actions[place])
            assert progress.statuses[place] is None
            assert place not in running
            assert progress.tries[place] <= 1 + of.actions[place].retries * (
                of.actions[place].behavior is FailureBehavior.RETRY
            )
            running.append(place)
        assert set(step.stop) <= set(running)
        if not running:
            break
        assert not progress.over
        place = running.pop(data.draw(st.integers(0, len(running) - 1)))
        before = list(progress.statuses)
        last[place] = data.draw(st.sampled_from([*Happened]))
        step = progress.take(place, last[place])
        assert last[place] is Happened.FAILED or place not in step.start, "nothing else is tried again"
        assert all(was in (None, now) for was, now in zip(before, progress.statuses, strict=True)), "a status is final"
    assert progress.over, "once nothing runs, it is over"
    assert None not in progress.statuses
    for place, status in enumerate(progress.statuses):
        if place not in last:
            cause = progress.causes[place]
            assert status is ActionStatus.SKIPPED
            assert cause is not None
            assert cause == progress.ended_by or of.before[place] >> cause & 1
        elif status is ActionStatus.SKIPPED:
            assert last[place] is Happened.STOPPED or of.actions[place].behavior is FailureBehavior.SKIP
        else:
            assert status is EVER[last[place]]


SAID: dict[str, GivenDone | ErrorChunk] = {
    "succeed": GivenDone(result=Raw(b"1")),
    "fail": ErrorChunk(message="no"),
    "terminal": TerminalError(message="dead"),
}


class Submitted:
    """A proposal in a world of the test's own: its task, and what its tools are asked; perhaps part of a run."""

    def __init__(
        self, actions: list[dict[str, Any]], run_id: str | None = None, most: int = 1 << 20, room: int | None = None
    ) -> None:
        settings = Settings(proposals_bytes=most)
        self.world = world = World(settings)
        self.draining = False
        self.of = planned(actions)
        self.proposals = Proposals(
            *(world.tools, world, ActionTurns(world.runs, world.loop, settings)),  # type: ignore[arg-type]
            *(world.loop, settings, world.counters),
            *(lambda: "f" * 32, lambda: Signal(world.loop), lambda: self.draining),
        )
        self.caller = Caller(CLIENT)
        self.caller.halted = None  # type: ignore[attr-defined]
        self.run_id = run_id
        if run_id is not None:
            command = create(run_id)
            change = world.storage.apply(command)
            world.runs.committed([Committed(command, change.applied, None, change.before)])
        if room is not None:
            self.has_room_for(room)
        self.task = self.submit(actions)
        world.settle()

    def submit(self, actions: list[dict[str, Any]]) -> Task:
        work = self.proposals.submit(proposal(actions), CLIENT, self.caller, self.run_id)  # type: ignore[arg-type]
        return self.world.loop.spawn(work)

    def has_room_for(self, count: int) -> None:
        """From now on the host refuses what is more than so many at once."""
        host, full = self.world.host, overloaded("no room", 1)

        def refuses(call: Call, *, admitted: bool = False) -> RpcError | None:
            return full if len(self.running()) >= count else None

        host.refuses = refuses  # type: ignore[method-assign]

    def stores(self) -> None:
        """Storage acknowledges all that waits for it."""
        while self.world.storage.asks:
            self.world.storage.commit(9)
            self.world.settle()

    def running(self) -> list[Execution]:
        """What runs and has not been stopped."""
        return [one for one in self.world.host.executions if not one.over and not one.stops]

    def end(self, one: Execution, how: str) -> None:
        if how == "leave":
            self.task.cancel()
        elif how == "drain":
            self.draining = True
            self.world.tools.cancel_all(None, "the daemon stops")
        elif how == "cancel":
            self.world.loop.spawn(self.world.tools.cancel(one.call.handle, CLIENT, 0))
        elif how == "die":
            one.ends(proved=False)
        else:
            one.says(SAID[how])
            one.ends(proved=True)
        self.world.settle()

    def over(self) -> bool:
        return self.task.done

    def close(self) -> None:
        """What is left of it ends, and is recorded."""
        self.task.cancel()
        self.world.settle()
        self.stores()
        for one in self.world.host.executions:
            if not one.over:
                one.ends(proved=True)
        for _ in range(3):
            self.world.loop.passes(1.0)
            self.stores()
        assert not len(self.world.recorders)
        assert all(task.done for task in self.world.loop.tasks), "nothing waits for ever"

    def results(self) -> list[dict[str, Any]]:
        assert self.task.done
        assert self.task.error is None
        results: list[dict[str, Any]] = orjson.loads(self.task.value)["results"]
        return results


WAYS = ["succeed"] * 6 + ["fail", "fail", "terminal", "cancel", "die", "leave", "drain"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=graphs(), data=st.data(), place=st.sampled_from([(None, None), ("run-1", None), (None, 2)]))
def test_a_proposal_is_answered_and_leaves_nothing_behind_that_it_waited_for(
    actions: list[dict[str, Any]], data: st.DataObject, place: tuple[str | None, int | None]
) -> None:
    run_id, room = place
    submitted = Submitted(actions, run_id, room=room)
    left = False
    try:
        while not submitted.over():
            if data.draw(st.booleans()) or not submitted.running():
                submitted.stores()
            if submitted.over():  # it waited for what was called off while storage had it
                break
            running = submitted.running()
            assert room is None or len(running) <= room
            assert running, "it waits for something that runs"
            asked = len(submitted.world.host.executions)
            how = data.draw(st.sampled_from(WAYS))
            submitted.end(running[data.draw(st.integers(0, len(running) - 1))], how)
            left |= how == "leave"
            if left or submitted.draining:
                submitted.stores()
                assert submitted.over()
                assert len(submitted.world.host.executions) == asked, "nothing more starts"
        detached = {one["id"] for one in actions if one["invocation_mode"] != "one_shot"}
        assert {one.call.action_id for one in submitted.running()} <= detached, "what outlives it was not waited for"
        assert (submitted.proposals.open, submitted.proposals.bytes) == (0, 0)
    finally:
        submitted.close()
    tried = [(one.call.action_id, one.call.attempt) for one in submitted.world.host.executions]
    assert len(set(tried)) == len(tried)
    if left:
        return
    results = submitted.results()
    assert [result["action_id"] for result in results] == [one["id"] for one in actions]
    statuses = {result["action_id"]: result["status"] for result in results}
    for one, result in zip(actions, results, strict=True):
        was_tried = one["id"] in {name for name, _ in tried}
        assert ("output" in result) == (result["status"] == "succeeded")
        assert ("error" in result) == (result["status"] != "succeeded")
        if was_tried:
            assert all(statuses[name] == "succeeded" for name in one["dependencies"])
        else:
            assert result["status"] == "skipped" or result["error"] == "no room" or run_id


@pytest.mark.parametrize("how", ["leave", "fail", "drain"])
def test_what_waits_for_storage_when_the_proposal_ends_never_starts(how: str) -> None:
    submitted = Submitted([action("a"), action("b")], "run-1")
    first, second = submitted.world.storage.asks
    submitted.world.storage.asks = [first]
    submitted.stores()
    (one,) = submitted.running()
    assert one.call.run_id == "run-1"
    submitted.world.storage.asks = [second, *submitted.world.storage.asks]
    submitted.end(one, how)
    submitted.stores()
    submitted.close()
    assert submitted.world.host.executions == [one]
    if how != "leave":
        assert [result["status"] for result in submitted.results()] == [
            "failed" if how == "fail" else "cancelled",
            "cancelled",
        ]


@pytest.mark.parametrize(("how", "behavior"), [("leave", "abort"), ("fail", "abort"), ("drain", "skip")])
def test_what_is_about_to_start_when_the_proposal_ends_does_not(how: str, behavior: str) -> None:
    submitted = Submitted([action("a"), action("b", failure_behavior=behavior), action("c", dependencies=["a"])])
    first, second = submitted.running()
    first.says(SAID["succeed"])
    first.ends(proved=True)
    submitted.end(second, how)
    assert submitted.world.host.executions == [first, second]
    if how != "leave":
        assert [result["status"] for result in submitted.results()][::2] == ["succeeded", "skipped"]


def test_what_is_about_to_be_tried_again_when_the_daemon_drains_has_failed() -> None:
    submitted = Submitted([action("a", failure_behavior="retry"), action("b", failure_behavior="skip")])
    first, second = submitted.running()
    first.says(SAID["fail"])
    first.ends(proved=True)
    submitted.end(second, "drain")
    assert submitted.world.host.executions == [first, second]
    assert [(result["status"], result["error"]) for result in submitted.results()] == [
        ("failed", "no"),
        ("skipped", "the daemon stops"),
    ]


def test_an_action_whose_parameters_are_being_read_when_the_proposal_ends_never_starts() -> None:
    submitted = Submitted([action("a"), action("b"), action("c", dependencies=["a"], parameters={"of": "$a.output"})])
    reading = Future(submitted.world.loop)
    submitted.proposals.outputs = SimpleNamespace(get=lambda *_: reading)  # type: ignore[assignment]
    first, second = submitted.running()
    first.says(GivenDone(result=Raw(encode("x" * 100_000))))
    submitted.world.settle()
    submitted.world.saving.pop().end(submitted.world.output)
    submitted.world.settle()
    submitted.end(second, "fail")
    value = Final(content=Inline(value=Raw(b'"x"')), ok=True)
    reading.end(SimpleNamespace(record=SimpleNamespace(event=value)))
    submitted.world.settle()
    assert submitted.world.host.executions == [first, second]
    results = submitted.results()
    assert [result["status"] for result in results] == ["succeeded", "failed", "skipped"]
    assert results[0]["output"] == "x"
    assert results[2]["error"] == "not started: action 'b' failed, which ended the proposal"


def test_what_has_no_room_beside_the_others_waits_for_them_and_what_has_none_alone_fails() -> None:
    actions = [action(f"a{number}") for number in range(5)]
    submitted = Submitted(actions, room=2)
    for left in (2, 2, 2, 2, 1):
        assert len(submitted.running()) == left
        submitted.end(submitted.running()[0], "succeed")
    assert {result["status"] for result in submitted.results()} == {"succeeded"}
    assert [one.call.attempt for one in submitted.world.host.executions] == [1] * 5

    submitted = Submitted(actions, room=1)
    submitted.has_room_for(3)
    submitted.end(submitted.running()[0], "succeed")
    assert len(submitted.running()) == 3, "as many as there is room for"

    submitted = Submitted(actions, room=2)
    submitted.end(submitted.running()[0], "fail")
    assert len(submitted.world.host.executions) == 2
    assert [result["status"] for result in submitted.results()] == ["failed", "cancelled", *["skipped"] * 3]
    assert [result["status"] for result in Submitted(actions[:1], room=0).results()] == ["failed"]


def test_storage_that_has_no_room_fails_an_action_that_is_alone() -> None:
    submitted = Submitted([action("a")], "run-1")
    submitted.world.storage.refuse(overloaded("the queue is full", 1))
    submitted.world.settle()
    submitted.stores()
    assert [(result["status"], result["error"]) for result in submitted.results()] == [("failed", "the queue is full")]


def test_proposals_keep_no_more_than_is_allowed_but_one_may_always_run() -> None:
    submitted = Submitted([action("a", parameters={"x": "x" * 5_000})], most=3_000)
    with pytest.raises(RpcError, match="proposals_bytes") as caught:
        submitted.submit([action("b")])
    assert caught.value.kind is ErrorKind.OVERLOADED
    submitted.end(submitted.running()[0], "succeed")
    assert submitted.results()[0]["status"] == "succeeded"
    submitted.task = submitted.submit([action("b", parameters={"x": "x" * 5_000})])
    submitted.world.settle()
    submitted.end(submitted.running()[0], "succeed")
    assert submitted.results()[0]["status"] == "succeeded"


@pytest.mark.parametrize(
    ("chunk", "what", "retries"),
    [
        (GivenDone(result=Raw(b'"%b"' % (b"7" * 1_998))), "output", 3),
        (ErrorChunk(message="x" * 2_000), "error message", 0),
    ],
)
def test_what_has_no_room_beside_other_proposals_is_told_by_its_size_and_not_tried_again(
    chunk: GivenDone | ErrorChunk, what: str, retries: int
) -> None:
    submitted = Submitted([action("a", failure_behavior="retry", max_retries=retries)], most=3_000)
    other = submitted.submit([action("b")])
    submitted.world.settle()
    first, second = submitted.running()
    first.says(chunk)
    submitted.end(first, "succeed")
    (result,) = submitted.results()
    assert (result["status"], result["error"]) == (
        "failed",
        f"an {what} of 2000 bytes has no room: open proposals keep 2052 (proposals_bytes)",
    )
    assert submitted.running() == [second]
    second.says(GivenDone(result=Raw(b'"%b"' % (b"7" * 1_998))))
    second.ends(proved=True)
    submitted.world.settle()
    assert orjson.loads(other.value)["results"][0]["status"] == "succeeded", "one proposal alone has room"
    assert submitted.proposals.bytes == 0


def test_after_a_terminal_error_the_next_proposal_of_the_connection_is_refused() -> None:
    submitted = Submitted([action("a", failure_behavior="retry")])
    submitted.end(submitted.running()[0], "terminal")
    assert [result["status"] for result in submitted.results()] == ["failed"]
    assert len(submitted.world.host.executions) == 1
    with pytest.raises(RpcError, match=r"tool 'tool' \(action 'a'\) failed for good.*reconnect"):
        submitted.submit([action("b")])


def test_a_defect_is_the_answer_and_what_runs_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = Submitted([action("a"), action("b")])
    monkeypatch.setattr(Progress, "take", lambda *_: 1 / 0)
    submitted.end(submitted.running()[0], "succeed")
    assert isinstance(submitted.task.error, ZeroDivisionError)
    assert submitted.running() == []
    assert submitted.proposals.open == 0
