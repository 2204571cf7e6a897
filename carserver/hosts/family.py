"""The descendants of a process: how they are found, signalled, and waited for. Of the keeper and its sub-reapers."""

import os
import signal
from collections.abc import Callable, Collection, Sequence

_WALL = 0x40000000  # waitpid(2), __WALL: children of clone(2) that announce their end by no SIGCHLD, too
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.1  # between two looks that find nobody new: what was killed is dying
_BETWEEN = 4  # processes that are looked at before those who have ended are waited for
_STAT_BYTES = 1024  # of /proc/<pid>/stat: its numbers and a name of at most 64 bytes are far less


class Found:
    """A process, perhaps a zombie, as /proc/<pid>/stat tells of it: its parent, its group, and when it began."""

    __slots__ = ("began", "group", "parent")

    def __init__(self, stat: bytes) -> None:
        # The name, in parentheses, may hold anything; behind the last one are numbers alone.
        fields = stat[stat.rindex(b")") + 2 :].split()
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.began = fields[19]


def look(pid: int) -> Found | None:
    """The process of this id; None if there is none."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        return Found(os.read(descriptor, _STAT_BYTES))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


class Family:
    """The descendants of this process, and how they are signalled."""

    def __init__(self) -> None:
        self._root = os.getpid()
        self._own_group = os.getpgrp()
        self._strangers: set[int] = set()  # known to be none; or a look at every process costs milliseconds
        self._killed: set[int] = set()
        self.pause_s = 0.0  # until it is of use to kill again

    def kill(self, spared: Collection[int] = (), between: Callable[[], object] | None = None) -> bool:
        """Kills every descendant that is found, but those in `spared` and below these; whether there was one."""
        found = self.signal((signal.SIGKILL,), spared, between=between)
        if found <= self._killed:  # they are dying, which may take its time
            self.pause_s = min(max(self.pause_s * 2, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)
        else:
            self.pause_s = 0.0
        self._killed = found
        return bool(found)

    def signal(
        self,
        numbers: Sequence[int],
        spared: Collection[int] = (),
        told: Collection[int] = (),
        between: Callable[[], object] | None = None,
    ) -> set[int]:
        """Signals every descendant that is found, but those in `spared` and below, and in the groups `told`; their ids.

        Each as soon as it is found, and the newest first: who forks and exits is somebody else in a moment. By groups,
        as far as it goes: a signal for a group reaches all of it at once, so that no member can fork its way out.
        Nobody else is in them: a group lies within a session, and theirs were made by the command or below.

        `between` is called now and then, to wait for those who have ended: thousands of zombies make a look long.
        """
        listed = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - in a copy of the keeper
        self._strangers.intersection_update(listed)
        verdicts: dict[int, bool | None] = {0: False, self._root: True, **dict.fromkeys(spared)}
        groups = set(told)
        family: set[int] = set()
        for count, pid in enumerate(pid for pid in reversed(listed) if pid not in self._strangers):
            if between and count % _BETWEEN == 0:
                between()
            if pid != self._root and self._signal_one(pid, numbers, verdicts, groups):
                family.add(pid)
        if not family:
            self._strangers.clear()  # if an id was used again, it was by somebody else
        return family

    def _signal_one(self, pid: int, numbers: Sequence[int], verdicts: dict[int, bool | None], groups: set[int]) -> bool:
        """Signals the process of this id if it is a descendant, or its group, unless done; whether it is one."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        except (AttributeError, OSError):
            handle = -1  # no such call here, or no descriptor left: its id must do, which is not used again so soon
        try:
            found = look(pid)
            if found is None or not self._is_ours(pid, found, verdicts):
                return False
            if handle >= 0:
                signal.pidfd_send_signal(handle, 0)  # it is not waited for yet, so what was found is of it
            self._send(handle, pid, found.group, numbers, groups)
        except ProcessLookupError:
            return False  # it has just gone
        except PermissionError:
            return True  # another user's, as which it was let run: it stays, and the daemon says so
        finally:
            if handle >= 0:
                os.close(handle)
        return True

    def _send(self, handle: int, pid: int, group: int, numbers: Sequence[int], groups: set[int]) -> None:
        if group in groups:
            return
        for number in numbers:
            if group > 1 and group != self._own_group:
                groups.add(group)
                os.killpg(group, number)
            elif handle >= 0:
                signal.pidfd_send_signal(handle, number)
            else:
                os.kill(pid, number)

    def _is_ours(self, pid: int, found: Found | None, verdicts: dict[int, bool | None]) -> bool | None:
        """Whether its line of parents leads here; None where one of them is spared, or has just ended."""
        line = []
        while found is not None and pid not in verdicts and pid not in self._strangers:
            line.append(pid)
            pid = found.parent
            found = None if pid in verdicts or pid in self._strangers else look(pid)
        verdict = False if pid in self._strangers else verdicts.get(pid)
        verdicts.update(dict.fromkeys(line, verdict))
        if verdict is False:
            self._strangers.update(line)
        return verdict


class Bell:
    """A descriptor that is readable when a child has ended."""

    def __init__(self) -> None:
        self.descriptor, self._written = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._written, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # what counts is that it is handled: then the byte is written
        signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)

    def silence(self) -> None:
        """Not readable any more, until the next one ends."""
        try:
            while os.read(self.descriptor, 512):
                pass
        except BlockingIOError:
            pass

    def descriptors(self) -> list[int]:
        return [self.descriptor, self._written]


def reap() -> tuple[dict[int, int], bool]:
    """Takes every child that has ended; their exit codes by id, and whether there is a child left."""
    ended: dict[int, int] = {}
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | _WALL)
            if pid == 0:
                return ended, True
            ended[pid] = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return ended, False
