"""A tool's arguments as a person gives them, and what its JSON Schema says of them. The daemon checks; here is read."""

import sys
from typing import Any

import msgspec
import orjson
from msgspec import Raw

from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.plain import visible


def given_object(text: str | None) -> dict[str, Raw]:
    """The arguments that are given as JSON: each by its very bytes, once the whole is known to be JSON."""
    if text is None:
        return {}
    source = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    try:
        whole = orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise CommandError(f"the arguments are not JSON: {error}", ExitCode.USAGE) from None
    if not isinstance(whole, dict):
        raise CommandError('the arguments must be a JSON object, such as \'{"path": "."}\'', ExitCode.USAGE)
    return msgspec.json.decode(source, type=dict[str, Raw])


def given_pairs(given: tuple[str, ...]) -> dict[str, str]:
    """The arguments that are given one by one, as they were written."""
    pairs: dict[str, str] = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not sign or not name.isprintable() or not name:
            raise CommandError(f"--set {visible(one)}: write KEY=VALUE", ExitCode.USAGE)
        if name in pairs:
            raise CommandError(f"--set {visible(name)} is given twice", ExitCode.USAGE)
        pairs[name] = value
    return pairs


def typed(pairs: dict[str, str], schema: Raw) -> dict[str, Raw]:
    """Arguments that were given one by one, as what the tool's schema wants: JSON, unless it takes a text.

    Raises:
        CommandError: a value that is to be JSON is none, or one is no text at all.
    """
    properties, _ = schema_members(schema)
    found: dict[str, Raw] = {}
    for name, text in pairs.items():
        wanted = _types(properties.get(name))
        try:
            value = text if "string" in wanted or not wanted else orjson.loads(text)
            found[name] = Raw(orjson.dumps(text) if value is text else text.encode())
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):
            kinds = " or ".join(dict.fromkeys(wanted))
            wants = f"JSON here ({kinds})" if kinds and "string" not in wanted else "UTF-8"
            said = f"--set {visible(name)}={visible(text)}: the tool wants {wants}"
            raise CommandError(said, ExitCode.USAGE) from None
    return found


def _types(schema: Any) -> list[str]:
    """The JSON types that a schema takes, as far as it says so; none where it does not."""
    if not isinstance(schema, dict):
        return []
    given = schema.get("type")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list):
        return [str(one) for one in given]
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return [one for branch in schema[word] for one in _types(branch) or ["string"]]
    if isinstance(schema.get("enum"), list):
        return ["string" if isinstance(value, str) else "JSON" for value in schema["enum"]]
    return []


def schema_members(schema: Raw) -> tuple[dict[str, Any], list[Any]]:
    """The properties that a JSON Schema names, and those that it requires."""
    whole = msgspec.json.decode(schema)
    properties, required = (whole.get("properties"), whole.get("required")) if isinstance(whole, dict) else (None, None)
    return properties if isinstance(properties, dict) else {}, required if isinstance(required, list) else []
