"""What a fleet of engines decides without any of them running."""

from __future__ import annotations

from typing import cast

import pytest

from engine.generation.vllm import VllmGenerator
from engine.generation.vllm_fleet import _Place, choose_place, engine_config
from engine.recipe import SamplerConfig, VllmConfig


def place(number: int, *prompts: tuple[int, ...]) -> _Place:
    made = _Place(number, cast(VllmGenerator, None))
    made.open.update(prompts)
    made.num_open = len(prompts)
    return made


@pytest.mark.parametrize(
    ("places", "prompt", "expected"),
    [
        ([place(0, (1,)), place(1)], (2,), 1),
        ([place(0, (1,)), place(1)], (1,), 0),
        ([place(0, (1,), (1,), (3,)), place(1, (4,))], (1,), 1),
        ([place(0), place(1)], (1,), 0),
    ],
    ids=["fewest open", "shares a prompt", "no free slot to share it in", "all alike"],
)
def test_a_request_goes_where_it_is_decoded_soonest(
    places: list[_Place], prompt: tuple[int, ...], expected: int
) -> None:
    assert choose_place(places, prompt, num_slots=3).number == expected


@pytest.mark.parametrize(
    ("device", "vllm", "expected"),
    [
        ("cuda:1", VllmConfig(num_engines=3), ["cuda:1", "cuda:2", "cuda:3"]),
        ("cuda", VllmConfig(num_engines=2, tensor_parallel=2, data_parallel=2), ["cuda:0", "cuda:4"]),
        ("cpu", VllmConfig(num_engines=2, kv_cache_bytes=1), ["cpu", "cpu"]),
    ],
)
def test_engines_stand_on_devices_one_after_the_other(device: str, vllm: VllmConfig, expected: list[str]) -> None:
    config = SamplerConfig(backend="vllm", device=device, vllm=vllm)

    each = [engine_config(config, number) for number in range(vllm.num_engines)]

    assert [one.device for one in each] == expected
    assert {one.vllm.num_engines for one in each} == {1}
