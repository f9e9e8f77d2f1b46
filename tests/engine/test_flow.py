"""The flow under every order of events: the bound holds, nothing is lost, nothing hangs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.flow import FinishStep, Flow, Stop, Train, Wait


def make_flow(
    *,
    per_step: int = 2,
    staleness: int = 1,
    steps: int = 9,
    tokens: int = 1000,
    rollouts: int | None = None,
    min_wave: int = 1,
    by_ticket: bool = False,
) -> Flow:
    return Flow(
        rollouts_per_step=per_step,
        max_staleness=staleness,
        num_steps=steps,
        micro_batch_tokens=tokens,
        micro_batch_rollouts=rollouts,
        min_wave=min_wave,
        by_ticket=by_ticket,
    )


def begin(flow: Flow, *tickets: int) -> None:
    for ticket in tickets:
        flow.admit(ticket)
        flow.begin(ticket, version=flow.live)


def finish_step(flow: Flow) -> None:
    assert flow.next_instruction() == FinishStep()
    flow.step_done()
    flow.weights_live(flow.version)


def test_there_are_s_plus_one_times_p_slots() -> None:
    flow = make_flow(per_step=3, staleness=2)
    assert flow.num_admissible() == 9

    begin(flow, *range(9))
    assert flow.num_admissible() == 0
    with pytest.raises(RuntimeError, match="rollout 9 was admitted without room"):
        flow.admit(9)


def test_slots_come_back_when_a_version_is_live_not_when_it_is_made() -> None:
    flow = make_flow()
    begin(flow, 0, 1, 2, 3)
    flow.ready(0, num_tokens=1)
    flow.ready(1, num_tokens=1)
    assert flow.next_instruction() == Train(rollout_ids=(0, 1), ages=(0, 0))
    flow.next_instruction()
    flow.step_done()
    assert flow.num_admissible() == 0

    flow.weights_live(1)
    assert flow.num_admissible() == 2


def test_with_staleness_zero_nothing_is_admitted_between_a_full_step_and_its_live_weights() -> None:
    flow = make_flow(staleness=0)
    begin(flow, 0, 1)
    assert flow.num_admissible() == 0
    for ticket in (0, 1):
        flow.ready(ticket, num_tokens=1)
    flow.next_instruction()
    finish_step(flow)
    begin(flow, 2, 3)
    for ticket in (2, 3):
        flow.ready(ticket, num_tokens=1)

    assert flow.next_instruction() == Train(rollout_ids=(2, 3), ages=(0, 0))


def test_late_answers_do_not_block_early_ones() -> None:
    flow = make_flow()
    begin(flow, 0, 1, 2, 3)
    flow.ready(3, num_tokens=1)
    flow.ready(2, num_tokens=1)

    assert flow.next_instruction() == Train(rollout_ids=(2, 3), ages=(0, 0))


def test_the_step_keeps_room_for_what_is_due_in_it() -> None:
    flow = make_flow(rollouts=1)
    begin(flow, 0, 1, 2, 3)
    for ticket in (2, 3):
        flow.ready(ticket, num_tokens=1)
    flow.next_instruction()
    flow.next_instruction()
    finish_step(flow)
    begin(flow, 4, 5)
    flow.ready(4, num_tokens=1)
    flow.ready(5, num_tokens=1)
    assert flow.next_instruction() == Wait(), "both places of step 2 belong to rollouts 0 and 1"

    flow.ready(0, num_tokens=1)
    assert flow.next_instruction() == Train(rollout_ids=(0,), ages=(1,))
    assert flow.next_instruction() == Wait()


def test_room_is_kept_in_later_steps_too() -> None:
    flow = make_flow(staleness=2, rollouts=1)
    begin(flow, *range(6))
    for ticket in (4, 5):
        flow.ready(ticket, num_tokens=1)
    for _ in range(2):
        flow.next_instruction()
    finish_step(flow)
    begin(flow, 6, 7)
    flow.ready(6, num_tokens=1)
    flow.ready(7, num_tokens=1)

    # 0 … 3 are due in step 3 (version 2), which holds 2: step 2 must leave room for the other two.
    assert flow.next_instruction() == Wait()


def test_a_micro_batch_waits_for_its_tokens_and_the_last_one_does_not() -> None:
    flow = make_flow(per_step=3, tokens=10)
    begin(flow, 0, 1, 2)
    flow.ready(0, num_tokens=6)
    assert flow.next_instruction() == Wait()
    flow.ready(1, num_tokens=6)
    assert flow.next_instruction() == Train(rollout_ids=(0,), ages=(0,)), "6 + 6 is over the budget"
    assert flow.next_instruction() == Wait()
    flow.ready(2, num_tokens=1)
    assert flow.next_instruction() == Train(rollout_ids=(1, 2), ages=(0, 0)), "the step is complete"


def test_a_failed_rollout_is_replaced_at_once() -> None:
    flow = make_flow(staleness=0)
    begin(flow, 0, 1)
    flow.fail(1)
    assert flow.num_admissible() == 1

    begin(flow, 2)
    for ticket in (0, 2):
        flow.ready(ticket, num_tokens=1)
    assert flow.next_instruction() == Train(rollout_ids=(0, 2), ages=(0, 0))


def test_a_requeued_rollout_begins_again_with_a_new_deadline() -> None:
    flow = make_flow(rollouts=1)
    begin(flow, 0, 1, 2, 3)
    for ticket in (0, 1):
        flow.ready(ticket, num_tokens=1)
        flow.next_instruction()
    finish_step(flow)
    flow.requeue(2)
    flow.begin(2, version=1)
    flow.ready(2, num_tokens=1)

    assert flow.next_instruction() == Train(rollout_ids=(2,), ages=(0,))


def test_by_ticket_composes_the_same_micro_batches_in_any_order_of_arrival() -> None:
    def run(order: list[int]) -> list[tuple[int, ...]]:
        flow = make_flow(per_step=4, staleness=0, tokens=10, by_ticket=True)
        begin(flow, 0, 1, 2, 3)
        batches = []
        for ticket in order:
            flow.ready(ticket, num_tokens=5)
            while isinstance(instruction := flow.next_instruction(), Train):
                batches.append(instruction.rollout_ids)
        return batches

    assert run([0, 1, 2, 3]) == run([3, 2, 1, 0]) == run([2, 0, 3, 1]) == [(0, 1), (2, 3)]


def test_by_ticket_replacements_are_admitted_together_when_all_fates_are_known() -> None:
    flow = make_flow(per_step=4, staleness=0, by_ticket=True)
    begin(flow, 0, 1, 2, 3)
    flow.fail(1)
    assert flow.num_admissible() == 0
    flow.ready(0, num_tokens=1)
    flow.fail(2)
    assert flow.num_admissible() == 0

    flow.ready(3, num_tokens=1)
    assert flow.num_admissible() == 2


def test_a_drain_finishes_the_step_under_way_when_it_can_be_filled() -> None:
    flow = make_flow(rollouts=1)
    begin(flow, 0, 1, 2)
    flow.ready(0, num_tokens=1)
    flow.next_instruction()
    flow.drain()
    assert flow.num_admissible() == 0
    assert flow.next_instruction() == Wait()

    flow.ready(2, num_tokens=1)
    assert flow.next_instruction() == Train(rollout_ids=(2,), ages=(0,))
    finish_step(flow)
    assert flow.next_instruction() == Stop()


def test_a_drain_gives_up_a_step_that_cannot_be_filled() -> None:
    flow = make_flow(rollouts=1)
    begin(flow, 0)
    flow.ready(0, num_tokens=1)
    flow.next_instruction()
    flow.drain()

    assert flow.next_instruction() == Stop()


def test_no_more_is_admitted_than_the_last_step_needs() -> None:
    flow = make_flow(steps=1, staleness=4)
    assert flow.num_admissible() == 2


def test_a_wave_begins_when_there_are_slots_for_it() -> None:
    flow = make_flow(per_step=2, staleness=2, steps=9, min_wave=4)
    assert flow.num_admissible() == 6
    begin(flow, *range(6))
    for version, expected in ((1, 0), (2, 4)):
        for ticket in (2 * version - 2, 2 * version - 1):
            flow.ready(ticket, num_tokens=1)
        while not isinstance(flow.next_instruction(), FinishStep):
            pass
        flow.step_done()
        flow.weights_live(version)
        assert flow.num_admissible() == expected
    begin(flow, 6)
    assert flow.num_admissible() == 3, "an open wave is taken one by one"


def test_a_wave_never_waits_for_slots_that_only_its_own_step_would_give_back() -> None:
    flow = make_flow(per_step=4, staleness=0, steps=2, min_wave=4)
    begin(flow, 0, 1, 2, 3)
    flow.fail(2)

    assert flow.num_admissible() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_step": 0}, "rollouts_per_step must be >= 1, got 0"),
        ({"staleness": -1}, "max_staleness must be >= 0 versions, got -1"),
        ({"by_ticket": True}, "by_ticket needs max_staleness=0, got 1"),
        ({"tokens": 0}, "a micro-batch holds at least 1 token"),
        ({"min_wave": 0}, "min_wave must be in 1 … "),
        ({"min_wave": 5}, "min_wave must be in 1 … .* got 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_flow(**arguments)  # type: ignore[arg-type]


class FlowMachine(RuleBasedStateMachine):
    """Random events in random order, as any mixture of slow and fast generators, teachers and learners could make
    them."""

    @initialize(
        per_step=st.integers(1, 4),
        staleness=st.integers(0, 4),
        steps=st.integers(1, 6),
        rollouts=st.none() | st.integers(1, 5),
        tokens=st.integers(1, 12),
        wave=st.floats(0.0, 1.0),
        by_ticket=st.booleans(),
    )
    def start(
        self, per_step: int, staleness: int, steps: int, rollouts: int | None, tokens: int, wave: float, by_ticket: bool
    ) -> None:
        self.per_step = per_step
        self.staleness = 0 if by_ticket else staleness
        self.steps = steps
        self.flow = make_flow(
            per_step=per_step,
            staleness=self.staleness,
            steps=steps,
            tokens=tokens,
            rollouts=rollouts,
            min_wave=max(1, round(wave * (self.staleness + 1) * per_step)),
            by_ticket=by_ticket,
        )
        self.next_ticket = 0
        self.waiting: set[int] = set()
        self.running: dict[int, int] = {}
        self.scored: dict[int, int] = {}
        self.step: list[int] = []
        self.trained: list[int] = []
        self.failed: set[int] = set()
        self.draining = False

    @precondition(lambda self: self.flow.num_admissible() > 0)
    @rule(count=st.integers(1, 6))
    def admit(self, count: int) -> None:
        for _ in range(min(count, self.flow.num_admissible())):
            self.flow.admit(self.next_ticket)
            self.waiting.add(self.next_ticket)
            self.next_ticket += 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        version = data.draw(st.integers(self.flow.live, self.flow.version))
        self.flow.begin(ticket, version=version)
        self.waiting.remove(ticket)
        self.running[ticket] = version

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 6))
    def score(self, data: st.DataObject, num_tokens: int) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        self.flow.ready(ticket, num_tokens=num_tokens)
        self.scored[ticket] = self.running.pop(ticket)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.running)))
        self.flow.requeue(ticket)
        del self.running[ticket]
        self.waiting.add(ticket)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.running.keys() | self.waiting)))
        self.flow.fail(ticket)
        self.running.pop(ticket, None)
        self.waiting.discard(ticket)
        self.failed.add(ticket)

    @rule()
    def learn(self) -> None:
        self.obey(self.flow.next_instruction())

    @precondition(lambda self: self.flow.live < self.flow.version)
    @rule(data=st.data())
    def sync(self, data: st.DataObject) -> None:
        self.flow.weights_live(data.draw(st.integers(self.flow.live + 1, self.flow.version)))

    @rule()
    def drain(self) -> None:
        self.flow.drain()
        self.draining = True

    def obey(self, instruction: object) -> None:
        if isinstance(instruction, Train):
            for ticket, age in zip(instruction.rollout_ids, instruction.ages, strict=True):
                begun = self.scored.pop(ticket)
                assert age == self.flow.version - begun
                assert age <= self.staleness, "the bound is hard"
                self.step.append(ticket)
        elif isinstance(instruction, FinishStep):
            assert len(self.step) == self.per_step
            assert self.flow.step_done() == tuple(sorted(self.step))
            self.trained += self.step
            self.step = []

    @invariant()
    def slots_are_never_exceeded(self) -> None:
        if not hasattr(self, "flow"):
            return
        snapshot = self.flow.snapshot()
        assert 0 <= snapshot.in_use <= snapshot.slots
        assert snapshot.admitted == len(self.waiting)
        assert snapshot.begun == len(self.running)
        assert snapshot.ready == len(self.scored)
        assert snapshot.accepted == len(self.step)

    def teardown(self) -> None:
        """From wherever it is, the run comes to its end when everything that is under way goes on."""
        if not hasattr(self, "flow"):
            return
        for _ in range(10_000):
            self.flow.weights_live(self.flow.version)  # what is on its way arrives
            while self.flow.num_admissible():
                self.flow.admit(self.next_ticket)
                self.waiting.add(self.next_ticket)
                self.next_ticket += 1
            for ticket in sorted(self.waiting):
                self.flow.begin(ticket, version=self.flow.live)
                self.running[ticket] = self.flow.live
            self.waiting.clear()
            # The worst order for deadlines: the youngest answers come first, one at a time.
            if self.running and isinstance(instruction := self.flow.next_instruction(), Wait):
                ticket = max(self.running)
                self.flow.ready(ticket, num_tokens=1)
                self.scored[ticket] = self.running.pop(ticket)
                continue
            if not self.running:
                instruction = self.flow.next_instruction()
            assert not isinstance(instruction, Wait), f"nothing under way and nothing to do: {self.flow.snapshot()}"
            if isinstance(instruction, Stop):
                break
            self.obey(instruction)
        else:
            raise AssertionError("the run does not end")
        assert len(set(self.trained)) == len(self.trained), "a rollout was trained twice"
        assert not set(self.trained) & self.failed
        everything = set(range(self.next_ticket))
        left = self.scored.keys() | self.running.keys() | set(self.step)
        assert everything == set(self.trained) | self.failed | left, "a rollout vanished"
        if not self.draining:
            assert not left, "a complete run leaves nothing in flight"
            assert len(self.trained) == self.steps * self.per_step


TestFlowMachine = FlowMachine.TestCase
TestFlowMachine.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    per_step=st.integers(1, 6),
    staleness=st.integers(0, 5),
    rollouts=st.integers(1, 6),
    wave=st.floats(0.0, 1.0),
    seed=st.randoms(use_true_random=False),
)
def test_random_durations_never_break_the_bound_or_stall(
    per_step: int, staleness: int, rollouts: int, wave: float, seed: object
) -> None:
    import random

    assert isinstance(seed, random.Random)
    min_wave = max(1, round(wave * (staleness + 1) * per_step))
    flow = make_flow(per_step=per_step, staleness=staleness, steps=12, rollouts=rollouts, min_wave=min_wave)
    running: list[tuple[float, int]] = []
    ticket, now = 0, 0.0
    ages: list[int] = []
    while flow.version < 12:
        while flow.num_admissible():
            begin(flow, ticket)
            running.append((now + seed.lognormvariate(0, 1.5), ticket))
            ticket += 1
        match flow.next_instruction():
            case Train(ages=batch):
                ages += batch
                now += 0.1
            case FinishStep():
                flow.step_done()
                flow.weights_live(flow.version)
            case _:
                running.sort()
                now, done = running.pop(0)
                flow.ready(done, num_tokens=1)
    assert max(ages) <= staleness
    assert len(ages) == 12 * per_step == ticket
