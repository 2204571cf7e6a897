"""The host board on the wire: who works here, on what devices, what waits for a person's word, and what happened.

`host.*` of the CAR dialect (contract, section 10). Times are RFC 3339 strings.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.runs import Id, Limit, Name

AgentStatus = Literal["idle", "running", "waiting_for_approval", "paused", "completed", "errored", "stopped"]
ApprovalStatus = Literal["pending", "resolved"]
Pid = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class HostAgent(Struct, frozen=True, kw_only=True):
    """An agent that a session has registered: `session_id` is that session's `client_id`."""

    id: str
    name: str
    kind: str
    capabilities: list[str]
    project: str | UnsetType = UNSET
    pid: int | UnsetType = UNSET
    display: Raw | UnsetType = UNSET
    metadata: Raw
    status: AgentStatus
    current_task: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    session_id: str
    updated_at: str


class HostAgentChange(HostAgent, frozen=True, kw_only=True):
    """Payload of the event `agent.status_changed`: the agent, and what was given to be told along with it."""

    payload: Raw | UnsetType = UNSET


class HostDevice(Struct, frozen=True, kw_only=True):
    """A device that a session has registered; its `status` is in the session's own words."""

    id: str
    name: str
    kind: str
    capabilities: list[str]
    status: str | UnsetType = UNSET
    metadata: Raw
    session_id: str
    updated_at: str


class Approval(Struct, frozen=True, kw_only=True):
    """What somebody asked a person to decide. `options` are the resolutions, where it is an array of strings."""

    id: str
    agent_id: str | None
    action: str
    details: Raw
    options: Raw
    status: ApprovalStatus
    created_at: str
    system_level: bool
    resolution: str | UnsetType = UNSET
    resolved_at: str | UnsetType = UNSET
    resolved_by: str | UnsetType = UNSET


class HostEvent(Struct, frozen=True, kw_only=True):
    """Params of `host.event`. `sequence` grows by one from event to event, from 1 on, for the life of the daemon."""

    id: str
    sequence: int
    timestamp: str
    kind: str
    agent_id: str | None
    message: str
    payload: Raw


class HostIdentity(Struct, frozen=True, kw_only=True):
    """The daemon itself; it was started by no manifest."""

    version: str
    pid: int
    manifest_path: None = None
    manifest_role: Literal["none"] = "none"


class HostState(Struct, frozen=True, kw_only=True):
    """The whole board: `events` are the newest, `event_sequence` is that of the last; `approvals` are pending."""

    subscribed: Literal[True] = True
    agents: list[HostAgent]
    devices: list[HostDevice]
    approvals: list[Approval]
    events: list[HostEvent]
    pending_signins: list[Raw]
    event_sequence: int
    identity: HostIdentity


class ReadHostEvents(Struct, frozen=True, kw_only=True):
    """Params of `host.events`."""

    limit: Limit | None = None


class HostEvents(Struct, frozen=True, kw_only=True):
    """The newest events, the newest of them last."""

    events: list[HostEvent]


class ListApprovals(Struct, frozen=True, kw_only=True):
    """Params of `host.approvals`; `all`: those resolved that are kept, too."""

    all: bool | None = None


class ApprovalList(Struct, frozen=True, kw_only=True):
    """Approvals, oldest first."""

    approvals: list[Approval]


class RegisterAgent(Struct, frozen=True, kw_only=True):
    """Params of `host.register_agent`."""

    name: Name
    kind: Name
    id: Name | None = None
    capabilities: list[str] | None = None
    project: Id | None = None
    pid: Pid | None = None
    display: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class HostAgentRef(Struct, frozen=True, kw_only=True):
    """Params of `host.unregister_agent`."""

    agent_id: Id


class SetAgentStatus(Struct, frozen=True, kw_only=True):
    """Params of `host.set_status`."""

    agent_id: Id
    status: AgentStatus
    current_task: str | None = None
    message: str | None = None
    payload: Raw | UnsetType = UNSET


class RegisterDevice(Struct, frozen=True, kw_only=True):
    """Params of `host.register_device`."""

    id: Name | None = None
    name: Name | None = None
    kind: Name | None = None
    capabilities: list[str] | None = None
    status: Name | None = None
    metadata: Raw | UnsetType = UNSET


class UpdateDevice(Struct, frozen=True, kw_only=True):
    """Params of `host.update_device`: `id` or `device_id`, and what is to be another."""

    id: Name | None = None
    device_id: Name | None = None
    name: Name | None = None
    kind: Name | None = None
    capabilities: list[str] | None = None
    status: Name | None = None
    metadata: Raw | UnsetType = UNSET


class Notify(Struct, frozen=True, kw_only=True):
    """Params of `host.notify`."""

    kind: Name | None = None
    agent_id: Name | None = None
    message: str | None = None
    payload: Raw | UnsetType = UNSET


class AskApproval(Struct, frozen=True, kw_only=True):
    """Params of `host.request_approval`."""

    action: Annotated[str, msgspec.Meta(min_length=1)]
    agent_id: Name | None = None
    details: Raw | UnsetType = UNSET
    options: Raw | UnsetType = UNSET
    system_level: bool | None = None


class AnswerApproval(Struct, frozen=True, kw_only=True):
    """Params of `host.resolve_approval`."""

    approval_id: Id
    resolution: Name


class HostOk(Struct, frozen=True, kw_only=True):
    """It is done."""

    ok: Literal[True] = True
