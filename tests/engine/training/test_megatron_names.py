"""The table between Megatron's parameters and Hugging Face's tensors, without Megatron: against plain formulas, and
that no element is left out or held twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from engine.generation.checkpoint_names import checkpoint_parts
from engine.training.export import named_tensors
from engine.training.megatron_names import EMBEDDING, HEAD, NORM, Place, held, hf_tensors, in_checkpoint
from engine.training.megatron_student import Experts, LatentAttention, Rope, StudentShape, shape_of
from tests.engine.training.megatron.students import STUDENTS

DENSE = StudentShape(
    family="qwen3",
    vocab_size=200,
    hidden_size=16,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    ffn_size=24,
    norm_eps=1e-6,
    is_tied=False,
    has_qk_norm=True,
    rope=Rope(theta=1e4),
    max_length=64,
)
LATENT = replace(
    DENSE,
    family="deepseek_v3",
    has_qk_norm=False,
    latent=LatentAttention(q_rank=10, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=3),
    experts=Experts(
        num_experts=4,
        top_k=2,
        ffn_size=12,
        shared_ffn_size=24,
        in_layer=(True,),
        score="sigmoid",
        normalise=True,
        scale=1.0,
        has_bias=True,
    ),
)


def megatron_names(shape: StudentShape, *, local_experts: int, fused: bool) -> Iterator[str]:
    """What a GPT model calls its parameters; ``fused``: with TransformerEngine."""
    yield from (EMBEDDING, NORM, *(() if shape.is_tied else (HEAD,)))
    for layer in range(shape.num_layers):
        has_experts = shape.experts is not None and shape.experts.in_layer[layer]
        for name in _layer(shape, has_experts=has_experts, local_experts=local_experts, fused=fused):
            yield f"decoder.layers.{layer}.{name}"


def _layer(shape: StudentShape, *, has_experts: bool, local_experts: int, fused: bool) -> Iterator[str]:
    attention, mlp = "self_attention", "mlp"
    yield f"{attention}.linear_proj.weight"
    if shape.latent is None:
        yield f"{attention}.linear_qkv.weight"
        yield f"{attention}.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
        if shape.has_qk_norm:
            yield from (f"{attention}.q_layernorm.weight", f"{attention}.k_layernorm.weight")
    else:
        yield "input_layernorm.weight"
        if shape.latent.q_rank is None:
            yield f"{attention}.linear_q_proj.weight"
        else:
            yield from (f"{attention}.linear_q_down_proj.weight", f"{attention}.linear_q_up_proj.weight")
            norm = "linear_q_up_proj.layer_norm_weight" if fused else "q_layernorm.weight"
            yield f"{attention}.{norm}"
        yield from (f"{attention}.linear_kv_down_proj.weight", f"{attention}.linear_kv_up_proj.weight")
        yield f"{attention}.linear_kv_up_proj.layer_norm_weight" if fused else f"{attention}.kv_layernorm.weight"
    if not has_experts:
        yield f"{mlp}.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
        yield from (f"{mlp}.linear_fc1.weight", f"{mlp}.linear_fc2.weight")
        return
    assert shape.experts is not None
    yield from ("pre_mlp_layernorm.weight", f"{mlp}.router.weight")
    if shape.experts.has_bias:
        yield f"{mlp}.router.expert_bias"
    for linear in ("linear_fc1", "linear_fc2"):
        if shape.experts.shared_ffn_size is not None:
            yield f"{mlp}.shared_experts.{linear}.weight"
        for expert in range(local_experts):
            yield (
                f"{mlp}.experts.{linear}.weight{expert}"
                if fused
                else (f"{mlp}.experts.local_experts.{expert}.{linear}.weight")
            )


def make_version(shape: StudentShape) -> dict[str, Tensor]:
    """Numbers that occur once each."""
    tensors, start = {}, 0
    for name, size in hf_tensors(shape).items():
        tensors[name] = torch.arange(start, start + torch.Size(size).numel(), dtype=torch.float64).view(size)
        start += tensors[name].numel()
    return tensors


def parameter(name: str, shape: StudentShape, place: Place, version: dict[str, Tensor]) -> Tensor:
    parts = held(name, shape, place)
    value = torch.zeros(parts.shape, dtype=torch.float64)
    for piece in parts.pieces:
        value[piece.here] = version[piece.name][piece.there].view(value[piece.here].shape)
    return value


@pytest.mark.parametrize("name", STUDENTS)
def test_a_version_is_the_state_of_the_transformers_model_in_its_order(name: str) -> None:
    shape = shape_of(STUDENTS[name])
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(STUDENTS[name])  # type: ignore[no-untyped-call]
    model.tie_weights()

    expected = [(name, tuple(tensor.shape)) for name, tensor in named_tensors(model)]
    assert list(hf_tensors(shape).items()) == expected


@given(
    base=st.sampled_from([DENSE, LATENT]),
    q_rank=st.sampled_from([None, 10]),
    tied=st.booleans(),
    vocab_size=st.sampled_from([60, 200, 256]),
    tensor_size=st.sampled_from([1, 2, 4]),
    expert_size=st.sampled_from([1, 2, 4]),
    fused=st.booleans(),
)
def test_the_ranks_together_hold_every_element_once_and_nothing_else(
    base: StudentShape,
    q_rank: int | None,
    tied: bool,
    vocab_size: int,
    tensor_size: int,
    expert_size: int,
    fused: bool,
) -> None:
    latent = None if base.latent is None else replace(base.latent, q_rank=q_rank)
    shape = replace(base, is_tied=tied, vocab_size=vocab_size, latent=latent)
    version = make_version(shape)
    found = {name: torch.zeros_like(tensor) for name, tensor in version.items()}
    local_experts = 4 // expert_size
    for tensor_rank in range(tensor_size):
        for expert_rank in range(expert_size):
            place = Place(tensor_rank, tensor_size, expert_rank, expert_size)
            for name in megatron_names(shape, local_experts=local_experts, fused=fused):
                parts = held(name, shape, place)
                is_first = (expert_rank == 0 or parts.is_expert) and (tensor_rank == 0 or parts.is_sharded)
                value = parameter(name, shape, place, version)
                for piece in parts.pieces:
                    if is_first:
                        found[piece.name][piece.there] += value[piece.here]
                    source = in_checkpoint(piece, shape)
                    part = next(
                        part
                        for part in checkpoint_parts(piece.name, tuple(version[piece.name].shape))
                        if part.name == source.name
                    )
                    flat = version[piece.name].view(-1)[part.first_element :]
                    in_file = flat[: torch.Size(part.shape).numel()].view(part.shape)
                    assert in_file[source.there].equal(value[piece.here])
                    value[piece.here] = 0.0
                assert not value.any(), f"{name} holds something that no piece put there"

    for name, tensor in version.items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_fused_parameters_are_laid_out_as_megatron_computes_with_them(tensor_size: int) -> None:
    """Plain formulas: queries, keys and values group by group; gate and up cut before they are put together."""
    version = make_version(DENSE)
    prefix = "model.layers.0."
    q, k, v = (version[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv")
    groups, dim = DENSE.num_kv_heads, DENSE.head_dim
    by_group = (q.view(groups, -1, 16), k.view(groups, dim, 16), v.view(groups, dim, 16))
    qkv = torch.cat(by_group, dim=1).flatten(0, 1).chunk(tensor_size)
    gate, up = (version[f"{prefix}mlp.{x}_proj.weight"].chunk(tensor_size) for x in ("gate", "up"))
    down = version[f"{prefix}mlp.down_proj.weight"].chunk(tensor_size, dim=1)
    embedding = torch.zeros(256, 16, dtype=torch.float64)
    embedding[:200] = version["model.embed_tokens.weight"]

    for rank in range(tensor_size):
        place = Place(rank, tensor_size)
        layer = {
            "self_attention.linear_qkv.weight": qkv[rank],
            "mlp.linear_fc1.weight": torch.cat((gate[rank], up[rank])),
            "mlp.linear_fc2.weight": down[rank],
        }
        for name, expected in layer.items():
            assert parameter(f"decoder.layers.0.{name}", DENSE, place, version).equal(expected), name
        assert parameter(EMBEDDING, DENSE, place, version).equal(embedding.chunk(tensor_size)[rank])


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.1.mlp.linear_fc2.weight",  # a layer too many
        "decoder.layers.0.mlp.experts.weight1",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",  # of a dense layer
        "decoder.layers.0.self_attention.linear_q_up_proj.weight",
        "mtp.layers.0.eh_proj.weight",
    ],
)
def test_a_parameter_without_a_rule_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(KeyError, match=rf"{name!r} has no counterpart .* family 'qwen3'"):
        held(name, DENSE, Place())


def test_the_bias_of_the_router_is_not_taken_for_a_weight() -> None:
    assert held("decoder.layers.0.mlp.router.expert_bias", LATENT, Place()).pieces[0].name.endswith("correction_bias")
    without = replace(LATENT, experts=replace(LATENT.experts, has_bias=False))  # type: ignore[type-var]
    with pytest.raises(KeyError, match="expert_bias"):
        held("decoder.layers.0.mlp.router.expert_bias", without, Place())


def _config(config: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=50),
        Qwen3Config(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=32, vocab_size=50),
        _config(STUDENTS["moonlight"], n_shared_experts=1, first_k_dense_replace=3),
    ],
    ids=lambda config: config.model_type,
)
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()

    assert list(hf_tensors(shape_of(config))) == [name for name, _ in named_tensors(model)]
