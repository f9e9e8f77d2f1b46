"""Measures one policy version on held-out prompts: how far the student is from the teacher on its own answers, and on
the teacher's. Called by the learner between two steps; the same prompts and random streams every time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from engine.actors.scoring import score_rollout
from engine.clock import Clock
from engine.errors import GeneratorDied, RecipeError
from engine.evaluations import Answer, Evaluation, append_evaluation
from engine.generation.protocol import Aborted, Generation, GenerationRequest, Generator
from engine.tracing import log, span
from engine.training.protocol import EvalResult
from engine.types import Prompt, Rollout, SamplingParams, ScoredRollout, VersionSpan
from teacher.protocol import Scores, Teacher

Measure = Callable[[Sequence[ScoredRollout[Scores]]], Awaitable[list[EvalResult]]]
"""Held-out answers under the learner's present weights."""

_RETRY_S = 1.0
_GROUP = 8
"""Answers that are measured together: enough for an efficient pass, few enough that teacher and learner overlap."""


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out row."""

    samples: tuple[Prompt, ...]
    """As often as it is answered, each with a random stream of its own; the reference belongs to the first."""
    text: str
    reference_text: str | None = None


class Evaluator:
    """Args:
    held_out: rows; ``rollout_id`` of their samples must not clash with each other or with tickets of the run: −1 and
        down, without gaps.
    measure: scored answers → sums, computed with the learner's weights.
    decode: token ids → text.
    scorer: called as ``scorer(prompt text, answer text)`` for each of the student's answers.
    path: where every evaluation is appended as one JSON line.
    """

    def __init__(
        self,
        *,
        held_out: Sequence[HeldOut],
        generator: Generator,
        teacher: Teacher,
        measure: Measure,
        params: SamplingParams,
        top_k: int,
        alone: bool,
        num_shown: int,
        clock: Clock,
        decode: Callable[[Sequence[int]], str],
        scorer: Callable[[str, str], float] | None,
        path: Path,
    ) -> None:
        self._held_out = held_out
        self._generator = generator
        self._teacher = teacher
        self._measure = measure
        self._params = params
        self._top_k = top_k
        self._alone = alone
        self._num_shown = num_shown
        self._clock = clock
        self._decode = decode
        self._scorer = scorer
        self._path = path
        self._scored_references: list[list[ScoredRollout[Scores]]] | None = None

    async def evaluate(self, version: int) -> None:
        """Measure version ``version``, which must be live and stay so until this returns; log and append the result."""
        log.info("eval.started", version=version, num_prompts=len(self._held_out))
        with span("eval.run", version=version) as facts:
            # Teacher and learner look at the references while the student still speaks.
            measuring = asyncio.create_task(self._measure_references(), name="measure references")
            try:
                # One wave: the shown answers share decode steps with the measured ones.
                sampled, shown = await self._answer(version)
                async with aclosing(self._scored([*sampled, *shown])) as groups:
                    results = [result async for scored in groups for result in await self._measure(scored)]
                reference_results = await measuring
            finally:
                await _ended(measuring)
            evaluation = self._conclude(
                version,
                sampled,
                results[: len(sampled)],
                tuple(zip(shown, results[len(sampled) :], strict=True)),
                reference_results,
            )
            facts.add(
                step=version,
                num_prompts=evaluation.num_prompts,
                num_tokens=evaluation.num_tokens,
                kl=evaluation.kl,
                reference_kl=evaluation.reference_kl,
                reference_nll=evaluation.reference_nll,
                score=evaluation.score,
            )
        append_evaluation(self._path, evaluation)
        for answer in evaluation.answers:
            log.info("eval.answer", version=version, prompt=answer.prompt, answer=answer.answer, kl=answer.kl)

    async def _answer(self, version: int) -> tuple[list[Rollout], list[Rollout]]:
        """To every prompt an answer drawn as in training, which is measured; to the first few a greedy one, which is
        shown: what is drawn at temperature 1 tells how far the student is off, not how it speaks."""
        shown = self._held_out[: self._num_shown]
        greedy = msgspec.structs.replace(self._params, temperature=0.0, top_p=1.0, top_k=0)
        asked = [(prompt, self._params) for row in self._held_out for prompt in row.samples]
        num_sampled = len(asked)
        asked += [
            (msgspec.structs.replace(row.samples[0], rollout_id=-1 - num_sampled - i), greedy)
            for i, row in enumerate(shown)
        ]
        generations = await self._generate(
            [
                GenerationRequest(
                    request_id=prompt.rollout_id,
                    token_ids=prompt.token_ids,
                    params=params,
                    stream_key=prompt.stream_key,
                )
                for prompt, params in asked
            ],
            version,
        )
        rollouts = [
            Rollout(
                prompt=prompt,
                response_ids=generation.token_ids,
                logprobs=generation.logprobs,
                sampling_logprobs=generation.sampling_logprobs,
                spans=generation.spans,
                finish_reason=generation.finish_reason,
            )
            for (prompt, _), generation in zip(asked, generations, strict=True)
        ]
        return rollouts[:num_sampled], rollouts[num_sampled:]

    async def _generate(self, requests: Sequence[GenerationRequest], version: int) -> list[Generation]:
        """Once more when the generator is lost on the way: its sampler starts it again or ends the run."""
        while True:
            try:
                generations = await self._generator.generate_wave(requests)
            except (GeneratorDied, Aborted) as error:
                log.warning("eval.generator_lost", version=version, error=str(error))
            else:
                # A generator that was started again holds the student as loaded until its weights have come.
                if all(span.version == version for generation in generations for span in generation.spans):
                    return generations
            await self._clock.sleep(_RETRY_S)

    async def _measure_references(self) -> list[EvalResult]:
        # The teacher does not change during a run: its view of its own answers is asked for once.
        if self._scored_references is None:
            async with aclosing(self._scored(self._references())) as groups:
                self._scored_references = [scored async for scored in groups]
        return [result for scored in self._scored_references for result in await self._measure(scored)]

    def _references(self) -> list[Rollout]:
        return [
            Rollout(
                prompt=prompt,
                response_ids=prompt.reference_ids,
                logprobs=(),
                sampling_logprobs=(),
                spans=(VersionSpan(version=0, start=0, end=len(prompt.reference_ids)),),
                finish_reason="reference",
            )
            for prompt in (row.samples[0] for row in self._held_out)
            if prompt.reference_ids
        ]

    async def _scored(self, rollouts: Sequence[Rollout]) -> AsyncGenerator[list[ScoredRollout[Scores]]]:
        """In groups that do not depend on arrival: the learner looks at one while the teacher scores the next."""
        questions = [
            asyncio.create_task(score_rollout(self._teacher, rollout, top_k=self._top_k, alone=self._alone))
            for rollout in rollouts
        ]
        try:
            for start in range(0, len(questions), _GROUP):
                yield list(await asyncio.gather(*questions[start : start + _GROUP]))
        finally:
            await _ended(*questions)

    def _conclude(
        self,
        version: int,
        answers: Sequence[Rollout],
        results: Sequence[EvalResult],
        shown: Sequence[tuple[Rollout, EvalResult]],
        reference_results: Sequence[EvalResult],
    ) -> Evaluation:
        num_tokens = sum(result.num_tokens for result in results)
        num_reference_tokens = sum(result.num_tokens for result in reference_results)
        score = None
        if self._scorer is not None:
            texts = [row.text for row in self._held_out for _ in row.samples]
            values = [
                _number(self._scorer(text, self._decode(rollout.response_ids)))
                for text, rollout in zip(texts, answers, strict=True)
            ]
            score = sum(values) / len(values)
        return Evaluation(
            version=version,
            num_prompts=len(self._held_out),
            num_tokens=num_tokens,
            kl=sum(result.kl_sum for result in results) / num_tokens,
            reference_kl=_mean(sum(r.kl_sum for r in reference_results), num_reference_tokens),
            reference_nll=_mean(sum(r.nll_sum for r in reference_results), num_reference_tokens),
            score=score,
            answers=tuple(
                Answer(
                    prompt=row.text,
                    answer=self._decode(rollout.response_ids),
                    kl=result.kl_sum / result.num_tokens,
                )
                for row, (rollout, result) in zip(self._held_out, shown, strict=False)
            ),
            references=tuple(row.reference_text or "" for row in self._held_out[: len(shown)]),
        )


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel them, wait, and take note of what they ended with: whoever awaited one knows, or something worse has
    happened."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


def _number(value: object) -> float:
    if isinstance(value, bool | int | float):
        return float(value)
    raise RecipeError(f"evaluation.scorer returned {value!r}, expected a number for each answer")


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
