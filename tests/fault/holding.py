"""Methods for a daemon of a test that hold its backups in their middle: `--methods tests.fault.holding`."""

import threading

from carserver.rpc.method import method
from carserver.rpc.session import Session
from carserver.stores.backup import Backups

_POLL_S = 0.005
_held, _released = threading.Event(), threading.Event()
_go_on = Backups._go_on


def _hold(backups: Backups) -> None:
    _held.set()
    while not _released.wait(_POLL_S):
        _go_on(backups)
    _go_on(backups)


@method("test.hold_backups")
def hold_backups(session: Session) -> None:
    """From now on a backup is held once its first pages are copied, until it is given up or released."""
    _held.clear()
    _released.clear()
    Backups._go_on = _hold  # type: ignore[method-assign, assignment]


@method("test.is_backup_held")
def is_backup_held(session: Session) -> bool:
    """Whether one is held by now."""
    return _held.is_set()


@method("test.release_backups")
def release_backups(session: Session) -> None:
    """They go on."""
    _released.set()
