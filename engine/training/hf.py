"""The trainer on torch: any transformers causal language model, one device, gradients summed over a step's tokens.

This file decides the order of things: lay out, forward, loss, backward, and once per step divide, clip, update. How
rollouts are laid out is ``batch``'s, what the model is ``model``'s, the divergences are ``ops``'s.

    T response tokens of a forward pass      D hidden size      V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.adapter_files import read_adapter, write_adapter
from engine.errors import CheckpointError, NonFiniteError
from engine.generation.protocol import Bucket
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.streams import stream_key
from engine.training import batch as batches
from engine.training.adapter import adapter_tensors, load_adapter, merged_tensors
from engine.training.batch import StudentBatch
from engine.training.export import buckets, named_tensors
from engine.training.model import Student, load_student
from engine.training.objectives import make_objective
from engine.training.optimizer import StepOptimizer
from engine.training.protocol import EvalResult, MicroBatchReport, TokenLosses
from engine.training.saved import ADAPTER, STUDENT, TRAINER, TrainerState, load_trainer, save_student, save_trainer
from engine.training.schedule import learning_rate
from engine.transport.handoff import Ticket, Uploader, consume, record, use_own_stream
from engine.transport.manifest import digest_of
from engine.types import ScoredRollout, StepReport
from ops import (
    Divergence,
    ForwardKL,
    Objective,
    divergence,
    linear_divergence,
    linear_divergence_with_gradients,
)
from teacher.protocol import Scores

_CPU_BLOCK_ROWS = 256
"""Matrix products of more rows get no faster."""


class HFTrainer:
    """Satisfies ``engine.training.protocol.Trainer``; see there for what each method promises.

    ``export`` and ``digest`` only read weights, so another thread may call them while this one accumulates. After a
    NonFiniteError the step under way is lost: ``load`` a checkpoint, or stop.

    Args:
        steps: of the whole run: where the learning rate schedule ends.
        seed: of the streams that a model with randomness in its forward pass draws from.
        exports_adapter: with ``config.lora`` a version is the adapter alone; else the weights that it is merged into.
    """

    def __init__(
        self,
        *,
        config: LearnerConfig,
        student: StudentConfig,
        objective: ObjectiveConfig,
        steps: int,
        seed: int = 0,
        exports_adapter: bool = False,
    ) -> None:
        self.version = 0
        self._config = config
        self._student_config = student
        self._objective = make_objective(objective)
        self._measure: dict[str, Any] = {
            "temperature": objective.temperature,
            "square_temperature": objective.square_temperature,
            "clamp": objective.clamp,
        }
        self._num_steps = steps
        self._seed = seed
        self._exports_adapter = exports_adapter
        self._state: _Loaded | None = None
        self._step = _StepSums()
        self._weights_written: torch.cuda.Event | None = None
        """On the stream of the thread that trains, which others know only by this event."""

    def start(self) -> None:
        self._start_from(Path(self._student_config.path))

    def accumulate(self, micro_batch: Sequence[ScoredRollout[Scores]]) -> MicroBatchReport:
        batches.check(micro_batch)
        total = batches.num_tokens(micro_batch)
        if total > self._config.micro_batch_tokens:
            raise ValueError(
                f"the micro-batch has {total} prompt and response tokens, learner.micro_batch_tokens allows "
                f"{self._config.micro_batch_tokens}; make it smaller or raise the budget"
            )
        losses = [0.0] * len(micro_batch)
        num_computed = 0
        # One answer per step is told token by token, another each time.
        shown = self.version % len(micro_batch) if self._step.num_micro_batches == 0 else None
        token_losses = None
        for number, (group, batch) in enumerate(self._batches(micro_batch)):
            with self._randomness("train", self._step.num_micro_batches, number):
                out = self._forward_backward(batch)
            num_computed += batch.inputs.num_tokens
            self._step.add(out)
            for i, values in zip(group, _by_rollout(out.values, batch), strict=True):
                losses[i] = float(values.sum())
            if shown in group:
                token_losses = _token_losses(out, batch, place=group.index(shown), index=shown)
        num_tokens = sum(item.rollout.num_tokens for item in micro_batch)
        loss_sum = math.fsum(losses)
        self._step.num_micro_batches += 1
        self._step.num_rollouts += len(micro_batch)
        self._step.num_tokens += num_tokens
        self._step.loss_sum += loss_sum
        return MicroBatchReport(
            num_rollouts=len(micro_batch),
            num_tokens=num_tokens,
            num_computed_tokens=num_computed,
            loss_sum=loss_sum,
            rollout_losses=tuple(
                loss / item.rollout.num_tokens for loss, item in zip(losses, micro_batch, strict=True)
            ),
            token_losses=token_losses,
        )

    def finish_step(self) -> StepReport:
        """Also raises RuntimeError when nothing was accumulated."""
        sums, optimizer = self._step, self._loaded.optimizer
        if sums.num_tokens == 0:
            raise RuntimeError(f"step {self.version + 1} has no tokens; call accumulate before finish_step")
        lr = learning_rate(self._config, step=self.version + 1, num_steps=self._num_steps)
        grad_norm = optimizer.grad_norm(sums.num_tokens)
        is_finite = math.isfinite(grad_norm) and math.isfinite(sums.loss_sum)
        if is_finite:
            optimizer.step(num_tokens=sums.num_tokens, grad_norm=grad_norm, lr=lr)
        elif self._config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"the gradient norm is {grad_norm} and the loss {sums.loss_sum / sums.num_tokens} over "
                f"{sums.num_rollouts} rollouts; the weights are unchanged"
            )
        else:
            optimizer.clear()
        # Here, not in ``export``: by then the stream may have the next step's passes queued.
        self._weights_written = record(self._loaded.student.device)
        self.version += 1
        self._step = _StepSums()
        return StepReport(
            step=self.version,
            num_rollouts=sums.num_rollouts,
            num_tokens=sums.num_tokens,
            num_micro_batches=sums.num_micro_batches,
            loss=sums.loss_sum / sums.num_tokens,
            grad_norm=grad_norm,
            lr=lr,
            skipped=not is_finite,
            metrics=sums.means(),
        )

    def evaluate(self, scored: Sequence[ScoredRollout[Scores]]) -> list[EvalResult]:
        if not scored:
            return []
        batches.check(scored)
        results: list[EvalResult | None] = [None] * len(scored)
        for number, (group, batch) in enumerate(self._batches(scored)):
            with torch.no_grad(), self._randomness("evaluate", number):
                out = self._forward(ForwardKL(tail="bucket"), batch)
            kl = _by_rollout(out.values, batch)
            logprob = _by_rollout(out.metrics["student_logprob"], batch)
            for i, kl_T, logprob_T in zip(group, kl, logprob, strict=True):
                results[i] = EvalResult(num_tokens=len(kl_T), kl_sum=float(kl_T.sum()), nll_sum=-float(logprob_T.sum()))
        return [result for result in results if result is not None]

    def score(self, token_ids: Sequence[int]) -> list[float]:
        loaded = self._loaded
        student = loaded.student
        batch = batches.lay_out([list(token_ids)], student.layout)
        inputs, _ = batches.upload(batch, layout=student.layout, uploader=loaded.uploader)
        with torch.no_grad(), self._randomness("score"):
            logits_LV = student.logits(inputs)[torch.from_numpy(batch.index[0]).to(student.device)]
        targets = torch.tensor(list(token_ids[1:]), device=student.device)
        values: list[float] = logits_LV[:-1].double().log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return values

    def export(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        return buckets(self._version_tensors(), bucket_bytes=bucket_bytes, written=self._weights_written)

    def digest(self) -> str:
        """See ``engine.transport.manifest`` for its strength; 25 ms for 450 MB on one core."""
        self._wait_for_weights()
        return digest_of(self._version_tensors())

    def save(self, folder: Path) -> None:
        """Of a step under way nothing is saved: the resumed run trains its rollouts again."""
        loaded, state = self._loaded, TrainerState(version=self.version)
        self._wait_for_weights()  # and for the optimizer's state: both are read on this thread's stream
        model, lora = loaded.student.model, self._config.lora
        merged = None if lora is None else dict(merged_tensors(model))
        save_student(model, Path(self._student_config.path), folder / STUDENT, weights=merged)
        if lora is not None:
            write_adapter(folder / ADAPTER, adapter_tensors(model), lora)
        save_trainer(folder / TRAINER, optimizer=loaded.optimizer.state(), state=state)

    def load(self, folder: Path) -> None:
        """Raises ModelError or CheckpointError when something in ``folder`` is missing or broken."""
        state, saved = load_trainer(folder / TRAINER)
        if self._config.lora is None:
            self._start_from(folder / STUDENT)
        else:
            # What is beside the adapter has it merged in.
            self._start_from(Path(self._student_config.path))
            load_adapter(self._loaded.student.model, read_adapter(folder / ADAPTER))
        try:
            self._loaded.optimizer.load_state(state)
        except ValueError as error:
            raise CheckpointError(f"trainer state in {str(folder / TRAINER)!r}: {error}") from error
        self.version = saved.version

    def stop(self) -> None:
        self._state = None

    def _version_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What a version consists of, in its order."""
        model = self._loaded.student.model
        if self._config.lora is None:
            return named_tensors(model)
        return adapter_tensors(model) if self._exports_adapter else merged_tensors(model)

    def _wait_for_weights(self) -> None:
        """The calling thread's stream waits until they are written."""
        student = self._loaded.student
        tensors = tuple(tensor for _, tensor in named_tensors(student.model))
        consume(Ticket(tensors=tensors, device=student.device, event=self._weights_written))

    def _start_from(self, folder: Path) -> None:
        torch.set_num_threads(self._config.num_threads)
        student = load_student(self._student_config, self._config, folder=folder)
        use_own_stream(student.device)
        named = [(name, one) for name, one in student.model.named_parameters() if one.requires_grad]
        workspace = None
        if student.head is not None and student.device.type == "cpu":
            weight = student.head.weight
            num_rows = self._config.block_rows or _CPU_BLOCK_ROWS
            workspace = torch.empty(num_rows, weight.shape[0], dtype=student.training_dtype)
        self._state = _Loaded(
            student=student,
            optimizer=StepOptimizer(named, self._config),
            uploader=Uploader(student.device),
            workspace=workspace,
        )
        self._weights_written = record(student.device)
        self._step = _StepSums()

    @property
    def _loaded(self) -> _Loaded:
        if self._state is None:
            raise RuntimeError("the trainer holds no model; call start or load first")
        return self._state

    def _batches(self, scored: Sequence[ScoredRollout[Scores]]) -> Iterator[tuple[list[int], StudentBatch]]:
        loaded = self._loaded
        student = loaded.student
        for group in batches.split(scored, layout=student.layout, budget=self._config.micro_batch_tokens):
            chosen = [scored[i] for i in group]
            yield group, batches.make_batch(chosen, layout=student.layout, uploader=loaded.uploader)

    def _forward(self, objective: Objective, batch: StudentBatch) -> Divergence:
        """Values and metrics without gradient; the caller has switched autograd off."""
        student, blocks = self._loaded.student, self._blocks
        head = student.head
        if head is None:
            logits = student.logits(batch.inputs).index_select(0, batch.rows)
            return divergence(objective, logits, batch.scores, **blocks)
        hidden = student.hidden(batch.inputs).index_select(0, batch.rows)
        return linear_divergence(objective, hidden, head.weight, batch.scores, head.bias, **blocks)

    def _forward_backward(self, batch: StudentBatch) -> Divergence:
        """Adds the gradient of the sum of the values to the parameters'."""
        student = self._loaded.student
        measure = {**self._measure, **self._blocks, "behaviour_logprobs": batch.sampling_logprobs}
        head = student.head
        if head is None:
            logits = student.logits(batch.inputs).index_select(0, batch.rows)
            out = divergence(self._objective, logits, batch.scores, **measure)
            if self._is_usable(out.values):
                out.values.sum().backward()  # type: ignore[no-untyped-call]
            return out
        hidden = student.hidden(batch.inputs).index_select(0, batch.rows)
        hidden_grad = torch.empty_like(hidden)
        out = linear_divergence_with_gradients(
            self._objective,
            hidden,
            head.weight,
            batch.scores,
            head.bias,
            hidden_grad=hidden_grad,
            head_grad=head.weight.grad,
            bias_grad=None if head.bias is None else head.bias.grad,
            workspace=self._loaded.workspace,
            **measure,
        )
        if self._is_usable(out.values):
            hidden.backward(hidden_grad)  # type: ignore[no-untyped-call]
        return out

    @property
    def _blocks(self) -> dict[str, Any]:
        num_rows = self._config.block_rows
        if num_rows is None and self._loaded.student.device.type == "cpu":
            num_rows = _CPU_BLOCK_ROWS
        return {} if num_rows is None else {"block_rows": num_rows}

    def _is_usable(self, values: Tensor) -> bool:
        """False: the step will be skipped, so the rest of this backward pass is not worth its time."""
        if bool(values.isfinite().all()):
            return True
        if self._config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"the loss of {int((~values.isfinite()).sum())} of {len(values)} response tokens is not finite; "
                "the weights are unchanged"
            )
        return False

    @contextmanager
    def _randomness(self, purpose: str, *parts: int) -> Iterator[None]:
        """Whatever a model draws inside is a function of seed, version and ``parts``, and nothing outside notices."""
        device = self._loaded.student.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(stream_key(purpose, self._seed, self.version, *parts))
            yield


def _token_losses(out: Divergence, batch: StudentBatch, *, place: int, index: int) -> TokenLosses:
    """Of the rollout at ``place`` in ``batch``."""
    start = sum(batch.lengths[:place])
    rows = slice(start, start + batch.lengths[place])
    return TokenLosses(
        index=index,
        divergences=tuple(out.values[rows].tolist()),
        logprobs=tuple(out.metrics["student_logprob"][rows].tolist()),
    )


def _by_rollout(column_T: Tensor, batch: StudentBatch) -> list[Tensor]:
    return list(torch.split(column_T.detach().double(), list(batch.lengths)))


class _Loaded(NamedTuple):
    student: Student
    optimizer: StepOptimizer
    uploader: Uploader
    workspace: Tensor | None
    """[block_rows, V] for the loss; None where the allocator keeps such things itself, or nothing uses it."""


class _StepSums:
    """What a step has added up so far."""

    def __init__(self) -> None:
        self.num_micro_batches = self.num_rollouts = self.num_tokens = 0
        self.loss_sum = 0.0
        self._metric_sums: dict[str, float] = {}

    def add(self, out: Divergence) -> None:
        for name, metric in out.metrics.items():
            self._metric_sums[name] = self._metric_sums.get(name, 0.0) + float(metric.double().sum())

    def means(self) -> dict[str, float]:
        return {name: total / self.num_tokens for name, total in self._metric_sums.items()}
