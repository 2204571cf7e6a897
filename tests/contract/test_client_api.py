"""The client's methods come from the method table, are not stale, send what the daemon takes, and are typed."""

import ast
import asyncio
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carserver.client import api, api_sync
from carserver.rpc.method import Method
from tests.client_api import FOLDER, files, method_name, methods
from tests.daemon import ROOT

PROGRAM = Path(__file__).with_name("typed_client.py")
METHODS = [pytest.param(entry, id=entry.name) for entry in methods()]


def test_the_files_are_what_the_table_gives_today() -> None:
    there = {path: path.read_text() for name in ("api", "api_sync") for path in (FOLDER / name).glob("*.py")}
    assert there == files(), "carserver/client/api or api_sync is stale: run scripts/docs"


class Sent(Exception):
    """What a method was about to ask."""

    def __init__(self, method: str, params: Any, again: bool) -> None:
        super().__init__(method)
        self.method = method
        self.params = json.loads(msgspec.json.encode(params))
        self.again = again


class Calls:
    """Asks nobody."""

    async def call(self, method: str, params: Any, *, result_type: Any, again: bool) -> Any:
        raise Sent(method, params, again)


class BlockingCalls:
    def call(self, method: str, params: Any, *, result_type: Any, again: bool) -> Any:
        raise Sent(method, params, again)


def sent(entry: Method, params: Any, *, blocking: bool) -> Sent:
    """What the client sends when a method is called with these params."""
    module, calls = (api_sync, BlockingCalls()) if blocking else (api, Calls())
    namespace = getattr(module, entry.name.partition(".")[0].capitalize())(calls)
    call = getattr(namespace, method_name(entry))

    async def ask() -> None:
        answer = call(params) if entry.fields is None else call(**params)
        await answer  # a blocking one has raised

    with pytest.raises(Sent) as raised:
        asyncio.run(ask())
    return raised.value


@pytest.mark.parametrize("blocking", [False, True], ids=["async", "blocking"])
@pytest.mark.parametrize("entry", METHODS)
def test_a_method_sends_what_the_daemon_reads_as_the_params_that_were_given(entry: Method, blocking: bool) -> None:
    params = {} if entry.example.params is msgspec.UNSET else entry.example.params
    asked = sent(entry, params, blocking=blocking)
    assert asked.method == entry.name
    assert read(entry, asked.params) == read(entry, params)
    defaults = set(asked.params or {}) - set(params) if entry.fields is not None else set()
    assert None not in [asked.params[name] for name in defaults]
    assert asked.again == (params.get(entry.again) is not None if isinstance(entry.again, str) else entry.again)


def read(entry: Method, params: Any) -> Any:
    """As the daemon reads them; what it keeps as bytes, compact."""
    return entry.arguments(params, json.dumps({"params": params}, separators=(",", ":")).encode())


def test_null_is_a_value_where_any_json_is_taken_and_otherwise_it_is_left_out() -> None:
    (create,) = (entry for entry in methods() if entry.name == "runs.create")
    given = {"prompt": "p", "metadata": None, "agent_id": None}
    assert sent(create, given, blocking=False).params == {"prompt": "p", "session_id": "", "metadata": None}


def test_what_may_be_sent_again_is_what_the_declarations_say() -> None:
    assert {entry.name: entry.again for entry in methods() if entry.again} == api.AGAIN
    assert {"runs.record": "batch_id", "tools.call": "idempotency_key", "runs.get": True}.items() <= api.AGAIN.items()
    assert not api.AGAIN.keys() & {"runs.delete", "tools.cancel_all", "tools.chunk", "server.prune", "runs.import"}


@pytest.mark.parametrize("entry", METHODS)
def test_a_method_says_what_the_daemon_says_of_it_and_whom_it_is_for(entry: Method) -> None:
    for module in (api, api_sync):
        namespace = getattr(module, entry.name.partition(".")[0].capitalize())
        said = " ".join((inspect.getdoc(getattr(namespace, method_name(entry))) or "").split())
        assert said.startswith(" ".join(entry.documentation.split()))
        assert ("For the host." in said) == (entry.role == "host")
        assert [kind.type for kind in entry.errors if f"`{kind.type}`" not in said] == []


def test_a_program_over_every_method_passes_a_strict_type_checker() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(PROGRAM)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_program_has_every_method_of_both_kinds() -> None:
    tree = ast.parse(PROGRAM.read_text())
    for kind in (ast.AsyncFunctionDef, ast.FunctionDef):
        called = {
            f"{ast.unparse(call.func.value).capitalize()}.{call.func.attr}"
            for function in ast.walk(tree)
            if isinstance(function, kind)
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        }
        wanted = {f"{entry.name.partition('.')[0].capitalize()}.{method_name(entry)}" for entry in methods()}
        assert wanted - called == set()


def test_importing_the_methods_brings_the_words_on_the_wire_and_no_more() -> None:
    listed = "import sys, carserver.client.api, carserver.client.api_sync; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", listed], cwd=ROOT, text=True).split())
    ours = {name.split(".")[1] for name in loaded if name.startswith("carserver.")}
    assert ours <= {"client", "protocol"}
    assert not loaded & {"orjson", "click", "rich", "jsonschema_rs", "prometheus_client", "uvloop"}
