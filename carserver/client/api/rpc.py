"""`rpc.*` of the daemon, typed: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""

from typing import Any

from carserver.client.calls import Calls


class Rpc:
    """`rpc.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def discover(self) -> dict[str, Any]:
        """The OpenRPC 1.3 document of this daemon, generated from its method table; also at `/openrpc.json`."""
        answer: dict[str, Any] = await self._calls.call("rpc.discover", None, result_type=dict[str, Any], again=True)
        return answer
