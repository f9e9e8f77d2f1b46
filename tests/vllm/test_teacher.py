"""``python -m teacher --backend vllm`` as it is run: a process of its own, real vLLM, asked over HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from teacher.client import TeacherClient
from teacher.protocol import ScoreRequest, Scores, Teacher, score_request
from tests.bench import process_clock
from tests.e2e.runs import (
    PATIENCE_S,
    World,
    assert_exactly_once,
    events,
    finish,
    free_port,
    start_run,
    wait_for,
    wait_ready,
)
from tests.support.models import load, tiny_model, write_jsonl
from tests.teacher.test_backend_torch import assert_same, make_request, reference_scores

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 32_000
LENGTH = 2048


def start(folder: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "teacher", "--backend", "vllm", "--model", str(folder), "--port", str(port)]
    command += ["--num-threads", "1", "--kv-cache-bytes", str(64 << 20), *options]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()


@contextmanager
def service(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    process = start(folder, port, *options)
    try:
        wait_ready(port, process)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        end(process)


@pytest.fixture(scope="module")
def wide_folder(root: Path) -> Path:
    """A vocabulary that fills memory where whole rows are kept."""
    return tiny_model(
        root / "wide", arch="qwen3", hidden=128, layers=1, vocab=VOCAB, max_positions=LENGTH, scale=0.1, seed=3
    )


@pytest.fixture(scope="module")
def wide(wide_folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with service(wide_folder, "--max-batch-tokens", "256", "--block-rows", "16") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(wide: tuple[subprocess.Popen[bytes], str]) -> AsyncIterator[TeacherClient]:
    async with TeacherClient(wide[1], values="float32") as client:
        yield client


async def ask(client: Teacher, request: ScoreRequest, *, alone: bool = False) -> Scores:
    return await client.score(
        prompt_ids=request.prompt_ids.tolist(),
        response_ids=request.response_ids.tolist(),
        top_k=request.top_k,
        extra_ids=request.extra_ids,
        alone=alone,
    )


async def test_answers_equal_a_plain_forward_pass_whole_and_in_pieces(client: TeacherClient, wide_folder: Path) -> None:
    """The last two are longer than one forward pass, and one of them fills every position."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, 9).tolist()
    requests = [
        make_request(rng, prompt=prompt, num_extra=3, vocab_size=VOCAB),
        make_request(rng, prompt=prompt, num_response=11, top_k=1, vocab_size=VOCAB),
        make_request(rng, num_prompt=1, num_response=1, top_k=300, vocab_size=VOCAB),
        make_request(rng, num_prompt=300, num_response=270, top_k=64, num_extra=2, vocab_size=VOCAB),
        make_request(rng, num_prompt=48, num_response=LENGTH - 48, top_k=4, vocab_size=VOCAB),
    ]

    answers = await asyncio.gather(*(ask(client, request) for request in requests))

    model = load(wide_folder)
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, reference_scores(model, request))


async def test_an_answer_computed_alone_has_the_same_bits_under_load(client: TeacherClient) -> None:
    request = make_request(np.random.default_rng(1), num_response=20, vocab_size=VOCAB)
    others = [make_request(np.random.default_rng(seed), vocab_size=VOCAB) for seed in range(2, 8)]
    quiet = await ask(client, request, alone=True)

    *_, loud = await asyncio.gather(*(ask(client, other) for other in others), ask(client, request, alone=True))

    np.testing.assert_array_equal(loud.top_logprobs, quiet.top_logprobs)
    np.testing.assert_array_equal(loud.sampled_logprobs, quiet.sampled_logprobs)


async def test_a_prompt_that_answers_share_is_computed_once_and_no_row_is_lost(
    client: TeacherClient, wide: tuple[subprocess.Popen[bytes], str], wide_folder: Path
) -> None:
    """One at a time, so that only the cache can share; the last two were, or begin as, an answer from before."""
    rng = np.random.default_rng(21)
    prompt, response = rng.integers(0, VOCAB, 1900).tolist(), rng.integers(0, VOCAB, 90).tolist()
    shared = [make_request(rng, prompt=prompt, num_response=3, top_k=4, vocab_size=VOCAB) for _ in range(6)]
    for answered in (response, response[:70], response):
        shared.append(score_request(prompt_ids=prompt, response_ids=answered, top_k=4))
    apart = [make_request(rng, num_prompt=1900, num_response=3, top_k=4, vocab_size=VOCAB) for _ in range(6)]
    before, answers, costs_s = process_clock.cpu_s(wide[0].pid), [], []
    for request in (*shared[:6], *apart, *shared[6:]):
        answers.append(await ask(client, request))
        costs_s.append((now := process_clock.cpu_s(wide[0].pid)) - before)
        before = now

    # Most of what is left of an answer that shares its prompt is not the model's.
    assert sum(costs_s[1:6]) < sum(costs_s[7:12]) / 2
    model = load(wide_folder)
    for request, answer in zip((*shared[:6], *apart, *shared[6:]), answers, strict=True):
        assert_same(answer, reference_scores(model, request))


async def test_memory_is_bounded_by_block_rows_and_not_by_the_length_of_an_answer(
    client: TeacherClient, wide: tuple[subprocess.Popen[bytes], str]
) -> None:
    def peak_bytes() -> int:
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{wide[0].pid}/status").read_text())
        return int(kilobytes) * 1024

    rng = np.random.default_rng(8)
    await ask(client, make_request(rng, num_response=250, top_k=64, vocab_size=VOCAB))
    before = peak_bytes()

    await ask(client, make_request(rng, num_response=LENGTH - 8, top_k=64, vocab_size=VOCAB))

    all_rows = LENGTH * VOCAB * 4
    assert peak_bytes() - before < all_rows // 8


async def test_latent_attention_and_experts_are_scored_rightly(root: Path) -> None:
    folder = tiny_model(root / "teacher_moe", arch="deepseek_v3", hidden=128, layers=2, tied=False, scale=0.05)
    rng = np.random.default_rng(0)
    requests = [make_request(rng, num_prompt=30, num_response=20, num_extra=2) for _ in range(3)]

    with service(folder) as (process, url):
        async with TeacherClient(url, values="float32") as client:
            answers = await asyncio.gather(*(ask(client, request) for request in requests))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "it drains"

    model = load(folder)
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, reference_scores(model, request))


@pytest.mark.slow
async def test_a_teacher_that_is_killed_and_comes_back_costs_nothing_but_time(root: Path, tmp_path: Path) -> None:
    world = World(folder=root / "teacher_world")
    tiny_model(world.teacher, arch="qwen3", hidden=128, layers=1, seed=1)
    tiny_model(world.student, hidden=32, layers=1, seed=2)
    write_jsonl(world.prompts, [{"prompt": f"Tell me about number {i}."} for i in range(24)])
    port, out = free_port(), tmp_path / "out"
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",))

    with ExitStack() as processes:
        first = start(world.teacher, port)
        processes.callback(end, first)
        wait_ready(port, first)
        run = start_run(recipe, "--out", str(out), "--json")
        processes.callback(end, run)
        wait_for(out, "learner.step", process=run, step=2)
        first.kill()
        first.wait()
        wait_for(out, "teacher.parked", process=run)
        second = start(world.teacher, port)
        processes.callback(end, second)
        wait_ready(port, second)
        finished = await asyncio.to_thread(finish, run)

    assert finished.code == 0, finished.stderr[-3000:]
    assert "teacher.resumed" in [line["event"] for line in events(out)]
    assert_exactly_once(out, steps=6, per_step=4, max_staleness=1)


async def test_a_cache_of_unknown_size_is_refused_on_cpu(wide_folder: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "teacher", "--backend", "vllm", "--model", str(wide_folder), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert done.returncode == 2
    assert "--kv-cache-bytes" in done.stderr.splitlines()[-1]
