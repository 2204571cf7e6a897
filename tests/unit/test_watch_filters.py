"""What `runs.watch` means by its filters is what `runs.list` finds with them."""

import itertools
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from carserver.core.commands import Cancel, Fail
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.watch import matches
from carserver.protocol.runs import ListRuns, RunFilters, Status
from tests.unit.storing import NOW_MS, create, event, opened

OWNERS = [CLIENT, HOST, Principal("agent", "a")]
MEMBERS: dict[str, list[Any]] = {
    "session_id": ["", "s", "S", "é"],
    "agent_id": ["", "a"],
    "parent_run_id": [None, "p"],
    "now_ms": [NOW_MS - 1, NOW_MS, NOW_MS + 1],
}
FILTERS: dict[str, list[Any]] = {
    "session_id": [None, "", "s", "é", "none"],
    "agent_id": [None, "", "a"],
    "parent_run_id": [None, "", "p"],
    "status": [None, Status.CREATED, Status.EXECUTING, Status.CANCELLED],
    "created_after_ms": [None, NOW_MS - 1, NOW_MS],
    "created_before_ms": [None, NOW_MS, 0],
}


async def test_a_run_matches_where_a_list_with_these_filters_has_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.db", durability="memory") as store:
        for n, values in enumerate(itertools.product(*MEMBERS.values())):
            run_id, owner = f"run-{n}", OWNERS[n // 3 % len(OWNERS)]
            await store.submit(create(run_id, owner=owner, **dict(zip(MEMBERS, values, strict=True))))
            if n % 5 == 1:
                await store.append(run_id, event(0, type_="tool_start"), by=owner)
            elif n % 5 == 2:
                await store.submit(Cancel(run_id=run_id, principal=HOST, now_ms=NOW_MS + 2, reason=""))
            elif n % 5 == 3:
                await store.submit(Fail(run_id=run_id, principal=owner, now_ms=NOW_MS + 2, error=""))
        heads = await store.store.list(None, ListRuns(), None, 1_000)
        assert len(heads) == 48
        found_some = 0
        for n, values in enumerate(itertools.product(*FILTERS.values())):
            filters = RunFilters(**dict(zip(FILTERS, values, strict=True)))
            principal = OWNERS[n // 9 % len(OWNERS)]
            owner_name = None if principal is HOST else principal.name
            listed = await store.store.list(owner_name, ListRuns(**asdict(filters)), None, 1_000)
            watched = [head for head in heads if principal.sees(head.owner) and matches(filters, head.run)]
            assert [head.run.id for head in listed] == [head.run.id for head in watched], (principal, filters)
            found_some += bool(listed)
        assert found_some > 200


def test_every_filter_of_list_is_one_of_watch() -> None:
    assert set(RunFilters.__struct_fields__) | {"limit", "page"} == set(ListRuns.__struct_fields__)
