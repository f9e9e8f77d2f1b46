"""How exact the generator's log-probabilities are, with a float64 pass as the judge, beside plain float32 passes.

    python -m tests.bench.bench_logprobs --model models/smollm2/student

The generator answers prompts of the demo at temperature 1 in float32; its log-probabilities, and those that plain
passes of transformers (sdpa and eager) give the same tokens, are compared with a pass in float64, and with each other.
Needs a model of the Llama family, whose norm computes in float32 whatever its weights are and is replaced for the
judge.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.generation.hf import HFGenerator
from engine.generation.protocol import Generation, GenerationRequest
from engine.prompts import load_prompts, load_tokenizer
from engine.recipe import DataConfig, SamplerConfig, StudentConfig
from engine.types import SamplingParams

PROMPTS = Path(__file__).resolve().parents[2] / "recipes" / "data" / "prompts.jsonl"
Numbers = npt.NDArray[np.float64]


async def answers(model: str, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[Generation]:
    sampler = SamplerConfig(num_slots=len(prompts))
    generator = HFGenerator(config=sampler, student=StudentConfig(path=model))
    params = SamplingParams(max_new_tokens=num_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=())
    await generator.start()
    try:
        return await generator.generate_wave(
            [
                GenerationRequest(request_id=i, token_ids=ids, params=params, stream_key=1000 + i)
                for i, ids in enumerate(prompts)
            ]
        )
    finally:
        await generator.stop()


@torch.no_grad()
def plain(
    model: str,
    prompts: Sequence[tuple[int, ...]],
    given: Sequence[Generation],
    *,
    dtype: torch.dtype,
    attention: str,
) -> Numbers:
    """Log-probabilities of all answers' tokens, one sequence at a time, without a cache."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention)
    loaded.eval()
    found = []
    for ids, answer in zip(prompts, given, strict=True):
        logits = loaded(input_ids=torch.tensor([[*ids, *answer.token_ids]]), use_cache=False).logits[0]
        rows = logits[len(ids) - 1 : -1].double().log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].numpy())
    return np.concatenate(found)


def norm_in_its_own_dtype(self: Any, hidden_states: Tensor) -> Tensor:
    scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    result: Tensor = self.weight * (hidden_states * scale)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Exactness of the generator's log-probabilities.")
    parser.add_argument("--model", default="models/smollm2/student")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = DataConfig(path=str(PROMPTS), num_rows=options.prompts)
    rows = load_prompts(data, load_tokenizer(options.model), max_reference_tokens=1)
    prompts = [row.token_ids for row in rows]
    given = asyncio.run(answers(options.model, prompts, options.tokens))

    def compute(dtype: torch.dtype, attention: str) -> Numbers:
        return plain(options.model, prompts, given, dtype=dtype, attention=attention)

    measured = {
        "generator": np.concatenate([answer.logprobs for answer in given]),
        "plain pass, sdpa": compute(torch.float32, "sdpa"),
        "plain pass, eager": compute(torch.float32, "eager"),
    }
    with patch.object(LlamaRMSNorm, "forward", norm_in_its_own_dtype):
        exact = compute(torch.float64, "sdpa")
    for name, logprobs in measured.items():
        error = np.abs(logprobs - exact)
        sys.stdout.write(
            f"{name:<18} largest {error.max():.2e}   root mean square {np.sqrt((error**2).mean()):.2e} nats "
            f"over {len(error)} tokens\n"
        )
    reference = measured["plain pass, sdpa"]
    for name in ("generator", "plain pass, eager"):
        apart = np.abs(measured[name] - reference)
        relative = (apart / np.maximum(1.0, np.abs(reference))).max()
        sys.stdout.write(
            f"{name:<18} from the plain pass, sdpa: {apart.max():.2e} nats, "
            f"{relative:.2e} of max(1, |log-probability|)\n"
        )


if __name__ == "__main__":
    main()
