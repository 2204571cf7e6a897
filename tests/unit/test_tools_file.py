"""The tools file: what it declares, and the one line that says what is wrong with it."""

import json
from pathlib import Path

import pytest

from carserver.config import Settings
from carserver.hosts.spec import ProcessSpec
from carserver.hosts.toolsfile import ToolsFileError, read_tools

SETTINGS = Settings()
ALL_OF_IT = """
[tools.search]
command = ["grep", "-rn", "--max-count={limit}", "{pattern}", "{path}"]
description = "Searches."
cwd = "work"
env = ["GREP_COLORS"]
output = "jsonl"
timeout_ms = 60_000
max_output = 1_000_000
idempotent = true

[tools.search.parameters]
type = "object"
required = ["pattern"]
properties.pattern = { type = "string", minLength = 1 }
properties.path.type = "string"
properties.limit = { type = "integer", maximum = 9 }

[tools.date]
command = ["date"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tools.toml"


def test_all_that_can_be_declared(path: Path) -> None:
    path.write_text(ALL_OF_IT)
    date, search = read_tools(path, SETTINGS)
    assert json.loads(search.definition.listed) == {
        "name": "search",
        "source": "process",
        "description": "Searches.",
        "parameters": {
            "type": "object",
            "required": ["pattern"],
            "properties": {
                "pattern": {"type": "string", "minLength": 1},
                "path": {"type": "string"},
                "limit": {"type": "integer", "maximum": 9},
            },
        },
        "idempotent": True,
    }
    assert search.spec == ProcessSpec(
        name="search",
        command=("grep", "-rn", "--max-count={limit}", "{pattern}", "{path}"),
        cwd=str(path.parent / "work"),
        env=("GREP_COLORS",),
        output="jsonl",
        max_output=1_000_000,
        timeout_ms=60_000,
    )
    assert search.spec.argv(search.definition.arguments.check(b'{"pattern":"a b","limit":3}')) == [
        "grep",
        "-rn",
        "--max-count=3",
        "a b",
    ]
    assert date.spec == ProcessSpec(
        name="date",
        command=("date",),
        cwd=str(path.parent),
        env=(),
        output="text",
        max_output=SETTINGS.max_output,
        timeout_ms=None,
    )
    assert json.loads(date.definition.listed)["parameters"] == {}


def test_a_file_without_tools_declares_none(path: Path) -> None:
    path.write_text("# none yet\n")
    assert read_tools(path, SETTINGS) == []


def test_folders_are_absolute_however_the_file_was_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text('[tools.a]\ncommand = ["a"]\n[tools.b]\ncommand = ["b"]\ncwd = "/usr"\n')
    monkeypatch.chdir(path.parent)
    assert [tool.spec.cwd for tool in read_tools(Path(path.name), SETTINGS)] == [str(path.parent), "/usr"]


def wrong(members: str) -> str:
    return f'[tools.a]\ncommand = ["a"]\n{members}\n'


PROPERTIES = "parameters.properties.file.type = 'string'"
WRONG: dict[str, tuple[str, str]] = {
    "no TOML": ("tools = [", "is not TOML: "),
    "another key beside": ("[tool.a]\ncommand = ['a']", ": unknown key 'tool'; did you mean tools?"),
    "tools that are no tables": ("tools = 3", ": tools: it must be tables, one for each tool: [tools.NAME]"),
    "a tool that is no table": ("[tools]\na = 'ls'", ": tools.a: it must be a table: [tools.a]"),
    "an unknown key": (wrong("commmand = 3"), ": tools.a: unknown key 'commmand'; did you mean command?"),
    "one like nothing": (wrong("zzz = 3"), ": tools.a: unknown key 'zzz'; there is command, description, parameters"),
    "no command": ("[tools.a]\ncwd = '/'", ": tools.a.command: it is missing: it must be a list of texts"),
    "a command for a shell": (
        "[tools.a]\ncommand = 'ls -l'",
        ": tools.a.command: it is 'ls -l': it must be a list of texts, the program first: [\"grep\", ",
    ),
    "an empty command": ("[tools.a]\ncommand = []", ": tools.a.command: it is []: it must be a list of texts"),
    "an empty program": ("[tools.a]\ncommand = ['']", ": tools.a.command[0]: it is empty: it must be the program's"),
    "a number in a command": ("[tools.a]\ncommand = ['a', 3]", ": tools.a.command: it is ['a', 3]: it must be a list"),
    "a NUL in a command": ('[tools.a]\ncommand = ["a", "\\u0000"]', ": tools.a.command: it has a NUL character"),
    "a NUL in a folder": (wrong('cwd = "a\\u0000"'), ": tools.a.cwd: it has a NUL character"),
    "another output": (wrong("output = 'json'"), ': tools.a.output: it is \'json\': it must be "text" or "jsonl"'),
    "a deadline of none": (
        wrong("timeout_ms = 0"),
        ": tools.a.timeout_ms: it is 0: it must be milliseconds, an integer",
    ),
    "a deadline in words": (wrong("timeout_ms = '5 s'"), ": tools.a.timeout_ms: it is '5 s': it must be milliseconds"),
    "an output of none": (wrong("max_output = 0"), ": tools.a.max_output: it is 0: it must be bytes, an integer"),
    "idempotent, a little": (wrong("idempotent = 1"), ": tools.a.idempotent: it is 1: it must be true or false"),
    "a long value": (wrong(f"cwd = ['{'x' * 5_000}']"), f": tools.a.cwd: it is ['{'x' * 78}…: it must be a folder"),
    "a variable with its value": (wrong("env = ['A=b']"), ": tools.a.env[0]: it is 'A=b': it must be the name"),
    "carserver's own secret": (
        wrong("env = ['A', 'CARSERVER_AUTH_TOKEN']"),
        ": tools.a.env[1]: CARSERVER_AUTH_TOKEN is carserver's own secret, which no tool may have: leave it out",
    ),
    "where that stands": (wrong("env = ['CARSERVER_HOST_TOKEN_FILE']"), ": tools.a.env[0]: CARSERVER_HOST_TOKEN_FILE"),
    "the CAR client's": (wrong("env = ['CAR_AUTH_TOKEN']"), ": tools.a.env[0]: CAR_AUTH_TOKEN is"),
    "no schema": (wrong("parameters.type = 'objekt'"), ": tools.a.parameters.type: no JSON Schema: it is none of"),
    "a schema elsewhere": (wrong("parameters.'$ref' = 'x.json'"), ": tools.a.parameters.$ref: it refers to another"),
    "a schema in words": (wrong("parameters = 'none'"), ": tools.a.parameters: it is 'none': it must be a JSON Schema"),
    "a date in a schema": (wrong("parameters.const = 2026-01-01"), ": tools.a.parameters: it has a date, a time, inf"),
    "no number in a schema": (wrong("parameters.maximum = nan"), ": tools.a.parameters: it has a date, a time, inf"),
    "a placeholder for nothing": (
        f"[tools.a]\ncommand = ['a', '{{fil}}']\n{PROPERTIES}",
        ": tools.a.command[1]: {fil} is not among parameters.properties; did you mean {file}?",
    ),
    "one like no parameter": (
        "[tools.a]\ncommand = ['awk', '{print}']",
        ": tools.a.command[1]: {print} is not among parameters.properties; declare it, or write `{{` for a brace",
    ),
    "a brace for nothing": (
        "[tools.a]\ncommand = ['awk', '{ print $1']",
        ": tools.a.command[1]: it has a `{` that opens no `{name}`: write `{{` for a brace",
    ),
    "a program that may be left out": (
        f"[tools.a]\ncommand = ['{{file}}', 'x']\n{PROPERTIES}",
        ": tools.a.command[0]: {file} names the program: it must be among parameters.required",
    ),
    "no name": ('[tools.""]\ncommand = ["a"]', ': tools[""].name: it is empty'),
    "a control character in a name": ('[tools."a\\u001b"]\ncommand = ["a"]', ': tools["a\\u001b"].name: printable'),
    "a large tool": (
        wrong(f"description = '{'x' * 65_536}'"),
        ": tools.a: 65619 is more than tool_bytes allows (65536)",
    ),
}


@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_one_line_that_says_where(path: Path, content: str, words: str) -> None:
    path.write_text(content)
    with pytest.raises(ToolsFileError) as caught:
        read_tools(path, SETTINGS)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.removeprefix(str(path)).strip().startswith(words.strip())
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500


def test_all_tools_have_so_many_bytes(path: Path) -> None:
    path.write_text("".join(f"[tools.t{number}]\ncommand = ['a']\n" for number in range(50)))
    with pytest.raises(ToolsFileError, match=r"more than tools_bytes allows \(1000\)"):
        read_tools(path, Settings(tools_bytes=1_000))
    assert len(read_tools(path, Settings(hosted_tools=1))) == 50


def test_a_file_that_cannot_be_read_is_named(path: Path) -> None:
    with pytest.raises(ToolsFileError, match=r"cannot read the tools file .*tools\.toml: No such file"):
        read_tools(path, SETTINGS)
    path.write_bytes(b"# \xff\n")
    with pytest.raises(ToolsFileError, match="not UTF-8"):
        read_tools(path, SETTINGS)
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(ToolsFileError, match=r"nest too deep|not TOML"):
        read_tools(path, SETTINGS)
