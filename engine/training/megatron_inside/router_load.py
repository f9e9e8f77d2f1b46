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
from engine.training.megatron_inside.model import unwrapped


class RouterLoad:
    """Listens to all routers of a model.

    Tokens are counted once, on the rank where they are routed: under sequence parallelism each tensor-parallel rank
    routes its piece of the row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._counts = [torch.zeros(0)] * len(self._routers)
        config = unwrapped(model).config
        self._num_layers, self._num_experts = config.num_layers, config.num_moe_experts
        self._device = next(model.parameters()).device
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

    def per_expert(self) -> dict[int, tuple[int, ...]]:
        """Of each layer of the whole model that has experts, counted from 0: tokens of each expert. Collective over all
        ranks; every rank must hold a stage of the same model."""
        if self._num_experts is None:
            return {}
        counts = torch.zeros(self._num_layers, self._num_experts, dtype=torch.float64, device=self._device)
        for router, mine in zip(self._routers, self._counts, strict=True):
            counts[router.layer_number - 1] = mine.double()
        dist.all_reduce(counts)
        rows = enumerate(counts.long().tolist())
        return {layer: tuple(tokens) for layer, tokens in rows if any(tokens)}

    def _listener(self, number: int) -> Any:
        def listen(module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._is_real is not None:
                self._counts[number] += output[1][self._is_real].sum(dim=0)

        return listen
