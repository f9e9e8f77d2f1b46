"""The present values of one node's metrics, made from the lines of the log, so that actors know nothing of metrics.
Decides which line moves which series; which series there are is ``engine.metric_catalogue``'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.metric_catalogue import (
    ACTOR_RESTARTS,
    ACTOR_STATE,
    CHANNEL_ITEMS,
    CHANNEL_MAX_ITEMS,
    CHANNEL_SENT,
    CHANNEL_WAIT,
    CHECKPOINT,
    CHECKPOINT_STEP,
    COMPUTED_TOKENS,
    DECODED_TOKENS,
    GENERATOR_BUSY,
    GENERATOR_RUNNING,
    GENERATOR_SLOTS,
    GENERATOR_WAITING,
    GRAD_NORM,
    HELD_OUT_KL,
    HELD_OUT_SCORE,
    LEARNING_RATE,
    LIVE_VERSION,
    LOG_LINES,
    LOOP_LAG,
    LOSS,
    METRICS,
    MICRO_BATCH,
    OPTIMIZER,
    POLICY_VERSION,
    REFERENCE_KL,
    REFERENCE_NLL,
    REPLICA_UP,
    ROLLOUT,
    ROLLOUTS,
    SAMPLED_TOKENS,
    STALENESS,
    STEP_INTERVAL,
    STEPS,
    TEACHER_HEDGES,
    TEACHER_PARKED,
    TEACHER_PARKED_SECONDS,
    TEACHER_REQUESTS,
    TEACHER_RETRIES,
    TEACHER_SECONDS,
    TRAINED_TOKENS,
    WEIGHTS_PUSH,
    Metric,
)
from engine.tracing import Event

_ACTOR_STATES = ("new", "starting", "running", "draining", "stopped", "failed")
_OF_EVALUATION = (
    (HELD_OUT_KL, "kl"),
    (REFERENCE_KL, "reference_kl"),
    (REFERENCE_NLL, "reference_nll"),
    (HELD_OUT_SCORE, "score"),
)


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
        for metric, key in _OF_EVALUATION:
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
    if metric.kind == "counter":
        return Counter(metric.name, metric.doc, metric.labels, registry=registry)
    gauge = Gauge(metric.name, metric.doc, metric.labels, registry=registry)
    if not metric.labels:
        gauge.set(metric.begins)
    return gauge
