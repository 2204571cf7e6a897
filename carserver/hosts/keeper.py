"""The keeper of process tools: a process of its own that forks one sub-reaper per execution, which starts the command.

`hosts.process` starts it without site-packages: it and what it imports use the standard library alone, and little of
that, because every sub-reaper is a copy of it. It decides nothing. When it ends, its sub-reapers kill everything; when
one of these is killed, what it leaves behind becomes the keeper's children, and the keeper kills them.
"""

import ctypes
import gc
import os
import select
import signal
import socket
import sys

from carserver.hosts.family import Bell, Family, reap
from carserver.hosts.packets import ABANDON, FAILED, LOST, PACKET_BYTES, PROCESS, START, packet, read_packet
from carserver.hosts.subreaper import PR_SET_CHILD_SUBREAPER, Prctl, SubReaper

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # the daemon says when it ends, nobody else
_DESCRIPTORS = 4  # that come with START
_DESCRIPTOR_BYTES = 4


class Keeper:
    """Forks sub-reapers, and kills what one that was killed leaves behind."""

    def __init__(self, daemon: socket.socket, descriptors: int, prctl: Prctl) -> None:
        self._daemon = daemon
        self._descriptors = descriptors
        self._prctl = prctl
        self._reapers: dict[int, int] = {}  # the execution's number by the process id
        self._lost: list[int] = []  # executions whose sub-reaper was killed, until nothing of them lives
        self._orphans_ended = 0
        self._lifeline, self._held = os.pipe()

    def run(self) -> None:
        """Works until the daemon's end closes, and then until every child has ended."""
        self._prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._bell = Bell()
        self._family = Family()
        poll = select.poll()
        poll.register(self._daemon, select.POLLIN)
        poll.register(self._bell.descriptor, select.POLLIN)
        is_told = True
        while self._look_after() or is_told:
            wait_ms = round(self._family.pause_s * 1000) if self._lost else None
            for descriptor, _ in poll.poll(wait_ms):
                if descriptor == self._bell.descriptor:
                    self._bell.silence()
                elif not self._told():
                    is_told = False
                    poll.unregister(self._daemon)
                    os.close(self._held)

    def _told(self) -> bool:
        """Does what the daemon says; whether it is there."""
        room = socket.CMSG_SPACE(_DESCRIPTORS * _DESCRIPTOR_BYTES)
        try:
            data, sent, _, _ = self._daemon.recvmsg(PACKET_BYTES, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        received = [one for _, _, given in sent for one in memoryview(given[: len(given) // 4 * 4]).cast("i").tolist()]
        word, number, _ = read_packet(data)
        try:
            if word == START and len(received) == 4:  # with fewer, this process has too many: closing them says so
                self._fork(number, received)
            elif word == ABANDON:
                self._abandon(number)
        finally:
            for descriptor in received:
                os.close(descriptor)
        return True

    def _fork(self, number: int, received: list[int]) -> None:
        control, stdout, stderr, planned = received
        try:
            pid = os.fork()
        except OSError as error:
            with socket.socket(fileno=os.dup(control)) as told:
                told.send(packet(FAILED, error.errno or 0, PROCESS), socket.MSG_DONTWAIT)
            return
        if pid:
            self._reapers[pid] = number
            return
        code = 1
        try:
            reaper = SubReaper(self._prctl, socket.socket(fileno=control), (stdout, stderr), planned, self._lifeline)
            reaper.run(self._descriptors)
            code = 0
        except BaseException:  # noqa: BLE001 - a defect: said to the log, and the keeper does the rest
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    def _abandon(self, number: int) -> None:
        for pid, execution in self._reapers.items():
            if execution == number:
                os.kill(pid, signal.SIGKILL)  # a child that is not waited for yet: its id is no other's

    def _look_after(self) -> bool:
        """Takes who has ended, kills what a killed sub-reaper left; whether there is a child."""
        left = self._take_ended()
        if self._lost:
            lost, self._orphans_ended = list(self._lost), 0
            # Who was there when the look began is seen, or ends during it: nobody else waits for the keeper's children.
            if not self._family.kill(self._reapers, self._take_ended) and not self._orphans_ended:
                self._tell_lost(lost)
        return left

    def _take_ended(self) -> bool:
        ended, left = reap()
        for pid, code in ended.items():
            number = self._reapers.pop(pid, None)
            if number is None:
                self._orphans_ended += 1
            elif code != 0:
                self._lost.append(number)
        return left

    def _tell_lost(self, lost: list[int]) -> None:
        try:
            for number in lost:
                self._daemon.send(packet(LOST, number), socket.MSG_DONTWAIT)
                self._lost.remove(number)
        except BlockingIOError:
            pass  # again in a moment
        except OSError:
            self._lost.clear()  # nobody wants to know


def main(daemon: str, descriptors: str) -> None:
    """The program: its arguments are the descriptor of the daemon's socket, and commands' soft limit of descriptors."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a standard descriptor was closed: it would be taken by what must not be there
    os.close(descriptor)
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(option: int, argument: int) -> None:
        if libc.prctl(option, ctypes.c_ulong(argument), *[ctypes.c_ulong(0)] * 3) != 0:
            raise OSError(ctypes.get_errno(), "prctl")

    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    gc.disable()
    gc.freeze()  # a collection would write to every page, which the sub-reapers then no longer share
    Keeper(socket.socket(fileno=int(daemon)), int(descriptors), prctl).run()
