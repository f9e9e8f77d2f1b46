"""``qwen3.py`` with the learner on Megatron-core: Qwen3-0.6B learns from Qwen3-8B, on one to eight GPUs.

Models, prompts and the teacher's command are in ``qwen3.py``. The teacher runs on GPUs of its own, or on another
machine; of those here the first half trains (a copy of the student on each) and the second half answers:

    python -m engine.run recipes/qwen3_megatron.py --set gpus=8
    python -m engine.run recipes/qwen3_megatron.py --set gpus=1     # both on one

Anywhere, in minutes, with tiny random models and two ranks on the CPU:

    python -m engine.run recipes/qwen3_megatron.py --set profile=tiny

Other layouts are a setting away, in either profile: ``--set learner.megatron.data_parallel=1 --set
learner.megatron.tensor_parallel=2``. ``--set sampler.backend=hf`` takes the torch sampler.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.megatron_config import MegatronConfig
from engine.recipe import Recipe
from recipes import qwen3


def recipe(
    profile: Literal["full", "tiny"] = "full",
    gpus: Literal[1, 2, 4, 6, 8] = 2,
    models: str = "models",
    teacher_url: str | None = None,
) -> Recipe:
    """
    Args:
        gpus: of the full profile, for learner and sampler together.
        models: the folder that models and prompts lie in.
        teacher_url: of a teacher service; without, the tiny profile has its teacher in the same process.
    """
    base = qwen3.recipe(profile=profile, models=models, teacher_url=teacher_url)
    num_ranks = 2 if profile == "tiny" else max(1, gpus // 2)
    learner = msgspec.structs.replace(
        base.learner,
        backend="megatron",
        device="cpu" if profile == "tiny" else "cuda",
        gradient_checkpointing=False,
        # As much as before in one call, now over all copies.
        micro_batch_tokens=base.learner.micro_batch_tokens // num_ranks,
        megatron=MegatronConfig(
            data_parallel=num_ranks, dtype="float32" if profile == "tiny" else "bfloat16", max_restores=3
        ),
    )
    sampler = base.sampler
    if profile == "full":
        vllm = msgspec.structs.replace(
            sampler.vllm, num_engines=num_ranks, memory_share=0.5 if gpus == 1 else sampler.vllm.memory_share
        )
        sampler = msgspec.structs.replace(sampler, device=f"cuda:{gpus // 2}", vllm=vllm)
    return msgspec.structs.replace(
        base, name=base.name.replace("qwen3", "qwen3_megatron"), learner=learner, sampler=sampler
    )
