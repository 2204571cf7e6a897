"""`export`, `import` and `prune` as commands: how lines gather, where a file appears, what is asked and refused."""

import asyncio
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import pytest
from msgspec import Raw

from carserver.cli import exporter, importer, prune, runlines
from carserver.cli.app import run
from carserver.cli.errors import CommandError
from carserver.cli.exporter import Exporter
from carserver.cli.importer import batches
from carserver.cli.runlines import RunLines, Termination
from carserver.cli.sink import Sink, new_file
from carserver.client import Connection
from carserver.config import Settings
from carserver.core.transfer import LOG_EVENTS
from carserver.protocol.errors import RpcError, conflict, limit_exceeded
from carserver.stores.schema import SEQUENCE_BITS
from tests.unit.fakedaemon import FakeDaemon

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")
NOTHING = {"runs": 0, "events": 0, "outputs": 0, "skipped": 0}
PRUNED = {"runs": 2, "outputs": 1, "bytes": 7, "dry_run": False, "run_ids": ["r1", "r2"], "more_runs": 3}


def test_the_longest_log_that_is_taken_has_room_in_storage() -> None:
    assert LOG_EVENTS == 1 << SEQUENCE_BITS


# Outputs.


def test_large_outputs_are_fetched_as_many_at_a_time_as_there_is_room_for() -> None:
    mib = 1024 * 1024
    sizes = [0] * 20 + [9 * mib, 9 * mib, 7 * mib, 20 * mib, 1, 0]
    outputs = [
        Raw(
            msgspec.json.encode({"id": f"o{n}", "event": {"content": {"kind": "i", "omitted": size > 0, "size": size}}})
        )
        for n, size in enumerate(sizes)
    ]
    few = list(exporter._few_at_a_time(outputs))
    assert [len(group) for group in few] == [16, 5, 2, 1, 2]
    assert [listed.raw for group in few for listed in group] == outputs
    assert list(exporter._few_at_a_time([])) == []


# The lines of a run.


class Collected(Sink):
    """Keeps what is put."""

    def __init__(self) -> None:
        super().__init__(-1)

    @property
    def lines(self) -> list[bytes]:
        return self._lines


def notice(sequence: int, event: bytes = b'{"type":"t"}', kind: str = "event") -> Any:
    record = runlines.Record(kind, sequence, 1, Raw(event))
    return runlines.Notice("run", "executing", record)


def turn(index: int) -> Any:
    record = b'{"record":"turn","index":%d}' % index
    return runlines.notice_of(Raw(b'{"run_id":"run","run_status":"executing","record":%b}' % record))


def begin(lines: RunLines, events: int) -> None:
    lines.begin({"id": Raw(b'"run"'), "event_count": Raw(b"%d" % events), "epoch": Raw(b'"e"')})


def pages(sink: Collected) -> list[int]:
    """How many events each page has."""
    return [len(msgspec.json.decode(line)["events"]) for line in sink.lines[1:]]


async def test_a_run_is_its_snapshot_without_epoch_and_as_many_events_as_that_says() -> None:
    lines, sink = RunLines("run"), Collected()
    for number in (7, 0, 0, 1):  # 7 is of an older subscription
        lines.take(notice(number))
    begin(lines, 3)
    assert not lines.done.done()
    for number in (2, 3):
        lines.take(notice(number))
    await lines.done
    lines.write(sink)
    event = b'{"sequence":%d,"timestamp_ms":1,"status":"executing","event":{"type":"t"}}'
    assert sink.lines == [
        b'{"run":{"id":"run","event_count":3}}',
        b'{"run_id":"run","events":[%b]}' % b",".join(event % number for number in range(3)),
    ]


@pytest.mark.parametrize(
    ("limit", "value", "expected"),
    [("PAGE_EVENTS", 3, [3, 3, 1]), ("PAGE_BYTES", 24, [2, 2, 2, 1]), ("PAGE_BRACKETS", 2, [1] * 7)],
)
async def test_a_page_is_bounded_and_has_one_event_at_least(
    limit: str, value: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlines, limit, value)
    lines, sink = RunLines("run"), Collected()
    begin(lines, 7)
    for number in range(7):
        lines.take(notice(number))
    await lines.done
    lines.write(sink)
    assert pages(sink) == expected


async def test_turns_wait_for_their_times_and_what_comes_behind_them_waits_too() -> None:
    lines, sink = RunLines("run"), Collected()
    lines.take(notice(0))
    lines.take(turn(1))
    lines.begin({"event_count": Raw(b"6")}, Termination(Raw(b'{"status":"done"}')))
    for behind in (notice(2), turn(3), turn(4), notice(5)):
        lines.take(behind)
    assert await lines.untimed() == 1
    lines.time({1: 11, 3: 13})
    assert not lines.done.done()
    assert await lines.untimed() == 4
    lines.time({4: 14})
    assert await lines.untimed() is None
    lines.write(sink)
    times = [entry["timestamp_ms"] for entry in msgspec.json.decode(sink.lines[1])["events"]]
    assert times == [1, 11, 1, 13, 14, 1]
    assert sink.lines[0] == b'{"run":{"event_count":6,"outcome":{"status":"done"}}}'
    assert b'"timestamp_ms":11,"status":"executing","record":"turn","event":{"type":"turn","index":1}}' in sink.lines[1]


async def test_a_turn_whose_log_is_gone_closes_its_run() -> None:
    lines = RunLines("run")
    begin(lines, 1)
    lines.take(turn(0))
    assert await lines.untimed() == 0
    lines.time({})
    with pytest.raises(runlines.Closed, match="deleted"):
        await lines.untimed()


@pytest.mark.parametrize("events", [1, 5])
async def test_a_run_that_is_large_ahead_of_its_turn_is_given_up_also_with_its_last_page(
    events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlines, "_GATHERED_BYTES", 100)
    monkeypatch.setattr(runlines, "PAGE_EVENTS", 1)
    lines = RunLines("run")
    begin(lines, events)
    for number in range(events):
        lines.take(notice(number, b'{"type":"%b"}' % (b"t" * 100)))
    with pytest.raises(runlines.TooLarge):
        await lines.done


async def test_a_run_that_is_given_up_is_not_sent_on_until_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlines, "_GATHERED_BYTES", 0)
    connection = Answering({"runs.trace.subscribe": exporter._Subscribed({"event_count": Raw(b"9")})})
    exporting = Exporter(cast("Connection", connection), Collected())
    with pytest.raises(runlines.TooLarge):
        await exporting._fetch("run")
    assert connection.asked == ["runs.trace.subscribe", "runs.trace.unsubscribe"]


class Answering:
    """A connection that has these answers."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    async def call(self, method: str, *_: object, **__: object) -> Any:
        self.asked.append(method)
        return self._answers.get(method)


async def test_nothing_is_written_of_a_run_that_is_deleted_before_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, written in ((10_000, False), (100, True)):
        monkeypatch.setattr(runlines, "_GATHERED_BYTES", limit)
        monkeypatch.setattr(runlines, "PAGE_EVENTS", 1)
        sink = Collected()
        lines = RunLines("run", sink)
        begin(lines, 9)
        for number in range(5):
            lines.take(notice(number))
        lines.close("deleted")
        assert bool(sink.lines) == written
        with pytest.raises(runlines.Closed) as closed:
            await lines.done
        assert closed.value.written == written


async def test_a_run_without_events_is_its_snapshot() -> None:
    lines, sink = RunLines("run"), Collected()
    begin(lines, 0)
    await lines.done
    lines.write(sink)
    assert sink.lines == [b'{"run":{"id":"run","event_count":0}}']


# Files.


def test_a_file_appears_whole_this_users_alone_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path, force=False) as descriptor:
        os.write(descriptor, b"first")
        assert not path.exists()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"first", 0o600)
    with pytest.raises(CommandError, match="there already"), new_file(path, force=False):
        pass
    with pytest.raises(ZeroDivisionError), new_file(path, force=True) as descriptor:
        os.write(descriptor, b"%d" % (1 // 0))
    assert path.read_bytes() == b"first"
    with new_file(path, force=True) as descriptor:
        os.write(descriptor, b"third")
    assert path.read_bytes() == b"third"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_never_replaced(force: bool, make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "there")
    with pytest.raises(CommandError, match="no file"), new_file(tmp_path / "there", force=force):
        pytest.fail("it is said before anything is written")


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(CommandError, match="there already"), new_file(path, force=False):
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"
    assert list(tmp_path.iterdir()) == [path]


async def test_a_sink_keeps_the_order_while_it_is_written_and_put_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path, force=False) as descriptor:
        sink = Sink(descriptor)

        async def some() -> None:
            for _ in range(50):
                sink.put(b"%d" % next(numbers) + b" " * 60_000)
                await sink.make_room()

        numbers = iter(range(1_000))
        await asyncio.gather(*(some() for _ in range(4)))
        await sink.flush()
    assert [int(line) for line in path.read_bytes().splitlines()] == list(range(200))


# Import.


def test_batches_are_bounded_by_lines_bytes_and_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    source = b"".join(b'{"n":[%d]}\n' % n for n in range(10))
    for limit, value, expected in (
        ("BATCH_LINES", 4, [4, 4, 2]),
        ("BATCH_BYTES", 27, [3, 3, 3, 1]),
        ("BATCH_BRACKETS", 1, [1] * 10),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(importer, limit, value)
            found = list(batches(io.BytesIO(source)))
        assert [len(batch.lines) for batch in found] == expected
        assert [number for batch in found for number in batch.numbers] == list(range(1, 11))


def test_a_line_that_is_no_json_ends_it_after_what_came_before() -> None:
    found = batches(io.BytesIO(b'{"a":1}\n\n{"b":'))
    assert next(found).numbers == [1]
    with pytest.raises(CommandError, match="line 3 is no JSON"):
        next(found)


def test_a_file_that_cannot_be_read_to_its_end_says_why_after_what_came_before() -> None:
    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            if line := super().readline(size):
                return line
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(CommandError, match="cannot be read: Input/output error"):
        list(batches(Broken(b'{"a":1}\n')))


def test_a_line_leaves_room_for_the_message_around_it() -> None:
    message = b'{"jsonrpc":"2.0","id":%d,"method":"runs.import","params":{"lines":[]}}' % 2**53
    assert importer.LINE_BYTES + len(message) <= Settings().message_bytes


@pytest.mark.parametrize(("stream", "command"), [("stdin", "import"), ("stdout", "export")])
def test_a_closed_stream_is_said(stream: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys, stream, None)
    with FakeDaemon() as daemon:
        assert run([command, "-", "--url", daemon.url]) == 2
    assert "is closed: name a FILE" in capsys.readouterr().err


def test_at_a_terminal_what_was_said_of_the_progress_is_gone_before_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    file = tmp_path / "file"
    file.write_text('{"a":1}\n{"b"\n')
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with FakeDaemon({"runs.import": NOTHING}) as daemon:
        assert run(["import", str(file), "--url", daemon.url]) == 1
    _, progress, refusal = capsys.readouterr().err.split("\r\x1b[K")
    assert progress == "line 1: 0 runs, 0 outputs"
    assert refusal.startswith("carserver: line 2 is no JSON")


def test_a_refusal_names_the_line_of_the_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "file"
    file.write_text('\n{"a":1}\n\n{"b":2}\n')
    for error, said in (
        (conflict("exists", "lines[1]: run 'r' exists with another prompt", path="lines[1]"), "line 4: run 'r' exists"),
        (limit_exceeded("text_bytes", 2, 1, "lines[0].run.prompt"), "line 2: run.prompt: 2 is more"),
        (limit_exceeded("brackets", 2, 1, "message"), "lines 2 to 4: message: 2 is more"),
    ):

        def answer(_: object, __: object, error: RpcError = error) -> Any:
            raise error

        with FakeDaemon({"runs.import": answer}) as daemon:
            assert run(["import", str(file), "--url", daemon.url]) == 1
        assert said in capsys.readouterr().err


def test_a_file_that_is_not_there_is_said(tmp_path: Path, capsys: Captured) -> None:
    with FakeDaemon() as daemon:
        assert run(["import", str(tmp_path / "no"), "--url", daemon.url]) == 2
    assert "No such file" in capsys.readouterr().err


# Prune.


def test_prune_shows_and_asks_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(prune, "_somebody_there", lambda: True)
    arguments = ["prune", "--older-than", "1.5h", "--max-runs", "0", "--max-bytes", "2K"]
    params = {"older_than_ms": 5_400_000, "max_runs": 0, "max_bytes": 2_048}
    for says, code in ((False, 130), (True, 0)):

        def confirm(*_: object, says: bool = says, **__: object) -> None:
            if not says:
                raise click.Abort

        monkeypatch.setattr(click, "confirm", confirm)
        with FakeDaemon({"server.prune": lambda _, given: {**PRUNED, "dry_run": given["dry_run"]}}) as daemon:
            assert run([*arguments, "--url", daemon.url]) == code
            asked = [{**params, "dry_run": True}]
            assert daemon.params_of("server.prune") == asked + [{**params, "dry_run": False}] * says
        out, err = capsys.readouterr()
        assert out == ("r1\nr2\n" if says else "")
        assert "2 runs and 1 output would be deleted, 7 bytes" in err


def test_prune_with_nothing_to_delete_asks_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(prune, "_somebody_there", lambda: True)
    nothing = {**PRUNED, "runs": 0, "outputs": 0, "run_ids": [], "more_runs": 0, "dry_run": True}
    with FakeDaemon({"server.prune": nothing}) as daemon:
        assert run(["prune", "--max-runs", "0", "--url", daemon.url]) == 0
    assert "0 runs and 0 outputs would be deleted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "size"),
    [("0", 0), ("7B", 7), ("10k", 10 * 1024), ("1.5GiB", 3 * 2**29), ("8192T", 2**53)],
)
def test_a_size_is_written_as_people_write_it(given: str, size: int) -> None:
    assert prune._SIZE.convert(given, None, None) == size


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--max-runs", "1"],
        ["--older-than", "1y", "--yes"],
        ["--older-than", "5"],
        ["--older-than", "1M"],
        ["--max-bytes", "1X", "--yes"],
        ["--older-than", "999999999w", "--yes"],
        ["--max-bytes", "8193T", "--yes"],
        ["--max-runs", str(2**53 + 1), "--yes"],
    ],
)
def test_prune_refuses_what_it_does_not_understand_and_what_nobody_confirms(
    arguments: list[str], capsys: Captured
) -> None:
    with FakeDaemon() as daemon:
        assert run(["prune", *arguments, "--url", daemon.url]) == 2
        assert daemon.calls == []
    assert len(capsys.readouterr().err.splitlines()) == 1
