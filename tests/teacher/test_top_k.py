"""The k largest are the same ones in the same order every time, however many values are equal, on every device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teacher import top_k
from teacher.top_k import top_k_by_id

BOTH_WAYS = pytest.mark.parametrize("way", [top_k._by_threshold, top_k._by_sorting])


def check(way: Callable[[Tensor, int], tuple[Tensor, Tensor]], values_RV: Tensor, k: int) -> None:
    top, ids = way(values_RV, k)

    expected = np.argsort(-values_RV.numpy(), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_array_equal(top.numpy(), np.take_along_axis(values_RV.numpy(), expected, 1))


@BOTH_WAYS
@given(
    rows=st.integers(1, 3),
    values=st.lists(st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 1.0, 2.0]), min_size=90, max_size=90),
    k=st.integers(1, 90),
)
def test_equal_values_are_taken_and_ordered_by_id(
    way: Callable[[Tensor, int], tuple[Tensor, Tensor]], rows: int, values: list[float], k: int
) -> None:
    # Few different values in 90 columns: ties everywhere, also more than the room that is kept for them.
    check(way, torch.tensor([values[n:] + values[:n] for n in range(rows)], dtype=torch.float32), k)


@BOTH_WAYS
@pytest.mark.parametrize("k", [1, 7, 300, 2000])
def test_half_precision_logits_of_a_large_vocabulary(
    way: Callable[[Tensor, int], tuple[Tensor, Tensor]], k: int
) -> None:
    values_RV = torch.randn(9, 2000, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    check(way, values_RV, k)


@pytest.mark.parametrize("num_nan", [1, 5])
def test_a_nan_anywhere_in_a_row_is_seen_in_its_result(num_nan: int) -> None:
    values_RV = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    values_RV[1, 10 : 10 + num_nan] = torch.nan

    _, top = top_k_by_id(values_RV, 3)

    assert top.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.gpu
def test_the_gpu_names_the_same_ids() -> None:
    values_RV = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2)).bfloat16().float()

    ids, top = top_k_by_id(values_RV.cuda(), 40)

    expected_ids, expected = top_k_by_id(values_RV, 40)
    torch.testing.assert_close(ids.cpu(), expected_ids, rtol=0, atol=0)
    torch.testing.assert_close(top.cpu(), expected, rtol=0, atol=0)
