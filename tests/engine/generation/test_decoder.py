"""Rows, cache and weights step by step, on the test's own thread: exact places where things change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.generation.decoder import Decoder
from engine.generation.model import DecodableModel, load_decodable
from engine.generation.protocol import Generation, GenerationRequest
from engine.recipe import StudentConfig
from tests.engine.generation.contract import buckets_of, reference_logprobs, request
from tests.support.models import load, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [tiny_model(root / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture
def loaded(models: list[Path]) -> DecodableModel:
    return load_decodable(StudentConfig(path=str(models[0])), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def decoder(loaded: DecodableModel) -> Iterator[Decoder]:
    with torch.inference_mode():
        yield Decoder(loaded, num_slots=4, version=0)


def admit(decoder: Decoder, *asked: GenerationRequest) -> None:
    decoder.admit([(one.request_id, one) for one in asked])


def finish(decoder: Decoder) -> dict[int, Generation]:
    ended: dict[int, Generation] = {}
    while decoder.num_running:
        ended |= dict(decoder.step())
    return ended


def switch(decoder: Decoder, loaded: DecodableModel, model: PreTrainedModel, *, recompute: bool) -> None:
    loaded.staging.exchange(loaded.staging.stage(buckets_of(model), is_wanted=lambda: True))
    decoder.become(1, recompute=recompute)


def check(model: PreTrainedModel, asked: GenerationRequest, answer: Generation, start: int, end: int) -> None:
    with torch.inference_mode(False):
        expected = reference_logprobs(model, asked.token_ids, answer.token_ids)
    assert answer.logprobs[start:end] == pytest.approx(expected[start:end], abs=1e-5)


def test_the_switch_lies_exactly_where_it_was_made(
    decoder: Decoder, loaded: DecodableModel, models: list[Path]
) -> None:
    old, new = map(load, models)
    one = request(0, prompt=[5, 6, 7, 8, 9], max_new_tokens=10)
    two = request(1, prompt=[11], max_new_tokens=10)
    admit(decoder, one)
    decoder.step()
    decoder.step()
    admit(decoder, two)
    decoder.step()

    switch(decoder, loaded, new, recompute=True)
    ended = finish(decoder)

    for asked, at in ((one, 3), (two, 1)):
        answer = ended[asked.request_id]
        assert [(s.version, s.start, s.end, s.stale_kv) for s in answer.spans] == [
            (0, 0, at, False),
            (1, at, 10, False),
        ]
        check(old, asked, answer, 0, at)
        check(new, asked, answer, at, 10)


def test_kept_keys_and_values_differ_from_both_versions_and_are_not_lent(
    decoder: Decoder, loaded: DecodableModel, models: list[Path]
) -> None:
    new = load(models[1])
    one = request(0, prompt=list(range(5, 25)), max_new_tokens=10)
    same_prompt = request(1, prompt=one.token_ids, max_new_tokens=3)
    admit(decoder, one)
    decoder.step()
    computed = decoder.prefill_tokens_total

    switch(decoder, loaded, new, recompute=False)
    assert decoder.prefill_tokens_total == computed
    admit(decoder, same_prompt)
    ended = finish(decoder)

    assert [(s.version, s.start, s.stale_kv) for s in ended[0].spans] == [(0, 0, False), (1, 1, True)]
    with torch.inference_mode(False):
        fresh = reference_logprobs(new, one.token_ids, ended[0].token_ids)
    assert ended[0].logprobs[1:] != pytest.approx(fresh[1:], abs=1e-3)
    assert [(s.version, s.stale_kv) for s in ended[1].spans] == [(1, False)]
    check(new, same_prompt, ended[1], 0, 3)


def test_a_hole_is_closed_by_the_last_row_and_every_row_goes_on_right(decoder: Decoder, models: list[Path]) -> None:
    model = load(models[0])
    asked = [request(i, prompt=[3 + i] * (1 + 7 * i), max_new_tokens=n) for i, n in enumerate([2, 30, 4, 25])]
    admit(decoder, *asked)

    ended = finish(decoder)

    for one in asked:
        check(model, one, ended[one.request_id], 0, one.params.max_new_tokens)


@pytest.mark.parametrize("removed", [(0,), (3,), (0, 3), (1, 2), (0, 1, 2), (1, 3)])
def test_rows_that_were_removed_cost_nothing_and_disturb_nobody(
    decoder: Decoder, models: list[Path], removed: tuple[int, ...]
) -> None:
    asked = [request(i, prompt=[3 + i] * (1 + 3 * i), max_new_tokens=12) for i in range(4)]
    admit(decoder, *asked)
    decoder.step()

    for ticket in removed:
        assert decoder.remove(ticket)
        assert not decoder.remove(ticket)
    before = decoder.tokens_total
    decoder.step()
    assert decoder.tokens_total - before == 4 - len(removed)
    late = request(9, prompt=[8, 8], max_new_tokens=5)
    admit(decoder, late)
    ended = finish(decoder)

    assert set(ended) == {0, 1, 2, 3, 9} - set(removed)
    model = load(models[0])
    for one in [*asked, late]:
        if one.request_id in ended:
            check(model, one, ended[one.request_id], 0, one.params.max_new_tokens)


def test_a_prompt_that_is_being_answered_is_not_computed_again(decoder: Decoder, models: list[Path]) -> None:
    prompt = list(range(3, 23))
    admit(decoder, request(0, prompt=prompt), request(1, prompt=prompt))
    assert decoder.prefill_tokens_total == 19
    decoder.step()

    late = request(2, prompt=prompt)
    admit(decoder, late)

    assert decoder.prefill_tokens_total == 19
    check(load(models[0]), late, finish(decoder)[2], 0, 8)


def test_a_cache_that_grows_keeps_what_it_holds(decoder: Decoder, models: list[Path]) -> None:
    short = request(0, prompt=[4, 5], max_new_tokens=150)
    admit(decoder, short)
    for _ in range(20):
        decoder.step()
    long = request(1, prompt=[6] * 300, max_new_tokens=20)
    admit(decoder, long)

    ended = finish(decoder)

    model = load(models[0])
    check(model, short, ended[0], 0, 150)
    check(model, long, ended[1], 0, 20)
