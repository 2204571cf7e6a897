"""`runs record`: lines, batches, and getting them into a run whatever happens to the connection."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from carserver.cli import lines as lines_module
from carserver.cli.lines import TEXT_CHARACTERS, LineError, Reader, batches
from carserver.cli.record import Recorder, RunStopped
from carserver.client import CallError, ConnectionLost, Pauses, Unreachable, open_connection
from carserver.protocol.errors import conflict, invalid_params, not_found, unavailable
from tests.unit.fakedaemon import PATIENCE_S, FakeDaemon, Session, Unanswered, snapshot


def go(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded(), debug=True)


def filled(*chunks: bytes) -> asyncio.Queue[bytes]:
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    for chunk in chunks:
        queue.put_nowait(chunk)
    return queue


async def recorded_lines(mode: str, *chunks: bytes) -> list[tuple[int, Any]]:
    return [(e.line, json.loads(e.event)) async for batch in batches(filled(*chunks, b""), mode) for e in batch]


def text(line: str) -> dict[str, str]:
    return {"type": "text_delta", "text": line + "\n"}


# ------------------------------------------------------------------------------------------------- lines and batches


def test_a_line_is_an_event_where_it_looks_like_one_and_text_otherwise() -> None:
    source = (
        b'{"type":"x","n":1}\n'
        b"plain\r\n"
        b"\n"
        b' {"type": "y"} \r\n'
        b'{"type":1}\n'
        b'["type"]\n'
        b'{"type":"lone \\ud800"}\n'
        b"not \xff utf-8\n"
        b"no line break"
    )
    expected = [
        (1, {"type": "x", "n": 1}),
        (2, text("plain")),
        (3, text("")),
        (4, {"type": "y"}),
        (5, text('{"type":1}')),
        (6, text('["type"]')),
        (7, text('{"type":"lone \\ud800"}')),
        (8, text("not \ufffd utf-8")),
        (9, text("no line break")),
    ]

    async def test() -> None:
        assert await recorded_lines("auto", source) == expected
        assert await recorded_lines("auto", *(source[i : i + 1] for i in range(len(source)))) == expected
        assert await recorded_lines("text", b'{"type":"x"}\n') == [(1, text('{"type":"x"}'))]
        assert await recorded_lines("events", b'{"type":"x"}\n\n{"type":"y"}') == [
            (1, {"type": "x"}),
            (3, {"type": "y"}),
        ]

    go(test())


def test_an_events_bytes_are_not_touched() -> None:
    async def test() -> None:
        line = b'{"type":"x","n":1.50,"big":36893488147419103232,"s":"\\u00e9"}'
        assert [e.event async for batch in batches(filled(line, b""), "auto") for e in batch] == [line]

    go(test())


def test_a_line_that_must_be_an_event_and_is_none_ends_the_input_after_what_came_before() -> None:
    async def test() -> None:
        source = batches(filled(b'{"type":"x"}\nnonsense\n{"type":"y"}\n', b""), "events")
        assert [entry.line for entry in await anext(source)] == [1]
        with pytest.raises(LineError, match="line 2 is no event"):
            await anext(source)

    go(test())


def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "LINE_BYTES", 100)

    async def test() -> None:
        source = batches(filled(b"short\n", *[b"x" * 60] * 2), "auto")
        with pytest.raises(LineError, match="line 2 is longer than 100 bytes"):
            [batch async for batch in source]

    go(test())


def test_a_long_line_of_text_becomes_several_pieces_of_it() -> None:
    async def test() -> None:
        line = "ü" * (TEXT_CHARACTERS + 1)
        pieces = await recorded_lines("auto", line.encode() + b"\n")
        assert [number for number, _ in pieces] == [1, 1]
        assert "".join(piece["text"] for _, piece in pieces) == line + "\n"

    go(test())


def test_a_batch_is_full_by_count_or_by_bytes_and_a_larger_event_has_its_own() -> None:
    async def sizes(source: bytes, **limits: int) -> list[int]:
        return [len(batch) async for batch in batches(filled(source, b""), "auto", **limits)]

    async def test() -> None:
        event = b'{"type":"x"}\n'
        assert await sizes(event * 7, most=3) == [3, 3, 1]
        assert await sizes(event * 5, most_bytes=24) == [2, 2, 1]
        large = b'{"type":"%b"}\n' % (b"y" * 50)
        assert await sizes(event + large + event, most_bytes=24) == [1, 1, 1]

    go(test())


def test_a_batch_does_not_wait_for_an_input_that_pauses() -> None:
    async def test() -> None:
        queue = filled(b"one\n")
        source = batches(queue, "auto", linger_s=0.001)
        assert [entry.line for entry in await anext(source)] == [1]
        queue.put_nowait(b"two\n")
        assert [entry.line for entry in await anext(source)] == [2]

    go(test())


def test_the_reader_takes_all_of_a_pipe_in_order() -> None:
    async def test() -> None:
        read, write = os.pipe()
        reader = Reader(read)
        sent = b"".join(b"%d\n" % n for n in range(100_000))

        def produce() -> None:
            with os.fdopen(write, "wb") as pipe:
                pipe.write(sent)

        producing = asyncio.create_task(asyncio.to_thread(produce))
        received = []
        while chunk := await reader.get():
            received.append(chunk)
        await producing
        os.close(read)
        assert b"".join(received) == sent

    go(test())


# --------------------------------------------------------------------------------------------------------- recording


class Store:
    """A run as the daemon keeps it: batches by id, and faults when they are asked for."""

    def __init__(self, **members: Any) -> None:
        self.run = snapshot(**members)
        self.batches: dict[str, list[Any]] = {}
        self.order: list[str] = []
        self.faults: list[Any] = []  # for the next calls of runs.record: raised, or called before or after storing

    def answers(self) -> dict[str, Any]:
        return {
            "runs.create": lambda _, params: {**self.run, "prompt": params["prompt"]},
            "runs.resume": self.resume,
            "runs.get": lambda *_: self.run,
            "runs.record": self.record,
        }

    def resume(self, session: Session, params: Any) -> Any:
        if self.run["status"] in {"completed", "failed", "cancelled"}:
            raise conflict("run_terminal", "over")
        return self.run

    def record(self, session: Session, params: Any) -> Any:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if params["batch_id"] not in self.batches:
            self.batches[params["batch_id"]] = params["events"]
            self.order += [event["text"] for event in params["events"]]
        assert len(params["at_ms"]) == len(params["events"])
        if fault is not None:
            fault(session)
            raise Unanswered
        count = len(params["events"])
        cursor = len(self.order)
        return {
            "run_id": params["run_id"],
            "first_sequence": cursor - count,
            "count": count,
            "cursor": cursor,
            "status": self.run["status"],
        }


def recorder(url: str, run_id: str | None = None, patience_s: float = 5.0) -> tuple[Recorder, list[str]]:
    begun: list[str] = []
    pauses = Pauses(patience_s, first_s=0.001, longest_s=0.01)
    return Recorder(lambda: open_connection(url), run_id, {"prompt": "p"}, begun.append, pauses), begun


def noticed(daemon: FakeDaemon, method: str) -> asyncio.Event:
    """An event of this loop that a call of `method` sets."""
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()
    answer = daemon.answers[method]

    def answer_and_tell(session: Session, params: Any) -> Any:
        session.later(lambda: loop.call_soon_threadsafe(seen.set))
        return answer(session, params)

    daemon.answers[method] = answer_and_tell
    return seen


def numbered(count: int) -> bytes:
    return b"".join(b"%d\n" % n for n in range(count))


def test_everything_is_recorded_in_order_and_the_run_is_announced_first() -> None:
    async def test() -> None:
        store = Store()
        with FakeDaemon(store.answers()) as daemon:
            one, begun = recorder(daemon.url)
            await one.record(batches(filled(numbered(1_000), b""), "text", most=64))
        assert begun == ["run-1"]
        assert store.order == [f"{n}\n" for n in range(1_000)]
        assert (one.events, one.cursor, one.status) == (1_000, 1_000, "executing")
        assert len(store.batches) == 16

    go(test())


def test_a_batch_whose_connection_is_lost_is_sent_again_under_the_same_id() -> None:
    async def test() -> None:
        store = Store()
        lose = lambda session: session.close(1012)  # noqa: E731
        store.faults = [None, lose, None, unavailable("full"), lose, unavailable("full", outcome="unknown")]
        with FakeDaemon(store.answers()) as daemon:
            one, begun = recorder(daemon.url)
            await one.record(batches(filled(numbered(40), b""), "text", most=10))
            sent = [params["batch_id"] for params in daemon.params_of("runs.record")]
            assert [len(list(same)) for _, same in itertools.groupby(sent)] == [1, 2, 4, 1]
            assert len(daemon.params_of("runs.create")) == 1
            assert daemon.params_of("runs.resume") == [{"run_id": "run-1"}] * 4, "attended again each time"
        assert store.order == [f"{n}\n" for n in range(40)]
        assert len(store.batches) == 4
        assert begun == ["run-1"]

    go(test())


def test_an_idle_recording_attends_its_run_again_after_a_lost_connection() -> None:
    async def test() -> None:
        store = Store()
        with FakeDaemon(store.answers()) as daemon:
            queue = filled(b"0\n")
            one, _ = recorder(daemon.url)
            recorded = noticed(daemon, "runs.record")
            attended = noticed(daemon, "runs.resume")
            recording = asyncio.create_task(one.record(batches(queue, "text", linger_s=0.001)))
            await recorded.wait()
            await asyncio.to_thread(daemon.sessions[0].close, 1012)
            await attended.wait()
            queue.put_nowait(b"1\n")
            queue.put_nowait(b"")
            await recording
        assert store.order == ["0\n", "1\n"]

    go(test())


@pytest.mark.parametrize("by_notification", [True, False])
def test_a_cancelled_run_stops_the_recording(by_notification: bool) -> None:
    async def test() -> None:
        store = Store()

        def cancel(session: Session) -> None:
            store.run.update(status="cancelled", cancel_reason="enough")
            if by_notification:
                session.notify("runs.cancelled", {"run_id": "another", "reason": "not this"})
                session.notify("runs.cancelled", {"run_id": "run-1", "reason": "enough"})
            else:
                session.close(1012)

        store.faults = [cancel]
        with FakeDaemon(store.answers()) as daemon:
            one, _ = recorder(daemon.url)
            with pytest.raises(RunStopped, match="run-1 was cancelled: enough"):
                await one.record(batches(filled(b"0\n"), "text", linger_s=0.001))

    go(test())


def test_a_run_that_is_over_otherwise_still_takes_late_events() -> None:
    async def test() -> None:
        store = Store(status="completed", event_count=3)
        with FakeDaemon(store.answers()) as daemon:
            one, begun = recorder(daemon.url, run_id="run-1")
            await one.record(batches(filled(b"late\n", b""), "text"))
            assert not daemon.params_of("runs.create")
        assert begun == ["run-1"]
        assert store.order == ["late\n"]

    go(test())


def test_a_refused_event_is_told_by_the_number_of_its_line() -> None:
    async def test() -> None:
        for error, said in [
            (invalid_params("events[2].type", "must be a string"), "line 3 was refused: events.2..type: must be"),
            (invalid_params("", "strange"), "lines 1 to 4 were refused: params: strange"),
        ]:
            store = Store()
            store.faults = [error]
            with FakeDaemon(store.answers()) as daemon:
                one, _ = recorder(daemon.url)
                with pytest.raises(LineError, match=said):
                    await one.record(batches(filled(numbered(4), b""), "text"))

    go(test())


def test_a_run_that_is_not_ours_is_refused_at_once() -> None:
    def unknown(session: Session, params: Any) -> Any:
        raise not_found("run", "run-x")

    async def test() -> None:
        with FakeDaemon({"runs.resume": unknown}) as daemon:
            one, begun = recorder(daemon.url, run_id="run-x")
            with pytest.raises(CallError, match="unknown run"):
                await one.record(batches(filled(b""), "text"))
            assert begun == []

    go(test())


def test_trouble_is_told_once_until_it_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        store = Store()
        full = unavailable("full")
        store.faults = [full, full, full, None, full, None]
        with FakeDaemon(store.answers()) as daemon:
            one, _ = recorder(daemon.url)
            await one.record(batches(filled(numbered(20), b""), "text", most=10))
        assert len(store.order) == 20

    go(test())
    assert capsys.readouterr().err.count("full; trying again") == 2


def test_the_patience_of_a_recording_ends() -> None:
    async def test() -> None:
        store = Store()
        store.faults = [lambda session: session.close(1012)] * 1_000
        with FakeDaemon(store.answers()) as daemon:
            one, _ = recorder(daemon.url, patience_s=0.02)
            with pytest.raises((ConnectionLost, Unreachable)):
                await one.record(batches(filled(b"0\n"), "text", linger_s=0.001))

    go(test())


# --------------------------------------------------------------------------------------------------- the whole command


def command(tmp_path: Path, url: str, *arguments: str, input_: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER_", "CAR_"))}
    return subprocess.run(
        [sys.executable, "-m", "carserver", "runs", "record", "--url", url, *arguments],
        input=input_,
        capture_output=True,
        text=True,
        check=False,
        env={**environ, "CARSERVER_STATE_DIR": str(tmp_path / "state")},
        timeout=PATIENCE_S,
    )


def test_the_command_prints_the_runs_id_as_data_and_the_rest_as_notes(tmp_path: Path) -> None:
    store = Store()
    with FakeDaemon(store.answers()) as daemon:
        options = ["--prompt", "hello", "--session", "s", "--metadata", '{"k":1}']
        done = command(tmp_path, daemon.url, *options, input_="one\ntwo\n")
        created = daemon.params_of("runs.create")
    assert (done.returncode, done.stdout) == (0, "run-1\n")
    assert "2 events recorded, the run is executing" in done.stderr
    assert "nobody attends it" in done.stderr
    assert created == [{"prompt": "hello", "session_id": "s", "metadata": {"k": 1}}]
    assert store.order == ["one\n", "two\n"]


def test_the_command_prints_its_result_as_json_if_asked(tmp_path: Path) -> None:
    with FakeDaemon(Store(status="completed").answers()) as daemon:
        done = command(tmp_path, daemon.url, "--run", "run-1", "--json", input_="one\n")
    assert json.loads(done.stdout) == {"run_id": "run-1", "events": 1, "cursor": 1, "status": "completed"}


def test_the_command_ends_with_1_when_the_run_is_cancelled(tmp_path: Path) -> None:
    with FakeDaemon(Store(status="cancelled", cancel_reason="en\x1bough").answers()) as daemon:
        done = command(tmp_path, daemon.url, "--run", "run-1", input_="one\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "carserver: run-1 was cancelled: en\\x1bough\n"


def test_the_command_says_how_much_is_recorded_of_an_input_that_breaks_off(tmp_path: Path) -> None:
    lines = '{"type":"text_delta","text":"a"}\nno event\n'
    with FakeDaemon(Store().answers()) as daemon:
        done = command(tmp_path, daemon.url, "--input", "events", input_=lines)
    assert (done.returncode, done.stdout) == (1, "run-1\n")
    told, why = done.stderr.splitlines()
    assert told == "carserver: 1 event acknowledged, then it broke off"
    assert why.startswith("carserver: line 2 ")
