"""What the native `runs.*` methods mean, over the socket (contract, section 7)."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from carserver.core.principals import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.peer import Peer, Refused, peer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("runs") / "state") as daemon:
        yield daemon


async def refused(client: Peer, method: str, params: Any) -> Refused:
    """The refusal of a call, after which the connection still answers."""
    with pytest.raises(Refused) as caught:
        await client.call(method, params)
    await client.call("server.ping")
    return caught.value


async def conflict(reason: str, client: Peer, method: str, params: Any) -> Refused:
    """The conflict that a call meets."""
    error = await refused(client, method, params)
    assert (error.error["code"], error.data["reason"]) == (-32011, reason)
    return error


async def get(client: Peer, run_id: str) -> dict[str, Any]:
    """The snapshot of a run."""
    run: dict[str, Any] = await client.call("runs.get", {"run_id": run_id})
    return run


async def events(client: Peer, run_id: str, **params: Any) -> dict[str, Any]:
    """A page of a log."""
    page: dict[str, Any] = await client.call("runs.events", {"run_id": run_id, **params})
    return page


def agent(daemon: Daemon, agent_id: str) -> str:
    """The token of an agent."""
    return agent_token(daemon.token("agent-key"), agent_id)


# Creating.


async def test_a_new_run_is_what_was_said_of_it(served: Daemon) -> None:
    said: dict[str, Any] = {
        "prompt": "fix it",
        "session_id": "s",
        "agent_id": "any/name",
        "parent_run_id": "run-that-nobody-checks",
        "outcome_description": "it works",
        "metadata": {"b": [1.50, None], "a": "é"},
    }
    before = time.time_ns() // 1_000_000
    async with peer(served) as client:
        run = await client.create(**said)
        assert {name: run[name] for name in said} == said
        assert set(run) - set(said) == {"id", "status", "created_at_ms", "updated_at_ms", "event_count", "epoch"}
        assert (run["status"], run["event_count"]) == ("created", 0)
        assert before <= run["created_at_ms"] == run["updated_at_ms"] <= time.time_ns() // 1_000_000
        assert await get(client, run["id"]) == run
        bare = await client.create("")
        assert (bare["session_id"], bare["agent_id"], "metadata" in bare) == ("", "", False)
        assert bare["id"] != run["id"]
        assert bare["epoch"] != run["epoch"]
        for run_id in (run["id"], bare["id"]):
            assert run_id.startswith("run-")
            assert run_id[18] == "4"  # the version of the UUID


async def test_metadata_is_kept_as_compact_json_with_its_own_literals(served: Daemon) -> None:
    given = '{ "n" :\n\t1.50e2, "big":12345678901234567890123, "e": "\\u00e9\\/ ", "z":-0.0 }'
    kept = '"metadata":{"n":1.50e2,"big":12345678901234567890123,"e":"\\u00e9\\/ ","z":-0.0},'
    async with peer(served) as client:
        await client.socket.send(
            f'{{"jsonrpc":"2.0","id":"c","method":"runs.create","params":{{"prompt":"","metadata":{given}}}}}'
        )
        answer = (await client.next_frame()).decode()
        assert kept in answer
        run_id = json.loads(answer)["result"]["id"]
        await client.socket.send(f'{{"jsonrpc":"2.0","id":"g","method":"runs.get","params":["{run_id}"]}}')
        assert kept in (await client.next_frame()).decode()


@pytest.mark.parametrize("metadata", [[], [1], "text", 1, True])
async def test_metadata_that_is_no_object_is_refused_and_null_is_none(metadata: Any, served: Daemon) -> None:
    async with peer(served) as client:
        error = await refused(client, "runs.create", {"prompt": "", "metadata": metadata})
        assert (error.type, error.data["path"]) == ("invalid_params", "metadata")
        assert "metadata" not in await client.create(metadata=None)


async def test_params_may_be_given_by_place_and_unknown_ones_are_ignored(served: Daemon) -> None:
    async with peer(served) as client:
        run = await client.call("runs.create", ["by place", "session", None, None, None, {"a": 1.5}])
        assert (run["prompt"], run["session_id"], run["metadata"]) == ("by place", "session", {"a": 1.5})
        assert (await client.call("runs.record", [run["id"], [{"type": "x", "n": 1}]]))["cursor"] == 1
        assert (await client.call("runs.get", [run["id"]]))["event_count"] == 1
        assert (await client.call("runs.events", [run["id"], 1]))["events"] == []
        error = await refused(client, "runs.get", [run["id"], "too many"])
        assert (error.type, error.data["path"]) == ("invalid_params", "")
        unknown = {"unknown": {"deep": [1]}}
        for method, params in (
            ("runs.create", {"prompt": ""}),
            ("runs.record", {"run_id": run["id"], "events": [{"type": "x"}]}),
            ("runs.get", {"run_id": run["id"]}),
            ("runs.list", {}),
            ("server.status", {}),
        ):
            await client.call(method, params | unknown)


@pytest.mark.parametrize(
    ("method", "params", "path"),
    [
        ("runs.create", {}, ""),
        ("runs.create", {"prompt": 1}, "prompt"),
        ("runs.create", {"prompt": "", "idempotency_key": ""}, "idempotency_key"),
        ("runs.get", {}, ""),
        ("runs.record", {"run_id": "R", "events": {}}, "events"),
        ("runs.record", {"run_id": "R", "events": [1]}, "events[0]"),
        ("runs.record", {"run_id": "R", "events": [{"type": "x"}, {}]}, "events[1]"),
        ("runs.record", {"run_id": "R", "events": [{"type": 1}]}, "events[0]"),
        ("runs.record", {"run_id": "R", "events": [{"type": "agent_end"}]}, "events[0]"),
        ("runs.record", {"run_id": "R", "events": [{"type": "error", "message": 1}]}, "events[0].message"),
        ("runs.record", {"run_id": "R", "events": [{"type": "x"}], "expected_sequence": -1}, "expected_sequence"),
        ("runs.record", {"run_id": "R", "events": [{"type": "x"}], "at_ms": [-1]}, "at_ms[0]"),
        ("runs.record", {"run_id": "R", "events": [{"type": "x"}], "at_ms": [1, 2]}, "at_ms"),
        ("runs.record", {"run_id": "R", "events": [{"type": "x"}], "at_ms": []}, "at_ms"),
        ("runs.events", {"run_id": "R", "after": -1}, "after"),
        ("runs.events", {"run_id": "R", "after": 1.5}, "after"),
        ("runs.events", {"run_id": "R", "after": 1}, "after"),
        ("runs.events", {"run_id": "R", "limit": 0}, "limit"),
        ("runs.events", {"run_id": "R", "types": []}, "types"),
        ("runs.events", {"run_id": "R", "types": [1]}, "types[0]"),
        ("runs.list", {"status": "sleeping"}, "status"),
        ("runs.list", {"limit": 0}, "limit"),
        ("runs.list", {"page": "zz"}, "page"),
        ("runs.list", {"page": "00"}, "page"),
        ("runs.list", {"page": ""}, "page"),
        ("runs.fail", {"run_id": "R"}, ""),
    ],
)
async def test_a_wrong_parameter_is_named_by_its_path(method: str, params: Any, path: str, served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        given = params | ({"run_id": run_id} if "run_id" in params else {})
        error = await refused(client, method, given)
        assert (error.error["code"], error.data) == (-32602, {"type": "invalid_params", "path": path})
        assert path in error.error["message"]
        assert await get(client, run_id) == await get(client, run_id)
        assert (await get(client, run_id))["event_count"] == 0


async def test_an_idempotency_key_gives_the_same_run_to_its_principal_and_across_a_restart(start: StartDaemon) -> None:
    daemon = start()
    params: dict[str, Any] = {
        "prompt": "p",
        "session_id": "s",
        "metadata": {"a": 1, "b": [2]},
        "idempotency_key": "key",
    }
    respaced = params | {"metadata": {"b": [2], "a": 1}}
    async with peer(daemon) as client, peer(daemon) as again, peer(daemon, agent(daemon, "a1")) as other:
        run = await client.create(**params)
        assert run["id"][18] == "5"
        assert await again.create(**params) == run
        await client.record(run["id"], {"type": "agent_start", "prompt": "x"})
        now = await get(client, run["id"])
        assert await again.create(**respaced) == now  # the run as it is, not as it was
        for change in ({"prompt": "q"}, {"metadata": {"a": 2}}, {"session_id": ""}, {"agent_id": "a"}):
            await conflict("key_reused", client, "runs.create", params | change)
        assert await get(client, run["id"]) == now
        theirs = await other.create(**params)
        assert theirs["id"] != run["id"]
        assert theirs["agent_id"] == "a1"
        assert (await other.create(**params))["id"] == theirs["id"]
    daemon.kill()
    daemon.start()
    async with peer(daemon) as client:
        assert (await client.create(**params))["id"] == run["id"]
        await conflict("key_reused", client, "runs.create", params | {"prompt": "q"})
        assert len((await client.call("runs.list"))["runs"]) == 1


async def test_an_agents_runs_carry_its_id_whatever_it_says(served: Daemon) -> None:
    async with peer(served, agent(served, "a 1.x")) as client:
        assert (await client.create())["agent_id"] == "a 1.x"
        assert (await client.create(agent_id="other"))["agent_id"] == "a 1.x"
    async with peer(served) as client:
        run = await client.create(agent_id="a 1.x")  # a client may claim any name
    async with peer(served, agent(served, "a 1.x")) as client:
        assert (await refused(client, "runs.get", {"run_id": run["id"]})).type == "not_found"  # which grants nothing


# Recording.


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_of_a_batch_with_a_wrong_event_none_is_recorded(place: int, served: Daemon) -> None:
    batch: list[Any] = [{"type": "x"}, {"type": "agent_end", "text": "t"}]
    batch.insert(place, {"no": "type"})
    async with peer(served) as client:
        run = await client.create()
        await client.call("runs.trace.subscribe", {"run_id": run["id"]})
        assert (await refused(client, "runs.record", {"run_id": run["id"], "events": batch})).type == "invalid_params"
        assert await get(client, run["id"]) == run
        await client.record(run["id"], {"type": "good"})
        kinds = [(await client.next("runs.trace.event"))["record"] for _ in range(2)]
        assert [kind["record"] for kind in kinds] == ["started", "event"]
        assert kinds[1]["event"] == {"type": "good"}


async def test_a_batch_id_makes_a_resend_harmless_and_is_looked_at_first(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        batch = {"run_id": run_id, "events": [{"type": "x", "n": 1}, {"type": "x", "n": 2}], "batch_id": "b1"}
        first = await client.call("runs.record", batch | {"expected_sequence": 0})
        assert first == {"run_id": run_id, "first_sequence": 0, "count": 2, "cursor": 2, "status": "created"}
        await client.record(run_id, {"type": "agent_start", "prompt": "p"}, batch_id="b2")
        await client.record(run_id, {"type": "agent_end", "text": "t"})
        # The first answer, status and all; before expected_sequence, which is wrong by now.
        assert await client.call("runs.record", batch | {"expected_sequence": 0}) == first
        assert await client.call("runs.record", batch | {"at_ms": [1, 2]}) == first
        for other in ([{"type": "x", "n": 1}], [*batch["events"], {"type": "x"}], [{"type": "x", "n": 2}] * 2):
            await conflict("batch_reused", client, "runs.record", batch | {"events": other, "expected_sequence": 9})
        assert (await get(client, run_id))["event_count"] == 4
        another = (await client.create())["id"]
        assert (await client.call("runs.record", batch | {"run_id": another}))["cursor"] == 2  # kept with its run


async def test_events_of_a_batch_are_compared_as_they_are_stored(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]

        async def record(event: str) -> dict[str, Any]:
            params = f'{{"run_id":"{run_id}","batch_id":"b","events":[{event}]}}'
            answer = await client.raw(f'{{"jsonrpc":"2.0","id":"r","method":"runs.record","params":{params}}}')
            return dict(answer)

        first = await record('{"type":"x","n":1}')
        assert await record('{"type":\n"x",\t"n":1}') == first  # the same bytes, once compacted
        assert (await record('{"type":"x", "n":1}'))["error"]["data"]["reason"] == "batch_reused"
        assert (await record('{"type":"x","n":1.0}'))["error"]["data"]["reason"] == "batch_reused"


async def test_a_single_writer_is_told_where_the_log_is(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        await client.record(run_id, {"type": "x"}, {"type": "x"}, expected_sequence=0)
        for wrong in (0, 1, 3):
            params = {"run_id": run_id, "events": [{"type": "x"}], "expected_sequence": wrong}
            assert (await conflict("sequence", client, "runs.record", params)).data["cursor"] == 2
        assert (await client.record(run_id, {"type": "x"}, expected_sequence=2))["cursor"] == 3


async def test_times_are_clamped_between_the_last_events_and_now(served: Daemon) -> None:
    async with peer(served) as client:
        run = await client.create()
        created = run["created_at_ms"]
        future = created + 10**9
        await client.record(run["id"], *[{"type": "x"}] * 4, at_ms=[0, created, future, created])
        await client.record(run["id"], *[{"type": "x"}] * 2, at_ms=[0, future])
        page = await events(client, run["id"])
        times = [entry["timestamp_ms"] for entry in page["events"]]
        now = (await client.call("server.ping"))["now_ms"]
        assert times[:2] == [created, created]
        assert times == sorted(times)
        assert created <= times[2] == times[3] == times[4] <= times[5] <= now


SPACED = [
    '{"type":"x","n":1.50e2,"big":12345678901234567890,"neg":-0.0}',
    '{ "type" : "x" , "a" : [ 1 , 2 ] }',
    '{"type":"x","e":"\\u00e9\\/\\ud83d\\ude00","é":"😀"}',
    '{"type":"x","dup":1,"dup":2}',
    '{"type":"x","text":"\\n\\t\\u0000"}',
]


async def test_events_keep_their_very_bytes_and_what_has_line_breaks_between_tokens_is_compacted_once(
    served: Daemon,
) -> None:
    broken = '{ "type" :\n"x",\r\n\t"n" : 1.50e2, "s": "a  b\\n" }'
    compacted = '{"type":"x","n":1.50e2,"s":"a  b\\n"}'
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        # What stands between the events is not theirs: it spoils none of them.
        given = " ,\n\t".join([*SPACED, broken])
        params = f'{{"run_id":"{run_id}",\n"events":[ {given} ]}}'
        answer = await client.raw(f'{{"jsonrpc":"2.0","id":"r","method":"runs.record","params":{params}}}')
        assert answer["result"]["count"] == len(SPACED) + 1
        await client.socket.send(f'{{"jsonrpc":"2.0","id":"e","method":"runs.events","params":["{run_id}"]}}')
        page = (await client.next_frame()).decode()
        times = json.loads(page)["result"]["events"][0]["timestamp_ms"]
        entries = [
            f'{{"sequence":{place},"timestamp_ms":{times},"event":{event}}}'
            for place, event in enumerate([*SPACED, compacted])
        ]
        assert f'"events":[{",".join(entries)}],"cursor":6' in page


# Reading.


async def test_pages_of_a_log_go_on_at_their_cursor_and_may_be_of_some_types(served: Daemon) -> None:
    async with peer(served) as client:
        run = await client.create()
        await client.record(run["id"], *[{"type": "ab"[n % 2], "n": n} for n in range(10)])
        page = await events(client, run["id"], limit=4)
        assert [entry["sequence"] for entry in page["events"]] == [0, 1, 2, 3]
        assert (page["cursor"], page["has_more"], page["epoch"]) == (4, True, run["epoch"])
        page = await events(client, run["id"], after=4)
        assert [entry["event"]["n"] for entry in page["events"]] == [4, 5, 6, 7, 8, 9]
        assert (page["cursor"], page["has_more"]) == (10, False)
        page = await events(client, run["id"], types=["b"], limit=2)
        assert [entry["event"]["n"] for entry in page["events"]] == [1, 3]
        assert (page["cursor"], page["has_more"]) == (4, True)
        page = await events(client, run["id"], types=["b"], after=9)
        assert ([entry["event"]["n"] for entry in page["events"]], page["has_more"]) == ([9], False)
        page = await events(client, run["id"], types=["none", "of these"])
        assert (page["events"], page["cursor"], page["has_more"]) == ([], 10, False)
        page = await events(client, run["id"], after=10)
        assert (page["events"], page["cursor"], page["has_more"]) == ([], 10, False)
        error = await refused(client, "runs.events", {"run_id": run["id"], "after": 11})
        assert (error.type, error.data["path"]) == ("invalid_params", "after")


async def test_events_arrive_for_a_reader_as_they_were_stored_by_another_principals_rules(served: Daemon) -> None:
    async with peer(served) as client, peer(served, "host-token") as host:
        run_id = (await client.create())["id"]
        await client.record(run_id, {"type": "x"})
        assert await events(host, run_id) == await events(client, run_id)


# Lists.


async def pages(client: Peer, **params: Any) -> list[list[str]]:
    """The prompts of all runs that a list gives, page by page."""
    found: list[list[str]] = []
    given: dict[str, Any] = params
    while True:
        answer = await client.call("runs.list", given)
        found.append([run["prompt"] for run in answer["runs"]])
        if answer["next_page"] is None:
            return found
        given = {"page": answer["next_page"], **({"limit": params["limit"]} if "limit" in params else {})}


async def test_runs_are_listed_newest_first_page_by_page_with_the_filters_of_the_first(served: Daemon) -> None:
    async with peer(served) as client:
        for n in range(10):
            await client.create(str(n), session_id="list", agent_id="even" if n % 2 == 0 else "odd")
        assert await pages(client, session_id="list") == [list("9876543210")]
        assert await pages(client, session_id="list", limit=4) == [list("9876"), list("5432"), list("10")]
        assert await pages(client, session_id="list", limit=5) == [list("98765"), list("43210")]
        assert await pages(client, session_id="list", agent_id="odd", limit=2) == [list("97"), list("53"), list("1")]
        assert await pages(client, session_id="list", agent_id="none") == [[]]


async def test_a_page_stands_still_while_runs_are_added(served: Daemon) -> None:
    async with peer(served) as client:
        for n in range(4):
            await client.create(str(n), session_id="still")
        first = await client.call("runs.list", {"session_id": "still", "limit": 2})
        await client.create("new", session_id="still")
        second = await client.call("runs.list", {"page": first["next_page"], "limit": 2})
        assert [run["prompt"] for run in first["runs"] + second["runs"]] == ["3", "2", "1", "0"]
        assert second["next_page"] is None


async def test_a_page_is_sent_alone_or_with_its_own_filters(served: Daemon) -> None:
    async with peer(served) as client:
        for n in range(3):
            await client.create(str(n), session_id="filters", agent_id="a")
        filters = {"session_id": "filters", "agent_id": "a"}
        page = (await client.call("runs.list", filters | {"limit": 1}))["next_page"]
        for given in ({}, filters):
            answer = await client.call("runs.list", given | {"page": page})
            assert [run["prompt"] for run in answer["runs"]] == ["1", "0"]
        for other in ({"session_id": "filters"}, filters | {"status": "created"}, {"agent_id": "b"}):
            error = await refused(client, "runs.list", other | {"page": page})
            assert (error.type, error.data["path"]) == ("invalid_params", "page")
        wrong = ["zz", page[:-2], page + "00", "{}", b'{"x":[[1]]}'.hex(), (b'{"x":' + b"[" * 100_000).hex()]
        wrong += [(b'{"created_at_ms":1,"no":%d,"filters":{}}' % 2**70).hex(), "é", "\n"]
        for text in wrong:
            error = await refused(client, "runs.list", {"page": text})
            assert (error.type, error.data["path"]) == ("invalid_params", "page")


async def test_every_filter_of_a_list_narrows_it(served: Daemon) -> None:
    async with peer(served) as client:
        runs = [
            await client.create("a", session_id="narrow", agent_id="x", parent_run_id="p"),
            await client.create("b", session_id="narrow", agent_id="y", parent_run_id="p"),
            await client.create("c", session_id="narrow", agent_id="y"),
        ]
        await client.call("runs.cancel", {"run_id": runs[1]["id"]})
        created = [run["created_at_ms"] for run in runs]

        async def listed(**filters: Any) -> str:
            (page,) = await pages(client, session_id="narrow", **filters)
            return "".join(sorted(page))

        assert await listed() == "abc"
        assert await listed(agent_id="y") == "bc"
        assert await listed(parent_run_id="p") == "ab"
        assert await listed(status="cancelled") == "b"
        assert await listed(agent_id="y", parent_run_id="p", status="cancelled") == "b"
        assert await listed(agent_id="x", status="cancelled") == ""
        # Both bounds are exclusive: created after, and created before.
        later = [run["prompt"] for run in runs if run["created_at_ms"] > created[0]]
        assert await listed(created_after_ms=created[0]) == "".join(later)
        assert await listed(created_after_ms=created[0] - 1) == "abc"
        assert await listed(created_before_ms=created[0]) == ""
        assert await listed(created_before_ms=created[2] + 1) == "abc"


async def test_a_list_has_ones_own_runs_and_the_hosts_has_all(served: Daemon) -> None:
    async with (
        peer(served) as client,
        peer(served, agent(served, "a")) as one,
        peer(served, agent(served, "b")) as other,
        peer(served, "host-token") as host,
    ):
        for who, prompt in ((client, "client"), (one, "a"), (other, "b"), (host, "host")):
            await who.create(prompt, session_id="owners", agent_id="a")
        for who, seen in ((client, ["client"]), (one, ["a"]), (other, ["b"]), (host, ["host", "b", "a", "client"])):
            assert await pages(who, session_id="owners") == [seen]
        assert await pages(client, agent_id="b") == [[]]
        # A page of the host's is no key to what others own.
        page = (await host.call("runs.list", {"session_id": "owners", "limit": 1}))["next_page"]
        answer = await client.call("runs.list", {"page": page})
        assert [run["prompt"] for run in answer["runs"]] == ["client"]
