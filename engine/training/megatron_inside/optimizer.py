"""Once per step: the summed gradient over all ranks, divided by the step's tokens, clipped, and AdamW.

Between these, unlike in Megatron's own ``step``, the norm is looked at: a gradient that is not finite changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer

from engine.recipe import LearnerConfig
from engine.training.megatron_inside.config import optimizer_config
from engine.training.megatron_inside.model import unwrapped
from engine.training.megatron_inside.overlap import start_sums


class StepOptimizer:
    """Megatron's distributed optimizer: each data-parallel rank holds its part of master weights and moments."""

    def __init__(self, chunk: DistributedDataParallel, learner: LearnerConfig) -> None:
        self._chunk = chunk
        self._grad_clip = learner.grad_clip
        self._weight_decay = learner.weight_decay
        self.megatron: Any = get_megatron_optimizer(optimizer_config(learner), [chunk])
        for part in self.megatron.chained_optimizers:
            # Moments are there from the start: a checkpoint may come before the first update, or after skipped ones.
            part.init_state_fn(part.optimizer)
        chunk.config.grad_scale_func = self.megatron.scale_loss
        self.clear()

    @torch.no_grad()
    def grad_norm(self, num_rows: int) -> float:
        """Sum the gradient over the ranks and divide it by the step's tokens; its norm, the same on all ranks. The
        router's bias is updated here, when it is at all.

        Args:
            num_rows: response tokens whose rows this rank had; the last stage's count.
        """
        device = next(self._chunk.parameters()).device
        start_sums(self._chunk)
        finalize_model_grads([self._chunk], torch.tensor(num_rows, dtype=torch.int32, device=device))
        found_inf = self.megatron.prepare_grads()
        assert not found_inf, "only loss scaling looks for infinities, and there is none"
        return float(self.megatron.get_grad_norm())

    @torch.no_grad()
    def step(self, *, grad_norm: float, lr: float) -> None:
        """Clip (the norm is ``grad_norm``), update, clear. Under ``overlap_param_gather`` weights are whole again only
        after ``overlap.start_gather``."""
        if self._grad_clip is not None and grad_norm > self._grad_clip:
            # Exactly, where Megatron's adds 1e-6 to the norm.
            parts = [part.get_parameters() for part in self.megatron.chained_optimizers]
            grads = [p.grad for part in parts for p in part if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, self._grad_clip / grad_norm)
        for group in self.megatron.param_groups:
            group["lr"] = lr
            # Megatron leaves this to its own scheduler; without it norms are decayed like matrices.
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        self.megatron.step_with_ready_grads()
        self.clear()

    def clear(self) -> None:
        """Zero the gradients, whatever they hold."""
        self._chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @property
    def num_updates(self) -> int:
        """Updates made, skipped steps left out: AdamW's own step."""
        return max((int(group.get("step", 0)) for group in self.megatron.param_groups), default=0)


class RouterBias:
    """The router's biases as they were, for a step that turns out to be skipped after they were updated."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self._biases = [(b, b.clone()) for name, b in unwrapped(chunk).named_buffers() if name.endswith("expert_bias")]

    @torch.no_grad()
    def restore(self) -> None:
        for bias, before in self._biases:
            bias.copy_(before)
