"""What the service manager is told: that the daemon is ready, or stops (sd_notify(3), `Type=notify`)."""

import logging
import os
import socket

log = logging.getLogger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str, status: str) -> None:
    """Sends one datagram to the socket that NOTIFY_SOCKET names; nothing where there is none.

    Never waits and never fails: a manager that cannot be told is a warning in the log.

    Args:
        state: READY or STOPPING.
        status: one line for a person, which `systemctl status` shows.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # a name in the abstract namespace begins with a zero byte
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(f"{state}\nSTATUS={status}".encode(), address)
    except OSError as error:
        log.warning("the service manager at NOTIFY_SOCKET cannot be told %s: %s", state, error.strerror or error)
