"""The trainer on Megatron-core as the node sees it: a group of ranks, each with its share of a call.

This file decides the order of things and puts together what ranks report. Who computes what is ``rank_plan``'s, how
processes are kept and spoken to is ``engine.transport.rank_group``'s, and what a rank does with Megatron lies in
``megatron_inside``, which is imported in the ranks alone.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.generation.protocol import Bucket
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, StudentConfig
from engine.tracing import log
from engine.training import batch as batches
from engine.training.protocol import EvalResult, MicroBatchReport
from engine.training.rank_plan import plan
from engine.training.rank_work import FACTORY, RankReport, RankSettings, RankStep, RankTrainer, RankWork
from engine.transport.manifest import digest_of
from engine.transport.rank_group import RankGroup
from engine.types import ScoredRollout, StepReport
from teacher.protocol import Scores

_DIGEST_BUCKET_BYTES = 256 << 20
"""Buckets that nobody else sees: large ones, as each of them is a round of calls."""

_ATTENTION_LENGTH_PER_WIDTH = 12
"""A layer's matrices take 24·d² FLOP per token, its causal attention 2·L·d: as much at L = 12·d."""

_USUAL_WIDTH = 2048


class MegatronTrainer:
    """Satisfies ``engine.training.protocol.Trainer``; see there for what each method promises.

    ``export`` and ``digest`` may be called by another thread while this one accumulates. Beside the protocol's errors
    every method raises RanksLost when a rank has died, hangs or failed; then only ``stop`` is left.

    Args:
        steps: of the whole run: where the learning rate schedule ends.
        rollouts_per_step: by which the ranks know a step's last call, and can begin to sum gradients in it
            (``learner.megatron.overlap_grad_reduce``); None: they sum at the end of the step.
        folder: where the ranks' output is kept.
        factory: of a rank's trainer, "module:function" as ``engine.training.rank_work.FACTORY`` says.
    """

    def __init__(
        self,
        *,
        config: LearnerConfig,
        student: StudentConfig,
        objective: ObjectiveConfig,
        steps: int,
        folder: Path,
        rollouts_per_step: int | None = None,
        seed: int = 0,
        factory: str = FACTORY,
    ) -> None:
        self.version = 0
        self._config = config
        self._layout = config.megatron
        self._settings = RankSettings(learner=config, student=student, objective=objective, num_steps=steps, seed=seed)
        self._folder = folder
        self._factory = factory
        self._attention_length = _attention_length(Path(student.path))
        self._group: RankGroup | None = None
        self._rollouts_per_step = rollouts_per_step
        self._num_accumulated = 0
        """Rollouts in the step under way."""
        self._digest: tuple[int, str] | None = None
        """Of a version."""
        self._leaving = threading.Lock()
        """The ranks give their weights to one caller at a time: to the syncer, for a digest, or for a checkpoint."""

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Process ids of the ranks."""
        return self._ranks.pids

    def start(self) -> None:
        self._open()
        self._call("start", timeout_s=self._layout.start_timeout_s)
        self.version = 0

    def load(self, folder: Path) -> None:
        """Raises ModelError or CheckpointError when something in ``folder`` is missing or broken."""
        self._open()
        results = self._call("load", {"folder": folder.absolute()}, timeout_s=self._layout.start_timeout_s)
        self.version = self._of_rank_0(results, "load")

    def accumulate(self, micro_batch: Sequence[ScoredRollout[Scores]]) -> MicroBatchReport:
        """Also raises RuntimeError: more rollouts than a step has."""
        batches.check(micro_batch)
        total, allowed = batches.num_tokens(micro_batch), self._config.tokens_at_a_time
        if total > allowed:
            raise ValueError(
                f"the micro-batch has {total} prompt and response tokens, the learner takes {allowed} at a time "
                f"(learner.micro_batch_tokens × data_parallel × micro_batches = {self._config.micro_batch_tokens} × "
                f"{self._layout.data_parallel} × {self._layout.num_micro_batches}); make it smaller or raise "
                "one of them"
            )
        num_accumulated = self._num_accumulated + len(micro_batch)
        if self._rollouts_per_step is not None and num_accumulated > self._rollouts_per_step:
            raise RuntimeError(
                f"step {self.version + 1} would get {num_accumulated} rollouts, rollouts_per_step is "
                f"{self._rollouts_per_step}; call finish_step when it has them"
            )
        is_last = num_accumulated == self._rollouts_per_step
        reports = self._call("accumulate", self._plan(micro_batch, is_last=is_last))
        self._num_accumulated = num_accumulated
        return _together([report for report in reports if report is not None], micro_batch)

    def finish_step(self) -> StepReport:
        """Also raises RuntimeError when nothing was accumulated."""
        if self._num_accumulated == 0:
            raise RuntimeError(f"step {self.version + 1} has no tokens; call accumulate before finish_step")
        done: RankStep = self._of_rank_0(self._call("finish_step"), "finish_step")
        report = done.report
        self._num_accumulated = 0
        self.version = report.step
        if done.expert_tokens:
            layers, tokens = list(done.expert_tokens), list(done.expert_tokens.values())
            log.info("router.counted", step=report.step, layers=layers, tokens=tokens)
        return report

    def evaluate(self, scored: Sequence[ScoredRollout[Scores]]) -> list[EvalResult]:
        if not scored:
            return []
        batches.check(scored)
        told = self._call("evaluate", self._plan(scored))
        results = {index: result for part in told if part is not None for index, result in part}
        return [results[index] for index in range(len(scored))]

    def score(self, token_ids: Sequence[int]) -> list[float]:
        return list(self._of_rank_0(self._call("score", {"token_ids": list(token_ids)}), "score"))

    def export(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        with self._leaving:
            for names, tensors in self._ranks.stream("export", bucket_bytes=bucket_bytes):
                yield Bucket(names=tuple(names), tensors=tuple(tensors))

    def digest(self) -> str:
        """Of what ``export`` gives; made once for each version."""
        version = self.version
        if self._digest is None or self._digest[0] != version:
            exported = self.export(bucket_bytes=_DIGEST_BUCKET_BYTES)
            named = (pair for bucket in exported for pair in zip(bucket.names, bucket.tensors, strict=True))
            self._digest = (version, digest_of(named))
        return self._digest[1]

    def save(self, folder: Path) -> None:
        """Of a step under way nothing is saved: the resumed run trains its rollouts again.

        Also raises RunDirError: a rank cannot write there, and none is lost for it, or only those that wait for it.
        """
        with self._leaving:
            self._call("save", {"folder": folder.absolute()})

    def stop(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        try:
            if not group.is_lost:
                group.call("stop", {})
        finally:
            group.close()

    def _open(self) -> None:
        if self._group is not None:
            raise RuntimeError("the ranks are started already; stop them first")
        is_gpu = self._config.device != "cpu"
        self._group = group = RankGroup(
            name="learner",
            interface=RankTrainer,
            factory=self._factory,
            arguments={"settings": self._settings},
            num_ranks=self._layout.num_ranks,
            folder=self._folder,
            device="cuda" if is_gpu else "cpu",
            environment=_environment(self._config, is_gpu),
            start_timeout_s=self._layout.start_timeout_s,
            call_timeout_s=self._layout.command_timeout_s,
        )
        self._num_accumulated = 0
        self._digest = None
        try:
            group.start()
        except BaseException:
            self._group = None
            raise

    def _plan(self, scored: Sequence[ScoredRollout[Scores]], *, is_last: bool = False) -> list[dict[str, RankWork]]:
        """Arguments of each rank; of ranks that compute alike the same object, which is then encoded once."""
        works = plan(
            scored,
            config=self._layout,
            budget=self._config.micro_batch_tokens,
            attention_length=self._attention_length,
            is_last=is_last,
        )
        arguments = {id(work): {"work": work} for work in works}
        return [arguments[id(work)] for work in works]

    def _call(self, method: str, arguments: Any = None, *, timeout_s: float | None = None) -> list[Any]:
        return self._ranks.call(method, {} if arguments is None else arguments, timeout_s=timeout_s)

    @property
    def _ranks(self) -> RankGroup:
        if self._group is None:
            raise RuntimeError("the trainer has no ranks; call start or load first")
        return self._group

    @staticmethod
    def _of_rank_0(results: Sequence[Any], method: str) -> Any:
        assert results[0] is not None, f"rank 0 reports {method}"
        return results[0]


def _together(reports: Sequence[RankReport], micro_batch: Sequence[ScoredRollout[Scores]]) -> MicroBatchReport:
    losses = {index: loss for report in reports for index, loss in zip(report.indices, report.loss_sums, strict=True)}
    assert len(losses) == len(micro_batch), f"{len(losses)} of {len(micro_batch)} rollouts were reported"
    num_tokens = [item.rollout.num_tokens for item in micro_batch]
    token_losses = [report.token_losses for report in reports if report.token_losses is not None]
    return MicroBatchReport(
        num_rollouts=len(micro_batch),
        num_tokens=sum(num_tokens),
        num_computed_tokens=sum(report.num_computed_tokens for report in reports),
        loss_sum=math.fsum(losses.values()),
        rollout_losses=tuple(losses[index] / num for index, num in enumerate(num_tokens)),
        token_losses=token_losses[0] if token_losses else None,
    )


def _attention_length(student: Path) -> float:
    try:
        width = json.loads((student / "config.json").read_bytes()).get("hidden_size", _USUAL_WIDTH)
    except (OSError, ValueError):
        width = _USUAL_WIDTH  # a folder that cannot be read is the ranks' to refuse, when they load it
    return float(_ATTENTION_LENGTH_PER_WIDTH * width)


def _environment(config: LearnerConfig, is_gpu: bool) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(config.num_threads)}
    if is_gpu:
        # Megatron asks for it: kernels reach the device in the order in which they were launched, so that collectives
        # are not delayed behind the products that they overlap with.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return environment
