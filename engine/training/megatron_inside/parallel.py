"""Megatron's process groups, from the layout of a recipe. ``torch.distributed`` is up before and stays up after."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from engine.megatron_config import MegatronConfig

SEED = 1
"""Of Megatron's random states. Nothing draws from them (no dropout, all weights are loaded), but its recomputation
expects them to be there."""


def initialize(config: MegatronConfig) -> None:
    """Make the groups; those of an earlier layout end. Collective over all ranks.

    Raises:
        RuntimeError: there are not as many ranks as the layout needs.
    """
    if dist.get_world_size() != config.num_ranks:
        raise RuntimeError(
            f"the layout needs {config.num_ranks} ranks and the group has {dist.get_world_size()}; ranks and recipe "
            "belong to different runs"
        )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        context_parallel_size=config.context_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(SEED)
