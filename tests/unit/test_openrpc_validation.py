"""The helper `tests.openrpc` takes what is OpenRPC and refuses what is not."""

import json
from typing import Any

import pytest

from tests import openrpc

WRONG: dict[str, dict[str, Any]] = json.loads((openrpc.DATA / "openrpc-wrong.json").read_bytes())

RIGHT: dict[str, Any] = {
    "openrpc": "1.3.2",
    "info": {"title": "right", "version": "1"},
    "methods": [
        {
            "name": "ping",
            "summary": "Answers.",
            "paramStructure": "by-name",
            "params": [{"name": "n", "schema": {"type": "integer", "minimum": 0}, "required": True}],
            "result": {"name": "pong", "schema": {"$ref": "#/components/schemas/Pong"}},
            "errors": [{"code": -32010, "message": "not_found"}],
            "examples": [
                {
                    "name": "once",
                    "params": [{"name": "n", "value": 1}],
                    "result": {"name": "pong", "value": {"now_ms": 1}},
                }
            ],
            "x-role": "client",
        }
    ],
    "components": {"schemas": {"Pong": {"type": "object", "properties": {"now_ms": {"type": "integer"}}}}},
    "x-notifications": [],
}


def test_takes_a_document_that_is_right() -> None:
    openrpc.validate(RIGHT)


@pytest.mark.parametrize("document", WRONG.values(), ids=WRONG)
def test_refuses_a_document_that_is_wrong(document: dict[str, Any]) -> None:
    with pytest.raises(openrpc.NotOpenRpc):
        openrpc.validate(document)
