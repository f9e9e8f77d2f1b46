"""Three training steps of tiny students on one rank, on whatever device there is: ``python -m … FOLDER DTYPE``, and
perhaps ``overlap``. Needs torch, Megatron-core and msgspec, no transformers: weights are a function of their names.

Writes ``out.pt``: of the first step loss, gradient norm, and the gradient of every parameter; after the last, weights.
``overlap``: sums and gathers go on beside the passes, in buckets of a few thousand parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import msgspec
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig

from engine.megatron_config import MegatronConfig
from engine.training.megatron_inside import model as model_module
from engine.training.megatron_inside import parallel
from engine.training.megatron_inside.config import ddp_config
from engine.training.megatron_inside.model import build_model, unwrapped, wrap
from engine.training.megatron_inside.optimizer import StepOptimizer
from engine.training.megatron_inside.overlap import finish_gather, start_gather
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


def in_small_buckets(layout: MegatronConfig) -> DistributedDataParallelConfig:
    """Where there are buckets: with ``overlap``."""
    return dataclasses.replace(ddp_config(layout), bucket_size=5000)


def steps(name: str, dtype: Literal["float32", "bfloat16"], *, overlap: bool) -> dict[str, object]:
    shape = SHAPES[name]
    layout = msgspec.structs.replace(
        LEARNER.megatron, dtype=dtype, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    learner = msgspec.structs.replace(LEARNER, grad_clip=None, megatron=layout)
    parallel.initialize(learner.megatron)
    (model,) = build_model(shape, learner.megatron)
    fill(model)
    chunk = wrap(model, learner.megatron)
    optimizer = StepOptimizer(chunk, learner)
    device = next(model.parameters()).device
    stream = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    rollouts = make_rollouts(6, vocab_size=shape.vocab_size)
    first: dict[str, object] = {}
    start_gather(chunk, device, stream)
    for _ in range(3):
        passes = run_passes(
            chunk,
            [RankMicroBatch(rollouts=tuple(rollouts[:4])), RankMicroBatch(rollouts=tuple(rollouts[4:]))],
            ForwardKL(),
            uploader=Uploader(device),
            forward_only=False,
            is_last=True,
        )
        loss = sum(float(one.values.double().sum()) for one in passes.found if one is not None) / passes.num_tokens
        grad_norm = optimizer.grad_norm(passes.num_tokens)
        if not first:
            gradients = {key: weight.main_grad.cpu().clone() for key, weight in unwrapped(chunk).named_parameters()}
            first = {"loss": loss, "grad_norm": grad_norm, "gradients": gradients, "device": device.type}
        optimizer.step(grad_norm=grad_norm, lr=1e-3)
        start_gather(chunk, device, stream)
    finish_gather(chunk)
    weights = {key: weight.detach().cpu() for key, weight in unwrapped(chunk).named_parameters()}
    return first | {"weights": weights, "num_buckets": len(chunk.bucket_groups + chunk.expert_parallel_bucket_groups)}


if __name__ == "__main__":
    folder, dtype = Path(sys.argv[1]), cast(Literal["float32", "bfloat16"], sys.argv[2])
    is_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    overlap = sys.argv[3:] == ["overlap"]
    with mock.patch.object(model_module, "ddp_config", in_small_buckets):
        torch.save({name: steps(name, dtype, overlap=overlap) for name in SHAPES}, folder / "out.pt")
    dist.destroy_process_group()
