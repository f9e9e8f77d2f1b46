"""One rank of a student on Megatron (``engine.training.rank_work.RankTrainer``). This file decides the order of things;
how a pass is laid out, run and compared lies in the files beside it.

Loss and gradient are sums over response tokens until ``finish_step`` divides them once by the step's tokens over all
ranks, so that it does not matter how a step was cut into calls, micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from engine.errors import NonFiniteError, RunDirError
from engine.generation.protocol import Bucket
from engine.training.flops import peak_tflops, training_flops
from engine.training.megatron_inside import checkpoint, parallel
from engine.training.megatron_inside.convert import load_hf
from engine.training.megatron_inside.gather import Exporter
from engine.training.megatron_inside.loss import Found
from engine.training.megatron_inside.model import build_model, wrap
from engine.training.megatron_inside.optimizer import RouterBias, StepOptimizer
from engine.training.megatron_inside.overlap import Written, finish_gather, start_gather
from engine.training.megatron_inside.passes import Passes, run_passes
from engine.training.megatron_inside.router_load import RouterLoad
from engine.training.megatron_inside.save import save_student
from engine.training.megatron_inside.step_sums import (
    OBJECTIVE_NAMES,
    StepSums,
    largest_over_all_ranks,
    peak_memory_bytes,
)
from engine.training.megatron_student import StudentShape, check_layout, read_shape
from engine.training.objectives import make_objective
from engine.training.protocol import EvalResult, TokenLosses
from engine.training.rank_work import (
    ExportBuffers,
    RankMicroBatch,
    RankReport,
    RankRollout,
    RankSettings,
    RankStep,
    RankWork,
)
from engine.training.saved import STUDENT, TRAINER
from engine.training.schedule import learning_rate
from engine.transport.handoff import Uploader
from engine.types import StepReport
from ops import ForwardKL, Objective
from teacher.protocol import Scores


def make_trainer(*, settings: RankSettings, buffers: ExportBuffers) -> MegatronRankTrainer:
    """``engine.training.rank_work.FACTORY``."""
    return MegatronRankTrainer(settings=settings, buffers=buffers)


class MegatronRankTrainer:
    """Satisfies ``engine.training.rank_work.RankTrainer``; see there for what each method promises.

    The thread that imports this module must be the one that trains: without CUDA it alone takes Megatron's "cuda" for
    the CPU.
    """

    def __init__(self, *, settings: RankSettings, buffers: ExportBuffers) -> None:
        self.version = 0
        self._learner = settings.learner
        self._student = settings.student
        self._num_steps = settings.num_steps
        self._buffers = buffers
        self._objective = make_objective(settings.objective)
        self._blocks: dict[str, Any] = {"block_rows": settings.learner.block_rows}
        self._measure: dict[str, Any] = {
            "temperature": settings.objective.temperature,
            "square_temperature": settings.objective.square_temperature,
            "clamp": settings.objective.clamp,
        }
        self._state: _Loaded | None = None
        self._step = StepSums()
        self._weights_written = Written(None)
        """By the thread that trains; others know of it only by this."""

    def start(self) -> None:
        """Also raises RecipeError: the layout does not fit the student."""
        self._state = self._load(Path(self._student.path), weights=True)
        self._step = StepSums()
        self._weights_written = self._gather()

    def load(self, folder: Path) -> int:
        """Raises ModelError or CheckpointError when something in ``folder`` is missing or broken. It may have been
        written in another layout."""
        loaded = self._load(folder / STUDENT, weights=False)
        self.version = checkpoint.load(folder / TRAINER, loaded.chunk, loaded.optimizer)
        self._state, self._step = loaded, StepSums()
        self._weights_written = self._gather()
        return self.version

    def accumulate(self, work: RankWork) -> RankReport | None:
        sums, is_first = self._step, self._step.num_calls == 0
        if sums.is_complete:
            raise RuntimeError(f"the last call of step {self.version + 1} has been made; finish_step comes next")
        sums.is_complete = work.is_last
        with sums.timed("passes_s"):
            passes = self._run(
                work.micro_batches, self._objective, is_training=True, is_last=work.is_last, **self._measure
            )
        sums.num_calls += 1
        sums.num_rows += passes.num_tokens
        if not _is_heard():
            return None
        self._count(passes, work)
        values, logprobs = _by_rollout(passes.found, work, self._device)
        bad = sum(int((~rows.isfinite()).sum()) for rows in values)
        if bad and self._learner.on_nonfinite == "stop":
            raise NonFiniteError(
                f"the loss of {bad} of {sum(map(len, values))} response tokens is not finite; the weights are unchanged"
            )
        if not _is_first_of_row():
            return None
        rollouts = _rollouts(work)
        token_losses = None
        if is_first and rollouts:
            shown = self.version % len(rollouts)
            token_losses = TokenLosses(
                index=rollouts[shown].index,
                divergences=tuple(values[shown].tolist()),
                logprobs=tuple(logprobs[shown].tolist()),
            )
        return RankReport(
            indices=tuple(rollout.index for rollout in rollouts),
            loss_sums=tuple(float(rows.sum()) for rows in values),
            num_computed_tokens=passes.num_computed,
            token_losses=token_losses,
        )

    def finish_step(self) -> RankStep | None:
        """Also raises RuntimeError when nothing was accumulated, and NonFiniteError, on all ranks alike."""
        loaded, step = self._loaded, self._step
        totals = step.over_all_ranks(self._device)
        if totals.num_tokens == 0:
            raise RuntimeError(f"step {self.version + 1} has no tokens; call accumulate before finish_step")
        finish_gather(loaded.chunk)
        bias = RouterBias(loaded.chunk)
        loaded.load.put_into_routers()
        with totals.timed("reduce_s"):
            grad_norm = loaded.optimizer.grad_norm(step.num_rows)
        lr = learning_rate(self._learner, step=self.version + 1, num_steps=self._num_steps)
        is_finite = math.isfinite(grad_norm) and math.isfinite(totals.loss_sum)
        if is_finite:
            with totals.timed("update_s"):
                loaded.optimizer.step(grad_norm=grad_norm, lr=lr)
        else:
            bias.restore()
            loaded.optimizer.clear()
            if self._learner.on_nonfinite == "stop":
                raise NonFiniteError(
                    f"the gradient norm is {grad_norm} and the loss {totals.loss_sum / totals.num_tokens} over "
                    f"{totals.num_rollouts} rollouts; the weights are unchanged"
                )
        # Here, not in ``export``: by then the stream may have the next step's passes queued.
        self._weights_written = self._gather()
        expert_tokens = loaded.load.per_expert()
        metrics = self._metrics(totals, expert_tokens)
        loaded.load.clear()
        self.version += 1
        self._step = StepSums()
        if dist.get_rank() != 0:
            return None
        report = StepReport(
            step=self.version,
            num_rollouts=totals.num_rollouts,
            num_tokens=totals.num_tokens,
            num_micro_batches=totals.num_calls,
            loss=totals.loss_sum / totals.num_tokens,
            grad_norm=grad_norm,
            lr=lr,
            skipped=not is_finite,
            metrics=metrics,
        )
        return RankStep(report=report, expert_tokens=expert_tokens)

    def evaluate(self, work: RankWork) -> Sequence[tuple[int, EvalResult]] | None:
        passes = self._run(work.micro_batches, ForwardKL(tail="bucket"), is_training=False)
        if not _is_heard():
            return None
        kl, logprobs = _by_rollout(passes.found, work, self._device)
        if not _is_first_of_row():
            return None
        return [
            (
                rollout.index,
                EvalResult(num_tokens=len(kl_T), kl_sum=float(kl_T.sum()), nll_sum=-float(logprob_T.sum())),
            )
            for rollout, kl_T, logprob_T in zip(_rollouts(work), kl, logprobs, strict=True)
        ]

    def score(self, token_ids: Sequence[int]) -> Sequence[float] | None:
        num_scored = len(token_ids) - 1
        values = torch.zeros(num_scored, dtype=torch.float64, device=self._device)
        if num_scored > 0:
            work = RankWork(micro_batches=(RankMicroBatch(rollouts=(_unscored(token_ids),)),))
            passes = self._run(work.micro_batches, ForwardKL(tail="bucket"), is_training=False)
            if _is_heard():
                _, (logprobs,) = _by_rollout(passes.found, work, self._device)
                if _is_first_of_row() and parallel_state.get_data_parallel_rank() == 0:
                    values = logprobs.to(self._device)
            dist.all_reduce(values)  # from the last stage to rank 0: all others add zeros
        return values.tolist() if dist.get_rank() == 0 else None

    def export(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        return self._loaded.exporter.buckets(bucket_bytes=bucket_bytes, written=self._weights_written)

    def save(self, folder: Path) -> None:
        """Of a step under way nothing is saved: the resumed run trains its rollouts again.

        Raises:
            RunDirError: the disk is full, or cannot be written. A rank that meets it alone leaves the others waiting.
        """
        loaded = self._loaded
        finish_gather(loaded.chunk)
        try:
            checkpoint.save(folder / TRAINER, loaded.chunk, loaded.optimizer, version=self.version)
            save_student(loaded.exporter, source=Path(self._student.path), folder=folder / STUDENT)
        except OSError as error:
            # New ranks would meet the same: it is the user's to mend, not a rank's to die of.
            raise RunDirError(f"{folder} cannot be written: {error}") from error

    def stop(self) -> None:
        self._state = None

    def _load(self, folder: Path, *, weights: bool) -> _Loaded:
        torch.set_num_threads(self._learner.num_threads)
        layout = self._learner.megatron
        shape = read_shape(folder)
        check_layout(shape, layout)
        if self._state is not None:
            self._state.exporter.close()
            self.stop()
        parallel.initialize(layout)
        (model,) = build_model(shape, layout)
        chunk = wrap(model, layout)
        if weights:
            load_hf([chunk], folder, shape)
        return _Loaded(
            shape=shape,
            chunk=chunk,
            optimizer=StepOptimizer(chunk, self._learner),
            load=RouterLoad(chunk),
            uploader=Uploader(self._device),
            exporter=Exporter([chunk], shape, buffers=self._buffers),
            gather_stream=torch.cuda.Stream(self._device) if self._device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        )

    def _gather(self) -> Written:
        return start_gather(self._loaded.chunk, self._device, self._loaded.gather_stream)

    @property
    def _loaded(self) -> _Loaded:
        if self._state is None:
            raise RuntimeError("the trainer holds no model; call start or load first")
        return self._state

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def _run(
        self,
        micro_batches: Sequence[RankMicroBatch],
        objective: Objective,
        *,
        is_training: bool,
        is_last: bool = False,
        **measure: Any,
    ) -> Passes:
        loaded = self._loaded
        return run_passes(
            loaded.chunk,
            micro_batches,
            objective,
            uploader=loaded.uploader,
            forward_only=not is_training,
            is_last=is_last,
            **({"watch": loaded.load.of} if is_training else {}),
            **self._blocks,
            **measure,
        )

    def _count(self, passes: Passes, work: RankWork) -> None:
        """Each rank that is heard adds its rows; what the ranks of one row know alike, the first of them adds."""
        sums = self._step
        sums.num_tokens += passes.num_tokens
        for found in passes.found:
            if found is not None:
                sums.loss_sum += float(found.values.double().sum())
                for name in OBJECTIVE_NAMES:
                    sums.metric_sums[name] += float(found.metrics[name].double().sum())
        if not _is_first_of_row():
            return
        rollouts = _rollouts(work)
        lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts]
        num_response = sum(len(rollout.response_ids) for rollout in rollouts)
        sums.num_rollouts += len(rollouts)
        sums.num_computed += passes.num_computed
        sums.num_real += sum(lengths)
        sums.flops += training_flops(self._loaded.shape, lengths, num_head_rows=num_response)

    def _metrics(self, totals: StepSums, expert_tokens: Mapping[int, Sequence[int]]) -> dict[str, float]:
        """Collective."""
        memory_bytes = largest_over_all_ranks(peak_memory_bytes(), self._device)
        seconds = totals.seconds
        busy_s = sum(seconds.values())
        tflops = totals.flops / busy_s / self._learner.megatron.num_ranks / 1e12
        peak = self._learner.megatron.peak_tflops or peak_tflops()
        metrics = {name: total / totals.num_tokens for name, total in totals.metric_sums.items()}
        metrics |= {name: seconds[name] for name in ("passes_s", "reduce_s", "update_s")}
        metrics |= {
            "tokens_per_s": totals.num_real / busy_s,
            "tflops": tflops,
            "memory_gib": memory_bytes / 2**30,
            "padding_share": 1.0 - totals.num_real / totals.num_computed,
        }
        if peak is not None:
            metrics["mfu"] = tflops / peak
        if expert_tokens:
            metrics["router_peak"] = max(max(tokens) * len(tokens) / sum(tokens) for tokens in expert_tokens.values())
        return metrics


class _Loaded(NamedTuple):
    shape: StudentShape
    chunk: DistributedDataParallel
    optimizer: StepOptimizer
    load: RouterLoad
    uploader: Uploader
    exporter: Exporter
    gather_stream: torch.cuda.Stream | None


def _is_heard() -> bool:
    """One rank of those that know the same values: the last stage's, the first of its tensor-parallel ranks."""
    return bool(parallel_state.is_pipeline_last_stage()) and parallel_state.get_tensor_model_parallel_rank() == 0


def _is_first_of_row() -> bool:
    """Of the ranks that share rows."""
    return bool(parallel_state.get_context_parallel_rank() == 0)


def _rollouts(work: RankWork) -> list[RankRollout]:
    return [rollout for micro_batch in work.micro_batches for rollout in micro_batch.rollouts]


def _by_rollout(
    found: Sequence[Found | None], work: RankWork, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each rollout [its response tokens] float64 on the CPU: the objective, and the log-probability of its tokens.
    Collective over the ranks that share rows."""
    lengths = [len(rollout.response_ids) for rollout in _rollouts(work)]
    whole = torch.zeros(2, sum(lengths), dtype=torch.float64, device=device)
    start = 0
    for one, micro_batch in zip(found, work.micro_batches, strict=True):
        end = start + sum(len(rollout.response_ids) for rollout in micro_batch.rollouts)
        if one is not None:
            here = torch.from_numpy(np.concatenate(one.is_here)).to(device)
            both = torch.stack((one.values, one.metrics["student_logprob"])).double()
            whole[:, start:end][:, here] = both
        start = end
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        dist.all_reduce(whole, group=group)
    values, logprobs = whole.cpu()
    return list(torch.split(values, lengths)), list(torch.split(logprobs, lengths))


def _unscored(token_ids: Sequence[int]) -> RankRollout:
    """Of which the log-probabilities under the student alone are asked: any scores will do."""
    response = np.asarray(token_ids[1:], np.int32)
    zeros = np.zeros(len(response), np.float32)
    scores = Scores(top_ids=response[:, None], top_logprobs=zeros[:, None], sampled_logprobs=zeros)
    return RankRollout(index=0, prompt_ids=np.asarray(token_ids[:1], np.int32), response_ids=response, scores=scores)
