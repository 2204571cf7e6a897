"""`rpc.*` of the daemon, typed, blocking: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""

from typing import Any

from carserver.client.calls import BlockingCalls


class Rpc:
    """`rpc.*`."""

    def __init__(self, calls: BlockingCalls) -> None:
        self._calls = calls

    def discover(self) -> dict[str, Any]:
        """The OpenRPC 1.3 document of this daemon, generated from its method table; also at `/openrpc.json`."""
        answer: dict[str, Any] = self._calls.call("rpc.discover", None, result_type=dict[str, Any], again=True)
        return answer
