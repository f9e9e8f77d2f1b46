"""AdamW on the summed gradients of a step, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.recipe import LearnerConfig

NamedParameters = Sequence[tuple[str, nn.Parameter]]

_STATE = ("exp_avg", "exp_avg_sq", "step")


class StepOptimizer:
    """AdamW that averages, clips and clears. Vectors (norms, biases) are not decayed.

    torch's fused kernel is the fastest on CPU too: 63 ms for 113 M fp32 parameters on one core, foreach 390, plain 355.
    Gradients are cleared in place: freed and made anew, 450 MB of them would be page faults at each step.
    """

    def __init__(self, parameters: NamedParameters, config: LearnerConfig) -> None:
        self._named = tuple(parameters)
        self._parameters = [parameter for _, parameter in self._named]
        self._grad_clip = config.grad_clip
        decayed = [parameter for parameter in self._parameters if parameter.dim() >= 2]
        others = [parameter for parameter in self._parameters if parameter.dim() < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, config.weight_decay), (others, 0.0))
            if params
        ]
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    @torch.no_grad()
    def grad_norm(self, num_tokens: int) -> float:
        """Norm of the summed gradient divided by ``num_tokens``; nothing changes."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return float(norm) / num_tokens

    @torch.no_grad()
    def step(self, *, num_tokens: int, grad_norm: float, lr: float) -> None:
        """Divide the gradient by ``num_tokens``, clip it (its norm is ``grad_norm``), update, clear."""
        scale = 1.0 / num_tokens
        if self._grad_clip is not None and grad_norm > self._grad_clip:
            scale *= self._grad_clip / grad_norm
        torch._foreach_mul_(self._gradients(), scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Zero the gradients, whatever they hold."""
        torch._foreach_zero_(self._gradients())

    def state(self) -> dict[str, Tensor]:
        """``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME`` of each parameter; empty before the first step."""
        return {
            f"{kind}.{name}": self._adamw.state[parameter][kind]
            for name, parameter in self._named
            if parameter in self._adamw.state
            for kind in _STATE
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave.

        Raises:
            ValueError: it is of other parameters or shapes.
        """
        expected = {f"{kind}.{name}" for name, _ in self._named for kind in _STATE}
        if state and set(state) != expected:
            odd = sorted(set(state) ^ expected)
            raise ValueError(f"optimizer state and model disagree on {len(odd)} entries, among them {odd[0]!r}")
        for name, parameter in self._named if state else ():
            loaded = {kind: state[f"{kind}.{name}"] for kind in _STATE}
            if loaded["exp_avg"].shape != parameter.shape or loaded["exp_avg_sq"].shape != parameter.shape:
                raise ValueError(
                    f"optimizer state of {name!r} has shape {tuple(loaded['exp_avg'].shape)}, "
                    f"the parameter has {tuple(parameter.shape)}"
                )
            # A copy of its own for each: a step counter that parameters share would count several times per step.
            self._adamw.state[parameter] = {kind: value.to(parameter.device).clone() for kind, value in loaded.items()}

    def _gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._parameters]
        assert all(gradient is not None for gradient in gradients), "gradients are kept from step to step"
        return gradients  # type: ignore[return-value]
