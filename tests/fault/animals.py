"""What process tools may do, as a program: `python -IS animals.py NAME [ARGUMENT…]`. The standard library alone.

`tests.fault.zoo` has what must become of each. Whoever does not end by itself says `up` when there is something to end.
"""

import ctypes
import json
import os
import platform
import pty
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

FOREVER_S = 1000
CATCHABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
# System calls without a function of their own, by machine: _exit of one thread, clone.
EXIT, CLONE = {"x86_64": (60, 56), "aarch64": (93, 220)}.get(platform.machine(), (0, 0))
CLONE_PARENT = 0x8000
NOBODY = 65_534
ODD_NAME = b") R 1 1 (\n"
HERD, FILES = 200, 10_000
MOST_LINKS = 20_000  # of a chain: whoever does not kill it must not fill the machine with it
UNIT = 64 * 1024  # what a pipe holds, as a rule
FLOOD = b"0123456789abcde\n" * (UNIT // 16)
BOTH = 32  # of these to each of both streams
LINE = 10 << 20

libc = ctypes.CDLL(None)


def say(text: str) -> None:
    os.write(1, text.encode())


def sleep() -> None:
    while True:
        time.sleep(FOREVER_S)


def child(then: Callable[[], object] = sleep, *, of_its_own: bool = False) -> int:
    """Forks one, perhaps into a session of its own; its process id."""
    if (pid := os.fork()) != 0:
        return pid
    try:
        if of_its_own:
            os.setsid()
        then()
    finally:
        os._exit(0)


def orphan(then: Callable[[], object] = sleep) -> None:
    """A process of another session, whose parent has ended: a daemon, of old."""
    os.waitpid(child(lambda: child(then), of_its_own=True), 0)


def ignore(*numbers: int) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


# They end by themselves; what they leave behind does not.


def line() -> None:
    say("x" * LINE)
    say("\n")


def halves() -> None:
    for byte in "€😀".encode() * 3:
        os.write(1, bytes([byte]))
        os.write(2, bytes([byte]))
        time.sleep(0.005)


def forks_and_exits() -> None:
    child()


def daemonizes() -> None:
    orphan()


def closes_its_output() -> None:
    os.closerange(0, 3)
    time.sleep(0.1)
    os._exit(4)


def exits_3() -> None:
    os._exit(3)


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reads_its_input() -> None:
    say(f"{len(sys.stdin.buffer.read())} bytes")


def floods() -> None:
    while True:
        os.write(1, FLOOD)


def writes() -> None:
    """That many bytes."""
    for _ in range(int(sys.argv[2]) // UNIT):
        os.write(1, FLOOD)
    os.write(1, FLOOD[: int(sys.argv[2]) % UNIT])


def forks_without_pause() -> None:
    """Three at a time, each of a session of its own, deaf to TERM: they fork and exit as fast as they can."""
    if os.fork() == 0:
        ignore(signal.SIGTERM)
        for _ in range(2):
            if os.fork() == 0:
                break
        for _ in range(MOST_LINKS):
            if os.fork():
                os._exit(0)
            os.setsid()
        sleep()


def herds() -> None:
    for number in range(HERD):
        child(of_its_own=number % 2 == 0)
    say(f"{HERD} children")


def kills_its_parent() -> None:
    child(of_its_own=True)
    os.kill(os.getppid(), signal.SIGKILL)
    sleep()


def writes_to_both() -> None:
    def write(descriptor: int) -> None:
        for _ in range(BOTH):
            rest = memoryview(bytes([48 + descriptor]) * UNIT)
            while rest:
                rest = rest[os.write(descriptor, rest) :]

    other = threading.Thread(target=write, args=(2,))
    other.start()
    write(1)
    other.join()


def writes_when_it_has_ended() -> None:
    def late() -> None:
        time.sleep(0.05)
        say("late")
        floods()

    say("early ")
    child(late, of_its_own=True)


def has_an_odd_name() -> None:
    def rename() -> None:
        libc.prctl(PR_SET_NAME, ODD_NAME, 0, 0, 0)
        child()
        sys.stdout.flush()
        os.execv("/bin/sleep", [ODD_NAME, str(FOREVER_S).encode()])

    child(rename, of_its_own=True)
    time.sleep(0.05)


def has_no_environment() -> None:
    """So nobody finds it by what it inherited."""
    child(lambda: os.execve("/bin/sleep", ["sleep", str(FOREVER_S)], {}), of_its_own=True)


def reaps_for_itself() -> None:
    """Its orphans become its own children, not those of who looks after it, until it ends."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    orphan(orphan)


def has_reapers_below() -> None:
    """What reaps for itself stays; orphans, of which it is the parent, live below it."""

    def reap() -> None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ignore(signal.SIGTERM)
        orphan(orphan)
        sleep()

    child(reap, of_its_own=True)


def has_a_terminal() -> None:
    pid, descriptor = pty.fork()
    if pid == 0:
        ignore(signal.SIGHUP)
        say("here")
        sleep()
    os.read(descriptor, 4)


def clones_in_silence() -> None:
    """A child whose end no SIGCHLD tells, and that waitpid(2) does not find unless it is asked to."""
    if libc.syscall(CLONE, 0, 0, 0, 0, 0) == 0:
        sleep()


def clones_a_sibling() -> None:
    """A child of its parent's."""
    if libc.syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        ignore(signal.SIGTERM)
        sleep()


def opens_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES + 64 if hard == resource.RLIM_INFINITY else min(FILES + 64, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    for _ in range(wanted - 64):
        os.open(os.devnull, os.O_RDONLY)
    child()
    say("open")


def leaves_zombies() -> None:
    """Children that have ended, of one who never asks, and who stays."""

    def neglect() -> None:
        for _ in range(20):
            child(lambda: None)
        sleep()

    child(neglect, of_its_own=True)


def prints_lines() -> None:
    """Lines of JSON, with every kind of chunk but a last one, and some that are none."""
    lines = [
        {"kind": "text", "text": "told"},
        {"kind": "data", "data": [1]},
        {"kind": "progress", "fraction": 0.5, "message": "half"},
        {"kind": "no such kind"},
        {"a": None},
        7,
        "text",
    ]
    say("".join(json.dumps(line) + "\n" for line in lines))
    say("no JSON\n")
    os.write(1, b"\xff\n")
    say('{"kind":"progress","fraction":2}\n[1,2')


def says_that_it_failed() -> None:
    say('{"kind":"error","message":"the disk is on fire"}\n{"kind":"done"}\n')
    sleep()


def prints_its_arguments() -> None:
    say(json.dumps([os.fsencode(argument).decode() for argument in sys.argv[2:]]))


def counts_its_arguments() -> None:
    say(f"{len(sys.argv) - 2} arguments, {sum(map(len, sys.argv[2:]))} characters")


# They do not end by themselves.


def ignores_term() -> None:
    ignore(signal.SIGTERM)
    child(of_its_own=True)
    say("up")
    sleep()


def ignores_everything() -> None:
    ignore(*CATCHABLE)
    signal.pthread_sigmask(signal.SIG_BLOCK, CATCHABLE)
    child(of_its_own=True)
    say("up")
    sleep()


def stops_itself() -> None:
    say("up")
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def forks_on_term() -> None:
    def more(*of: object) -> None:
        for _ in range(3):
            child(of_its_own=True)

    signal.signal(signal.SIGTERM, more)
    say("up")
    sleep()


def writes_on_term() -> None:
    """More than a pipe holds; then it ends, and well."""

    def last(*of: object) -> None:
        os.write(1, bytes(UNIT * 4))
        os._exit(0)

    signal.signal(signal.SIGTERM, last)
    say("up")
    sleep()


def is_nobody() -> None:
    """Another user than who looks after it."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ignores_term()


def has_lost_its_head() -> None:
    """Its first thread has ended, so it looks like a zombie, and runs on."""
    threading.Thread(target=sleep).start()
    say("up")
    libc.syscall(EXIT, 0)


def stops_its_parent() -> None:
    child(of_its_own=True)
    os.kill(os.getppid(), signal.SIGSTOP)
    say("up")
    sleep()


def kills_the_keeper() -> None:
    """The parent of its parent."""
    child(of_its_own=True)
    with open(f"/proc/{os.getppid()}/stat", "rb") as stat:
        keeper = int(stat.read().rpartition(b")")[2].split()[1])
    os.kill(keeper, signal.SIGKILL)
    sleep()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
