"""The turn that an action of a proposal is of its run: what was called, with what, and what came of it.

That client's agents record what their models say, and rely on the daemon for what their tools did (its documents:
turns are recorded once `runs.start` was answered). The handle's own events stand in the log as well; `handle` leads
from one to the other.
"""

from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import RecordTurns
from carserver.core.principals import Principal
from carserver.core.proposalanswer import Output
from carserver.core.proposals import Action
from carserver.core.runs import TURN
from carserver.core.runstore import Clock, RunStore
from carserver.core.turns import NOT_RUN, take_in_turn
from carserver.protocol.codec import encode
from carserver.protocol.errors import RpcError
from carserver.protocol.proposals import ActionStatus


class _ActionTurn(Struct, frozen=True, kw_only=True):
    action_id: str
    tool: str
    parameters: Raw
    output: Raw
    status: ActionStatus
    handle: str | UnsetType = UNSET


class _Error(Struct, frozen=True):
    """An output, in place of one: the client's documents have it so."""

    error: str


class ActionTurns:
    """Records them.

    Args:
        runs: Whose logs they stand in.
        clock: Time.
        settings: `turns`, `run_events`, and those of a turn.
    """

    def __init__(self, runs: RunStore, clock: Clock, settings: Settings) -> None:
        self._runs = runs
        self._clock = clock
        self._settings = settings

    async def record(
        self,
        run_id: str,
        action: Action,
        status: ActionStatus,
        outcome: Output | str,
        handle: str | None,
        principal: Principal,
        by: Attendant,
    ) -> str | None:
        """Records the turn of an action that was tried; why it could not be.

        `status` is how the try ended, `outcome` the output, or the error.
        """
        turn = _ActionTurn(
            action_id=action.id,
            tool=action.tool,
            parameters=Raw(action.parameters),
            output=Raw(encode(_Error(outcome)) if isinstance(outcome, str) else outcome.told()),
            status=status,
            handle=UNSET if handle is None else handle,
        )
        try:
            taken = take_in_turn(Raw(encode(turn)), TURN, NOT_RUN, self._settings, "turn")
            if taken is None:
                return "the turn is too large"
            command = RecordTurns(
                run_id=run_id,
                principal=principal,
                now_ms=self._clock.now_ms(),
                turns=[taken],
                run_turns=self._settings.turns,
                run_events=self._settings.run_events,
            )
            await self._runs.change(command, by)
        except RpcError as error:
            return error.message
        return None
