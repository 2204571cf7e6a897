"""What is wrong with a value, in words, and where: of the library's error only its kind and place, never the value."""

from typing import Any

import msgspec

from carserver.core.schemas import shorten

_SHOWN = 200  # characters of what a schema says, in a message
_ARTICLES = {"integer": "an integer", "array": "an array", "object": "an object", "null": "null"}
_BOUNDS = {
    "minimum": "at least {} is wanted",
    "maximum": "at most {} is wanted",
    "exclusiveMinimum": "more than {} is wanted",
    "exclusiveMaximum": "less than {} is wanted",
    "minLength": "a text of at least {} characters is wanted",
    "maxLength": "a text of at most {} characters is wanted",
    "minItems": "at least {} elements are wanted",
    "maxItems": "at most {} elements are wanted",
    "minProperties": "at least {} members are wanted",
    "maxProperties": "at most {} members are wanted",
}
_PLAIN = {
    "uniqueItems": "two elements are the same",
    "anyOf": "it fits none of the forms that the schema allows (anyOf)",
    "oneOf": "it must fit one of the forms that the schema allows, and one alone (oneOf)",
    "not": "the schema excludes it (not)",
    "falseSchema": "nothing may stand here",
}


def explain(validator: Any, value: Any) -> tuple[list[str | int], str]:
    """The place of what does not fit, and what is wanted there.

    Args:
        validator: One of the library's.
        value: What it does not take.
    """
    try:
        validator.validate(value)
    except ValueError as error:  # the library's own kind is one
        return describe(error)
    return [], "it does not fit the tool's schema"


def describe(error: Any) -> tuple[list[str | int], str]:
    """The place of one of the library's errors, and what is wanted there."""
    place: list[str | int] = list(error.instance_path)
    kind, of = error.kind.name, error.kind.as_dict()
    match kind:
        case "required":
            return [*place, of["property"]], "it is missing"
        case "additionalProperties" | "unevaluatedProperties":
            return [*place, of["unexpected"][0]], "there is none of this name"
        case "type":
            wanted = " or ".join(_ARTICLES.get(name, f"a {name}") for name in of["types"])
            return place, f"{wanted} is wanted"
        case "enum":
            wanted = ", ".join(_json(option) for option in of["options"][:_SHOWN])
            return place, f"one of {shorten(wanted, _SHOWN)} is wanted"
        case "const":
            return place, f"{shorten(_json(of['expected_value']), _SHOWN)} is wanted"
        case "multipleOf":
            return place, f"a multiple of {of['multiple_of']} is wanted"
        case "propertyNames":
            return place, f"a member's name does not fit: {describe(of['error'])[1]}"
        case "$ref":
            return place, shorten(str(of["error"]).split(". ")[0], _SHOWN)
        case "pattern":
            return place, of.get("message") or "it does not match the pattern"
    if kind in _BOUNDS:
        return place, _BOUNDS[kind].format(shorten(str(of["limit"]), _SHOWN))
    return place, _PLAIN.get(kind, f"it does not fit `{shorten(kind, _SHOWN)}` of the tool's schema")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
