"""On what, and beside what, something was measured. Says nothing that identifies a machine: no names, no paths."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch


class Usage(NamedTuple):
    """Seconds since some moment."""

    wall_s: float
    busy_s: float | None
    """Of all cores, for all processes of the machine; None where the system does not say."""
    own_s: float
    """CPU of this process and of its children that have ended."""

    def share_of_others(self, before: Usage) -> float | None:
        """Of all cores' time between the two readings, what processes that are not ours used."""
        if self.busy_s is None or before.busy_s is None:
            return None
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return max(0.0, others_s) / ((self.wall_s - before.wall_s) * (os.cpu_count() or 1))


def usage() -> Usage:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return Usage(wall_s=time.monotonic(), busy_s=_busy_s(), own_s=own_s)


def describe_machine() -> str:
    """Cores, memory and the versions that decide about speed."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({_processor()}), {memory_gib:.0f} GiB, {_accelerator()}, {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {_version('transformers')}"
    )


def commit() -> str:
    """Short hash, and whether the working tree differs from it."""
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return "unknown"
    return found + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _busy_s() -> float | None:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return ", ".join(part for part in (names[0] if names else platform.machine(), vectors) if part)


def _accelerator() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
