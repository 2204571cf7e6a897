"""Is a document OpenRPC 1.3? By OpenRPC's own schema, offline, and by what that schema cannot say."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT7

DATA = Path(__file__).parent / "data"


class NotOpenRpc(Exception):
    """The message names the place and what is wrong there."""


def validate(document: dict[str, Any]) -> None:
    """Checks a whole document.

    Raises:
        NotOpenRpc: the first (most telling) thing that is wrong.
    """
    error = best_match(_validator().iter_errors(document))
    if error is not None:
        raise NotOpenRpc(f"{error.json_path}: {error.message}")
    _check_names(document)
    check_references(document)


def _check_names(document: dict[str, Any]) -> None:
    """Names of methods, and of one method's params, are unique; required params come first (Method Object, params)."""
    for part in ("methods", "x-car"):
        methods = [method for method in document.get(part, []) if "name" in method]
        _check_unique(part, methods)
        for method in methods:
            _check_params(method)


def _check_params(method: dict[str, Any]) -> None:
    params = [param for param in method["params"] if "name" in param]
    _check_unique(method["name"], params)
    required = [param.get("required", False) for param in params]
    if required != sorted(required, reverse=True):
        raise NotOpenRpc(f"{method['name']}: a required param after an optional one")


def _check_unique(where: str, named: list[dict[str, Any]]) -> None:
    names = [item["name"] for item in named]
    if len(names) != len(set(names)):
        raise NotOpenRpc(f"{where}: a name twice in {names}")


def check_references(document: dict[str, Any]) -> None:
    """Every `$ref`, of OpenRPC or of a schema in it, points to something in the document."""
    resolver = Registry[Any]().resolver_with_root(DRAFT7.create_resource(document))
    waiting: list[Any] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
            if isinstance(reference := value.get("$ref"), str):
                try:
                    resolver.lookup(reference)
                except Unresolvable:
                    raise NotOpenRpc(f"$ref {reference!r} points nowhere") from None


@cache
def _validator() -> Draft7Validator:
    openrpc = json.loads((DATA / "openrpc-1.3-schema.json").read_bytes())
    json_schema = DRAFT7.create_resource(json.loads((DATA / "json-schema-tools-schema.json").read_bytes()))
    # OpenRPC's schema names the schema of schemas with and without the slash.
    names = ("https://meta.json-schema.tools", "https://meta.json-schema.tools/")
    registry = Registry[Any]().with_resources((name, json_schema) for name in names)
    Draft7Validator.check_schema(openrpc)
    Draft7Validator.check_schema(json_schema.contents)
    return Draft7Validator(openrpc, registry=registry)
