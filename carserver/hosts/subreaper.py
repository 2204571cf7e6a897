"""Starts one command, and stays until nothing of it lives. Forked from the keeper, of which it is a copy.

What a command leaves behind cannot hide: each orphan below a sub-reaper becomes the child of that sub-reaper (prctl(2),
PR_SET_CHILD_SUBREAPER), whatever sessions and groups it made. So nothing lives when the sub-reaper has no child: that
is the proof of GONE. Everything is killed when the daemon's end of the control socket closes, and when the keeper ends,
who alone holds the other end of the lifeline. The command itself dies with its sub-reaper (PR_SET_PDEATHSIG).
"""

import contextlib
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Collection

from carserver.hosts.family import Bell, Family, reap
from carserver.hosts.packets import (
    EXITED,
    FAILED,
    FOLDER,
    GONE,
    KILL,
    PACKET_BYTES,
    PROCESS,
    PROGRAM,
    STARTED,
    TAKEN,
    TERMINATE,
    packet,
    read_packet,
    read_plan,
)

Prctl = Callable[[int, int], None]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_CANNOT_RUN = 127  # the exit code of a shell that cannot run a command; nobody sees it
# From a signal for the command's own group, which takes no looking, to a look for those who left it.
_FIRST_LOOK_S = 0.05


class SubReaper:
    """Starts one command, and stays until nothing of it lives."""

    def __init__(
        self, prctl: Prctl, control: socket.socket, outputs: tuple[int, int], planned: int, lifeline: int
    ) -> None:
        self._prctl = prctl
        self._control = control
        self._outputs = outputs
        self._planned = planned
        self._lifeline = lifeline
        self._command = 0  # the process id, until it has ended
        self._result = -1  # readable when the command runs, or could not
        self._killed = 0  # that many of those who ended
        self._told_groups: list[int] = []  # that have had TERM
        self._kill_at: float | None = None
        self._look_at: float | None = None  # for those to terminate who are not in the command's group

    def run(self, descriptors: int) -> None:
        """Starts the command, with a soft limit of this many descriptors; returns when nothing of it lives."""
        try:
            bell = self._prepare()
        except OSError as error:  # too many descriptors, as a rule
            self._tell(FAILED, error.errno or 0, PROCESS)
            return
        self._tell(TAKEN)
        self._hear(self._poll.poll(0))  # it may be over before it begins
        if self._kill_at is None:
            self._start(descriptors)
        for descriptor in (*self._outputs, self._planned):
            os.close(descriptor)
        while self._take_ended():
            wait_s = self._signal_due()
            heard = self._poll.poll(None if wait_s is None else max(0, round(wait_s * 1000 + 0.5)))
            bell.silence()
            self._hear(heard)
        self._tell(GONE, self._killed)

    def _prepare(self) -> Bell:
        """Becomes a process of its own, with nothing of the keeper's but the lifeline."""
        self._prctl(PR_SET_CHILD_SUBREAPER, 1)
        os.setsid()
        _close_all_but([self._control.fileno(), *self._outputs, self._planned, self._lifeline])
        bell = Bell()
        self._family = Family()
        self._poll = select.poll()
        for descriptor in (self._control.fileno(), self._lifeline, bell.descriptor):
            self._poll.register(descriptor, select.POLLIN)
        return bell

    def _tell(self, word: bytes, number: int = 0, about: bytes = b"") -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: that is heard by itself
            self._control.send(packet(word, number, about), socket.MSG_DONTWAIT)

    def _hear(self, heard: list[tuple[int, int]]) -> None:
        for descriptor, _ in heard:
            if descriptor == self._control.fileno():
                self._told()
            elif descriptor == self._lifeline:
                self._kill(descriptor)
            elif descriptor == self._result:
                self._take_result()

    def _told(self) -> None:
        try:
            word, number, _ = read_packet(self._control.recv(PACKET_BYTES, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return
        except OSError:
            word, number = b"", 0
        if not word:
            self._kill(self._control.fileno())
        elif word == KILL:
            self._kill()
        elif word == TERMINATE and self._kill_at is None:
            now = time.monotonic()
            self._kill_at = now + number / 1000
            if self._signal_command(signal.SIGTERM, signal.SIGCONT):
                self._look_at = now + _FIRST_LOOK_S
                self._told_groups = [self._command]
            else:
                self._look_at = now

    def _kill(self, closed: int | None = None) -> None:
        """All of it, from now on; `closed` is a descriptor that has no more to say."""
        if closed is not None:
            self._poll.unregister(closed)
        now = time.monotonic()
        if self._kill_at is None or self._kill_at > now:
            self._kill_at = now + _FIRST_LOOK_S if self._signal_command(signal.SIGKILL) else now
        self._look_at = None

    def _signal_command(self, *numbers: int) -> bool:
        """Signals the command's group; its id is the command's, which is no other's while it is not waited for."""
        if not self._command:
            return False
        try:
            for number in numbers:
                os.killpg(self._command, number)
        except (ProcessLookupError, PermissionError):
            return False  # it has not made its group yet
        return True

    def _signal_due(self) -> float | None:
        """Signals whom it is time to signal; the seconds until the next time, None if there is none."""
        now = time.monotonic()
        if self._look_at is not None and now >= self._look_at:
            # A stopped process does not see TERM until it goes on. To many a program a second TERM means: at once.
            self._family.signal((signal.SIGTERM, signal.SIGCONT), told=self._told_groups)
            self._look_at = None
        if self._kill_at is not None and now >= self._kill_at:
            self._family.kill(between=self._take_ended)
            return self._family.pause_s
        due = [at for at in (self._look_at, self._kill_at) if at is not None]
        return max(0.0, min(due) - now) if due else None

    def _take_ended(self) -> bool:
        """Takes what has ended, and tells of the command; whether anything lives."""
        ended, left = reap()
        self._killed += sum(code == -signal.SIGKILL for code in ended.values())
        code = ended.get(self._command) if self._command else None
        if code is not None:
            self._take_result()
            self._command = 0
            self._tell(EXITED, code)
        return left

    def _start(self, descriptors: int) -> None:
        argv, folder, environment = read_plan(_content(self._planned))
        # Blocked until the command has its own dispositions: TERM would be ignored, as it is here.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        reaper = os.getpid()
        try:
            result, told = os.pipe()
            self._command = os.fork()
            if self._command == 0:
                self._become(reaper, told, descriptors, argv, folder, environment)
        except OSError as error:
            self._tell(FAILED, error.errno or 0, PROCESS)
            return  # without a child: so this process ends
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(told)
        os.set_blocking(result, False)
        self._result = result
        self._poll.register(result, select.POLLIN)

    def _become(
        self,
        reaper: int,
        told: int,
        descriptors: int,
        argv: list[bytes],
        folder: bytes,
        environment: dict[bytes, bytes],
    ) -> None:
        """Becomes the command; or tells why it cannot."""
        what = PROCESS
        try:
            os.setsid()
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != reaper:
                return  # it has ended before that
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._outputs[0], 1)
            os.dup2(self._outputs[1], 2)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            soft = descriptors if hard == resource.RLIM_INFINITY else min(descriptors, hard)
            _close_all_but([told])
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            what = FOLDER
            os.chdir(folder)
            what = PROGRAM
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what came since the fork takes its effect here
            os.execvpe(argv[0], argv, environment)  # noqa: S606 - without a shell, as it should be
        except OSError as error:
            os.write(told, packet(FAILED, error.errno or 0, what))
        finally:
            os._exit(_CANNOT_RUN)

    def _take_result(self) -> None:
        """Hears whether the command runs: what tells it closes by itself when it does."""
        if self._result < 0:
            return
        try:
            data = os.read(self._result, PACKET_BYTES)
        except BlockingIOError:
            return
        self._poll.unregister(self._result)
        os.close(self._result)
        self._result = -1
        if data:
            self._tell(*read_packet(data))
        else:
            self._tell(STARTED, self._command)


def _content(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    data = b""
    while len(data) < size and (piece := os.pread(descriptor, size - len(data), len(data))):
        data += piece
    return data


def _close_all_but(kept: Collection[int]) -> None:
    """Closes every descriptor but the standard ones and these."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib would be in the memory of every sub-reaper
        if (descriptor := int(name)) > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # that of this very list
                os.close(descriptor)
