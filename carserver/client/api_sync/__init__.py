"""The daemon's methods, typed, for who has no loop: the same as `api`, each of them blocking until it is answered.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""

from carserver.client.api_sync.outputs import Outputs
from carserver.client.api_sync.rpc import Rpc
from carserver.client.api_sync.runs import Runs
from carserver.client.api_sync.server import Server
from carserver.client.api_sync.session import Session
from carserver.client.api_sync.tools import Tools

__all__ = ["Outputs", "Rpc", "Runs", "Server", "Session", "Tools"]
