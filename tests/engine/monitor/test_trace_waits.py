"""Waits: exact between spans, as good as the readings of channels elsewhere, never one over another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.monitor.trace.pieces import Pieces
from engine.monitor.trace.waits import NO_INPUT, NO_ROOM, NOT_LIVE, ChannelWaits, Wait, place, waits

S = 1_000_000
INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))))


def pieces(*intervals: tuple[int, int, str]) -> Pieces:
    made = Pieces()
    for start, end, name in intervals:
        made.add(start, end, name)
    return made


def channel(*readings: tuple[float, float, float], is_full: bool = False, is_empty: bool = False) -> ChannelWaits:
    """Readings: when, seconds that senders have waited, seconds that receivers have waited."""
    made = ChannelWaits("rollouts")
    for at_s, sent_s, received_s in readings:
        made.read(int(at_s * S), is_full=is_full, is_empty=is_empty, send_wait_s=sent_s, receive_wait_s=received_s)
    return made


def of(
    *,
    busy: Pieces | None = None,
    source: ChannelWaits | None = None,
    output: ChannelWaits | None = None,
    periods: Sequence[tuple[int, int]] = ((0, 10 * S),),
) -> list[Wait]:
    return sorted(waits(periods, busy=busy or Pieces(), source=source, output=output), key=lambda w: w.start_us)


@given(INTERVALS, st.integers(0, 60), st.integers(0, 60))
def test_pieces_and_gaps_are_the_union_and_what_is_missing(
    intervals: list[tuple[int, int]], start: int, end: int
) -> None:
    made = Pieces()
    for interval in intervals:
        made.add(*interval)
    covered = {t for s, e in intervals for t in range(s, e)}

    inside = {t for s, e in made.within(start, end) for t in range(s, e)}
    outside = {t for s, e, _ in made.gaps(start, end) for t in range(s, e)}

    assert inside == covered & set(range(start, end))
    assert outside == set(range(start, end)) - covered


def test_a_gap_bears_the_name_of_what_begins_behind_it() -> None:
    made = pieces((0, 20, "a"), (50, 60, "c"), (40, 55, "b"))

    assert list(made.gaps(0, 100)) == [(20, 40, "b"), (60, 100, "")]
    assert list(made.gaps(0, 40)) == [(20, 40, "b")]


def test_between_its_spans_an_actor_has_no_input() -> None:
    busy = pieces((1 * S, 2 * S, "learner.micro_batch"), (4 * S, 9 * S, "learner.micro_batch"))

    assert of(busy=busy) == [
        Wait(NO_INPUT, 0, 1 * S),
        Wait(NO_INPUT, 2 * S, 4 * S),
        Wait(NO_INPUT, 9 * S, 10 * S),
    ]


def test_in_front_of_the_optimizer_the_learner_waits_for_the_version_before() -> None:
    busy = pieces((0, 2 * S, "learner.micro_batch"), (4 * S, 10 * S, "learner.step"))

    assert of(busy=busy) == [Wait(NOT_LIVE, 2 * S, 4 * S)]


def test_the_loop_between_two_spans_is_no_wait() -> None:
    busy = pieces((0, 2 * S, "learner.micro_batch"), (2 * S + 900, 10 * S, "learner.step"))

    assert of(busy=busy) == []


def test_an_actor_waits_only_while_it_runs() -> None:
    assert of(busy=pieces((3 * S, 4 * S, "a")), periods=[(2 * S, 5 * S)]) == [
        Wait(NO_INPUT, 2 * S, 3 * S),
        Wait(NO_INPUT, 4 * S, 5 * S),
    ]


def test_a_full_output_is_no_room_and_not_a_lack_of_input() -> None:
    busy = pieces((0, 2 * S, "a"), (8 * S, 10 * S, "a"))
    output = channel((0, 0, 0), (5, 0, 0), (6, 1, 0), (7, 2, 0), (8, 2.5, 0))

    assert of(busy=busy, output=output) == [
        Wait(NO_INPUT, 2 * S, 5 * S),
        Wait(NO_ROOM, 5 * S, 7 * S + S // 2),
        Wait(NO_INPUT, 7 * S + S // 2, 8 * S),
    ]


def test_an_actor_without_spans_waits_when_its_channel_says_so() -> None:
    source = channel((0, 0, 0), (1, 0, 1), (2, 0, 1.25), (3, 0, 1.25), is_empty=True)

    assert of(source=source) == [Wait(NO_INPUT, 0, 1 * S), Wait(NO_INPUT, 2 * S - S // 4, 2 * S)]


def test_who_consumes_nothing_waits_for_a_slot_whenever_there_is_room() -> None:
    output = channel((1, 0, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0))

    assert of(output=output) == [Wait(NO_ROOM, 1 * S, 2 * S), Wait(NO_INPUT, 2 * S, 4 * S)]


def test_the_sums_of_a_resumed_process_begin_anew() -> None:
    made = channel((0, 0, 5), (1, 0, 6))
    made.restart()
    made.read(9 * S, is_full=False, is_empty=False, send_wait_s=0.0, receive_wait_s=0.0)
    made.read(10 * S, is_full=False, is_empty=False, send_wait_s=0.0, receive_wait_s=1.0)

    assert list(made.no_input.within(0, 20 * S)) == [(0, 1 * S), (9 * S, 10 * S)]
    assert list(made.known.within(0, 20 * S)) == [(0, 1 * S), (9 * S, 10 * S)]


@pytest.mark.parametrize(
    ("waited_s", "at_end", "expected"),
    [
        (0.0, True, None),
        (0.0005, True, None),
        (0.25, True, (750_000, 1_000_000)),
        (0.25, False, (0, 250_000)),
        (0.985, False, (0, 1_000_000)),
        (7.0, False, (0, 1_000_000)),
        (-3.0, False, None),
    ],
)
def test_a_sum_is_placed_within_its_interval(waited_s: float, at_end: bool, expected: tuple[int, int] | None) -> None:
    assert place(0, S, waited_s=waited_s, at_end=at_end) == expected


@given(INTERVALS, st.lists(st.floats(0, 3), max_size=8))
def test_the_waits_of_an_actor_never_overlap(intervals: list[tuple[int, int]], grown_s: list[float]) -> None:
    busy = pieces(*((start * S, end * S, "a") for start, end in intervals))
    sums = [sum(grown_s[:n]) for n in range(len(grown_s) + 1)]
    output = channel(*((2.0 * n, total, 0.0) for n, total in enumerate(sums)))

    found = of(busy=busy, output=output, periods=[(0, 20 * S), (25 * S, 50 * S)])

    assert all(before.end_us <= after.start_us for before, after in itertools.pairwise(found))
    assert all(wait.start_us < wait.end_us for wait in found)
