"""What a recipe must say before vLLM samples for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.build.standard import standard_graph
from engine.check.student import Student, look_at_heads
from engine.errors import RecipeError
from engine.generation.vllm_transfer import share_gpu
from engine.recipe import SamplerConfig, VllmConfig, with_overrides
from recipes import smollm2, smollm2_vllm


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["sampler.backend=vllm"], r"needs sampler\.vllm\.kv_cache_bytes"),
        (["weights.verify_every=2"], r"weights\.verify_every=2 needs sampler\.backend='vllm', got 'hf'"),
        (["sampler.vllm.memory_share=1.5"], r"<= 1\.0 - at `\$\.sampler\.vllm\.memory_share`"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_by_name(assignments: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_overrides(smollm2.recipe(), assignments)


def test_the_recipe_with_vllm_trains_what_the_one_without_does() -> None:
    plain, vllm = smollm2.recipe(), with_overrides(smollm2_vllm.recipe(), [])

    assert (vllm.student, vllm.teacher, vllm.data, vllm.learner, vllm.evaluation) == (
        plain.student,
        plain.teacher,
        plain.data,
        plain.learner,
        plain.evaluation,
    )
    assert vllm.sampler.max_new_tokens == plain.sampler.max_new_tokens


def test_copies_of_the_student_add_their_slots() -> None:
    recipe = with_overrides(smollm2_vllm.recipe(), ["sampler.vllm.data_parallel=2", "sampler.device=cuda"])

    assert "vllm on cuda, 32 slots" in [actor.about for actor in standard_graph(recipe).actors][1]


def student_with(**config: int) -> Student:
    return Student(
        config=SimpleNamespace(**config),
        tokenizer=None,  # type: ignore[arg-type]
        max_length=64,
        vocab_size=100,
        stop_ids=(),
        weight_bytes=0,
    )


@pytest.mark.parametrize(
    ("config", "assignments", "message"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, [], r"on CPU has no attention for heads of 16, .* 32, 64, 80"),
        ({"hidden_size": 64, "num_attention_heads": 2, "head_dim": 48}, [], "no attention for heads of 48"),
        (
            {"hidden_size": 96, "num_attention_heads": 3},
            ["sampler.vllm.tensor_parallel=2"],
            r"tensor_parallel=2 does not divide the student's 3 attention heads",
        ),
    ],
)
def test_heads_that_vllm_cannot_take_are_told_before_it_starts(
    config: dict[str, int], assignments: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        look_at_heads(with_overrides(smollm2_vllm.recipe(), assignments), student_with(**config))


@pytest.mark.parametrize(
    ("config", "assignments", "said"),
    [
        ({"hidden_size": 64, "num_attention_heads": 2}, ["sampler.vllm.tensor_parallel=2"], "2 attention heads on 2"),
        ({"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32}, [], "4 attention heads on 1 device"),
        ({"hidden_size": 64, "num_attention_heads": 4}, ["sampler.device=cuda"], "4 attention heads on 1 device"),
        ({}, [], "not known"),
    ],
)
def test_heads_that_vllm_can_take_are_counted(config: dict[str, int], assignments: list[str], said: str) -> None:
    assert said in look_at_heads(with_overrides(smollm2_vllm.recipe(), assignments), student_with(**config))[0]


@pytest.mark.parametrize(
    ("device", "weights_device", "vllm", "expected"),
    [
        ("cuda", "cuda:0", VllmConfig(), True),
        ("cuda:1", "cuda:1", VllmConfig(), True),
        ("cuda:1", "cuda:0", VllmConfig(), False),
        ("cuda", "cpu", VllmConfig(), False),
        ("cuda", "cuda", VllmConfig(tensor_parallel=2), False),
        ("cpu", "cpu", VllmConfig(kv_cache_bytes=1), False),
    ],
)
def test_weights_stay_on_the_gpu_only_where_both_use_the_same_one(
    device: str, weights_device: str, vllm: VllmConfig, expected: bool
) -> None:
    config = SamplerConfig(backend="vllm", device=device, vllm=vllm)

    assert share_gpu(config, torch.device(weights_device)) is expected
