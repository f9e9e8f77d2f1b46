"""From a student's shape and a recipe to Megatron's configs: all that is decided about how it computes.

Nothing here is random (no dropout) and nothing is added to the objective (no auxiliary loss: its weight would depend on
the layout). All fusions that need kernels of their own are off unless TransformerEngine brings them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn.functional import silu

from engine.megatron_config import MegatronConfig
from engine.recipe import LearnerConfig
from engine.training.megatron_inside.layer_spec import uses_transformer_engine
from engine.training.megatron_student import Experts, LatentAttention, Rope, StudentShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(shape: StudentShape, config: MegatronConfig) -> TransformerConfig:
    """The model's."""
    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {
        # What is computed.
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "qk_layernorm": shape.has_qk_norm or shape.latent is not None,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # In which numbers.
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # Where.
        "tensor_model_parallel_size": config.tensor_parallel,
        "sequence_parallel": config.shares_sequences,
        "pipeline_model_parallel_size": config.pipeline_parallel,
        "num_layers_in_first_pipeline_stage": config.first_stage_layers,
        "num_layers_in_last_pipeline_stage": config.last_stage_layers,
        "context_parallel_size": config.context_parallel,
        "expert_model_parallel_size": config.expert_parallel,
        # Experts are whole: gloo has no all_gather of uneven parts, and their products are small enough.
        "expert_tensor_parallel_size": 1,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # All weights are loaded, but only where it draws them does Megatron mark those that are cut; the norm of the
        # gradient would leave the others' parts out.
        "perform_initialization": True,
        # How.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # asked for by the line above, without experts, too
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        **_recompute(config),
        **({} if shape.experts is None else _experts(shape.experts, config)),
    }
    with warnings.catch_warnings():
        # About CUDA graphs, which are not asked for, and about recomputing what a fused attention does not keep.
        warnings.filterwarnings("ignore", message="full scope is deprecated|If you are using transformer_engine")
        if shape.latent is None:
            return TransformerConfig(**options)
        return MLATransformerConfig(**options, **_latent(shape.latent, shape.rope))


def ddp_config(config: MegatronConfig) -> DistributedDataParallelConfig:
    """Of gradients: summed in float32, once per step."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        # All gathers are begun by ``overlap``, none by the module before.
        align_param_gather=config.overlap_param_gather,
    )


def optimizer_config(learner: LearnerConfig) -> OptimizerConfig:
    """Of AdamW; norms and biases are not decayed, which is Megatron's own rule. Clipping is ``optimizer``'s."""
    config = learner.megatron
    return OptimizerConfig(
        optimizer="adam",
        lr=learner.lr,
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        adam_eps=learner.eps,
        weight_decay=learner.weight_decay,
        clip_grad=0.0,
        bf16=config.dtype == "bfloat16",
        params_dtype=DTYPES[config.dtype],
        use_distributed_optimizer=True,
        overlap_param_gather=config.overlap_param_gather,
    )


def _recompute(config: MegatronConfig) -> dict[str, Any]:
    if config.recompute == "none":
        return {}
    if config.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _experts(experts: Experts, config: MegatronConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size,
        "moe_layer_freq": [int(has_experts) for has_experts in experts.in_layer],
        "moe_router_score_function": experts.score,
        # Softmax over all and then the largest keeps their size; over the largest alone makes them sum to 1.
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalise,
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_enable_expert_bias": experts.has_bias,
        "moe_router_bias_update_rate": config.expert_bias_update_rate,
        "moe_router_num_groups": experts.num_groups,
        "moe_router_group_topk": experts.top_groups,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": uses_transformer_engine(),
        "moe_permute_fusion": False,
    }


def _latent(latent: LatentAttention, rope: Rope) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.nope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.v_dim,
        "rope_type": "yarn" if rope.kind == "yarn" else "rope",
        "rotary_base": rope.theta,
        "rotary_percent": 1.0,
        # Its default is 40 and scales the softmax without yarn, too.
        "rotary_scaling_factor": rope.factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        **(
            {
                "original_max_position_embeddings": rope.original_length,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
            }
            if rope.kind == "yarn"
            else {}
        ),
    }
