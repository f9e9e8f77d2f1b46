"""From lines of the log to numbers that Prometheus and notebooks read."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from engine.metric_catalogue import METRICS
from engine.metrics import NodeMetrics
from engine.tracing import Tracing, log, span
from tests.support.log_lines import event, step_event


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    name: str = "rollouts"
    items: int = 0
    max_items: int = 16
    sent_total: int = 0
    send_wait_s: float = 0.0
    receive_wait_s: float = 0.0


def values(metrics: NodeMetrics) -> dict[str, float]:
    """``{'name{label="value"}': number}`` of everything that is rendered."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_two_nodes_in_one_process_do_not_share_numbers() -> None:
    one, other = NodeMetrics(), NodeMetrics()
    one.apply(event("rollout.dispatched"))

    assert values(one)["engine_rollouts_total{state=dispatched}"] == 1
    assert "engine_rollouts_total{state=dispatched}" not in values(other)


def test_an_optimizer_step_is_counted_with_its_tokens_ages_and_interval() -> None:
    metrics = NodeMetrics()
    metrics.apply(step_event(1))
    metrics.apply({**step_event(2, ages=[0, 2], loss=0.25), "t": "2026-01-02T03:04:15.000000+00:00"})

    got = values(metrics)
    assert got["engine_steps_total{outcome=ok}"] == 2
    assert got["engine_trained_tokens_total"] == 60
    assert got["engine_rollouts_total{state=trained}"] == 4
    assert got["engine_loss_nats"] == 0.25
    assert got["engine_policy_version"] == 2
    assert got["engine_staleness_versions_bucket{le=0.0}"] == 2
    assert got["engine_staleness_versions_bucket{le=1.0}"] == 3
    assert got["engine_staleness_versions_count"] == 4
    assert (got["engine_step_interval_seconds_count"], got["engine_step_interval_seconds_sum"]) == (1, 10.0)


def test_a_rollout_is_counted_at_each_station_and_only_when_it_got_through() -> None:
    metrics = NodeMetrics()
    for rollout_id in range(3):
        metrics.apply(event("rollout.dispatched", rollout_id=rollout_id))
    for outcome in ("ok", "ok", "CancelledError"):
        metrics.apply(event("sampler.rollout", num_tokens=10, outcome=outcome, dur_us=1_000_000))
    for outcome in ("ok", "TeacherRefused"):
        metrics.apply(event("teacher.score", outcome=outcome, dur_us=50_000))
    metrics.apply(event("rollout.failed", reason="teacher refused"))

    got = values(metrics)
    states = {state: got[f"engine_rollouts_total{{state={state}}}"] for state in ("dispatched", "sampled", "scored")}
    assert states == {"dispatched": 3, "sampled": 2, "scored": 1}
    assert got["engine_sampled_tokens_total"] == 20
    assert got["engine_teacher_requests_total{outcome=TeacherRefused}"] == 1
    assert got["engine_rollouts_total{state=failed}"] == 1


def test_an_outage_of_the_teacher_is_visible_while_it_lasts_and_afterwards() -> None:
    metrics = NodeMetrics()
    metrics.apply(event("teacher.replica_changed", replica="a", state="open", reason="refused"))
    metrics.apply(event("teacher.parked", num_parked=3))
    during = values(metrics)
    metrics.apply(event("teacher.replica_changed", replica="a", state="closed", reason="probe"))
    metrics.apply(event("teacher.resumed", parked_s=20.5))
    after = values(metrics)

    assert (during["engine_teacher_parked"], during["engine_teacher_replica_up{replica=a}"]) == (1, 0)
    assert (after["engine_teacher_parked"], after["engine_teacher_replica_up{replica=a}"]) == (0, 1)
    assert after["engine_teacher_parked_seconds_total"] == 20.5


def test_an_actor_is_in_one_state() -> None:
    metrics = NodeMetrics()
    metrics.apply(event("actor.state_changed", actor="sampler", before="new", after="starting"))
    metrics.apply(event("actor.state_changed", actor="sampler", before="starting", after="running"))

    states = {key: value for key, value in values(metrics).items() if key.startswith("engine_actor_state")}
    assert [key for key, value in states.items() if value] == ["engine_actor_state{actor=sampler,state=running}"]


def test_channel_totals_are_followed_also_when_they_start_again() -> None:
    metrics = NodeMetrics()
    for waited_s in (2.0, 5.0, 1.0):
        metrics.observe_channels([Reading(items=3, sent_total=4, send_wait_s=waited_s)])

    got = values(metrics)
    assert got["engine_channel_wait_seconds_total{channel=rollouts,side=send}"] == 6.0
    assert (got["engine_channel_items{channel=rollouts}"], got["engine_channel_max_items{channel=rollouts}"]) == (3, 16)
    assert got["engine_channel_sent_items_total{channel=rollouts}"] == 4


def test_fed_by_the_log_itself(tmp_path: Path) -> None:
    metrics = NodeMetrics()
    with Tracing() as tracing:
        tracing.open(tmp_path, run="r", node="0")
        tracing.subscribe("metrics", metrics.apply)
        with span("weights.push", version=1):
            pass
        log.info("weights.live", version=1)
        log.info("nobody.knows_this", anything=[1])

    got = values(metrics)
    assert got["engine_live_version"] == 1
    assert got["engine_weights_push_seconds_count"] == 1
    assert got["engine_log_lines_total{level=info}"] == 3


def test_a_measurement_on_held_out_prompts_is_there_as_far_as_it_went() -> None:
    metrics = NodeMetrics()
    metrics.apply(event("eval.run", outcome="ok", version=0, kl=1.5, reference_kl=2.0, reference_nll=None, score=0.25))
    metrics.apply(event("eval.run", outcome="CancelledError", version=3))

    got = values(metrics)
    assert (got["engine_held_out_kl_nats"], got["engine_reference_kl_nats"]) == (1.5, 2.0)
    assert got["engine_held_out_score"] == 0.25
    assert math.isnan(got["engine_reference_nll_nats"]), "0 would be perfection"


def test_every_series_is_a_declared_one() -> None:
    families = {family.name for family in text_string_to_metric_families(NodeMetrics().render().decode())}

    assert families == {metric.name.removesuffix("_total") for metric in METRICS}
