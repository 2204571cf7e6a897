"""Who acts: the principals, what they may see, and the tokens that prove them (contract, section 5). No files here."""

import hashlib
import hmac
from typing import Protocol, TypeVar

from msgspec import Struct

from carserver.protocol import folder
from carserver.protocol.errors import forbidden, not_found
from carserver.protocol.server import Role

AGENT_ID = folder.AGENT_ID
agent_token = folder.agent_token


class Principal(Struct, frozen=True):
    """Who a session acts as. `name` is what a run's owner is stored as."""

    role: Role
    agent_id: str | None = None

    @property
    def name(self) -> str:
        """`host`, `client` or `agent:<id>`."""
        return f"agent:{self.agent_id}" if self.role == "agent" else self.role

    def sees(self, owner: str) -> bool:
        """Runs and handles are their owner's and the host's."""
        return self.role == "host" or owner == self.name


HOST = Principal("host")
CLIENT = Principal("client")


class Owned(Protocol):
    """What belongs to a principal."""

    @property
    def owner(self) -> str:
        """The name of its principal."""
        ...


T = TypeVar("T", bound=Owned)


def visible(thing: T | None, to: Principal, what: str, name: str) -> T:
    """The one door to what has an owner; None is what does not exist. `what` is run, output, handle or tool.

    Raises:
        RpcError: not_found, in the same words for what is unknown and for what is not visible.
    """
    if thing is None or not to.sees(thing.owner):
        raise not_found(what, name)
    return thing


def owned(thing: T | None, by: Principal, what: str, name: str) -> T:
    """The one door to writing: the owner alone; the host, who sees it, is told that it may not.

    Raises:
        RpcError: not_found, forbidden.
    """
    thing = visible(thing, by, what, name)
    if thing.owner != by.name:
        raise forbidden(f"{what} {name!r} belongs to another principal; the host reads and cancels it, no more")
    return thing


class Secrets(Struct, frozen=True):
    """The three secrets of a state folder, as the text that is in their files. Never printed, never logged."""

    auth_token: str
    host_token: str
    agent_key: str

    def __repr__(self) -> str:
        return "Secrets(…)"


def same_secret(given: str, right: str) -> bool:
    """Compares digests in constant time, so that neither content nor length shows in the time."""
    return hmac.compare_digest(_digest(given), _digest(right))


def principal_of_token(secrets: Secrets, token: str) -> Principal | None:
    """Who holds `token` (of any of the three kinds), or None."""
    if same_secret(token, secrets.host_token):
        return HOST
    if same_secret(token, secrets.auth_token):
        return CLIENT
    agent_id, _, _ = token.rpartition(".")
    if AGENT_ID.fullmatch(agent_id) and same_secret(token, agent_token(secrets.agent_key, agent_id)):
        return Principal("agent", agent_id)
    return None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
