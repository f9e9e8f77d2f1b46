"""Where a run can be taken up again: folders that are whole or not there, and which of them to trust.

It decides how a checkpoint comes into being (aside, digested, synced, renamed), which one is the latest that verifies,
and which ones go. What is inside ``student/`` and ``trainer/`` is the trainer's business; this module sees files.

    checkpoints/step_000040/
        student/        Hugging Face format; loads with AutoModelForCausalLM.from_pretrained
        trainer/        optimizer and random state
        state.json      CheckpointState
        manifest.json   path, size and BLAKE2b digest of every other file: what makes the folder verifiable

Names that begin with a dot are work in progress: ``.step_000040.tmp-PID`` is being written or deleted, and
``.step_000040.old-PID`` was moved aside while a new one of the same step takes its place.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog

from engine.errors import CheckpointError, RunDirError

__all__ = [
    "Checkpoint",
    "CheckpointState",
    "CheckpointStore",
    "check_disk",
    "package_versions",
    "verify",
]

log = structlog.get_logger(__name__)

FORMAT: Final = 1
STATE_FILE: Final = "state.json"
MANIFEST_FILE: Final = "manifest.json"

StructT = TypeVar("StructT", bound=msgspec.Struct)

_NAME: Final = re.compile(r"step_(\d{6,})")
_ASIDE: Final = re.compile(r"\.(step_\d{6,})\.(tmp|old)-\d+")
_CHUNK_BYTES: Final = 1 << 20
_SPARE_BYTES: Final = 4 << 20
"""What ``check_disk`` wants beyond the files themselves: directories, state, the ledger's log."""

# EFBIG is what a process under a file size limit (ulimit -f, some batch systems) gets instead of ENOSPC.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class CheckpointState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a resumed run needs beside the trainer's own files; ``state.json``."""

    run_name: str
    step: int
    """Optimizer steps done: the policy version of ``student/``."""
    seed: int
    recipe: dict[str, Any]
    """The resolved recipe as plain values (``msgspec.to_builtins``)."""
    next_ticket: int
    """Data cursor: the first ticket that had not been given out."""
    ledger_steps: int
    """Ledger watermark: steps that were durably in the ledger when this was written; at least ``step``."""
    weight_digest: str
    """``Trainer.digest()`` of the weights in ``student/``."""
    packages: dict[str, str]
    """Versions that wrote this (``package_versions``)."""
    created_at: str = ""
    """UTC, ISO 8601; filled in by ``save``."""
    format: int = FORMAT


class ManifestEntry(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """Relative to the checkpoint, with forward slashes."""
    size: int
    """Bytes."""
    blake2b: str
    """Hex, 32 bytes."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    files: tuple[ManifestEntry, ...]
    """Sorted by path."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that verified."""

    path: Path
    step: int
    state: CheckpointState
    num_bytes: int


class CheckpointStore:
    """The checkpoints of one run. Writing belongs to the process that holds the run's ledger, and to nobody else.

    ``latest`` and ``steps`` only read. All methods block on the disk; none is safe to call twice at a time.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1 checkpoints, got {keep}")
        self._folder = Path(folder)
        self._keep = keep

    def __repr__(self) -> str:
        return f"<CheckpointStore {str(self._folder)!r} keep={self._keep} steps={self.steps()}>"

    @property
    def folder(self) -> Path:
        return self._folder

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are in place, ascending; says nothing of whether they verify."""
        return [step for step, _ in self._in_place()]

    def save(self, step: int, write: Callable[[Path], None], state: CheckpointState) -> Path:
        """Make the checkpoint of ``step``; afterwards it is the latest one, whole and synced.

        Killed at any instruction, the store holds either the old or the new. The ledger must have been committed
        durably up to ``step`` before. A checkpoint of the same step is replaced; those of later steps belong to a
        history that was given up when the run was rewound, and go; of the rest the newest ``keep`` stay.

        Args:
            write: makes its files under the folder that it is given.

        Raises:
            RunDirError: no space, or the folder cannot be written; what was there before is untouched.
            Exception: whatever else ``write`` raised, as it is; the half-written folder is removed.
        """
        if step != state.step:
            raise ValueError(f"state is of step {state.step}, the checkpoint of step {step}")
        name = f"step_{step:06d}"
        final = self._folder / name
        aside = self._folder / f".{name}.tmp-{os.getpid()}"
        needed = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.recover()
            needed = self._last_size()
            if shutil.disk_usage(self._folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            aside.mkdir()
        except OSError as error:
            raise _unwritable(error, self._folder, name, full=_is_full(error, self._folder), needed=needed) from error
        try:
            write(aside)
            num_bytes = _seal(aside, state)
            _replace(aside, final)
        except Exception as error:
            full = _is_full(error, self._folder)
            shutil.rmtree(aside, ignore_errors=True)  # what cannot be removed now goes at the next recover()
            if full or (isinstance(error, OSError) and error.errno in _DENIED):
                raise _unwritable(error, self._folder, name, full=full, needed=needed) from error
            raise
        log.info("checkpoint.saved", step=step, path=str(final), num_bytes=num_bytes)
        self._retain(step)
        return final

    def recover(self) -> None:
        """Finish or undo what a killed process left half done. Only for the process that owns the run.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            match = _ASIDE.fullmatch(path.name)
            if match is None:
                continue
            target = self._folder / match[1]
            if match[2] == "old" and not target.exists():
                path.rename(target)
                log.info("checkpoint.restored", path=str(target))
            else:
                shutil.rmtree(path)
                log.info("checkpoint.leftover_removed", path=str(path))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None when there is none at all.

        One that does not verify is passed over with a ``checkpoint.corrupt`` warning.

        Raises:
            CheckpointError: there are checkpoints, and none of them verifies.
        """
        problems = []
        for step, path in reversed(self._candidates()):
            try:
                return verify(path)
            except CheckpointError as error:
                log.warning("checkpoint.corrupt", step=step, path=str(path), problem=str(error))
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self._folder} verifies: {'; '.join(problems)}; "
                "restore one from a copy, or start a new run in another folder"
            )
        return None

    def _in_place(self) -> list[tuple[int, Path]]:
        if not self._folder.is_dir():
            return []
        named = ((_NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())

    def _candidates(self) -> list[tuple[int, Path]]:
        """What is in place, and what was moved aside by a replacement that never came to its end."""
        found = dict(self._in_place())
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                match = _ASIDE.fullmatch(path.name)
                if match and match[2] == "old":
                    found.setdefault(int(match[1].removeprefix("step_")), path)
        return sorted(found.items())

    def _last_size(self) -> int:
        """Bytes of the newest checkpoint in place; the next one of the same run needs about as many."""
        in_place = self._in_place()
        return _size(in_place[-1][1]) if in_place else 0

    def _retain(self, saved: int) -> None:
        """``saved`` has just been written and read back, so older ones may go; it never goes itself."""
        in_place = self._in_place()
        later = [path for step, path in in_place if step > saved]
        surplus = [path for step, path in in_place if step <= saved][: -self._keep]
        for path in (*later, *surplus):
            try:
                _remove(path)
            except OSError as error:
                # The checkpoint itself is good: a folder too many is worth a warning, not the run.
                log.warning("checkpoint.not_removed", path=str(path), problem=str(error))
            else:
                log.info("checkpoint.removed", path=str(path))


def verify(path: Path) -> Checkpoint:
    """Read every file of a checkpoint and compare with its manifest.

    Raises:
        CheckpointError: a file is missing, cannot be read, or is not what was written; names the file.
    """
    manifest = _decode(path / MANIFEST_FILE, Manifest)
    state = _decode(path / STATE_FILE, CheckpointState)
    for found, name in ((manifest.format, MANIFEST_FILE), (state.format, STATE_FILE)):
        if found != FORMAT:
            raise CheckpointError(
                f"{path / name}: has format {found}, this program reads {FORMAT}; use the version that wrote it"
            )
    if STATE_FILE not in {entry.path for entry in manifest.files}:
        raise CheckpointError(f"{path / MANIFEST_FILE}: does not list {STATE_FILE}")
    for entry in manifest.files:
        _verify_file(path / entry.path, entry)
    match = _NAME.search(path.name)
    if match and int(match[1]) != state.step:
        raise CheckpointError(f"{path}: holds step {state.step}; was the folder renamed?")
    return Checkpoint(path=path, step=state.step, state=state, num_bytes=sum(entry.size for entry in manifest.files))


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse now what would fail at the first checkpoint: makes ``folder``, writes and removes a small file, counts.

    For a store that keeps n checkpoints ``needed_bytes`` is n + 1 times one of them: the new one is written before the
    oldest goes.

    Raises:
        RunDirError: ``folder`` cannot be made or written, or has less than ``needed_bytes`` free.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RunDirError(
            f"{folder}: cannot be written ({error.strerror}); make it writable or choose another one with --out"
        ) from error
    needed = needed_bytes + _SPARE_BYTES
    if free < needed:
        raise RunDirError(
            f"{folder}: {_mib(free)} free, the run needs {_mib(needed)} for its checkpoints; make room, choose another "
            "folder with --out, or keep fewer (checkpoint.keep)"
        )


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of ``names`` (by default what decides the numbers of a run); the others are left out."""
    found = {}
    for name in names or ("torch", "transformers", "safetensors", "tokenizers", "numpy", "megatron-core", "vllm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _seal(folder: Path, state: CheckpointState) -> int:
    """Add state and manifest, and sync every file and directory; returns the bytes of the files listed."""
    stamped = msgspec.structs.replace(state, created_at=state.created_at or datetime.now(UTC).isoformat())
    (folder / STATE_FILE).write_bytes(_pretty(stamped))
    entries = []
    for path in _files(folder):
        size, digest = _digest(path, sync=True)
        entries.append(ManifestEntry(path=path.relative_to(folder).as_posix(), size=size, blake2b=digest))
    manifest = folder / MANIFEST_FILE
    manifest.write_bytes(_pretty(Manifest(format=FORMAT, files=tuple(sorted(entries, key=lambda entry: entry.path)))))
    _sync(manifest)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(path)
    return sum(entry.size for entry in entries)


def _replace(aside: Path, final: Path) -> None:
    """Put ``aside`` in the place of ``final``.

    Between the two renames the old one lives under its ``.old-`` name: ``latest`` finds it there, ``recover`` puts it
    back.
    """
    if not final.exists():
        aside.rename(final)
        _sync(final.parent)
        return
    old = final.parent / f".{final.name}.old-{os.getpid()}"
    final.rename(old)
    try:
        aside.rename(final)
    except OSError:
        old.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # the new one is in place; what is left of the old one goes at recover()


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no folder that looks like one."""
    doomed = path.parent / f".{path.name}.tmp-{os.getpid()}"
    path.rename(doomed)
    shutil.rmtree(doomed)


def _verify_file(path: Path, entry: ManifestEntry) -> None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{path}: {size} bytes, {entry.size} were written")
        _, digest = _digest(path, sync=False)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if digest != entry.blake2b:
        raise CheckpointError(f"{path}: the content is not what was written (BLAKE2b differs)")


def _decode(path: Path, kind: type[StructT]) -> StructT:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be understood ({error})") from error


def _digest(path: Path, *, sync: bool) -> tuple[int, str]:
    """Size and digest of what a reader gets; with ``sync`` the content is on the disk before."""
    digest = hashlib.blake2b(digest_size=32)
    size = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _pretty(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether the lack of room is what ``error`` is about.

    Libraries that write in native code report it in types of their own (safetensors: the system's words; torch's zip
    writer: nothing but a failed assertion), so the words count, and the room that is left.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if any(os.strerror(code) in str(error) for code in _FULL):
        return True
    try:
        return shutil.disk_usage(folder).free < 1 << 16
    except OSError:
        return False


def _unwritable(error: Exception, folder: Path, name: str, *, full: bool, needed: int) -> RunDirError:
    """``needed``: bytes of the last checkpoint; 0 when there was none."""
    try:
        free: str | None = _mib(shutil.disk_usage(folder).free)
    except OSError:
        free = None
    if full:
        wanted = f"about {_mib(needed)}" if needed else "more than that"
        return RunDirError(
            f"{folder}: no room for checkpoint {name}: {free or 'unknown space'} free, it needs {wanted} ({error}); "
            "earlier checkpoints are untouched; make room and resume"
        )
    return RunDirError(
        f"{folder}: checkpoint {name} cannot be written ({error}); earlier checkpoints are untouched; make the folder "
        "writable and resume"
    )
