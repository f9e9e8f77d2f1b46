"""Where a run will live: room on the disk, a port to listen on, a folder that is free or holds the run to resume."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from engine.check.student import Student
from engine.checkpoint import CheckpointStore, check_disk
from engine.errors import RecipeError, RunDirError
from engine.ledger import Ledger
from engine.prompts import PromptSet
from engine.recipe import Recipe
from engine.run_dir import RunDir
from teacher.token import read_token


def ledger_identity(recipe: Recipe, prompts: PromptSet) -> dict[str, str]:
    """What turns a ticket into a prompt occurrence: it must not change between a run's start and its resumption."""
    return {
        "prompts": prompts.digest,
        "samples_per_prompt": str(recipe.samples_per_prompt),
        "rollouts_per_step": str(recipe.rollouts_per_step),
    }


def checkpoint_bytes(recipe: Recipe, student: Student) -> int:
    """Weights and two moments in float32, for the checkpoints that are kept and the one that is being written."""
    config_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}
    per_weight = config_bytes.get(str(getattr(student.config, "dtype", "float32")).replace("torch.", ""), 4)
    return student.weight_bytes * 4 // per_weight * 3 * (recipe.checkpoint.keep + 1)


def check_room(recipe: Recipe, student: Student, out: Path | None) -> tuple[str, None]:
    """That the disk has room for checkpoints.

    Args:
        out: the run's folder; None: not known yet.
    """
    needed = checkpoint_bytes(recipe, student)
    folder = (out if out is not None else Path("runs")).absolute()
    while not folder.exists():
        folder = folder.parent
    check_disk(folder, needed)
    return f"checkpoints need up to {needed / 2**20:,.0f} MiB in {folder}", None


def check_token(path: str) -> tuple[str, None]:
    read_token(path)
    return path, None


def check_port(recipe: Recipe) -> tuple[str, None]:
    host, port = recipe.node.host, recipe.node.port
    if port == 0:
        return f"{host}, any free port", None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise RecipeError(
            f"node.host={host!r} node.port={port} cannot be listened on: {error.strerror or error}; "
            "choose another port, or 0 for any"
        ) from error
    return f"{host}:{port} is free", None


def check_folder(out: Path, *, resume: bool) -> tuple[str, None]:
    run = RunDir(out)
    if run.recipe.exists() and not resume:
        raise RunDirError(
            f"{out} holds a run already; continue it with --resume --out {out}, or name another folder with --out"
        )
    _not_in_use(out)
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise RunDirError(f"{existing} is a file, expected a folder for the run; name another one with --out")
    probe = existing / ".write-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunDirError(f"cannot write in {existing}: {error.strerror}; name a writable folder with --out") from error
    return f"{out} can be written", None


def _not_in_use(out: Path) -> None:
    """No living process holds the lock of ``engine.ledger``. Looks with a shared lock, given back at once."""
    path = RunDir(out).ledger.with_suffix(".lock")
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no earlier run; or a folder that cannot be used, which is said below
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
        raise RunDirError(
            f"{out} is in use by process {owner}; wait for it to end, stop it, or choose another --out"
        ) from error
    except OSError as error:
        raise RunDirError(f"{path}: cannot be locked ({error.strerror}); use a local file system") from error
    finally:
        os.close(lock)


def check_earlier_run(recipe: Recipe, prompts: PromptSet | None, out: Path) -> tuple[str, None]:
    run = RunDir.resume(out, recipe)
    checkpoint = CheckpointStore(run.checkpoints, keep=recipe.checkpoint.keep).latest()
    if checkpoint is not None and not run.ledger.exists():
        raise RunDirError(
            f"{run.ledger}: the ledger is gone, and with it what the checkpoint of step {checkpoint.step} was trained "
            "on; restore it from a copy, or start a new run in another folder"
        )
    if prompts is not None and run.ledger.exists():
        identity = ledger_identity(recipe, prompts)
        with Ledger.open(run.ledger, run_name=recipe.name, seed=recipe.seed, identity=identity) as ledger:
            ledger.check_holds(checkpoint.step if checkpoint is not None else 0)
    if checkpoint is None:
        return f"{out} has no checkpoint yet: the run begins anew", None
    return f"{out} goes on after step {checkpoint.step}", None
