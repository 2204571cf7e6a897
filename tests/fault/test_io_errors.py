"""Calls on the database's files that fail, one after another; each of them, not some, by `scripts/fault_rounds`.

Where there is no C compiler these are skipped; then the limited disk of test_full_disk.py fails writes, and a method
module of test_storage.py an fsync.
"""

from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.fault.faults import AT_THE_START, WHILE_IT_RUNS, Fault, Figures, at_the_start, failed_fsyncs, while_it_runs
from tests.fault.preload import Call, Faults

ROUNDS = 20  # of each fault; all of them are about 130


def good(figures: Figures) -> bool:
    """Shows the figures; nothing may be wrong, and the calls did fail."""
    print(figures)
    assert not figures.found.wrong, figures.found.wrong
    assert figures.hit > figures.rounds / 2, figures
    return figures.found.good


@pytest.mark.parametrize("fault", WHILE_IT_RUNS, ids=str)
async def test_whichever_call_fails_what_it_spoils_is_refused_as_not_done_and_nothing_else_is_lost_doubled_or_shown(
    faults: Faults, tmp_path: Path, fault: Fault
) -> None:
    figures = await while_it_runs(faults, tmp_path / "state", fault, rounds=ROUNDS)
    assert good(figures)
    assert figures.refused > 0 or fault.call is not Call.WRITE  # a page that is read may be in memory
    assert figures.found.acknowledged > figures.rounds  # the daemon went on


async def test_after_a_failed_fsync_the_daemon_exits_1_and_what_it_acknowledged_or_showed_is_there(
    faults: Faults, tmp_path: Path
) -> None:
    figures = await failed_fsyncs(faults, tmp_path / "state", rounds=6)
    assert good(figures)
    assert figures.ended == figures.hit > 0


@pytest.mark.parametrize("fault", AT_THE_START[:3], ids=str)
async def test_a_daemon_that_cannot_open_its_database_says_so_in_one_line_and_is_well_when_the_disk_is(
    faults: Faults, tmp_path: Path, fault: Fault
) -> None:
    reads = fault.call is Call.READ
    stop = Daemon.terminate if reads else Daemon.kill
    assert good(await at_the_start(faults, tmp_path / "state", fault, stop, rounds=3 if reads else 2))
