"""A world for `runs.watch` without sockets, threads or time: the real core, and clients that keep a picture.

`World` owns what is true; a `Client` makes of what it is sent the picture that the docstring of `runs.watch` promises,
and sees that each frame may come when it comes. Everything that a daemon does by itself is a call here.
"""

import json
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from carserver.config import Settings
from carserver.core.commands import Command, Create
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, Stored
from carserver.core.outbox import Outbox
from carserver.core.ports import Committed, Done
from carserver.core.principals import HOST, Principal
from carserver.core.runs import Head
from carserver.core.runstore import RunStore
from carserver.core.watch import Watch
from carserver.protocol.codec import encode
from carserver.protocol.errors import RpcError
from carserver.protocol.runs import RunFilters, Snapshot, Status
from tests.property.world import Clock, FakeLog, framed

PEERS = 3
LARGEST = 3_500  # bytes of a frame


class NoEdit(Edit, frozen=True):
    """What an edit is to the loop."""

    def edit(self, stored: Stored) -> Edited:
        raise AssertionError("it is committed already")


class Question(NamedTuple):
    """What a client wants to know of."""

    principal: Principal
    filters: RunFilters

    def means(self, head: Head) -> bool:
        return self.principal.sees(head.owner) and self.means_shown(shown(head.run))

    def means_shown(self, run: dict[str, Any]) -> bool:
        return self.filters.session_id in (None, run["session_id"]) and self.filters.status in (None, run["status"])


class Client:
    """One peer: what it was told, and the picture that it makes of it, as the docstring of `runs.watch` says."""

    def __init__(self, limit: int) -> None:
        self.woken = False
        self.outbox = Outbox(framed, limit, self._wake)
        self.buffer = b""
        self.watch: Watch | None = None
        self.questions: list[Question] = []
        self.reading: Question | None = None  # to which frames belong, from the answer to the end of it
        self.told: dict[str, int] = {}  # by run and epoch: when the newest that it was told of was made
        self.picture: dict[str, dict[str, Any]] = {}
        self.lists = 0  # that it has asked for
        self.asked: dict[int, set[str]] = {}  # by list under way: what `runs.changed` has told of since

    def _wake(self) -> None:
        self.woken = True


class Asked(NamedTuple):
    """A list on its way: `found` once a thread has looked."""

    client: Client
    number: int
    question: Question
    found: list[dict[str, Any]] | None = None


class World:
    """The daemon's core, and what is true."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counters = Counters()
        self.clock = Clock(settings)
        self.store = RunStore(FakeLog(), self.clock, settings, self.counters)
        self.watchers = self.store.watchers
        self.heads: dict[str, Head] = {}
        self.unpublished: deque[list[Committed | Done]] = deque()
        self.pending: list[tuple[Client, Watch]] = []
        self.lists: list[Asked] = []
        self.clients = [Client(settings.outbox_bytes) for _ in range(PEERS)]
        self.deleted = 0

    # The writer.

    def commit(self, commands: Sequence[Command | str]) -> None:
        """One transaction; a string is a run to delete."""
        changes: list[Committed | Done] = []
        for command in commands:
            if isinstance(command, str):
                head = self.heads.get(command)
                if head is not None and not head.live:
                    del self.heads[command]
                    self.deleted += 1
                    changes.append(Done(NoEdit(principal=HOST), Edited(None, deleted=[head])))
                continue
            before = self.heads.get(command.run_id)
            try:
                applied = command.apply(before, None)
            except RpcError:
                continue
            self.heads[command.run_id] = applied.head
            changes.append(Committed(command, applied, None, before))
        self.unpublished.append(changes)

    def publish(self) -> None:
        self.store.committed(self.unpublished.popleft())

    def create(self, run: int, owner: Principal, session_id: str, prompt: str) -> Create:
        now_ms = self.clock.now_ms()
        snapshot = Snapshot(
            id=f"run-{run}",
            session_id=session_id,
            agent_id="",
            status=Status.CREATED,
            prompt=prompt,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            event_count=0,
            epoch=f"epoch-{now_ms}",
        )
        head = Head(no=1, owner=owner.name, run=snapshot, revision=1, endings=0, last_at_ms=now_ms)
        return Create(run_id=snapshot.id, principal=owner, now_ms=now_ms, head=head)

    # Requests.

    def watch(self, client: Client, principal: Principal, filters: RunFilters) -> None:
        self.unwatch(client)
        client.questions.append(Question(principal, filters))
        client.watch = self.watchers.watch(client.outbox, principal, filters)
        self.pending.append((client, client.watch))

    def answer(self) -> None:
        client, watch = self.pending.pop(0)
        if watch is client.watch:
            client.outbox.send(b'{"watching":%d}' % (len(client.questions) - 1))
        self.watchers.activate(watch)

    def unwatch(self, client: Client) -> None:
        if client.watch is not None:
            self.watchers.drop(client.watch)
            client.watch = None
            client.outbox.send(b'{"watching":null}')

    def disconnect(self, client: Client) -> None:
        if client.watch is not None:
            self.watchers.drop(client.watch)
        client.outbox.discard()
        self.pending = [waiting for waiting in self.pending if waiting[0] is not client]
        self.lists = [asked for asked in self.lists if asked.client is not client]
        self.clients[self.clients.index(client)] = Client(self.settings.outbox_bytes)

    def look(self, place: int) -> None:
        """A thread reads a list, as it is committed now, published or not."""
        asked = self.lists[place]
        self.lists[place] = asked._replace(found=list(self.truth(asked.question).values()))

    def tell(self, place: int) -> None:
        """A list's answer is queued."""
        if self.lists[place].found is None:
            self.look(place)
        client, number, _, found = self.lists.pop(place)
        client.outbox.send(json.dumps({"list": number, "found": found}).encode())

    def truth(self, question: Question) -> dict[str, dict[str, Any]]:
        """What the picture should be."""
        return {run_id: shown(head.run) for run_id, head in self.heads.items() if question.means(head)}

    # The sockets, and what clients make of it.

    def drain(self, client: Client, size: int) -> None:
        if not client.woken:
            return
        taken = client.outbox.take(size)
        client.woken = bool(client.outbox.size)
        *lines, client.buffer = (client.buffer + taken).split(b"\n")
        for line in lines:
            self._receive(client, json.loads(line))

    def _receive(self, client: Client, message: dict[str, Any]) -> None:
        if "watching" in message:
            client.told.clear()
            client.asked.clear()
            client.reading = None
            if message["watching"] is not None:
                client.reading = client.questions[message["watching"]]
                self._ask(client)
        elif "list" in message:
            if message["list"] in client.asked:
                self._listed(client, client.asked.pop(message["list"]), message["found"])
        elif message["method"] == "runs.watch.reset":
            assert client.reading, "told before the answer, or after the end"
            assert message["params"]["reason"]
            self._ask(client)
        else:
            assert message["method"] == "runs.changed"
            assert client.reading, "told before the answer, or after the end"
            self._changed(client, client.reading, message["params"]["run"])

    def _ask(self, client: Client) -> None:
        """For a list; the answer to an earlier one that is under way is not wanted any more."""
        client.asked = {client.lists: set()}
        assert client.reading
        self.lists.append(Asked(client, client.lists, client.reading))
        client.lists += 1

    def _listed(self, client: Client, told: set[str], found: list[dict[str, Any]]) -> None:
        newer = {run_id: run for run_id, run in client.picture.items() if run_id in told}
        client.picture = {run["id"]: run for run in found if run["id"] not in told} | newer

    def _changed(self, client: Client, question: Question, run: dict[str, Any]) -> None:
        key = run["id"] + run["epoch"]
        assert run["updated_at_ms"] > client.told.get(key, 0), "older after newer, or twice"
        client.told[key] = run["updated_at_ms"]
        assert question.principal is HOST or run["prompt"].startswith(question.principal.name), "not visible"
        assert question.filters.session_id in (None, run["session_id"]), "never meant"
        for told in client.asked.values():
            told.add(run["id"])
        if question.means_shown(run):
            client.picture[run["id"]] = run
        else:
            client.picture.pop(run["id"], None)

    # The end.

    def come_to_rest(self) -> None:
        for _ in range(10_000):
            if self.pending:
                self.answer()
            elif self.unpublished:
                self.publish()
            elif woken := [client for client in self.clients if client.woken]:
                for client in woken:
                    self.drain(client, 1)
            elif self.lists:
                self.tell(0)
            else:
                return
        raise AssertionError("it never comes to rest")

    def check_rest(self) -> None:
        for client in self.clients:
            assert client.outbox.size == 0
            if client.watch is not None:
                assert client.picture == self.truth(client.questions[-1])
                assert (client.watch.waiting, client.watch._bytes) == (0, 0)
        assert len(self.watchers) == sum(client.watch is not None for client in self.clients)

    def check_bounds(self) -> None:
        for client in self.clients:
            if client.watch is not None:
                pieces = [len(frames) for frames, sender, _ in client.outbox._queue if sender is client.watch]
                assert len(pieces) <= 1
                assert sum(pieces) <= self.settings.watch_piece_bytes + LARGEST
                assert client.watch.waiting <= self.settings.watch_runs
                assert client.watch.waiting <= 1 or client.watch._bytes <= self.settings.watch_bytes
                assert client.watch._bytes == sum(change.head.size for change in client.watch._queue.values())


def shown(run: Snapshot) -> dict[str, Any]:
    """As it is on the wire."""
    sent: dict[str, Any] = json.loads(encode(run))
    return sent
