"""Any text, at any times, into a log that refuses and delays as it likes; and the liveness twin.

Safety: what the log has is a beginning of the text in pieces of the right size and pace, one append at a time, and
`tool_end` comes last and once. Liveness: once storage answers, the log has exactly the beginning that it is to keep,
says so if there was more, and nothing runs or waits any more.
"""

from itertools import pairwise
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carserver.config import Settings
from carserver.core.handleedits import Close
from carserver.core.ports import Damaged
from carserver.protocol.errors import not_found, overloaded, unavailable
from tests.recording import World

ALL = [
    Settings(delta_s=0.05, delta_bytes=8, recorded_bytes=40, probe_s=0.5),
    Settings(delta_s=0.05, delta_bytes=5, recorded_bytes=23, probe_s=0.01),
    Settings(delta_s=0.3, delta_bytes=1, recorded_bytes=60, probe_s=1.0),  # less than a character: then a character
]
FULL = unavailable("storage fails: full")
REFUSALS = [FULL, FULL, overloaded("too many", 1_000), Damaged("a neighbour met damage")]

texts = st.text(alphabet="aé€😀\x00\n", max_size=12) | st.text(alphabet="ab", min_size=20, max_size=60)
seconds = st.sampled_from([0.0, 0.001, 0.02, 0.049, 0.05, 0.3, 1.0, 9.0])


class Steps(RuleBasedStateMachine):
    """A handle with text, its end, and storage, each when it likes."""

    can_be_deleted: ClassVar[bool] = False

    @initialize(chosen=st.sampled_from(ALL))
    def begin(self, chosen: Settings) -> None:
        self.settings = chosen
        self.piece_bytes = max(4, chosen.delta_bytes)
        self.world = World(chosen)
        self.recorder = self.world.recorders.begin("handle", "tool", "run")
        self.given = ""
        self.ended = False
        self.damaged = 0  # answers, one after the other

    def keeps(self) -> str:
        """What of the text the log is to have in the end."""
        return self.given.encode()[: self.settings.recorded_bytes].decode(errors="ignore")

    @property
    def exceeds(self) -> bool:
        return len(self.given.encode()) > self.settings.recorded_bytes

    @precondition(lambda self: not self.ended)
    @rule(text=texts)
    def text(self, text: str) -> None:
        self.given += text
        self.recorder.text(text)

    @precondition(lambda self: len(self.given) > 10)
    @rule(output=texts)
    def end(self, output: str) -> None:
        self.recorder.end(output, 0, None, None)
        self.ended = True

    @rule(passed=seconds)
    def passes(self, passed: float) -> None:
        self.world.passes(passed)

    @rule()
    def turn(self) -> None:
        self.world.turn()

    @precondition(lambda self: self.world.asks)
    @rule()
    def answer(self) -> None:
        if self.world.deleted and not isinstance(self.world.asks[0].change, Close):
            self.world.answer(not_found("run", "run"))
        else:
            self.world.answer()
        self.damaged = 0

    @precondition(lambda self: self.world.asks)
    @rule(refusal=st.sampled_from(REFUSALS))
    def refuse(self, refusal: Exception) -> None:
        self.damaged += 1
        if self.damaged > 2:
            refusal = FULL
        self.world.answer(refusal)

    @precondition(lambda self: self.can_be_deleted)
    @rule()
    def delete(self) -> None:
        self.world.deleted = True

    @invariant()
    def is_a_beginning_of_the_text(self) -> None:
        assert self.keeps().startswith(self.world.text)
        assert self.world.recorders.waiting_bytes <= self.settings.recorded_bytes

    @invariant()
    def comes_in_pieces_at_a_pace(self) -> None:
        deltas = [recorded for recorded in self.world.log if recorded.event["type"] == "tool_output_delta"]
        assert all(len(recorded.event["delta"].encode()) <= self.piece_bytes for recorded in deltas)
        assert all(recorded.event["delta"] for recorded in deltas if "truncated" not in recorded.event)
        assert [recorded for recorded in deltas if "truncated" in recorded.event] in ([], deltas[-1:])
        ended_s = self.world.log[-1].asked_s if self.world.closed and self.world.log else None
        paced = [recorded.asked_s for recorded in deltas if recorded.asked_s != ended_s]
        assert all(later - sooner >= self.settings.delta_s - 1e-9 for sooner, later in pairwise(paced))

    @invariant()
    def one_thing_at_a_time(self) -> None:
        assert len(self.world.asks) <= 1
        assert len(self.world.timers) <= 2, "one for the pace, which nobody cancels, and one after a refusal"

    @invariant()
    def ends_last_and_once(self) -> None:
        types = [recorded.event["type"] for recorded in self.world.log]
        assert "tool_end" not in types[:-1]
        assert bool(self.world.closed) == (not len(self.world.recorders))

    def teardown(self) -> None:
        for _ in range(200):
            if self.world.asks:
                self.answer()
            elif self.world.is_idle and self.ended:
                break
            elif self.world.is_idle:
                self.at_rest()
                self.recorder.end("done", None, None, None)
                self.ended = True
            else:
                self.world.passes(max(self.world.timers[0][0] - self.world.s, 0.0) if self.world.timers else 0.0)
            self.one_thing_at_a_time()
        self.is_a_beginning_of_the_text()
        self.comes_in_pieces_at_a_pace()
        self.ends_last_and_once()
        assert self.world.closed == ["handle"]
        assert len(self.world.recorders) == 0
        assert self.world.counters.tool_records_given_up == 0
        if not self.world.deleted:
            assert self.world.log[-1].event["type"] == "tool_end"
            self.at_rest()

    def at_rest(self) -> None:
        assert self.world.recorders.waiting_bytes == 0
        if not self.world.deleted:
            assert self.world.text == self.keeps()
            assert any("truncated" in recorded.event for recorded in self.world.log) == self.exceeds


class StepsWithDeletion(Steps):
    """And the run may be deleted."""

    can_be_deleted = True


EFFORT = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
Steps.TestCase.settings = EFFORT
StepsWithDeletion.TestCase.settings = settings(EFFORT, max_examples=50)

TestRecorder = Steps.TestCase
TestRecorderOfADeletedRun = StepsWithDeletion.TestCase
