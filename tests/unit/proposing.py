"""Proposals for tests: as a client says them, and read."""

import json
from typing import Any

import msgspec

from carserver.protocol.proposals import GivenProposal


def action(id_: str, **members: Any) -> dict[str, Any]:
    """An action that calls the tool `tool`."""
    return {"id": id_, "type": "tool_call", "tool": "tool", "parameters": {}, "dependencies": []} | members


def proposal(actions: list[dict[str, Any]], **members: Any) -> GivenProposal:
    """A proposal of these."""
    return msgspec.json.decode(json.dumps({"actions": actions, **members}), type=GivenProposal)
