"""The OpenRPC 1.3 document of a method table (https://spec.open-rpc.org), generated from what the methods declare."""

import inspect
from collections.abc import Mapping
from hashlib import sha256
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from msgspec import Raw, Struct

from carserver.protocol.errors import ErrorKind
from carserver.protocol.handshake import ServerSchema
from carserver.protocol.host import HostEvent
from carserver.protocol.runs import RunCancelled, RunChanged, TraceClosed, TraceEvent, WatchReset
from carserver.protocol.server import Closing, Draining
from carserver.protocol.tools import CancelExecution, ExecuteTool, ToolStreamEvent
from carserver.rpc.dispatcher import UNDECLARED
from carserver.rpc.method import Method, Table

OPENRPC = "1.3.2"

NOTIFICATIONS: Mapping[str, tuple[Any, str]] = {
    "runs.trace.event": (TraceEvent, "The next record of a run's live trace, to its subscribers."),
    "runs.trace.closed": (TraceClosed, "A live trace cannot go on; the reason says why."),
    "runs.cancelled": (RunCancelled, "A run was cancelled; to the connections that attend it."),
    "runs.changed": (RunChanged, "A run appeared or changed; to who watches. Its newest snapshot by then."),
    "runs.watch.reset": (WatchReset, "Changes were not told, or runs were deleted: list again; to who watches."),
    "tools.stream.event": (ToolStreamEvent, "The next chunk of a handle, to who subscribed to its stream."),
    "tools.cancel": (CancelExecution, "A call is to end; to the host that was sent it, which answers it all the same."),
    "host.event": (HostEvent, "The next event of the host board, to who subscribed to it."),
    "server.draining": (Draining, "The daemon stops: the connection is about to be closed with 1012."),
    "server.closing": (Closing, "The last line on a Unix socket or standard output: why the connection ends."),
}
"""What the daemon sends on its own: the type of its params, and when."""

REQUESTS: Mapping[str, tuple[Any, Any, str]] = {
    "tools.execute": (
        ExecuteTool,
        Raw,
        "A tool that the peer hosts is to run; the answer is its result, or an error. tools.chunk streams until then.",
    ),
}
"""What the daemon asks of peers: the types of params and result, and when."""

_REF = "#/components/schemas/{name}"


CAR = "x-car"
"""Where the document has the methods of the CAR dialect."""


def document(table: Table, version: str) -> dict[str, Any]:
    """The document: every method, the errors, the schemas of all types, the notifications and the requests."""
    entries = table.all().values()
    types = [type_ for entry in entries for kind in (entry.params, entry.result) for type_ in _alternatives(kind)]
    types += [params for params, _ in NOTIFICATIONS.values()]
    types += [type_ for params, result, _ in REQUESTS.values() for type_ in (params, result)]
    schemas, components = msgspec.json.schema_components(types, schema_hook=_schema_hook, ref_template=_REF)
    for described in components.values():
        if "description" in described:
            described["description"] = inspect.cleandoc(described["description"])
    by_type = dict(zip(map(repr, types), schemas, strict=True))

    def schema(type_: Any) -> dict[str, Any]:
        kinds = [by_type[repr(kind)] for kind in _alternatives(type_)]
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}

    return {
        "openrpc": OPENRPC,
        "info": {
            "title": "carserver",
            "version": version,
            "description": "The shared recorder and control point of AI-agent runs. JSON-RPC 2.0 over WebSocket.",
        },
        "methods": [_method(entry, schema, components) for entry in entries if not entry.dialect],
        CAR: [_method(entry, schema, components) for entry in entries if entry.dialect == "car"],
        "components": {"schemas": components, "errors": {kind.name: _error(kind) for kind in ErrorKind}},
        "x-notifications": [
            {"name": name, "summary": summary, "params": schema(params)}
            for name, (params, summary) in NOTIFICATIONS.items()
        ],
        "x-requests": [
            {"name": name, "summary": summary, "params": schema(params), "result": schema(result)}
            for name, (params, result, summary) in REQUESTS.items()
        ],
    }


def car_schema(whole: Mapping[str, Any], version: str) -> ServerSchema:
    """The answer to `server.schema`: of the whole document, the CAR dialect and what it refers to.

    Its members are sorted, as the CAR client shows them: so its users can check the digest.
    """
    part: dict[str, Any] = {CAR: whole[CAR], "components": {}}
    waiting: list[Any] = [whole[CAR]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            if isinstance(reference := value.get("$ref"), str):
                _, _, kind, name = reference.split("/", 3)
                named = part["components"].setdefault(kind, {})
                if name not in named:
                    named[name] = whole["components"][kind][name]
                    waiting.append(named[name])
    schema = msgspec.json.encode(part, order="sorted")
    return ServerSchema(schema=Raw(schema), digest=sha256(schema).hexdigest(), car_version=version)


def _method(entry: Method, schema: Any, components: Mapping[str, Any]) -> dict[str, Any]:
    summary, _, description = entry.documentation.partition("\n\n")
    described: dict[str, Any] = {
        "name": entry.name,
        "summary": " ".join(summary.split()),
        "paramStructure": "either" if entry.fields is not None else "by-position",
        "params": _params(entry, schema, components),
        "result": {"name": "result", "schema": schema(entry.result)},
        "errors": [{"$ref": f"#/components/errors/{kind.name}"} for kind in errors_of(entry)],
        "x-role": entry.role,
    }
    if description:
        described["description"] = description
    return described


def errors_of(entry: Method) -> list[ErrorKind]:
    """What a call of it may be answered: its own errors, and those of any method."""
    return [kind for kind in ErrorKind if kind in entry.errors or kind in UNDECLARED]


def _params(entry: Method, schema: Any, components: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One content descriptor per member; a list type is one, which stands for all that is given by place."""
    if entry.params is None:
        return []
    whole = schema(entry.params)
    if entry.fields is None:
        return [{"name": "values", "description": "the params array itself", "required": False, "schema": whole}]
    name = whole["$ref"].rpartition("/")[2]
    properties, required = components[name]["properties"], components[name].get("required", [])
    # OpenRPC wants what is required first where params may be given by place; the Structs are declared that way.
    return [{"name": member, "required": member in required, "schema": properties[member]} for member in entry.fields]


def _alternatives(type_: Any) -> tuple[Any, ...]:
    """Nothing of None; each of a union of Structs that no tag tells apart: it may be a result, but is no one schema."""
    kinds = get_args(type_) if get_origin(type_) in (Union, UnionType) else ()
    structs = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Struct)]
    if len(structs) > 1 and not all(kind.__struct_config__.tag for kind in structs):
        return kinds
    return () if type_ is None else (type_,)


def _error(kind: ErrorKind) -> dict[str, Any]:
    return {"code": kind.code, "message": kind.when, "data": {"type": kind.type}}


def _schema_hook(type_: Any) -> dict[str, Any]:
    if type_ is Raw:
        return {"description": "any JSON value, kept by its own bytes"}
    raise NotImplementedError(f"no schema for {type_!r}")
