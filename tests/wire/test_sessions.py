"""Who a connection acts as, and what one principal may not see of another (contract, section 5)."""

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from carserver.core.principals import agent_token
from carserver.methods.served import METHOD_MODULES
from carserver.rpc.method import Method, Table
from tests import methods_for_tests
from tests.conftest import StartDaemon
from tests.daemon import Daemon, NotStarted, running
from tests.peer import Peer, Refused, peer
from tests.rawpeer import CLOSE, call_frame, raw_peer

AGENT = "agent 7.b@c:d"
TABLE = Table.of([*METHOD_MODULES, methods_for_tests])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    state = tmp_path_factory.mktemp("sessions") / "state"
    with running(state, "--methods", "tests.methods_for_tests", wrong_token_s=0.01) as daemon:
        yield daemon


def agent(daemon: Daemon, agent_id: str = AGENT) -> str:
    """The token of an agent."""
    return agent_token(daemon.token("agent-key"), agent_id)


async def refused(client: Peer, method: str, params: Any = None) -> Refused:
    """The refusal of a call, after which the connection is still open."""
    with pytest.raises(Refused) as caught:
        await client.call(method, params)
    assert client.socket.close_code is None
    return caught.value


def proofs(daemon: Daemon) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """By name: params of `session.auth`, and who one is by them."""
    token, host, mine = daemon.token(), daemon.token("host-token"), agent(daemon)
    as_agent = {"role": "agent", "agent_id": AGENT}
    return {
        "auth token": ({"token": token}, {"role": "client"}),
        "auth token, agent id": ({"token": token, "agent_id": "who/ever é"}, {"role": "client"}),
        "agent token": ({"token": mine}, as_agent),
        "agent token, its id": ({"token": mine, "agent_id": AGENT}, as_agent),
        "host token": ({"host_token": host}, {"role": "host"}),
        "host token, agent id": ({"host_token": host, "agent_id": "whoever"}, {"role": "host"}),
    }


PROOFS = [
    "auth token",
    "auth token, agent id",
    "agent token",
    "agent token, its id",
    "host token",
    "host token, agent id",
]


def wrong_proofs(daemon: Daemon) -> list[dict[str, str]]:
    token, host, mine = daemon.token(), daemon.token("host-token"), agent(daemon)
    mac = mine.rpartition(".")[2]
    return [
        *({"token": wrong} for wrong in ("", "x", token + "x", token[:-1], token.upper() + "é", host, mac, f".{mac}")),
        *({"host_token": wrong} for wrong in ("", "x", token, mine, daemon.token("agent-key"))),
        {"token": mine, "agent_id": "another"},
        {"token": f"another.{mac}"},
        {"token": f"{AGENT}.{mac[:-1]}"},
        {"token": daemon.token("agent-key")},
    ]


# session.auth


@pytest.mark.parametrize("proof", PROOFS)
async def test_a_right_token_says_who_one_is_and_may_be_said_again(proof: str, served: Daemon) -> None:
    params, who = proofs(served)[proof]
    async with peer(served, None) as client:
        answer = await client.call("session.auth", params)
        assert answer.pop("client_id")
        assert answer == {"ok": True, "auth_enabled": True, **who}
        again = await client.call("session.auth", params)
        assert (await client.call("session.auth", params)) == again
        run = await client.create()
        assert run["agent_id"] == who.get("agent_id", "")
        for other, (theirs, they) in proofs(served).items():
            if they == who:
                assert await client.call("session.auth", theirs) == again
            else:
                assert (await refused(client, "session.auth", theirs)).error["code"] == -32003, other
        stranger = agent(served, "stranger")
        assert (await refused(client, "session.auth", {"token": stranger})).type == "forbidden"
        assert (await client.call("runs.get", {"run_id": run["id"]})) == run  # still who it was


async def test_two_connections_of_one_principal_have_names_of_their_own_and_the_same_runs(served: Daemon) -> None:
    async with peer(served) as one, peer(served) as other:
        params = {"token": served.token()}
        ids = {(await client.call("session.auth", params))["client_id"] for client in (one, other)}
        assert len(ids) == 2
        run = await one.create()
        assert await other.call("runs.get", {"run_id": run["id"]}) == run


async def test_a_wrong_token_is_told_and_the_socket_stays_open_for_a_right_one(served: Daemon) -> None:
    before = served.metrics()["wrong_tokens"]
    wrong = wrong_proofs(served)
    said = set()
    async with peer(served, None) as client:
        for params in wrong:
            error = await refused(client, "session.auth", params)
            assert (error.error["code"], error.data) == (-32001, {"type": "auth_failed"}), params
            assert "token mismatch" in error.error["message"]
            said.add(error.error["message"])
        assert len(said) == 1  # the same words, whatever was wrong: nothing of what was given is in them
        assert (await client.call("session.auth", {"token": served.token()}))["role"] == "client"
        assert (await refused(client, "session.auth", wrong[1])).type == "auth_failed"
        assert await client.call("server.ping")  # it has not lost who it was
    assert served.metrics()["wrong_tokens"] == before + len(wrong) + 1


async def test_a_wrong_token_waits_a_second_and_a_right_one_does_not(daemon: Daemon) -> None:
    async with raw_peer(daemon, None) as client:
        began = time.monotonic()
        calls = [("wrong", {"token": "wrong"}), ("right", {"token": daemon.token()})]
        frames = [call_frame(id_, "session.auth", params) for id_, params in calls]
        client.send(b"".join([*frames, call_frame("ping", "server.ping")]))
        answers = [await client.message() for _ in range(3)]
        assert [answer["id"] for answer in answers] == ["right", "ping", "wrong"]
        assert ["result" in answer for answer in answers] == [True, True, False]
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    "params", [{}, {"token": "a", "host_token": "b"}, {"token": 1}, {"agent_id": "a"}, {"token": None}, []]
)
async def test_an_authentication_that_names_no_token_or_two_is_refused_at_once(params: Any, served: Daemon) -> None:
    async with peer(served, None) as client:
        assert (await refused(client, "session.auth", params)).type == "invalid_params"
        assert (await client.call("session.auth", {"host_token": None, "token": served.token()}))["ok"]


# Before it.


@pytest.mark.parametrize("method", ["server.ping", "rpc.discover", "runs.create", "no.such.method"])
async def test_a_call_before_authentication_is_answered_and_the_connection_closed(method: str, served: Daemon) -> None:
    async with raw_peer(served, None) as client:
        client.send_call(7, method, {"prompt": "before", "session_id": "before"})
        answer = await client.message()
        assert (answer["id"], answer["error"]["code"]) == (7, -32001)
        assert answer["error"]["data"] == {"type": "auth_required"}
        closed = await client.frame()
        assert (closed.opcode, closed.code) == (CLOSE, 1008)
        assert "session.auth" in closed.reason
    async with peer(served, "host-token") as host:
        assert (await host.call("runs.list", {"session_id": "before"}))["runs"] == []


async def test_a_batch_before_authentication_is_answered_whole_and_then_closed(served: Daemon) -> None:
    calls = [{"jsonrpc": "2.0", "id": n, "method": "server.ping"} for n in range(3)]
    async with raw_peer(served, None) as client:
        client.send_text(json.dumps([*calls, 1]))
        answers = await client.message()
        assert [answer["id"] for answer in answers] == [0, 1, 2, None]
        assert [answer["error"]["code"] for answer in answers] == [-32001] * 3 + [-32600]
        assert (await client.frame()).code == 1008


async def test_a_notification_before_authentication_only_closes(served: Daemon) -> None:
    async with raw_peer(served, None) as client:
        client.send_text('{"jsonrpc":"2.0","method":"server.ping"}')
        assert (await client.frame()).code == 1008


async def test_authentication_and_calls_may_come_in_one_batch(served: Daemon) -> None:
    auth = {"jsonrpc": "2.0", "id": 1, "method": "session.auth", "params": [served.token()]}
    async with peer(served, None) as client:
        answers = await client.raw(json.dumps([auth, {"jsonrpc": "2.0", "id": 2, "method": "server.ping"}]))
        assert [answer["id"] for answer in answers if "result" in answer] == [1, 2]


async def test_what_cannot_be_read_before_authentication_is_answered_as_after_it(served: Daemon) -> None:
    async with peer(served, None) as client:
        assert (await client.raw("{"))["error"]["code"] == -32700
        assert (await client.raw("[]"))["error"]["code"] == -32600
        assert (await client.call("session.auth", {"token": served.token()}))["ok"]


# On the upgrade.


@pytest.mark.parametrize("proof", ["auth token", "agent token", "host token"])
async def test_a_bearer_token_on_the_upgrade_says_who_one_is(proof: str, served: Daemon) -> None:
    params, who = proofs(served)[proof]
    (token,) = params.values()
    async with peer(served, token) as client:
        assert (await client.create())["agent_id"] == who.get("agent_id", "")
        answer = await client.call("session.auth", params)
        assert {name: answer[name] for name in who} == who
        other = {"host_token": served.token("host-token")} if who["role"] != "host" else {"token": served.token()}
        assert (await refused(client, "session.auth", other)).type == "forbidden"


async def test_a_wrong_bearer_token_is_refused_before_the_upgrade_and_counted(served: Daemon) -> None:
    before = served.metrics()["wrong_tokens"]
    wrong = ["x", served.token() + "x", served.token("agent-key"), f"another.{agent(served).rpartition('.')[2]}"]
    for token in wrong:
        with pytest.raises(InvalidStatus) as error:
            async with peer(served, token):
                pass
        response = error.value.response
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert token not in (response.body or b"").decode().split()
    assert served.metrics()["wrong_tokens"] == before + len(wrong)


# Without authentication.


async def test_without_authentication_everyone_is_host_and_owns_everything(start: StartDaemon) -> None:
    daemon = start("--no-auth")
    async with peer(daemon, None) as one, peer(daemon, "not-even-a-token") as other:
        run = await one.create()
        await other.record(run["id"], {"type": "agent_end", "text": "t"})
        for params in ({}, None, {"token": "x"}, {"host_token": "x"}, {"token": "x", "agent_id": "a"}):
            answer = await other.call("session.auth", params)
            assert answer.pop("client_id")
            assert answer == {"ok": True, "auth_enabled": False, "role": "host"}
        assert [found["id"] for found in (await other.call("runs.list"))["runs"]] == [run["id"]]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_authentication_only_this_machine_is_listened_to(host: str, start: StartDaemon) -> None:
    with pytest.raises(NotStarted) as error:
        start("--no-auth", "--host", host)
    assert "exit 2:" in str(error.value)
    assert host in str(error.value)


# What is not yours. Generated from the table, so that a new method is looked at from its first day.

OF_A_RUN = [entry for entry in TABLE.all().values() if "run_id" in (entry.fields or ())]
TOLD = {"runs.record_turns", "runs.record_model_turn", "runs.get_trace"}  # the CAR client is told in the result
QUIET = {"runs.trace.unsubscribe", "runs.unsubscribe"}  # where there is nothing to end there is no error
HOST_ONLY = [entry for entry in TABLE.all().values() if entry.role == "host"]


def by_name(entries: list[Method]) -> list[Any]:
    assert entries
    return [pytest.param(entry, id=f"{entry.dialect} {entry.name}".strip()) for entry in entries]


async def answer_to(client: Peer, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, with `RUN` in place of the run's id and nothing of its own id."""
    answer = await client.request({"method": method, "params": params})
    text = json.dumps({name: value for name, value in answer.items() if name != "id"})
    return dict(json.loads(text.replace(params["run_id"], "RUN")))


@pytest.mark.parametrize("entry", by_name(OF_A_RUN))
async def test_what_is_not_yours_answers_as_what_does_not_exist(entry: Method, served: Daemon) -> None:
    async with (
        peer(served) as owner,
        peer(served, agent(served)) as stranger,
        peer(served, agent(served, "twin")) as twin,
    ):
        if entry.dialect:
            for client in (stranger, twin):
                await client.call("server.handshake", {"protocol_version": 3})
        live = await owner.create(idempotency_key=f"of a run {entry.dialect} {entry.name}")
        over = await owner.create()
        for run in (live, over):
            await owner.record(run["id"], {"type": "x"}, {"type": "x"}, batch_id="first")
        await owner.call("runs.cancel", {"run_id": over["id"]})
        await owner.next("runs.cancelled")
        before = [await owner.call("runs.get", {"run_id": run["id"]}) for run in (live, over)]
        # Beside the example, what would tell of the run if it were looked at first.
        variants: list[dict[str, Any]] = [{}]
        variants += [{"after": 1}, {"after": 9}] if entry.name == "runs.events" else []
        variants += [{"batch_id": "first"}, {"expected_sequence": 2}] if entry.name == "runs.record" else []
        variants += [{"cursor": 2, "epoch": live["epoch"]}] if entry.name == "runs.trace.subscribe" else []
        for client in (stranger, twin):
            for variant in variants:
                params = {**entry.example.params, **variant}
                missing = await answer_to(client, entry.name, params | {"run_id": "run-that-never-was"})
                for run in (live, over):
                    assert await answer_to(client, entry.name, params | {"run_id": run["id"]}) == missing
                if "error" in missing:
                    assert missing["error"]["code"] == -32010
                elif entry.name in TOLD:
                    assert re.search('"dropped": "run_not_found"|"not_found": true', json.dumps(missing))
                else:
                    assert entry.name in QUIET
        after = [await owner.call("runs.get", {"run_id": run["id"]}) for run in (live, over)]
        assert after == before
        assert owner.pushed.empty()
        assert stranger.pushed.empty()


@pytest.mark.parametrize("entry", by_name(HOST_ONLY))
async def test_what_is_for_the_host_is_forbidden_to_others(entry: Method, served: Daemon) -> None:
    for token in (served.token(), agent(served)):
        async with peer(served, token) as client:
            error = await refused(client, entry.name, entry.example.params if entry.params else None)
            assert (error.error["code"], error.data) == (-32003, {"type": "forbidden"})
    async with peer(served, "host-token") as host:
        await host.call("test.host_only")


async def test_the_pages_that_need_no_token_tell_of_nobody(served: Daemon) -> None:
    async with peer(served) as client:
        run = await client.create(session_id="a-secret-session", agent_id="a-secret-agent")
        await client.call("runs.trace.subscribe", {"run_id": run["id"]})
        for path in ("/metrics", "/openrpc.json", "/healthz", "/readyz"):
            body = await asyncio.to_thread(page, served, path)
            for word in (run["id"], run["epoch"], "a-secret", served.token(), served.token("host-token")):
                assert word not in body


def page(daemon: Daemon, path: str) -> str:
    """The body of a page."""
    with urllib.request.urlopen(daemon.http + path, timeout=10) as answer:
        return str(answer.read().decode())
