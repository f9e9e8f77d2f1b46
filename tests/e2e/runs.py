"""Real runs in real processes: tiny models, a recipe file, ``python -m engine.run`` and ``python -m teacher``."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.support.models import tiny_model, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0
"""Longer than anything here takes on a busy machine, where a vLLM engine may need minutes to start; reaching it is a
failure."""

RECIPE = """
from engine.recipe import *

def recipe():
    return Recipe(
        name="tiny",
        steps=6,
        student=StudentConfig(path={student!r}),
        teacher={teacher},
        data=DataConfig(path={prompts!r}, num_rows=20, max_prompt_tokens=128),
        seed=7,
        max_staleness=1,
        rollouts_per_step=4,
        samples_per_prompt=2,
        sampler=SamplerConfig(max_new_tokens=8, num_slots=4),
        learner=LearnerConfig(lr=3e-3, micro_batch_tokens=256, block_rows=32),
        evaluation=EvalConfig(data=DataConfig(path={prompts!r}, first_row=20, max_prompt_tokens=128), num_shown=1),
        checkpoint=CheckpointConfig(every_steps=2, keep=2),
        node=NodeConfig(grace_s=30.0),
    )
"""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """Models and prompts that all runs of a test session share."""

    folder: Path

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    def recipe(self, path: Path, *, urls: tuple[str, ...] = (), more: str = "") -> Path:
        """Write a recipe file: a teacher in the same process, or replicas at ``urls``."""
        if urls:
            teacher = f"HttpTeacher(urls={urls!r}, top_k=16, probe_every_s=0.2, backoff_s=0.05)"
        else:
            teacher = f"LocalTeacher(model={str(self.teacher)!r}, top_k=16)"
        path.write_text(RECIPE.format(student=str(self.student), prompts=str(self.prompts), teacher=teacher) + more)
        return path


def make_world(folder: Path) -> World:
    world = World(folder=folder)
    tiny_model(world.teacher, hidden=48, layers=2, seed=1)
    tiny_model(world.student, hidden=32, layers=1, seed=2)
    topics = ("rain", "bread", "trees", "music", "time", "gold", "snow", "tea", "maps", "sleep", "iron", "light")
    write_jsonl(world.prompts, [{"prompt": f"Tell me about {topic} {i}."} for i in range(2) for topic in topics])
    return world


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}


def start_run(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "engine.run", str(recipe), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"the process hangs\n{stdout[-2000:]}\n{stderr[-4000:]}") from None
    return Finished(code=process.returncode, stdout=stdout, stderr=stderr)


def run(recipe: Path, *arguments: str, expect: int = 0) -> Finished:
    finished = finish(start_run(recipe, *arguments))
    assert finished.code == expect, f"exit {finished.code}\n{finished.stdout[-2000:]}\n{finished.stderr[-6000:]}"
    return finished


@contextmanager
def teacher_process(world: World, port: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ready teacher service; killed at the end."""
    process = start_teacher(world, port, *arguments)
    try:
        wait_ready(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


def start_teacher(world: World, port: int, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "teacher", "--model", str(world.teacher), "--port", str(port), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the teacher ended with {process.returncode}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)  # another process has no event to wait for
    raise AssertionError("the teacher is not ready")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def events(out: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's log; torn ones are left out."""
    path = out / "events.jsonl"
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def wait_for(out: Path, event: str, *, process: subprocess.Popen[str], count: int = 1, **fields: object) -> None:
    """Return when the run has logged ``event`` (with these fields) ``count`` times, or has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        hits = [e for e in events(out) if e["event"] == event and all(e.get(k) == v for k, v in fields.items())]
        if len(hits) >= count or process.poll() is not None:
            return
        time.sleep(0.02)  # another process has no event to wait for
    raise AssertionError(f"{event} {fields} was not logged {count} times")


def weights_digest(out: Path, step: int) -> str:
    """Of every byte of the student's weights."""
    folder = out / "checkpoints" / f"step_{step:06d}" / "student"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ledger_rows(out: Path) -> list[dict[str, Any]]:
    connection = sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("SELECT * FROM rollouts ORDER BY rollout_id")]
    finally:
        connection.close()


def assert_exactly_once(out: Path, *, steps: int, per_step: int, max_staleness: int) -> None:
    rows = ledger_rows(out)
    trained = [row for row in rows if row["state"] == "trained"]
    identities = [(row["epoch"], row["prompt_index"], row["sample_index"]) for row in rows]
    assert len(set(identities)) == len(identities)
    assert {row["state"] for row in rows} <= {"trained", "failed"}
    by_step = {step: sum(row["trained_step"] == step for row in trained) for step in range(1, steps + 1)}
    assert by_step == dict.fromkeys(range(1, steps + 1), per_step)
    assert all(0 <= row["trained_step"] - 1 - row["version_first"] <= max_staleness for row in trained)


def stop(process: subprocess.Popen[Any], name: signal.Signals = signal.SIGTERM) -> None:
    process.send_signal(name)
