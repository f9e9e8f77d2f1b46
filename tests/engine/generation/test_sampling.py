"""What is drawn and with which probability, against a slow float64 definition over the sorted vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.generation import sampling
from engine.generation.draws import uniforms
from engine.generation.sampling import BatchSampler, Drawn, check_params
from engine.types import SamplingParams
from tests.engine.generation.contract import filtered_distribution


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=1, **settings)


def draw(logits_nV: torch.Tensor, each: Sequence[SamplingParams], u_n: Sequence[float]) -> Drawn:
    return BatchSampler(each, device=torch.device("cpu")).draw(logits_nV, np.array(u_n))


def grid(num: int) -> list[float]:
    return [(i + 0.5) / num for i in range(num)]


def frequencies(logits_V: torch.Tensor, setting: SamplingParams, num: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of ``num`` draws with numbers 0 … of one stream."""
    u_n = uniforms(np.full(num, 7, dtype=np.uint64), np.arange(num, dtype=np.uint64))
    ids = draw(logits_V.expand(num, -1), [setting] * num, u_n.tolist()).ids
    return np.bincount(ids, minlength=len(logits_V)).astype(np.float64)


@pytest.mark.parametrize(
    "setting",
    [
        params(),
        params(temperature=0.5),
        params(temperature=2.0),
        params(top_k=4),
        params(top_p=0.7),
        params(temperature=1.5, top_k=9, top_p=0.8),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_distribution_says(setting: SamplingParams) -> None:
    logits_V = torch.randn(17, generator=torch.Generator().manual_seed(3)) * 1.5
    num = 20_000
    wanted = filtered_distribution(logits_V, setting)

    counts = frequencies(logits_V, setting, num)

    assert set(np.nonzero(counts)[0]) <= set(wanted)
    expected = {token: num * math.exp(logprob) for token, logprob in wanted.items()}
    chi_square = sum((counts[token] - e) ** 2 / e for token, e in expected.items())
    # At most 16 degrees of freedom: 52 is the 1e-5 quantile.
    assert chi_square < 52


def test_the_two_level_search_is_the_inverse_of_the_cumulated_distribution() -> None:
    logits_V = torch.randn(3_000, generator=torch.Generator().manual_seed(0)) * 2
    u_n = grid(997)
    cumulated = logits_V.double().softmax(-1).cumsum(-1)

    ids = draw(logits_V.expand(997, -1), [params()] * 997, u_n).ids

    for u, token in zip(u_n, ids, strict=True):
        below = float(cumulated[token - 1]) if token else 0.0
        assert below - 1e-7 <= u <= float(cumulated[token]) + 1e-7


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("setting", [params(), params(temperature=0.3), params(top_k=2), params(top_p=0.9)], ids=str)
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(u: float, setting: SamplingParams) -> None:
    logits = torch.full((1, 700), -1e9)
    logits[0, [3, 300, 555]] = torch.tensor([0.0, 1.0, 0.5])

    drawn = draw(logits, [setting], [u])

    assert drawn.ids[0] in (3, 300, 555)
    assert math.isfinite(drawn.sampling_logprobs[0])


def test_rare_tokens_behind_a_large_mass_are_still_drawn() -> None:
    """With a running sum in fp32 the tail of 40,000 tokens of 1e-9 would round away."""
    logits = torch.full((1, 40_001), math.log(1e-9))
    logits[0, 0] = 0.0

    drawn = draw(logits, [params()], [1 - 2e-5])

    assert drawn.ids[0] > 0
    assert drawn.ids[0] == pytest.approx(20_000, rel=0.01)


@given(
    logits=st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 2.5]), min_size=2, max_size=40),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.61, 0.93, 1.0]),
    candidates=st.sampled_from([1, 3, 8, 1024]),
)
@settings(max_examples=150)
def test_exactly_the_tokens_that_the_filters_keep_can_be_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, candidates: int
) -> None:
    """Values repeat on purpose: a tie at the edge of a set goes to the lower id. Few candidates force the full sort."""
    setting = params(temperature=temperature, top_k=top_k, top_p=top_p)
    logits_V = torch.tensor(logits)
    kept = filtered_distribution(logits_V, setting)
    edges = np.cumsum([math.exp(v) for v in filtered_distribution(logits_V, params(temperature=temperature)).values()])
    if top_p < 1 and np.min(np.abs(edges - top_p)) < 1e-5:
        return  # a mass that equals top_p up to rounding: both sets are right
    num = 400
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_NUM_CANDIDATES", candidates)
        drawn = draw(logits_V.expand(num, -1), [setting] * num, grid(num))

    assert set(drawn.ids) <= set(kept)
    assert {token for token, logprob in kept.items() if math.exp(logprob) > 1.5 / num} <= set(drawn.ids)
    for token, logprob in zip(drawn.ids, drawn.sampling_logprobs, strict=True):
        assert logprob == pytest.approx(kept[token], abs=1e-5)


def test_top_p_keeps_the_smallest_set_whose_mass_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()

    def kept(top_p: float) -> set[int]:
        return set(draw(logits.expand(64, -1), [params(top_p=top_p)] * 64, grid(64)).ids)

    assert kept(0.4) == {0}
    assert kept(0.51) == {0, 1}
    assert kept(0.74) == {0, 1}
    assert kept(0.76) == {0, 1, 2}
    assert kept(0.99) == {0, 1, 2, 3}


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])

    drawn = draw(logits, [params(temperature=0.0, top_k=1, top_p=0.1)], [0.99])

    assert drawn.ids == [1]
    assert drawn.sampling_logprobs == [0.0]
    assert drawn.logprobs[0] == pytest.approx(float(logits[0].double().log_softmax(-1)[1]), abs=1e-6)


def test_rows_do_not_influence_each_other() -> None:
    kinds = [
        params(),
        params(temperature=0.0),
        params(top_k=3),
        params(temperature=0.8),
        params(top_p=0.5),
        params(temperature=1.2, top_p=0.9999),
    ]
    logits_nV = torch.randn(len(kinds), 5_000, generator=torch.Generator().manual_seed(1))
    u_n = grid(len(kinds))

    together = draw(logits_nV, kinds, u_n)

    for row, kind in enumerate(kinds):
        alone = draw(logits_nV[row : row + 1], [kind], u_n[row : row + 1])
        assert alone.ids[0] == together.ids[row]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[row], abs=1e-6)
        assert alone.sampling_logprobs[0] == pytest.approx(together.sampling_logprobs[row], abs=1e-6)


def test_the_logprob_is_that_of_the_whole_vocabulary_at_temperature_one() -> None:
    logits_nV = torch.randn(3, 1_000, generator=torch.Generator().manual_seed(5)) * 4
    each = [params(temperature=0.5), params(top_k=3), params(temperature=0.0)]

    drawn = draw(logits_nV, each, [0.2, 0.5, 0.9])

    expected = logits_nV.double().log_softmax(-1)
    for row, token in enumerate(drawn.ids):
        assert drawn.logprobs[row] == pytest.approx(float(expected[row, token]), abs=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(broken: float) -> None:
    logits = torch.zeros(2, 300)
    logits[1, 17] = broken

    with pytest.raises(FloatingPointError, match="1 of 2 rows of logits hold NaN or infinity"):
        draw(logits, [params()] * 2, [0.5, 0.5])


def test_ids_that_a_model_rules_out_with_minus_infinity_are_never_drawn() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 10:] = -math.inf

    assert set(draw(logits.expand(50, -1), [params()] * 50, grid(50)).ids) == set(range(10))
    assert set(draw(logits.expand(50, -1), [params(top_p=0.999999)] * 50, grid(50)).ids) == set(range(10))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (SamplingParams(max_new_tokens=0), "max_new_tokens must be >= 1, got 0"),
        (params(temperature=-0.1), "temperature must be finite and >= 0, got -0.1"),
        (params(temperature=math.nan), "temperature must be finite"),
        (params(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (params(top_k=-1), "top_k must be >= 0, got -1"),
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(setting: SamplingParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_params(setting)
