"""Two clocks on one line of time: restarts, machines that were started anew, and wall clocks that people set."""

from __future__ import annotations

from engine.monitor.trace.clocks import ProcessClock

HOUR_US = 3_600_000_000
T = 1_800_000_000_000_000
"""Some moment of 2027."""


def opened(at_us: int = T, start_ns: int = 5_000_000_000) -> ProcessClock:
    clock = ProcessClock()
    clock.opened(at_us, start_ns)
    return clock


def test_a_span_is_placed_by_the_monotonic_clock_from_where_the_log_was_opened() -> None:
    # The line was written 70 us after the work had ended.
    assert opened().span(T + 2_000_070, start_ns=6_000_000_000, dur_us=1_000_000) == (T + 1_000_000, T + 2_000_000)


def test_work_that_followed_other_work_does_not_overlap_it_however_late_its_lines_were() -> None:
    clock = opened()

    _, end = clock.span(T + 500_900, start_ns=5_000_000_000, dur_us=500_000)
    start, _ = clock.span(T + 600_001, start_ns=5_500_000_000, dur_us=100_000)

    assert start == end


def test_a_resumed_process_brings_a_clock_of_its_own() -> None:
    clock = opened()
    clock.span(T + 1_000_000, start_ns=5_000_000_000, dur_us=1_000_000)
    clock.opened(T + HOUR_US, start_ns=17_000)  # the machine was started anew

    assert clock.span(T + HOUR_US + 1_000_100, 17_000, 1_000_000) == (T + HOUR_US, T + HOUR_US + 1_000_000)


def test_without_an_opening_line_the_first_span_says_what_the_clock_was() -> None:
    assert ProcessClock().span(T, start_ns=9_000_000_000, dur_us=300) == (T - 300, T)


def test_another_process_is_noticed_when_its_opening_line_is_lost() -> None:
    clock = opened(start_ns=500_000_000_000)
    clock.span(T + 1_000_000, start_ns=500_000_000_000, dur_us=1_000_000)

    assert clock.span(T + 60_000_000, start_ns=1_000, dur_us=2_000) == (T + 59_998_000, T + 60_000_000)
    assert clock.fact(T + 61_000_000) == T + 61_000_000


def test_a_wall_clock_that_is_set_moves_neither_spans_nor_facts() -> None:
    clock = opened()
    clock.span(T + 1_000_000, start_ns=5_000_000_000, dur_us=1_000_000)

    span = clock.span(T - HOUR_US + 3_000_000, start_ns=7_000_000_000, dur_us=1_000_000)

    assert span == (T + 2_000_000, T + 3_000_000)
    assert clock.fact(T - HOUR_US + 3_500_000) == T + 3_500_000


def test_a_wall_clock_that_is_set_right_again_is_believed_again() -> None:
    clock = opened()
    clock.span(T + HOUR_US + 1_000_000, start_ns=5_000_000_000, dur_us=1_000_000)
    clock.span(T + 2_000_000, start_ns=6_000_000_000, dur_us=1_000_000)

    assert clock.fact(T + 2_500_000) == T + 2_500_000


def test_one_line_that_is_very_late_moves_no_later_span() -> None:
    clock = opened()
    clock.span(T + 3_000_000, start_ns=5_000_000_000, dur_us=3_000_000)
    clock.span(T + 3_000_100, start_ns=5_000_000_000, dur_us=1_000_000)  # its thread stood still for two seconds

    assert clock.span(T + 4_000_000, 8_000_000_000, 1_000_000) == (T + 3_000_000, T + 4_000_000)
    assert clock.fact(T + 4_500_000) == T + 4_500_000
