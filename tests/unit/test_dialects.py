"""Methods by name and dialect, and what is said to who calls one that there is not."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from carserver.core.principals import CLIENT, HOST, Principal
from carserver.methods.served import METHOD_MODULES
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.method import Table, method
from carserver.rpc.openrpc import document
from carserver.rpc.session import Session
from carserver.rpc.unknown import UnknownMethod, hint
from tests.openrpc import validate
from tests.rig import Rig, rigged


@method("both")
def native_twin(session: Session) -> str:
    """Is there in both."""
    return "native"


@method("both", dialect="car")
def twin(session: Session) -> str:
    """Is there in both."""
    return "car"


@method("native.alone")
def native_alone(session: Session) -> str:
    """Is there natively."""
    return "native"


@method("dialect.alone", dialect="car")
def alone(session: Session) -> str:
    """Is there in the dialect."""
    return "car"


@method("dialect.host", dialect="car", role="host")
def of_the_host(session: Session) -> None:
    """Is for the host."""


METHODS: list[Any] = [twin, native_twin, native_alone, alone, of_the_host]


def table() -> Table:
    return Table(function.method for function in METHODS)


def found(name: str, dialect: str) -> Any:
    entry = table().find(name, dialect)
    return entry and entry.call


@pytest.mark.parametrize(
    ("name", "natively", "in_the_dialect"),
    [
        ("both", native_twin, twin),
        ("native.alone", native_alone, native_alone),
        ("dialect.alone", alone, alone),
        ("neither", None, None),
    ],
)
def test_a_connection_finds_its_dialects_own_method_then_the_native_one_then_what_is_in_a_dialect_alone(
    name: str, natively: Any, in_the_dialect: Any
) -> None:
    assert found(name, "") is natively
    assert found(name, "car") is in_the_dialect
    assert set(table().spoken("")) == set(table().spoken("car")) == {function.method.name for function in METHODS}


def test_a_name_may_stand_in_two_dialects_but_not_twice_in_one() -> None:
    assert len(table().all()) == len(METHODS)
    with pytest.raises(TypeError, match="'both' is declared twice"):
        Table([twin.method, twin.method])  # type: ignore[attr-defined]


def test_the_document_has_the_dialects_methods_in_a_part_of_their_own() -> None:
    whole = json.loads(json.dumps(document(table(), "1")))
    validate(whole)
    assert [entry["name"] for entry in whole["methods"]] == ["both", "native.alone"]
    assert [(entry["name"], entry["x-role"]) for entry in whole["x-car"]] == [
        ("both", "authenticated"),
        ("dialect.alone", "authenticated"),
        ("dialect.host", "host"),
    ]


# What is said of a method that there is not.

NAMES = [entry.name for entry in Table.of(METHOD_MODULES).all().values()]


def test_a_name_that_is_nearly_right_is_answered_the_nearest_ones() -> None:
    assert hint("runs.creat", NAMES, "x").startswith("the nearest: runs.create; x lists all; ")
    assert hint("tools.regsiter", NAMES, "x").startswith("the nearest: tools.register")


def test_an_area_that_there_is_is_answered_all_of_its_methods() -> None:
    words = hint("outputs.nonsense", NAMES, "x")
    assert words.startswith(
        "there are, of outputs.*: outputs.append, outputs.get, outputs.latest, outputs.list, outputs.read; x lists all;"
    )


@pytest.mark.parametrize("name", ["memory.recall", "nonsense", "", ".", "runs", "policy.register"])
def test_all_else_is_answered_the_areas_that_there_are_and_how_others_are_added(name: str) -> None:
    words = hint(name, NAMES, "x")
    assert words.startswith("there are: ")
    assert " outputs.*, " in words
    assert words.endswith("; x lists all; a module of methods adds others (carserver serve --methods MODULE)")


def test_a_hint_is_short_however_many_methods_there_are_and_says_how_many_it_leaves_out() -> None:
    many = [f"runs.method_number_{number}" for number in range(1_000)]
    words = hint("runs.x", many, "x")
    assert len(words) < 1024
    shown = words.count("runs.method_number_")
    assert f" and {1_000 - shown} more; " in words


@pytest.mark.parametrize(
    "name",
    [
        "runs.create" * 100_000,
        "aeiorstu" * 16,
        "runs." + "s" * 123,
        "\x1b[2J",
        "runs.crea\nte",
        "\u202eruns",
        "é" * 128,
    ],
)
def test_a_hostile_name_is_neither_shown_nor_dear(name: str) -> None:
    begun = time.thread_time()
    error, *_ = [UnknownMethod(name).with_hint(NAMES, "car") for _ in range(64)]
    assert time.thread_time() - begun < 5.0, "it is meant to take a hundredth of that"
    assert error.data == {"hint": error.message.partition("; ")[2]}
    assert error.message.isprintable()
    assert len(error.message) < 1024


# Over the dispatcher.


def answers(tmp_path: Path, principal: Principal | None, dialect: str, *calls: dict[str, Any]) -> list[Any]:
    """What the methods above answer to a session that speaks this."""
    tmp_path.mkdir(exist_ok=True)
    with rigged(tmp_path, principal) as (rig, runner):
        rig.session.dialect = dialect
        rig.daemon.front.dispatcher = Dispatcher(table(), rig.daemon.front.services)
        return [json.loads(frame) for call in calls for frame in runner.run(received(rig, call))]


async def received(rig: Rig, call: dict[str, Any]) -> list[bytes]:
    return await rig.receive(json.dumps({"jsonrpc": "2.0", "id": 1, **call}).encode())


def test_a_sessions_dialect_decides_what_a_name_means(tmp_path: Path) -> None:
    call = {"method": "both"}
    assert [answer["result"] for answer in answers(tmp_path / "a", CLIENT, "", call)] == ["native"]
    assert [answer["result"] for answer in answers(tmp_path / "b", CLIENT, "car", call)] == ["car"]


def test_null_params_are_as_good_as_none_in_the_dialect_and_no_request_without(tmp_path: Path) -> None:
    call = {"method": "native.alone", "params": None}
    assert [answer["result"] for answer in answers(tmp_path / "a", CLIENT, "car", call)] == ["native"]
    assert [answer["error"]["code"] for answer in answers(tmp_path / "b", CLIENT, "", call)] == [-32600]


def test_an_unknown_method_is_not_found_with_the_hint_in_the_words_and_beside_them(tmp_path: Path) -> None:
    (answer,) = answers(tmp_path, CLIENT, "car", {"method": "agents.register_basics", "params": None})
    error = answer["error"]
    assert error["code"] == -32601
    assert error["data"] == {"type": "method_not_found", "hint": error["message"].partition("; ")[2]}
    assert error["message"].startswith(
        "no method 'agents.register_basics'; there are: dialect.*, native.*; capabilities."
    )


def test_who_is_nobody_yet_is_told_nothing_of_what_there_is(tmp_path: Path) -> None:
    (answer,) = answers(tmp_path, None, "", {"method": "both.of"})
    assert answer["error"]["data"] == {"type": "auth_required"}


def test_a_method_of_the_dialect_for_the_host_is_for_the_host(tmp_path: Path) -> None:
    call = {"method": "dialect.host"}
    assert [answer["error"]["code"] for answer in answers(tmp_path / "a", CLIENT, "car", call)] == [-32003]
    assert [answer["result"] for answer in answers(tmp_path / "b", HOST, "car", call)] == [None]
