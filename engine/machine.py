"""What a process of a run runs on, and how it was called: one line of its log. Decides what a reader needs to
compare two runs; measures nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from engine.checkpoint import package_versions
from engine.recipe import Recipe
from engine.tracing import log

ROOT = Path(__file__).resolve().parent.parent
_GIT_WITHIN_S = 5.0


def describe_node(recipe: Recipe) -> None:
    """Log ``node.described``."""
    devices = [recipe.learner.device, recipe.sampler.device, getattr(recipe.teacher, "device", "cpu")]
    log.info(
        "node.described",
        command=sys.orig_argv,
        folder=_folder(),
        platform=platform.platform(),
        cpu=_cpu_name(),
        num_cpus=_num_cpus(),
        memory_bytes=_memory_bytes(),
        gpus=gpu_names(devices),
        packages=package_versions("slipstream") | package_versions(),
        commit=commit_of(ROOT),
    )


def gpu_names(devices: Iterable[str]) -> list[str]:
    """All GPUs that this process sees, when one of its ``devices`` is one; a run on CPUs leaves them alone."""
    if not any(device.startswith("cuda") for device in devices):
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def commit_of(root: Path) -> str | None:
    """Of the checkout whose root this is, with "-dirty" behind it when files differ; None: it is no checkout, or git
    does not say."""
    if not (root / ".git").exists():
        return None
    # A describe that finds no tag falls back to the whole hash, and knows the difference in the same call.
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=_GIT_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted under us
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _num_cpus() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
