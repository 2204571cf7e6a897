"""Arguments of process tools, over the wire: each arrives as one element of the argument list, as it is; no shell sees
any; and what breaks the tool's schema is refused, with its place, before anything starts.
"""

import asyncio
import json
import string
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.daemon import Daemon, running
from tests.peer import Peer, Refused, peer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tools need Linux")

EXAMPLES = 60
TOGETHER = 6  # tools at once
TABLE = """
[tools.show]
command = ["printf", "%s\\\\0", "{text}", "<{value}|{text}>", "{{text}", "{absent}", "{value}"]
cwd = "empty"

[tools.show.parameters]
type = "object"
required = ["text"]
properties = { text = { type = "string" }, value = {}, absent = {} }

[tools.strict]
command = ["touch", "{text}"]
cwd = "empty"

[tools.strict.parameters]
type = "object"
required = ["text"]
additionalProperties = false

[tools.strict.parameters.properties]
text = { type = "string", maxLength = 9, pattern = "^[a-z]*$" }
number = { type = "integer", minimum = 0, maximum = 9 }
list = { type = "array", maxItems = 3, items = { enum = [1, "a", false] } }
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("arguments")
    (folder / "empty").mkdir()
    (folder / "tools.toml").write_text(TABLE)
    with running(folder / "state", "--tools", str(folder / "tools.toml")) as one:
        yield one


def talk(daemon: Daemon, work: Callable[[Peer], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), peer(daemon) as caller:
            await work(caller)

    asyncio.run(main())


def nothing_started(daemon: Daemon, before: dict[str, float]) -> None:
    after = daemon.metrics()
    for name in ("handles_started", "tool_processes_started"):
        assert after[name] == before[name]


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEMPTING = [
    *("", " ", "-", "--", "-rf", "*", "~", "$HOME", "$(touch a)", "`touch a`", ";touch a", "|touch a", "&touch a&"),
    *(">a", "a b", "a\nb", "'", '"', "\\", "\\0", "{text}", "{value}", "{{", "{", "}", "%s", "\x7f\x1b[2J"),
    *("\u2028", "\U0010ffff"),
]
texts = st.one_of(st.sampled_from(TEMPTING), st.text(characters, max_size=40))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)


def wanted(text: str, value: Any) -> list[str]:
    """The elements that they become."""
    if value is None:
        return [text, "{text}"]
    shown = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return [text, f"<{shown}|{text}>", "{text}", shown]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(texts, values), min_size=1, max_size=TOGETHER))
@example([(text, text) for text in TEMPTING])
@example([("".join(map(chr, range(1, 256))), {"".join(map(chr, range(256))): 1e300})])
@example([("", 12345678901234567890123), ("", -0.0), ("", [])])
def test_each_argument_is_one_element_as_it_is(daemon: Daemon, given_: list[tuple[str, Any]]) -> None:
    async def work(caller: Peer) -> None:
        calls = [
            caller.start("tools.invoke", {"tool": "show", "parameters": {"text": text, "value": value}})
            for text, value in given_
        ]
        for call, (text, value) in zip(calls, given_, strict=True):
            told = None
            handle = (await call)["handle"]
            while told is None or told["status"] == "running":
                told = await caller.call("tools.poll", {"handle": handle, "wait_ms": 10_000, "after": 0})
            assert told["status"] == "succeeded", told
            said = "".join(chunk["text"] for chunk in told["chunks"][:-1])
            assert said == "".join(f"{element}\0" for element in wanted(text, value))
        assert not any((daemon.state.parent / "empty").iterdir()), "a shell would leave something there"

    talk(daemon, work)


def test_a_nul_is_refused_with_its_place_and_nothing_starts(daemon: Daemon) -> None:
    async def work(caller: Peer) -> None:
        before = daemon.metrics()
        for name in ("text", "value", "absent"):
            with pytest.raises(Refused, match="NUL") as refused:
                await caller.call("tools.call", {"tool": "show", "parameters": {"text": "", name: "a\0b"}})
            assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", f"parameters.{name}")
        nothing_started(daemon, before)

    talk(daemon, work)


def test_half_a_surrogate_is_no_json_and_nothing_starts(daemon: Daemon) -> None:
    async def work(caller: Peer) -> None:
        before = daemon.metrics()
        frame = (
            r'{"jsonrpc":"2.0","id":1,"method":"tools.invoke","params":{"tool":"show","parameters":{"text":"\ud800"}}}'
        )
        answer = await caller.raw(frame)
        assert (answer["id"], answer["error"]["code"]) == (None, -32700)
        nothing_started(daemon, before)

    talk(daemon, work)


FITS = {"text": "touched", "number": 1, "list": [1, False]}
MISSING = object()
# Where it is wrong, which member, and with what value.
BREAKS: list[tuple[str, str, st.SearchStrategy[Any]]] = [
    ("parameters.text", "text", values.filter(lambda value: not isinstance(value, str))),
    ("parameters.text", "text", st.text(string.ascii_lowercase, min_size=10, max_size=99)),
    ("parameters.text", "text", st.text(string.ascii_uppercase, min_size=1, max_size=9)),
    ("parameters.number", "number", st.integers(min_value=10) | st.integers(max_value=-1)),
    ("parameters.number", "number", st.sampled_from(["1", 0.5, None, True, [1], {}])),
    ("parameters.list", "list", st.lists(st.sampled_from([1, "a"]), min_size=4, max_size=9)),
    ("parameters.list[1]", "list", st.sampled_from([0, "b", True, None, []]).map(lambda bad: [1, bad])),
    ("parameters.text", "text", st.just(MISSING)),
    ("parameters.x", "x", values),
]


@settings(max_examples=EXAMPLES * 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_breaks_the_schema_is_refused_with_its_place_before_anything_starts(
    daemon: Daemon, data: st.DataObject
) -> None:
    place, name, value = data.draw(st.sampled_from(BREAKS))
    parameters = {name: one for name, one in (FITS | {name: data.draw(value)}).items() if one is not MISSING}

    async def work(caller: Peer) -> None:
        before = daemon.metrics()
        for method in ("tools.invoke", "tools.call"):
            with pytest.raises(Refused) as refused:
                await caller.call(method, {"tool": "strict", "parameters": parameters})
            assert refused.value.type == "invalid_params"
            assert refused.value.data["path"] == place, refused.value
        nothing_started(daemon, before)

    talk(daemon, work)


def test_what_fits_the_schema_starts(daemon: Daemon) -> None:
    """The liveness twin: the tool that was never started could be."""
    touched = Path(daemon.state.parent / "empty" / "touched")
    assert not touched.exists()

    async def work(caller: Peer) -> None:
        told = await caller.call("tools.call", {"tool": "strict", "parameters": FITS})
        assert told["status"] == "succeeded", told

    talk(daemon, work)
    touched.unlink()
