"""Process 1 of a container: starts the daemon, hands signals on to it, and reaps what others leave behind.

A process whose parent has ended becomes a child of process 1, and when it ends it stays a zombie until process 1 waits
for it. The daemon cannot do that: to wait for any child is to take the exit status of those that it, its loop or a
library has started and waits for. So process 1 forks at once, before there is a thread, a loop or a file, waits for
every child, and does nothing else; the daemon is its child, and knows nothing of it.
"""

import os
import signal

_HANDED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2})
_AWAITED = _HANDED_ON | {signal.SIGCHLD}
_BY_SIGNAL = 128  # and its number: the exit code of what a signal ended, as shells and container engines have it


def leave_first_process() -> None:
    """Returns in a process that is not process 1; what was process 1 stays here, and exits as the other does.

    Does nothing where there is another process 1 already. To be called before anything starts a thread.
    """
    if os.getpid() != 1:
        return
    # Before there is anybody to hand them on to: a signal that process 1 neither handles nor blocks is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    child = os.fork()
    if child == 0:
        os.setsid()  # a terminal's Ctrl-C goes to process 1 alone, which hands it on: once, not twice
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        return
    os._exit(_look_after(child))


def _look_after(child: int) -> int:
    """Waits until `child` ends; the exit code that says how."""
    while True:
        code = _reap(child)  # at first, too: what ended earlier has sent its signal to nobody
        if code is not None:
            return code if code >= 0 else _BY_SIGNAL - code
        number = signal.sigwait(_AWAITED)
        if number != signal.SIGCHLD:
            os.kill(child, number)  # it is there, as a zombie at least: nobody else waits for it


def _reap(child: int) -> int | None:
    """Takes every child that has ended; the exit code of `child` if it is among them. One signal may stand for many."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            return None
