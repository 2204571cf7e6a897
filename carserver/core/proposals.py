"""What a proposal is: actions as a graph, checked, and how far each of them is. Pure; contract, section 10.

`ENTAILS` is the whole of what may follow from the end of an action's try.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.protocol.codec import check_name
from carserver.protocol.errors import invalid_params, limit_exceeded
from carserver.protocol.proposals import (
    ActionStatus,
    ActionType,
    FailureBehavior,
    GivenAction,
    GivenProposal,
    InvocationMode,
)

RETRIES = 3
"""Tries after the first one where an action does not say how many (the client's documents)."""
_ID_CHARS = 12  # of an id that is made up, hexadecimal (the same)
_NOTHING = (UNSET, Raw(b"null"))
_SHOWN = 8  # actions of a circle that its message names


class Action(NamedTuple):
    """One action; `dependencies` are places among the proposal's actions."""

    id: str
    tool: str
    parameters: bytes
    dependencies: tuple[int, ...] = ()
    timeout_ms: int | None = None
    retries: int = RETRIES
    behavior: FailureBehavior = FailureBehavior.ABORT
    detached: bool = False


class Plan(NamedTuple):
    """A proposal that may run: its actions in the order given, what depends on each, and what each depends on.

    `before` are sets of places as bits, of all that has to succeed before an action, directly or not.
    """

    id: str
    actions: Sequence[Action]
    dependents: Sequence[Sequence[int]]
    before: Sequence[int]

    @property
    def size(self) -> int:
        """About how many bytes it keeps."""
        return sum(1024 + len(action.parameters) for action in self.actions)


def plan(given: GivenProposal, settings: Settings, new_id: Callable[[], str]) -> Plan:
    """A proposal, checked; `new_id` gives random hexadecimal characters, for ids that were left out.

    Raises:
        RpcError: invalid_params for what is not served or cannot be, with its place; limit_exceeded.
    """
    count, most = len(given.actions), settings.proposal_actions
    if count > most:
        raise limit_exceeded("proposal_actions", count, most, "proposal.actions")
    if given.id is not None:
        check_name(given.id, settings.name_chars, "proposal.id")
    places: dict[str, int] = {}
    for place, action in enumerate(given.actions):
        at = f"proposal.actions[{place}]"
        _check_served(action, at)
        if action.id is not None:
            _check_id(action.id, places, f"{at}.id", settings)
        places[new_id()[:_ID_CHARS] if action.id is None else action.id] = place
    actions = [
        _action(id_, given.actions[place], places, f"proposal.actions[{place}]", settings)
        for id_, place in places.items()
    ]
    dependents: list[list[int]] = [[] for _ in actions]
    for place, checked in enumerate(actions):
        for dependency in checked.dependencies:
            dependents[dependency].append(place)
    proposal_id = new_id()[:_ID_CHARS] if given.id is None else given.id
    return Plan(proposal_id, actions, dependents, _before(actions, dependents))


def _check_served(action: GivenAction, at: str) -> None:
    if action.type is not ActionType.TOOL_CALL:
        raise invalid_params(f"{at}.type", f"{action.type.value!r} is not served, only 'tool_call': no state is kept")
    if action.preconditions:
        raise invalid_params(f"{at}.preconditions", "they are not served: no state is kept that they could be true of")
    if action.state_dependencies:
        words = "they are not served: no state is kept; `dependencies` are ids of actions"
        raise invalid_params(f"{at}.state_dependencies", words)
    if not action.tool:
        raise invalid_params(f"{at}.tool", "a tool_call names its tool")


def _check_id(id_: str, taken: dict[str, int], at: str, settings: Settings) -> None:
    if not id_:
        raise invalid_params(at, "it is empty; leave it out, and one is made up")
    check_name(id_, settings.name_chars, at)
    if id_ in taken:
        raise invalid_params(at, f"{id_!r} is the id of proposal.actions[{taken[id_]}] already")


def _action(id_: str, given: GivenAction, places: dict[str, int], at: str, settings: Settings) -> Action:
    assert given.tool is not None  # noqa: S101 - `_check_served` has refused
    check_name(given.tool, settings.name_chars, f"{at}.tool")
    return Action(
        id=id_,
        tool=given.tool,
        parameters=b"{}" if given.parameters in _NOTHING else bytes(given.parameters),
        dependencies=_dependencies(id_, given.dependencies or [], places, f"{at}.dependencies", settings),
        timeout_ms=given.timeout_ms,
        retries=RETRIES if given.max_retries is None else given.max_retries,
        behavior=given.failure_behavior or FailureBehavior.ABORT,
        detached=given.invocation_mode not in (None, InvocationMode.ONE_SHOT),
    )


def _dependencies(id_: str, given: list[str], places: dict[str, int], at: str, settings: Settings) -> tuple[int, ...]:
    """Places; one that is named twice counts once."""
    if len(given) > settings.proposal_actions:
        raise limit_exceeded("proposal_actions", len(given), settings.proposal_actions, at)
    for number, name in enumerate(given):
        if name == id_:
            raise invalid_params(f"{at}[{number}]", f"action {id_!r} depends on itself")
        if name not in places:
            shown = name if len(name) <= settings.name_chars else f"{name[: settings.name_chars]}…"
            raise invalid_params(f"{at}[{number}]", f"no action of this proposal has the id {shown!r}")
    return tuple(places[name] for name in dict.fromkeys(given))


def _before(actions: Sequence[Action], dependents: Sequence[Sequence[int]]) -> list[int]:
    """See `Plan.before`.

    Raises:
        RpcError: invalid_params, for a circle.
    """
    before = [0] * len(actions)
    missing = [len(action.dependencies) for action in actions]
    free = [place for place, count in enumerate(missing) if not count]
    for place in free:  # it grows
        for dependent in dependents[place]:
            before[dependent] |= before[place] | 1 << place
            missing[dependent] -= 1
            if not missing[dependent]:
                free.append(dependent)
    if len(free) < len(actions):
        raise _circle(actions, missing)
    return before


def _circle(actions: Sequence[Action], missing: Sequence[int]) -> Exception:
    """Whatever is not free depends on something that is not: going there and on, one comes by some place again."""
    place = next(place for place, count in enumerate(missing) if count)
    way: list[int] = []
    while place not in way:
        way.append(place)
        place = next(dependency for dependency in actions[place].dependencies if missing[dependency])
    circle = way[way.index(place) :]
    names = [actions[one].id for one in circle]
    shown = names if len(names) <= _SHOWN else [*names[:_SHOWN], f"… ({len(names)} in all)"]
    at = f"proposal.actions[{place}].dependencies"
    return invalid_params(at, f"they go in a circle: {' → '.join([*shown, names[0]])}")


class Happened(Enum):
    """How the try of an action ended; `status` is what the action has if that is its last."""

    SUCCEEDED = "succeeded", ActionStatus.SUCCEEDED
    FAILED = "failed", ActionStatus.FAILED
    REFUSED = "refused", ActionStatus.FAILED  # before anything ran; the same would be refused again
    TERMINAL = "terminal", ActionStatus.FAILED  # and trying again will not help, its host says
    CANCELLED = "cancelled", ActionStatus.CANCELLED
    STOPPED = "stopped", ActionStatus.SKIPPED  # before anything ran: the proposal has ended, or the daemon does

    def __init__(self, _: str, status: ActionStatus) -> None:
        self.status = status


class Entails(Enum):
    """What follows from it."""

    GO_ON = auto()
    RETRY = auto()  # as long as tries are left, then ABORT
    SKIP = auto()  # it, and what depends on it
    ABORT = auto()


ENTAILS: dict[tuple[Happened, FailureBehavior], Entails] = {
    (Happened.SUCCEEDED, FailureBehavior.ABORT): Entails.GO_ON,
    (Happened.SUCCEEDED, FailureBehavior.RETRY): Entails.GO_ON,
    (Happened.SUCCEEDED, FailureBehavior.SKIP): Entails.GO_ON,
    (Happened.FAILED, FailureBehavior.ABORT): Entails.ABORT,
    (Happened.FAILED, FailureBehavior.RETRY): Entails.RETRY,
    (Happened.FAILED, FailureBehavior.SKIP): Entails.SKIP,
    (Happened.REFUSED, FailureBehavior.ABORT): Entails.ABORT,
    (Happened.REFUSED, FailureBehavior.RETRY): Entails.ABORT,
    (Happened.REFUSED, FailureBehavior.SKIP): Entails.SKIP,
    (Happened.TERMINAL, FailureBehavior.ABORT): Entails.ABORT,
    (Happened.TERMINAL, FailureBehavior.RETRY): Entails.ABORT,
    (Happened.TERMINAL, FailureBehavior.SKIP): Entails.ABORT,
    (Happened.CANCELLED, FailureBehavior.ABORT): Entails.ABORT,
    (Happened.CANCELLED, FailureBehavior.RETRY): Entails.ABORT,  # somebody wants it to end
    (Happened.CANCELLED, FailureBehavior.SKIP): Entails.SKIP,
    (Happened.STOPPED, FailureBehavior.ABORT): Entails.ABORT,
    (Happened.STOPPED, FailureBehavior.RETRY): Entails.ABORT,
    (Happened.STOPPED, FailureBehavior.SKIP): Entails.ABORT,
}


class Step(NamedTuple):
    """What is to be done now: actions to try, for the first time or again, and such that run and are to be stopped."""

    start: Sequence[int] = ()
    stop: Sequence[int] = ()


class Progress:
    """How far the actions of a plan are.

    `statuses` has None for what is not over; `causes`, of what never ran, the action whose end is to blame; `tries`
    how often each was tried. `ended_by` is the action that ended the proposal before its time.
    """

    def __init__(self, of: Plan) -> None:
        self._plan = of
        self.statuses: list[ActionStatus | None] = [None] * len(of.actions)
        self.causes: list[int | None] = [None] * len(of.actions)
        self.tries = [0] * len(of.actions)
        self.ended_by: int | None = None
        self._missing = [len(action.dependencies) for action in of.actions]
        self._running: dict[int, None] = {}
        self._open = len(of.actions)

    @property
    def over(self) -> bool:
        """Whether every action has its status."""
        return not self._open

    def begin(self) -> Step:
        """What depends on nothing is tried at once."""
        return Step(start=self._start([place for place, count in enumerate(self._missing) if not count]))

    def take(self, place: int, happened: Happened) -> Step:
        """The try of a running action has ended."""
        if self.ended_by is not None:
            self._settle(place, happened.status, cause=self.ended_by if happened is Happened.STOPPED else None)
            return Step()
        action = self._plan.actions[place]
        match ENTAILS[happened, action.behavior]:
            case Entails.GO_ON:
                self._settle(place, happened.status)
                return Step(start=self._start(self._freed_by(place)))
            case Entails.RETRY if self.tries[place] <= action.retries:
                return Step(start=self._start([place]))
            case Entails.SKIP:
                self._settle(place, ActionStatus.SKIPPED)
                self._skip_dependents(place)
                return Step()
        self._settle(place, happened.status)
        self.ended_by = place
        for other, status in enumerate(self.statuses):
            if status is None and other not in self._running:
                self._settle(other, ActionStatus.SKIPPED, cause=place)
        return Step(stop=[*self._running])

    def _start(self, places: Sequence[int]) -> Sequence[int]:
        for place in places:
            self._running[place] = None
            self.tries[place] += 1
        return places

    def _freed_by(self, place: int) -> list[int]:
        freed = []
        for dependent in self._plan.dependents[place]:
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                freed.append(dependent)
        return freed

    def _skip_dependents(self, cause: int) -> None:
        """None of them runs: it waits for `cause`."""
        for place, before in enumerate(self._plan.before):
            if before >> cause & 1 and self.statuses[place] is None:
                self._settle(place, ActionStatus.SKIPPED, cause=cause)

    def _settle(self, place: int, status: ActionStatus, cause: int | None = None) -> None:
        self.statuses[place] = status
        self.causes[place] = cause
        self._running.pop(place, None)
        self._open -= 1
