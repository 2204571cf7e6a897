"""What waits for a hook, and how often trouble with one is said. How hooks are called is seen in tests/wire."""

import logging

import pytest

from carserver import hooks
from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.hooks import Call, Complaint, Waiting


def call(size: int = 0) -> Call:
    return Call("run_cancelled", ("run-1", "s", "x" * size))


async def test_what_waits_is_bounded_in_number_and_in_bytes_and_one_larger_call_may_wait_alone() -> None:
    counters = Counters()
    waiting = Waiting("hook", Settings(hook_queue=3, hook_queue_bytes=10_000), counters)
    for size in (20_000, 0):
        waiting.put(call(size))
    assert (len(waiting), counters.hook_overflows) == (1, 1)
    assert waiting.take() == call(20_000)
    for size in (1, 2, 3, 4):
        waiting.put(call(size))
    assert (len(waiting), counters.hook_overflows) == (3, 2)
    assert [waiting.take() for _ in range(3)] == [call(1), call(2), call(3)]
    for size in (9_000, 9_000, 100):
        waiting.put(call(size))
    assert [waiting.take() for _ in range(len(waiting))] == [call(9_000), call(100)]


async def test_trouble_is_said_once_a_second_with_how_often_it_was_not_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_LOG_PAUSE_S", 3_600.0)  # longer than any test
    caplog.set_level(logging.WARNING, "carserver.hooks")
    complaint = Complaint("it broke")
    for _ in range(3):
        complaint.log(OSError("why"))
    assert [record.getMessage() for record in caplog.records] == ["it broke"]
    assert caplog.records[0].exc_info is not None
    complaint._next_s = 0.0  # that time has passed
    complaint.log()
    complaint._next_s = 0.0
    complaint.log()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["it broke", "it broke (and 2 times since that was said last)", "it broke"]
