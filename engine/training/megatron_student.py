"""Which students Megatron can train, and into how many pieces one can be cut: answered from the folder's config alone,
without Megatron, so that ``--check`` answers on any machine.

What is not known to give transformers' logits is refused here by name: a student that runs and is slightly wrong is
worse than one that does not start. ``engine.training.megatron_inside.config`` turns a ``StudentShape`` into what
Megatron takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import ModelError, RecipeError
from engine.megatron_config import MegatronConfig

Family = Literal["llama", "qwen3", "qwen3_moe", "deepseek_v3"]
"""``model_type`` of the config; Moonlight's is that of DeepSeek-V3."""

FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of it in every layout, so that a checkpoint of one layout has the rows of all
others."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions."""

    theta: float
    kind: Literal["default", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_length: int = 0
    """yarn: positions before the stretching."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: queries, keys and values through a narrow middle."""

    q_rank: int | None
    """None: queries come from the hidden state in one product."""
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    num_experts: int
    top_k: int
    ffn_size: int
    """Of one expert."""
    shared_ffn_size: int | None
    """Of all shared experts together; None: there are none."""
    in_layer: tuple[bool, ...]
    """Of each layer: experts, or one dense network."""
    score: Literal["softmax", "sigmoid"]
    normalise: bool
    """Whether the weights of the chosen experts are scaled to sum to 1."""
    scale: float
    """Then multiplied by this."""
    has_bias: bool
    """A bias that takes part in choosing alone."""
    num_groups: int | None = None
    """Experts are chosen from the best ``top_groups`` of so many groups; None: from all."""
    top_groups: int | None = None


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """What there is to know of a student but for its weights."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    """Of a dense layer."""
    norm_eps: float
    is_tied: bool
    """Output layer and embedding are one matrix."""
    has_qk_norm: bool
    rope: Rope
    max_length: int
    latent: LatentAttention | None = None
    experts: Experts | None = None

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel)
        return -(-self.vocab_size // multiple) * multiple


def read_shape(folder: Path) -> StudentShape:
    """Read the config of ``folder``.

    Raises:
        ModelError: there is none, or Megatron would compute something else than transformers does.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"student {str(folder)!r}: no config.json there; expected a folder in Hugging Face format")
    from transformers import AutoConfig  # seconds, and whoever has a shape already does without

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and json raise a dozen kinds; all mean this file
        raise ModelError(f"student {str(folder)!r}: config.json cannot be read: {error}") from error
    return shape_of(config, where=f"student {str(folder)!r}")


def shape_of(config: Any, *, where: str = "the student") -> StudentShape:
    """The same of a transformers config."""
    refuse = _Refuse(where)
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"{where} is of type {family!r}, learner.backend='megatron' trains {', '.join(FAMILIES)} (and what shares "
            "their config, as Moonlight does with deepseek_v3); learner.backend='hf' trains any"
        )
    refuse.unless(config.hidden_act == "silu", f"hidden_act={config.hidden_act!r}", "silu")
    for name in ("attention_bias", "mlp_bias"):
        refuse.unless(not getattr(config, name, False), f"{name}=true", "no biases")
    refuse.unless(not config.attention_dropout, f"attention_dropout={config.attention_dropout}", "none")
    if getattr(config, "use_sliding_window", False):
        refuse.unless(config.sliding_window is None, f"sliding_window={config.sliding_window}", "attention to all")
    for kind in getattr(config, "layer_types", None) or ():
        refuse.unless(kind == "full_attention", f"layer_types with {kind!r}", "attention to all")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise ModelError(
            f"{where} has quantised weights (quantization_config of {method!r}), learner.backend='megatron' trains "
            "weights in float32 or bfloat16; convert the folder to bfloat16 first"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    refuse.unless(heads % kv_heads == 0, f"{kv_heads} key and value heads for {heads} heads", "equal groups")
    experts = {"qwen3_moe": _qwen_experts, "deepseek_v3": _deepseek_experts}.get(family)
    latent = _latent(config, refuse) if family == "deepseek_v3" else None
    return StudentShape(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=heads if latent else kv_heads,
        head_dim=latent.nope_dim + latent.rope_dim if latent else _head_dim(config),
        ffn_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        is_tied=bool(config.tie_word_embeddings),
        has_qk_norm=family in ("qwen3", "qwen3_moe"),
        rope=_rope(config, refuse),
        max_length=config.max_position_embeddings,
        latent=latent,
        experts=None if experts is None else experts(config, refuse),
    )


def check_layout(shape: StudentShape, config: MegatronConfig) -> None:
    """Refuse a layout that the student cannot be cut into.

    Raises:
        RecipeError: names the two numbers that do not fit.
    """
    tp, pp, ep = config.tensor_parallel, config.pipeline_parallel, config.expert_parallel
    sizes = {"attention heads": shape.num_heads, "columns of a dense layer": shape.ffn_size}
    if shape.latent is None:
        sizes["key and value heads"] = shape.num_kv_heads
    if shape.experts is not None and shape.experts.shared_ffn_size is not None:
        sizes["columns of the shared experts"] = shape.experts.shared_ffn_size
    for name, size in sizes.items():
        if size % tp != 0:
            raise RecipeError(
                f"learner.megatron: tensor_parallel={tp} does not divide the student's {size} {name}; "
                f"it may be {_divisors(math.gcd(*sizes.values()))}"
            )
    if shape.experts is not None and tp > 1 and not config.sequence_parallel:
        raise RecipeError(
            f"learner.megatron: sequence_parallel=false with tensor_parallel={tp}, and the student has experts: its "
            "router is trained right only where each rank routes tokens of its own; set sequence_parallel=true or "
            "tensor_parallel=1"
        )
    num_experts = 0 if shape.experts is None else shape.experts.num_experts
    if ep > 1 and (num_experts == 0 or num_experts % ep != 0):
        has = f"{num_experts} experts, which it does not divide" if num_experts else "no experts"
        raise RecipeError(f"learner.megatron: expert_parallel={ep}, and the student has {has}; change it")
    if pp > shape.num_layers:
        raise RecipeError(
            f"learner.megatron: pipeline_parallel={pp} is more than the student's {shape.num_layers} layers; lower it"
        )
    _check_stages(shape, config)


def _check_stages(shape: StudentShape, config: MegatronConfig) -> None:
    """Every stage must have a layer, and all whose number is not given equally many."""
    given = [stage for stage in (config.first_stage_layers, config.last_stage_layers) if stage is not None]
    num_others = config.pipeline_parallel - len(given)
    rest = shape.num_layers - sum(given)
    fits = rest == 0 if num_others == 0 else rest >= num_others and rest % num_others == 0
    if not fits:
        taken = f" less the {sum(given)} of first_stage_layers and last_stage_layers" if given else ""
        if rest < num_others or num_others == 0:
            raise RecipeError(
                f"learner.megatron: first_stage_layers and last_stage_layers take {sum(given)} of the student's "
                f"{shape.num_layers} layers, which leaves {rest} for {num_others} other stages; change them or "
                "pipeline_parallel"
            )
        raise RecipeError(
            f"learner.megatron: pipeline_parallel={config.pipeline_parallel} stages do not divide the student's "
            f"{shape.num_layers} layers{taken}; set first_stage_layers or last_stage_layers so that what is left "
            f"divides by {num_others}, or change pipeline_parallel"
        )


def _head_dim(config: Any) -> int:
    """Not every family's config says it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, refuse: _Refuse) -> Rope:
    parameters = dict(config.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta", 10_000.0))
    refuse.unless(parameters.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor other than 1", "1")
    is_latent = config.model_type == "deepseek_v3"
    if kind == "default":
        return Rope(theta=theta)
    if kind == "llama3" and not is_latent:
        # Megatron has these three as constants.
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        for name, value in fixed.items():
            refuse.unless(parameters.get(name) == value, f"rope {name}={parameters.get(name)}", str(value))
        return Rope(theta=theta, kind="llama3", factor=float(parameters["factor"]))
    refuse.unless(kind == "yarn" and is_latent, f"rope of type {kind!r}", "default, llama3, or yarn of deepseek_v3")
    expected: dict[str, object] = {"attention_factor": None, "truncate": True}
    for name, only in expected.items():
        refuse.unless(parameters.get(name, only) == only, f"rope {name}={parameters.get(name)}", str(only))
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    refuse.unless(
        bool(mscale) or not mscale_all_dim, f"rope mscale_all_dim={mscale_all_dim} without mscale", "both or none"
    )
    return Rope(
        theta=theta,
        kind="yarn",
        factor=float(parameters["factor"]),
        original_length=int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        # With only one of the two, transformers takes neither.
        mscale=float(mscale) if mscale and mscale_all_dim else 1.0,
        mscale_all_dim=float(mscale_all_dim) if mscale and mscale_all_dim else 0.0,
    )


def _latent(config: Any, refuse: _Refuse) -> LatentAttention:
    refuse.unless(bool(config.rope_interleave), "rope_interleave=false", "true")
    return LatentAttention(
        q_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
    )


def _qwen_experts(config: Any, refuse: _Refuse) -> Experts:
    dense = set(config.mlp_only_layers or ())
    num_experts, top_k = config.num_experts, config.num_experts_per_tok
    _refuse_choice(num_experts, top_k, refuse)
    # One weight scaled to sum to 1 is 1: its router would learn nothing, and Megatron does not take it.
    refuse.unless(top_k > 1 or not config.norm_topk_prob, "norm_topk_prob=true of one expert a token", "it of several")
    refuse.unless(config.decoder_sparse_step >= 1, f"decoder_sparse_step={config.decoder_sparse_step}", "1 and up")
    return Experts(
        num_experts=num_experts,
        top_k=top_k,
        ffn_size=config.moe_intermediate_size,
        shared_ffn_size=None,
        in_layer=tuple(
            i not in dense and (i + 1) % config.decoder_sparse_step == 0 for i in range(config.num_hidden_layers)
        ),
        score="softmax",
        normalise=bool(config.norm_topk_prob),
        scale=1.0,
        has_bias=False,
    )


def _deepseek_experts(config: Any, refuse: _Refuse) -> Experts:
    top_k, num_groups, top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
    num_experts = config.n_routed_experts
    _refuse_choice(num_experts, top_k, refuse)
    # By its two best experts a group is judged.
    refuse.unless(
        bool(num_groups and top_groups)
        and top_groups <= num_groups
        and num_experts % num_groups == 0
        and num_experts // num_groups >= 2,
        f"n_group={num_groups} and topk_group={top_groups} with {num_experts} experts",
        "groups of equally many, two or more, and as many of them at most as there are",
    )
    refuse.unless(
        bool(config.norm_topk_prob) and top_k > 1, f"norm_topk_prob={config.norm_topk_prob}", "true, top-2 up"
    )
    frequency = getattr(config, "moe_layer_freq", 1)
    refuse.unless(frequency == 1, f"moe_layer_freq={frequency}", "1")
    method = getattr(config, "topk_method", "noaux_tc")
    refuse.unless(method == "noaux_tc", f"topk_method={method!r}", "noaux_tc")
    scoring = getattr(config, "scoring_func", "sigmoid")
    refuse.unless(scoring == "sigmoid", f"scoring_func={scoring!r}", "sigmoid")
    is_grouped = top_groups < num_groups
    # A group is as good as its two best experts; Megatron takes top_k / top_groups of them.
    refuse.unless(
        not is_grouped or top_k // top_groups == 2,
        f"num_experts_per_tok={top_k} from topk_group={top_groups} groups",
        "two experts a group",
    )
    num_shared = config.n_shared_experts or 0
    return Experts(
        num_experts=num_experts,
        top_k=top_k,
        ffn_size=config.moe_intermediate_size,
        shared_ffn_size=num_shared * config.moe_intermediate_size if num_shared else None,
        in_layer=tuple(i >= config.first_k_dense_replace for i in range(config.num_hidden_layers)),
        score="sigmoid",
        normalise=True,
        scale=float(config.routed_scaling_factor),
        has_bias=True,
        num_groups=num_groups if is_grouped else None,
        top_groups=top_groups if is_grouped else None,
    )


def _refuse_choice(num_experts: int, top_k: int, refuse: _Refuse) -> None:
    refuse.unless(1 <= top_k <= num_experts, f"num_experts_per_tok={top_k} of {num_experts} experts", "one to all")


class _Refuse:
    def __init__(self, where: str) -> None:
        self._where = where

    def unless(self, holds: bool, found: str, expected: str) -> None:
        if not holds:
            raise ModelError(
                f"{self._where} has {found}, learner.backend='megatron' computes {expected} alone; "
                "learner.backend='hf' trains it as it is"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)
