"""Whole runs with the learner on Megatron-core: its ranks are real processes, and so is what befalls them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import (
    ROOT,
    World,
    assert_exactly_once,
    events,
    finish,
    run,
    start_run,
    wait_for,
    weights_digest,
)

pytest.importorskip("megatron.core")

TWO_RANKS = {
    "learner.backend": "megatron",
    "learner.megatron.data_parallel": 2,
    "learner.megatron.dtype": "float32",
    "learner.megatron.command_timeout_s": 60,
}
"""Two copies of the student. The timeout is far above what a call takes here."""


def options(**more: Any) -> list[str]:
    """``TWO_RANKS`` with changes; ``__`` stands for the dot."""
    settings = TWO_RANKS | {name.replace("__", "."): value for name, value in more.items()}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={str(value).lower()}")]


def rank_pids(out: Path) -> list[int]:
    """Of the ranks that were started last."""
    return next(line["pids"] for line in reversed(events(out)) if line["event"] == "ranks.started")


def assert_no_rank_is_left(out: Path) -> None:
    pids = [pid for line in events(out) if line["event"] == "ranks.started" for pid in line["pids"]]
    assert pids
    # They were waited for before the run ended; a number that is in use again belongs to somebody else.
    assert not [pid for pid in pids if b"rank_process" in command_of(pid)]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def signal_a_rank(process: subprocess.Popen[str], out: Path, rank: int, name: signal.Signals, *, after: str) -> None:
    """At the first ``after`` that the present ranks have logged, or when the run has ended."""
    starts = sum(line["event"] == "ranks.started" for line in events(out))
    wait_for(out, "ranks.started", process=process, count=starts + 1)
    seen = sum(line["event"] == after for line in events(out))
    wait_for(out, after, process=process, count=seen + 1)
    assert process.poll() is None, process.communicate()[1][-3000:]
    os.kill(rank_pids(out)[rank], name)


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_restores_itself_and_ends_in_the_bits_of_a_quiet_one(
    world: World, tmp_path: Path
) -> None:
    """The quiet one's ranks wait for every sum and gather, the killed one's do not."""
    recipe = world.recipe(tmp_path / "r.py")
    same = options(max_staleness=0, deterministic=True, steps=16, learner__megatron__max_restores=1)
    overlapped = options(learner__megatron__overlap_grad_reduce=True, learner__megatron__overlap_param_gather=True)
    run(recipe, "--out", str(tmp_path / "quiet"), *same, "--json")

    out = tmp_path / "killed"
    process = start_run(recipe, "--out", str(out), *same, *overlapped, "--json")
    signal_a_rank(process, out, 0, signal.SIGKILL, after="weights.push")
    finished = finish(process)

    assert finished.code == 0, finished.stderr[-3000:]
    (restored,) = (line for line in events(out) if line["event"] == "run.restoring")
    assert restored["restores_left"] == 0
    assert "rank 0 of 2 was killed by SIGKILL" in restored["cause"]
    assert weights_digest(out, 16) == weights_digest(tmp_path / "quiet", 16)
    assert_exactly_once(out, steps=16, per_step=4, max_staleness=0)
    assert_no_rank_is_left(out)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_its_name_and_resume_goes_on_exactly_once(
    world: World, tmp_path: Path
) -> None:
    """Once its restores are used up."""
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "out"
    process = start_run(recipe, "--out", str(out), *options(steps=16, learner__megatron__max_restores=1))
    signal_a_rank(process, out, 0, signal.SIGKILL, after="learner.step")
    signal_a_rank(process, out, 1, signal.SIGKILL, after="learner.step")
    failed = finish(process)

    assert failed.code == 1
    assert [line["restores_left"] for line in events(out) if line["event"] == "run.restoring"] == [0]
    assert "rank 1 of 2 was killed by SIGKILL" in failed.stderr
    assert_no_rank_is_left(out)
    # Another layout may go on from the checkpoint.
    run(recipe, "--resume", "--out", str(out), *options(steps=16, learner__megatron__data_parallel=1))
    assert_exactly_once(out, steps=16, per_step=4, max_staleness=1)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_in_time(world: World, tmp_path: Path) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "out"
    process = start_run(recipe, "--out", str(out), *options(steps=400, learner__megatron__command_timeout_s=6))
    signal_a_rank(process, out, 1, signal.SIGSTOP, after="learner.step")
    failed = finish(process)

    assert failed.code == 1
    assert "rank 1 of 2 did not answer" in failed.stderr
    assert "stopped by a signal" in failed.stderr
    assert_no_rank_is_left(out)


def check(recipe: Path, *settings: str) -> str:
    finished = run(recipe, "--check", *settings, expect=2)
    return finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"learner__megatron__pipeline_parallel": 4, "learner__device": "cuda"},
            (
                "pipeline_parallel=4 is more than the student's 1 layers",
                "needs 8 GPUs (",
            ),
        ),
        (
            {"learner__megatron__tensor_parallel": 64, "learner__device": "cuda:1"},
            ("tensor_parallel=64 does not divide the student's", "it is 'cuda' (rank r on device r) or 'cpu'"),
        ),
        ({"learner__gradient_checkpointing": True}, ("set learner.megatron.recompute instead",)),
    ],
)
def test_the_check_refuses_a_layout_that_cannot_run(
    world: World, tmp_path: Path, more: dict[str, Any], said: tuple[str, ...]
) -> None:
    found = check(world.recipe(tmp_path / "r.py"), *options(**more))

    for sentence in said:
        assert sentence in found


def test_the_check_says_how_to_install_what_is_missing(world: World, tmp_path: Path) -> None:
    # An environment without the package: another one's metadata is all that is found.
    program = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'megatron-core': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from engine.run import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    recipe = world.recipe(tmp_path / "r.py")
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe), "--check", *options()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "pip install 'slipstream[megatron]'" in done.stdout + done.stderr


def test_show_tells_the_layout(world: World, tmp_path: Path) -> None:
    shown = run(world.recipe(tmp_path / "r.py"), "--show", *options()).stdout

    assert "megatron on 2 × cpu (data 2)" in shown
