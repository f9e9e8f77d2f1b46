"""vLLM as the sampler beside our torch generator and ``model.generate``, on the demo's student, one thread each.

    python -m tests.bench.bench_vllm [--quick] [--model DIR]

Speed: as many prompts of one length as slots, answers of one length, sampled at temperature 1 from the whole
vocabulary. ``model.generate`` returns no log-probabilities, the others do. What is counted is CPU time of the process
that decodes and, for vLLM, of ours that feeds it: with one thread that is what the wall would say on a quiet machine.
The contenders take turns in one process; a ratio is the median over the turns.

Weights: a new version comes each time that as many answers as a step has have ended, and others are under way all the
time. The share of a step for which decoding stands still is the pause divided by the time from one version to the next,
both on the wall: here generation is all that a step consists of.

vLLM has an environment of its own: where it is not installed, the interpreter of ``.venv-vllm`` is called.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import torch
import uvloop
from transformers import PreTrainedModel

from engine.generation.hf import HFGenerator
from engine.generation.vllm import VllmGenerator
from engine.recipe import SamplerConfig, StudentConfig, VllmConfig, WeightsConfig
from engine.training.export import buckets, named_tensors
from tests.bench.bench_generation import Load, loads, requests, time_generate
from tests.bench.process_clock import cpu_s
from tests.bench.report import OURS, Report, Row, add_options, fair_environment, finish, progress
from tests.support.models import load

INTERPRETER = Path(".venv-vllm/bin/python")
STUDENT = Path("models/smollm2/student")
NUM_SLOTS = 16
PROMPT_TOKENS, ANSWER_TOKENS = 32, 48
PER_STEP = 8
"""Answers."""
RIVAL = "transformers generate"
TORCH = "torch generator"


async def time_wave(generator: HFGenerator | VllmGenerator, work: Load, clock: Callable[[], float]) -> float:
    began = clock()
    await asyncio.gather(*map(generator.generate, requests(work)))
    return clock() - began


async def pauses(
    generator: HFGenerator | VllmGenerator, model: PreTrainedModel, work: Load, *, num_versions: int
) -> tuple[float, float]:
    """Seconds that decoding stood still per version, and seconds from one to the next."""
    ended = asyncio.Queue[None]()
    asked, numbers = requests(work), itertools.count()

    async def ask() -> None:
        while True:
            number = next(numbers)
            one = asked[number % len(asked)]
            await generator.generate(msgspec.structs.replace(one, request_id=number))
            ended.put_nowait(None)

    asking = [asyncio.create_task(ask()) for _ in range(NUM_SLOTS)]
    config = WeightsConfig(kv_cache="keep")
    first = generator.statistics().version
    # The first one takes memory that the others find.
    began, before = 0.0, 0.0
    for version in range(first + 1, first + num_versions + 2):
        for _ in range(PER_STEP):
            await ended.get()
        await generator.update_weights(version, buckets(named_tensors(model), bucket_bytes=64 << 20), config=config)
        if version == first + 1:
            began, before = time.perf_counter(), generator.statistics().paused_s
    paused, passed = generator.statistics().paused_s - before, time.perf_counter() - began
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    return paused / num_versions, passed / num_versions


async def measure(folder: Path, *, turns: int, num_versions: int) -> Report:
    torch.set_num_threads(1)
    model = load(folder)
    student = StudentConfig(path=str(folder))
    (work, _) = loads(
        NUM_SLOTS, prompt_tokens=PROMPT_TOKENS, answer_tokens=ANSWER_TOKENS, vocab=model.config.vocab_size
    )
    in_torch = HFGenerator(config=SamplerConfig(num_slots=NUM_SLOTS), student=student)
    in_vllm = VllmGenerator(
        config=SamplerConfig(backend="vllm", num_slots=NUM_SLOTS, vllm=VllmConfig(kv_cache_bytes=256 << 20)),
        student=student,
        max_length=PROMPT_TOKENS + ANSWER_TOKENS,
    )
    await in_torch.start()
    progress("vLLM starts")
    await in_vllm.start()
    assert in_vllm._life is not None
    (pid,) = await in_vllm._life.engine.call_workers("process_id")
    seconds: dict[str, list[float]] = {RIVAL: [], TORCH: [], OURS: []}
    waves: dict[str, Callable[[], Awaitable[float]]] = {
        RIVAL: lambda: asyncio.to_thread(time_generate, model, work, time.process_time),
        TORCH: lambda: time_wave(in_torch, work, time.process_time),
        OURS: lambda: time_wave(in_vllm, work, lambda: time.process_time() + cpu_s(pid)),
    }
    for turn in range(turns + 1):
        progress(f"turn {turn} of {turns}")
        for name, wave in waves.items():
            took = await wave()
            if turn:  # the first one warms up
                seconds[name].append(took)
    rows = [
        Row(
            load=f"{NUM_SLOTS} answers of {ANSWER_TOKENS} tokens",
            contender=name if name != OURS else f"{OURS}, vLLM",
            value=work.num_tokens / statistics.median(took),
            unit="tokens/CPU s",
            ratio=None if name == OURS else statistics.median(t / o for t, o in zip(took, seconds[OURS], strict=True)),
        )
        for name, took in seconds.items()
    ]
    for name, generator in ((TORCH, in_torch), (f"{OURS}, vLLM", in_vllm)):
        progress(f"{name}: a version every {PER_STEP} answers")
        paused_s, step_s = await pauses(generator, model, work, num_versions=num_versions)
        what = f"a version every {PER_STEP} answers"
        rows += [
            Row(load=what, contender=name, value=1e3 * paused_s, unit="ms paused per version"),
            Row(load=what, contender=name, value=100 * paused_s / step_s, unit="% of a step"),
        ]
    await in_torch.stop()
    await in_vllm.stop()
    return Report(
        bench="vllm",
        rows=tuple(rows),
        notes=("vLLM's engine is another process: its CPU time and that of ours are added.",),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STUDENT)
    add_options(parser)
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        if not INTERPRETER.is_file():
            missing = f"vllm is not installed here, and there is no {INTERPRETER}; make it with: make test-vllm"
            return finish(Report(bench="vllm", rows=(), failures=(missing,)), as_json=arguments.json)
        command = [str(INTERPRETER), "-m", "tests.bench.bench_vllm", *sys.argv[1:]]
        return subprocess.run(command, env=fair_environment(), check=False).returncode
    if not (arguments.model / "config.json").is_file():
        missing = f"no model in {arguments.model}; make it with: make models"
        return finish(Report(bench="vllm", rows=(), failures=(missing,)), as_json=arguments.json)
    turns, num_versions = (1, 2) if arguments.quick else (3, 6)
    report = uvloop.run(measure(arguments.model, turns=turns, num_versions=num_versions))
    return finish(report, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
