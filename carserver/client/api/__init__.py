"""The daemon's methods, typed: a class and a module for each namespace, made on anything that calls.

*Generated from the daemon's method table by `scripts/docs`; do not edit.* What is left out (None, or UNSET where null
means something) is not sent. `Any` is any JSON value, `msgspec.Raw` included. Results have JSON of any shape as
`msgspec.Raw`, by the bytes that came; `msgspec.json.decode` makes a value of it.
"""

from collections.abc import Mapping

from carserver.client.api.outputs import Outputs
from carserver.client.api.rpc import Rpc
from carserver.client.api.runs import Runs
from carserver.client.api.server import Server
from carserver.client.api.session import Session
from carserver.client.api.tools import Tools

__all__ = ["AGAIN", "Outputs", "Rpc", "Runs", "Server", "Session", "Tools"]

AGAIN: Mapping[str, bool | str] = {
    "session.auth": True,
    "runs.create": "idempotency_key",
    "runs.record": "batch_id",
    "runs.get": True,
    "runs.events": True,
    "runs.list": True,
    "runs.fail": True,
    "runs.cancel": True,
    "runs.resume": True,
    "runs.trace.subscribe": True,
    "runs.trace.unsubscribe": True,
    "runs.watch": True,
    "runs.unwatch": True,
    "tools.register": True,
    "tools.unregister": True,
    "tools.list": True,
    "tools.invoke": "idempotency_key",
    "tools.call": "idempotency_key",
    "tools.poll": "after",
    "tools.cancel": True,
    "tools.status": True,
    "tools.handles": True,
    "tools.stream.subscribe": True,
    "tools.stream.unsubscribe": True,
    "outputs.append": "idempotency_key",
    "outputs.get": True,
    "outputs.latest": True,
    "outputs.list": True,
    "outputs.read": True,
    "rpc.discover": True,
    "server.status": True,
    "server.ping": True,
}
"""What may be sent again where the answer was lost: nothing more comes of twice than of once. A name is that of the
param with which it is so."""
