"""Each actor by itself, between real channels and on a real schedule; engines and teachers are fakes that keep the
contract."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.actors.in_flight import InFlight, first_of
from engine.actors.prompt_feeder import PromptFeeder
from engine.actors.sampler import Sampler
from engine.actors.scoring import request_id
from engine.actors.teacher_proxy import TeacherProxy
from engine.errors import AnswerLost, GeneratorDied, TeacherRefused
from engine.flow import Flow, Train
from engine.generation.protocol import Bucket, Generation, GenerationRequest, GeneratorStatistics
from engine.ledger import Ledger
from engine.messages import Drain
from engine.recipe import WeightsConfig
from engine.schedule import Schedule
from engine.transport.channel import Receiver, Sender, open_channel
from engine.types import Prompt, Rollout, SamplingParams, ScoredRollout, VersionSpan
from teacher.protocol import Scores, TeacherInfo
from tests.support.clock import Settle

PARAMS = SamplingParams(max_new_tokens=4)


def make_prompt(ticket: int, *, reference: tuple[int, ...] | None = None) -> Prompt:
    return Prompt(
        rollout_id=ticket, epoch=0, prompt_index=ticket, sample_index=0, token_ids=(1, 2), reference_ids=reference
    )


def make_rollout(prompt: Prompt) -> Rollout:
    return Rollout(
        prompt=prompt,
        response_ids=(3, 4),
        logprobs=(-1.0, -1.0),
        sampling_logprobs=(-1.0, -1.0),
        spans=(VersionSpan(version=0, start=0, end=2),),
        finish_reason="length",
    )


class FakeGenerator:
    """Answers when told to; dies when told to."""

    def __init__(self) -> None:
        self.open: dict[int, asyncio.Future[None]] = {}
        self.places = 7
        self.starts = 0
        self.waves: list[list[int]] = []
        self.dead = asyncio.Event()

    async def start(self) -> None:
        self.starts += 1
        self.dead.clear()

    async def generate(
        self, request: GenerationRequest, *, on_begin: Callable[[int], None] | None = None
    ) -> Generation:
        future = self.open[request.request_id] = asyncio.get_running_loop().create_future()
        if on_begin is not None:
            on_begin(0)
        try:
            await future
        finally:
            del self.open[request.request_id]
        return Generation(
            request_id=request.request_id,
            token_ids=(3, 4),
            logprobs=(-1.0, -1.0),
            sampling_logprobs=(-1.0, -1.0),
            spans=(VersionSpan(version=0, start=0, end=2),),
            finish_reason="length",
        )

    async def generate_wave(
        self, requests: Sequence[GenerationRequest], *, on_begin: Callable[[int, int], None] | None = None
    ) -> list[Generation]:
        self.waves.append([request.request_id for request in requests])

        def begin(request: GenerationRequest) -> Callable[[int], None] | None:
            return None if on_begin is None else lambda version: on_begin(request.request_id, version)

        return list(await asyncio.gather(*(self.generate(r, on_begin=begin(r)) for r in requests)))

    def abort(self, request_id: int) -> None:
        raise AssertionError("nobody aborts here")

    async def update_weights(
        self, version: int, buckets: Iterable[Bucket], *, config: WeightsConfig, digest: str | None = None
    ) -> None:
        raise AssertionError("nobody pushes weights here")

    def capacity(self) -> int:
        return self.places

    def statistics(self) -> GeneratorStatistics:
        raise AssertionError("nobody asks here")

    async def watch(self) -> None:
        await self.dead.wait()
        raise GeneratorDied("killed")

    async def stop(self) -> None:
        for future in self.open.values():
            future.cancel()

    def answer(self, *request_ids: int) -> None:
        for each in request_ids:
            self.open[each].set_result(None)

    def die(self) -> None:
        self.dead.set()
        for future in self.open.values():
            future.set_exception(GeneratorDied("killed"))


class FakeTeacher:
    """Scores at once, or refuses what it is told to refuse."""

    def __init__(self, *, refuses: Callable[[Sequence[int]], bool] = lambda _: False) -> None:
        self._refuses = refuses
        self.asked: list[str | None] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def info(self) -> TeacherInfo:
        raise AssertionError("nobody asks here")

    async def score(
        self,
        *,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        top_k: int,
        extra_ids: npt.NDArray[np.int32] | None = None,
        alone: bool = False,
        request_id: str | None = None,
    ) -> Scores:
        self.asked.append(request_id)
        await self.gate.wait()
        if self._refuses(prompt_ids):
            raise TeacherRefused("too long for me", status=422)
        size = len(response_ids)
        return Scores(
            top_ids=np.zeros((size, top_k), np.int32),
            top_logprobs=np.zeros((size, top_k), np.float32),
            sampled_logprobs=np.zeros(size, np.float32),
        )

    async def close(self) -> None:
        return


class Bench:
    """A schedule with its ledger, and the channels around one actor."""

    def __init__(self, ledger: Ledger, *, per_step: int = 2, staleness: int = 1, by_ticket: bool = False) -> None:
        self.ledger = ledger
        self.schedule = Schedule(
            flow=Flow(
                rollouts_per_step=per_step,
                max_staleness=staleness,
                num_steps=9,
                micro_batch_tokens=1000,
                by_ticket=by_ticket,
            ),
            ledger=ledger,
            make_prompt=make_prompt,
        )
        self.prompts: tuple[Sender[Prompt], Receiver[Prompt]] = open_channel("prompts", max_items=16)
        self.rollouts: tuple[Sender[Rollout], Receiver[Rollout]] = open_channel("rollouts", max_items=16)
        self.scored: tuple[Sender[ScoredRollout[Scores]], Receiver[ScoredRollout[Scores]]] = open_channel(
            "scored", max_items=16
        )
        self.generator = FakeGenerator()
        self.loads = 0

    def sampler(self, *, concurrency: int = 8, waves: bool = False) -> Sampler:
        async def load_weights() -> None:
            self.loads += 1

        self.generator.places = concurrency - 1
        return Sampler(
            "sampler",
            prompts=self.prompts[1],
            rollouts=self.rollouts[0],
            generator=self.generator,
            schedule=self.schedule,
            params=PARAMS,
            spare=1,
            waves=waves,
            load_weights=load_weights,
        )

    def proxy(self, teacher: FakeTeacher, *, max_refusals: int = 3, concurrency: int = 8) -> TeacherProxy:
        return TeacherProxy(
            "teacher_proxy",
            rollouts=self.rollouts[1],
            scored=self.scored[0],
            teacher=teacher,
            schedule=self.schedule,
            top_k=4,
            concurrency=concurrency,
            alone=False,
            max_refusals=max_refusals,
        )

    async def feed(self, count: int) -> list[Prompt]:
        prompts = []
        for _ in range(count):
            prompt = await self.schedule.admit()
            assert prompt is not None
            await self.prompts[0].send(prompt)
            prompts.append(prompt)
        return prompts

    async def send_rollouts(self, count: int) -> list[Rollout]:
        rollouts = []
        for prompt in await self.feed(count):
            self.schedule.begun(prompt.rollout_id, 0)
            rollout = make_rollout(prompt)
            self.schedule.sampled(rollout)
            await self.rollouts[0].send(rollout)
            rollouts.append(rollout)
        return rollouts


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite", run_name="test", seed=0) as ledger:
        yield ledger


def spawn(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)


async def end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_feeder_fills_the_slots_and_stops_at_a_drain(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    feeder = PromptFeeder("prompt_feeder", prompts=bench.prompts[0], schedule=bench.schedule)
    run = spawn(feeder.run())
    await settle()
    assert bench.prompts[1].statistics().items == 4

    await feeder.control(Drain(reason="SIGTERM"))
    bench.schedule.failed(0, "makes room that nobody may take")
    await settle()
    assert bench.prompts[1].statistics().items == 4
    await end(run)


async def test_answers_leave_the_sampler_in_the_order_in_which_they_end(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    run = spawn(bench.sampler().run())
    await bench.feed(3)
    await settle()
    bench.generator.answer(2)
    await settle()
    bench.generator.answer(0)
    await settle()

    assert [bench.rollouts[1].try_receive().rollout_id for _ in range(2)] == [2, 0]
    assert ledger.counts()["sampled"] == 2
    await end(run)


async def test_the_sampler_keeps_no_more_open_than_it_may(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    run = spawn(bench.sampler(concurrency=2).run())
    await bench.feed(4)
    await settle()
    assert sorted(bench.generator.open) == [0, 1]

    bench.generator.answer(1)
    await settle()
    assert sorted(bench.generator.open) == [0, 2]
    await end(run)


async def test_a_generator_that_has_less_room_is_given_less(ledger: Ledger, settle: Settle) -> None:
    """Memory for keys and values is full, or one of several engines away."""
    bench = Bench(ledger)
    run = spawn(bench.sampler(concurrency=3).run())
    await bench.feed(4)
    await settle()
    assert sorted(bench.generator.open) == [0, 1, 2]

    bench.generator.places = 0
    bench.generator.answer(0, 1)
    await settle()
    assert sorted(bench.generator.open) == [2]
    bench.generator.places = 2
    bench.generator.answer(2)
    await settle()
    assert sorted(bench.generator.open) == [3]
    await end(run)


async def test_what_a_dead_generator_held_is_sampled_again_and_nothing_else(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    sampler = bench.sampler()
    await sampler.start()
    run = spawn(sampler.run())
    await bench.feed(3)
    await settle()
    bench.generator.answer(1)
    await settle()
    bench.generator.die()
    with pytest.raises(GeneratorDied):
        await run
    await sampler.stop()
    await sampler.start()
    run = spawn(sampler.run())
    await settle()
    assert sorted(bench.generator.open) == [0, 2]
    bench.generator.answer(0, 2)
    await settle()

    assert sorted(bench.rollouts[1].try_receive().rollout_id for _ in range(3)) == [0, 1, 2]
    assert bench.generator.starts == 2
    assert ledger.counts()["sampled"] == 3
    await end(run)


async def test_an_answer_that_one_of_several_engines_took_along_is_asked_for_again(
    ledger: Ledger, settle: Settle
) -> None:
    """The generator goes on, and so does the sampler with all else that it holds."""
    bench = Bench(ledger)
    run = spawn(bench.sampler().run())
    await bench.feed(2)
    await settle()
    bench.generator.open[0].set_exception(AnswerLost("engine 1 is gone"))
    await settle()
    assert sorted(bench.generator.open) == [0, 1]
    bench.generator.answer(0, 1)
    await settle()

    assert sorted(bench.rollouts[1].try_receive().rollout_id for _ in range(2)) == [0, 1]
    assert ledger.counts()["sampled"] == 2
    await end(run)


async def test_a_generator_that_dies_with_nothing_to_do_is_missed_all_the_same(ledger: Ledger, settle: Settle) -> None:
    """Otherwise the weight syncer would wait for the sampler, and the sampler for prompts, which wait for weights."""
    bench = Bench(ledger)
    sampler = bench.sampler()
    await sampler.start()
    run = spawn(sampler.run())
    await settle()

    bench.generator.die()

    with pytest.raises(GeneratorDied):
        await run


async def test_a_reference_completion_is_not_sampled(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    bench.schedule._make_prompt = lambda ticket: make_prompt(ticket, reference=(7, 8, 9))
    run = spawn(bench.sampler().run())
    await bench.feed(1)
    await settle()
    rollout = bench.rollouts[1].try_receive()

    assert rollout.response_ids == (7, 8, 9)
    assert rollout.finish_reason == "reference"
    assert rollout.logprobs == ()
    await end(run)


async def test_waves_are_whole_and_in_order_of_tickets(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger, per_step=3, staleness=0, by_ticket=True)
    run = spawn(bench.sampler(waves=True).run())
    await bench.feed(2)
    await settle()
    assert bench.generator.waves == []

    await bench.feed(1)
    await settle()
    assert bench.generator.waves == [[0, 1, 2]]
    await end(run)


async def test_after_its_input_the_sampler_finishes_what_the_step_may_still_need(
    ledger: Ledger, settle: Settle
) -> None:
    bench = Bench(ledger)
    run = spawn(bench.sampler().run())
    await bench.feed(2)
    bench.prompts[0].close()
    await settle()
    bench.generator.answer(0)
    await settle()
    assert not run.done()
    assert bench.rollouts[1].try_receive().rollout_id == 0

    bench.schedule.finish()
    await run
    assert bench.generator.open == {}, "nobody needs it any more"


async def test_a_refused_rollout_fails_with_the_reason_and_makes_room(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    run = spawn(bench.proxy(FakeTeacher(refuses=lambda _: True), max_refusals=9).run())
    await bench.send_rollouts(1)
    await settle()

    assert ledger.counts()["failed"] == 1
    assert bench.schedule.snapshot().in_use == 0
    await end(run)


async def test_a_teacher_that_refuses_everything_ends_the_run_before_the_prompts_are_gone(
    ledger: Ledger,
) -> None:
    bench = Bench(ledger, per_step=8)
    run = spawn(bench.proxy(FakeTeacher(refuses=lambda _: True), max_refusals=3).run())
    await bench.send_rollouts(5)

    with pytest.raises(TeacherRefused, match="too long for me"):
        await run


async def test_a_restarted_proxy_scores_what_it_held_under_the_same_ids(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger)
    teacher = FakeTeacher()
    teacher.gate.clear()
    proxy = bench.proxy(teacher)
    run = spawn(proxy.run())
    rollouts = await bench.send_rollouts(2)
    await settle()
    await end(run)
    teacher.gate.set()
    run = spawn(proxy.run())
    await settle()

    received = [bench.scored[1].try_receive().rollout.rollout_id for _ in range(2)]
    assert sorted(received) == [0, 1]
    ids = [request_id(rollout, 4) for rollout in rollouts]
    assert sorted(map(str, teacher.asked)) == sorted(ids * 2)
    await end(run)


def test_request_ids_tell_answers_of_one_ticket_apart() -> None:
    rollout = make_rollout(make_prompt(5))
    again = Rollout(
        prompt=rollout.prompt,
        response_ids=(3, 5),
        logprobs=rollout.logprobs,
        sampling_logprobs=rollout.sampling_logprobs,
        spans=rollout.spans,
        finish_reason="length",
    )

    assert request_id(rollout, 4) == request_id(rollout, 4)
    assert len({request_id(rollout, 4), request_id(rollout, 5), request_id(again, 4)}) == 3


async def test_in_flight_raises_the_first_failure_and_leaves_no_task() -> None:
    async def fail() -> None:
        raise GeneratorDied("gone")

    async def last() -> None:
        await asyncio.Event().wait()

    tasks = InFlight(limit=lambda: 3)

    async def work() -> None:
        async with tasks:
            tasks.start(last())
            tasks.start(fail())
            await asyncio.Event().wait()  # a failure reaches a block that waits for something else

    with pytest.raises(GeneratorDied):
        await work()

    assert len(tasks) == 0


async def test_first_of_cancels_the_others_and_passes_errors_on() -> None:
    ended = asyncio.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def quick() -> None:
        return

    async def fail() -> None:
        raise GeneratorDied("gone")

    await first_of(never(), quick())
    assert ended.is_set()
    with pytest.raises(GeneratorDied):
        await first_of(never(), fail())


async def test_the_step_takes_what_the_proxy_delivers(ledger: Ledger, settle: Settle) -> None:
    bench = Bench(ledger, per_step=2)
    run = spawn(bench.proxy(FakeTeacher()).run())
    await bench.send_rollouts(2)
    for _ in range(2):
        bench.schedule.scored((await bench.scored[1].receive()).rollout)

    assert await bench.schedule.next_instruction() == Train(rollout_ids=(0, 1), ages=(0, 0))
    await end(run)
