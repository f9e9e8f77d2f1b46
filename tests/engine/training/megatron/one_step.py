"""One training step of a tiny student on one rank, on whatever device there is: ``python -m … FOLDER DTYPE``. Needs
torch, Megatron-core and msgspec, no transformers: weights are a function of their names.

Writes ``out.pt``: loss, gradient norm, and the gradient of every parameter.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import torch
import torch.distributed as dist

from engine.training.megatron_inside import parallel
from engine.training.megatron_inside.model import build_model, unwrapped, wrap
from engine.training.megatron_inside.optimizer import StepOptimizer
from engine.training.megatron_inside.passes import run_passes
from engine.training.megatron_student import Experts, LatentAttention, Rope, StudentShape
from engine.training.rank_work import RankMicroBatch
from engine.transport.handoff import Uploader
from ops import ForwardKL
from tests.engine.training.megatron.rank_cases import LEARNER, make_rollouts

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 96,
    "norm_eps": 1e-6,
    "max_length": 128,
}
SHAPES = {
    "qwen3": StudentShape(
        family="qwen3", num_kv_heads=2, head_dim=16, is_tied=True, has_qk_norm=True, rope=Rope(theta=1e4), **COMMON
    ),
    "moonlight": StudentShape(
        family="deepseek_v3",
        num_kv_heads=4,
        head_dim=24,
        is_tied=False,
        has_qk_norm=False,
        rope=Rope(theta=5e4),
        latent=LatentAttention(q_rank=None, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16),
        experts=Experts(
            num_experts=4,
            top_k=2,
            ffn_size=32,
            shared_ffn_size=64,
            in_layer=(False, True),
            score="sigmoid",
            normalise=True,
            scale=2.446,
            has_bias=True,
        ),
        **COMMON,
    ),
}


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.copy_(0.1 * values if parameter.dim() > 1 else 1.0 + 0.1 * values)


def step(name: str, dtype: Literal["float32", "bfloat16"]) -> dict[str, object]:
    shape = SHAPES[name]
    learner = msgspec.structs.replace(LEARNER, megatron=msgspec.structs.replace(LEARNER.megatron, dtype=dtype))
    parallel.initialize(learner.megatron)
    (model,) = build_model(shape, learner.megatron)
    fill(model)
    chunk = wrap(model, learner.megatron)
    optimizer = StepOptimizer(chunk, learner)
    device = next(model.parameters()).device
    rollouts = make_rollouts(6, vocab_size=shape.vocab_size)
    passes = run_passes(
        chunk,
        [RankMicroBatch(rollouts=tuple(rollouts[:4])), RankMicroBatch(rollouts=tuple(rollouts[4:]))],
        ForwardKL(),
        uploader=Uploader(device),
        forward_only=False,
    )
    loss = sum(float(found.values.double().sum()) for found in passes.found if found is not None) / passes.num_tokens
    grad_norm = optimizer.grad_norm(passes.num_tokens)
    gradients = {key: parameter.main_grad.cpu().clone() for key, parameter in unwrapped(chunk).named_parameters()}
    optimizer.step(grad_norm=grad_norm, lr=1e-3)
    return {"loss": loss, "grad_norm": grad_norm, "gradients": gradients, "device": device.type}


if __name__ == "__main__":
    folder, dtype = Path(sys.argv[1]), cast(Literal["float32", "bfloat16"], sys.argv[2])
    is_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    torch.save({name: step(name, dtype) for name in SHAPES}, folder / "out.pt")
    dist.destroy_process_group()
