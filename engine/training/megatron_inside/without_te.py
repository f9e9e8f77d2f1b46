"""Three faults of Megatron-core 0.16.1 where TransformerEngine is not installed, and what mends each of them.

``tests/engine/training/megatron/test_repairs.py`` takes the first two away again and fails when nothing goes wrong
without them; what the third one mends is what ``test_checkpoints.py`` takes two steps for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

from engine.training.megatron_inside.versions import check_version


def has_transformer_engine() -> bool:
    return find_spec("transformer_engine") is not None


def mend() -> None:
    """Idempotent; nothing happens where TransformerEngine is.

    Raises:
        RuntimeError: another version of Megatron-core than the one that was looked at.
    """
    if has_transformer_engine():
        return
    check_version("a learner without TransformerEngine")
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from torch._dynamo import config as dynamo_config

    # Its jit_fuser is torch.compile. Of what it decorates nothing is used without TransformerEngine but the count of
    # tokens per expert, for which a compiler would have to run, and to be there, at every start.
    dynamo_config.disable = True
    # Read by the router, and defined only where TransformerEngine's import went well.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Its import "succeeds" with stand-ins, and isinstance() of a stand-in raises.
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    # torch's AdamW has a step for each parameter. A distributed checkpoint loads one tensor for all of them, which then
    # counts once per parameter: the first loss after a resume is right and the second is not.
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = AdamW, False
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = AdamW, True
    distrib_optimizer.USING_TE_OPTIMIZER = True


class AdamW(torch.optim.Optimizer):
    """AdamW with the state of TransformerEngine's: one ``step`` per group, ``exp_avg`` and ``exp_avg_sq`` of each
    parameter.

    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  w ← (1 − lr · decay) w − lr · m̂ / (√v̂ + ε)  (arXiv 1711.05101)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        assert adam_w_mode, "decay that goes through the moments is not written"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = step = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            # Its own kernel, with the group's step written out for each parameter: bit for bit what torch's AdamW does.
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [torch.tensor(float(step), device=p.device) for p in parameters],
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
