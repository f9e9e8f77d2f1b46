"""How much arithmetic a step asks of the model, and how much a device could do: what the MFU is made of.

Counted is what the model needs: products of matrices, forward once and backward twice as much; padding, recomputation,
norms and the optimizer are not.

    D hidden size      H heads      G heads of keys and values      d width of a head      F width of a network
    V vocabulary      E experts, k of them asked
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.training.megatron_student import Experts, LatentAttention, StudentShape

# Dense bfloat16, TFLOP/s, from NVIDIA's data sheets; the longest name that fits counts.
_PEAKS = {
    "A100": 312.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L4": 121.0,
    "L40S": 362.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "B200": 2250.0,
    "GB200": 2500.0,
}


def peak_tflops() -> float | None:
    """Of this rank's device; None on CPU, and for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().split()
    name = " ".join(word for word in words if word not in ("NVIDIA", "Tesla"))
    fits = [known for known in _PEAKS if f" {known} " in f" {name.replace('-', ' ')} "]
    return _PEAKS[max(fits, key=len)] if fits else None


def training_flops(shape: StudentShape, lengths: Sequence[int], *, num_head_rows: int) -> float:
    """Of a forward and a backward pass.

    Args:
        lengths: tokens of each sequence.
        num_head_rows: rows that are multiplied with the head.
    """
    num_tokens = sum(lengths)
    num_pairs = sum(length * (length + 1) // 2 for length in lengths)
    forward = num_tokens * sum(_layer(shape, number) for number in range(shape.num_layers))
    forward += num_pairs * shape.num_layers * _pair(shape)
    forward += num_head_rows * 2 * shape.hidden_size * shape.vocab_size
    return 3.0 * forward


def _layer(shape: StudentShape, number: int) -> int:
    """Per token, scores of attention left out."""
    has_experts = shape.experts is not None and shape.experts.in_layer[number]
    width = shape.hidden_size
    network = _experts(width, shape.experts) if has_experts and shape.experts else 6 * width * shape.ffn_size
    if shape.latent is not None:
        return network + _latent(width, shape.num_heads, shape.latent)
    return network + 4 * width * shape.head_dim * (shape.num_heads + shape.num_kv_heads)


def _experts(width: int, experts: Experts) -> int:
    """Router, the experts that are asked, the shared ones."""
    asked = experts.top_k * experts.ffn_size + (experts.shared_ffn_size or 0)
    return 2 * width * experts.num_experts + 6 * width * asked


def _latent(width: int, num_heads: int, latent: LatentAttention) -> int:
    key_width = latent.nope_dim + latent.rope_dim
    middle = latent.q_rank
    query = width * num_heads * key_width if middle is None else middle * (width + num_heads * key_width)
    key_value = width * (latent.kv_rank + latent.rope_dim)
    key_value += latent.kv_rank * num_heads * (latent.nope_dim + latent.v_dim)
    return 2 * (query + key_value + num_heads * latent.v_dim * width)


def _pair(shape: StudentShape) -> int:
    """Per query and key that it attends to: a product with the key, one with the value."""
    value_width = shape.head_dim if shape.latent is None else shape.latent.v_dim
    return 2 * shape.num_heads * (shape.head_dim + value_width)
