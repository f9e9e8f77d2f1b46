"""Turns prompts into rollouts with whatever generator it owns. How tokens are made is the generator's business."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from engine.actor import Actor
from engine.actors.in_flight import first_of, work_through
from engine.errors import AnswerLost, EndOfChannel
from engine.generation.protocol import Generation, GenerationRequest, Generator
from engine.schedule import Schedule
from engine.tracing import log, span
from engine.transport.channel import Receiver, Sender
from engine.types import Prompt, Rollout, SamplingParams, VersionSpan


class Sampler(Actor):
    """Keeps the generator full, and no fuller: under way are as many answers as it can decode at the moment, and
    ``spare`` more, so that a place that falls free is taken at the next decode step.

    Consumes: Prompt from ``prompts``
        waits for:     a prompt; a place in the generator
        unblocked by:  PromptFeeder.run; the generator finishing an answer
    Produces: Rollout into ``rollouts``
        waits for:     room in the channel
        unblocked by:  TeacherProxy.run receiving

    May be restarted: prompts that it held are sampled again, under the weights of the moment.

    Args:
        spare: answers that wait in the generator.
        waves: deterministic runs: sample what is admitted together as one wave.
        load_weights: give the generator the learner's present weights (after a restart).
    """

    def __init__(
        self,
        name: str,
        *,
        prompts: Receiver[Prompt],
        rollouts: Sender[Rollout],
        generator: Generator,
        schedule: Schedule,
        params: SamplingParams,
        spare: int,
        waves: bool,
        load_weights: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(name)
        self._prompts = prompts
        self._rollouts = rollouts
        self._generator = generator
        self._schedule = schedule
        self._params = params
        self._spare = spare
        self._waves = waves
        self._load_weights = load_weights
        self._held: dict[int, Prompt] = {}
        """Received and not yet sent on."""

    async def start(self) -> None:
        await self._generator.start()
        if self._schedule.version > 0:
            await self._load_weights()

    async def run(self) -> None:
        lost, self._held = list(self._held.values()), {}
        for prompt in lost:
            self._schedule.requeued(prompt, "sampler restarted")
        # Watched all the time: with nothing to sample, nobody but a weight update would meet a dead engine, and the
        # syncer waits for this actor to start it again.
        await first_of(self._sample(lost), self._generator.watch())
        self._rollouts.close()

    async def stop(self) -> None:
        await self._generator.stop()

    async def _sample(self, lost: list[Prompt]) -> None:
        if self._waves:
            await self._run_waves(lost)
        else:
            # The input ends when the run drains or is complete; the step under way may still need what is sampled.
            await work_through(
                self._prompts,
                lambda prompt: self._answer(self._hold(prompt)),
                limit=lambda: self._generator.capacity() + self._spare,
                again=lost,
                until=self._schedule.wait_finished,
            )

    async def _run_waves(self, wave: list[Prompt]) -> None:
        async def answer_waves() -> None:
            received = [self._hold(prompt) for prompt in wave]
            while True:
                if received and self._schedule.is_wave_complete(len(received)):
                    await self._answer_wave(received)
                    received = []
                try:
                    received.append(self._hold(await self._prompts.receive()))
                except EndOfChannel:
                    return

        await first_of(answer_waves(), self._schedule.wait_finished())
        async for _ in self._prompts:
            pass  # admitted, and needed by nobody any more

    def _hold(self, prompt: Prompt) -> Prompt:
        self._held[prompt.rollout_id] = prompt
        return prompt

    async def _answer(self, prompt: Prompt) -> None:
        if prompt.reference_ids is not None:
            await self._pass_on(self._reference(prompt))
            return
        rollout_id = prompt.rollout_id
        with span("sampler.rollout", rollout_id=rollout_id) as facts:
            generation = await self._generate(prompt)
            rollout = _rollout(prompt, generation)
            facts.add(**_facts(rollout))
        await self._pass_on(rollout)

    async def _generate(self, prompt: Prompt) -> Generation:
        rollout_id = prompt.rollout_id
        while True:
            try:
                return await self._generator.generate(
                    self._request(prompt), on_begin=lambda version: self._schedule.begun(rollout_id, version)
                )
            except AnswerLost as lost:
                self._schedule.requeued(prompt, str(lost))

    async def _answer_wave(self, prompts: list[Prompt]) -> None:
        # In order of tickets, whatever the order of arrival: what shares a decode step decides the last bits.
        prompts = sorted(prompts, key=lambda prompt: prompt.rollout_id)
        sampled = [prompt for prompt in prompts if prompt.reference_ids is None]
        answers: dict[int, Rollout] = {}
        if sampled:
            with span("sampler.wave", num_rollouts=len(sampled), version=self._schedule.live):
                generations = await self._generator.generate_wave(
                    [self._request(prompt) for prompt in sampled], on_begin=self._schedule.begun
                )
            answers = {p.rollout_id: _rollout(p, g) for p, g in zip(sampled, generations, strict=True)}
        for prompt in prompts:
            rollout = answers.get(prompt.rollout_id) or self._reference(prompt)
            log.info("sampler.rollout", rollout_id=prompt.rollout_id, **_facts(rollout))
            await self._pass_on(rollout)

    async def _pass_on(self, rollout: Rollout) -> None:
        self._schedule.sampled(rollout)
        await self._rollouts.send(rollout)
        del self._held[rollout.rollout_id]

    def _request(self, prompt: Prompt) -> GenerationRequest:
        return GenerationRequest(
            request_id=prompt.rollout_id, token_ids=prompt.token_ids, params=self._params, stream_key=prompt.stream_key
        )

    def _reference(self, prompt: Prompt) -> Rollout:
        """The file's own completion: nothing is sampled, so it begins and ends under the version of the moment."""
        version = self._schedule.live
        self._schedule.begun(prompt.rollout_id, version)
        assert prompt.reference_ids is not None
        return Rollout(
            prompt=prompt,
            response_ids=prompt.reference_ids,
            logprobs=(),
            sampling_logprobs=(),
            spans=(VersionSpan(version=version, start=0, end=len(prompt.reference_ids)),),
            finish_reason="reference",
        )


def _rollout(prompt: Prompt, generation: Generation) -> Rollout:
    return Rollout(
        prompt=prompt,
        response_ids=generation.token_ids,
        logprobs=generation.logprobs,
        sampling_logprobs=generation.sampling_logprobs,
        spans=generation.spans,
        finish_reason=generation.finish_reason,
        top_ids=generation.top_ids,
    )


def _facts(rollout: Rollout) -> dict[str, object]:
    return {
        "version_first": rollout.version_first,
        "version_last": rollout.version_last,
        "num_tokens": rollout.num_tokens,
        "num_prompt_tokens": len(rollout.prompt.token_ids),
        "finish_reason": rollout.finish_reason,
    }
