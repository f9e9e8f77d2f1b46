"""How many tokens each expert gets, per layer: counted as they are routed, padding left out.

Megatron counts as well, for its update of the router's bias, and takes padding for tokens. ``put_into_routers`` gives
it these counts instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from engine.training.megatron_inside.inputs import Row


class RouterLoad:
    """Listens to all routers of a model.

    Tokens are counted once, on the rank where they are routed: under sequence parallelism each tensor-parallel rank
    routes its piece of the row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._counts = [torch.zeros(0)] * len(self._routers)
        self._is_real: Tensor | None = None
        """[tokens that this rank routes] of the row that is counted; None: none is."""
        for number, router in enumerate(self._routers):
            router.register_forward_hook(self._listener(number))
        self.clear()

    @contextmanager
    def of(self, row: Row) -> Iterator[None]:
        """Count while this lasts: one forward pass of ``row``. What the backward pass computes again comes after."""
        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        self._is_real = row.is_real.chunk(size)[rank]
        try:
            yield
        finally:
            self._is_real = None

    def clear(self) -> None:
        self._counts = [
            torch.zeros(router.config.num_moe_experts, device=router.weight.device) for router in self._routers
        ]

    def put_into_routers(self) -> None:
        for router, counts in zip(self._routers, self._counts, strict=True):
            if router.local_tokens_per_expert is not None:
                router.local_tokens_per_expert.copy_(counts)

    def peak(self) -> float:
        """Tokens of the busiest expert over those of the mean one, the largest of all layers of this stage; 0 without
        experts. Collective within the stage."""
        if not self._counts:
            return 0.0
        counts = torch.stack(self._counts)
        dist.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        return float((counts.amax(dim=1) / counts.mean(dim=1).clamp(min=1e-9)).amax())

    def _listener(self, number: int) -> Any:
        def listen(module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._is_real is not None:
                self._counts[number] += output[1][self._is_real].sum(dim=0)

        return listen
