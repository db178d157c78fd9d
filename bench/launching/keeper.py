"""Stands between the parent and one worker: passes its end on, lets nothing it started outlive it.

Run as a file, `python -I -S keeper.py PARENT COMMAND...`, PARENT being the process id of whoever
starts it. The launcher has the kernel make it the heir of the worker's orphans, also of those that
went to another session, and send it SIGTERM when the parent dies, kill -9 included.
"""

import os
import signal
import sys
import time
from contextlib import suppress

DYING_S = 2.0
LOOK_S = 0.005
WAKING = (signal.SIGCHLD, signal.SIGTERM)
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def main() -> int:
    """Exit status of the worker, 128 + n for death by signal n."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WAKING)
    if os.getppid() != parent:
        return 1  # it died before the kernel was asked to tell
    worker = os.posix_spawnp(
        command[0], command, os.environ, setsigmask=before, setsigdef=IGNORED_BY_PYTHON
    )
    status = wait_for(worker)
    end_descendants()
    return status


def wait_for(worker: int) -> int:
    """Sleep until the worker has ended or the keeper is told to end it."""
    while signal.sigwait(WAKING) == signal.SIGCHLD:
        for pid, status in ended_children():
            if pid == worker:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    return 128 + signal.SIGTERM


def ended_children() -> list[tuple[int, int]]:
    """(process id, wait status) of every child that has ended since the last look."""
    found = []
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            found.append(ended)
    return found


def end_descendants() -> None:
    """Kill what is left; the children of what dies become ours, until there is none."""
    limit_s = time.monotonic() + DYING_S
    while (found := children()) and time.monotonic() < limit_s:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ended_children()
        time.sleep(LOOK_S)


def children() -> list[int]:
    """Process ids of our children, by the kernel's account."""
    own = str(os.getpid()).encode()
    names = [entry.name for entry in os.scandir("/proc") if entry.name.isdigit()]
    return [int(name) for name in names if parent_of(name) == own]


def parent_of(pid: str) -> bytes:
    """Parent of a process, empty for one that has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (pathlib takes long to load)
            return file.read().rpartition(b")")[2].split()[1]
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
