"""What a recipe says of a learner on Megatron-core: how the student is cut into pieces, and where the pieces lie.

Which student a layout fits is ``engine.training.megatron_student``'s to say: that needs the model's folder.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from engine.errors import RecipeError
from engine.recipe_fields import Fraction, Positive, PositiveFloat, Section


class MegatronConfig(Section, frozen=True, kw_only=True):
    """The learner of ``learner.backend="megatron"`` (extra ``megatron``): one process per device, a *rank* each.

    Ranks = ``tensor_parallel`` × ``pipeline_parallel`` × ``context_parallel`` × ``data_parallel``; experts are spread
    over the ranks of one pipeline stage.
    """

    tensor_parallel: Positive = 1
    """Ranks that share every matrix."""
    sequence_parallel: bool = True
    """Whether these ranks also share the tokens of a row where no matrix is multiplied: less memory for as many bytes
    sent. Students with experts need it; without ``tensor_parallel`` there is nothing to share."""
    pipeline_parallel: Positive = 1
    """Stages: ranks that hold different layers."""
    first_stage_layers: Positive | None = None
    """Layers of the first stage, when they do not divide evenly; None: all stages hold equally many."""
    last_stage_layers: Positive | None = None
    expert_parallel: Positive = 1
    """Ranks that hold different experts; divides tensor × context × data parallel."""
    context_parallel: Positive = 1
    """Ranks that share the tokens of one rollout."""
    data_parallel: Positive = 1
    """Copies of all that, each with rollouts of its own."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations in a pass; gradients, master weights and optimizer moments are float32, and the last
    two are cut over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Gradients are summed over the data-parallel ranks during the backward pass of a step's last micro-batch, a bucket
    at a time; otherwise after it."""
    overlap_param_gather: bool = False
    """What each data-parallel rank has updated reaches the others during the next forward pass; otherwise before it.
    Needs ``overlap_grad_reduce``, whose buckets it takes."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping: none, those of attention, or whole
    layers."""
    micro_batches: Positive | None = None
    """Passes of ``learner.micro_batch_tokens`` on each data-parallel rank that the learner hands over at a time: they
    fill the pipeline. None: twice the stages, or one without a pipeline."""
    expert_bias_update_rate: Fraction = 0.0
    """How fast the router's bias evens out the experts' loads, per step; 0: the student's own bias stays."""
    peak_tflops: PositiveFloat | None = None
    """Of one device, for the MFU; None: from a table by the device's name, and no MFU when it is not there."""
    start_timeout_s: PositiveFloat = 900.0
    """How long the ranks may take to load the student."""
    command_timeout_s: PositiveFloat = 1800.0
    """How long they may take over one call; longer counts as hung."""
    max_restores: Annotated[int, Meta(ge=0, le=1000)] = 0
    """A rank that dies ends the run, which ``--resume`` continues. So often, the run instead restores itself from its
    last checkpoint with new ranks."""

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def shares_sequences(self) -> bool:
        """``sequence_parallel``, where it means something."""
        return self.sequence_parallel and self.tensor_parallel > 1

    @property
    def num_micro_batches(self) -> int:
        """``micro_batches``, resolved."""
        if self.micro_batches is not None:
            return self.micro_batches
        return 2 * self.pipeline_parallel if self.pipeline_parallel > 1 else 1

    def __post_init__(self) -> None:
        per_stage = self.tensor_parallel * self.context_parallel * self.data_parallel
        if per_stage % self.expert_parallel != 0:
            raise RecipeError(
                f"learner.megatron: expert_parallel={self.expert_parallel} does not divide tensor_parallel × "
                f"context_parallel × data_parallel = {per_stage}, the ranks of one pipeline stage; change one of them"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise RecipeError(
                "learner.megatron: overlap_param_gather=true needs overlap_grad_reduce=true: weights are gathered in "
                "the buckets in which gradients are summed"
            )
        stages = (self.first_stage_layers, self.last_stage_layers)
        if any(stage is not None for stage in stages) and self.pipeline_parallel == 1:
            raise RecipeError(
                "learner.megatron: first_stage_layers and last_stage_layers need pipeline_parallel of 2 or more"
            )
