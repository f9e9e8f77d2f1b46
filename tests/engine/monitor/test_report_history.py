"""What counts of a run that had several processes, and what became of its faults."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.evaluations import Evaluation
from engine.monitor.report.faults import Fault
from engine.monitor.report.history import History
from engine.monitor.report.troubles import faults
from engine.monitor.view import RunView
from tests.engine.monitor.story import Log, demo


def opened(log: Log, pid: int = 1, **fields: Any) -> None:
    log.line("log.opened", pid=pid, host="box", python="3.11.7", start_ns=0, healed=False, **fields)


def history_of(*logs: Log) -> History:
    history = History()
    for source, log in enumerate(logs):
        for line in log.lines:
            history.apply(source, line)
    history.end()
    return history


def found(history: History) -> dict[str, Fault]:
    return {fault.name: fault for fault in faults(history, num_unreadable=0) if fault.count}


def killed_and_resumed() -> Log:
    """Steps 1 to 6, killed; goes on from 4, trains 5, and is killed again."""
    log = Log()
    opened(log)
    log.at(1).started(steps=8)
    log.line("rollout.dispatched", rollout_id=0)
    for step in range(1, 7):
        log.at(10.0 * step).step(step, loss=1.0 / step, ages=(0, 0))
    log.at(100).line("checkpoint.corrupt", level="warning", step=6, path="c/step_000006", problem="torn")
    log.line("ledger.rewound", step=4, num_waiting=7, next_ticket=15)
    opened(log, pid=2)
    log.line("run.resumed", step=4)
    log.at(101).started(steps=8, step=4)
    log.line("rollout.dispatched", rollout_id=0)
    log.at(110).step(5, loss=0.05, ages=(1, 1))
    log.at(120).line("loop.lag", lag_s=0.0)
    return log


def test_of_a_step_that_was_trained_twice_the_later_one_counts_and_what_was_given_up_is_gone() -> None:
    history = history_of(killed_and_resumed())

    assert list(history.steps) == [1, 2, 3, 4, 5]
    assert history.steps[5].loss == 0.05
    assert history.step == 5
    assert history.ages() == {0: 8, 1: 2}
    assert history.num_given_up == 2


def test_each_process_has_its_own_time_and_the_time_between_them_is_nobodys() -> None:
    first, second = history_of(killed_and_resumed()).processes

    assert (first.wall_s, second.wall_s) == (60.0, 20.0)
    assert (first.training_s, second.training_s) == (59.0, 19.0)
    assert (first.start_step, second.start_step) == (0, 4)
    assert second.opened["pid"] == 2


def test_what_became_of_a_killed_process_is_told() -> None:
    told = found(history_of(killed_and_resumed()))

    assert (told["process killed"].count, told["process killed"].became) == (1, "the run went on after step 4")
    assert told["step given up"].count == 2
    assert told["rollout put back when a process ended"].count == 7
    assert told["checkpoint passed over"].became == "the run went on from step 4"
    assert told["checkpoint passed over"].reasons == ("torn",)
    assert set(told) == {
        "process killed",
        "step given up",
        "rollout put back when a process ended",
        "checkpoint passed over",
    }


def test_the_first_step_of_a_process_has_no_throughput() -> None:
    steps = history_of(killed_and_resumed()).steps

    assert steps[1].tokens_per_s is None
    assert steps[2].tokens_per_s == pytest.approx(9.0)
    assert steps[5].tokens_per_s is None


def test_a_measurement_of_weights_that_were_given_up_does_not_count() -> None:
    history = history_of(killed_and_resumed())
    written = [Evaluation(version=v, num_prompts=2, num_tokens=9, kl=kl) for v, kl in ((0, 1.0), (6, 0.2), (0, 0.9))]

    assert [(e.version, e.kl) for e in history.evaluations(written)] == [(0, 0.9)]


def test_measurements_that_only_the_log_knows_count_with_their_answers() -> None:
    history = history_of(
        log_of(
            lambda log: log.started(),
            lambda log: log.span("eval.run", dur_s=1, version=0, num_prompts=3, num_tokens=9, kl=0.5, score=None),
            lambda log: log.line("eval.answer", version=0, prompt="p", answer="a", kl=0.1),
        )
    )

    (only,) = history.evaluations([])
    assert (only.kl, [answer.answer for answer in only.answers]) == (0.5, ["a"])


def log_of(*parts: Any) -> Log:
    log = Log()
    for part in parts:
        part(log)
    return log


def test_a_run_on_two_nodes_has_a_process_for_each_log() -> None:
    one, other = killed_and_resumed(), Log()
    opened(other, pid=9)
    other.line("loop.lag", lag_s=0.5)
    history = history_of(one, other)

    assert [process.source for process in history.processes] == [0, 0, 1]
    assert history.step == 5, "the node without a learner has no say in it"
    assert history.view.steps == 8
    assert found(history)["process killed"].count == 1, "another node's end is not followed by anybody"


def test_rollouts_beyond_the_bound_of_their_time_are_counted() -> None:
    log = Log()
    log.started(max_staleness=1)
    log.step(1, ages=(0, 1))
    log.step(2, ages=(1, 2, 3))
    log.started(max_staleness=3, step=2)
    log.step(3, ages=(3, 3))

    assert history_of(log).num_too_old() == 2


def test_every_kind_of_fault_is_told_with_what_became_of_it() -> None:
    log = Log()
    opened(log)
    log.started()
    log.line("actor.failed", level="warning", actor="sampler", error="Boom(1)", is_final=False, delay_s=1.0)
    log.line("actor.restarted", actor="sampler", restarts=1)
    for ticket in (3, 4):
        log.line("rollout.requeued", level="warning", rollout_id=ticket, reason="the sampler was started again")
    log.line("rollout.failed", level="warning", rollout_id=5, reason="teacher refused")
    for attempt in (1, 2):
        log.line("teacher.retried", request_id="r1", attempt=attempt, replica="t1", delay_s=0.1, reason="reset")
    log.line("teacher.hedged", request_id="r1", replica="t1", second="t2", after_s=1.0)
    log.line("teacher.replica_changed", replica="t1", state="closed", reason="")
    log.line("teacher.replica_changed", level="warning", replica="t1", state="open", reason="refused")
    log.line("teacher.replica_changed", replica="t1", state="half_open", reason="probe")
    log.line("teacher.replica_changed", replica="t1", state="closed", reason="answers")
    log.line("teacher.parked", level="warning", num_parked=2)
    log.line("teacher.resumed", parked_s=4.25)
    log.step(1, rollout_ids=[1, 3], skipped=True)
    log.line("learner.step_skipped", level="warning", step=1, rollouts="bad.jsonl")
    log.line("weights.push_failed", level="warning", version=1, error="gone")
    log.line("eval.generator_lost", level="warning", version=1, error="gone")
    log.line("checkpoint.leftover_removed", path=".step.tmp-1")
    log.line("checkpoint.restored", path="step_000001")
    log.line("checkpoint.not_removed", level="warning", path="step_000001", problem="denied")
    log.line("log.lines_lost", level="error", num_lost=11)
    log.line("sink.failed", level="warning", sink="wandb", error="offline")
    log.line("rollout.requeued", level="warning")  # without its fields
    told = found(history_of(log))

    assert {name: (fault.count, fault.became) for name, fault in told.items()} == {
        "actor started again after a failure": (1, "sampler 1×; it ran on"),
        "rollout sampled again": (2, "1 trained afterwards, 1 not trained yet"),
        "rollout given up": (1, "another prompt occurrence took its place"),
        "request to a teacher repeated": (2, "1 different requests; all were scored"),
        "slow teacher: a second one asked": (1, "the first answer was taken"),
        "teacher replica taken out": (1, "t1 is up"),
        "no teacher left": (1, "rollouts waited for 4.2 s in all, none was skipped"),
        "step skipped": (1, "the gradient was not finite; the weights stayed"),
        "generator lost with weights on their way": (1, "it got them when it was back"),
        "generator lost while measuring": (1, "the held-out prompts were asked again"),
        "checkpoint left half done": (1, "removed; the one before it was whole"),
        "checkpoint half replaced": (1, "the old one was put back"),
        "old checkpoint not deleted": (1, "it is still there"),
        "line of the log lost or damaged": (
            12,
            "11 could not be written, 1 have other fields than this program writes; left out here",
        ),
        "other warning": (1, "see events.jsonl"),
    }
    assert told["actor started again after a failure"].reasons == ("sampler: Boom(1)",)
    assert told["request to a teacher repeated"].reasons == ("reset (2 times)",)


def test_the_counts_agree_with_those_of_the_live_view() -> None:
    view, log = RunView(), Log()
    log.lines = list(demo(steps=30))
    for line in log.lines:
        view.apply(line)
    history = history_of(log)
    told = found(history)

    assert told["teacher replica taken out"].count == view.faults.teacher_outages == 1
    assert history.processes[0].parked_s == view.faults.teacher_parked_s == 4.2
    assert history.ages() == view.ages
    assert history.step == view.step
    assert "other warning" not in told


def test_a_run_without_faults_says_so_of_every_kind() -> None:
    log = Log()
    log.lines = list(demo(steps=3, outage_at=None))

    assert found(history_of(log)) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
DEMO = list(demo(steps=12))


@given(st.lists(st.tuples(st.integers(0, len(DEMO) - 1), st.text("abcdefghij_", max_size=8), JSON), max_size=20))
def test_no_field_of_another_shape_ends_the_reading(changes: list[tuple[int, str, Any]]) -> None:
    history = History()
    for index, _, value in changes:
        line = DEMO[index]
        for key in [key for key in line if key not in ("t", "event", "level")][:6]:
            history.apply(0, {**line, key: value})
    history.end()

    faults(history, num_unreadable=0)
