"""CPU seconds, memory and progress of another process, seen from outside. Linux."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen, TimeoutExpired

POLL_S = 0.01


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process, without its children, to the nanosecond.

    The id of a process's CPU clock is its complement, shifted, with 2 for "as the scheduler counts": what glibc's
    clock_getcpuclockid computes.

    Raises:
        OSError: there is no such process (any more).
    """
    return time.clock_gettime((~pid << 3) | 2)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM.

    Raises:
        OSError: there is no such process (any more).
        ValueError: it has ended and was not waited for.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"process {pid} has no memory any more")


def new_lines(path: Path, process: Popen[bytes]) -> Iterator[bytes]:
    """Complete lines of a file that ``process`` appends to, as they come; ends when the process has ended and
    everything is read. Waits for a file that is not there yet."""
    read, rest = 0, b""
    while True:
        has_ended = _has_ended(process)
        if path.exists():
            with path.open("rb") as file:
                file.seek(read)
                fresh = file.read()
            read += len(fresh)
            *lines, rest = (rest + fresh).split(b"\n")
            yield from lines
        if has_ended:
            return


def _has_ended(process: Popen[bytes]) -> bool:
    try:
        process.wait(POLL_S)
    except TimeoutExpired:
        return False
    return True
