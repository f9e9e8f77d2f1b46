"""What is known of a run from its log alone."""

from __future__ import annotations

import pytest

from engine.monitor.view import RunView
from tests.engine.monitor.story import Log, demo


def view_of(log: Log) -> RunView:
    view = RunView()
    for line in log.lines:
        view.apply(line)
    return view


def test_a_rollout_is_in_one_state_on_its_way_through() -> None:
    log = Log()
    log.started()
    for ticket in range(4):
        log.line("rollout.dispatched", rollout_id=ticket, epoch=0, prompt_index=ticket, sample_index=0)
    for ticket in range(3):
        log.span("sampler.rollout", dur_s=1, rollout_id=ticket, num_tokens=10)
    log.span("sampler.rollout", dur_s=1, rollout_id=3, outcome="CancelledError")
    for ticket in range(2):
        log.span("teacher.score", dur_s=1, rollout_id=ticket, num_tokens=10)
    log.span("learner.micro_batch", dur_s=1, step=1, rollout_ids=[0], num_tokens=10)
    before = view_of(log).rollouts_by_state()
    log.step(1, ages=(0,), rollout_ids=[0])
    view = view_of(log)

    assert before == {"sampling": 1, "at teacher": 1, "scored": 1, "in step": 1}
    assert view.rollouts_by_state() == {"sampling": 1, "at teacher": 1, "scored": 1, "in step": 0}
    assert view.totals == {"dispatched": 4, "sampled": 3, "scored": 2, "trained": 1}


def test_a_requeued_rollout_is_sampled_again_and_a_failed_one_is_gone() -> None:
    log = Log()
    for ticket in range(2):
        log.line("rollout.dispatched", rollout_id=ticket)
        log.span("sampler.rollout", dur_s=1, rollout_id=ticket, num_tokens=10)
    log.line("rollout.requeued", level="warning", rollout_id=0, reason="sampler restarted")
    log.line("rollout.failed", level="warning", rollout_id=1, reason="teacher refused")
    view = view_of(log)

    assert view.in_flight == {0: "sampling"}
    assert (view.faults.rollouts_requeued, view.faults.rollouts_failed) == (1, 1)


def test_an_actor_with_overlapping_spans_worked_for_their_union() -> None:
    log = Log()
    log.at(0).line("rollout.dispatched", rollout_id=0)
    log.at(4).span("teacher.score", dur_s=4, actor="teacher_proxy", rollout_id=0)
    log.at(6).span("teacher.score", dur_s=4, actor="teacher_proxy", rollout_id=1)
    log.at(10).line("loop.lag", lag_s=0.0)
    view = view_of(log)

    overall = view.overall_shares(view.actors["teacher_proxy"])
    assert (overall.worked, overall.waited_input, overall.waited_room) == pytest.approx((0.6, 0.4, 0.0))
    recent = view.recent_shares(view.actors["teacher_proxy"])
    assert recent.worked == pytest.approx(1.0), "the window ends with its last span: what it does now is not known yet"


def test_waiting_for_room_comes_from_the_channel_and_never_exceeds_the_time_that_was_left() -> None:
    log = Log()
    log.at(0).line("rollout.dispatched", rollout_id=0)
    for second in range(11):
        # Eight calls wait side by side: eight seconds of waiting in each second.
        log.at(second).channel("scored", 16, 16, send_wait_s=8.0 * second, receive_wait_s=0.0)
    log.at(10).span("teacher.score", dur_s=7, actor="teacher_proxy", rollout_id=0)
    view = view_of(log)

    shares = view.overall_shares(view.actors["teacher_proxy"])
    assert (shares.worked, shares.waited_input, shares.waited_room) == pytest.approx((0.7, 0.0, 0.3))


def test_the_sampler_works_when_its_generator_does() -> None:
    log = Log()
    log.at(0).line("rollout.dispatched", rollout_id=0)
    for second in range(11):
        log.at(second).generator(busy_s=0.25 * second, tokens_total=50 * second)
    log.span("sampler.rollout", dur_s=10, actor="sampler", rollout_id=0, num_tokens=10)
    view = view_of(log)

    assert view.overall_shares(view.actors["sampler"]).worked == pytest.approx(0.25)
    assert view.tokens_per_s()[1] == pytest.approx(50.0)


def test_an_actor_of_somebody_elses_appears_with_its_channels() -> None:
    log = Log()
    log.line(
        "run.graph",
        actors=[
            {"name": "sampler", "consumes": None, "produces": "rollouts"},
            {"name": "length_filter", "consumes": "rollouts", "produces": "kept"},
            {"name": "teacher_proxy", "consumes": "kept", "produces": None},
        ],
    )
    log.line("rollout.dispatched", rollout_id=0)
    for second in range(11):
        log.at(second).channel("rollouts", 0, 16, send_wait_s=0.0, receive_wait_s=0.9 * second)
        log.channel("kept", 0, 16, send_wait_s=0.0, receive_wait_s=0.0)
    view = view_of(log)

    assert list(view.actors) == ["sampler", "length_filter", "teacher_proxy"]
    assert view.waits_for(view.actors["length_filter"]) == ("sampler", "teacher_proxy")
    assert view.overall_shares(view.actors["length_filter"]).worked == pytest.approx(0.1), "it logs no spans"


def test_remaining_time_follows_the_pace_of_the_last_steps() -> None:
    log = Log()
    log.started(steps=30)
    log.line("rollout.dispatched", rollout_id=0)
    for step in range(1, 21):
        log.at(100.0 if step == 1 else 100.0 + 8.0 * step).step(step)
    view = view_of(log)

    assert view.remaining_s(view.now) == pytest.approx(80.0)
    assert view.remaining_s(view.now + 3.0) == pytest.approx(77.0)


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ({"event": "rollout.dispatched", "rollout_id": 0}, "training"),
        ({"event": "eval.started", "version": 0}, "measuring"),
        ({"event": "teacher.parked", "num_parked": 2}, "waiting for the teacher"),
        ({"event": "run.draining", "signal": "SIGINT"}, "draining"),
        ({"event": "run.finished", "step": 3, "stopped_by": None, "wall_s": 1.0}, "finished"),
        ({"event": "run.finished", "step": 3, "stopped_by": "SIGINT", "wall_s": 1.0}, "stopped"),
        ({"event": "run.failed", "failed_actor": "learner", "cause": "x", "step": 3}, "failed"),
    ],
)
def test_the_phase_follows_the_last_thing_that_changed_it(line: dict[str, object], phase: str) -> None:
    log = Log()
    log.started()
    assert view_of(log).phase == "starting"
    log.line(**line)  # type: ignore[arg-type]

    assert view_of(log).phase == phase


def test_a_killed_and_resumed_run_reads_as_one() -> None:
    log = Log()
    log.started(steps=10)
    log.line("rollout.dispatched", rollout_id=5)
    log.line("teacher.parked", level="warning", num_parked=1)
    log.at(100).started(steps=10, step=4)
    view = view_of(log)

    assert (view.step, view.phase, view.in_flight) == (4, "training", {})
    assert view.elapsed_s == 100.0


def test_a_loss_that_is_no_number_is_a_gap() -> None:
    log = Log()
    log.step(1, loss=0.5)
    log.step(2, loss=float("nan"))
    log.step(3, loss=None)

    assert list(view_of(log).losses) == [0.5, None, None]


def test_warnings_without_words_of_their_own_are_told_and_counted_and_other_lines_are_not() -> None:
    log = Log()
    log.line("something.new", anything=1)
    log.line("channel.leaked", level="warning", channel="scored")
    view = view_of(log)

    assert [notice.text for notice in view.notices] == ["channel.leaked channel=scored"]
    assert view.faults.warnings == 1


def test_the_demo_reads_as_it_was_written() -> None:
    view = RunView()
    for line in demo(steps=30, of=30):
        view.apply(line)

    assert (view.step, view.live_version, view.totals["trained"], view.phase) == (30, 30, 240, "finished")
    assert view.ages == {0: 90, 1: 150}
    assert [held.kl for held in view.evaluations] == [1.331, 0.588]
    assert view.faults.teacher_outages == 1
    assert view.faults.teacher_parked_s == 4.2
    assert view.checkpoint is not None
    assert view.checkpoint[0] == 30
    assert (view.evaluation_s, view.checkpoint_s) == (30.0, 4.5)


def test_the_curve_of_the_loss_goes_on_where_a_resumed_run_did() -> None:
    log = Log()
    log.started()
    for step in (1, 2, 3):
        log.step(step, loss=float(step))
    log.started(step=1)
    log.step(2, loss=7.0)

    assert view_of(log).loss_curve.points() == [(1, 1.0), (2, 7.0)]


def test_rollouts_in_flight_are_known_by_the_version_that_began_them_until_they_are_trained() -> None:
    log = Log()
    for ticket in range(4):
        log.line("rollout.dispatched", rollout_id=ticket)
        log.span("sampler.rollout", dur_s=1, rollout_id=ticket, num_tokens=10, version_first=ticket)
    log.step(1, ages=(0,), rollout_ids=[0])
    log.line("rollout.failed", level="warning", rollout_id=1, reason="refused")
    log.line("rollout.requeued", level="warning", rollout_id=2, reason="restarted")
    view = view_of(log)

    assert view.begun_under == {3: 3}
    log.started(step=1)
    assert view_of(log).begun_under == {}


def test_the_samplers_version_is_the_one_that_it_was_last_heard_with() -> None:
    log = Log()
    log.line("weights.live", version=4)
    assert view_of(log).sampler_version == 4
    log.generator(busy_s=1.0, tokens_total=10)
    assert view_of(log).sampler_version == 0, "it was started again"
