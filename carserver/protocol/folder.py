"""The files of a state folder by which a client finds its daemon and proves who it is (contract, sections 5 and 11).

Their names and what is in them; who reads and writes them is elsewhere.
"""

import hashlib
import hmac
import re
from typing import Final

from msgspec import Struct

ENDPOINT: Final = "endpoint.json"
LOCK: Final = "lock"  # a daemon holds an flock on it for as long as it has the folder
AUTH_TOKEN: Final = "auth-token"  # noqa: S105 - a file's name
HOST_TOKEN: Final = "host-token"  # noqa: S105 - likewise
AGENT_KEY: Final = "agent-key"
CONFIGURATION: Final = "carserver.toml"
SMALL: Final = 64 * 1024  # bytes: no file of these is larger by right

AGENT_ID = re.compile(r"[A-Za-z0-9._:@ -]{1,128}")
_WRONG_IN_TOKEN = re.compile(r"[^\x21-\x7e]")  # what a header cannot carry as it stands


class Endpoint(Struct, frozen=True):
    """Where a daemon listens: the content of `endpoint.json`."""

    url: str
    pid: int
    boot_id: str


def token_problem(token: str) -> str | None:
    """What is wrong with a token, in words that do not show it."""
    if not token:
        return "is blank"
    if _WRONG_IN_TOKEN.search(token):
        return "has spaces, control characters or others that no header takes"
    return None


def agent_token(agent_key: str, agent_id: str) -> str:
    """`<id>.<mac>`: the token of one agent.

    Raises:
        ValueError: `agent_id` is not 1 to 128 characters of A-Z a-z 0-9 . _ : @ - and space.
    """
    if not AGENT_ID.fullmatch(agent_id):
        raise ValueError(f"agent id {agent_id!r} must be 1 to 128 characters of A-Z a-z 0-9 . _ : @ - and space")
    mac = hmac.new(agent_key.encode(), b"agent:" + agent_id.encode(), hashlib.sha256).hexdigest()
    return f"{agent_id}.{mac}"
