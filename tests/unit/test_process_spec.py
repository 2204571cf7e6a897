"""How a tool's arguments become those of a command, and what a command sees of the daemon's environment."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carserver.hosts.spec import SECRETS, BadArgument, ProcessSpec, placeholders


def spec(*command: str, env: tuple[str, ...] = ()) -> ProcessSpec:
    return ProcessSpec(name="t", command=command, cwd="/", env=env, output="text", max_output=1_000, timeout_ms=None)


def argv(command: list[str], parameters: Any) -> list[str]:
    raw = parameters if isinstance(parameters, bytes) else json.dumps(parameters, separators=(",", ":")).encode()
    return spec("run", *command).argv(raw)[1:]


FILLED: dict[str, tuple[list[str], Any, list[str]]] = {
    "a text as it is": (["{a}"], {"a": "x y  $(z) `w` * ; \n"}, ["x y  $(z) `w` * ; \n"]),
    "an empty text": (["{a}"], {"a": ""}, [""]),
    "within an element": (["--{a}={b}"], {"a": "k", "b": "v w"}, ["--k=v w"]),
    "the same twice": (["{a}{a}"], {"a": "x"}, ["xx"]),
    "an integer": (["{a}"], {"a": -7}, ["-7"]),
    "a number by its own literal": (
        ["{a}", "{b}", "{c}"],
        b'{"a":1.50,"b":1E3,"c":123456789012345678901234567890}',
        ["1.50", "1E3", "123456789012345678901234567890"],
    ),
    "true and false": (["{a}", "{b}"], {"a": True, "b": False}, ["true", "false"]),
    "another value as compact JSON": (["{a}", "{b}"], {"a": [1, "x y"], "b": {"k": None}}, ['[1,"x y"]', '{"k":null}']),
    "absent drops the element": (["a", "{b}", "--c={b}{d}", "e"], {"d": 1}, ["a", "e"]),
    "null is absent": (["{a}", "b"], {"a": None}, ["b"]),
    "two braces are one": (["{{a}", "{{{a}", "{{{{"], {"a": "x"}, ["{a}", "{x", "{{"]),
    "a lone closing brace stands for itself": (
        ["}", "a}}", "{{a}}", '{{"k":{a}}'],
        {"a": 1},
        ["}", "a}}", "{a}}", '{"k":1}'],
    ),
    "what was put in is not looked at again": (["{a}{b}"], {"a": "{b}", "b": "{{{a}"}, ["{b}{{{a}"]),
    "nor what it looks like": (["{a}", "{b}"], {"a": "-rf", "b": "\\1\\g<0>"}, ["-rf", "\\1\\g<0>"]),
    "a name of any characters": (["{a b.c-ü}"], {"a b.c-ü": "x"}, ["x"]),
    "escapes of JSON": (["{a}"], b'{"a":"\\u00e9\\n\\"\\ud83d\\ude00"}', ['é\n"😀']),
    "what no element names": (["a"], {"b": "x\0"}, ["a"]),
}


@pytest.mark.parametrize(("command", "parameters", "wanted"), FILLED.values(), ids=FILLED.keys())
def test_a_command_is_filled(command: list[str], parameters: Any, wanted: list[str]) -> None:
    assert argv(command, parameters) == wanted


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.text(alphabet="ab-= }"))
def test_any_text_is_one_argument_and_comes_out_as_it_went_in(text: str, beside: str) -> None:
    assert argv(["{a}", f"{beside}{{a}}", "{a}"], {"a": text}) == [text, f"{beside}{text}", text]


@given(
    st.lists(st.sampled_from(["x", "{a}", "{b}", "{a}{b}", "{{", "}", "{c}"]), max_size=8),
    st.dictionaries(st.sampled_from(["a", "b"]), st.text(alphabet="x {}\\\"'\n", max_size=5)),
)
def test_an_element_never_becomes_two_and_never_goes_while_its_arguments_are_there(
    command: list[str], parameters: dict[str, str]
) -> None:
    kept = [element for element in command if all(name in parameters for name in placeholders(element))]
    assert len(argv(command, parameters)) == len(kept)


def test_a_nul_is_refused_by_the_name_of_its_parameter() -> None:
    with pytest.raises(BadArgument, match=r"^parameters\.path: a NUL character"):
        argv(["--in={path}"], {"path": "a\0b"})


def test_nothing_is_run_in_the_place_of_a_program_that_was_left_out() -> None:
    with pytest.raises(BadArgument, match=r"^parameters\.tool: the program is named by it"):
        spec("{tool}", "/bin/sh").argv(b'{"tool":null}')


@pytest.mark.parametrize("element", ["{", "a{", "{}", "{a", "{a{b}", "{{{", "{{{}"])
def test_a_brace_that_opens_nothing_is_an_error(element: str) -> None:
    with pytest.raises(ValueError, match=r"write `\{\{` for a brace"):
        placeholders(element)


def test_a_command_sees_what_it_needs_and_what_it_was_allowed_and_nothing_else() -> None:
    daemons = {"PATH": "/bin", "HOME": "/h", "TZ": "UTC", "EDITOR": "vi", "AGENT": "7", **dict.fromkeys(SECRETS, "s")}
    assert spec("run").environment(daemons) == {"PATH": "/bin", "HOME": "/h", "TZ": "UTC"}
    allowed = spec("run", env=("AGENT", "NOT_THERE")).environment(daemons)
    assert allowed == {"PATH": "/bin", "HOME": "/h", "TZ": "UTC", "AGENT": "7"}
