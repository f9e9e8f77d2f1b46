"""The C sources here as a library of this machine: compiled at first use and kept for the next process.

It is built for the processor that it runs on, so the file's name has that processor in it, as well as sources, compiler
and options. It is written aside and then given its name: whoever finds it finds it whole, and who builds it at the same
time only works in vain. Whether it computes what it should is asked by who loads it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "SLIPSTREAM_NATIVE"
"""Environment variable: 0 leaves the work to torch."""

_log = logging.getLogger(__name__)
_SOURCES = tuple(Path(__file__).with_name(f"native_{name}.c") for name in ("rows", "solve", "dense", "head"))
_HEADERS = tuple(Path(__file__).with_name(f"native_{name}.h") for name in ("numbers", "terms"))
_OPTIONS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fno-thread-jumps",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
_WIDE = "-mprefer-vector-width=512"
"""Compilers take half of it where they may choose, as programs that are only in part made of such loops run faster."""
_PATIENCE_S = 60.0


class NoLibrary(Exception):
    """And why: no compiler, an error of the compiler, no folder to write to."""


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """One for the process; or None where it is switched off or cannot be had, and the log says why, once."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return load_library()
    except NoLibrary as missing:
        _log.warning("losses on CPU run in plain torch, at a third of the speed or less: %s", missing)
        return None


def floats(*shape: int) -> Tensor:
    """Room that C writes float32 to, whatever torch's defaults are at the moment: who loads a model changes them."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def load_library() -> ctypes.CDLL:
    """Raises:
    NoLibrary: it cannot be had on this machine.
    """
    path = _path(_compiler())
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _build(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(f"{path} cannot be made or loaded: {error}") from error


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    found = shutil.which(command[0])
    if found is None:
        raise NoLibrary(f"there is no C compiler {command[0]!r} on the PATH")
    return [found, *command[1:], *_OPTIONS, *([_WIDE] if platform.machine() == "x86_64" else [])]


def _path(compile_command: list[str]) -> Path:
    parts = (
        *(source.read_text() for source in (*_SOURCES, *_HEADERS)),
        *compile_command,
        platform.machine(),
        _processor(),
    )
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return _cache() / f"native-{name}.so"


def _cache() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(configured) if configured else Path.home() / ".cache"
    except RuntimeError as error:
        raise NoLibrary(f"there is no home folder to keep it in: {error}") from error
    return base / "slipstream"


def _processor() -> str:
    """What tells one that lacks an instruction from one that has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        command = [*_compiler(), *map(str, _SOURCES), "-o", str(aside), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise NoLibrary(f"{shlex.join(command)} was not done after {_PATIENCE_S:.0f} s") from error
        if done.returncode != 0:
            raise NoLibrary(f"{shlex.join(command)} failed: {done.stderr.strip()[:2000]}")
        aside.replace(path)
