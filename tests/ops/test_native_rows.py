"""The row kernel in C beside its definition in float64, and what happens where it cannot be built."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import ForwardKL, divergence, reference_divergence
from ops.counting import count_larger
from ops.kernels import kernel_for
from ops.native_library import load_library
from ops.native_rows import NativeRows, native_rows
from ops.rows import Reduced
from ops.torch_rows import TorchRows
from tests.ops.cases import make_case

SEGMENT, BLOCK = 512, 2048
"""Columns; of ``native_rows.c``."""
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float16: 2**-10, torch.float64: 1e-12}
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Rows:
    logits: Tensor
    """[B, W], each row contiguous; NaN in columns that do not exist and between the rows."""
    ids: Tensor
    """[B, C]"""
    num_columns: int

    @property
    def tail(self) -> Tensor:
        """[B, num_columns] float64, −inf at the support."""
        tail = self.logits[:, : self.num_columns].to(torch.float64, copy=True)
        for row, ids in zip(tail, self.ids.tolist(), strict=True):
            row[[i for i in ids if i >= 0]] = -torch.inf
        return tail


def make_rows(
    *,
    num_rows: int = 2,
    num_columns: int = 3000,
    num_padded: int = 0,
    num_ids: int = 5,
    num_absent: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    masked: float = 0.0,
    gap: int = 0,
    seed: int = 0,
) -> Rows:
    """``masked``: share of −inf; ``gap``: elements between the rows."""
    random = torch.Generator().manual_seed(seed)
    width = num_columns + num_padded
    whole = torch.full((num_rows, width + gap), torch.nan)
    z = torch.randn(num_rows, num_columns, generator=random) * scale
    whole[:, :num_columns] = z.masked_fill(torch.rand(z.shape, generator=random) < masked, -torch.inf)
    ids = torch.stack([torch.randperm(num_columns, generator=random)[:num_ids] for _ in range(num_rows)])
    ids[:, num_ids - num_absent :] = -1
    return Rows(logits=whole.to(dtype)[:, :width], ids=ids, num_columns=num_columns)


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    near_borders = st.sampled_from((SEGMENT - 1, SEGMENT, SEGMENT + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77))
    num_columns = draw(st.one_of(st.integers(1, 200), near_borders))
    num_ids = draw(st.integers(1, min(num_columns, 70)))
    return make_rows(
        num_rows=draw(st.integers(1, 3)),
        num_columns=num_columns,
        num_padded=draw(st.sampled_from((0, 1, 7, 64))),
        num_ids=num_ids,
        num_absent=draw(st.integers(0, num_ids)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        scale=draw(st.sampled_from((0.0, 1.0, 30.0, 1e4))),
        masked=draw(st.sampled_from((0.0, 0.1, 0.99, 1.0))),
        gap=draw(st.sampled_from((0, 3, 16))),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.fixture(scope="session")
def kernel() -> NativeRows:
    """Not ``native_rows()``: where there is a compiler, these tests may not pass for want of a library."""
    load_library()
    found = native_rows()
    assert found is not None
    return found


def reduced_by_definition(rows: Rows, k: int) -> Reduced:
    z, tail = rows.logits[:, : rows.num_columns].double(), rows.tail
    highest = tail.amax(dim=1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    return Reduced(
        support_logits=torch.where(rows.ids >= 0, z.gather(1, rows.ids.clamp(min=0)), -torch.inf),
        tail_max=highest,
        tail_sum=(tail - shift.unsqueeze(1)).exp().sum(dim=1),
        largest=torch.nn.functional.pad(tail, (0, k), value=-torch.inf).topk(k, dim=1).values,
    )


def check_reduce(kernel: NativeRows, rows: Rows, k: int) -> None:
    before = rows.logits.clone()
    found = kernel.reduce(rows.logits, rows.ids, num_columns=rows.num_columns, k=k)
    expected = reduced_by_definition(rows, k)

    # These three are numbers of the row, nothing is computed.
    assert torch.equal(found.support_logits.double(), expected.support_logits)
    assert torch.equal(found.tail_max.double(), expected.tail_max)
    assert torch.equal(found.largest.sort(dim=1, descending=True).values.double(), expected.largest)
    torch.testing.assert_close(found.tail_sum.double(), expected.tail_sum, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(rows.logits, before, rtol=0.0, atol=0.0, equal_nan=True)


def check_expand(kernel: NativeRows, rows: Rows, *, in_place: bool = False) -> None:
    random = torch.Generator().manual_seed(1)
    working = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    tail = rows.tail
    highest = tail.amax(dim=1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    scale = torch.randn(len(shift), generator=random).to(working)
    support = torch.randn(rows.ids.shape, generator=random).to(working)
    expected = (tail - shift.unsqueeze(1)).exp() * scale.double().unsqueeze(1)
    for row, ids, values in zip(expected, rows.ids.tolist(), support.double(), strict=True):
        for i, value in zip(ids, values, strict=True):
            if i >= 0:
                row[i] = value
    logits = rows.logits
    out = logits if in_place else torch.full_like(logits, torch.nan)
    before = None if in_place else logits.clone()

    kernel.expand(
        out,
        logits,
        rows.ids,
        num_columns=rows.num_columns,
        tail_shift=shift.to(working),
        tail_scale=scale,
        support_gradient=support.masked_fill(rows.ids < 0, torch.nan),
    )

    found = out[:, : rows.num_columns].double()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[out.dtype], atol=2.0**-24)
    assert not out[:, rows.num_columns :].any()  # NaN counts as any
    if before is not None:
        torch.testing.assert_close(logits, before, rtol=0.0, atol=0.0, equal_nan=True)


@given(rows=any_rows(), k=st.sampled_from((0, 1, 5, 64, 5000)))
def test_rows_are_reduced_by_definition(kernel: NativeRows, rows: Rows, k: int) -> None:
    check_reduce(kernel, rows, k)


@given(rows=any_rows(), in_place=st.booleans())
def test_rows_are_expanded_by_definition(kernel: NativeRows, rows: Rows, in_place: bool) -> None:
    check_expand(kernel, rows, in_place=in_place)


@pytest.mark.parametrize("ids", [[0], [511], [511, 512], [0, 2047, 2048, 2999], list(range(400, 700)), [63, 64, 127]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_at_the_borders_of_segments_and_rows_are_met_once(
    kernel: NativeRows, ids: list[int], dtype: torch.dtype
) -> None:
    rows = replace(make_rows(dtype=dtype), ids=torch.tensor([ids, ids[::-1]]))

    check_reduce(kernel, rows, 64)
    check_expand(kernel, rows)


@pytest.mark.parametrize("k", [1, 64, 1000])
def test_the_largest_may_equal_each_other_or_lie_side_by_side(kernel: NativeRows, k: int) -> None:
    rows = make_rows(num_columns=20_000, scale=1.0)
    rows.logits[0] = rows.logits[0].round()
    rows.logits[1] = torch.arange(20_000.0)

    check_reduce(kernel, rows, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tail_of_nothing_has_no_largest_and_no_sum(kernel: NativeRows, dtype: torch.dtype) -> None:
    rows = make_rows(num_columns=40, num_ids=40, num_padded=24, dtype=dtype)

    check_reduce(kernel, rows, 4)
    check_expand(kernel, rows)


def test_a_tail_far_below_the_support_keeps_its_digits(kernel: NativeRows) -> None:
    """Σ over all minus Σ over the support would have none of them."""
    rows = make_rows(num_ids=8)
    rows.logits[0, rows.ids[0]] += 60.0

    check_reduce(kernel, rows, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_too_large_for_the_cache_is_the_same(kernel: NativeRows, dtype: torch.dtype) -> None:
    """It is written past the cache, whole lines from their borders on: one row in 32 begins at one."""
    rows = make_rows(num_rows=200, num_columns=30_001, num_padded=2, num_ids=70, dtype=dtype)

    check_expand(kernel, rows)


def test_the_exponential_is_right_to_two_units_in_the_last_place(kernel: NativeRows) -> None:
    x = -torch.cat((torch.logspace(-9, 1.94, 200_000), torch.zeros(1), torch.tensor([1e30, torch.inf]))).unsqueeze(0)
    out = torch.empty_like(x)

    kernel.expand(
        out,
        x,
        torch.full((1, 1), -1),
        num_columns=x.shape[1],
        tail_shift=torch.zeros(1),
        tail_scale=torch.ones(1),
        support_gradient=torch.zeros(1, 1),
    )

    assert out[0, -2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(out.double(), x.double().exp(), rtol=2 * 2.0**-23, atol=2.0**-126)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 700, 2999])
def test_what_is_not_a_number_is_seen_in_value_and_gradient(
    kernel: NativeRows, dtype: torch.dtype, wrong: float, column: int
) -> None:
    rows = make_rows(dtype=dtype)
    rows = replace(rows, ids=rows.ids.masked_fill(rows.ids == column, -1))
    rows.logits[1, column] = wrong

    found = kernel.reduce(rows.logits, rows.ids, num_columns=3000, k=4)
    out = torch.empty_like(rows.logits)
    kernel.expand(
        out,
        rows.logits,
        rows.ids,
        num_columns=3000,
        tail_shift=found.tail_max,
        tail_scale=torch.ones(2),
        support_gradient=torch.zeros(rows.ids.shape),
    )

    assert found.tail_sum[0].isfinite()
    assert found.tail_sum[1].isnan()
    assert out[0].isfinite().all()
    assert out[1, column].isnan()


@given(
    num=st.integers(1, 200), num_bounds=st.integers(1, 140), levels=st.sampled_from((3, 1000)), seed=st.integers(0, 99)
)
def test_larger_numbers_are_counted(kernel: NativeRows, num: int, num_bounds: int, levels: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    numbers, bounds = (torch.randint(levels, (3, n), generator=random).float() for n in (num, num_bounds))
    numbers[numbers == 1.0] = bounds[bounds == 1.0] = -torch.inf

    expected = (numbers.unsqueeze(1) > bounds.unsqueeze(2)).sum(dim=2)
    assert torch.equal(kernel.count_larger(numbers, bounds), expected)
    assert torch.equal(count_larger(numbers, bounds), expected)
    assert torch.equal(count_larger(numbers.double(), bounds.double()), expected)


def test_several_threads_do_what_one_does(kernel: NativeRows) -> None:
    rows = make_rows(num_rows=150, num_columns=30_000, num_ids=9)
    num_threads = torch.get_num_threads()
    alone = kernel.reduce(rows.logits, rows.ids, num_columns=30_000, k=5)
    try:
        torch.set_num_threads(3)
        together = kernel.reduce(rows.logits, rows.ids, num_columns=30_000, k=5)
        check_expand(kernel, rows)
    finally:
        torch.set_num_threads(num_threads)

    assert torch.equal(together.tail_sum, alone.tail_sum)
    assert torch.equal(together.support_logits, alone.support_logits)
    assert torch.equal(together.largest, alone.largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_to_torch(kernel: NativeRows, dtype: torch.dtype) -> None:
    rows = make_rows(dtype=dtype)

    check_reduce(kernel, rows, 5)
    check_expand(kernel, rows)


def test_it_is_the_kernel_of_the_cpu(kernel: NativeRows) -> None:
    assert kernel_for(CPU) is kernel


PROGRAM = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout)
from ops.kernels import kernel_for
print(type(kernel_for(torch.device("cpu"))).__name__)
print(type(kernel_for(torch.device("cpu"))).__name__)
"""


def start(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )


def output(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out


def test_processes_that_build_it_at_the_same_time_all_get_it(tmp_path: Path) -> None:
    processes = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]

    assert [output(process) for process in processes] == ["NativeRows\nNativeRows\n"] * 3
    (library,) = (tmp_path / "slipstream").iterdir()  # and nothing unfinished beside it
    assert library.suffix == ".so"


def test_without_a_compiler_torch_does_it_and_the_log_says_so_once(tmp_path: Path) -> None:
    said = output(start(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), CC=""))

    assert said.count("there is no C compiler 'cc'") == 1
    assert said.endswith("TorchRows\nTorchRows\n")


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    said = output(start(XDG_CACHE_HOME=str(tmp_path), CC="false"))

    assert "failed" in said
    assert said.endswith("TorchRows\nTorchRows\n")
    assert not list((tmp_path / "slipstream").iterdir())


def test_a_cache_that_cannot_be_written_is_a_reason_to_use_torch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = output(start(XDG_CACHE_HOME=str(tmp_path / "file")))

    assert "cannot be made or loaded" in said
    assert said.endswith("TorchRows\nTorchRows\n")


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    assert output(start(XDG_CACHE_HOME=str(tmp_path), SLIPSTREAM_NATIVE="0")) == "TorchRows\nTorchRows\n"


def test_a_library_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reduce(self: TorchRows, logits: Tensor, ids: Tensor, *, num_columns: int, k: int) -> Reduced:
        right = honest(self, logits, ids, num_columns=num_columns, k=k)
        return replace(right, tail_sum=right.tail_sum * 1.001)

    honest = TorchRows.reduce
    monkeypatch.setattr(TorchRows, "reduce", reduce)
    with caplog.at_level(logging.WARNING):
        assert native_rows.__wrapped__() is None
    assert "computes another result" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_vocabulary_has_the_values_and_gradients_of_the_definition(
    kernel: NativeRows, dtype: torch.dtype
) -> None:
    case = make_case(num_rows=4, vocab_size=5000, top_k=64)
    logits = case.logits.to(dtype).requires_grad_()
    out = divergence(ForwardKL(), logits, case.scores)
    torch.autograd.backward(out.values.sum())
    exact = logits.detach().double().requires_grad_()
    values = reference_divergence(ForwardKL(), exact, case.scores)
    torch.autograd.backward(values.sum())

    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(out.values.double(), values.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=TOLERANCE[dtype] * 2, atol=1e-7)
