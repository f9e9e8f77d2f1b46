"""Whole runs with vLLM as the sampler, in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.runs import World, assert_exactly_once, events, finish, start_run, wait_for
from tests.support.models import tiny_model, write_jsonl

VLLM = (
    "--set", "sampler.backend=vllm",
    "--set", "sampler.vllm.kv_cache_bytes=67108864",
    "--set", "weights.verify_every=1",
    "--json",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """As the other end-to-end tests', with heads wide enough for vLLM's attention."""
    world = World(folder=tmp_path_factory.mktemp("world"))
    tiny_model(world.teacher, arch="qwen3", hidden=128, layers=2, seed=1, scale=0.05)
    tiny_model(world.student, arch="qwen3", hidden=128, layers=1, seed=2, scale=0.05)
    write_jsonl(world.prompts, [{"prompt": f"Tell me about number {i}."} for i in range(24)])
    return world


def engine_process(run_pid: int) -> int:
    """The one that vLLM has started for this run, and named."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{run_pid}\n" in (folder / "status").read_text()
            name = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if is_child and b"EngineCore" in name:
            found.append(int(folder.name))
    (pid,) = found
    return pid


@pytest.mark.slow
def test_an_engine_that_is_killed_starts_again_and_every_occurrence_is_trained_once(
    world: World, tmp_path: Path
) -> None:
    """The weights of every version are compared with the learner's, those of the second engine included."""
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "out"
    process = start_run(recipe, "--out", str(out), "--set", "steps=12", *VLLM)
    wait_for(out, "learner.step", process=process, step=3)
    os.kill(engine_process(process.pid), signal.SIGKILL)
    wait_for(out, "actor.restarted", process=process)
    finished = finish(process)

    assert finished.code == 0, finished.stderr[-6000:]
    log = events(out)
    verified = [line for line in log if line["event"] == "weights.verified"]
    assert {line["version"] for line in verified} >= set(range(1, 12))
    assert max(line["difference"] for line in verified) < 1e-4
    assert [line["actor"] for line in log if line["event"] == "actor.restarted"] == ["sampler"]
    assert_exactly_once(out, steps=12, per_step=4, max_staleness=1)
