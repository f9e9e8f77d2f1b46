"""What every row kernel must do, asked of the Triton one: by the interpreter on CPU, on a card where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.rows import Reduced
from tests.ops.triton_devices import INTERPRETED, on_each_device

from ops.triton_rows import Shape, TritonRows  # isort: skip  # the line above skips this file where there is no triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One unit in the last place for two-byte results, of bfloat16 half a one: a card rounds, the interpreter cuts off.
TOLERANCE = {torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}

few = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True, kw_only=True)
class Rows:
    logits: Tensor
    """[B, W], each row contiguous."""
    ids: Tensor
    """[B, C]"""
    num_columns: int

    def to(self, device: str) -> Rows:
        stride = self.logits.stride(0)
        whole = torch.empty((self.logits.shape[0], stride), dtype=self.logits.dtype, device=device)
        logits = whole[:, : self.logits.shape[1]]
        logits.copy_(self.logits)
        return Rows(logits=logits, ids=self.ids.to(device), num_columns=self.num_columns)


def make_rows(
    *,
    num_rows: int = 2,
    num_columns: int = 300,
    num_padded: int = 0,
    num_ids: int = 5,
    num_absent: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    masked: float = 0.0,
    gap: int = 0,
    seed: int = 0,
) -> Rows:
    """Random rows: ``masked`` is the share of −inf; the padding and the ``gap`` between rows hold NaN."""
    random = torch.Generator().manual_seed(seed)
    width = num_columns + num_padded
    whole = torch.full((num_rows, width + gap), torch.nan)
    z = torch.randn(num_rows, num_columns, generator=random) * scale
    whole[:, :num_columns] = z.masked_fill(torch.rand(z.shape, generator=random) < masked, -torch.inf)
    ids = torch.stack([torch.randperm(num_columns, generator=random)[:num_ids] for _ in range(num_rows)])
    ids[:, ids.shape[1] - num_absent :] = -1
    return Rows(logits=whole.to(dtype)[:, :width], ids=ids, num_columns=num_columns)


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    num_columns = draw(st.integers(1, 400))
    num_ids = draw(st.integers(1, min(num_columns, 70)))
    return make_rows(
        num_rows=draw(st.integers(1, 3)),
        num_columns=num_columns,
        num_padded=draw(st.sampled_from((0, 1, 7, 64))),
        num_ids=num_ids,
        num_absent=draw(st.integers(0, num_ids)),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from((0.0, 1.0, 30.0, 1e4))),
        masked=draw(st.sampled_from((0.0, 0.1, 1.0))),
        gap=draw(st.sampled_from((0, 3, 16))),
        seed=draw(st.integers(0, 1000)),
    )


def kernel(*, block: int = 128, ahead: bool = True, splits: int = 1) -> TritonRows:
    """Small tiles, so that short rows have several."""
    return TritonRows(
        reduce=Shape(block=block, num_warps=4, ahead=ahead),
        expand=Shape(block=block, num_warps=4),
        programs_per_processor=splits,
    )


def tail_of(rows: Rows) -> Tensor:
    """[B, num_columns] float64, −inf at the support."""
    tail = rows.logits[:, : rows.num_columns].double()
    for row, ids in zip(tail, rows.ids.tolist(), strict=True):
        row[[i for i in ids if i >= 0]] = -torch.inf
    return tail


def reduced_by_definition(rows: Rows, k: int) -> Reduced:
    z, tail = rows.logits[:, : rows.num_columns].double(), tail_of(rows)
    support = torch.where(rows.ids >= 0, z.gather(1, rows.ids.clamp(min=0)), -torch.inf)
    highest = tail.amax(dim=1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    largest = torch.nn.functional.pad(tail, (0, k), value=-torch.inf).topk(k, dim=1).values
    return Reduced(
        support_logits=support,
        tail_max=highest,
        tail_sum=(tail - shift.unsqueeze(1)).exp().sum(dim=1),
        largest=largest,
    )


def check_reduce(found: Reduced, rows: Rows, k: int) -> None:
    expected = reduced_by_definition(rows, k)
    # These three are numbers of the row, nothing is computed.
    assert torch.equal(found.support_logits.double(), expected.support_logits)
    assert torch.equal(found.tail_max.double(), expected.tail_max)
    assert torch.equal(found.largest.sort(dim=1, descending=True).values.double(), expected.largest)
    torch.testing.assert_close(found.tail_sum.double(), expected.tail_sum, rtol=1e-5, atol=0.0)


def check_expand(kernel: TritonRows, rows: Rows, *, in_place: bool) -> None:
    random = torch.Generator().manual_seed(1)
    tail = tail_of(rows)
    highest = tail.amax(dim=1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0).float()
    scale = torch.randn(len(shift), generator=random).to(shift.device)
    given_gradient = torch.randn(rows.ids.shape, generator=random).to(shift.device)
    expected = (tail - shift.double().unsqueeze(1)).exp() * scale.double().unsqueeze(1)
    for row, ids, values in zip(expected, rows.ids.tolist(), given_gradient.double(), strict=True):
        for i, value in zip(ids, values, strict=True):
            if i >= 0:
                row[i] = value
    logits = rows.logits
    out = logits if in_place else torch.full_like(logits, torch.nan)
    before = None if in_place else logits.clone()

    with np.errstate(over="ignore", invalid="ignore"):  # the tail's formula at the support, which is written over
        kernel.expand(
            out,
            logits,
            rows.ids,
            num_columns=rows.num_columns,
            tail_shift=shift,
            tail_scale=scale,
            support_gradient=given_gradient.masked_fill(rows.ids < 0, torch.nan),
        )

    found = out[:, : rows.num_columns].double()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[out.dtype], atol=2.0**-24)
    assert not out[:, rows.num_columns :].any()  # NaN counts as any
    if before is not None:
        torch.testing.assert_close(logits, before, rtol=0.0, atol=0.0, equal_nan=True)


@on_each_device
@few
@given(rows=any_rows(), k=st.sampled_from((0, 1, 5, 64)), ahead=st.booleans(), splits=st.integers(1, 7), data=st.data())
def test_rows_are_reduced_by_definition(
    device: str, rows: Rows, k: int, ahead: bool, splits: int, data: st.DataObject
) -> None:
    rows = rows.to(device)
    before = rows.logits.clone()

    found = kernel(ahead=ahead, splits=splits).reduce(rows.logits, rows.ids, num_columns=rows.num_columns, k=k)

    check_reduce(found, rows, k)
    torch.testing.assert_close(rows.logits, before, rtol=0.0, atol=0.0, equal_nan=True)


@on_each_device
@few
@given(rows=any_rows(), in_place=st.booleans(), splits=st.integers(1, 7))
def test_rows_are_expanded_by_definition(device: str, rows: Rows, in_place: bool, splits: int) -> None:
    check_expand(kernel(splits=splits), rows.to(device), in_place=in_place)


@on_each_device
@pytest.mark.parametrize("ids", [[0], [255], [127, 128], [0, 255, 256], [128, 129, 130, 131], list(range(100, 257))])
@pytest.mark.parametrize("splits", [1, 3])
def test_ids_at_the_borders_of_tiles_and_rows_are_met_once(device: str, ids: list[int], splits: int) -> None:
    rows = make_rows(num_columns=257)
    rows = Rows(logits=rows.logits, ids=torch.tensor([ids, ids[::-1]]), num_columns=257).to(device)

    check_reduce(kernel(splits=splits).reduce(rows.logits, rows.ids, num_columns=257, k=3), rows, 3)
    check_expand(kernel(splits=splits), rows, in_place=False)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tail_of_nothing_has_no_largest_and_no_sum(device: str, dtype: torch.dtype) -> None:
    rows = make_rows(num_columns=40, num_ids=40, num_padded=24, dtype=dtype).to(device)

    found = kernel().reduce(rows.logits, rows.ids, num_columns=40, k=4)

    assert (found.tail_max == -torch.inf).all()
    assert (found.tail_sum == 0.0).all()
    assert (found.largest == -torch.inf).all()


@on_each_device
def test_a_tail_far_below_the_support_keeps_its_digits(device: str) -> None:
    """Σ over all minus Σ over the support would have none of them."""
    rows = make_rows(num_columns=300, num_ids=8)
    rows.logits[0, rows.ids[0]] += 60.0
    rows = rows.to(device)

    check_reduce(kernel().reduce(rows.logits, rows.ids, num_columns=300, k=8), rows, 8)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_equal_logits_count_as_often_as_they_occur(device: str, dtype: torch.dtype, k: int) -> None:
    rows = make_rows(num_columns=300, dtype=dtype)
    rows.logits.copy_((rows.logits.float() / 2).round())  # about a dozen values, −0 among them
    rows = rows.to(device)

    check_reduce(kernel().reduce(rows.logits, rows.ids, num_columns=300, k=k), rows, k)


@on_each_device
def test_more_largest_than_there_are_columns(device: str) -> None:
    rows = make_rows(num_columns=50).to(device)

    check_reduce(kernel().reduce(rows.logits, rows.ids, num_columns=50, k=80), rows, 80)


@on_each_device
def test_no_rows_are_no_work(device: str) -> None:
    logits, ids = torch.empty(0, 64, device=device), torch.empty(0, 3, dtype=torch.int64, device=device)

    found = kernel().reduce(logits, ids, num_columns=64, k=2)

    assert found.support_logits.shape == (0, 3)
    assert found.tail_max.shape == found.tail_sum.shape == (0,)
    assert found.largest.shape == (0, 2)


@on_each_device
def test_a_vocabulary_with_many_ids_and_the_tiles_that_are_used(device: str) -> None:
    rows = make_rows(num_rows=1, num_columns=9000, num_padded=8, num_ids=65, dtype=torch.bfloat16).to(device)
    used = TritonRows()

    check_reduce(used.reduce(rows.logits, rows.ids, num_columns=9000, k=64), rows, 64)
    check_expand(used, rows, in_place=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 1024])
def test_rows_of_a_real_vocabulary(dtype: torch.dtype, k: int) -> None:
    rows = make_rows(num_rows=64, num_columns=151_669, num_padded=267, num_ids=k + 1, num_absent=3, dtype=dtype)
    rows = rows.to("cuda")
    used = TritonRows()

    check_reduce(used.reduce(rows.logits, rows.ids, num_columns=rows.num_columns, k=k), rows, k)
    check_expand(used, rows, in_place=False)
    check_expand(used, rows, in_place=True)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits() -> None:
    num_rows, width = 16_384, 151_936
    logits = torch.empty(num_rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(width, (num_rows, 1), device="cuda")
    used = TritonRows()

    found = used.reduce(logits, ids, num_columns=width, k=4)

    last = slice(num_rows - 2, num_rows)
    rows = Rows(logits=logits[last], ids=ids[last], num_columns=width)
    at_the_end = Reduced(
        support_logits=found.support_logits[last],
        tail_max=found.tail_max[last],
        tail_sum=found.tail_sum[last],
        largest=found.largest[last],
    )
    check_reduce(at_the_end, rows, 4)
    expected = (tail_of(rows) - at_the_end.tail_max.double().unsqueeze(1)).exp()
    used.expand(
        logits,
        logits,
        ids,
        num_columns=width,
        tail_shift=found.tail_max,
        tail_scale=torch.ones_like(found.tail_max),
        support_gradient=torch.zeros_like(found.support_logits),
    )
    torch.testing.assert_close(logits[last].double(), expected, rtol=2**-8, atol=1e-9)
