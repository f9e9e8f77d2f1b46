"""Of which modules a layer is made: TransformerEngine's on CUDA where it is installed, else Megatron's own with three
of this package.

* ``PackedAttention`` in place of an attention that is written out and knows no packed rows.
* ``RmsNorm``: Megatron's refuses sequence parallelism, though its weight needs no more than a flag.
* Latent attention's down-projections are replicated. Megatron's local spec cuts them over the tensor-parallel ranks,
  and gradients of ``linear_kv_down_proj`` are then off by 5–10 %: the part of it that goes to the rotary key is not
  summed over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from engine.training.megatron_inside.attention import PackedAttention
from engine.training.megatron_inside.without_te import has_transformer_engine

LATENT_NORM_EPS = 1e-6
"""Of the norms inside latent attention: transformers has it as a constant, whatever ``rms_norm_eps`` says. Moonlight's
is 1e-5."""


class RmsNorm(torch.nn.RMSNorm):
    """torch's, with the flag by which Megatron sums its gradient over the ranks that share a sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LatentRmsNorm(RmsNorm):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, hidden_size, LATENT_NORM_EPS)


def uses_transformer_engine() -> bool:
    return torch.cuda.is_available() and has_transformer_engine()


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this rank's stage."""
    own = not uses_transformer_engine()
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=not own, normalization="RMSNorm")
    if own:
        spec.layer_norm = RmsNorm
        for layer in spec.layer_specs:
            _make_own(layer.submodules, is_latent=config.multi_latent_attention)
    return spec


def mend_latent_norms(model: torch.nn.Module) -> None:
    """TransformerEngine's are part of the up-projections, which take ``rms_norm_eps``."""
    for name, module in model.named_modules():
        if name.endswith(("linear_kv_up_proj", "linear_q_up_proj")) and hasattr(module, "layer_norm_weight"):
            module.eps = LATENT_NORM_EPS


def _make_own(layer: Any, *, is_latent: bool) -> None:
    """Layers of one kind share a spec; to do this again changes nothing."""
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if is_latent:
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    _replace_norms(layer, ("input_layernorm", "pre_mlp_layernorm"), RmsNorm)
    _replace_norms(attention, ("q_layernorm", "k_layernorm", "kv_layernorm"), LatentRmsNorm if is_latent else RmsNorm)


def _replace_norms(submodules: Any, names: tuple[str, ...], norm: type[RmsNorm]) -> None:
    for name in names:
        if getattr(submodules, name, None) not in (None, IdentityOp):
            setattr(submodules, name, norm)


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu" if config.use_cpu_initialization else "cuda")
