"""Which tools there are: whose they are, what they may be called, how many and how large they may be."""

import json
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.core import toolbox as module
from carserver.core.execution import Call, Execution, Feed
from carserver.core.toolbox import Toolbox, define
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.tools import GivenTool, ToolList


class Host:
    """One that is never asked; as empty as a session's that runs nothing."""

    def __len__(self) -> int:
        return 0

    def refuses(self, call: Call, *, admitted: bool = False) -> RpcError | None:
        return None

    def start(self, call: Call, feed: Feed) -> Execution:
        raise AssertionError


ONE, OTHER, FILE = Host(), Host(), Host()


def given(*tools: Any) -> list[GivenTool]:
    """As the method decodes them, but for the name, which what the tools file declares has not passed through."""
    made = []
    for tool in tools:
        members = {"name": tool} if isinstance(tool, str) else tool
        decoded = msgspec.json.decode(json.dumps({**members, "name": "x"}), type=GivenTool)
        made.append(msgspec.structs.replace(decoded, name=members["name"]))
    return made


def register(box: Toolbox, host: Host, *tools: Any) -> int:
    return box.register(host, [box.define(tool, place) for place, tool in enumerate(given(*tools))])


def refused(box: Toolbox, host: Host, *tools: Any) -> RpcError:
    before, size = box.list(), box.size
    with pytest.raises(RpcError) as caught:
        register(box, host, *tools)
    assert (box.list(), box.size) == (before, size)  # all or none
    return caught.value


def declare(box: Toolbox, name: str) -> None:
    box.declare(define(GivenTool(name=name), "process", Settings(), "tools.x"), FILE, 50)


def listed(box: Toolbox) -> list[str]:
    tools = msgspec.json.decode(box.list(), type=ToolList)
    assert tools.count == len(tools.tools) == len(box)
    return [tool.name for tool in tools.tools]


def test_tools_are_listed_by_name_with_what_they_left_out() -> None:
    box = Toolbox(Settings())
    full = {
        "name": "b",
        "description": "d",
        "parameters": {"type": "object", "required": ["x"]},
        "returns": {"type": "string"},
        "idempotent": True,
        "source": "ignored",
    }
    assert register(box, ONE, full, "c") == 2
    declare(box, "a")
    assert json.loads(box.list()) == {
        "tools": [
            {"name": "a", "source": "process", "description": "", "parameters": {}, "idempotent": False},
            {**full, "source": "client"},
            {"name": "c", "source": "client", "description": "", "parameters": {}, "idempotent": False},
        ],
        "count": 3,
    }


def test_nothing_is_an_empty_list_and_an_empty_array_registers_nothing() -> None:
    box = Toolbox(Settings())
    assert register(box, ONE) == 0
    assert json.loads(box.list()) == {"tools": [], "count": 0}


def test_a_tool_is_found_with_whose_it_is() -> None:
    box = Toolbox(Settings())
    register(box, ONE, {"name": "a", "parameters": {"required": ["x"]}})
    declare(box, "b")
    hosted, declared = box.find("a"), box.find("b")
    assert hosted is not None
    assert declared is not None
    assert (hosted.host, hosted.hosting, hosted.timeout_ms, hosted.tool.source) == (ONE, ONE, None, "client")
    assert (declared.host, declared.hosting, declared.timeout_ms, declared.tool.source) == (FILE, None, 50, "process")
    with pytest.raises(RpcError, match=r"parameters\.x: it is missing"):
        hosted.arguments.check(b"{}")
    assert box.find("c") is None


def test_ones_own_tool_is_replaced_and_counts_once() -> None:
    box = Toolbox(Settings(hosted_tools=2, tools_bytes=300))
    register(box, ONE, {"name": "a", "description": "x" * 100}, "b")
    replaced = box.find("a")
    for _ in range(5):
        assert register(box, ONE, {"name": "a", "description": "y" * 100}) == 1
    assert listed(box) == ["a", "b"]
    now = box.find("a")
    assert now is not None
    assert now.tool.description[0] == "y"
    assert replaced is not None
    assert replaced.tool.description[0] == "x"  # who holds it goes on with it


def test_a_name_of_somebody_else_is_a_conflict_for_all_of_the_array() -> None:
    box = Toolbox(Settings())
    register(box, ONE, "a")
    declare(box, "f")
    for name, whose in (("a", "another session hosts"), ("f", "the tools file declares")):
        error = refused(box, OTHER, "b", name)
        assert error.kind is ErrorKind.CONFLICT
        assert error.data == {"reason": "name_taken", "path": "[1].name"}
        assert error.message == f"[1].name: {whose} a tool {name!r} already"


def test_a_name_is_free_again_when_its_session_hosts_no_more() -> None:
    box = Toolbox(Settings())
    register(box, ONE, "a", "b")
    register(box, OTHER, "c")
    box.drop(ONE)
    box.drop(ONE)
    assert listed(box) == ["c"]
    assert register(box, OTHER, "a", "b") == 2
    box.drop(OTHER)
    assert (listed(box), box.size) == ([], 0)


def test_ones_own_tools_alone_are_unregistered() -> None:
    box = Toolbox(Settings())
    register(box, ONE, "a", "b")
    declare(box, "f")
    assert [box.unregister(host, name) for host, name in ((OTHER, "a"), (ONE, "f"), (ONE, "x"), (None, "f"))] == [0] * 4
    assert box.unregister(ONE, "a") == 1
    assert box.unregister(ONE, "a") == 0
    assert listed(box) == ["b", "f"]
    assert register(box, OTHER, "a") == 1
    assert box.unregister(ONE, "b") == 1
    box.drop(ONE)
    assert listed(box) == ["a", "f"]


def test_a_name_twice_in_an_array_is_refused_with_its_place() -> None:
    error = refused(Toolbox(Settings()), ONE, "a", "b", "c", "a")
    assert error.kind is ErrorKind.INVALID_PARAMS
    assert error.data == {"path": "[3].name"}


DEFINITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no name": ({"name": ""}, {"path": "[1].name"}),
    "a control character": ({"name": "a\n"}, {"path": "[1].name"}),
    "a long name": ({"name": "x" * 257}, {"limit": "name_chars", "value": 257, "maximum": 256}),
    "parameters that are no schema": ({"name": "a", "parameters": 3}, {"path": "[1].parameters"}),
    "null for a schema": ({"name": "a", "parameters": None}, {"path": "[1].parameters"}),
    "what it returns is no schema": ({"name": "a", "returns": "x"}, {"path": "[1].returns"}),
    "a schema that is wrong within": (
        {"name": "a", "parameters": {"properties": {"x": {"type": 7}}}},
        {"path": "[1].parameters.properties.x.type"},
    ),
    "a large one": (
        {"name": "a", "description": "x" * 65_536},
        {"limit": "tool_bytes", "value": 65_618, "maximum": 65_536},
    ),
}


@pytest.mark.parametrize(("tool", "data"), DEFINITIONS.values(), ids=DEFINITIONS.keys())
def test_a_definition_is_refused_with_its_place(tool: dict[str, Any], data: dict[str, Any]) -> None:
    assert refused(Toolbox(Settings()), ONE, "b", tool).data == data


def test_what_nests_too_deep_is_no_schema_here() -> None:
    deep: Any = {}
    for _ in range(48):
        deep = {"not": deep}
    assert refused(Toolbox(Settings()), ONE, {"name": "a", "returns": deep}).data["limit"] == "value_nesting"


def test_a_session_hosts_so_many_and_all_sessions_so_many_bytes() -> None:
    box = Toolbox(Settings(hosted_tools=2))
    register(box, ONE, "a")
    assert refused(box, ONE, "b", "c").data == {"limit": "hosted_tools", "value": 3, "maximum": 2}
    assert register(box, ONE, "b") == 1
    assert register(box, OTHER, "c", "d") == 2
    size = box.size
    full = Toolbox(Settings(tools_bytes=size))
    register(full, ONE, "a", "b")
    register(full, OTHER, "c", "d")
    assert refused(full, OTHER, "e").data["limit"] == "tools_bytes"
    full.drop(ONE)
    assert register(full, OTHER, "e") == 1


def test_what_patterns_take_is_bounded_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATTERN_BYTES", 4_096)
    box = Toolbox(Settings())
    tools = [{"name": name, "parameters": {"properties": {"x": {"pattern": f"^{name}+$"}}}} for name in "abcdefgh"]
    assert refused(box, ONE, *tools).data["limit"] == "pattern_bytes"
    for _ in range(10):  # what goes is given back
        box.drop(ONE)
        assert register(box, ONE, tools[0]) == 1


def test_a_definition_keeps_no_other_bytes_alive() -> None:
    message = Raw(b'{"type": "object"}' + b" " * 100_000)
    tool = define(GivenTool(name="a", parameters=message, returns=UNSET), "client", Settings(), "[0]").tool
    assert bytes(tool.parameters) == b'{"type":"object"}'


def for_itself(box: Toolbox, host: Host, *tools: Any) -> int:
    definitions = [box.define(tool, place) for place, tool in enumerate(given(*tools))]
    return box.register(host, definitions, for_itself=True)


def hosts_of(box: Toolbox, name: str, *sessions: Host | None) -> list[Any]:
    """Who runs the tool of this name for each of these sessions."""
    return [entry and entry.host for entry in (box.find(name, session) for session in sessions)]


def test_what_a_session_hosts_for_itself_is_its_own_and_everyone_elses_is_the_first() -> None:
    box = Toolbox(Settings())
    declare(box, "f")
    assert for_itself(box, ONE, "finish", "f") == 2
    assert for_itself(box, OTHER, "finish") == 1
    assert hosts_of(box, "finish", ONE, OTHER, None) == [ONE, OTHER, ONE]
    assert hosts_of(box, "f", ONE, OTHER, None) == [ONE, FILE, FILE]
    names = [tool["name"] for tool in json.loads(box.list())["tools"]]
    assert names == ["f", "finish"]
    sources = {tool["name"]: tool["source"] for tool in json.loads(box.car_list(ONE))["tools"]}
    assert sources == {"f": "user_defined", "finish": "user_defined"}
    assert [tool["name"] for tool in json.loads(box.car_list(None))["tools"]] == ["f"]
    stranger = Host()
    found = box.find("finish", stranger, for_itself=True), box.find("f", stranger, for_itself=True)
    assert (found[0], found[1] and found[1].host) == (None, FILE)  # one of that kind that has none gets no other's
    assert refused(box, Host(), "finish").data["reason"] == "name_taken"  # one that is to be the only one


def test_when_the_first_of_a_name_goes_the_next_takes_its_place() -> None:
    box = Toolbox(Settings())
    size = box.size
    for_itself(box, ONE, "finish")
    for_itself(box, OTHER, {"name": "finish", "description": "of the other"})
    for_itself(box, ONE, {"name": "finish", "description": "again"})
    assert hosts_of(box, "finish", ONE, OTHER, None) == [ONE, OTHER, ONE]
    assert box.unregister(ONE, "finish") == 1
    assert box.unregister(ONE, "finish") == 0
    assert hosts_of(box, "finish", ONE, OTHER, None) == [OTHER, OTHER, OTHER]
    box.drop(OTHER)
    assert hosts_of(box, "finish", ONE, OTHER, None) == [None, None, None]
    assert (len(box), box.size) == (0, size)
    assert register(box, ONE, "finish") == 1
