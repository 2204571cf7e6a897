"""TERM with tools that run: three rounds under load; 20 by `scripts/tool_rounds`."""

import random
import sys
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.fault.tooldrains import Drains, drain_round
from tests.fault.zoo import write_zoo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tools need Linux")

ROUNDS = 2
DRAIN_S = 8.0  # what a busy machine takes of it must not be all that peers have to read in, nor storage to close
SLACK_S = 15.0  # two cores that run other tests too: the bound of the command holds for the daemon alone


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_under_load_the_daemon_ends_in_time_with_its_tools_and_nothing_acknowledged_is_lost(
    start: StartDaemon, tmp_path: Path, number: int, chance: random.Random
) -> None:
    drains = Drains()
    daemon = start("--tools", write_zoo(tmp_path / "zoo.toml"), drain_s=DRAIN_S, kill_after_s=0.5, write_s=60)
    await drain_round(daemon, DRAIN_S, chance, drains, SLACK_S)
    print(drains)
    assert drains.wrong == []
    assert drains.tools > 0
