"""Flow and ledger move together, and whoever waits is woken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.flow import FinishStep, Flow, Stop, Train
from engine.ledger import Ledger
from engine.schedule import Schedule
from engine.types import Prompt, Rollout, VersionSpan
from tests.support.clock import Settle


def make_prompt(ticket: int) -> Prompt:
    return Prompt(rollout_id=ticket, epoch=0, prompt_index=ticket, sample_index=0, token_ids=(1, 2))


def make_rollout(prompt: Prompt, version: int = 0) -> Rollout:
    return Rollout(
        prompt=prompt,
        response_ids=(3, 4),
        logprobs=(-1.0, -1.0),
        sampling_logprobs=(-1.0, -1.0),
        spans=(VersionSpan(version=version, start=0, end=2),),
        finish_reason="length",
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite", run_name="test", seed=0) as ledger:
        yield ledger


def make_schedule(ledger: Ledger, *, staleness: int = 0, steps: int = 2, **more: object) -> Schedule:
    flow = Flow(rollouts_per_step=2, max_staleness=staleness, num_steps=steps, micro_batch_tokens=100)
    return Schedule(flow=flow, ledger=ledger, make_prompt=make_prompt, **more)  # type: ignore[arg-type]


async def admit(schedule: Schedule) -> Prompt:
    prompt = await schedule.admit()
    assert prompt is not None
    return prompt


async def answer_one(schedule: Schedule) -> Rollout:
    prompt = await admit(schedule)
    rollout = make_rollout(prompt, schedule.live)
    schedule.begun(prompt.rollout_id, schedule.live)
    schedule.sampled(rollout)
    schedule.scored(rollout)
    return rollout


async def test_a_whole_run_is_trained_once_and_then_everybody_is_told(ledger: Ledger, settle: Settle) -> None:
    schedule = make_schedule(ledger)
    for version in range(2):
        for _ in range(2):
            await answer_one(schedule)
        assert isinstance(await schedule.next_instruction(), Train)
        assert await schedule.next_instruction() == FinishStep()
        schedule.step_done()
        schedule.weights_live(version + 1)
    late = asyncio.create_task(schedule.admit())
    await settle()

    assert await schedule.next_instruction() == Stop()
    assert await late is None
    await schedule.wait_finished()
    assert ledger.counts()["trained"] == 4
    assert ledger.verify(2, 2) == []


async def test_admission_waits_for_a_slot_and_a_failure_gives_one(ledger: Ledger, settle: Settle) -> None:
    schedule = make_schedule(ledger)
    for _ in range(2):
        await admit(schedule)
    waiting = asyncio.create_task(schedule.admit())
    await settle()
    assert not waiting.done()

    schedule.failed(0, "not worth it")
    assert (await waiting) == make_prompt(2)


async def test_a_cancelled_admission_takes_nothing(ledger: Ledger, settle: Settle) -> None:
    schedule = make_schedule(ledger)
    schedule.hold_admission()
    waiting = asyncio.create_task(schedule.admit())
    await settle()
    waiting.cancel()
    schedule.release_admission()

    assert await schedule.admit() == make_prompt(0)


async def test_admission_is_held_while_anybody_holds_it(ledger: Ledger, settle: Settle) -> None:
    schedule = make_schedule(ledger)
    schedule.hold_admission()
    schedule.hold_admission()
    waiting = asyncio.create_task(schedule.admit())
    schedule.release_admission()
    await settle()
    assert not waiting.done()

    schedule.release_admission()
    assert await waiting == make_prompt(0)


async def test_what_an_earlier_process_left_comes_first(ledger: Ledger) -> None:
    for ticket in range(3):
        ledger.dispatched(make_prompt(ticket))
    again = [make_prompt(occurrence.rollout_id) for occurrence in ledger.rewind(0)]
    schedule = make_schedule(ledger, staleness=1, next_ticket=ledger.next_ticket(), again=again)

    assert [(await admit(schedule)).rollout_id for _ in range(4)] == [0, 1, 2, 3]


async def test_what_a_complete_run_no_longer_needs_is_said_in_the_ledger(ledger: Ledger) -> None:
    """A killed process admitted four; the recipe now asks for one step of two."""
    for ticket in range(4):
        ledger.dispatched(make_prompt(ticket))
    again = [make_prompt(occurrence.rollout_id) for occurrence in ledger.rewind(0)]
    schedule = make_schedule(ledger, steps=1, next_ticket=ledger.next_ticket(), again=again)
    for _ in range(2):
        await answer_one(schedule)
    assert isinstance(await schedule.next_instruction(), Train)
    assert await schedule.next_instruction() == FinishStep()
    schedule.step_done()
    schedule.weights_live(1)

    assert await schedule.next_instruction() == Stop()
    assert {state: number for state, number in ledger.counts().items() if number} == {"trained": 2, "failed": 2}
    assert ledger.verify(1, 2) == []


async def test_a_requeued_prompt_is_sampled_again_and_trained_once(ledger: Ledger) -> None:
    schedule = make_schedule(ledger, steps=1)
    lost = await admit(schedule)
    schedule.begun(lost.rollout_id, 0)
    schedule.requeued(lost, "sampler restarted")
    schedule.begun(lost.rollout_id, 0)
    schedule.sampled(make_rollout(lost))
    schedule.scored(make_rollout(lost))
    await answer_one(schedule)
    await schedule.next_instruction()
    schedule.step_done()

    assert ledger.verify(1, 2) == []


async def test_a_drain_ends_the_run_when_nothing_is_under_way(ledger: Ledger, settle: Settle) -> None:
    schedule = make_schedule(ledger)
    learner = asyncio.create_task(schedule.next_instruction())
    feeder = asyncio.create_task(schedule.admit())
    await feeder
    await settle()
    schedule.drain()

    assert await learner == Stop()
    await schedule.wait_finished()
    assert await schedule.admit() is None


async def test_waiting_for_a_version_ends_when_it_is_live(ledger: Ledger, settle: Settle) -> None:
    schedule = make_schedule(ledger)
    for _ in range(2):
        await answer_one(schedule)
    await schedule.next_instruction()
    schedule.step_done()
    waiting = asyncio.create_task(schedule.wait_live(1))
    await settle()
    assert not waiting.done()

    schedule.weights_live(1)
    await waiting
