"""Tiny students of every family that Megatron trains, with what makes each of them special."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

NUM_LAYERS = 4

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_LATENT: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

STUDENTS: Mapping[str, PreTrainedConfig] = {
    # The vocabulary is padded; the second rank of two has nothing but padding.
    "llama": LlamaConfig(**_GROUPED, vocab_size=60, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**_GROUPED, vocab_size=256, tie_word_embeddings=False, rope_parameters=_LLAMA3),
    "qwen3": Qwen3Config(**_GROUPED, vocab_size=200, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(
        **_GROUPED,
        vocab_size=130,
        tie_word_embeddings=False,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[2],
    ),
    # Its epsilon is not that of the norms inside latent attention.
    "moonlight": DeepseekV3Config(
        **_LATENT, vocab_size=200, tie_word_embeddings=False, q_lora_rank=None, rms_norm_eps=1e-5
    ),
    # Four experts from two of four groups, and positions stretched.
    "deepseek_v3": DeepseekV3Config(
        **(_LATENT | {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}),
        vocab_size=200,
        tie_word_embeddings=False,
        q_lora_rank=12,
        rope_parameters=_YARN,
    ),
    "deepseek_v3, tied": DeepseekV3Config(**_LATENT, vocab_size=100, tie_word_embeddings=True, q_lora_rank=12),
}


def make_student(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The student ``name`` with random weights, saved by transformers; equal names give equal bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(STUDENTS).index(name))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(STUDENTS[name], dtype=dtype)  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.1)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder
