"""Which pieces of which Hugging Face tensors a rank's Megatron parameter is made of. Arithmetic on names and shapes: no
tensor, no process group, no Megatron.

Everything that moves weights is told here: loading copies each piece from a checkpoint into the parameter, exporting
copies it the other way. Names and shapes are those of the transformers model, in the order of its state dict, so that a
version is the same list of tensors whoever made it. transformers 5 holds the experts of a layer as two tensors;
``engine.generation.checkpoint_names`` knows what checkpoints call their parts.

    D hidden size      F width of a feed-forward network      E experts      V vocabulary
    G groups of keys and values, each with Q queries of width d
    R tensor-parallel ranks, of which this is r

Rules, by what Megatron does with a matrix:

    whole       every rank holds all of it
    rows        [out, in], rank r holds rows r · out/R on
    columns     [out, in], rank r holds columns r · in/R on
    vocabulary  rows, of a vocabulary padded to a multiple of R; padding is zero and belongs to nobody's tensor
    gate_up     rank r holds its rows of the gate, then its rows of up: not a slice of the two put together
    qkv         for each of the rank's G/R groups: its Q·d query rows, d key rows, d value rows
    experts     each rank of the expert-parallel group holds E / ranks whole experts, one parameter each
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engine.training.megatron_student import StudentShape

Region = tuple[slice, ...]
"""Of a tensor: start and stop in each dimension."""


class Piece(NamedTuple):
    """Equal on both sides."""

    name: str
    """Of the Hugging Face tensor."""
    there: Region
    """In it; of an expert, the first dimension is the expert and has one entry."""
    here: Region
    """In the rank's parameter."""


class Place(NamedTuple):
    """Of a rank among those that hold other parts of the same layers."""

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1


class Held(NamedTuple):
    """One parameter of one rank."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    """That it must have."""
    is_sharded: bool
    """Tensor-parallel ranks hold different parts of it. False: all hold the same."""
    is_expert: bool
    """Belongs to an expert: held once in each expert-parallel group."""


EMBEDDING, NORM, HEAD = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
HF_EMBEDDING, HF_NORM, HF_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ROUTER_BIAS = "mlp.router.expert_bias"
HF_ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
"""A buffer on both sides, and float32 whatever the weights are: a rounded bias sends tokens to other experts."""


def hf_tensors(shape: StudentShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a version, in the order of the transformers model's state dict."""
    tensors: dict[str, tuple[int, ...]] = {HF_EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_layers):
        for name, size in _hf_layer(shape, layer):
            tensors[f"model.layers.{layer}.{name}"] = size
    tensors[HF_NORM] = (shape.hidden_size,)
    if not shape.is_tied:
        tensors[HF_HEAD] = (shape.vocab_size, shape.hidden_size)
    return tensors


def held(name: str, shape: StudentShape, place: Place) -> Held:
    """What the parameter ``name`` of the rank at ``place`` is made of.

    Args:
        name: Megatron's, with or without TransformerEngine, but with the layer's number counted over all stages.

    Raises:
        KeyError: no rule knows this name.
    """
    if name in (EMBEDDING, HEAD):
        is_embedding = name == EMBEDDING or shape.is_tied
        return _vocabulary(HF_EMBEDDING if is_embedding else HF_HEAD, shape, place)
    if name == NORM:
        return _whole(HF_NORM, (shape.hidden_size,), place)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    rule = None
    if match is not None and int(match[1]) < shape.num_layers:
        layer, prefix = int(match[1]), f"model.layers.{match[1]}."
        suffix = _FUSED_NORMS.get(match[2], match[2])
        if (expert := _EXPERT.fullmatch(suffix)) is not None and _has_experts(shape, layer):
            number = int(expert["a"] or expert["b"])
            return _expert(prefix, f"linear_{expert['fc']}", number, shape, place)
        rule = _rules(shape, layer).get(suffix)
    if rule is None:
        raise KeyError(
            f"Megatron's parameter {name!r} has no counterpart in a Hugging Face model of family {shape.family!r} that "
            "is known here; add its rule to engine/training/megatron_names.py"
        )
    return rule(prefix, shape, place)


def in_checkpoint(piece: Piece, shape: StudentShape) -> Piece:
    """The same piece where ``there`` is in a tensor of a checkpoint: there each projection of each expert is one."""
    prefix, _, last = piece.name.rpartition(".")
    if not prefix.endswith(".experts"):
        return piece
    assert shape.experts is not None
    expert, rows, columns = piece.there
    width = shape.experts.ffn_size
    if last == "down_proj":
        return Piece(f"{prefix}.{expert.start}.down_proj.weight", (rows, columns), piece.here)
    is_up = rows.start >= width
    first = width if is_up else 0
    projection = "up_proj" if is_up else "gate_proj"
    there = (slice(rows.start - first, rows.stop - first), columns)
    return Piece(f"{prefix}.{expert.start}.{projection}.weight", there, piece.here)


# What the transformers model holds.


def _hf_layer(shape: StudentShape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = shape.hidden_size
    latent = shape.latent
    if latent is None:
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        yield "self_attn.q_proj.weight", (queries, hidden)
        yield "self_attn.k_proj.weight", (keys, hidden)
        yield "self_attn.v_proj.weight", (keys, hidden)
        yield "self_attn.o_proj.weight", (hidden, queries)
        if shape.has_qk_norm:
            yield "self_attn.q_norm.weight", (shape.head_dim,)
            yield "self_attn.k_norm.weight", (shape.head_dim,)
    else:
        queries = shape.num_heads * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank is None:
            yield "self_attn.q_proj.weight", (queries, hidden)
        else:
            yield "self_attn.q_a_proj.weight", (latent.q_rank, hidden)
            yield "self_attn.q_a_layernorm.weight", (latent.q_rank,)
            yield "self_attn.q_b_proj.weight", (queries, latent.q_rank)
        yield "self_attn.kv_a_proj_with_mqa.weight", (latent.kv_rank + latent.rope_dim, hidden)
        yield "self_attn.kv_a_layernorm.weight", (latent.kv_rank,)
        yield "self_attn.kv_b_proj.weight", (shape.num_heads * (latent.nope_dim + latent.v_dim), latent.kv_rank)
        yield "self_attn.o_proj.weight", (hidden, shape.num_heads * latent.v_dim)
    experts = shape.experts
    if experts is None or not _has_experts(shape, layer):
        yield from _hf_network("mlp", shape.ffn_size, hidden)
    else:
        yield "mlp.experts.gate_up_proj", (experts.num_experts, 2 * experts.ffn_size, hidden)
        yield "mlp.experts.down_proj", (experts.num_experts, hidden, experts.ffn_size)
        yield "mlp.gate.weight", (experts.num_experts, hidden)
        if experts.has_bias:
            yield HF_ROUTER_BIAS, (experts.num_experts,)
        if experts.shared_ffn_size is not None:
            yield from _hf_network("mlp.shared_experts", experts.shared_ffn_size, hidden)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _hf_network(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _has_experts(shape: StudentShape, layer: int) -> bool:
    return shape.experts is not None and shape.experts.in_layer[layer]


# What Megatron holds. TransformerEngine puts a norm into the product that follows it, and numbers experts differently.

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(?P<a>\d+)\.)?linear_(?P<fc>fc[12])\.weight(?P<b>(?(a)|\d+))")

_Rule = Callable[[str, StudentShape, Place], Held]


def _rules(shape: StudentShape, layer: int) -> dict[str, _Rule]:
    """By the name of a parameter inside its layer; experts have names of their own."""
    hidden = shape.hidden_size
    rules = {
        "input_layernorm.weight": _rule(_whole, "input_layernorm.weight", (hidden,)),
        "pre_mlp_layernorm.weight": _rule(_whole, "post_attention_layernorm.weight", (hidden,)),
    }
    names = {
        # Megatron's own: rule, and its name in transformers. Shapes are those of the transformers tensors.
        "self_attention.linear_proj.weight": (_columns, "self_attn.o_proj.weight"),
        "self_attention.linear_q_proj.weight": (_rows, "self_attn.q_proj.weight"),
        "self_attention.linear_q_down_proj.weight": (_whole, "self_attn.q_a_proj.weight"),
        "self_attention.linear_q_up_proj.weight": (_rows, "self_attn.q_b_proj.weight"),
        "self_attention.linear_kv_down_proj.weight": (_whole, "self_attn.kv_a_proj_with_mqa.weight"),
        "self_attention.linear_kv_up_proj.weight": (_rows, "self_attn.kv_b_proj.weight"),
        "self_attention.kv_layernorm.weight": (_whole, "self_attn.kv_a_layernorm.weight"),
        "self_attention.k_layernorm.weight": (_whole, "self_attn.k_norm.weight"),
        # One name for two things.
        "self_attention.q_layernorm.weight": (
            _whole,
            "self_attn.q_norm.weight" if shape.latent is None else "self_attn.q_a_layernorm.weight",
        ),
        "mlp.linear_fc2.weight": (_columns, "mlp.down_proj.weight"),
        "mlp.router.weight": (_whole, "mlp.gate.weight"),
        ROUTER_BIAS: (_whole, HF_ROUTER_BIAS),
        "mlp.shared_experts.linear_fc2.weight": (_columns, "mlp.shared_experts.down_proj.weight"),
    }
    sizes = dict(_hf_layer(shape, layer))
    rules |= {ours: _rule(kind, theirs, sizes[theirs]) for ours, (kind, theirs) in names.items() if theirs in sizes}
    if shape.latent is None:
        rules["self_attention.linear_qkv.weight"] = _qkv
    for network in ("mlp", "mlp.shared_experts"):
        if (size := sizes.get(f"{network}.gate_proj.weight")) is not None:
            rules[f"{network}.linear_fc1.weight"] = _rule(_gate_up, network, size)
    return rules


def _rule(kind: Callable[[str, tuple[int, ...], Place], Held], name: str, size: tuple[int, ...]) -> _Rule:
    return lambda prefix, shape, place: kind(prefix + name, size, place)


def _whole(name: str, size: tuple[int, ...], place: Place) -> Held:
    everything = tuple(slice(0, n) for n in size)
    return Held((Piece(name, everything, everything),), size, is_sharded=False, is_expert=False)


def _rows(name: str, size: tuple[int, ...], place: Place) -> Held:
    rows, columns = size
    mine = _share(rows, place)
    num_rows = mine.stop - mine.start
    piece = Piece(name, (mine, slice(0, columns)), (slice(0, num_rows), slice(0, columns)))
    return Held((piece,), (num_rows, columns), is_sharded=True, is_expert=False)


def _columns(name: str, size: tuple[int, ...], place: Place) -> Held:
    rows, columns = size
    mine = _share(columns, place)
    num_columns = mine.stop - mine.start
    piece = Piece(name, (slice(0, rows), mine), (slice(0, rows), slice(0, num_columns)))
    return Held((piece,), (rows, num_columns), is_sharded=True, is_expert=False)


def _vocabulary(name: str, shape: StudentShape, place: Place) -> Held:
    columns = slice(0, shape.hidden_size)
    mine = _share(shape.padded_vocab_size(place.tensor_size), place)
    stop = min(mine.stop, shape.vocab_size)
    pieces: tuple[Piece, ...] = ()
    if stop > mine.start:
        pieces = (Piece(name, (slice(mine.start, stop), columns), (slice(0, stop - mine.start), columns)),)
    return Held(pieces, (mine.stop - mine.start, shape.hidden_size), is_sharded=True, is_expert=False)


def _gate_up(network: str, size: tuple[int, ...], place: Place) -> Held:
    rows, width = size
    mine, columns = _share(rows, place), slice(0, width)
    num_rows = mine.stop - mine.start
    pieces = tuple(
        Piece(f"{network}.{name}.weight", (mine, columns), (slice(i * num_rows, (i + 1) * num_rows), columns))
        for i, name in enumerate(("gate_proj", "up_proj"))
    )
    return Held(pieces, (2 * num_rows, width), is_sharded=True, is_expert=False)


def _qkv(prefix: str, shape: StudentShape, place: Place) -> Held:
    dim, columns = shape.head_dim, slice(0, shape.hidden_size)
    queries = shape.num_heads // shape.num_kv_heads * dim
    groups = _share(shape.num_kv_heads, place)
    pieces: list[Piece] = []
    end = 0
    for group in range(groups.start, groups.stop):
        for name, num_rows in (("q_proj", queries), ("k_proj", dim), ("v_proj", dim)):
            there = (slice(group * num_rows, (group + 1) * num_rows), columns)
            here = (slice(end, end + num_rows), columns)
            pieces.append(Piece(f"{prefix}self_attn.{name}.weight", there, here))
            end += num_rows
    return Held(tuple(pieces), (end, shape.hidden_size), is_sharded=True, is_expert=False)


def _expert(prefix: str, linear: str, number: int, shape: StudentShape, place: Place) -> Held:
    """``number``: among the experts of this rank."""
    experts = shape.experts
    assert experts is not None
    here_experts = _part(experts.num_experts, place.expert_rank, place.expert_size)
    expert = slice(here_experts.start + number, here_experts.start + number + 1)
    hidden, width = shape.hidden_size, experts.ffn_size
    if linear == "linear_fc2":
        rows, columns = slice(0, hidden), slice(0, width)
        piece = Piece(f"{prefix}mlp.experts.down_proj", (expert, rows, columns), (rows, columns))
        return Held((piece,), (hidden, width), is_sharded=False, is_expert=True)
    # Two pieces of one tensor: in a checkpoint they are two tensors.
    pieces = tuple(
        Piece(f"{prefix}mlp.experts.gate_up_proj", (expert, rows, slice(0, hidden)), (rows, slice(0, hidden)))
        for rows in (slice(0, width), slice(width, 2 * width))
    )
    return Held(pieces, (2 * width, hidden), is_sharded=False, is_expert=True)


def _share(size: int, place: Place) -> slice:
    return _part(size, place.tensor_rank, place.tensor_size)


def _part(size: int, rank: int, num_ranks: int) -> slice:
    assert size % num_ranks == 0, f"{size} does not divide by {num_ranks}: the layout was not checked"
    return slice(size // num_ranks * rank, size // num_ranks * (rank + 1))
