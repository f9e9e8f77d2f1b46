"""Which students and layouts are refused, and with which words: nothing of Megatron is loaded for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from engine.errors import ModelError, RecipeError
from engine.megatron_config import MegatronConfig
from engine.training.megatron_student import LatentAttention, Rope, StudentShape, check_layout, read_shape, shape_of

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def moonlight(**changes: Any) -> StudentShape:
    """Moonlight-16B-A3B by its config."""
    config: dict[str, Any] = {
        "vocab_size": 163_840,
        "hidden_size": 2048,
        "intermediate_size": 11_264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "rope_theta": 50_000.0,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
    }
    return shape_of(DeepseekV3Config(**(config | changes)))


def test_moonlight_is_read_as_its_config_says() -> None:
    shape = moonlight()

    assert shape.latent == LatentAttention(q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    assert shape.rope == Rope(theta=50_000.0)
    assert shape.experts is not None
    assert shape.experts.in_layer == (False,) + (True,) * 26
    assert (shape.experts.shared_ffn_size, shape.experts.scale, shape.experts.num_groups) == (2816, 2.446, None)
    check_layout(shape, MegatronConfig(pipeline_parallel=3, expert_parallel=2, data_parallel=2))


def test_deepseek_v3_is_read_as_its_config_says() -> None:
    shape = shape_of(DeepseekV3Config(rope_parameters=YARN, max_position_embeddings=163_840))

    assert shape.latent is not None
    assert shape.latent.q_rank == 1536
    assert shape.experts is not None
    assert (shape.experts.num_groups, shape.experts.top_groups, shape.experts.top_k) == (8, 4, 8)
    assert shape.rope == Rope(
        theta=10_000.0, kind="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0
    )


def _extra(**fields: Any) -> dict[str, Any]:
    """What files say and transformers has no field for."""
    return fields


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), "is of type 'gpt2', learner.backend='megatron' trains llama, qwen3, qwen3_moe, deepseek_v3"),
        (LlamaConfig(attention_bias=True), "has attention_bias=true, .* computes no biases alone"),
        (LlamaConfig(mlp_bias=True), "has mlp_bias=true"),
        (LlamaConfig(hidden_act="gelu"), "has hidden_act='gelu', .* computes silu alone"),
        (LlamaConfig(rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}), "has rope low_freq_factor=2.0, .* computes 1"),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "rope of type 'linear'",
        ),
        (Qwen3Config(rope_parameters=YARN), "has rope of type 'yarn', .* or yarn of deepseek_v3 alone"),
        (Qwen3Config(use_sliding_window=True, sliding_window=512), "has sliding_window=512"),
        (Qwen3Config(attention_dropout=0.1), "has attention_dropout=0.1"),
        (DeepseekV3Config(rope_interleave=False), "has rope_interleave=false"),
        (DeepseekV3Config(norm_topk_prob=False), "has norm_topk_prob=False"),
        (DeepseekV3Config(n_group=8, topk_group=2), "num_experts_per_tok=8 from topk_group=2 groups, .* two experts a"),
        (DeepseekV3Config(**_extra(scoring_func="softmax")), "has scoring_func='softmax'"),
        (DeepseekV3Config(**_extra(topk_method="greedy")), "has topk_method='greedy'"),
        (DeepseekV3Config(rope_parameters=YARN | {"mscale": 0.0}), "mscale_all_dim=1.0 without mscale"),
        (DeepseekV3Config(rope_parameters=YARN | {"attention_factor": 1.1}), "has rope attention_factor=1.1"),
        (
            DeepseekV3Config(**_extra(quantization_config={"quant_method": "fp8"})),
            r"quantised weights \(quantization_config of 'fp8'\), .* convert the folder to bfloat16 first",
        ),
        (Qwen3Config(num_hidden_layers=1, layer_types=["sliding_attention"]), "layer_types with 'sliding_attention'"),
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=3), "has 3 key and value heads for 32 heads"),
        (Qwen3MoeConfig(num_experts_per_tok=1, norm_topk_prob=True), "norm_topk_prob=true of one expert a token"),
        (Qwen3MoeConfig(num_experts=4, num_experts_per_tok=5), "has num_experts_per_tok=5 of 4 experts"),
        (Qwen3MoeConfig(decoder_sparse_step=0), "has decoder_sparse_step=0"),
        (DeepseekV3Config(n_group=3, topk_group=1), "has n_group=3 and topk_group=1 with 256 experts"),
        (DeepseekV3Config(n_group=2, topk_group=3), "has n_group=2 and topk_group=3"),
        (DeepseekV3Config(n_routed_experts=8, n_group=8, topk_group=4), "has n_group=8 and topk_group=4 with 8 exper"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused_by_name(config: PreTrainedConfig, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        shape_of(config)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"student '.*': no config.json there"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"student '.*': config.json cannot be read"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            {"tensor_parallel": 3},
            "tensor_parallel=3 does not divide the student's 16 attention heads; it may be 1, 2, 4",
        ),
        ({"pipeline_parallel": 2}, "pipeline_parallel=2 stages do not divide the student's 27 layers; set first_stage"),
        (
            {"pipeline_parallel": 3, "first_stage_layers": 8},
            "27 layers less the 8 of first_stage_layers and last_stage_layers; .* divides by 2",
        ),
        ({"pipeline_parallel": 28}, "pipeline_parallel=28 is more than the student's 27 layers"),
        (
            {"pipeline_parallel": 2, "first_stage_layers": 9, "last_stage_layers": 9},
            "take 18 of the student's 27 layers, which leaves 9 for 0 other stages",
        ),
        ({"pipeline_parallel": 2, "first_stage_layers": 27}, "take 27 .* which leaves 0 for 1 other stages"),
        (
            {"expert_parallel": 3, "data_parallel": 3},
            "expert_parallel=3, and the student has 64 experts, which it does not divide",
        ),
    ],
)
def test_a_layout_that_the_student_cannot_be_cut_into_is_refused(layout: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_layout(moonlight(), MegatronConfig(**layout))


def test_the_pieces_of_a_dense_student_are_checked_too() -> None:
    shape = shape_of(Qwen3MoeConfig(num_attention_heads=8, num_key_value_heads=2))
    with pytest.raises(RecipeError, match="tensor_parallel=4 does not divide the student's 2 key and value heads"):
        check_layout(shape, MegatronConfig(tensor_parallel=4))
    with pytest.raises(RecipeError, match="expert_parallel=2, and the student has no experts"):
        check_layout(shape_of(Qwen3Config()), MegatronConfig(expert_parallel=2, data_parallel=2))


def test_experts_under_tensor_parallelism_need_sequence_parallelism() -> None:
    whole = MegatronConfig(tensor_parallel=2, sequence_parallel=False)

    with pytest.raises(RecipeError, match=r"sequence_parallel=false with tensor_parallel=2, and the student has exp"):
        check_layout(moonlight(), whole)
    check_layout(moonlight(), MegatronConfig(sequence_parallel=False))
    check_layout(moonlight(), MegatronConfig(tensor_parallel=2))
    check_layout(shape_of(LlamaConfig()), whole)


def test_the_vocabulary_is_padded_alike_in_all_usual_layouts() -> None:
    shape = shape_of(LlamaConfig(vocab_size=32_001))

    assert {shape.padded_vocab_size(tp) for tp in (1, 2, 4, 8)} == {32_128}
    assert shape.padded_vocab_size(3) % 3 == 0


def test_nothing_of_megatron_is_loaded() -> None:
    program = "import sys, engine.training.megatron_student; assert 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
