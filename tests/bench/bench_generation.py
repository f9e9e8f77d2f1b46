"""Tokens per second of our generator beside ``model.generate`` of transformers, in one process, taking turns.

    python -m tests.bench.bench_generation [--size tiny|small|student] [--model DIR] [--threads N] [--cpu-time]

Two loads for each number of slots. *equal*: as many prompts as slots, all of one length, all answers of one length: the
best case of ``generate``. *mixed*: four times as many prompts with answers from an eighth of that length to all of it;
``generate`` takes them in batches that last as long as their longest answer, ours refills a slot as it falls free.

Both sample at temperature 1 from the whole vocabulary, and ours returns log-probabilities as well. A ratio is the
median over the turns of ``generate``'s time divided by ours in the same turn: above 1 is faster. Also printed: how far
our log-probabilities are from a plain forward pass. On a machine that is shared,
``--cpu-time`` counts the process's seconds instead of the wall's, with one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvloop
from transformers import PreTrainedModel

from engine.generation.hf import HFGenerator
from engine.generation.protocol import Generation, GenerationRequest
from engine.recipe import SamplerConfig, StudentConfig
from engine.streams import stream_key
from engine.types import SamplingParams
from tests.bench.report import OURS, Report, Row, Target, add_options, finish
from tests.support.models import load, plain_logits, tiny_model

RIVAL = "transformers generate"

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 384},
    "small": {"hidden": 256, "layers": 8, "heads": 8, "kv_heads": 4, "vocab": 16_384},
    "student": {"hidden": 576, "layers": 24, "heads": 9, "kv_heads": 3, "vocab": 49_152},
}


class Load(NamedTuple):
    name: str
    prompts: list[list[int]]
    lengths: list[int]
    num_slots: int

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def loads(num_slots: int, *, prompt_tokens: int, answer_tokens: int, vocab: int) -> list[Load]:
    generator = torch.Generator().manual_seed(num_slots)

    def prompts(num: int) -> list[list[int]]:
        ids: list[list[int]] = torch.randint(3, vocab, (num, prompt_tokens), generator=generator).tolist()
        return ids

    mixed = torch.randint(answer_tokens // 8, answer_tokens + 1, (4 * num_slots,), generator=generator).tolist()
    return [
        Load("equal", prompts(num_slots), [answer_tokens] * num_slots, num_slots),
        Load("mixed", prompts(4 * num_slots), mixed, num_slots),
    ]


@torch.inference_mode()
def time_generate(model: PreTrainedModel, load: Load, clock: Callable[[], float]) -> float:
    """Seconds for batches of ``num_slots`` prompts, in order, each as long as its longest answer."""
    began = clock()
    for first in range(0, len(load.prompts), load.num_slots):
        part = slice(first, first + load.num_slots)
        ids = torch.tensor(load.prompts[part])
        longest = max(load.lengths[part])
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest,
            min_new_tokens=longest,
            pad_token_id=0,
        )
    return clock() - began


def requests(load: Load) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=number,
            token_ids=tuple(prompt),
            params=SamplingParams(max_new_tokens=length),
            stream_key=stream_key("bench", number),
        )
        for number, (prompt, length) in enumerate(zip(load.prompts, load.lengths, strict=True))
    ]


async def time_ours(generator: HFGenerator, load: Load, clock: Callable[[], float]) -> tuple[float, list[Generation]]:
    began = clock()
    answers = await asyncio.gather(*map(generator.generate, requests(load)))
    return clock() - began, answers


def largest_error(model: PreTrainedModel, load: Load, answers: Sequence[Generation]) -> float:
    """Nats, over a few answers."""
    worst = 0.0
    for prompt, answer in list(zip(load.prompts, answers, strict=True))[:4]:
        logits_TV = plain_logits(model, [*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
        exact_T = logits_TV.double().log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        worst = max(worst, float((exact_T - torch.tensor(answer.logprobs, dtype=torch.float64)).abs().max()))
    return worst


async def measure(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(arguments.threads)
    model = load(folder)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows: list[Row] = []
    for num_slots in arguments.slots:
        generator = HFGenerator(
            config=SamplerConfig(num_slots=num_slots, num_threads=arguments.threads),
            student=StudentConfig(path=str(folder)),
        )
        await generator.start()
        for one in loads(
            num_slots,
            prompt_tokens=arguments.prompt_tokens,
            answer_tokens=arguments.answer_tokens,
            vocab=model.config.vocab_size,
        ):
            theirs, ours, error = [], [], 0.0
            for turn in range(arguments.repeats + 1):
                their_s = time_generate(model, one, clock)
                our_s, answers = await time_ours(generator, one, clock)
                if turn == 0:  # the first turn warms up
                    error = largest_error(model, one, answers)
                    continue
                theirs.append(their_s)
                ours.append(our_s)
            name = f"{one.name}, {num_slots} slots, {len(one.prompts)} answers"
            unit = "tokens/CPU s" if arguments.cpu_time else "tokens/s"
            ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
            rows += [
                Row(load=name, contender=OURS, value=one.num_tokens / statistics.median(ours), unit=unit),
                Row(
                    load=name,
                    contender=RIVAL,
                    value=one.num_tokens / statistics.median(theirs),
                    unit=unit,
                    ratio=ratio,
                ),
                Row(load=name, contender="ours, against a plain pass", value=error, unit="nats at most"),
            ]
        await generator.stop()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="a random model made on the spot")
    parser.add_argument("--model", type=Path, help="a folder instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--answer-tokens", type=int, default=48)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.slots = 1, arguments.slots[-1:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or tiny_model(Path(scratch), max_positions=8192, scale=0.02, **SIZES[arguments.size])
        rows = uvloop.run(measure(folder, arguments))
    slowest = min(row.ratio for row in rows if row.ratio is not None)
    target = Target(what=f"speed of {RIVAL}, worst load", found=slowest, bound=1.0)
    return finish(Report(bench="generation", rows=tuple(rows), targets=(target,)), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
