"""Each limit of section 3 on what is said, just below and just above, with its real default where
that is cheap. A refusal names the limit, and nothing of what was refused is kept. Limits on who says how much at once
are in `test_limits_of_connections.py`.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.peer import Peer, Refused, peer
from tests.rawpeer import CLOSE, TEXT, frame, raw_peer

KIB, MIB = 1024, 1024 * 1024
E_ACUTE = "é"  # two bytes of UTF-8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("limits") / "state", "--methods", "tests.methods_for_tests") as daemon:
        yield daemon


async def over(limit: str, value: int, maximum: int, client: Peer, method: str, params: Any) -> Refused:
    """The call is refused for this limit, and the connection lives on."""
    with pytest.raises(Refused) as refused:
        await client.call(method, params)
    assert refused.value.error["code"] == -32012
    said = {"type": "limit_exceeded", "limit": limit, "value": value, "maximum": maximum}
    assert refused.value.data == said
    assert limit in refused.value.error["message"]
    await client.call("server.ping")
    return refused.value


async def count(client: Peer, run_id: str) -> int:
    """How many events a run has."""
    return int((await client.call("runs.get", {"run_id": run_id}))["event_count"])


async def runs_of(client: Peer, session_id: str) -> list[dict[str, Any]]:
    """The runs of a conversation."""
    runs: list[dict[str, Any]] = (await client.call("runs.list", {"session_id": session_id}))["runs"]
    return runs


def padded(size: int, members: str) -> str:
    """A request of exactly this many bytes."""
    head = f'{{"jsonrpc":"2.0","id":"padded",{members},"pad":"'
    return head + "x" * (size - len(head) - 2) + '"}'


# Messages.


@pytest.mark.parametrize("size", [64 * KIB - 1, 64 * KIB])
async def test_a_message_of_64_kib_is_taken_before_authentication(size: int, served: Daemon) -> None:
    async with peer(served, None) as client:
        params = json.dumps({"token": served.token()})
        answer = await client.raw(padded(size, f'"method":"session.auth","params":{params}'))
        assert answer["result"]["ok"]
        assert (await client.raw(padded(64 * KIB + 1, '"method":"server.ping"')))["result"]


async def test_a_message_one_byte_over_64_kib_closes_a_connection_that_is_not_authenticated(served: Daemon) -> None:
    async with peer(served, None) as client:
        await client.socket.send(padded(64 * KIB + 1, '"method":"session.auth"'))
        code, reason = await client.closed()
        assert (code, reason) == (1009, "message over message_bytes_before_auth (65536)")


async def test_the_larger_limit_holds_from_the_message_after_authentication_on_even_within_one_write(
    served: Daemon,
) -> None:
    async with raw_peer(served, None) as client:
        auth = {"jsonrpc": "2.0", "id": 1, "method": "session.auth", "params": {"token": served.token()}}
        large = padded(200 * KIB, '"method":"server.ping"')
        client.send(frame(TEXT, json.dumps(auth).encode()) + frame(TEXT, large.encode()))
        assert (await client.message())["result"]["ok"]
        assert (await client.message())["result"]["now_ms"]


async def test_a_message_of_16_mib_is_taken_and_one_byte_more_closes_the_connection(served: Daemon) -> None:
    async with raw_peer(served) as client:
        client.send_text(padded(16 * MIB, '"method":"server.ping"'))
        assert (await client.message())["result"]
        client.send_text(padded(16 * MIB + 1, '"method":"server.ping"'))
        closed = await client.frame()
        assert (closed.opcode, closed.code, closed.reason) == (CLOSE, 1009, "message over message_bytes (16777216)")


async def test_fragments_count_together_and_a_message_is_refused_before_all_of_it_came(served: Daemon) -> None:
    async with raw_peer(served, None) as client:
        client.send(frame(TEXT, b" " * (64 * KIB), fin=False))
        client.send(frame(0, b" ", fin=False))
        closed = await client.frame()
        assert (closed.code, closed.reason) == (1009, "message over message_bytes_before_auth (65536)")
    async with raw_peer(served, None) as client:
        client.send(frame(TEXT, b" " * (64 * KIB + 1))[:14])  # its head, and no more
        assert (await client.frame()).code == 1009


async def test_a_batch_of_64_is_run_and_of_one_of_65_nothing(served: Daemon) -> None:
    def batch(calls: int) -> str:
        params = {"prompt": "batch", "session_id": f"batch of {calls}"}
        call = {"jsonrpc": "2.0", "method": "runs.create", "params": params}
        return json.dumps([{**call, "id": f"b{n}"} for n in range(calls)])

    async with peer(served) as client:
        answers = await client.raw(batch(64))
        assert sorted(answer["id"] for answer in answers) == sorted(f"b{n}" for n in range(64))
        assert len({answer["result"]["id"] for answer in answers}) == 64
        refused = await client.raw(batch(65))
        assert refused["id"] is None
        assert refused["error"]["code"] == -32012
        data = {"type": "limit_exceeded", "limit": "batch_calls", "value": 65, "maximum": 64}
        assert refused["error"]["data"] == data
        assert len(await runs_of(client, "batch of 64")) == 64
        assert await runs_of(client, "batch of 65") == []


async def test_what_does_not_fit_the_frame_of_a_batch_is_refused_and_the_rest_answered(served: Daemon) -> None:
    sizes = [9 * MIB, 9 * MIB, 100, 5 * MIB]
    calls = [{"jsonrpc": "2.0", "id": f"b{n}", "method": "test.bytes", "params": [s]} for n, s in enumerate(sizes)]
    async with peer(served) as client:
        await client.socket.send(json.dumps(calls))
        reply = await client.next_frame()
        assert len(reply) <= 16 * MIB
        answers = {answer["id"]: answer for answer in json.loads(reply)}
        assert [len(answers[f"b{n}"].get("result", "")) for n in range(4)] == [9 * MIB - 2, 0, 98, 5 * MIB - 2]
        error = answers["b1"]["error"]
        assert (error["code"], error["data"]["limit"]) == (-32012, "frame_bytes")
        assert error["data"]["value"] > error["data"]["maximum"]


async def test_an_answer_of_exactly_a_frame_is_sent_and_one_byte_more_is_refused(start: StartDaemon) -> None:
    daemon = start("--methods", "tests.methods_for_tests", frame_bytes=10_000)
    envelope = len('{"jsonrpc":"2.0","id":1,"result":}')
    async with peer(daemon) as client:
        assert len(await client.call("test.bytes", [10_000 - envelope])) == 10_000 - envelope - 2
        await over("frame_bytes", 10_001, 10_000, client, "test.bytes", [10_001 - envelope])


# Values.


@pytest.mark.parametrize("innermost", ["0", ""])
async def test_events_and_metadata_nest_48_deep_and_no_deeper(innermost: str, served: Daemon) -> None:
    def text(depth: int) -> str:
        """`depth` brackets, the outermost an event's."""
        return f'{{"type":"x","v":{"[" * (depth - 1)}{innermost}{"]" * (depth - 1)}}}'

    def create(depth: int) -> str:
        params = f'{{"prompt":"","session_id":"nesting{innermost}","metadata":{text(depth)}}}'
        return f'{{"jsonrpc":"2.0","id":"c","method":"runs.create","params":{params}}}'

    def record(depth: int) -> str:
        params = f'{{"run_id":"{run_id}","events":[{{"type":"first"}},{text(depth)}]}}'
        return f'{{"jsonrpc":"2.0","id":"c","method":"runs.record","params":{params}}}'

    expected = {"type": "limit_exceeded", "limit": "value_nesting", "value": 49, "maximum": 48}
    async with peer(served) as client:
        run_id = (await client.raw(create(48)))["result"]["id"]
        assert (await client.raw(create(49)))["error"]["data"] == expected
        assert len(await runs_of(client, f"nesting{innermost}")) == 1
        assert (await client.raw(record(48)))["result"]["count"] == 2
        refused = await client.raw(record(49))
        assert refused["error"]["data"] == expected
        assert "events[1]" in refused["error"]["message"]
        assert await count(client, run_id) == 2


async def test_an_event_has_1_mib_and_no_more_counted_without_the_line_breaks_between_its_tokens(
    served: Daemon,
) -> None:
    def event(size: int) -> dict[str, str]:
        return {"type": "x", "text": "x" * (size - len('{"type": "x", "text": ""}'))}

    async with peer(served) as client:
        run_id = (await client.create())["id"]
        assert (await client.record(run_id, event(MIB)))["cursor"] == 1
        await over(
            "event_bytes",
            MIB + 1,
            MIB,
            client,
            "runs.record",
            {"run_id": run_id, "events": [{"type": "x"}, event(MIB + 1)]},
        )
        assert await count(client, run_id) == 1
        spread = json.dumps(event(MIB - 2), indent=1)  # longer than the limit as it comes
        assert len(spread) > MIB - 2
        params = f'{{"run_id":"{run_id}","events":[{spread}]}}'
        answer = await client.raw(f'{{"jsonrpc":"2.0","id":"r","method":"runs.record","params":{params}}}')
        assert answer["result"]["cursor"] == 2


@pytest.mark.parametrize("member", ["prompt", "outcome_description"])
async def test_the_texts_of_a_new_run_have_256_kib_of_utf8(member: str, served: Daemon) -> None:
    text = E_ACUTE * (128 * KIB)
    async with peer(served) as client:
        run = await client.create(**{member: text}, session_id=f"text {member}")
        assert run[member] == text
        for longer, size in ((text + "a", 256 * KIB + 1), ("😀" * (64 * KIB + 1), 256 * KIB + 4)):
            params = {"prompt": "", member: longer, "session_id": f"text {member}"}
            await over("text_bytes", size, 256 * KIB, client, "runs.create", params)
        assert len(await runs_of(client, f"text {member}")) == 1


@pytest.mark.parametrize(("method", "member"), [("runs.fail", "error"), ("runs.cancel", "reason")])
async def test_an_error_and_a_reason_have_256_kib_of_utf8(method: str, member: str, served: Daemon) -> None:
    text = E_ACUTE * (128 * KIB)
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        await over("text_bytes", 256 * KIB + 1, 256 * KIB, client, method, {"run_id": run_id, member: text + "a"})
        assert (await client.call("runs.get", {"run_id": run_id}))["status"] == "created"
        await client.call(method, {"run_id": run_id, member: text})
        run = await client.call("runs.get", {"run_id": run_id})
        assert run["error" if member == "error" else "cancel_reason"] == text


@pytest.mark.parametrize(
    ("type_", "member", "kept"),
    [("agent_end", "text", "result_text"), ("error", "message", "error"), ("agent_start", "prompt", "prompt")],
)
async def test_the_texts_that_a_run_keeps_of_its_events_have_256_kib_of_utf8(
    type_: str, member: str, kept: str, served: Daemon
) -> None:
    text = E_ACUTE * (128 * KIB)
    async with peer(served) as client:
        run_id = (await client.create(""))["id"]
        params = {"run_id": run_id, "events": [{"type": "x"}, {"type": type_, member: text + "a"}]}
        refused = await over("text_bytes", 256 * KIB + 1, 256 * KIB, client, "runs.record", params)
        assert f"events[1].{member}" in refused.error["message"]
        assert await count(client, run_id) == 0
        await client.record(run_id, {"type": type_, member: text})
        assert (await client.call("runs.get", {"run_id": run_id}))[kept] == text


async def test_metadata_has_64_kib(served: Daemon) -> None:
    def metadata(size: int) -> dict[str, str]:
        return {"m": "x" * (size - len('{"m":""}'))}  # compact, as it is kept

    async with peer(served) as client:
        assert (await client.create(session_id="metadata", metadata=metadata(64 * KIB)))["metadata"]
        params = {"prompt": "", "session_id": "metadata", "metadata": metadata(64 * KIB + 1)}
        await over("metadata_bytes", 64 * KIB + 1, 64 * KIB, client, "runs.create", params)
        assert len(await runs_of(client, "metadata")) == 1


NAMES = ["session_id", "agent_id", "parent_run_id", "idempotency_key", "batch_id", "type"]


async def use_name(client: Peer, run_id: str, place: str, name: str) -> None:
    """Gives a name where one is wanted."""
    if place == "batch_id":
        await client.record(run_id, {"type": "x"}, batch_id=name)
    elif place == "type":
        await client.record(run_id, {"type": name})
    else:
        await client.create(**{"session_id": "names", place: name})


@pytest.mark.parametrize("place", NAMES)
async def test_a_name_has_256_printable_characters(place: str, served: Daemon) -> None:
    where = "events[0].type" if place == "type" else place
    async with peer(served) as client:
        run_id = (await client.create(session_id=place))["id"]
        for name in ("n" * 256, E_ACUTE * 256, "😀" * 256, "a b/c:d.e@f-é"):
            await use_name(client, run_id, place, name)
        events = await count(client, run_id)
        runs = len((await client.call("runs.list", {"limit": 1_000}))["runs"])
        for name in ("n" * 257, E_ACUTE * 257):
            with pytest.raises(Refused) as refused:
                await use_name(client, run_id, place, name)
            data = {"type": "limit_exceeded", "limit": "name_chars", "value": 257, "maximum": 256}
            assert refused.value.data == data
            assert where in refused.value.error["message"]
        for name in ("a\nb", "\0", "\x1b[31m", "\x7f", "\u200b", "\u202e", "\ufeff", "\u2028", "\t"):
            with pytest.raises(Refused) as refused:
                await use_name(client, run_id, place, name)
            assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", where)
            assert name not in refused.value.error["message"]
        assert await count(client, run_id) == events
        assert len((await client.call("runs.list", {"limit": 1_000}))["runs"]) == runs


# Logs and pages.


async def test_one_call_records_1_to_1000_events(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        params = {"run_id": run_id, "events": [{"type": "x"}] * 1_001}
        await over("record_events", 1_001, 1_000, client, "runs.record", params)
        with pytest.raises(Refused) as refused:
            await client.record(run_id)
        assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", "events")
        assert await count(client, run_id) == 0
        assert (await client.record(run_id, *[{"type": "x"}] * 1_000))["count"] == 1_000


async def test_a_full_run_takes_no_event_more_not_even_a_part_of_what_comes(start: StartDaemon) -> None:
    async with peer(start(run_events=10)) as client:
        run_id = (await client.create())["id"]
        await client.record(run_id, *[{"type": "x"}] * 8, batch_id="first")
        params = {"run_id": run_id, "events": [{"type": "x"}] * 3}
        await over("run_events", 11, 10, client, "runs.record", params)
        assert await count(client, run_id) == 8
        assert (await client.record(run_id, *[{"type": "x"}] * 2))["cursor"] == 10
        await over("run_events", 11, 10, client, "runs.record", params | {"events": [{"type": "x"}]})
        # What is in it can be sent again, and it can be ended otherwise.
        assert (await client.record(run_id, *[{"type": "x"}] * 8, batch_id="first"))["cursor"] == 8
        assert (await client.call("runs.fail", {"run_id": run_id, "error": "full"}))["event_count"] == 10


async def test_a_page_has_1000_entries_and_asking_for_more_is_refused(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        for _ in range(2):
            await client.record(run_id, *[{"type": "x"}] * 501)
        await over("page_entries", 1_001, 1_000, client, "runs.events", {"run_id": run_id, "limit": 1_001})
        await over("page_entries", 1_001, 1_000, client, "runs.list", {"limit": 1_001})
        for params in ({}, {"limit": 1_000}):
            page = await client.call("runs.events", {"run_id": run_id, **params})
            assert (len(page["events"]), page["cursor"], page["has_more"]) == (1_000, 1_000, True)
        rest = await client.call("runs.events", {"run_id": run_id, "after": 1_000})
        assert (len(rest["events"]), rest["cursor"], rest["has_more"]) == (2, 1_002, False)


async def test_a_page_of_events_has_1_mib_or_one_event(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        sizes = [MIB, 600 * KIB, 400 * KIB, 300 * KIB]
        overhead = len('{"type": "x", "text": ""}')
        for size in sizes:
            await client.record(run_id, {"type": "x", "text": "x" * (size - overhead)})
        pages, after = [], 0
        while after < 4:
            page = await client.call("runs.events", {"run_id": run_id, "after": after})
            pages.append([entry["sequence"] for entry in page["events"]])
            after = page["cursor"]
            assert page["has_more"] is (after < 4)
        assert pages == [[0], [1, 2], [3]]


async def test_an_event_that_is_larger_than_a_page_is_a_page(start: StartDaemon) -> None:
    async with peer(start(page_bytes=1_000)) as client:
        run_id = (await client.create())["id"]
        await client.record(run_id, *[{"type": "x", "text": "x" * size} for size in (10, 2_000, 3_000, 10)])
        for after, sequences in ((0, [0]), (1, [1]), (2, [2]), (3, [3])):
            page = await client.call("runs.events", {"run_id": run_id, "after": after})
            assert [entry["sequence"] for entry in page["events"]] == sequences


async def test_a_page_of_runs_has_its_bytes_or_one_run(start: StartDaemon) -> None:
    async with peer(start(page_bytes=10_000)) as client:
        prompts = ["x" * size for size in (4_000, 5_000, 20_000, 3_000)]
        for prompt in prompts:
            await client.create(prompt)
        pages: list[list[str]] = []
        page: str | None = None
        while page is not None or not pages:
            answer = await client.call("runs.list", {} if page is None else {"page": page})
            pages.append([run["prompt"] for run in answer["runs"]])
            page = answer["next_page"]
        assert pages == [[prompts[3]], [prompts[2]], [prompts[1], prompts[0]]]


@pytest.mark.parametrize("settings", [{"scan_entries": 10}, {"scan_bytes": 150}])
async def test_a_call_that_filters_looks_at_so_many_entries_and_says_where_it_stands(
    settings: dict[str, int], start: StartDaemon
) -> None:
    async with peer(start(**settings)) as client:
        run_id = (await client.create())["id"]
        await client.record(run_id, *[{"type": "dull"}] * 24, {"type": "rare"})
        found, cursors, after, more = [], [], 0, True
        while more:
            page = await client.call("runs.events", {"run_id": run_id, "after": after, "types": ["rare"]})
            found += [entry["sequence"] for entry in page["events"]]
            cursors.append(page["cursor"])
            assert page["cursor"] > after
            after, more = page["cursor"], page["has_more"]
        assert found == [24]
        assert cursors == [10, 20, 25]
