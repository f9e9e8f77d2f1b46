"""What ranks do in the tests of the trainer; imports Megatron, so it is loaded in ranks alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from engine.errors import NonFiniteError
from engine.training.megatron_inside import model as model_module
from engine.training.megatron_inside import versions
from engine.training.megatron_inside.config import ddp_config
from engine.training.megatron_inside.convert import held_tensors
from engine.training.megatron_inside.inputs import make_row
from engine.training.megatron_inside.model import unwrapped
from engine.training.megatron_inside.overlap import finish_gather, start_gather
from engine.training.megatron_inside.trainer import MegatronRankTrainer, make_trainer
from engine.training.protocol import EvalResult
from engine.training.rank_work import RankRollout, RankSettings, RankWork
from engine.transport.manifest import digest_of
from engine.transport.shared_arrays import SharedBuffers
from engine.types import StepReport
from tests.engine.training.megatron.rank_cases import Overlapped, Pieces, Steps, deal


def make(settings: RankSettings) -> MegatronRankTrainer:
    return make_trainer(settings=settings, buffers=SharedBuffers())


def dealt(rollouts: Sequence[RankRollout], *, is_last: bool = False) -> RankWork:
    """This rank's share."""
    return deal(
        rollouts,
        share=parallel_state.get_data_parallel_rank(),
        num_shares=parallel_state.get_data_parallel_world_size(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        is_last=is_last,
    )


def take_steps(trainer: MegatronRankTrainer, steps: Sequence[Sequence[Sequence[RankRollout]]], seen: Steps) -> None:
    """Steps of calls of rollouts."""
    for calls in steps:
        for rollouts in calls:
            report = trainer.accumulate(dealt(rollouts))
            seen.reports.extend([] if report is None else [report])
        with _ToldGradients(trainer, seen.gradients.append):
            done = trainer.finish_step()
        seen.steps.extend([] if done is None else [done.report])


def train(
    settings: RankSettings,
    steps: Sequence[Sequence[Sequence[RankRollout]]],
    load: Path | None = None,
    save: Path | None = None,
    then: Sequence[Sequence[Sequence[RankRollout]]] = (),
) -> Steps:
    """Begin with the student, or with the checkpoint ``load``; take ``steps``, write the checkpoint ``save``, take the
    steps of ``then``. What is seen is seen over all steps."""
    trainer = make(settings)
    if load is None:
        trainer.start()
    else:
        trainer.load(load)
    seen = Steps(reports=[], steps=[], gradients=[])
    take_steps(trainer, steps, seen)
    if save is not None:
        trainer.save(save)
    take_steps(trainer, then, seen)
    trainer.stop()
    return seen


def train_overlapped(
    settings: RankSettings,
    steps: Sequence[Sequence[Sequence[RankRollout]]],
    options: dict[str, Any],
) -> Overlapped:
    """Steps of calls of rollouts.

    Args:
        options: those of ``_train_overlapped``; calls of a world are positional.
    """
    return _train_overlapped(settings, steps, **options)


def _train_overlapped(
    settings: RankSettings,
    steps: Sequence[Sequence[Sequence[RankRollout]]],
    *,
    bucket_size: int | None = None,
    tells_last: bool = True,
    load: Path | None = None,
    save: Path | None = None,
) -> Overlapped:
    """
    Args:
        bucket_size: in parameters; None: Megatron's own, in which these students are one bucket.
        tells_last: whether ranks know a step's last call.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_module, "ddp_config", lambda layout: dataclasses.replace(ddp_config(layout), bucket_size=bucket_size)
        )
        trainer = make(settings)
        trainer.start() if load is None else trainer.load(load)
    chunk = trainer._loaded.chunk
    groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    seen, late = Overlapped([], [], [], [], ""), ""
    for number, calls in enumerate(steps, start=1):
        for rollouts in calls:
            trainer.accumulate(dealt(rollouts, is_last=tells_last and rollouts is calls[-1]))
        if tells_last:
            with pytest.raises(RuntimeError) as raised:
                trainer.accumulate(dealt(calls[-1]))
            late = str(raised.value)
        seen.sums_begun.append((sum(group.grad_reduce_handle is not None for group in groups), len(groups)))
        done = trainer.finish_step()
        seen.steps.extend([] if done is None else [done.report])
        seen.gathers_begun.append((sum(group.param_gather_handle is not None for group in groups), len(groups)))
        if save is not None and number == len(steps):
            trainer.save(save)
        exported = [
            pair
            for bucket in trainer.export(bucket_bytes=1 << 30)
            for pair in zip(bucket.names, bucket.tensors, strict=True)
        ]
        seen.versions.extend([digest_of(exported)] if exported else [])
    trainer.stop()
    return seen._replace(late=late)


def gather_often(settings: RankSettings, num_times: int) -> bool:
    """Whether all weights are what they were; in buckets so small that dozens of gathers are under way at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_module, "ddp_config", lambda layout: dataclasses.replace(ddp_config(layout), bucket_size=100)
        )
        trainer = make(settings)
        trainer.start()
    chunk = trainer._loaded.chunk
    finish_gather(chunk)
    before = [weight.detach().clone() for weight in chunk.parameters()]
    for _ in range(num_times):
        start_gather(chunk, torch.device("cpu"), None)
        finish_gather(chunk)
    return all(torch.equal(*pair) for pair in zip(before, chunk.parameters(), strict=True))


def train_without(repair: str, settings: RankSettings, steps: Sequence[Sequence[Sequence[RankRollout]]]) -> Steps:
    """``train`` with one repair of Megatron taken away."""
    with pytest.MonkeyPatch.context() as patch:
        match repair:
            case "te_general_gemm":
                patch.delattr(moe_utils, "te_general_gemm")
            case "HAVE_TE":
                patch.setattr(multi_latent_attention, "HAVE_TE", True)
            case _:
                raise AssertionError(repair)
        return train(settings, steps)


def repaired_with(version: str) -> str:
    """What is said of another version of Megatron-core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "version", lambda package: version)
        with pytest.raises(RuntimeError) as raised:
            versions.check_version("a learner without CUDA")
    return str(raised.value)


def spoiled(settings: RankSettings, rollouts: Sequence[RankRollout]) -> tuple[str, StepReport | None, bool]:
    """A step whose gradient is not finite: what is said, and whether all weights and biases are as they were."""
    trainer = make(settings)
    trainer.start()
    model = unwrapped(trainer._loaded.chunk)
    trainer.accumulate(dealt(rollouts))
    next(model.parameters()).main_grad[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
    said, report = "", None
    try:
        done = trainer.finish_step()
        report = None if done is None else done.report
    except NonFiniteError as error:
        said = str(error)
    same = all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    trainer.stop()
    return said, report, same


def refusals(settings: RankSettings, rollouts: Sequence[RankRollout]) -> list[str]:
    """What a trainer says that is used in the wrong order."""
    trainer = make(settings)
    said = []
    for wrong in (trainer.finish_step, lambda: trainer.score([3, 4])):
        with pytest.raises(RuntimeError) as raised:
            wrong()
        said.append(str(raised.value))
    trainer.start()
    with pytest.raises(RuntimeError) as raised:
        trainer.finish_step()
    trainer.stop()
    return [*said, str(raised.value)]


def router_biases(
    settings: RankSettings, rollouts: Sequence[RankRollout]
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], dict[int, tuple[int, ...]]]:
    """Of each router of this stage, over one step: tokens of each expert that are no padding, bias before and after;
    and what is reported of all routers, by rank 0."""
    trainer = make(settings)
    trainer.start()
    routers = [m for m in unwrapped(trainer._loaded.chunk).modules() if isinstance(m, TopKRouter)]
    before = [router.expert_bias.clone() for router in routers]
    trainer.accumulate(dealt(rollouts))
    counts = [count.clone() for count in trainer._loaded.load._counts]
    for count in counts:
        torch.distributed.all_reduce(
            count, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        )
    done = trainer.finish_step()
    after = [router.expert_bias.clone() for router in routers]
    trainer.stop()
    return list(zip(counts, before, after, strict=True)), {} if done is None else done.expert_tokens


def measured(settings: RankSettings, rollouts: Sequence[RankRollout]) -> Sequence[tuple[int, EvalResult]] | None:
    trainer = make(settings)
    trainer.start()
    found = trainer.evaluate(dealt(rollouts))
    trainer.stop()
    return found


class _ToldGradients:
    """While it lasts, the optimizer tells of the gradient before it clips it."""

    def __init__(self, trainer: MegatronRankTrainer, tell: Callable[[Pieces], None]) -> None:
        self._trainer, self._tell = trainer, tell

    def __enter__(self) -> None:
        loaded = self._trainer._loaded
        optimizer = loaded.optimizer
        self._step = optimizer.step

        def step(**options: Any) -> None:
            self._tell(list(_pieces(self._trainer)))
            self._step(**options)

        optimizer.step = step  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._trainer._loaded.optimizer.step = self._step  # type: ignore[method-assign]


def _pieces(trainer: MegatronRankTrainer) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Of the gradient that the optimizer will use; each data-parallel rank has a part of each parameter."""
    loaded = trainer._loaded
    gradients: dict[int, Tensor] = {}
    for part in loaded.optimizer.megatron.chained_optimizers:
        for model_groups, main_groups in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for models, mains in zip(model_groups, main_groups, strict=True):
                for model, main in zip(models, mains, strict=True):
                    held = part._get_model_param_range_map(model)["param"]
                    whole = torch.full((model.numel(),), float("nan"))
                    whole[held.start : held.end] = main.grad.float().cpu()
                    gradients[id(model)] = whole.view(model.shape)
    for _, tensor, parts in held_tensors([unwrapped(loaded.chunk)], loaded.shape):
        if tensor.requires_grad and id(tensor) in gradients:
            for piece in parts.pieces:
                yield piece.name, piece.there, gradients[id(tensor)][piece.here].clone()


def logprobs(settings: RankSettings, token_ids: Sequence[int]) -> Sequence[float] | None:
    """Of one sequence, by rank 0."""
    trainer = make(settings)
    trainer.start()
    found = trainer.score(token_ids)
    trainer.stop()
    return found


def logits(settings: RankSettings, sequences: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """All sequences in one packed row. Of each: which of its positions this rank knows [L] bool, and their logits
    [that many, V]; nothing before the last stage."""
    trainer = make(settings)
    trainer.start()
    loaded = trainer._loaded
    row = make_row([np.asarray(ids, np.int32) for ids in sequences], device=torch.device("cpu"))
    known: list[tuple[Tensor, Tensor]] = []

    def forward(_: Any, chunk: Any) -> tuple[Tensor, Any]:
        return chunk(row.token_ids, row.position_ids, None, packed_seq_params=row.packing), look

    def look(hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        part = hidden[0] @ unwrapped(loaded.chunk).head_weight.t()
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part, group=group)
        whole = torch.cat(parts, dim=1)[:, : loaded.shape.vocab_size]
        known.extend((places >= 0, whole[places[places >= 0]]) for places in row.places)
        return hidden.sum(), torch.tensor(1), None

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(()),
            model=loaded.chunk,
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )
    trainer.stop()
    return known
