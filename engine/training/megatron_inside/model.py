"""This rank's part of the student: built from its shape, not yet with weights.

s tokens of the packed row      d hidden size
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from engine.megatron_config import MegatronConfig
from engine.training.megatron_inside.config import ddp_config, transformer_config
from engine.training.megatron_inside.layer_spec import block_spec, mend_latent_norms
from engine.training.megatron_student import StudentShape


class StudentModel(GPTModel):  # type: ignore[misc]
    """A GPT model whose last stage ends before the head: ``forward`` gives hidden states [1, s, d], whole on every
    tensor-parallel rank, and the loss multiplies those rows with ``head_weight`` that it is about.

    Each rank's gradient of them is a summand: the backward pass sums over the tensor-parallel ranks.
    """

    shape: StudentShape

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary of this rank, d]; of the last stage alone."""
        weight: Tensor = self.shared_embedding_or_output_weight() if self.shape.is_tied else self.output_layer.weight
        return weight


def build_model(shape: StudentShape, config: MegatronConfig) -> list[StudentModel]:
    """The model chunks of this rank (one: the layers of its stage), on its device, weights not set. The layout must be
    initialised and fit the student (``engine.training.megatron_student.check_layout``)."""
    transformer = transformer_config(shape, config)
    model = StudentModel(
        config=transformer,
        transformer_layer_spec=block_spec(transformer),
        vocab_size=shape.padded_vocab_size(config.tensor_parallel),
        max_sequence_length=shape.max_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
        rope_scaling=shape.rope.kind == "llama3",
        rope_scaling_factor=shape.rope.factor,
    )
    model.shape = shape
    mend_latent_norms(model)
    _mark_experts(model)
    if model.post_process:
        # In place, so that names, sharding and the hooks on its parameters are the original's.
        model.output_layer.__class__ = _BeforeHead
    return [model.to(_device(transformer))]


class _BeforeHead(ColumnParallelLinear):  # type: ignore[misc]
    """The head without its product: [s / ranks, 1, d] in (under sequence parallelism; else [s, 1, d]), [s, 1, d] out.
    Either way the backward pass sums what the ranks found of the gradient."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True), None
        return copy_to_tensor_model_parallel_region(input_), None


def _mark_experts(model: nn.Module) -> None:
    """As those whose gradients are summed over the ranks that hold the same experts. Megatron does so only where
    experts are spread; without that, tensor-parallel ranks each route a piece of the row and would keep their part."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def wrap(model: StudentModel, layout: MegatronConfig) -> DistributedDataParallel:
    """In half precision where the recipe says so, with buffers in which gradients add up. Weights are set after."""
    config = model.config
    module: nn.Module = Float16Module(config, model) if config.bf16 else model
    for router in model.modules():
        bias: Tensor | None = getattr(router, "expert_bias", None)
        if bias is not None:
            # Float16Module rounds it with the weights. Megatron would mend that in the first pass: too late for the
            # value that was loaded, and for whoever exports before.
            bias.data = bias.data.float()
    return DistributedDataParallel(config, ddp_config(layout), module)


def unwrapped(chunk: nn.Module) -> StudentModel:
    """What lies inside DDP and the half-precision wrapper."""
    while not isinstance(chunk, StudentModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
