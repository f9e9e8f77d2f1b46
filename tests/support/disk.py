"""A disk that can be filled: a real file system of a few hundred kilobytes, so that "full" is the kernel's word."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class TinyDisk:
    """A mounted tmpfs; made by ``tiny_disk``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, *, spare_bytes: int = 0) -> None:
        """Take all the room that is left, but for ``spare_bytes``."""
        filler = self.path / "filler"
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        if spare_bytes:
            with filler.open("r+b") as file:
                file.truncate(max(0, filler.stat().st_size - spare_bytes))

    def make_room(self) -> None:
        """Give back what ``fill`` took."""
        (self.path / "filler").unlink()

    def set_read_only(self) -> None:
        _mount("-o", "remount,ro", str(self.path))


@contextlib.contextmanager
def tiny_disk(path: Path, *, size: str = "256k") -> Iterator[TinyDisk]:
    """Mount an empty file system at ``path``; skips the test where this user may not mount."""
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield TinyDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
