"""What every generator promises, as tests: a subclass gives the ``subject`` fixture and gets them all.

The reference is a plain forward pass over prompt and answer. Nothing here knows how tokens are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine.errors import GeneratorDied, WeightsMismatch
from engine.generation.protocol import Aborted, Bucket, Generation, GenerationRequest, Generator
from engine.recipe import WeightsConfig
from engine.streams import stream_key
from engine.training.export import named_tensors
from engine.transport.manifest import digest_of
from engine.types import SamplingParams
from tests.support.models import plain_logits


@dataclass
class Subject:
    """One kind of generator under test."""

    start: Callable[[], Awaitable[Generator]]
    """A fresh, started generator with ``num_slots`` slots; the fixture stops it."""
    num_slots: int
    models: Sequence[PreTrainedModel]
    """Reference of version 0, 1, …; version 0 is what ``start`` loads."""
    tolerance: float
    """Of a log-probability, nats."""
    max_positions: int


def request(
    request_id: int,
    *,
    prompt: Sequence[int] = (5, 6, 7),
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: tuple[int, ...] = (),
    num_top_ids: int = 0,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        token_ids=tuple(prompt),
        params=SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_ids=stop_ids,
            num_top_ids=num_top_ids,
        ),
        stream_key=stream_key("contract", request_id),
    )


def mixed_requests(num: int) -> list[GenerationRequest]:
    """Different prompts, lengths and limits; every third shares the prompt of the one before."""
    return [
        request(i, prompt=[3 + (7 * (i - (i % 3 == 2)) + j) % 90 for j in range(1 + (i - (i % 3 == 2)) % 5 * 3)],
                max_new_tokens=3 + i * 5 % 11)
        for i in range(num)
    ]  # fmt: skip


def reference_logprobs(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Of the answer's tokens, at temperature 1 over the whole vocabulary, float64 softmax of plain logits."""
    logits_LV = plain_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1].double()
    return logits_LV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def buckets_of(model: PreTrainedModel, *, names_per_bucket: int = 3) -> Iterator[Bucket]:
    """A version as a trainer exports it, and each bucket's memory is reused for the next."""
    named = named_tensors(model)
    reused: list[torch.Tensor] = []
    for first in range(0, len(named), names_per_bucket):
        part = named[first : first + names_per_bucket]
        reused = [tensor.clone() for _, tensor in part]
        yield Bucket(names=tuple(name for name, _ in part), tensors=tuple(reused))
        for tensor in reused:
            tensor.fill_(float("nan"))


def check_against(subject: Subject, asked: GenerationRequest, answer: Generation) -> None:
    """Log-probs span by span against that version's plain forward pass."""
    assert answer.request_id == asked.request_id
    assert len(answer.logprobs) == len(answer.sampling_logprobs) == len(answer.token_ids)
    assert [span.start for span in answer.spans] == [0, *(span.end for span in answer.spans[:-1])]
    assert answer.spans[-1].end == len(answer.token_ids)
    for span in answer.spans:
        assert span.start < span.end
        if span.stale_kv:
            continue
        expected = reference_logprobs(subject.models[span.version], asked.token_ids, answer.token_ids)
        assert answer.logprobs[span.start : span.end] == pytest.approx(
            expected[span.start : span.end], abs=subject.tolerance
        )


class GeneratorContract:
    """Subclass as ``TestX`` with a fixture ``subject: Subject``."""

    async def test_logprobs_equal_a_plain_forward_pass_with_mixed_lengths_and_refills(self, subject: Subject) -> None:
        generator = await subject.start()
        asked = mixed_requests(3 * subject.num_slots)

        answers = await asyncio.gather(*map(generator.generate, asked))

        for one, answer in zip(asked, answers, strict=True):
            check_against(subject, one, answer)
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == one.params.max_new_tokens
            assert answer.sampling_logprobs == pytest.approx(answer.logprobs, abs=subject.tolerance)
            assert [span.version for span in answer.spans] == [0]

    async def test_sampling_logprobs_are_those_of_the_filtered_and_tempered_distribution(
        self, subject: Subject
    ) -> None:
        generator = await subject.start()
        asked = [
            request(0, temperature=0.7),
            request(1, temperature=1.5, top_k=5),
            request(2, top_p=0.6),
            request(3, temperature=0.9, top_k=20, top_p=0.8),
        ]

        answers = await asyncio.gather(*map(generator.generate, asked))

        for one, answer in zip(asked, answers, strict=True):
            check_against(subject, one, answer)
            ids = [*one.token_ids, *answer.token_ids]
            logits_TV = plain_logits(subject.models[0], ids)[len(one.token_ids) - 1 : -1]
            for t, token in enumerate(answer.token_ids):
                kept = filtered_distribution(logits_TV[t], one.params)
                assert token in kept
                assert answer.sampling_logprobs[t] == pytest.approx(kept[token], abs=10 * subject.tolerance)

    async def test_temperature_zero_takes_the_likeliest_token_with_certainty(self, subject: Subject) -> None:
        generator = await subject.start()
        asked = request(0, temperature=0.0)

        answer = await generator.generate(asked)

        logits_TV = plain_logits(subject.models[0], [*asked.token_ids, *answer.token_ids])
        assert list(answer.token_ids) == logits_TV[len(asked.token_ids) - 1 : -1].argmax(-1).tolist()
        assert answer.sampling_logprobs == (0.0,) * len(answer.token_ids)
        check_against(subject, asked, answer)

    async def test_the_most_likely_ids_are_kept_for_who_asks_for_them(self, subject: Subject) -> None:
        generator = await subject.start()
        asked = [request(0, num_top_ids=5), request(1), request(2, num_top_ids=1, temperature=0.6), request(3)]

        answers = await asyncio.gather(*map(generator.generate, asked))

        assert (answers[1].top_ids, answers[3].top_ids) == (b"", b"")
        for one, answer in ((asked[0], answers[0]), (asked[2], answers[2])):
            k, num_prompt = one.params.num_top_ids, len(one.token_ids)
            ids_Tk = torch.tensor(np.frombuffer(answer.top_ids, dtype="<i4")).reshape(len(answer.token_ids), k)
            logits_TV = plain_logits(subject.models[0], [*one.token_ids, *answer.token_ids])[num_prompt - 1 : -1]
            assert all(len(set(row)) == k for row in ids_Tk.tolist())
            # By value: which of two nearly equal logits is the larger is rounding's choice.
            torch.testing.assert_close(
                logits_TV.gather(1, ids_Tk.long()), logits_TV.topk(k, dim=1).values, rtol=0, atol=10 * subject.tolerance
            )

    async def test_a_stop_id_ends_the_answer_and_is_part_of_it(self, subject: Subject) -> None:
        generator = await subject.start()
        free = await generator.generate(request(0, max_new_tokens=12))
        stop = free.token_ids[4]

        stopped = await generator.generate(request(0, max_new_tokens=12, stop_ids=(stop, 1)))

        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]

    async def test_what_is_sampled_depends_on_the_stream_and_not_on_the_company(self, subject: Subject) -> None:
        generator = await subject.start()
        asked = mixed_requests(2 * subject.num_slots)
        together = await asyncio.gather(*map(generator.generate, asked))

        alone = [await generator.generate(one) for one in reversed(asked)]

        assert [a.token_ids for a in together] == [a.token_ids for a in reversed(alone)]

    async def test_begin_is_told_on_the_event_loop_before_the_answer(self, subject: Subject) -> None:
        generator = await subject.start()
        told: list[tuple[int, asyncio.AbstractEventLoop]] = []

        await generator.generate(request(0), on_begin=lambda v: told.append((v, asyncio.get_running_loop())))

        assert told == [(0, asyncio.get_running_loop())]

    async def test_what_on_begin_raises_reaches_the_caller_and_nobody_else(self, subject: Subject) -> None:
        generator = await subject.start()

        def refuse(version: int) -> None:
            raise LookupError("not this one")

        other = asyncio.create_task(generator.generate(request(1)))
        with pytest.raises(LookupError, match="not this one"):
            await generator.generate(request(0, max_new_tokens=100), on_begin=refuse)

        assert len((await other).token_ids) == 8

    async def test_an_abort_ends_one_request_and_leaves_the_others(self, subject: Subject) -> None:
        generator = await subject.start()
        begun = asyncio.Event()
        long = asyncio.create_task(
            generator.generate(request(0, max_new_tokens=300), on_begin=lambda version: begun.set())
        )
        other = asyncio.create_task(generator.generate(request(1, max_new_tokens=30)))
        await begun.wait()

        generator.abort(0)
        generator.abort(12345)

        with pytest.raises(Aborted):
            await long
        check_against(subject, request(1, max_new_tokens=30), await other)

    async def test_cancelling_frees_the_slot_for_those_that_wait(self, subject: Subject) -> None:
        generator = await subject.start()
        begun: asyncio.Queue[int] = asyncio.Queue()
        long = [
            asyncio.create_task(
                generator.generate(request(i, max_new_tokens=300), on_begin=lambda version: begun.put_nowait(version))
            )
            for i in range(subject.num_slots)
        ]
        for _ in long:
            await begun.get()

        for task in long:
            task.cancel()
        answer = await generator.generate(request(100))

        assert len(answer.token_ids) == 8
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*long, return_exceptions=True))

    async def test_what_does_not_fit_is_refused_and_the_rest_goes_on(self, subject: Subject) -> None:
        generator = await subject.start()
        vocab = subject.models[0].config.vocab_size
        good = asyncio.create_task(generator.generate(request(0)))

        with pytest.raises(ValueError, match=str(subject.max_positions)):
            await generator.generate(request(1, max_new_tokens=subject.max_positions - 2))
        with pytest.raises(ValueError, match=str(vocab)):
            await generator.generate(request(2, prompt=[3, vocab]))
        with pytest.raises(ValueError, match="at least one token"):
            await generator.generate(request(3, prompt=[]))
        with pytest.raises(ValueError, match="temperature"):
            await generator.generate(request(4, temperature=-1.0))

        check_against(subject, request(0), await good)

    async def test_an_answer_may_fill_the_last_position(self, subject: Subject) -> None:
        generator = await subject.start()
        asked = request(0, prompt=[4] * (subject.max_positions - 2), max_new_tokens=2)

        check_against(subject, asked, await generator.generate(asked))

    async def test_an_id_that_is_open_is_refused(self, subject: Subject) -> None:
        generator = await subject.start()
        first = asyncio.create_task(generator.generate(request(0)))
        await asyncio.sleep(0)

        with pytest.raises(ValueError, match="request 0 is open already"):
            await generator.generate(request(0))

        await first

    async def test_new_weights_take_over_between_two_tokens_of_running_answers(self, subject: Subject) -> None:
        generator = await subject.start()
        asked = [request(i, prompt=[3 + i] * (1 + 4 * i), max_new_tokens=300) for i in range(subject.num_slots)]
        begun: asyncio.Queue[int] = asyncio.Queue()
        tasks = [asyncio.create_task(generator.generate(one, on_begin=begun.put_nowait)) for one in asked]
        for _ in tasks:
            await begun.get()

        await generator.update_weights(1, buckets_of(subject.models[1]), config=WeightsConfig(kv_cache="recompute"))

        assert generator.statistics().version == 1
        for one, answer in zip(asked, await asyncio.gather(*tasks), strict=True):
            check_against(subject, one, answer)
            assert [span.version for span in answer.spans] == [0, 1]
            assert not any(span.stale_kv for span in answer.spans)
        after = await generator.generate(request(99))
        check_against(subject, request(99), after)
        assert [span.version for span in after.spans] == [1]

    async def test_kept_keys_and_values_are_marked_in_the_spans(self, subject: Subject) -> None:
        generator = await subject.start()
        begun: asyncio.Queue[int] = asyncio.Queue()
        asked = request(0, max_new_tokens=300)
        task = asyncio.create_task(generator.generate(asked, on_begin=begun.put_nowait))
        await begun.get()

        await generator.update_weights(1, buckets_of(subject.models[1]), config=WeightsConfig(kv_cache="keep"))
        later = asyncio.create_task(generator.generate(request(1, prompt=asked.token_ids)))

        answer = await task
        check_against(subject, asked, answer)
        assert [(span.version, span.stale_kv) for span in answer.spans] == [(0, False), (1, True)]
        check_against(subject, request(1, prompt=asked.token_ids), await later)
        assert [(span.version, span.stale_kv) for span in (await later).spans] == [(1, False)]

    async def test_draining_lets_running_answers_end_and_begins_none_before_the_switch(self, subject: Subject) -> None:
        generator = await subject.start()
        begun: asyncio.Queue[int] = asyncio.Queue()
        running = [
            asyncio.create_task(generator.generate(request(i, max_new_tokens=200), on_begin=begun.put_nowait))
            for i in range(subject.num_slots)
        ]
        for _ in running:
            await begun.get()
        waiting = asyncio.create_task(generator.generate(request(100), on_begin=begun.put_nowait))
        await asyncio.sleep(0)

        await generator.update_weights(1, buckets_of(subject.models[1]), config=WeightsConfig(mode="drain"))

        assert {span.version for task in running for span in (await task).spans} == {0}
        assert [span.version for span in (await waiting).spans] == [1]
        assert await begun.get() == 1

    @pytest.mark.parametrize(
        "fault", ["unknown name", "wrong shape", "incomplete", "older version", "sender fails", "other bits"]
    )
    async def test_an_update_that_cannot_be_leaves_the_old_weights_whole(self, subject: Subject, fault: str) -> None:
        generator = await subject.start()
        version = -1 if fault == "older version" else 1

        def broken() -> Iterator[Bucket]:
            good = list(buckets_of_copies(subject.models[1]))
            yield from good[:1] if fault == "incomplete" else good
            if fault == "unknown name":
                yield Bucket(names=("model.nothing",), tensors=(torch.zeros(3),))
            if fault == "wrong shape":
                yield Bucket(names=good[0].names[:1], tensors=(torch.zeros(3, 3),))
            if fault == "sender fails":
                raise ConnectionError("the sender is gone")

        expected, words = {
            "unknown name": (ValueError, r"no parameter 'model.nothing'"),
            "wrong shape": (ValueError, r"has shape \(3, 3\)"),
            "incomplete": (ValueError, "did not come"),
            "older version": (ValueError, "older than version 0"),
            "sender fails": (ConnectionError, "the sender is gone"),
            "other bits": (WeightsMismatch, "were changed while they travelled"),
        }[fault]
        digest = "0" * 32 if fault == "other bits" else None
        with pytest.raises(expected, match=words):
            await generator.update_weights(version, broken(), config=WeightsConfig(), digest=digest)

        answer = await generator.generate(request(0))
        check_against(subject, request(0), answer)
        assert [span.version for span in answer.spans] == [0]
        sent = (pair for b in buckets_of(subject.models[1]) for pair in zip(b.names, b.tensors, strict=True))
        await generator.update_weights(1, buckets_of(subject.models[1]), config=WeightsConfig(), digest=digest_of(sent))
        answer = await generator.generate(request(0))
        check_against(subject, request(0), answer)
        assert [span.version for span in answer.spans] == [1]

    async def test_a_wave_gives_the_same_bits_whatever_ran_before(self, subject: Subject) -> None:
        generator = await subject.start()
        wave = mixed_requests(3 * subject.num_slots + 1)
        begun: list[tuple[int, int]] = []

        first = await generator.generate_wave(wave, on_begin=lambda request_id, v: begun.append((request_id, v)))
        await asyncio.gather(*map(generator.generate, [request(i, max_new_tokens=60 + i) for i in range(7)]))
        second = await generator.generate_wave(wave)

        assert first == second
        assert [answer.request_id for answer in first] == [one.request_id for one in wave]
        assert sorted(begun) == [(one.request_id, 0) for one in wave]
        for one, answer in zip(wave, first, strict=True):
            check_against(subject, one, answer)

    async def test_a_wave_of_nothing_is_nothing(self, subject: Subject) -> None:
        assert await (await subject.start()).generate_wave([]) == []

    async def test_stopping_gives_up_what_is_open_and_may_be_repeated(self, subject: Subject) -> None:
        generator = await subject.start()
        tasks = [
            asyncio.create_task(generator.generate(request(i, max_new_tokens=300)))
            for i in range(2 * subject.num_slots)
        ]
        await asyncio.sleep(0)

        await generator.stop()
        await generator.stop()

        assert all(isinstance(e, Aborted) for e in await asyncio.gather(*tasks, return_exceptions=True))

    async def test_whoever_watches_is_told_of_the_end(self, subject: Subject) -> None:
        generator = await subject.start()
        watch = asyncio.create_task(generator.watch())
        await generator.generate(request(0))
        assert not watch.done()

        await generator.stop()

        with pytest.raises(GeneratorDied):
            await watch

    async def test_statistics_count_tokens_and_slots(self, subject: Subject) -> None:
        generator = await subject.start()

        await asyncio.gather(*map(generator.generate, [request(i) for i in range(2 * subject.num_slots)]))

        counted = generator.statistics()
        assert counted.tokens_total == 2 * subject.num_slots * 8
        assert (counted.running, counted.waiting, counted.num_slots) == (0, 0, subject.num_slots)
        assert counted.decode_steps_total >= 16
        assert counted.prefill_tokens_total > 0
        assert counted.busy_s > 0


def buckets_of_copies(model: PreTrainedModel) -> Iterator[Bucket]:
    """As ``buckets_of``, but what was given stays as it is."""
    for name, tensor in named_tensors(model):
        yield Bucket(names=(name,), tensors=(tensor.clone(),))


def filtered_distribution(logits_V: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Log-probabilities by id, in float64: temperature, then top-k, then the smallest set with mass ≥ top_p."""
    scaled = logits_V.double() / params.temperature
    order = scaled.sort(descending=True, stable=True).indices.tolist()
    if params.top_k:
        order = order[: params.top_k]
    probabilities = scaled[order].softmax(-1)
    num = int((probabilities.cumsum(-1) < params.top_p).sum()) + 1 if params.top_p < 1 else len(order)
    kept = order[:num]
    return dict(zip(kept, scaled[kept].log_softmax(-1).tolist(), strict=True))
