"""Every metric that a run gives out, declared once with unit, reduction and meaning. Decides names; how values come
about and where they go lies elsewhere.

``METRICS`` are the series of ``/metrics`` (``engine.metrics``). ``STEP_METRICS``, ``OBJECTIVE_METRICS``,
``RANK_METRICS`` and ``EVALUATION_METRICS`` are columns: one row per optimizer step or per held-out measurement
(``engine.step_log``). The tables in docs/observability.md hold the same.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

_SHORT_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LONG_S = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One Prometheus series, without its value."""

    name: str
    """Unit last (counters: before ``_total``)."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    reduction: Literal["sum", "last", "distribution"]
    """How values of several nodes, or of a longer time, become one."""
    doc: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    begins: float = 0.0
    """Of a gauge; NaN: nobody knows yet, which 0 would not say."""


def _counter(name: str, unit: str, doc: str, *labels: str) -> Metric:
    return Metric(name=name, kind="counter", unit=unit, reduction="sum", doc=doc, labels=labels)


def _gauge(name: str, unit: str, doc: str, *labels: str) -> Metric:
    return Metric(name=name, kind="gauge", unit=unit, reduction="last", doc=doc, labels=labels)


def _measured(name: str, unit: str, doc: str) -> Metric:
    return Metric(name=name, kind="gauge", unit=unit, reduction="last", doc=doc, begins=math.nan)


def _histogram(name: str, unit: str, doc: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind="histogram", unit=unit, reduction="distribution", doc=doc, buckets=buckets)


ROLLOUTS = _counter("engine_rollouts_total", "rollouts", "Rollouts that reached a state, repeats included.", "state")
SAMPLED_TOKENS = _counter("engine_sampled_tokens_total", "tokens", "Response tokens of finished answers.")
DECODED_TOKENS = _counter("engine_generator_tokens_total", "tokens", "Tokens that the generator made, all of them.")
TRAINED_TOKENS = _counter("engine_trained_tokens_total", "tokens", "Response tokens in optimizer steps.")
COMPUTED_TOKENS = _counter(
    "engine_computed_tokens_total", "tokens", "Positions through the student in training: prompts and padding count."
)
STEPS = _counter("engine_steps_total", "steps", "Optimizer steps, by whether the weights changed.", "outcome")
STEP_INTERVAL = _histogram(
    "engine_step_interval_seconds", "seconds", "From the end of one optimizer step to the end of the next.", _LONG_S
)
MICRO_BATCH = _histogram("engine_micro_batch_seconds", "seconds", "Forward and backward of one micro-batch.", _LONG_S)
OPTIMIZER = _histogram("engine_optimizer_seconds", "seconds", "Clipping and optimizer of one step.", _SHORT_S)
LOSS = _measured("engine_loss_nats", "nats per token", "The objective, mean over the last step's response tokens.")
GRAD_NORM = _measured("engine_grad_norm", "1", "Norm of the last step's gradient, before clipping.")
LEARNING_RATE = _measured("engine_learning_rate", "1", "Of the last step.")
STALENESS = _histogram(
    "engine_staleness_versions", "versions", "Age of each rollout when its step trained on it.", _VERSIONS
)
POLICY_VERSION = _gauge("engine_policy_version", "version", "Optimizer steps done: the learner's version.")
LIVE_VERSION = _gauge("engine_live_version", "version", "The version that every generator holds.")
WEIGHTS_PUSH = _histogram("engine_weights_push_seconds", "seconds", "Bringing a version to the generators.", _LONG_S)
ROLLOUT = _histogram("engine_rollout_seconds", "seconds", "Sampling one answer, waiting for a slot included.", _LONG_S)
CHECKPOINT_STEP = _measured("engine_checkpoint_step", "step", "Of the newest checkpoint.")
CHECKPOINT = _histogram("engine_checkpoint_seconds", "seconds", "Writing one checkpoint.", _LONG_S)
HELD_OUT_KL = _measured("engine_held_out_kl_nats", "nats per token", "Teacher to student, student's held-out answers.")
REFERENCE_KL = _measured("engine_reference_kl_nats", "nats per token", "Teacher to student, the reference answers.")
REFERENCE_NLL = _measured("engine_reference_nll_nats", "nats per token", "Of the reference answers under the student.")
HELD_OUT_SCORE = _measured("engine_held_out_score", "1", "What the recipe's scorer says of the held-out answers.")
TEACHER_REQUESTS = _counter("engine_teacher_requests_total", "requests", "Rollouts at the teacher.", "outcome")
TEACHER_SECONDS = _histogram(
    "engine_teacher_score_seconds", "seconds", "One rollout at the teacher, retries and waits included.", _LONG_S
)
TEACHER_RETRIES = _counter("engine_teacher_retries_total", "attempts", "Attempts after the first.")
TEACHER_HEDGES = _counter("engine_teacher_hedges_total", "attempts", "Second replicas asked because of a slow one.")
TEACHER_PARKED = _gauge("engine_teacher_parked", "1", "1 while every replica is away and rollouts wait.")
TEACHER_PARKED_SECONDS = _counter("engine_teacher_parked_seconds_total", "seconds", "Time without any replica.")
REPLICA_UP = _gauge("engine_teacher_replica_up", "1", "1 while the replica takes requests.", "replica")
ACTOR_STATE = _gauge(
    "engine_actor_state", "1", "1 for the state that the actor is in, 0 for the others.", "actor", "state"
)
ACTOR_RESTARTS = _counter("engine_actor_restarts_total", "restarts", "Actors started again after a failure.", "actor")
CHANNEL_ITEMS = _gauge("engine_channel_items", "items", "Unread.", "channel")
CHANNEL_MAX_ITEMS = _gauge("engine_channel_max_items", "items", "Room for.", "channel")
CHANNEL_SENT = _counter("engine_channel_sent_items_total", "items", "Sent.", "channel")
CHANNEL_WAIT = _counter("engine_channel_wait_seconds_total", "seconds", "Waited, summed over calls.", "channel", "side")
LOOP_LAG = _histogram("engine_loop_lag_seconds", "seconds", "How late the event loop ran a timer.", _SHORT_S)
GENERATOR_RUNNING = _gauge("engine_generator_running", "sequences", "In decode slots.")
GENERATOR_WAITING = _gauge("engine_generator_waiting", "sequences", "Waiting for a slot.")
GENERATOR_SLOTS = _gauge("engine_generator_slots", "sequences", "Decode slots.")
GENERATOR_BUSY = _counter("engine_generator_busy_seconds_total", "seconds", "Spent computing.")
LOG_LINES = _counter("engine_log_lines_total", "lines", "Written, by level.", "level")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them, in the order of docs/observability.md."""


class StepMetric(msgspec.Struct, frozen=True, kw_only=True):
    """One column of ``metrics.jsonl`` or ``evaluations.jsonl``."""

    name: str
    unit: str
    """Empty when nobody declared it."""
    reduction: Literal["mean over tokens", "mean over rollouts", "mean over prompts", "max", "sum", "last"]
    """Over what happened within the step or the measurement."""
    doc: str
    kind: Literal["number", "count", "flag", "time"] = "number"


def _mean(name: str, unit: str, doc: str) -> StepMetric:
    return StepMetric(name=name, unit=unit, reduction="mean over tokens", doc=doc)


def _last(name: str, unit: str, doc: str) -> StepMetric:
    return StepMetric(name=name, unit=unit, reduction="last", doc=doc)


def _sum(name: str, unit: str, doc: str) -> StepMetric:
    return StepMetric(name=name, unit=unit, reduction="sum", doc=doc, kind="count")


def _id(name: str, unit: str, doc: str) -> StepMetric:
    return StepMetric(name=name, unit=unit, reduction="last", doc=doc, kind="count")


STEP_METRICS: tuple[StepMetric, ...] = (
    StepMetric(name="t", unit="ISO 8601, UTC", reduction="last", doc="End of the step.", kind="time"),
    _id("step", "steps", "Counted from 1; afterwards the policy version."),
    _mean("loss", "nats per token", "The objective."),
    _last("grad_norm", "1", "Norm of the gradient of the loss, before clipping."),
    _last("lr", "1", "Learning rate."),
    _sum("num_rollouts", "rollouts", "Trained in the step."),
    _sum("num_tokens", "tokens", "Response tokens trained in the step."),
    _sum("num_micro_batches", "micro-batches", "Forward and backward passes."),
    StepMetric(name="staleness_max", unit="versions", reduction="max", doc="Age of the oldest rollout.", kind="count"),
    StepMetric(name="staleness_mean", unit="versions", reduction="mean over rollouts", doc="Age when trained."),
    StepMetric(name="skipped", unit="true or false", reduction="last", doc="The weights did not change.", kind="flag"),
    _last("interval_s", "seconds", "Since the end of the step before; empty on a process's first."),
)
"""What every line of ``metrics.jsonl`` holds."""

OBJECTIVE_METRICS: tuple[StepMetric, ...] = (
    _mean("teacher_mass", "probability", "Teacher's probability of its own top-k."),
    _mean("student_mass", "probability", "Student's probability of the teacher's top-k."),
    _mean("topk_overlap", "share", "Of the teacher's top-k, how much is among the student's as many largest."),
    _mean("teacher_entropy", "nats", "With the tail as one category: a lower bound."),
    _mean("student_entropy", "nats", "With the tail as one category: a lower bound."),
    _mean("student_logprob", "nats", "Of the sampled token under the student that is trained."),
)
"""What our objectives measure on the side (``ops``). A trainer of yours may return others (``StepReport.metrics``)."""

RANK_METRICS: tuple[StepMetric, ...] = (
    _last("passes_s", "seconds", "Forward and backward passes of the step, on the first rank."),
    _last("reduce_s", "seconds", "Summing the gradient over the ranks, its norm included."),
    _last("update_s", "seconds", "The optimizer, with weights sent to those that share them."),
    _last("tokens_per_s", "tokens per second", "Of prompts and answers, over the ranks' time in the step; no padding."),
    _last("tflops", "TFLOP/s", "Arithmetic that the model needs, per device, over the same time."),
    _last("mfu", "share", "The same, of what the device can do in bfloat16; where that is known."),
    _last("memory_gib", "GiB", "The most that a rank has held of its device's memory, or of the machine's on CPU."),
    _last("padding_share", "share", "Of the positions that went through the model."),
    _last("router_peak", "1", "Tokens of the busiest expert over the mean, in the layer where it is largest."),
)
"""What a learner on Megatron measures besides: on ranks, for each step."""

EVALUATION_METRICS: tuple[StepMetric, ...] = (
    _id("version", "version", "Of the student that was measured: optimizer steps done."),
    _sum("num_prompts", "prompts", "Held out."),
    _sum("num_tokens", "tokens", "Of the student's answers."),
    _mean("kl", "nats per token", "Teacher to student, on the student's own answers."),
    _mean("reference_kl", "nats per token", "Teacher to student, on the reference answers."),
    _mean("reference_nll", "nats per token", "Of the reference answers under the student."),
    StepMetric(name="score", unit="1", reduction="mean over prompts", doc="What the recipe's scorer says."),
)
"""The numbers in a line of ``evaluations.jsonl``."""


def undeclared(name: str) -> StepMetric:
    """What is known of a metric that a trainer of the user's returned under a name of its own."""
    return StepMetric(name=name, unit="", reduction="mean over tokens", doc="")
