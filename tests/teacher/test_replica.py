from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TeacherRefused
from teacher.replica import REGROW_S, Breaker, Happening, Replica, State, backoff_s, choose, difference
from tests.support.replicas import INFO

HAPPENINGS: tuple[Happening, ...] = ("answered", "failed", "misconfigured", "probe_ok", "probe_failed", "mismatch")
TABLE: dict[State, tuple[State, ...]] = {
    # after:      answered     failed       misconfigured probe_ok     probe_failed mismatch
    "suspect": ("suspect", "suspect", "open", "closed", "suspect", "rejected"),
    "closed": ("closed", "suspect", "open", "closed", "suspect", "rejected"),
    "open": ("open", "open", "open", "half_open", "open", "rejected"),
    "half_open": ("closed", "open", "open", "half_open", "open", "rejected"),
    "rejected": ("rejected", "rejected", "rejected", "half_open", "rejected", "rejected"),
}


def make_replica(name: str = "a", *, max_in_flight: int = 4, max_failures: int = 3, closed: bool = True) -> Replica:
    replica = Replica(name, max_in_flight=max_in_flight, max_failures=max_failures)
    if closed:
        replica.note("probe_ok", "ready")
    return replica


@pytest.mark.parametrize(
    ("state", "happening", "expected"),
    [
        (state, happening, after)
        for state, row in TABLE.items()
        for happening, after in zip(HAPPENINGS, row, strict=True)
    ],
)
def test_every_state_and_happening_has_its_next_state(state: State, happening: Happening, expected: State) -> None:
    assert Breaker(state).after(happening, max_failures=3).state == expected


@pytest.mark.parametrize("state", ["suspect", "closed"])
@pytest.mark.parametrize("happening", ["failed", "probe_failed"])
def test_the_last_failure_of_a_row_opens(state: State, happening: Happening) -> None:
    assert Breaker(state, failures=1).after(happening, max_failures=3) == Breaker("suspect", 2)
    assert Breaker(state, failures=2).after(happening, max_failures=3) == Breaker("open")


@pytest.mark.parametrize("state", ["suspect", "closed"])
def test_an_answer_ends_the_row_of_failures(state: State) -> None:
    assert Breaker(state, failures=2).after("answered", max_failures=3) == Breaker(state, 0)


def test_a_probe_does_not_end_the_row_of_failures() -> None:
    """A service whose health is fine and whose scores all fail must be taken out."""
    assert Breaker("suspect", failures=2).after("probe_ok", max_failures=3) == Breaker("closed", 2)


@given(st.lists(st.sampled_from(HAPPENINGS), max_size=60), st.integers(1, 5))
def test_no_history_breaks_the_rules_of_the_breaker(happenings: list[Happening], max_failures: int) -> None:
    breaker = Breaker()
    for happening in happenings:
        before, breaker = breaker, breaker.after(happening, max_failures=max_failures)
        assert 0 <= breaker.failures < max_failures
        assert breaker.failures == 0 or breaker.state in ("suspect", "closed")
        if breaker.state in ("closed", "half_open") and before.state not in ("closed", "half_open"):
            assert happening == "probe_ok", "only a probe brings a replica back"
        if breaker.state == "half_open":
            assert before.state in ("open", "rejected", "half_open")
    # Whatever has happened, a healthy replica comes back.
    healed = breaker.after("probe_ok", max_failures=max_failures).after("answered", max_failures=max_failures)
    assert healed == Breaker("closed")


def test_a_readmission_begins_a_new_era() -> None:
    replica = make_replica(max_failures=1)
    replica.note("failed", "gone")
    assert (replica.state, replica.era, replica.opened_total) == ("open", 0, 1)

    assert replica.note("probe_ok", "ready")

    assert (replica.state, replica.era, replica.reason) == ("half_open", 1, "ready")


def test_a_refusal_is_remembered_only_while_the_replica_is_out_for_it() -> None:
    replica, refusal = make_replica(), TeacherRefused("wrong token", status=401)
    replica.note("misconfigured", "wrong token", refusal=refusal)
    assert replica.refusal is refusal

    replica.note("probe_ok", "ready")

    assert replica.refusal is None


@pytest.mark.parametrize("state", ["suspect", "open", "rejected"])
def test_a_replica_that_is_out_has_no_room(state: State) -> None:
    replica = make_replica()
    replica.breaker = Breaker(state)

    assert not replica.has_room(now=0.0)


def test_a_half_open_replica_has_room_for_one_trial() -> None:
    replica = make_replica()
    replica.breaker = Breaker("half_open")
    assert replica.has_room(now=0.0)

    replica.in_flight = 1

    assert not replica.has_room(now=0.0)


def test_an_overloaded_replica_rests_and_then_bears_what_it_bore() -> None:
    replica = make_replica(max_in_flight=8)
    replica.in_flight = 3

    replica.overloaded(100.0, rest_s=2.0)

    assert not replica.has_room(101.9)
    assert not replica.has_room(102.0)  # three are still in flight, and three were its limit
    replica.in_flight = 2
    assert replica.has_room(102.0)
    assert replica.limit(100.0 + REGROW_S) == 4
    assert replica.limit(100.0 + 5 * REGROW_S) == 8
    assert replica.limit(100.0) == 8, "grown back for good"


def test_an_overload_leaves_room_for_one() -> None:
    """Somebody else may have filled the replica: a limit of 0 would never grow."""
    replica = make_replica()

    replica.overloaded(0.0, rest_s=1.0)

    assert replica.limit(0.0) == 1


def test_the_choice_is_by_requests_in_flight_then_latency_then_name() -> None:
    a, b, c = make_replica("a"), make_replica("b"), make_replica("c")
    assert choose([c, b, a], 0.0) is a
    a.took(0.5)
    b.took(0.2)
    c.took(0.3)
    assert choose([a, b, c], 0.0) is b
    b.in_flight = 1
    assert choose([a, b, c], 0.0) is c
    a.in_flight = b.in_flight = c.in_flight = 4
    assert choose([a, b, c], 0.0) is None


def test_a_replica_not_yet_measured_is_tried_first() -> None:
    a, b = make_replica("a"), make_replica("b")
    a.took(0.001)

    assert choose([a, b], 0.0) is b


def test_latency_follows_answers_and_is_not_lowered_by_what_was_given_up() -> None:
    replica = make_replica()
    replica.took_more_than(5.0)
    assert replica.latency_s is None
    replica.took(1.0)
    replica.took(2.0)
    assert replica.latency_s == pytest.approx(1.2)
    replica.took_more_than(0.5)
    assert replica.latency_s == pytest.approx(1.2)
    replica.took_more_than(2.2)
    assert replica.latency_s == pytest.approx(1.4)


@given(
    attempt=st.integers(1, 5000),
    first_s=st.floats(1e-3, 10.0),
    max_s=st.floats(1e-3, 100.0),
    seed=st.integers(0, 1000),
)
def test_a_backoff_is_never_longer_than_its_ceiling(attempt: int, first_s: float, max_s: float, seed: int) -> None:
    wait_s = backoff_s(attempt, first_s=first_s, max_s=max_s, rng=random.Random(seed))

    assert 0.0 <= wait_s <= max_s
    assert wait_s <= first_s * 2.0 ** min(attempt - 1, 1000)


def test_a_backoff_uses_the_whole_interval_and_doubles() -> None:
    rng = random.Random(0)
    for attempt, ceiling in ((1, 0.25), (2, 0.5), (3, 1.0), (9, 10.0)):
        waits = [backoff_s(attempt, first_s=0.25, max_s=10.0, rng=rng) for _ in range(400)]
        assert min(waits) < 0.1 * ceiling
        assert 0.9 * ceiling < max(waits) <= ceiling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_fingerprint": "ffff"}, "weights_fingerprint is 'ffff', the other replicas have 'aaaa'"),
        ({"weights_fingerprint": ""}, "weights_fingerprint is ''"),
        ({"vocab_size": 400}, "vocab_size is 400"),
        ({"tokenizer_size": 383}, "tokenizer_size is 383"),
        ({"tokenizer_fingerprint": "ffff"}, "tokenizer_fingerprint is 'ffff'"),
        ({"protocol": 99}, "protocol is 99"),
        ({"max_length": 511}, "max_length is 511, less than the 512"),
        ({"max_top_k": 63}, "max_top_k is 63, less than the 64"),
    ],
)
def test_another_teacher_is_told_by_what_differs(change: dict[str, Any], message: str) -> None:
    why = difference(INFO, msgspec.structs.replace(INFO, **change))

    assert why is not None
    assert message in why


def test_wider_limits_and_other_folders_are_no_difference() -> None:
    assert difference(INFO, INFO) is None
    assert difference(INFO, msgspec.structs.replace(INFO, model="a copy of it")) is None
    assert difference(INFO, msgspec.structs.replace(INFO, max_length=4096, max_top_k=100)) is None
