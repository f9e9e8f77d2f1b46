"""The replay generator against a slow definition that goes token by token."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.blank import Repeated, blank_tokens
from engine.generation.protocol import Aborted, Generation, GenerationRequest
from engine.generation.replay import ReplayGenerator
from engine.recipe import ReplayConfig, WeightsConfig
from engine.types import SamplingParams
from engine.virtual_time import VirtualClock, run_virtual

Mode = Literal["in_flight", "drain"]

TICK_S = 2.0**-12
"""Times are whole multiples of it, so sums of them are exact."""
COST_TICKS = 16
"""Costs are whole multiples of so many ticks, and every event comes at a tick of its own between them: of two things
that happen at one instant either may come first."""


class Ask(msgspec.Struct, frozen=True):
    at: float
    num_prompt: int
    num_tokens: int


class Ended(msgspec.Struct, frozen=True):
    at: float
    versions: tuple[int, ...]
    """Of each token."""


def token_by_token(
    asks: Sequence[Ask], switches: Sequence[float], *, costs: ReplayConfig, num_slots: int, weights: WeightsConfig
) -> dict[int, Ended]:
    """One sampler; ``asks`` in the order of arrival; one switch at a time."""
    arriving, waiting = deque(enumerate(asks)), deque[tuple[int, Ask]]()
    pending = deque(switches)
    running: dict[int, list[int]] = {}
    ended: dict[int, Ended] = {}
    now, version = 0.0, 0
    while len(ended) < len(asks):
        while arriving and arriving[0][1].at <= now:
            waiting.append(arriving.popleft())
        is_switching = bool(pending) and pending[0] <= now
        if is_switching and (weights.mode == "in_flight" or not running):
            pending.popleft()
            now += costs.weights_pause_s
            if weights.kv_cache == "recompute" and running and costs.prefill_token_s:
                context = sum(asks[i].num_prompt + len(tokens) for i, tokens in running.items())
                now += costs.prefill_s + costs.prefill_token_s * context
            version += 1
            is_switching = False
            while arriving and arriving[0][1].at <= now:
                waiting.append(arriving.popleft())
        entering: list[tuple[int, Ask]] = []
        while waiting and not is_switching and len(running) + len(entering) < num_slots:
            entering.append(waiting.popleft())
        if entering:
            now += costs.prefill_s + costs.prefill_token_s * sum(ask.num_prompt for _, ask in entering)
            running |= {i: [] for i, _ in entering}
        if running:
            now += costs.decode_step_s + costs.decode_slot_s * len(running)
            for i, tokens in list(running.items()):
                tokens.append(version)
                if len(tokens) == asks[i].num_tokens:
                    ended[i] = Ended(now, tuple(running.pop(i)))
        else:
            following = [ask.at for _, ask in list(arriving)[:1]] + list(pending)[:1]
            now = max(now, min(following))
    return ended


def replayed(
    asks: Sequence[Ask], switches: Sequence[float], *, costs: ReplayConfig, num_slots: int, weights: WeightsConfig
) -> dict[int, Ended]:
    ended: dict[int, Ended] = {}

    async def main() -> None:
        clock = VirtualClock()
        generator = ReplayGenerator(
            costs=costs, num_slots=num_slots, length_of=lambda request: asks[request.request_id].num_tokens, clock=clock
        )

        async def ask(i: int) -> None:
            await clock.sleep(asks[i].at)
            generation = await generator.generate(request(i, asks[i].num_prompt))
            ended[i] = Ended(clock.now(), versions(generation))

        async def switch() -> None:
            for version, at in enumerate(switches, start=1):
                await clock.sleep(at - clock.now())
                await generator.update_weights(version, (), config=weights)

        await asyncio.gather(*(ask(i) for i in range(len(asks))), switch())

    run_virtual(main)
    return ended


def request(i: int, num_prompt: int = 1, *, max_new_tokens: int = 10_000) -> GenerationRequest:
    return GenerationRequest(
        request_id=i,
        token_ids=blank_tokens(num_prompt),
        params=SamplingParams(max_new_tokens=max_new_tokens),
        stream_key=i,
    )


def versions(generation: Generation) -> tuple[int, ...]:
    starts = [span.start for span in generation.spans]
    assert starts == [0, *(span.end for span in generation.spans[:-1])], "spans are contiguous"
    return tuple(span.version for span in generation.spans for _ in range(span.start, span.end))


def apart(times: Sequence[int], first_tick: int) -> list[float]:
    return [(time * COST_TICKS + first_tick + i) * TICK_S for i, time in enumerate(sorted(times))]


def seconds(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low, high).map(lambda n: n * COST_TICKS * TICK_S)


@given(
    arrivals=st.lists(st.integers(0, 40), max_size=10),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12)), min_size=10, max_size=10),
    switches=st.lists(st.integers(0, 60), max_size=3),
    costs=st.builds(
        ReplayConfig,
        decode_step_s=seconds(1, 4),
        decode_slot_s=seconds(0, 2),
        prefill_s=seconds(0, 1),
        prefill_token_s=seconds(0, 1),
        weights_pause_s=seconds(0, 10),
    ),
    num_slots=st.integers(1, 4),
    weights=st.builds(
        WeightsConfig, mode=st.sampled_from(("in_flight", "drain")), kv_cache=st.sampled_from(("keep", "recompute"))
    ),
)
def test_closed_form_and_token_by_token_agree(
    arrivals: list[int],
    sizes: list[tuple[int, int]],
    switches: list[int],
    costs: ReplayConfig,
    num_slots: int,
    weights: WeightsConfig,
) -> None:
    asks = [Ask(at, *size) for at, size in zip(apart(arrivals, 0), sizes, strict=False)]
    switching = apart(switches, 10)

    expected = token_by_token(asks, switching, costs=costs, num_slots=num_slots, weights=weights)

    assert replayed(asks, switching, costs=costs, num_slots=num_slots, weights=weights) == expected


def test_work_goes_to_the_sampler_with_the_most_free_slots() -> None:
    costs = ReplayConfig(num_samplers=3, decode_step_s=1.0, decode_slot_s=1.0)

    async def main() -> tuple[float, int]:
        clock = VirtualClock()
        generator = ReplayGenerator(costs=costs, num_slots=2, length_of=lambda _: 1, clock=clock)
        await asyncio.gather(*(generator.generate(request(i)) for i in range(3)))
        return clock.now(), generator.statistics().num_slots

    assert run_virtual(main) == (2.0, 6), "one each: a step of 1 s and 1 s more for one sequence"


def test_a_given_up_answer_frees_its_slot_after_the_step_under_way() -> None:
    costs = ReplayConfig(decode_step_s=1.0, decode_slot_s=0.0)

    async def main() -> list[float]:
        clock = VirtualClock()
        generator = ReplayGenerator(
            costs=costs, num_slots=1, length_of=lambda r: 10 if r.request_id else 100, clock=clock
        )
        long = asyncio.create_task(generator.generate(request(0)))
        short = asyncio.create_task(generator.generate(request(1)))
        await clock.sleep(3.5)
        long.cancel()
        await short
        ended = [clock.now()]
        aborted = asyncio.create_task(generator.generate(request(2)))
        await clock.sleep(0.5)
        generator.abort(2)
        with pytest.raises(Aborted):
            await aborted
        assert generator.statistics().waiting == 0
        return ended

    assert run_virtual(main) == [14.0]


def test_a_wave_begins_together_and_an_error_of_on_begin_reaches_who_asked() -> None:
    begun: list[tuple[int, int]] = []

    def begin(version: int) -> None:
        raise ValueError("not now")

    async def main() -> list[int]:
        generator = ReplayGenerator(costs=ReplayConfig(), num_slots=8, length_of=lambda r: 5, clock=VirtualClock())
        wave = await generator.generate_wave([request(3), request(1)], on_begin=lambda i, v: begun.append((i, v)))
        with pytest.raises(ValueError, match="not now"):
            await generator.generate(request(7), on_begin=begin)
        return [generation.request_id for generation in wave]

    assert run_virtual(main) == [3, 1]
    assert begun == [(3, 0), (1, 0)]


def test_an_answer_is_cut_at_its_limit() -> None:
    async def main() -> Generation:
        generator = ReplayGenerator(costs=ReplayConfig(), num_slots=1, length_of=lambda _: 99, clock=VirtualClock())
        return await generator.generate(request(0, max_new_tokens=7))

    generation = run_virtual(main)

    assert (len(generation.token_ids), generation.finish_reason) == (7, "length")


def test_repeated_behaves_as_the_tuple_that_it_stands_for() -> None:
    blank, plain = Repeated(0, 5), (0,) * 5

    assert (len(blank), list(blank), blank[2], blank[-1]) == (len(plain), list(plain), plain[2], plain[-1])
    assert list(blank[1:3]) == list(plain[1:3])
    assert (len(blank + plain), len(plain + blank)) == (10, 10)
    with pytest.raises(IndexError):
        blank[5]
