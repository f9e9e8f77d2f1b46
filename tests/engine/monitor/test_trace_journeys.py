"""Which slices an arrow joins: of one rollout, of one attempt, whatever the order in which they were logged."""

from __future__ import annotations

import itertools

import pytest

from engine.monitor.trace import journeys as journeys_module
from engine.monitor.trace.chrome import arrows
from engine.monitor.trace.journeys import SAMPLED, SCORED, TRAINED, Journeys, Slice


def slice_at(start: int, end: int | None = None, tid: int = 1) -> Slice:
    return Slice(pid=1, tid=tid, start_us=start, end_us=start + 10 if end is None else end)


@pytest.mark.parametrize("order", list(itertools.permutations([SAMPLED, SCORED, TRAINED])))
def test_a_journey_is_complete_when_all_stages_are_there_in_whatever_order(order: tuple[int, ...]) -> None:
    journeys = Journeys()
    places = [slice_at(0), slice_at(20), slice_at(40)]

    found = [journeys.reach(7, stage, places[stage]) for stage in order]

    assert found == [None, None, tuple(places)]
    assert list(journeys.rest()) == []


def test_rollouts_are_kept_apart() -> None:
    journeys = Journeys()
    for rollout_id in (1, 2):
        journeys.reach(rollout_id, SAMPLED, slice_at(rollout_id))
        journeys.reach(rollout_id, SCORED, slice_at(20 + rollout_id))

    assert journeys.reach(1, TRAINED, slice_at(40)) == (slice_at(1), slice_at(21), slice_at(40))


def test_a_rollout_that_is_sampled_again_begins_another_journey() -> None:
    journeys = Journeys()
    journeys.reach(7, SAMPLED, slice_at(0))
    journeys.reach(7, SCORED, slice_at(20))

    assert journeys.reach(7, SAMPLED, slice_at(100)) == (slice_at(0), slice_at(20))  # killed in front of the learner
    journeys.reach(7, SCORED, slice_at(120))
    assert journeys.reach(7, TRAINED, slice_at(140)) == (slice_at(100), slice_at(120), slice_at(140))


def test_what_was_sampled_and_lost_leaves_no_arrow() -> None:
    journeys = Journeys()
    journeys.reach(7, SAMPLED, slice_at(0))

    assert journeys.reach(7, SAMPLED, slice_at(100)) is None
    assert list(journeys.rest()) == []


def test_a_reference_answer_has_an_arrow_from_the_teacher_on() -> None:
    journeys = Journeys()
    journeys.reach(7, SCORED, slice_at(0))
    journeys.reach(7, TRAINED, slice_at(20))

    assert list(journeys.rest()) == [(slice_at(0), slice_at(20))]


def test_memory_is_bounded_where_nothing_is_ever_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journeys_module, "_MAX_UNDER_WAY", 3)
    journeys = Journeys()
    for rollout_id in range(5):
        journeys.reach(rollout_id, SAMPLED, slice_at(rollout_id))
        ended = journeys.reach(rollout_id, SCORED, slice_at(20 + rollout_id))
        assert ended is None

    assert len(list(journeys.rest())) == 3


def test_an_arrow_never_goes_back_and_stays_within_its_slices() -> None:
    journey = (slice_at(0, 100), slice_at(5, 50, tid=2), slice_at(5, 5, tid=3))

    events = list(arrows("rollout", journey, arrow_id=1))

    assert [event["ph"] for event in events] == ["s", "t", "f"]
    assert [event["ts"] for event in events] == [5, 5, 5]


def test_an_arrow_leaves_at_the_end_and_arrives_at_the_beginning() -> None:
    first, last = arrows("rollout", (slice_at(0, 100), slice_at(200, 300)), arrow_id=9)

    assert (first["ts"], last["ts"]) == (99, 201)
    assert (first["id"], last["id"], last["bp"]) == (9, 9, "e")
