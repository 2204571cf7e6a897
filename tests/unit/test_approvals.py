"""Approvals: who resolves them, what is kept of them, and that they are durable before anybody is told."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from carserver.core.approvals import Approvals
from carserver.core.hostboard import GONE, Seat
from carserver.core.hostintake import approval
from carserver.core.ports import Damaged
from carserver.core.principals import HOST, Principal
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.host import AskApproval
from carserver.stores.inspection import inspect
from carserver.stores.salvage import Salvage
from carserver.stores.schema import DamagedFile, open_reader
from tests.unit.boarding import World
from tests.unit.storing import NOW_MS, Opened, opened, other_connection, write_lock

AGENT = Principal("agent", "a")
OTHER = Principal("agent", "b")
Asked = dict[str, Any]


class Office:
    """Approvals in a store of their own."""

    def __init__(self, store: Opened, world: World) -> None:
        self.store = store
        self.world = world
        found = store.store.found_approvals
        self.approvals = Approvals(store.store, world.board, world.settings, world.counters, found)
        store.store.on_commit(self.approvals.committed)
        self.seat = Seat("one")
        self.asked = 0

    async def ask(self, by: Principal = AGENT, seat: Seat | None = None, **params: Any) -> str:
        """The id of a new approval."""
        self.asked += 1
        name, now_ms = f"{self.store.path.stem}-{self.asked}", NOW_MS + self.asked
        asked = approval(AskApproval(**({"action": "do"} | params)), name, "t", self.world.settings)
        made = json.loads(await self.approvals.request(asked, seat or self.seat, by, now_ms))
        assert made["status"] == "pending"
        return name

    async def resolve(
        self, name: str, by: Principal = AGENT, seat: Seat | None = None, *, word: str = "approve", at_ms: int = 0
    ) -> Asked:
        """The approval, resolved."""
        given = self.seat if seat is None else seat
        answer = await self.approvals.resolve(name, word, given, by, NOW_MS + 1_000 + at_ms)
        resolved: Asked = json.loads(answer)
        return resolved

    async def refused(self, name: str, by: Principal = AGENT, seat: Seat | None = None, **more: Any) -> RpcError:
        """Why it cannot be resolved; nothing is told of it."""
        before = self.world.board.sequence
        with pytest.raises(RpcError) as caught:
            await self.resolve(name, by, seat, **more)
        assert self.world.board.sequence == before
        return caught.value

    @property
    def pending(self) -> list[str]:
        """The ids of those that wait."""
        return [asked["id"] for asked in json.loads(self.approvals.list_pending())]

    @property
    def all(self) -> list[str]:
        """The ids of all that are kept."""
        return [asked["id"] for asked in json.loads(self.approvals.list_all())]


@contextlib.asynccontextmanager
async def office(path: Path, **settings: Any) -> AsyncIterator[Office]:
    async with opened(path, **settings) as store:
        yield Office(store, World(**settings))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


# Who resolves.


async def test_while_it_lives_the_session_that_requested_one_resolves_it_then_its_principal(path: Path) -> None:
    async with office(path) as here:
        name = await here.ask()
        assert (await here.refused(name, seat=Seat("other"))).kind is ErrorKind.FORBIDDEN  # of the same principal
        assert (await here.refused(name, OTHER, Seat("other"))).kind is ErrorKind.FORBIDDEN
        here.world.board.leave(here.seat, GONE)
        assert (await here.refused(name, OTHER, Seat("other"))).kind is ErrorKind.FORBIDDEN
        resolved = await here.resolve(name, seat=Seat("other"))
        assert (resolved["status"], resolved["resolution"], resolved["resolved_by"]) == (
            "resolved",
            "approve",
            "agent:a",
        )


async def test_the_session_itself_resolves_what_it_requested(path: Path) -> None:
    async with office(path) as here:
        assert (await here.resolve(await here.ask(), word="deny"))["resolution"] == "deny"


async def test_the_host_resolves_any_and_everybody_one_of_the_system(path: Path) -> None:
    async with office(path) as here:
        first, second = await here.ask(), await here.ask(system_level=True)
        assert (await here.resolve(first, HOST, Seat("host")))["resolved_by"] == "host"
        assert (await here.resolve(second, OTHER, Seat("other")))["resolved_by"] == "agent:b"


async def test_an_unknown_one_is_not_found(path: Path) -> None:
    async with office(path) as here:
        await here.ask()
        assert (await here.refused("unknown")).kind is ErrorKind.NOT_FOUND


# What resolves.


async def test_the_resolution_is_one_of_the_words_that_were_given(path: Path) -> None:
    async with office(path) as here:
        plain = await here.ask()
        assert "'approve', 'deny'" in (await here.refused(plain, word="yes")).message
        words = await here.ask(options=Raw(b'["yes", "no"]'))
        assert (await here.refused(words, word="approve")).kind is ErrorKind.INVALID_PARAMS
        assert (await here.resolve(words, word="no"))["options"] == ["yes", "no"]
        for options in (b'{"a": 1}', b"[]", b'["x", 1]'):
            assert (await here.resolve(await here.ask(options=Raw(options)), word="anything"))["status"] == "resolved"


async def test_the_same_resolution_again_is_answered_again_and_another_is_a_conflict(path: Path) -> None:
    async with office(path) as here:
        name = await here.ask()
        first = await here.resolve(name)
        before = here.world.board.sequence
        assert await here.resolve(name, HOST, Seat("host"), at_ms=5) == first
        assert here.world.board.sequence == before
        error = await here.refused(name, word="deny")
        assert (error.kind, error.data) == (ErrorKind.CONFLICT, {"reason": "resolved", "resolution": "approve"})
        assert (await here.refused(name, OTHER, Seat("other"))).kind is ErrorKind.FORBIDDEN
        counters = here.world.counters
        assert (counters.approvals_requested, counters.approvals_resolved) == (1, 1)


async def test_of_two_who_resolve_at_once_one_does(path: Path) -> None:
    async with office(path) as here:
        name = await here.ask()
        both = await asyncio.gather(
            here.resolve(name), here.resolve(name, HOST, Seat("host"), word="deny"), return_exceptions=True
        )
        assert sum(isinstance(result, RpcError) for result in both) == 1
        assert [event["kind"] for event in here.world.events] == ["approval.requested", "approval.resolved"]


# What is kept, and told.


async def test_nothing_is_told_before_it_is_durable(path: Path) -> None:
    async with office(path) as here:
        with write_lock(path):
            asking = asyncio.create_task(here.ask(agent_id="x"))
            while not here.store.store.status().waiting_commands:  # noqa: ASYNC110 - it is at the writer's next
                await asyncio.sleep(0)
            with other_connection(path) as connection:
                assert connection.execute("SELECT count(*) FROM approvals").fetchone() == (0,)
            assert (here.pending, here.world.board.sequence) == ([], 0)
        name = await asking
        (told,) = here.world.events
        assert (told["kind"], told["agent_id"], told["message"]) == ("approval.requested", "x", "do")
        assert told["payload"]["id"] == name
        await here.resolve(name)
        told = here.world.events[-1]
        assert (told["kind"], told["message"]) == ("approval.resolved", "approve: do")
        assert told["payload"] == json.loads(here.approvals.list_all())[0]


async def test_where_storage_fails_nothing_is_told_and_nothing_pending(path: Path) -> None:
    async with office(path, probe_s=0.01) as here:
        name = await here.ask()
        here.store.writing.execute("PRAGMA query_only = 1")
        with pytest.raises(RpcError) as caught:
            await here.ask()
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert (await here.refused(name)).kind is ErrorKind.UNAVAILABLE
        assert (here.pending, here.world.board.sequence) == ([name], 1)


async def test_they_survive_a_restart_in_their_order_and_then_their_principal_resolves_them(path: Path) -> None:
    async with office(path) as here:
        names = [await here.ask() for _ in range(3)]
        await here.resolve(names[1])
        before = json.loads(here.approvals.list_all())
    async with office(path) as here:
        assert json.loads(here.approvals.list_all()) == before
        assert (here.pending, here.approvals.resolved) == ([names[0], names[2]], 1)
        assert here.world.board.sequence == 0
        assert (await here.refused(names[0], OTHER)).kind is ErrorKind.FORBIDDEN
        await here.resolve(names[0])
        assert (await here.refused(names[1], word="deny")).data["reason"] == "resolved"
    inspect(path, 2**30, thorough=True)


async def test_no_more_are_pending_than_may_be_by_number_and_by_bytes(path: Path) -> None:
    async with office(path, approvals=2) as here:
        name = await here.ask()
        await here.ask()
        with pytest.raises(RpcError) as caught:
            await here.ask()
        assert caught.value.data == {"limit": "approvals", "value": 3, "maximum": 2}
        await here.resolve(name)
        await here.ask()
    async with office(path.with_name("other.db"), approvals_bytes=500) as here:
        await here.ask()
        with pytest.raises(RpcError) as caught:
            await here.ask(details=Raw(b'"%b"' % (b"x" * 400)))
        assert caught.value.data["limit"] == "approvals_bytes"


@pytest.mark.parametrize("settings", [{"approvals": 3}, {"approvals_bytes": 1_000}])
async def test_of_those_resolved_the_newest_are_kept_for_the_next_daemon_too(path: Path, settings: Any) -> None:
    async with office(path, **settings) as here:
        names = []
        for turn in range(8):
            names.append(await here.ask())
            await here.resolve(names[-1], at_ms=turn)
        kept = here.all
        assert kept == names[-len(kept) :]
        assert len(kept) == 3 if "approvals" in settings else 3 < len(kept) < 8
        waiting = await here.ask()
    async with office(path, **settings) as here:
        assert here.all == [*kept, waiting]
        assert (await here.refused(names[0])).kind is ErrorKind.NOT_FOUND


async def test_the_one_that_was_just_resolved_is_kept_though_the_clock_went_back(path: Path) -> None:
    async with office(path, approvals=1) as here:
        first, second = await here.ask(), None
        await here.resolve(first, at_ms=1_000_000)
        second = await here.ask()
        await here.resolve(second, at_ms=0)
        assert here.all == [second]
        assert (await here.resolve(second))["resolution"] == "approve"


# Damage.


@pytest.mark.parametrize("damage", ["id = 'x'", "owner = 'host'", "approval = x'7b7d'", "created_at_ms = 1"])
async def test_a_damaged_row_is_said_and_looked_at_by_the_next_start(path: Path, damage: str) -> None:
    async with office(path) as here:
        name = await here.ask()
        with other_connection(path) as connection:
            connection.execute(f"UPDATE approvals SET {damage}")
        assert isinstance(await here.refused(name), Damaged)
        assert here.store.store.damage.count == 1
    with pytest.raises(DamagedFile, match="approvals"):
        inspect(path, 2**30, thorough=False)


async def test_a_damaged_one_does_not_go_as_an_old_one(path: Path) -> None:
    async with office(path, approvals=1) as here:
        broken = await here.ask()
        await here.resolve(broken)
        with other_connection(path) as connection:
            connection.execute("UPDATE approvals SET owner = 'host'")
        name = await here.ask()
        await here.resolve(name, at_ms=1)
        assert here.all == [broken, name]


async def test_of_a_damaged_file_the_sound_ones_are_carried_over(path: Path, tmp_path: Path) -> None:
    async with office(path) as here:
        names = [await here.ask() for _ in range(5)]
        await here.resolve(names[1])
        with other_connection(path) as connection:
            connection.execute("UPDATE approvals SET owner = 'host' WHERE id = ?", (names[3],))
    salvage = Salvage(path)
    salvage.into(tmp_path / "new.db")
    with contextlib.closing(open_reader(tmp_path / "new.db")) as connection:
        carried = {name for (name,) in connection.execute("SELECT id FROM approvals")}
    assert carried == {*names} - {names[3]}
