"""A checkpoint is whole or not there, whatever happens to the process, the disk or the bits."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import (
    Checkpoint,
    CheckpointState,
    CheckpointStore,
    check_disk,
    package_versions,
    verify,
)
from engine.errors import CheckpointError, RunDirError
from tests.support.disk import tiny_disk

ROOT = Path(__file__).resolve().parents[2]


def state(step: int, **changes: Any) -> CheckpointState:
    fields: dict[str, Any] = {
        "run_name": "test",
        "step": step,
        "seed": 7,
        "recipe": {"name": "test", "steps": 10},
        "next_ticket": 4 * step,
        "ledger_steps": step,
        "weight_digest": f"{step:08x}",
        "packages": {"torch": "2"},
    }
    return CheckpointState(**fields | changes)


def writer(mark: int, *, num_bytes: int = 3000) -> Callable[[Path], None]:
    """Writes what a trainer writes, small, with ``mark`` in it."""

    def write(folder: Path) -> None:
        for name in ("student/config.json", "student/model.safetensors", "trainer/optimizer.safetensors"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes([mark % 256]) * (num_bytes if path.suffix == ".safetensors" else 20))

    return write


def mark_of(checkpoint: Checkpoint | None) -> int:
    assert checkpoint is not None
    return (checkpoint.path / "student" / "model.safetensors").read_bytes()[0]


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, writer(step), state(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_what_was_saved_comes_back(store: CheckpointStore) -> None:
    assert store.latest() is None
    path = store.save(3, writer(3), state(3))
    assert path == store.folder / "step_000003"
    found = store.latest()
    assert found is not None
    assert (found.path, found.step, mark_of(found)) == (path, 3, 3)
    assert found.state.recipe == {"name": "test", "steps": 10}
    assert found.state.created_at.endswith("+00:00")
    assert found.num_bytes == sum(file.stat().st_size for file in path.rglob("*.*")) - manifest_size(path)
    assert names(path) == ["manifest.json", "state.json", "student", "trainer"]


def manifest_size(path: Path) -> int:
    return (path / "manifest.json").stat().st_size


def test_the_newest_ones_are_kept(store: CheckpointStore) -> None:
    save(store, 1, 2, 3, 1_000_000)
    assert names(store.folder) == ["step_000003", "step_1000000"]
    assert store.steps() == [3, 1_000_000]


def test_the_same_step_is_replaced(store: CheckpointStore) -> None:
    save(store, 1, 2)
    store.save(2, writer(99), state(2))
    assert mark_of(store.latest()) == 99
    assert names(store.folder) == ["step_000001", "step_000002"]


def test_checkpoints_of_a_history_that_was_given_up_go(store: CheckpointStore) -> None:
    """Step 8 did not verify, the run was taken up at 6: what it saves next must not stand in the shadow of 8."""
    save(store, 6, 8)
    (store.folder / "step_000008" / "state.json").unlink()
    assert mark_of(store.latest()) == 6
    save(store, 7)
    assert names(store.folder) == ["step_000006", "step_000007"]


def test_a_state_of_another_step_is_a_bug_of_the_caller(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="state is of step 2, the checkpoint of step 1"):
        store.save(1, writer(1), state(2))


def test_an_error_of_the_trainer_goes_up_and_leaves_nothing_behind(store: CheckpointStore) -> None:
    save(store, 1)

    def write(folder: Path) -> None:
        writer(2)(folder)
        raise KeyError("no such tensor")

    with pytest.raises(KeyError, match="no such tensor"):
        store.save(2, write, state(2))
    assert names(store.folder) == ["step_000001"]
    assert mark_of(store.latest()) == 1


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, os.unlink])
@pytest.mark.parametrize(
    "name", ["state.json", "manifest.json", "student/model.safetensors", "trainer/optimizer.safetensors"]
)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    store: CheckpointStore, name: str, damage: Callable[[Path], None]
) -> None:
    save(store, 1, 2)
    damage(store.folder / "step_000002" / name)
    with structlog.testing.capture_logs() as lines:
        assert mark_of(store.latest()) == 1
    (line,) = lines
    assert (line["event"], line["log_level"], line["step"]) == ("checkpoint.corrupt", "warning", 2)
    if name != "manifest.json":
        assert name in line["problem"]


def test_when_none_verifies_the_run_is_not_begun_anew(store: CheckpointStore) -> None:
    save(store, 1, 2)
    for step in (1, 2):
        damage_flip(store.folder / f"step_{step:06d}" / "student" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints .* verifies: .*BLAKE2b differs.*; restore one"
    ):
        store.latest()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(store: CheckpointStore, data: st.DataObject) -> None:
    if not store.steps():
        store.save(1, writer(1, num_bytes=100), state(1))
    folder = store.folder / "step_000001"
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        with pytest.raises(CheckpointError):
            verify(folder)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_checkpoint_of_another_format_says_so(store: CheckpointStore, name: str) -> None:
    save(store, 1)
    path = store.folder / "step_000001" / name
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(CheckpointError, match=f"{name}: has format 2, this program reads 1"):
        verify(path.parent)


def test_a_renamed_checkpoint_is_not_another_step(store: CheckpointStore) -> None:
    save(store, 1)
    (store.folder / "step_000001").rename(store.folder / "step_000009")
    with pytest.raises(CheckpointError, match="holds step 1; was the folder renamed"):
        verify(store.folder / "step_000009")


def test_an_interrupted_replacement_is_found_by_readers_and_undone_by_the_owner(store: CheckpointStore) -> None:
    save(store, 1, 2)
    (store.folder / "step_000002").rename(store.folder / ".step_000002.old-123")
    shutil.copytree(store.folder / "step_000001", store.folder / ".step_000002.tmp-123")
    found = store.latest()
    assert (mark_of(found), found and found.path.name) == (2, ".step_000002.old-123")
    store.recover()
    assert names(store.folder) == ["step_000001", "step_000002"]
    assert mark_of(store.latest()) == 2


def test_other_things_in_the_folder_are_left_alone(store: CheckpointStore) -> None:
    store.folder.mkdir()
    for name in ("notes.txt", ".hidden", "step_12", "step_000001.bak"):
        (store.folder / name).touch()
    save(store, 1, 2, 3)
    assert names(store.folder) == [
        ".hidden", "notes.txt", "step_000001.bak", "step_000002", "step_000003", "step_12"
    ]  # fmt: skip


def write_text(folder: Path) -> None:
    (folder / "student").mkdir()
    (folder / "student" / "weights").write_bytes(bytes(1 << 20))


def write_safetensors(folder: Path) -> None:
    import torch  # here: the processes that are killed below import this file, and do not need it
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1 << 18)}, folder / "model.safetensors")


def write_zip(folder: Path) -> None:
    import torch

    torch.save({"weight": torch.zeros(1 << 18)}, folder / "optimizer.pt")


@pytest.mark.parametrize("write", [write_text, write_safetensors, write_zip])
def test_a_full_disk_is_named_in_whatever_words_it_is_reported(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        store = CheckpointStore(disk.path / "checkpoints")
        save(store, 1)
        with pytest.raises(
            RunDirError, match=r"no room for checkpoint step_000002: 0\.\d MiB free, it needs about 0\.0"
        ):
            store.save(2, write, state(2))
        assert names(store.folder) == ["step_000001"]
        assert mark_of(store.latest()) == 1


def test_a_disk_without_room_for_another_one_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        store = CheckpointStore(disk.path / "checkpoints")
        save(store, 1)
        disk.fill()
        with pytest.raises(RunDirError, match=r"no room .* 0\.0 MiB free"):
            store.save(2, lambda folder: pytest.fail("nothing must be written"), state(2))
        assert mark_of(store.latest()) == 1
        disk.make_room()
        save(store, 2)
        assert mark_of(store.latest()) == 2


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """``ulimit -f``: a larger file fails with EFBIG. Needs no privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_file_size_is_reported_like_a_full_disk(store: CheckpointStore) -> None:
    save(store, 1)
    with (
        file_size_limit(1 << 16),
        pytest.raises(RunDirError, match=r"no room for checkpoint step_000002.*File too large"),
    ):
        store.save(2, write_text, state(2))
    assert names(store.folder) == ["step_000001"]


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk") as disk:
        store = CheckpointStore(disk.path / "checkpoints")
        save(store, 1)
        disk.set_read_only()
        with pytest.raises(RunDirError, match=r"step_000002 cannot be written .*Read-only file system"):
            save(store, 2)
        with pytest.raises(RunDirError, match=r"cannot be written .*Read-only file system"):
            check_disk(disk.path, 0)
        assert mark_of(store.latest()) == 1


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(RunDirError, match=r"/dev/null/run: checkpoint step_000001 cannot be written .*Not a directory"):
        save(CheckpointStore(Path("/dev/null/run")), 1)
    with pytest.raises(RunDirError, match=r"/dev/null/run: cannot be written \(Not a directory\)"):
        check_disk(Path("/dev/null/run"), 0)


def test_the_disk_is_checked_before_the_run(tmp_path: Path) -> None:
    check_disk(tmp_path / "new", 1000)
    assert names(tmp_path / "new") == []
    with pytest.raises(RunDirError, match=r"MiB free, the run needs 1,073,741,828\.0 MiB"):
        check_disk(tmp_path, 1 << 50)


def test_a_store_keeps_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be >= 1"):
        CheckpointStore(tmp_path, keep=0)


def test_versions_of_what_is_not_installed_are_left_out() -> None:
    assert set(package_versions("msgspec", "no-such-package")) == {"msgspec"}
    assert {"torch", "numpy"} <= set(package_versions())


# A real process, really killed.


def run_driver(call: str) -> str:
    code = f"from pathlib import Path; import tests.engine.test_checkpoint as test; test.{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize("step", [3, 2], ids=["new_step", "same_step"])
def test_killed_at_any_moment_either_the_old_or_the_new_is_there(tmp_path: Path, step: int) -> None:
    assert int(run_driver(f"kill_at_each_call(Path({str(tmp_path)!r}), {step})")) >= 40


def kill_at_each_call(folder: Path, step: int) -> None:
    """In a process without threads: fork a save, SIGKILL it before its n-th call, look at what is left; every n."""
    base = CheckpointStore(folder / "base")
    save(base, 1, 2)
    for number in itertools.count(1):
        victim = folder / f"at_{number}"
        shutil.copytree(base.folder, victim)
        if not killed(lambda victim=victim, number=number: save_until(victim, step, number)):  # type: ignore[misc]
            break
        store = CheckpointStore(victim)
        found = mark_of(store.latest())
        assert found in (2, 99), f"call {number}"
        store.recover()
        assert mark_of(store.latest()) == found, f"call {number}"
        for name in names(victim):
            verify(victim / name)  # no leftovers, and nothing half deleted
        if number % 8 == 0:  # and the run goes on as if nothing had been
            store.save(step, writer(100), state(step))
            assert mark_of(store.latest()) == 100
            assert len(store.steps()) == 2
        shutil.rmtree(victim)
    assert mark_of(CheckpointStore(victim).latest()) == 99
    sys.stdout.write(str(number - 1))


def save_until(folder: Path, step: int, number: int) -> None:
    """Save a checkpoint with mark 99, and die just before the ``number``-th thing that is asked of the file system.

    Between two of those nothing changes on the disk but the content of files that are not yet in place.
    """
    left = number

    def audit(event: str, _: tuple[object, ...]) -> None:
        nonlocal left
        if event == "open" or event.startswith("os."):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    CheckpointStore(folder).save(step, writer(99, num_bytes=10), state(step))


def killed(child: Callable[[], None]) -> bool:
    """Fork; True when the child was killed, False when it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit(1)
    return os.WIFSIGNALED(status)


def test_killed_at_random_moments_no_finished_checkpoint_is_lost(tmp_path: Path) -> None:
    assert int(run_driver(f"kill_at_moments(Path({str(tmp_path)!r}))")) >= 40


def kill_at_moments(folder: Path) -> None:
    """Save step after step, killed again and again; what was reported as done must be there, or something later."""
    store = CheckpointStore(folder / "checkpoints")
    moments = random.Random(0)
    done = 0
    for _ in range(20):
        reader, writer_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            for step in itertools.count(done + 1):
                store.save(step, writer(step), state(step))
                os.write(writer_end, b".")
        os.close(writer_end)
        for _ in range(moments.randrange(1, 5)):  # then it dies wherever it is by now
            done += len(os.read(reader, 1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        found = store.latest()
        assert found is not None
        assert found.step >= done
        assert mark_of(found) == found.step % 256
        done = found.step
    sys.stdout.write(str(done))
