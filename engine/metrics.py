"""What a run measures, each metric with kind, unit and reduction declared once; made from the lines of the log, so that
actors know nothing of metrics. Decides names and meanings; who asks for them and where they are shown lies elsewhere.

``NodeMetrics`` keeps the present values for Prometheus, ``StepLog`` writes one line per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.tracing import Event

_SHORT_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LONG_S = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One metric, without its value."""

    name: str
    """Of the Prometheus series, unit last (counters: before ``_total``)."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    reduction: Literal["sum", "last", "distribution"]
    """How values of several nodes, or of a longer time, become one."""
    doc: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, unit: str, doc: str, *labels: str) -> Metric:
    return Metric(name=name, kind="counter", unit=unit, reduction="sum", doc=doc, labels=labels)


def _gauge(name: str, unit: str, doc: str, *labels: str) -> Metric:
    return Metric(name=name, kind="gauge", unit=unit, reduction="last", doc=doc, labels=labels)


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
LOSS = _gauge("engine_loss_nats", "nats per token", "The objective, mean over the last step's response tokens.")
GRAD_NORM = _gauge("engine_grad_norm", "1", "Norm of the last step's gradient, before clipping.")
LEARNING_RATE = _gauge("engine_learning_rate", "1", "Of the last step.")
STALENESS = _histogram(
    "engine_staleness_versions", "versions", "Age of each rollout when its step trained on it.", _VERSIONS
)
POLICY_VERSION = _gauge("engine_policy_version", "version", "Optimizer steps done: the learner's version.")
LIVE_VERSION = _gauge("engine_live_version", "version", "The version that every generator holds.")
WEIGHTS_PUSH = _histogram("engine_weights_push_seconds", "seconds", "Bringing a version to the generators.", _LONG_S)
ROLLOUT = _histogram("engine_rollout_seconds", "seconds", "Sampling one answer, waiting for a slot included.", _LONG_S)
CHECKPOINT_STEP = _gauge("engine_checkpoint_step", "step", "Of the newest checkpoint.")
CHECKPOINT = _histogram("engine_checkpoint_seconds", "seconds", "Writing one checkpoint.", _LONG_S)
HELD_OUT_KL = _gauge("engine_held_out_kl_nats", "nats per token", "Teacher to student, student's held-out answers.")
REFERENCE_NLL = _gauge("engine_reference_nll_nats", "nats per token", "Of the reference answers under the student.")
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
"""All of them, in the order of docs/events.md."""

_ACTOR_STATES = ("new", "starting", "running", "draining", "stopped", "failed")


class ChannelReading(Protocol):
    """What is read of a channel's statistics (``engine.transport.channel.ChannelStatistics``)."""

    @property
    def name(self) -> str: ...
    @property
    def items(self) -> int: ...
    @property
    def max_items(self) -> int: ...
    @property
    def sent_total(self) -> int: ...
    @property
    def send_wait_s(self) -> float: ...
    @property
    def receive_wait_s(self) -> float: ...


class NodeMetrics:
    """The present values of one node, in a registry of its own.

    Feed it with ``tracing.subscribe("metrics", metrics.apply)`` and ``observe_channels``; ask with ``render``. May be
    called from any thread. A line of an unknown name counts as a line and is otherwise left alone.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._series: dict[str, Any] = {metric.name: _make(metric, self._registry) for metric in METRICS}
        self._readings: dict[tuple[str, ...], float] = {}
        self._last_step_at: datetime | None = None
        self._handlers: dict[str, Callable[[Event], None]] = {
            "rollout.dispatched": lambda _: self._count(ROLLOUTS, 1, "dispatched"),
            "rollout.requeued": lambda _: self._count(ROLLOUTS, 1, "requeued"),
            "rollout.failed": lambda _: self._count(ROLLOUTS, 1, "failed"),
            "sampler.rollout": self._on_sampled,
            "teacher.score": self._on_scored,
            "teacher.retried": lambda _: self._count(TEACHER_RETRIES, 1),
            "teacher.hedged": lambda _: self._count(TEACHER_HEDGES, 1),
            "teacher.parked": lambda _: self._set(TEACHER_PARKED, 1),
            "teacher.resumed": self._on_resumed,
            "teacher.replica_changed": lambda e: self._set(REPLICA_UP, e.get("state") == "closed", e["replica"]),
            "learner.micro_batch": self._on_micro_batch,
            "learner.step": self._on_step,
            "weights.push": lambda e: self._time(WEIGHTS_PUSH, e),
            "weights.live": lambda e: self._set(LIVE_VERSION, e["version"]),
            "eval.run": self._on_eval,
            "checkpoint.save": lambda e: self._time(CHECKPOINT, e),
            "checkpoint.saved": lambda e: self._set(CHECKPOINT_STEP, e["step"]),
            "run.resumed": self._on_run_resumed,
            "actor.state_changed": self._on_actor,
            "actor.restarted": lambda e: self._count(ACTOR_RESTARTS, 1, e["actor"]),
            "loop.lag": lambda e: self._observe(LOOP_LAG, e["lag_s"]),
            "generator.stats": self._on_generator,
        }

    def apply(self, event: Event) -> None:
        """Take in one line of the log."""
        self._count(LOG_LINES, 1, event["level"])
        handler = self._handlers.get(event["event"])
        if handler is not None:
            handler(event)

    def observe_channels(self, statistics: Iterable[ChannelReading]) -> None:
        """Take in the state of the channels; their totals only grow."""
        for channel in statistics:
            self._set(CHANNEL_ITEMS, channel.items, channel.name)
            self._set(CHANNEL_MAX_ITEMS, channel.max_items, channel.name)
            self._follow(CHANNEL_SENT, channel.sent_total, channel.name)
            self._follow(CHANNEL_WAIT, channel.send_wait_s, channel.name, "send")
            self._follow(CHANNEL_WAIT, channel.receive_wait_s, channel.name, "receive")

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(_WithoutCreated(self._registry))

    def _on_sampled(self, event: Event) -> None:
        if event.get("outcome", "ok") != "ok":
            return
        self._count(ROLLOUTS, 1, "sampled")
        self._count(SAMPLED_TOKENS, event["num_tokens"])
        if "dur_us" in event:
            self._time(ROLLOUT, event)

    def _on_scored(self, event: Event) -> None:
        outcome = event["outcome"]
        self._count(TEACHER_REQUESTS, 1, outcome)
        if outcome == "ok":
            self._count(ROLLOUTS, 1, "scored")
            self._time(TEACHER_SECONDS, event)

    def _on_resumed(self, event: Event) -> None:
        self._set(TEACHER_PARKED, 0)
        self._count(TEACHER_PARKED_SECONDS, event["parked_s"])

    def _on_micro_batch(self, event: Event) -> None:
        self._time(MICRO_BATCH, event)
        self._count(COMPUTED_TOKENS, event.get("num_computed_tokens", 0))

    def _on_step(self, event: Event) -> None:
        if event["outcome"] != "ok":
            self._count(STEPS, 1, "failed")
            return
        self._count(STEPS, 1, "skipped" if event.get("skipped") else "ok")
        self._count(ROLLOUTS, event["num_rollouts"], "trained")
        self._count(TRAINED_TOKENS, event["num_tokens"])
        self._set(LOSS, event["loss"])
        self._set(GRAD_NORM, event["grad_norm"])
        self._set(LEARNING_RATE, event["lr"])
        self._set(POLICY_VERSION, event["step"])
        self._time(OPTIMIZER, event)
        for age in event.get("ages", ()):
            self._observe(STALENESS, age)
        at = datetime.fromisoformat(event["t"])
        if self._last_step_at is not None:
            self._observe(STEP_INTERVAL, (at - self._last_step_at).total_seconds())
        self._last_step_at = at

    def _on_run_resumed(self, event: Event) -> None:
        self._set(POLICY_VERSION, event["step"])
        self._set(CHECKPOINT_STEP, event["step"])

    def _on_eval(self, event: Event) -> None:
        for metric, key in ((HELD_OUT_KL, "kl"), (REFERENCE_NLL, "reference_nll")):
            if event.get(key) is not None:
                self._set(metric, event[key])

    def _on_actor(self, event: Event) -> None:
        for state in _ACTOR_STATES:
            self._set(ACTOR_STATE, state == event["after"], event["actor"], state)

    def _on_generator(self, event: Event) -> None:
        self._set(GENERATOR_RUNNING, event["running"])
        self._set(GENERATOR_WAITING, event["waiting"])
        self._set(GENERATOR_SLOTS, event["num_slots"])
        self._follow(DECODED_TOKENS, event["tokens_total"])
        self._follow(GENERATOR_BUSY, event["busy_s"])

    def _count(self, metric: Metric, amount: float, *labels: str) -> None:
        self._of(metric, labels).inc(amount)

    def _set(self, metric: Metric, value: float, *labels: str) -> None:
        self._of(metric, labels).set(value)

    def _observe(self, metric: Metric, value: float) -> None:
        self._of(metric, ()).observe(value)

    def _time(self, metric: Metric, event: Event) -> None:
        if event.get("outcome") == "ok":
            self._observe(metric, event["dur_us"] / 1e6)

    def _follow(self, metric: Metric, total: float, *labels: str) -> None:
        """Count up to a total that somebody else keeps; one that is smaller than before has started again at 0."""
        key = (metric.name, *labels)
        before = self._readings.get(key, 0.0)
        self._count(metric, total - before if total >= before else total, *labels)
        self._readings[key] = total

    def _of(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        series = self._series[metric.name]
        return series.labels(*labels) if labels else series


class _WithoutCreated(CollectorRegistry):
    """The same series without the time of birth that the library gives each: a third of the text, of no use."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry

    def collect(self) -> Iterator[prometheus_client.Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _make(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.doc, metric.labels, registry=registry, buckets=metric.buckets)
    made = Counter if metric.kind == "counter" else Gauge
    return made(metric.name, metric.doc, metric.labels, registry=registry)


class StepMetric(msgspec.Struct, frozen=True, kw_only=True):
    """One column of ``metrics.jsonl``."""

    name: str
    unit: str
    reduction: Literal["mean over tokens", "mean over rollouts", "max", "sum", "last"]
    """Over what happened within the step."""
    doc: str


STEP_METRICS: tuple[StepMetric, ...] = (
    StepMetric(name="t", unit="ISO 8601, UTC", reduction="last", doc="End of the step."),
    StepMetric(name="step", unit="steps", reduction="last", doc="Counted from 1; afterwards the policy version."),
    StepMetric(name="loss", unit="nats per token", reduction="mean over tokens", doc="The objective."),
    StepMetric(name="grad_norm", unit="1", reduction="last", doc="Of the gradient of ``loss``, before clipping."),
    StepMetric(name="lr", unit="1", reduction="last", doc="Learning rate."),
    StepMetric(name="num_rollouts", unit="rollouts", reduction="sum", doc="Trained in the step."),
    StepMetric(name="num_tokens", unit="tokens", reduction="sum", doc="Response tokens trained in the step."),
    StepMetric(name="num_micro_batches", unit="micro-batches", reduction="sum", doc="Forward and backward passes."),
    StepMetric(name="staleness_max", unit="versions", reduction="max", doc="Age of the oldest rollout."),
    StepMetric(name="staleness_mean", unit="versions", reduction="mean over rollouts", doc="Age when trained."),
    StepMetric(name="skipped", unit="true or false", reduction="last", doc="The weights did not change."),
    StepMetric(name="interval_s", unit="seconds", reduction="last", doc="Since the end of the step before."),
)
"""What every line of ``metrics.jsonl`` holds. What the objective measures on the side follows under its own names, as
means over the step's response tokens."""

_NOT_A_METRIC = frozenset(
    (
        "event",
        "level",
        "kind",
        "run",
        "node",
        "actor",
        "version",
        "outcome",
        "start_ns",
        "dur_us",
        "ages",
        "rollout_ids",
    )
)


class StepLog:
    """Appends one line per optimizer step to a file: ``tracing.subscribe("metrics.jsonl", StepLog(path).apply)``.

    A resumed run writes the steps after its checkpoint again; of two lines with one step the later one holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_at: datetime | None = None

    def apply(self, event: Event) -> None:
        """Take in one line of the log.

        Raises:
            OSError: the file cannot be written.
        """
        if event["event"] != "learner.step" or event.get("outcome") != "ok":
            return
        at = datetime.fromisoformat(event["t"])
        interval_s = None if self._last_at is None else (at - self._last_at).total_seconds()
        self._last_at = at
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(step_line(event, interval_s=interval_s)) + b"\n")


def step_line(event: Event, *, interval_s: float | None) -> Mapping[str, Any]:
    """The line of ``metrics.jsonl`` that a ``learner.step`` event makes: declared metrics first, in their order."""
    values = {**event, "interval_s": interval_s}
    declared = {metric.name: values.pop(metric.name, None) for metric in STEP_METRICS}
    return {**declared, **{key: value for key, value in values.items() if key not in _NOT_A_METRIC}}
