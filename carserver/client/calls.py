"""What the generated methods (`api`, `api_sync`) are made on: something that calls; and what of params is sent."""

from typing import Any, Protocol

from msgspec import UNSET


class Calls(Protocol):
    """Asks the daemon, and waits for its answer."""

    async def call(self, method: str, params: Any, *, result_type: Any, again: bool) -> Any:
        """The answer, as `result_type`.

        Args:
            method: its name.
            params: an object, an array, or None.
            result_type: what the answer is decoded as.
            again: whether it may be sent again when the connection was lost before it was answered: nothing more comes
                of twice than of once.
        """
        ...


class BlockingCalls(Protocol):
    """The same for who has no loop."""

    def call(self, method: str, params: Any, *, result_type: Any, again: bool) -> Any:
        """See `Calls.call`."""
        ...


def given(params: dict[str, Any], /, **optional: Any) -> dict[str, Any]:
    """The params that are sent: those that are not UNSET, and of the optional ones those that are not None."""
    sent = {name: value for name, value in params.items() if value is not UNSET}
    return sent | {name: value for name, value in optional.items() if value is not None}
