"""The dispatcher in process: a real daemon's parts without its socket, and a session whose frames the test takes."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from carserver.config import Settings
from carserver.core.outbox import Outbox
from carserver.core.principals import CLIENT, Principal, Secrets
from carserver.daemon import Authority, Daemon
from carserver.front.handshake import policy_of
from carserver.methods.served import METHOD_MODULES
from carserver.protocol.closing import Close
from carserver.rpc.method import Table
from carserver.rpc.session import Session
from tests import methods_for_tests

SECRETS = Secrets(auth_token="a" * 64, host_token="b" * 64, agent_key="c" * 64)


class Connection:
    """What a session is connected to here; implements `rpc.session.Transport`."""

    def __init__(self) -> None:
        self.ended: tuple[Close, str] | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    def end(self, code: Close, reason: str) -> None:
        """Remembers the first end."""
        self.ended = self.ended or (code, reason)

    def authenticated(self) -> None:
        """Nothing hangs on it here."""

    def progressed(self) -> None:
        """Reading never pauses here."""

    def give_turn(self) -> None:
        """There is nobody else here."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Goes on with a request that waits."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Rig:
    """A daemon's dispatcher and one session."""

    def __init__(self, daemon: Daemon, principal: Principal | None) -> None:
        self.daemon = daemon
        self.connection = Connection()
        self.outbox = Outbox(lambda payload: payload, 2**30, lambda: None)
        services = daemon.front.services
        self.session = Session("test", self.outbox, self.connection, services, principal)

    async def receive(self, message: bytes) -> list[bytes]:
        """What a message is answered, when all of it is done; without what is pushed."""
        self.daemon.front.dispatcher.receive(self.session, message)
        while self.connection.tasks:
            await asyncio.wait(self.connection.tasks)
        frames = []
        while self.outbox.size:
            frames.append(self.outbox.take(1))
        return [frame for frame in frames if not frame.startswith(b'{"jsonrpc":"2.0","method"')]


@contextlib.contextmanager
def rigged(folder: Path, principal: Principal | None = CLIENT, **settings: Any) -> Iterator[tuple[Rig, asyncio.Runner]]:
    """A rig and the loop that it lives on."""
    table = Table.of([*METHOD_MODULES, methods_for_tests])
    with asyncio.Runner() as runner:

        async def build() -> Rig:
            chosen = Settings(durability="memory", **settings)
            authority = Authority(SECRETS)
            policy = policy_of(chosen, authority.principal_of)
            daemon = Daemon(chosen, authority, policy, folder / "rig.db", table)
            return Rig(daemon, principal)

        rig = runner.run(build())
        try:
            yield rig, runner
        finally:
            rig.session.close()
            runner.run(rig.daemon.store.close(5))
