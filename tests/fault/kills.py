"""Rounds of `kill -9` in the middle of appends, each on the same state folder; `scripts/kill_rounds` runs many of them.

Several producers pipeline batches on several runs; at a random moment the daemon is killed; it is started again, and
the logs are compared with what was sent and acknowledged. Then the batches are sent again.
"""

import asyncio
import contextlib
import logging
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon import Daemon
from tests.fault.audit import Batch, Findings, Producer, audit_runs
from tests.peer import Peer, Refused, peer

RUNS, PRODUCERS = 4, 6
RESENT = 40  # of the acknowledged batches, in each round
READY_S = 1.0  # after a kill


@dataclass
class Figures:
    """What the rounds came to."""

    rounds: int = 0
    unanswered: int = 0
    found: Findings = field(default_factory=Findings)
    slowest_restart_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.found.acknowledged} events acknowledged, {self.found.lost} lost, "
            f"{self.found.duplicated} duplicated, {len(self.found.wrong)} otherwise wrong, "
            f"{self.unanswered} batches unanswered, slowest restart {self.slowest_restart_s * 1000:.0f} ms"
        )


async def kill_round(daemon: Daemon, chance: random.Random, figures: Figures) -> list[Batch]:
    """Produces, kills, restarts, compares, sends again; what was sent. The daemon runs, before and after."""
    sent = await _produce_until_killed(daemon, chance)
    figures.rounds += 1
    figures.unanswered += sum(batch.answer is None for batch in sent)
    began = time.monotonic()
    daemon.start()
    async with peer(daemon) as client:
        await client.call("server.ping")
        figures.slowest_restart_s = max(figures.slowest_restart_s, time.monotonic() - began)
        figures.found.add(await audit_runs(client, sent))
        figures.found.wrong += await _send_again(client, sent, chance)
        again = await audit_runs(client, sent)  # every batch has an answer by now, and none may be there twice
        again.acknowledged = 0
        figures.found.add(again)
    return sent


async def _produce_until_killed(daemon: Daemon, chance: random.Random) -> list[Batch]:
    async with contextlib.AsyncExitStack() as stack:
        owner = await stack.enter_async_context(peer(daemon))
        runs = [(await owner.create())["id"] for _ in range(RUNS)]
        acknowledgements, producers = asyncio.Semaphore(0), []
        for number in range(PRODUCERS):
            connection = await stack.enter_async_context(peer(daemon))
            mine = chance.sample(runs, 2)  # most runs have several producers
            sizes = [chance.choice((1, 3, 20, 100)) for _ in range(5)]
            name = f"{chance.getrandbits(64):x}-{number}"
            producers.append(Producer(name, connection, mine, sizes=sizes, acknowledgements=acknowledgements))
        work = [asyncio.create_task(producer.run()) for producer in producers]
        for _ in range(chance.randint(20, 200)):
            await acknowledgements.acquire()
        await asyncio.sleep(chance.uniform(0, 0.03))  # not just after an acknowledgement: anywhere within a commit
        daemon.kill()
        await asyncio.gather(*work)
    return [batch for producer in producers for batch in producer.sent]


async def _send_again(client: Peer, sent: list[Batch], chance: random.Random) -> list[str]:
    """The same batch gets its first answer again, with other events it is refused. What was wrong; fills in answers."""
    wrong = []
    acknowledged = [batch for batch in sent if batch.answer is not None]
    for batch in chance.sample(acknowledged, min(RESENT, len(acknowledged))):
        answer = await client.call("runs.record", batch.params)
        if answer != batch.answer:
            wrong.append(f"batch {batch.batch_id} again: {answer}, at first {batch.answer}")
        try:
            await client.record(batch.run_id, {"type": "other"}, batch_id=batch.batch_id)
            wrong.append(f"batch {batch.batch_id} was taken with other events")
        except Refused as refusal:
            if (refusal.type, refusal.data["reason"]) != ("conflict", "batch_reused"):
                wrong.append(f"batch {batch.batch_id} with other events: {refusal}")
    for batch in sent:
        if batch.answer is None:
            batch.answer = await client.call("runs.record", batch.params)
    return wrong


async def _many(rounds: int, seed: int) -> Figures:
    figures, chance = Figures(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="carserver-kills-") as folder:
        daemon = Daemon(Path(folder) / "state").start()
        sent: list[Batch] = []
        try:
            for _ in range(rounds):
                sent += await kill_round(daemon, chance, figures)
                if not figures.found.good:
                    print(figures.found, file=sys.stderr)
                    break
            async with peer(daemon) as client:  # what the first rounds stored has outlived the last
                end = await audit_runs(client, sent)
            end.acknowledged = 0
            figures.found.add(end)
            daemon.terminate()
        finally:
            if daemon.process is not None:
                daemon.kill()
    return figures


def main() -> int:
    """`kill_rounds [ROUNDS [SEED]]`: one line of figures; 0 if nothing was lost, doubled, wrong or slow."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of calls that a kill has cut off it would tell each
    figures = asyncio.run(_many(rounds, seed))
    print(f"{figures} (seed {seed})")
    return 0 if figures.found.good and figures.slowest_restart_s <= READY_S else 1


if __name__ == "__main__":
    sys.exit(main())
