"""Where the main job's CPU time goes: every phase of its step by itself, one thread, no event loop around it.

    python -m tests.bench.bench_phases [--quick] [--hottest teacher]

Needs ``make models``. The recipe is ``recipes/smollm2.py``: a wave of 16 prompts is decoded, then scored and trained in
two steps of 8. CPU time of the computing thread, the least of the rounds behind the first. ``--hottest PHASE`` runs
torch's profiler over one round of that phase instead and prints its most expensive operations.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from engine.generation.decoder import Decoder
from engine.generation.model import load_decodable
from engine.generation.protocol import Generation, GenerationRequest
from engine.load_recipe import load_recipe
from engine.precision import compute_dtype
from engine.training.hf import HFTrainer
from engine.types import Prompt, Rollout, SamplingParams, ScoredRollout
from teacher.backend_torch import TorchBackend
from teacher.protocol import ScoreRequest
from tests.bench.report import OURS, Report, Row, add_options, finish

RECIPE = Path("recipes/smollm2.py")
TEACHER = "models/smollm2/teacher"
WAVE = 16
PHASES = ("prefill", "decode", "teacher", "accumulate", "optimizer", "digest", "weights")
CPU = torch.device("cpu")


class Phases:
    """CPU seconds of each phase, and the profiler over one of them."""

    def __init__(self, hottest: str | None) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in PHASES}
        self.hottest = hottest
        self.table = ""

    @contextmanager
    def phase(self, name: str, *, share: float = 1.0) -> Iterator[None]:
        """``share``: of it belongs to one step."""
        if name == self.hottest:
            with profile(activities=[ProfilerActivity.CPU]) as measured:
                yield
            self.table = measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
            return
        began = time.thread_time()
        yield
        self.seconds[name].append((time.thread_time() - began) * share)


def steps_of(phases: Phases) -> Callable[[int], None]:
    """Loads all models; the function does two steps."""
    torch.set_num_threads(1)
    recipe, _ = load_recipe(RECIPE, [])
    assert recipe.student.path, "the recipe names a student"
    prompts = _prompts(recipe.student.path, Path(recipe.data.path))
    ready = load_decodable(recipe.student, dtype=compute_dtype(recipe.sampler.dtype, CPU), device=CPU)
    decoder = Decoder(ready, num_slots=WAVE, version=0)
    teacher = TorchBackend(model=TEACHER, dtype="auto", num_threads=1)
    teacher.load()
    trainer = HFTrainer(
        config=recipe.learner, student=recipe.student, objective=recipe.objective, steps=recipe.steps, seed=recipe.seed
    )
    trainer.start()
    params = SamplingParams(max_new_tokens=recipe.sampler.max_new_tokens, temperature=1.0)

    def two_steps(number: int) -> None:
        asked = [prompts[(WAVE * number + i) % len(prompts)] for i in range(WAVE)]
        answers = _decode(decoder, asked, params, phases, seed=number)
        for first in (0, WAVE // 2):
            here = range(first, first + WAVE // 2)
            requests = [
                ScoreRequest(
                    prompt_ids=np.array(asked[i], np.int32),
                    response_ids=np.array(answers[i].token_ids, np.int32),
                    top_k=recipe.teacher.top_k,
                )
                for i in here
            ]
            with phases.phase("teacher"):
                scores = teacher.score(requests)
            scored = [
                ScoredRollout(rollout=_rollout(i, asked[i], answers[i]), scores=each)
                for i, each in zip(here, scores, strict=True)
            ]
            with phases.phase("accumulate"):
                trainer.accumulate(scored)
            with phases.phase("optimizer"):
                trainer.finish_step()
            with phases.phase("digest"):
                digest = trainer.digest()
            with phases.phase("weights"), torch.inference_mode():
                buckets = trainer.export(bucket_bytes=recipe.weights.bucket_bytes)
                ready.staging.exchange(ready.staging.stage(buckets, is_wanted=lambda: True, digest=digest))

    return two_steps


def _decode(
    decoder: Decoder, asked: Sequence[tuple[int, ...]], params: SamplingParams, phases: Phases, *, seed: int
) -> dict[int, Generation]:
    requests = [
        (i, GenerationRequest(request_id=i, token_ids=ids, params=params, stream_key=1000 * seed + i))
        for i, ids in enumerate(asked)
    ]
    answers: dict[int, Generation] = {}
    with torch.inference_mode():
        with phases.phase("prefill", share=0.5):
            decoder.admit(requests)
        with phases.phase("decode", share=0.5):
            while decoder.num_running:
                answers |= dict(decoder.step())
    return answers


def _prompts(model: str, rows: Path) -> list[tuple[int, ...]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    talks = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in rows.read_text().splitlines()]
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True}
    return [tuple(tokenizer.apply_chat_template(talk, **options)["input_ids"]) for talk in talks]


def _rollout(ticket: int, prompt: tuple[int, ...], answer: Generation) -> Rollout:
    return Rollout(
        prompt=Prompt(rollout_id=ticket, epoch=0, prompt_index=ticket, sample_index=0, token_ids=prompt),
        response_ids=answer.token_ids,
        logprobs=answer.logprobs,
        sampling_logprobs=answer.sampling_logprobs,
        spans=answer.spans,
        finish_reason=answer.finish_reason,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hottest", choices=PHASES)
    add_options(parser)
    options = parser.parse_args()
    if not Path(TEACHER).is_dir():
        failures = (f"no model in {TEACHER}; make it with: python -m recipes.smollm2_models",)
        return finish(Report(bench="phases", rows=(), failures=failures), as_json=options.json)
    phases = Phases(None)
    two_steps = steps_of(phases)
    for number in range(2 if options.quick else 4):
        phases.hottest = options.hottest if number else None
        two_steps(number)
    if options.hottest:
        sys.stdout.write(phases.table + "\n")
        return 0
    best = {name: 1e3 * min(seconds[1:]) for name, seconds in phases.seconds.items()}
    load = "one step of 8 answers"
    rows = [Row(load=load, contender=f"{OURS}, {name}", value=ms, unit="CPU ms") for name, ms in best.items()]
    rows.append(Row(load=load, contender=f"{OURS}, in all", value=sum(best.values()), unit="CPU ms"))
    return finish(Report(bench="phases", rows=tuple(rows)), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
