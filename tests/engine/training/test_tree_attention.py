from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.training.packing import pack
from engine.training.tree_attention import Tree, tree_attention, tree_of

sequences_of_few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


def run(query: Tensor, key: Tensor, value: Tensor, tree: Tree | None) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    q, k, v = leaves
    module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    out, _ = tree_attention(module, q, k, v, None, tree=tree, scaling=0.3)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), leaves))


@given(sequences=sequences_of_few_tokens, num_kv_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 100))
def test_it_is_attention_under_the_tree_mask(sequences: list[list[int]], num_kv_heads: int, seed: int) -> None:
    batch = pack(sequences)
    random = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, batch.num_tokens, 6, dtype=torch.float64, generator=random)
        for heads in (4, num_kv_heads, num_kv_heads)
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    all_keys, all_values = (leaf.repeat_interleave(4 // num_kv_heads, dim=1) for leaf in leaves[1:])
    masked = scaled_dot_product_attention(
        leaves[0], all_keys, all_values, attn_mask=torch.from_numpy(batch.mask())[None, None], scale=0.3
    ).transpose(1, 2)
    weights = torch.linspace(-1, 1, masked.numel(), dtype=torch.float64).view_as(masked)
    expected_gradients = torch.autograd.grad((masked * weights).sum(), leaves)

    out, gradients = run(query, key, value, tree_of(batch, device=torch.device("cpu")))
    torch.testing.assert_close(out, masked.detach())
    torch.testing.assert_close(gradients, list(expected_gradients))


@given(sequences=sequences_of_few_tokens)
def test_segments_cover_the_rows_in_order_and_end_where_it_branches(sequences: list[list[int]]) -> None:
    batch = pack(sequences)

    segments = tree_of(batch, device=torch.device("cpu")).segments
    assert [row for s in segments for row in range(s.start, s.end)] == list(range(batch.num_tokens))
    mask = batch.mask()
    for segment in segments:
        above = [row for i in segment.ancestors for row in range(segments[i].start, segments[i].end)]
        assert above == [row for row in range(segment.start) if mask[segment.start, row]]
    children = [sum(1 for p in batch.parent if p == row) for row in range(batch.num_tokens)]
    assert all(children[segment.end - 1] != 1 for segment in segments)


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_without_a_tree_it_is_causal(num_kv_heads: int) -> None:
    query, key = torch.randn(1, 4, 5, 6), torch.randn(1, num_kv_heads, 5, 6)

    out, _ = run(query, key, key, None)
    repeated = key.repeat_interleave(4 // num_kv_heads, dim=1)
    expected = scaled_dot_product_attention(query, repeated, repeated, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_only_inputs_and_results_are_rounded(dtype: torch.dtype, autocast: bool) -> None:
    batch = pack([[1, 2, 3, 4], [1, 2, 5], [6, 7]])
    random = torch.Generator().manual_seed(0)
    half = [torch.randn(1, heads, batch.num_tokens, 8, generator=random).to(dtype) for heads in (4, 2, 2)]
    tree = tree_of(batch, device=torch.device("cpu"))

    query, key, value = half
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out, gradients = run(query, key, value, tree)

    expected, expected_gradients = run(query.double(), key.double(), value.double(), tree)
    assert {out.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    # Half a unit in the last place of what is rounded; the gradient of the sum is rounded once before and once after.
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)
