"""What the lines of a made-up run become: slices, arrows, waits, instants and counters, all of them well-formed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.monitor.log_files import LogFile, find_logs
from engine.monitor.trace import tracks
from engine.trace import write_trace
from tests.support.traces import Trace

BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ZERO = datetime(2026, 1, 1, tzinfo=UTC)
"""Midnight, a day before the first line."""
BEGIN_US = int((BEGIN - ZERO).total_seconds()) * 1_000_000

GRAPH = [
    {"name": "prompt_feeder", "consumes": None, "produces": "prompts"},
    {"name": "sampler", "consumes": "prompts", "produces": "rollouts"},
    {"name": "filter", "consumes": "rollouts", "produces": "rollouts_filter"},
    {"name": "teacher_proxy", "consumes": "rollouts_filter", "produces": "scored"},
    {"name": "learner", "consumes": "scored", "produces": "versions"},
    {"name": "weight_syncer", "consumes": "versions", "produces": None},
]


class Log:
    """Lines of one process; times are seconds since the beginning of the story."""

    def __init__(self, *, node: str = "0", uptime_s: float = 1000.0, opened_s: float = 0.0) -> None:
        self.lines: list[bytes] = []
        self._node = node
        self._boot_s = opened_s - uptime_s
        self.fact(opened_s, "log.opened", pid=17, host="vm", start_ns=self._ns(opened_s))

    def fact(self, at_s: float, event: str, *, level: Any = "info", **fields: Any) -> None:
        t = (BEGIN + timedelta(seconds=at_s)).isoformat(timespec="microseconds")
        line = {"t": t, "event": event, "level": level, "run": "story", "node": self._node, **fields}
        self.lines.append(json.dumps(line).encode() + b"\n")

    def span(self, start_s: float, end_s: float, event: str, *, outcome: str = "ok", **fields: Any) -> None:
        dur_us = round((end_s - start_s) * 1e6)
        head: dict[str, Any] = {"kind": "span", **fields, "outcome": outcome}
        self.fact(end_s + 50e-6, event, **head, start_ns=self._ns(start_s), dur_us=dur_us)

    def rollout(self, rollout_id: int, sampled: tuple[float, float], scored: tuple[float, float]) -> None:
        self.span(*sampled, "sampler.rollout", actor="sampler", rollout_id=rollout_id, num_tokens=30)
        self.span(*scored, "teacher.score", actor="teacher_proxy", rollout_id=rollout_id)

    def trained(self, start_s: float, end_s: float, rollout_ids: list[int], **fields: Any) -> None:
        self.span(start_s, end_s, "learner.micro_batch", actor="learner", rollout_ids=rollout_ids, **fields)

    def channel(self, at_s: float, name: str, items: int, *, sent_s: float = 0.0, received_s: float = 0.0) -> None:
        self.fact(
            at_s, "channel.stats", channel=name, items=items, max_items=4, send_wait_s=sent_s, receive_wait_s=received_s
        )

    def state(self, at_s: float, actor: str, after: str) -> None:
        self.fact(at_s, "actor.state_changed", actor=actor, before="?", after=after)

    def _ns(self, at_s: float) -> int:
        return round((at_s - self._boot_s) * 1e9)


def trace_of(folder: Path, logs: Mapping[str, Iterable[bytes]]) -> Trace:
    for name, lines in logs.items():
        (folder / name).write_bytes(b"".join(lines))
    out = BytesIO()
    write_trace([LogFile(path) for path in find_logs(folder)], out)
    trace = Trace(out.getvalue())
    assert trace.zero <= ZERO
    return trace


def seconds(event: Mapping[str, Any]) -> tuple[float, float]:
    """Start and end of a slice since the beginning of the story."""
    start = (event["ts"] - BEGIN_US) / 1e6
    return round(start, 3), round(start + event.get("dur", 0) / 1e6, 3)


def test_a_span_is_a_slice_on_the_track_of_its_actor_with_its_fields(tmp_path: Path) -> None:
    log = Log()
    log.span(1.0, 3.5, "learner.step", actor="learner", step=4, loss=0.25, ages=[0, 1], rollout_ids=[1, 2])

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    (step,) = trace.on("learner")
    assert (step["name"], step["cat"], seconds(step)) == ("learner.step", "learner", (1.0, 3.5))
    assert step["args"] == {"step": 4, "loss": 0.25}


def test_rollouts_at_a_time_lie_side_by_side_and_an_answer_follows_the_one_whose_slot_it_took(tmp_path: Path) -> None:
    log = Log()
    for rollout_id, (start, end) in enumerate([(0.0, 2.0), (0.0, 3.0), (2.0, 4.0), (3.0, 5.0)]):
        log.span(start, end, "sampler.rollout", actor="sampler", rollout_id=rollout_id)

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    assert trace.lanes("sampler") == ["sampler 1", "sampler 2"]
    # The busiest lane stands on top.
    assert [e["args"]["rollout_id"] for e in trace.on("sampler 1")] == [1, 3]
    assert [e["args"]["rollout_id"] for e in trace.on("sampler 2")] == [0, 2]


def test_each_rollout_has_an_arrow_from_sampling_over_scoring_to_training(tmp_path: Path) -> None:
    log = Log()
    log.rollout(1, (0.0, 1.0), (1.5, 2.0))
    log.rollout(2, (0.0, 3.0), (3.0, 3.5))
    log.trained(4.0, 6.0, [1, 2])

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    found = sorted([[slice_["name"] for slice_ in slices] for slices in trace.arrows.values()])
    assert found == [["sampler.rollout", "teacher.score", "learner.micro_batch"]] * 2
    assert {slices[0]["args"]["rollout_id"] for slices in trace.arrows.values()} == {1, 2}
    assert all(slices[0]["args"]["rollout_id"] == slices[1]["args"]["rollout_id"] for slices in trace.arrows.values())


def test_arrows_of_a_deterministic_run_begin_at_the_wave(tmp_path: Path) -> None:
    log = Log()
    log.span(0.0, 2.0, "sampler.wave", actor="sampler", num_rollouts=2)
    for rollout_id, reason in ((1, "stop"), (2, "length"), (3, "reference")):
        log.fact(2.1, "sampler.rollout", actor="sampler", rollout_id=rollout_id, finish_reason=reason)
        log.span(2.2 + rollout_id, 2.9 + rollout_id, "teacher.score", actor="teacher_proxy", rollout_id=rollout_id)
    log.trained(7.0, 8.0, [1, 2, 3])

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    found = sorted([[slice_["name"] for slice_ in slices] for slices in trace.arrows.values()])
    assert found == [
        ["sampler.wave", "teacher.score", "learner.micro_batch"],
        ["sampler.wave", "teacher.score", "learner.micro_batch"],
        ["teacher.score", "learner.micro_batch"],
    ]


def test_work_that_failed_says_so_and_sends_no_arrow(tmp_path: Path) -> None:
    log = Log()
    log.span(0.0, 1.0, "sampler.rollout", actor="sampler", rollout_id=1)
    log.span(1.0, 2.0, "teacher.score", actor="teacher_proxy", rollout_id=1, outcome="TeacherRefused", error="no")

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    (score,) = trace.on("teacher_proxy")
    assert score["name"] == "teacher.score (TeacherRefused)"
    assert score["args"] == {"rollout_id": 1, "error": "no"}
    assert trace.arrows == {}


def test_versions_are_instants_on_a_track_of_their_own(tmp_path: Path) -> None:
    log = Log()
    for version in (1, 2):
        log.fact(version * 5.0, "weights.live", actor="weight_syncer", version=version)

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    found = [(e["name"], seconds(e)[0]) for e in trace.on("weight versions")]
    assert found == [("version 1", 5.0), ("version 2", 10.0)]


def test_facts_are_instants_with_their_actor_and_frequent_ones_are_left_to_counters(tmp_path: Path) -> None:
    log = Log()
    log.fact(1.0, "filter.dropped", actor="filter", rollout_id=9, reason="too short")
    log.fact(2.0, "rollout.dispatched", rollout_id=1)
    log.channel(2.0, "prompts", 1)
    log.fact(3.0, "run.failed", level="error", failed_actor="learner", cause="boom")

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    assert [e["name"] for e in trace.on("events")] == ["log.opened", "filter.dropped", "run.failed"]
    dropped = trace.named("filter.dropped", "i")[0]
    assert dropped["args"] == {"level": "info", "actor": "filter", "rollout_id": 9, "reason": "too short"}


def test_counters_show_channels_staleness_loss_and_generator_and_say_nothing_twice(tmp_path: Path) -> None:
    log = Log()
    for second, items in enumerate([0, 2, 2, 4]):
        log.channel(second, "rollouts", items)
        log.fact(second, "generator.stats", running=3, waiting=0, num_slots=4, tokens_total=100 * second, busy_s=0)
    log.span(4, 5, "learner.step", actor="learner", step=1, loss=0.5, staleness_mean=0.75, staleness_max=1)
    log.span(6, 7, "learner.step", actor="learner", step=2, loss=None, staleness_mean=1.0, staleness_max=1)
    log.span(7, 9, "eval.run", actor="learner", version=2, kl=1.25)

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    def values(name: str) -> list[dict[str, float]]:
        return [event["args"] for event in trace.named(name, "C")]

    assert values("channel rollouts") == [{"items": 0}, {"items": 2}, {"items": 4}]
    assert values("loss") == [{"nats per token": 0.5}]
    assert values("staleness (versions)") == [{"mean": 0.75, "max": 1}, {"mean": 1.0, "max": 1}]
    assert values("generator (sequences)") == [{"running": 3, "waiting": 0}]
    assert values("generator (tokens per second)") == [{"decoded": 100.0}]
    assert values("held-out KL") == [{"nats per token": 1.25}]


def test_waits_are_slices_beside_the_actor(tmp_path: Path) -> None:
    log = Log()
    log.fact(0.0, "run.graph", actors=GRAPH)
    log.state(1.0, "learner", "running")
    log.state(1.0, "filter", "running")
    log.channel(1.0, "rollouts", 0)
    log.channel(2.0, "rollouts", 0, received_s=1.0)
    log.channel(2.0, "rollouts_filter", 4)
    log.trained(2.0, 4.0, [1])
    log.channel(4.0, "rollouts_filter", 4, sent_s=2.0)
    log.span(5.0, 6.0, "learner.step", actor="learner", step=1, loss=0.5)
    log.state(7.0, "filter", "stopped")
    log.state(8.0, "learner", "stopped")

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    assert [(e["name"], *seconds(e)) for e in trace.on("learner waits")] == [
        ("no input", 1.0, 2.0),
        ("version not live", 4.0, 5.0),
        ("no input", 6.0, 8.0),
    ]
    assert [(e["name"], *seconds(e)) for e in trace.on("filter waits")] == [
        ("no input", 1.0, 2.0),
        ("no room", 2.0, 4.0),
    ]


def test_of_a_killed_run_nothing_is_claimed_after_the_last_span(tmp_path: Path) -> None:
    log = Log()
    log.state(0.0, "learner", "running")
    log.trained(2.0, 4.0, [1])
    log.fact(60.0, "loop.lag", lag_s=0.0)
    again = Log(uptime_s=7.0, opened_s=100.0)
    again.state(101.0, "learner", "running")
    again.trained(103.0, 104.0, [1])
    again.state(105.0, "learner", "stopped")

    trace = trace_of(tmp_path, {"events.jsonl": [*log.lines, log.lines[-1][:20], b"\n", *again.lines]})

    assert [seconds(e) for e in trace.on("learner waits")] == [(0.0, 2.0), (101.0, 103.0), (104.0, 105.0)]
    assert [seconds(e) for e in trace.on("learner")] == [(2.0, 4.0), (103.0, 104.0)]


def test_a_resumed_run_is_one_track_and_its_repeated_rollouts_have_arrows_of_their_own(tmp_path: Path) -> None:
    first, second = Log(), Log(uptime_s=3.0, opened_s=50.0)
    for log, at in ((first, 0.0), (second, 50.0)):
        log.rollout(1, (at + 1, at + 2), (at + 2, at + 3))
    second.trained(54.0, 55.0, [1])

    trace = trace_of(tmp_path, {"events.jsonl": [*first.lines, *second.lines]})

    assert list(trace.processes.values()) == ["node 0"]
    assert [seconds(e) for e in trace.on("sampler")] == [(1.0, 2.0), (51.0, 52.0)]
    found = sorted([seconds(slice_)[0] for slice_ in slices] for slices in trace.arrows.values())
    assert found == [[1.0, 2.0], [51.0, 52.0, 54.0]]


def test_the_teacher_being_away_is_a_slice(tmp_path: Path) -> None:
    log = Log()
    log.fact(2.0, "teacher.parked", actor="teacher_proxy", num_parked=3)
    log.fact(9.0, "teacher.resumed", actor="teacher_proxy", parked_s=7.0)

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    assert [seconds(e) for e in trace.on("teacher away")] == [(2.0, 9.0)]


def test_every_node_is_a_process_and_arrows_cross_them(tmp_path: Path) -> None:
    head, far = Log(), Log(node="1", uptime_s=99_999.0)
    far.span(1.0, 2.0, "sampler.rollout", actor="sampler", rollout_id=1)
    head.span(2.0, 3.0, "teacher.score", actor="teacher_proxy", rollout_id=1)
    head.trained(3.0, 4.0, [1])
    rank = Log(node="0")
    rank.span(3.0, 4.0, "learner.micro_batch", actor="learner", rollout_ids=[])

    logs = {"events.jsonl": head.lines, "events-1.jsonl": far.lines, "events-rank-1.jsonl": rank.lines}
    trace = trace_of(tmp_path, logs)

    assert list(trace.processes.values()) == ["node 0", "node 1", "node 0 (events-rank-1.jsonl)"]
    (slices,) = trace.arrows.values()
    assert [trace.processes[slice_["pid"]] for slice_ in slices] == ["node 1", "node 0", "node 0"]


def test_tracks_stand_in_the_order_of_the_flow(tmp_path: Path) -> None:
    log = Log()
    log.fact(0.0, "run.graph", actors=GRAPH)
    log.fact(0.0, "weights.live", version=1)
    for actor in ("weight_syncer", "learner", "filter", "sampler", "stranger"):
        log.span(1.0, 2.0, "some.work", actor=actor)
    log.span(0.5, 2.0, "run.start")

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    order = {e["tid"]: e["args"]["sort_index"] for e in trace.named("thread_sort_index", "M")}
    names = [trace.threads[tid] for tid in sorted(order, key=lambda tid: order[tid])]
    actors = ["sampler", "filter", "learner", "weight_syncer", "stranger"]
    assert names == ["weight versions", "node", *actors, "events"]
    assert sorted(order) == sorted(order, key=lambda tid: order[tid]), "older viewers go by the number of the thread"


def test_more_tracks_lanes_and_processes_than_there_are_numbers_in_order_are_drawn_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracks, "_LANES", 3)
    monkeypatch.setattr(tracks, "FIRST_SPARE_TID", 1_000)
    logs = {}
    for node in range(4):
        log = Log(node=str(node))
        for number in range(120):
            log.span(1.0, 2.0 + number % 4, "some.work", actor=f"actor {number % 60}")
        log.channel(1.0, "rollouts", 1)
        logs[f"events-{node}.jsonl"] = log.lines

    trace = trace_of(tmp_path, logs)

    assert len(trace.slices) == 4 * 120


def test_an_empty_log_is_an_empty_trace(tmp_path: Path) -> None:
    assert trace_of(tmp_path, {"events.jsonl": []}).events == []


def test_names_that_nobody_expects_are_shown_and_break_nothing(tmp_path: Path) -> None:
    log = Log()
    for actor in ("", "events", "node", "a\nb\x1b[31m", "пример 😀", "x" * 5000, 17, ["list"], "sampler 1"):
        log.span(1.0, 2.0, "some.work", actor=actor, big=10**40, text="y" * 9000, deep={"a": [1, None]})
        log.span(1.5, 2.5, 'quote".\\', actor=actor)
    log.fact(3.0, "", actor="events", level=None)

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    assert len(trace.slices) == 18
    args = trace.named("some.work")[0]["args"]
    assert (args["big"], len(args["text"]), args["deep"]) == (str(10**40), 500, '{"a":[1,null]}')


@pytest.mark.parametrize(
    "fields",
    [
        {"event": "channel.stats", "channel": None, "items": "many", "send_wait_s": 1e308, "receive_wait_s": -1},
        {"event": "channel.stats", "items": 10**400, "max_items": True},
        {"event": "generator.stats", "tokens_total": -5, "running": None},
        {"event": "run.graph", "actors": [1, 2]},
        {"event": "run.graph", "actors": [{"name": None, "consumes": 4}]},
        {"event": "actor.state_changed", "actor": None},
        {"event": "actor.state_changed", "actor": "a", "after": ["running"]},
        {"event": "weights.live"},
        {"event": "teacher.resumed", "parked_s": 1e300},
        {"event": "sampler.rollout", "rollout_id": "seven"},
        {"event": "learner.micro_batch", "kind": "span", "start_ns": 5, "dur_us": 5, "rollout_ids": ["a", None, 1.5]},
        {"event": "learner.step", "kind": "span", "start_ns": 5, "dur_us": 5, "loss": "nan", "outcome": None},
        {"event": "some.work", "kind": "span", "start_ns": -5, "dur_us": -5},
        {"event": "some.work", "kind": "span", "start_ns": 10**40, "dur_us": 10**40},
        {"event": "some.work", "kind": "span", "start_ns": 5, "dur_us": 2**62},
        {"event": "some.work", "kind": ["span"], "start_ns": None},
        {"event": "log.opened", "start_ns": "now"},
        {"event": "log.opened", "start_ns": 10**40},
    ],
)
def test_a_line_of_a_known_name_with_other_fields_breaks_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    log = Log()
    log.span(1.0, 2.0, "some.work", actor="a")
    event = fields.pop("event")
    for at_s in (2.5, 3.5):
        log.fact(at_s, event, **fields)
    log.span(4.0, 5.0, "other.work", actor="a")

    trace = trace_of(tmp_path, {"events.jsonl": log.lines})

    assert seconds(trace.named("other.work")[0]) == (4.0, 5.0)


NAMES = ("sampler.rollout", "teacher.score", "learner.micro_batch", "learner.step", "sampler.wave", "my.work")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_whatever_a_run_logs_the_trace_is_well_formed(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_files: int
) -> None:
    draw = random.Random(seed)
    logs = {}
    for number in range(num_files):
        log = Log(node=str(draw.randint(0, 1)), uptime_s=draw.uniform(0, 1e6))
        for _ in range(draw.randint(0, 60)):
            start = draw.uniform(-5, 50)
            end = start + draw.choice((0.0, 1e-6, 0.3, 7.0))
            who = draw.choice(("sampler", "learner", "filter", None))
            name, ids = draw.choice(NAMES), [draw.randint(0, 4) for _ in range(draw.randint(0, 3))]
            kind = draw.randint(0, 5)
            if kind < 3:
                log.span(start, end, name, actor=who, rollout_id=draw.randint(0, 4), rollout_ids=ids)
            elif kind == 3:
                log.fact(start, name, actor=who, rollout_id=draw.randint(0, 4))
            elif kind == 4:
                log.channel(start, "rollouts", 1, sent_s=draw.uniform(0, 9), received_s=draw.uniform(0, 9))
            else:
                log.state(start, who or "learner", draw.choice(("running", "stopped", "draining")))
        if draw.random() < 0.3:
            log.lines += Log(uptime_s=draw.uniform(0, 1e6), opened_s=draw.uniform(0, 99)).lines
        logs[f"events-{number}.jsonl"] = log.lines

    trace_of(tmp_path_factory.mktemp("run"), logs)
