"""`kill -9` in the middle of appends: five rounds; 100 by `scripts/kill_rounds`."""

import copy
import random
import sqlite3
from typing import Any

import pytest

from carserver.stores.rows import RUN_COLUMNS
from carserver.stores.schema import row_checksum
from tests.daemon import Daemon
from tests.fault.audit import Batch, audit, audit_runs
from tests.fault.kills import READY_S, Figures, kill_round
from tests.peer import Refused, peer

ROUNDS = 5


async def test_a_kill_amid_appends_loses_doubles_and_tears_nothing_and_the_same_batch_again_appends_nothing(
    daemon: Daemon, chance: random.Random
) -> None:
    figures = Figures()
    sent: list[Batch] = []
    for _ in range(ROUNDS):
        sent += await kill_round(daemon, chance, figures)
    print(figures)
    assert figures.found.good, figures.found
    assert figures.found.acknowledged > ROUNDS * 20
    assert figures.unanswered > 0  # else the kills came when nothing was under way
    async with peer(daemon) as client:
        assert (await audit_runs(client, sent)).good  # what the first rounds stored has outlived the last
    # Two cores that run other tests too: the bound of the command, READY_S, holds for the daemon alone.
    assert figures.slowest_restart_s < READY_S * 20, f"at most {READY_S} s is wanted"


# The negative controls: what the rounds rely on finds every kind of damage.


def _log_and_sent() -> tuple[list[dict[str, Any]], list[Batch]]:
    sent = [Batch("run", f"b{b}", [{"type": "text_delta", "b": b, "n": n} for n in range(3)]) for b in range(4)]
    log: list[dict[str, Any]] = []
    for batch in sent[:3]:
        batch.answer = {"first_sequence": len(log), "count": 3}
        for event in batch.events:
            log.append({"sequence": len(log), "timestamp_ms": 1000, "event": copy.deepcopy(event)})
    sent[2].answer = None  # stored, but its acknowledgement never arrived; the fourth was never stored
    return log, sent


def test_the_checker_finds_nothing_in_a_log_as_it_must_be() -> None:
    log, sent = _log_and_sent()
    assert audit(log, sent).good
    assert audit(log, sent).acknowledged == 6


def test_the_checker_finds_a_hole() -> None:
    log, sent = _log_and_sent()
    del log[4]
    found = audit(log, sent)
    assert (found.lost, len(found.wrong)) == (1, 1)


def test_the_checker_finds_a_lost_batch_behind_contiguous_sequences() -> None:
    log, sent = _log_and_sent()
    log = log[:3] + [{**entry, "sequence": entry["sequence"] - 3} for entry in log[6:]]
    assert audit(log, sent).lost == 3


def test_the_checker_finds_a_lost_tail() -> None:
    log, sent = _log_and_sent()
    assert audit(log[:3], sent).lost == 3


def test_the_checker_finds_changed_content() -> None:
    log, sent = _log_and_sent()
    log[1]["event"]["n"] = 7
    found = audit(log, sent)
    assert found.lost == 1
    assert found.wrong == ["1 events that nobody sent"]


def test_the_checker_finds_a_batch_that_was_stored_twice() -> None:
    log, sent = _log_and_sent()
    log += [{**entry, "sequence": entry["sequence"] + 3} for entry in log[6:9]]
    assert audit(log, sent).duplicated == 3


def test_the_checker_finds_half_a_batch() -> None:
    log, sent = _log_and_sent()
    assert audit(log[:8], sent).wrong == ["batch b2 is there in part"]


def test_the_checker_finds_times_that_go_back() -> None:
    log, sent = _log_and_sent()
    log[5]["timestamp_ms"] = 999
    assert audit(log, sent).wrong == ["times go back"]


async def test_a_batch_taken_out_of_the_database_behind_the_daemons_back_is_found(daemon: Daemon) -> None:
    async with peer(daemon) as client:
        run_id = (await client.create())["id"]
        sent = [Batch(run_id, f"b{b}", [{"type": "text_delta", "b": b, "n": n} for n in range(3)]) for b in range(4)]
        for batch in sent:
            batch.answer = await client.call("runs.record", batch.params)
    daemon.kill()
    database = sqlite3.connect(daemon.state / "carserver.db")
    with database:
        database.execute("DELETE FROM events WHERE place & 0xffffff >= 9")
        database.execute("UPDATE runs SET event_count = 9")
        database.create_function("row_checksum", -1, row_checksum)
        database.execute(f"UPDATE runs SET checksum = row_checksum({RUN_COLUMNS})")
    database.close()
    daemon.start()
    async with peer(daemon) as client:
        assert (await audit_runs(client, sent)).lost == 3
        # And where the log itself is not whole, the daemon says so before any checker could.
        with pytest.raises(Refused, match="missing or damaged"):
            await _hole(daemon, run_id)


async def _hole(daemon: Daemon, run_id: str) -> None:
    daemon.kill()
    database = sqlite3.connect(daemon.state / "carserver.db")
    with database:
        database.execute("DELETE FROM events WHERE place & 0xffffff = 4")
    database.close()
    daemon.start()
    async with peer(daemon) as client:
        await client.call("runs.events", {"run_id": run_id, "after": 4})
