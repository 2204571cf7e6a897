"""Writes docs/protocol.md from the daemon's own OpenRPC document and from the examples of its methods.

Each example is run on a daemon of its own, over a socket; what it answered stands in the page, with what differs from
run to run (times, random ids, sizes) replaced. `scripts/docs` calls this; a test fails when the page is stale.
"""

import asyncio
import functools
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from carserver import __version__
from carserver.methods.car.host import APPROVAL
from carserver.methods.hosting import REQUEST_ID
from carserver.methods.outputs import EXAMPLE_ID
from carserver.methods.served import METHOD_MODULES
from carserver.methods.server import EXAMPLE_PATH
from carserver.methods.tools import HANDLE
from carserver.protocol.codec import encode
from carserver.rpc.method import Method, Table
from carserver.rpc.openrpc import document
from tests.daemon import running
from tests.peer import Peer, peer

Key = tuple[str, str]
"""A method's name and its dialect."""

PAGE = Path(__file__).parent.parent / "docs/protocol.md"
AUTH_TOKEN = "AUTH_TOKEN"
LONG = 3_000  # characters of an answer that is shown whole

DIGEST = "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c"
VOLATILE = {
    "epoch": "ad0f6a0e-4a5c-4a57-a6a7-7f6f3a1d9d11",
    "boot_id": "5f0c1f6e-52f0-4d0c-9d65-2b8a3f0e9c77",
    "client_id": "c2b1f0a4-7c0e-4d37-8e55-9a4c1d2e3f60",
    "handle": HANDLE,
    "request_id": REQUEST_ID,
    "digest": DIGEST,
    "receipt_digest": DIGEST,
    "terminal_digest": DIGEST,
    "resumed_from_client_id": "0d7c9a52-3f64-4d0b-8a1e-6b5f2c9e7d14",
    "proposal_id": "15fd91d22457",
    "duration_ms": 12,
    "total_duration_ms": 27,
    "started_at": "2026-11-20T08:11:31.053Z",
    "ended_at": "2026-11-20T08:11:32.118Z",
    "pid": 4711,
    "database_bytes": 4096,
    "log_bytes": 131_072,
}
A_BACKUP = {"path": EXAMPLE_PATH, "bytes": 253_952}
A_TIME_MS = 1_795_162_291_053
DURATIONS = ("timeout_ms", "wait_ms")
A_TIME = "2026-11-20T08:11:31.053Z"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
RANDOM = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CALLS = {"tools.call": 1, "proposal.submit": 2}
"""How often a method's example has a tool run that its caller hosts, before it is answered."""
HANDSHAKE = {"protocol_version": 3}
RESULT = {"matches": 1}
"""What the tool of an example answers."""

INTRODUCTION = """\
# The protocol

*Generated from the daemon's method table by `scripts/docs`; do not edit. The same as OpenRPC: `rpc.discover`, or
`/openrpc.json` on the daemon's port.*

JSON-RPC 2.0 in WebSocket text frames, batches included. Authenticate by `Authorization: Bearer TOKEN` on the upgrade,
or by `session.auth` as the first request. Params go by name, or by place in the order given here; members that a method
does not know are ignored. Requests of one connection start in the order of their arrival and are answered as they
finish. Every answer that acknowledges a change means that it is durable.
"""
CAR = """\
## The CAR dialect

A connection that has made [server.handshake](#serverhandshake) speaks it: there, these methods have the forms that the
CAR client knows, and all others the native ones. Those that there are in the dialect alone are found without the
handshake too. In the dialect `params` may be null where there are none.
"""


def table() -> Table:
    """The methods that the daemon serves by itself."""
    return Table.of(METHOD_MODULES)


def _token(entry: Method) -> str | None:
    if entry.name == "session.auth":
        return None
    return "host-token" if entry.role == "host" else AUTH_TOKEN


async def run_example(entry: Method, state: Path) -> tuple[Any, list[Any]]:
    """What a method's example answered on a fresh daemon, and what the daemon sent beside it."""
    with running(state, auth_token=AUTH_TOKEN) as daemon:
        async with peer(daemon, _token(entry)) as caller:
            if entry.dialect:
                await caller.call("server.handshake", HANDSHAKE)
            made: Any = {}
            for name, params in entry.example.before:
                made = await caller.call(name, params)
            params = None if entry.example.params is msgspec.UNSET else entry.example.params
            if isinstance(params, dict):
                params = await _filled_in(params, made, caller)
            if isinstance(params, dict) and params.get("path") == EXAMPLE_PATH:
                path = str(state.with_name(f"{state.name}-backup.db"))
                return {**await caller.call(entry.name, {"path": path}), **A_BACKUP}, []
            if calls := CALLS.get(entry.name):
                called = caller.start(entry.name, params)
                beside = [message for _ in range(calls) for message in await _host(caller)]
                return await called, beside
            if entry.name == "tools.poll":
                await _host(caller, {"kind": "text", "text": "main.py:7: TODO\n"})
            answer = await caller.call(entry.name, params)
            return answer, await _beside(caller)


async def _filled_in(params: dict[str, Any], made: Any, caller: Peer) -> dict[str, Any]:
    """The params of an example with what stands for a random id replaced by the one that was made."""
    if params.get("id") == EXAMPLE_ID:
        return {**params, "id": made["id"]}
    if params.get("approval_id") == APPROVAL:
        return {**params, "approval_id": made["id"]}
    if params.get("handle") == HANDLE and isinstance(made, dict) and "handle" in made:
        return {**params, "handle": made["handle"]}
    if params.get("request_id") == REQUEST_ID:
        return {**params, "request_id": (await caller.next("tools.execute"))["request_id"]}
    return params


async def _host(caller: Peer, *chunks: Any) -> list[Any]:
    """The caller runs a tool that it hosts itself: what it was asked, and what it answered."""
    execute = json.loads(await caller.next_frame())
    for chunk in chunks:
        await caller.call("tools.chunk", [execute["id"], chunk])
    reply = {"jsonrpc": "2.0", "id": execute["id"], "result": RESULT}
    await caller.socket.send(json.dumps(reply))
    return [execute, reply]


async def _beside(caller: Peer) -> list[Any]:
    """What was pushed until now: a ping's answer comes after it."""
    await caller.call("server.ping")
    pushed = []
    while not caller.pushed.empty():
        pushed.append(json.loads(caller.pushed.get_nowait()))
    return pushed


def settled(value: Any, key: str = "") -> Any:
    """`value` with what differs from run to run replaced."""
    if isinstance(value, dict):
        return {name: settled(member, name) for name, member in value.items()}
    if isinstance(value, list):
        return [settled(member) for member in value]
    if key in VOLATILE and value is not None:
        return VOLATILE[key]
    if key == "id" and isinstance(value, str) and value.startswith("out-"):
        return EXAMPLE_ID
    if key in ("id", "session_id") and isinstance(value, str) and RANDOM.fullmatch(value):
        return VOLATILE["request_id" if key == "id" else "client_id"]
    if isinstance(value, str) and TIME.fullmatch(value):
        return A_TIME
    return A_TIME_MS if key.endswith("_ms") and key not in DURATIONS and isinstance(value, int) else value


def page(whole: dict[str, Any], sections: Mapping[Key, str]) -> str:
    """The whole page; `sections` are those of the methods."""
    schemas = whole["components"]["schemas"]
    parts = [INTRODUCTION, _errors(whole), "## Methods\n"]
    parts += [sections[method["name"], ""] for method in whole["methods"]]
    parts.append(CAR)
    parts += [sections[method["name"], "car"] for method in whole["x-car"]]
    parts.append("## What the daemon sends on its own\n")
    for notification in whole["x-notifications"]:
        parts.append(f"### {notification['name']}\n\n{notification['summary']}\n")
        parts.append(_members(_named(notification["params"], schemas), schemas))
    parts.append("## What the daemon asks of a peer\n")
    for request in whole["x-requests"]:
        params = _named(request["params"], schemas)
        parts.append(f"### {request['name']}\n\n{request['summary']}\n\n{params['description']}\n")
        parts.append(_members(params, schemas))
        parts.append(f"Result: {_type_words(request['result'], schemas)}.\n")
    parts.append("## Types\n")
    parts += [_type(name, schema, schemas) for name, schema in schemas.items() if _is_shown(name, whole)]
    return "\n".join(parts)


def _errors(whole: dict[str, Any]) -> str:
    rows = [
        f"| {error['code']} | `{error['data']['type']}` | {error['message']} |"
        for error in whole["components"]["errors"].values()
    ]
    return "\n".join(
        [
            "## Errors\n",
            '`{"code", "message", "data": {"type", …}}`: `data.type` is the stable name, the message for a person.\n',
            "| code | `data.type` | when |\n|---|---|---|",
            *rows,
            "",
        ]
    )


def _method(entry: Method, method: dict[str, Any], schemas: dict[str, Any], answer: Any, pushed: list[Any]) -> str:
    lines = [f"### {method['name']}\n", f"{method['summary']}\n"]
    if "description" in method:
        lines.append(f"{method['description']}\n")
    lines.append(_members_of(method["params"], schemas) if method["params"] else "No params.\n")
    lines.append(f"Result: {_type_words(method['result']['schema'], schemas)}.\n")
    if entry.errors:
        own = ", ".join(f"`{kind.type}`" for kind in sorted(entry.errors, key=lambda kind: kind.type))
        lines.append(f"Errors of its own: {own}.\n")
    if entry.role == "host":
        lines.append("For the host.\n")
    request: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": method["name"]}
    if entry.example.params is not msgspec.UNSET:
        request["params"] = entry.example.params
    answered = f"← {_json({'jsonrpc': '2.0', 'id': 1, 'result': _short(settled(answer))})}"
    beside = [f"{'←' if 'method' in message else '→'} {_json(settled(message))}" for message in pushed]
    shown = [f"→ {_json(request)}", *([*beside, answered] if entry.waits is True else [answered, *beside])]
    return "\n".join([*lines, "```text", *shown, "```", ""])


def _members_of(params: list[dict[str, Any]], schemas: dict[str, Any]) -> str:
    rows = [
        f"| `{param['name']}` | {_type_words(param['schema'], schemas)} | {_when(param['required'], param['schema'])} |"
        for param in params
    ]
    return "\n".join(["| param | type | |\n|---|---|---|", *rows, ""])


def _members(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{name}` | {_type_words(member, schemas)} | {_when(name in required, member)} |"
        for name, member in schema["properties"].items()
    ]
    return "\n".join(["| member | type | |\n|---|---|---|", *rows, ""])


def _type(name: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    lines = [f"### {name}\n"]
    if "description" in schema:
        lines.append(f"{schema['description']}\n")
    if "properties" in schema:
        lines.append(_members(schema, schemas))
    else:
        lines.append(f"{_type_words(schema, schemas)}\n")
    return "\n".join(lines)


def _is_shown(name: str, whole: dict[str, Any]) -> bool:
    """Params stand with their methods, those of notifications and requests with theirs."""
    entries = table().all().values()
    own = {getattr(entry.params, "__name__", "") for entry in entries}
    sent = whole["x-notifications"] + whole["x-requests"]
    own |= {message["params"]["$ref"].rpartition("/")[2] for message in sent}
    return name not in own


def _when(required: bool, schema: dict[str, Any]) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "optional" if default is None else f"default `{json.dumps(default)}`"


def _named(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas[schema["$ref"].rpartition("/")[2]]
    return found


def _type_words(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [_type_words(kind, schemas) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = schema.get("type")
    if kind == "array":
        return f"array of {_type_words(schema.get('items', {}), schemas)}{_bounds(schema)}"
    words = kind or schema.get("description", "any JSON value")
    return f"{words}{_bounds(schema)}"


_BOUNDS = {"minimum": "≥", "maximum": "≤", "minItems": "at least", "maxItems": "at most", "minLength": "at least"}


def _bounds(schema: dict[str, Any]) -> str:
    words = [f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    if "pattern" in schema:
        words.append(f"`{schema['pattern']}`")
    return f" ({', '.join(words)})" if words else ""


def _short(answer: Any) -> Any:
    """A long answer by its members' names."""
    if isinstance(answer, dict) and len(json.dumps(answer)) > LONG:
        return {name: member if isinstance(member, str) else "…" for name, member in answer.items()}
    return answer


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def section(entry: Method, state: Path) -> str:
    """A method's section of the page; its example is run for it."""
    whole = described()
    methods = whole["x-car" if entry.dialect else "methods"]
    method = next(method for method in methods if method["name"] == entry.name)
    return _method(entry, method, whole["components"]["schemas"], *await run_example(entry, state))


@functools.cache
def described() -> dict[str, Any]:
    """The OpenRPC document."""
    found: dict[str, Any] = json.loads(encode(document(table(), __version__)))
    return found


def sections_of(text: str) -> dict[Key, str]:
    """The sections of the methods in a page."""
    native, _, rest = text[text.index("## Methods\n") :].partition("## The CAR dialect\n")
    car, _, _ = rest.partition("## What the daemon sends on its own\n")
    parts = {"": native, "car": car}
    return {(found[1], dialect): found[0] for dialect, part in parts.items() for found in _SECTION.finditer(part)}


_SECTION = re.compile(r"^### (\S+)\n.*?^```\n", re.MULTILINE | re.DOTALL)


async def generate(folder: Path) -> str:
    """Runs every example and makes the page."""
    entries = table().all().items()
    sections = {key: await section(entry, folder / str(place)) for place, (key, entry) in enumerate(entries)}
    return page(described(), sections)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        text = asyncio.run(generate(Path(temporary)))
    PAGE.write_text(text)
    sys.stderr.write(f"wrote {PAGE.relative_to(Path.cwd())}\n")
