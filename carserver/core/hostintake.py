"""What is said to the host board, checked, as the board keeps it (contract, section 10). Pure."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import replace

from carserver.config import Settings
from carserver.protocol.codec import check_name, check_text, encode, nests_deeper
from carserver.protocol.errors import invalid_params, limit_exceeded
from carserver.protocol.host import (
    Approval,
    AskApproval,
    HostAgent,
    HostDevice,
    Notify,
    RegisterAgent,
    RegisterDevice,
    SetAgentStatus,
    UpdateDevice,
)

EVENT_KINDS = frozenset(
    {
        "agent.registered",
        "agent.status_changed",
        "agent.unregistered",
        "device.registered",
        "device.updated",
        "device.unregistered",
        "approval.requested",
        "approval.resolved",
    }
)
"""The events that say what the daemon itself knows: nobody else says these."""
NOTIFICATION = "notification"

_OPTIONS = Raw(b'["approve","deny"]')
_NO_METADATA = Raw(b"{}")
_NULL = Raw(b"null")
_DEVICE = "device"

_words = msgspec.json.Decoder(list[str])


def value(given: Raw | UnsetType, settings: Settings, at: str) -> Raw | UnsetType:
    """A JSON value as compact JSON; null is as good as none.

    Raises:
        RpcError: limit_exceeded.
    """
    if given is UNSET:
        return UNSET
    raw = msgspec.json.format(bytes(given), indent=-1)
    if len(raw) > settings.metadata_bytes:
        raise limit_exceeded("metadata_bytes", len(raw), settings.metadata_bytes, at)
    if nests_deeper(raw, settings.value_nesting):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, at)
    return UNSET if raw == b"null" else Raw(raw)


def _text(given: str | None, settings: Settings, at: str) -> str | UnsetType:
    check_text(given or "", "board_text_bytes", settings.board_text_bytes, at)
    return UNSET if given is None else given


def _capabilities(given: Sequence[str] | None, settings: Settings) -> list[str]:
    found = list(given or ())
    size = len(encode(found))
    if size > settings.metadata_bytes:
        raise limit_exceeded("metadata_bytes", size, settings.metadata_bytes, "capabilities")
    for place, name in enumerate(found):
        check_name(name, settings.name_chars, f"capabilities[{place}]")
    return found


def agent(params: RegisterAgent, new_id: str, session_id: str, now: str, settings: Settings) -> HostAgent:
    """The agent of a `host.register_agent`; `new_id` is for one that names none.

    Raises:
        RpcError: limit_exceeded, invalid_params.
    """
    return HostAgent(
        id=params.id or new_id,
        name=params.name,
        kind=params.kind,
        capabilities=_capabilities(params.capabilities, settings),
        project=UNSET if params.project is None else params.project,
        pid=UNSET if params.pid is None else params.pid,
        display=value(params.display, settings, "display"),
        metadata=value(params.metadata, settings, "metadata") or _NO_METADATA,
        status="idle",
        session_id=session_id,
        updated_at=now,
    )


def with_status(there: HostAgent, params: SetAgentStatus, now: str, settings: Settings) -> HostAgent:
    """An agent after a `host.set_status`, which says all of its status: what it leaves out is not there any more.

    Raises:
        RpcError: limit_exceeded.
    """
    return replace(
        there,
        status=params.status,
        current_task=_text(params.current_task, settings, "current_task"),
        message=_text(params.message, settings, "message"),
        updated_at=now,
    )


def device(params: RegisterDevice, new_id: str, session_id: str, now: str, settings: Settings) -> HostDevice:
    """The device of a `host.register_device`; one without a name is called by its id.

    Raises:
        RpcError: limit_exceeded, invalid_params.
    """
    id_ = params.id or new_id
    return HostDevice(
        id=id_,
        name=params.name or id_,
        kind=params.kind or _DEVICE,
        capabilities=_capabilities(params.capabilities, settings),
        status=UNSET if params.status is None else params.status,
        metadata=value(params.metadata, settings, "metadata") or _NO_METADATA,
        session_id=session_id,
        updated_at=now,
    )


def updated(there: HostDevice, params: UpdateDevice, now: str, settings: Settings) -> HostDevice:
    """A device after a `host.update_device`: what that leaves out stays.

    Raises:
        RpcError: limit_exceeded, invalid_params.
    """
    capabilities = params.capabilities
    return replace(
        there,
        name=params.name or there.name,
        kind=params.kind or there.kind,
        capabilities=there.capabilities if capabilities is None else _capabilities(capabilities, settings),
        status=there.status if params.status is None else params.status,
        metadata=value(params.metadata, settings, "metadata") or there.metadata,
        updated_at=now,
    )


def named(params: UpdateDevice) -> str:
    """The device that is meant.

    Raises:
        RpcError: invalid_params.
    """
    if params.id is not None and params.device_id not in (None, params.id):
        raise invalid_params("device_id", f"{params.device_id!r} is not the id that stands beside it, {params.id!r}")
    name = params.id or params.device_id
    if name is None:
        raise invalid_params("id", "which device? give its id")
    return name


def kind_of(params: Notify) -> str:
    """The kind of the event that a `host.notify` makes.

    Raises:
        RpcError: invalid_params for a kind by which the daemon itself tells what is true.
    """
    if params.kind in EVENT_KINDS:
        raise invalid_params("kind", f"{params.kind!r} is what the daemon says itself; choose another word")
    return params.kind or NOTIFICATION


def value_or_null(given: Raw | UnsetType, settings: Settings, at: str) -> Raw:
    """A JSON value as compact JSON; null where there is none.

    Raises:
        RpcError: limit_exceeded.
    """
    return value(given, settings, at) or _NULL


def text_of(given: str | None, settings: Settings, at: str) -> str:
    """A text; empty where there is none.

    Raises:
        RpcError: limit_exceeded.
    """
    return _text(given, settings, at) or ""


def approval(params: AskApproval, new_id: str, now: str, settings: Settings) -> Approval:
    """The approval of a `host.request_approval`.

    Raises:
        RpcError: limit_exceeded, invalid_params.
    """
    check_text(params.action, "board_text_bytes", settings.board_text_bytes, "action")
    options = value(params.options, settings, "options") or _OPTIONS
    for place, word in enumerate(words_of(options)):
        if not word:
            raise invalid_params(f"options[{place}]", "it is empty")
        check_name(word, settings.name_chars, f"options[{place}]")
    return Approval(
        id=new_id,
        agent_id=params.agent_id,
        action=params.action,
        details=value_or_null(params.details, settings, "details"),
        options=options,
        status="pending",
        created_at=now,
        system_level=params.system_level is True,
    )


def words_of(options: Raw) -> list[str]:
    """The resolutions that there are; empty where any will do."""
    try:
        return _words.decode(bytes(options))
    except msgspec.ValidationError:
        return []
