"""Opens the database: sound as it is, or what can be trusted of a damaged one, which is set aside and kept.

Setting aside ends with one rename, and can be cut off anywhere before it: until the new file is complete and on disk,
nothing was touched; from then on it has a name that tells what is left to do, and the next start does that.

    carserver.db                            the database
    carserver.db.salvage                    being made of what can be trusted; worth nothing
    carserver.db.carried-20260101T000000Z   made: the database is to be set aside, and this is to take its place
    carserver.db.damaged-20260101T000000Z   the file that was set aside, with what is beside it; kept for ever
"""

import contextlib
import itertools
import logging
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from carserver.config import Settings
from carserver.core.edits import OpenHandle, StoredApproval
from carserver.core.ports import Damaged
from carserver.core.runs import LiveRun
from carserver.stores.approvals import read_approvals
from carserver.stores.damage import Unreadable, mark_of
from carserver.stores.handles import read_open
from carserver.stores.inspection import LEAST_BYTES, MAY_RUN_TWICE, beside, inspect, size_of
from carserver.stores.rows import read_live, renew_epochs
from carserver.stores.salvage import Salvage
from carserver.stores.schema import DamagedFile, StorageError, cannot_open, check_version, open_writer

log = logging.getLogger("carserver.storage")

SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL", "memory": "OFF"}
_SALVAGE, _CARRIED, _ASIDE = ".salvage", ".carried-", ".damaged-"
_FILES = ("", "-wal", "-shm", "-journal")
_NAMES = 1_000  # of lost runs that are told; the rest are counted
_NAMES_A_LINE = 50
_PIECE_BYTES = 1024 * 1024


class Opened(NamedTuple):
    """The database: the one connection that writes, live runs, open handles, and all approvals."""

    connection: sqlite3.Connection
    live: list[LiveRun]
    open_handles: list[OpenHandle]
    approvals: list[StoredApproval]


def open_database(path: Path, settings: Settings) -> Opened:
    """Opens it; where it is damaged, what can be trusted of it.

    Raises:
        StorageError: it is none of ours, or newer, or there is no room; it is as it was.
    """
    if path.is_symlink():  # SQLite keeps the log beside what it points to; and there would be no one lock
        raise StorageError(f"{path} is a symbolic link: put the database itself there, or link the whole folder")
    _finish(path)
    mark = mark_of(path)
    marked = mark.exists()
    try:
        opened = _open_sound(path, settings, thorough=marked)
    except DamagedFile:
        _read_through(path)
        try:
            opened = _open_sound(path, settings, thorough=True)
        except DamagedFile as damaged:
            _set_aside(path, str(damaged))
            opened = _open_again(path, settings)
    with contextlib.suppress(OSError):  # then the next start checks all once more
        mark.unlink(missing_ok=True)
    return opened


def _open_sound(path: Path, settings: Settings, *, thorough: bool) -> Opened:
    _roll_back(path)
    inspect(path, settings.check_bytes, thorough=thorough)
    opened = _open(path, settings)
    if thorough:
        log.warning("damage was met in %s, but all of it was checked now, and is sound: it stays in use", path)
    return opened


def _roll_back(path: Path) -> None:
    """A kill while the file is made, when it has no write-ahead log yet, leaves a journal: readers cannot undo that."""
    if not size_of(beside(path, "-journal")) or size_of(beside(path, "-wal")) or size_of(path) < LEAST_BYTES:
        return
    alone = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        with contextlib.closing(alone), contextlib.suppress(DamagedFile, *Unreadable):  # half of a change may be in it
            check_version(alone, path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except Unreadable as error:
        raise cannot_open(path, error) from error


def _read_through(path: Path) -> None:
    """Asks the disk itself, while nobody has the file open: SQLite takes a read that fails for damage.

    Raises:
        StorageError: it is the disk that fails, and a sound file must not be set aside for that.
    """
    try:
        for file in (path, beside(path, "-wal")):
            with contextlib.suppress(FileNotFoundError), file.open("rb", buffering=0) as content:
                while content.read(_PIECE_BYTES):
                    pass
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}; see that its disk works") from error


def _open(path: Path, settings: Settings, *, made_now: bool = False) -> Opened:
    connection = open_writer(path, synchronous=SYNCHRONOUS[settings.durability])
    try:
        if renew_epochs(connection) and not made_now:
            log.warning(
                "%s is a copy that is used for the first time, and does not know what was done since: %s",
                path,
                MAY_RUN_TWICE,
            )
        return Opened(connection, read_live(connection), read_open(connection), read_approvals(connection))
    except Damaged as error:
        connection.close()
        raise DamagedFile(error.message) from error
    except Unreadable as error:
        connection.close()
        raise cannot_open(path, error) from error


def _open_again(path: Path, settings: Settings) -> Opened:
    try:
        return _open(path, settings, made_now=True)
    except DamagedFile as error:
        raise StorageError(f"cannot open {path}, which was made a moment ago: {error}; is the disk failing?") from error


# Setting aside.


def _set_aside(path: Path, problem: str) -> None:
    log.error("%s is damaged: %s; looking for what can be trusted of it", path, problem)
    new = path.with_name(path.name + _SALVAGE)
    salvage = Salvage(path)
    try:
        _remove(new)
        salvage.into(new)
        sync(new)
        _tell_lost(salvage)
        when = _stamp(path)
        new.rename(path.with_name(f"{path.name}{_CARRIED}{when}"))
        sync(path.parent)
    except (sqlite3.Error, OSError) as error:
        with contextlib.suppress(OSError):
            _remove(new)
        raise StorageError(
            f"{path} is damaged ({problem}), and what can be trusted of it could not be written beside it: {error};"
            " it was not touched: make room, or restore a backup of it"
        ) from error
    _finish(path)
    aside = path.with_name(f"{path.name}{_ASIDE}{when}")
    log.error("%s", _summary(path, aside, problem, salvage))


def _summary(path: Path, aside: Path, problem: str, salvage: Salvage) -> str:
    if salvage.unreadable:
        carried = f"its runs cannot be read ({salvage.unreadable}); {salvage.outputs} outputs were carried over"
    else:
        carried = f"{salvage.runs} runs ({salvage.events} events) and {salvage.outputs} outputs were carried over"
        carried += f", {len(salvage.lost)} runs and {salvage.lost_outputs} outputs were not, as they are not whole"
    if salvage.forgotten:
        carried += "; a batch that was recorded before, and is sent again now, may be recorded twice"
    if salvage.forgotten_keys:
        carried += f"; {MAY_RUN_TWICE}"
    if salvage.unclosed:
        carried += "; a tool that was running may have no end in its run's log"
    if salvage.forgotten_receipts:
        carried += "; a cancel that is sent again with its key may have another receipt"
    if salvage.forgotten_approvals:
        carried += "; approvals may be missing"
    return (
        f"{path} was damaged: {problem}; it is kept as {aside}; {carried}; to have what is missing, stop the daemon and"
        f" restore a backup as {path}, with no {path.name}-wal beside it; the damaged file is for rescue by hand,"
        " or to be deleted"
    )


def _tell_lost(salvage: Salvage) -> None:
    named = salvage.lost[:_NAMES]
    for start in range(0, len(named), _NAMES_A_LINE):
        log.error("runs that are not carried over: %s", ", ".join(named[start : start + _NAMES_A_LINE]))
    if len(salvage.lost) > _NAMES:
        log.error("and %d more runs that are not carried over", len(salvage.lost) - _NAMES)


def _stamp(path: Path) -> str:
    """A time that no file set aside has in its name."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not any(path.parent.glob(f"{path.name}{_ASIDE}{name}*")))


def _finish(path: Path) -> None:
    """Does what is left to do of an exchange that was decided; nothing, where none was.

    Raises:
        StorageError: the files cannot be moved; it is tried again by the next start.
    """
    try:
        _remove(path.with_name(path.name + _SALVAGE))
        for carried in path.parent.glob(f"{path.name}{_CARRIED}*"):
            _exchange(path, carried)
    except OSError as error:
        raise StorageError(f"{path} is damaged, and cannot be set aside: {error}") from error


def _exchange(path: Path, carried: Path) -> None:
    aside = path.with_name(carried.name.replace(_CARRIED, _ASIDE, 1))
    for suffix in _FILES:
        # What a kill did not leave to be moved is there already; nothing that is kept is ever overwritten.
        if beside(path, suffix).exists() and not beside(aside, suffix).exists():
            beside(path, suffix).rename(beside(aside, suffix))
    sync(path.parent)
    carried.rename(path)  # from here on, it is done
    sync(path.parent)
    log.error("%s was damaged, is kept as %s, and was replaced by what can be trusted of it", path, aside)


def _remove(new: Path) -> None:
    for suffix in _FILES:
        beside(new, suffix).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable. Of a database: one that nobody has open."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
