"""The codes that a WebSocket is closed with (RFC 6455, 7.4.1; contract, section 4). The reason names the limit."""

from enum import IntEnum


class Close(IntEnum):
    """A close code that is sent."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_DATA = 1007
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL = 1011
    RESTARTING = 1012  # reconnect
    TRY_AGAIN_LATER = 1013  # too slow, or overloaded
