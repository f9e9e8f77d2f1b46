"""The head in C beside its definition in float64, alone and behind ``linear_divergence``."""

from __future__ import annotations

import ctypes
import itertools
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ops.native_head
import ops.native_library
from ops import ForwardKL, Objective, TeacherScores, divergence, linear_divergence, linear_divergence_with_gradients
from ops.kernels import head_for
from ops.native_head import NativeHead, native_head
from ops.native_library import load_library
from ops.rows import Reduced
from ops.solved import blocks, largest_block
from tests.ops import on_ranks
from tests.ops.cases import OBJECTIVES, make_scores
from tests.ops.test_shards import EVERYTHING
from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """Not only ``native_head()``: where there is a compiler, these tests may not pass for want of a library."""
    load_library()
    found = native_head()
    assert found is not None
    return found


@pytest.fixture
def three_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(num_threads)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    hidden: Tensor
    """[T, D] float32."""
    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    ids: Tensor
    """[T, C]"""

    @property
    def logits(self) -> Tensor:
        """[T, V] float64."""
        z = self.hidden.double() @ self.weight.double().t()
        return z if self.bias is None else z + self.bias.double()


def make_inputs(
    *,
    num_rows: int = 20,
    width: int = 24,
    num_columns: int = 900,
    num_ids: int = 6,
    num_absent: int = 0,
    scale: float = 1.0,
    bias: bool = False,
    masked: float = 0.0,
    seed: int = 0,
) -> Inputs:
    """``masked``: share of columns whose bias is −inf."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight, offsets = (
        torch.randn(shape, generator=random) for shape in ((num_rows, width), (num_columns, width), (num_columns,))
    )
    ids = torch.stack([torch.randperm(num_columns, generator=random)[:num_ids] for _ in range(num_rows)])
    ids[:, num_ids - num_absent :] = -1
    offsets = offsets.masked_fill(torch.rand(num_columns, generator=random) < masked, -torch.inf)
    return Inputs(hidden=hidden * scale / width**0.5, weight=weight, bias=offsets if bias or masked else None, ids=ids)


@st.composite
def any_inputs(draw: st.DrawFn) -> Inputs:
    num_columns = draw(st.one_of(st.integers(1, 70), st.sampled_from((255, 256, 257, 777, 1024))))
    num_ids = draw(st.integers(1, min(num_columns, 20)))
    return make_inputs(
        num_rows=draw(st.integers(1, 70)),
        width=draw(st.one_of(st.integers(1, 70), st.sampled_from((256, 300, 513)))),
        num_columns=num_columns,
        num_ids=num_ids,
        num_absent=draw(st.integers(0, num_ids)),
        scale=draw(st.sampled_from((0.0, 1.0, 30.0))),
        bias=draw(st.booleans()),
        masked=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        seed=draw(st.integers(0, 1000)),
    )


@dataclass(frozen=True, kw_only=True)
class Passed:
    reduced: list[Reduced]
    hidden_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor | None


def run(library: ctypes.CDLL, inputs: Inputs, *, block_rows: int, k: int, shift: Tensor, scale: Tensor) -> Passed:
    """All blocks, with a gradient of scale · exp(z − shift) on the tail and of ones on the support."""
    hidden_grad = torch.full_like(inputs.hidden, torch.nan)
    weight_grad = torch.ones_like(inputs.weight)
    bias_grad = None if inputs.bias is None else torch.ones_like(inputs.bias)
    num_rows, num_columns = len(inputs.hidden), len(inputs.weight)
    head = NativeHead(
        library,
        inputs.weight,
        inputs.bias,
        num_rows=largest_block(num_rows, block_rows),
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )
    reduced = []
    for start, end in blocks(num_rows, block_rows):
        ids = inputs.ids[start:end]
        block = head.block(inputs.hidden[start:end], hidden_grad[start:end])
        reduced.append(block.reduce(block.logits, ids, num_columns=num_columns, k=k))
        torch.testing.assert_close(block.logits.double(), inputs.logits[start:end], rtol=2e-5, atol=2e-4)
        block.expand(
            block.logits,
            block.logits,
            ids,
            num_columns=num_columns,
            tail_shift=shift[start:end],
            tail_scale=scale[start:end],
            support_gradient=torch.ones(ids.shape).masked_fill(ids < 0, torch.nan),
        )
    head.end()
    return Passed(reduced=reduced, hidden_grad=hidden_grad, weight_grad=weight_grad, bias_grad=bias_grad)


def check(library: ctypes.CDLL, inputs: Inputs, *, block_rows: int, k: int) -> None:
    z = inputs.logits
    is_support = torch.zeros_like(z, dtype=torch.bool)
    for row, ids in zip(is_support, inputs.ids.tolist(), strict=True):
        row[[i for i in ids if i >= 0]] = True
    tail = z.masked_fill(is_support, -torch.inf)
    highest = tail.amax(dim=1)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    scale = torch.linspace(-1.0, 1.0, len(z))

    found = run(library, inputs, block_rows=block_rows, k=k, shift=shift.float(), scale=scale)

    gradient = torch.where(is_support, 1.0, (tail - shift.unsqueeze(1)).exp() * scale.double().unsqueeze(1))
    far = 1e-4 * max(1.0, len(inputs.weight) ** 0.5)
    torch.testing.assert_close(found.hidden_grad.double(), gradient @ inputs.weight.double(), rtol=1e-4, atol=far)
    torch.testing.assert_close(
        found.weight_grad.double(), gradient.t() @ inputs.hidden.double() + 1.0, rtol=1e-4, atol=far
    )
    if found.bias_grad is not None:
        torch.testing.assert_close(found.bias_grad.double(), gradient.sum(dim=0) + 1.0, rtol=1e-4, atol=far)
    for (start, end), reduced in zip(blocks(len(z), block_rows), found.reduced, strict=True):
        rows, ids = slice(start, end), inputs.ids[start:end]
        support = torch.where(ids >= 0, z[rows].gather(1, ids.clamp(min=0)), -torch.inf)
        torch.testing.assert_close(reduced.support_logits.double(), support, rtol=2e-5, atol=2e-4)
        torch.testing.assert_close(reduced.tail_max.double(), highest[rows], rtol=2e-5, atol=2e-4)
        lse, expected = (
            total.double().log() + most.double()
            for total, most in ((reduced.tail_sum, reduced.tail_max), (_sum(tail[rows], shift[rows]), shift[rows]))
        )
        is_there = expected > -torch.inf
        torch.testing.assert_close(lse[is_there], expected[is_there], rtol=2e-5, atol=2e-4)
        assert not reduced.tail_sum[~is_there].any()
        check_largest(reduced, tail[rows], k)


def check_largest(reduced: Reduced, tail: Tensor, k: int) -> None:
    """Numbers of the tail among the row's k largest; below these, none that would make a rank of k or less wrong."""
    for support, largest, others in zip(reduced.support_logits.double(), reduced.largest.double(), tail, strict=True):
        both = torch.cat((support, others))
        for bound in support[support > -torch.inf]:
            fewest, most = (int((both > bound + gap).sum()) for gap in (1e-3, -1e-3))
            found = int((torch.cat((support, largest)) > bound).sum())
            assert min(fewest, k) <= found
            assert found <= most or min(fewest, k) == k


def _sum(tail: Tensor, shift: Tensor) -> Tensor:
    return (tail - shift.unsqueeze(1)).exp().sum(dim=1)


@given(inputs=any_inputs(), block_rows=st.sampled_from((7, 16, 48, 100)), k=st.sampled_from((0, 1, 5, 64)))
def test_blocks_of_a_head_are_reduced_and_passed_on_by_definition(
    library: ctypes.CDLL, inputs: Inputs, block_rows: int, k: int
) -> None:
    check(library, inputs, block_rows=block_rows, k=k)


@pytest.mark.usefixtures("three_threads")
def test_several_threads_do_what_one_does_and_the_same_each_time(library: ctypes.CDLL) -> None:
    inputs = make_inputs(num_rows=150, width=64, num_columns=20_000, num_ids=9, bias=True)
    shift, scale = torch.full((150,), 3.0), torch.ones(150)

    check(library, inputs, block_rows=64, k=8)
    one, other = (run(library, inputs, block_rows=64, k=8, shift=shift, scale=scale) for _ in range(2))
    assert torch.equal(one.hidden_grad, other.hidden_grad)
    assert torch.equal(one.weight_grad, other.weight_grad)


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("cc") is None, reason="compiles for older x86")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_shorter_vectors_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    """Also those of a processor that is not this one."""
    if processor == "haswell" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    options = [o for o in ops.native_library._OPTIONS if not o.startswith("-march")]
    source, built = Path(ops.native_head.__file__).with_suffix(".c"), tmp_path / "head.so"
    subprocess.run(["cc", *options, f"-march={processor}", source, "-o", built, "-lm"], check=True)
    monkeypatch.setattr(ops.native_head, "native_library", lambda: ctypes.CDLL(str(built)))

    short = native_head.__wrapped__()

    assert short is not None
    assert short.head_lanes() < 16
    check(short, make_inputs(num_rows=37, num_columns=777, width=300, bias=True), block_rows=16, k=5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 700, 899])
def test_what_is_not_a_number_is_seen_in_value_and_gradient(library: ctypes.CDLL, wrong: float, column: int) -> None:
    inputs = make_inputs(num_ids=1)
    inputs.ids[:] = 5
    inputs.hidden[:, 0] = 0.0
    inputs.hidden[3, 0] = 1.0
    inputs.weight[column, 0] = wrong
    head = NativeHead(library, inputs.weight, None, num_rows=20)
    block = head.block(inputs.hidden[:4], None)

    found = block.reduce(block.logits, inputs.ids[:4], num_columns=900, k=4)

    assert found.tail_sum[3].isnan()
    assert found.tail_max[3].isnan()
    assert found.largest[3].isnan().all()


def test_it_is_the_head_of_the_cpu_in_float32_alone(library: ctypes.CDLL) -> None:
    def chosen(hidden: Tensor, weight: Tensor) -> NativeHead | None:
        return head_for(
            hidden,
            weight,
            None,
            hidden_grad=None,
            weight_grad=None,
            bias_grad=None,
            num_rows=len(hidden),
            workspace=None,
        )

    hidden, weight = torch.zeros(40, 3), torch.zeros(5, 3)
    assert chosen(hidden, weight) is not None
    assert chosen(hidden.double(), weight.double()) is None
    assert chosen(hidden.bfloat16(), weight.bfloat16()) is None
    assert chosen(hidden, torch.zeros(3, 5).t()) is None
    assert chosen(hidden[:3], weight) is None
    assert chosen(torch.zeros(40, 2**20), torch.zeros(5, 2**20)) is None


def test_a_library_that_computes_something_else_is_not_used(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(self: Tensor, other: Tensor) -> Tensor:
        return honest(self, other) * 1.01

    honest = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", wrong)
    with caplog.at_level(logging.WARNING):
        assert native_head.__wrapped__() is None
    assert "computes another result" in caplog.text


V, D = 331, 24


@dataclass(frozen=True, kw_only=True)
class Student:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    scores: TeacherScores


def make_student(*, num_rows: int = 75, top_k: int = 9, scale: float = 1.0, seed: int = 0) -> Student:
    random = torch.Generator().manual_seed(seed)
    hidden, weight, bias, noise = (
        torch.randn(shape, generator=random) for shape in ((num_rows, D), (V, D), (V,), (num_rows, V))
    )
    hidden = hidden * scale
    logits = torch.addmm(bias, hidden, weight.t())
    scores = make_scores((logits + noise).double().log_softmax(dim=1), top_k, student=logits.double(), seed=seed)
    return Student(hidden=hidden, weight=weight, bias=bias, scores=scores)


def check_student(student: Student, objective: Objective, **options: Any) -> None:
    """Values, metrics and gradients beside those of the whole logits in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in (student.hidden, student.weight, student.bias)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    random = torch.Generator().manual_seed(1)
    above = torch.rand(len(student.hidden), generator=random)
    found = linear_divergence(objective, leaves[0], leaves[1], student.scores, leaves[2], block_rows=48, **options)
    expected = divergence(objective, torch.addmm(exact[2], exact[0], exact[1].t()), student.scores, **options)
    torch.testing.assert_close(found.values.double(), expected.values, rtol=2e-4, atol=2e-5)
    for name, metric in found.metrics.items():
        torch.testing.assert_close(metric.double(), expected.metrics[name], rtol=2e-4, atol=2e-5)
    for weights in (torch.ones_like(above), above):
        gradients = torch.autograd.grad(found.values, leaves, weights, retain_graph=True)
        references = torch.autograd.grad(expected.values, exact, weights.double(), retain_graph=True)
        for gradient, reference in zip(gradients, references, strict=True):
            error = (gradient.double() - reference).norm() / reference.norm().clamp(min=1e-6)
            assert error < 1e-4
    assert torch.equal(leaves[0], student.hidden)
    assert torch.equal(leaves[1], student.weight)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective_is_that_of_the_whole_logits(library: ctypes.CDLL, objective: Objective) -> None:
    for seed in (0, 1):  # with the student's ids named, and without
        check_student(make_student(seed=seed), objective)


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 300},
        {"temperature": 1.7, "square_temperature": True},
        {"clamp": 0.05, "token_weights": torch.linspace(0.0, 2.0, 75)},
    ],
    ids=str,
)
def test_options_are_those_of_the_whole_logits(library: ctypes.CDLL, options: dict[str, Any]) -> None:
    student = make_student()
    if "vocab_size" in options:
        student.weight[300:] = 1e3  # padding may hold anything
        student.scores.top_ids.clamp_(max=299)
        first = torch.arange(9).expand(75, 9)
        student = Student(
            hidden=student.hidden,
            weight=student.weight,
            bias=student.bias,
            scores=TeacherScores(
                top_ids=first,
                top_logprobs=student.scores.top_logprobs,
                sampled_ids=torch.full((75,), 299),
                sampled_logprobs=torch.full((75,), -9.0),
            ),
        )
    check_student(student, ForwardKL(), **options)


@pytest.mark.parametrize("top_k", [1, V])
def test_one_column_or_all_may_be_the_support(library: ctypes.CDLL, top_k: int) -> None:
    check_student(make_student(top_k=top_k), ForwardKL())


def test_extreme_logits_stay_finite(library: ctypes.CDLL) -> None:
    student = make_student(scale=3e3)
    hidden_grad, weight_grad = torch.empty_like(student.hidden), torch.zeros_like(student.weight)

    out = linear_divergence_with_gradients(
        ForwardKL(),
        student.hidden,
        student.weight,
        student.scores,
        student.bias,
        hidden_grad=hidden_grad,
        head_grad=weight_grad,
        block_rows=48,
    )

    assert out.values.isfinite().all()
    assert hidden_grad.isfinite().all()
    assert weight_grad.isfinite().all()


def test_a_workspace_holds_the_block_and_changes_nothing(library: ctypes.CDLL) -> None:
    student = make_student()

    def gradients(**options: Any) -> list[Tensor]:
        buffers = [torch.empty_like(student.hidden), torch.zeros_like(student.weight)]
        out = linear_divergence_with_gradients(
            ForwardKL(),
            student.hidden,
            student.weight,
            student.scores,
            hidden_grad=buffers[0],
            head_grad=buffers[1],
            **options,
        )
        return [out.values, *buffers]

    workspace = torch.full((48, V), torch.nan)
    found, expected = gradients(workspace=workspace), gradients(block_rows=48)

    assert not workspace.isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(num_rows=st.integers(0, 3000), block_rows=st.integers(1, 600))
def test_blocks_follow_each_other_as_even_as_can_be(num_rows: int, block_rows: int) -> None:
    found = list(blocks(num_rows, block_rows))
    sizes = [end - start for start, end in found]

    assert sum(sizes) == num_rows
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(found))
    assert max(sizes, default=0) == largest_block(num_rows, block_rows) <= block_rows
    assert all(size > 0 for size in sizes)
    if len(sizes) > 1:
        assert max(sizes[:-1]) - min(sizes[:-1]) <= 16
        assert block_rows < 16 or block_rows % 16 or not any(size % 16 for size in sizes[:-1])


@pytest.mark.parametrize("objective", [ForwardKL(), EVERYTHING], ids=repr)
def test_a_head_split_over_ranks_is_the_whole_one(library: ctypes.CDLL, ranks: Ranks, objective: Objective) -> None:
    student = make_student()
    leaves = [tensor.clone().requires_grad_() for tensor in (student.hidden, student.weight, student.bias)]
    whole = linear_divergence(objective, leaves[0], leaves[1], student.scores, leaves[2])
    hidden_grad, head_grad, bias_grad = torch.autograd.grad(whole.values.sum(), leaves)

    parts = ranks.run(
        on_ranks.solve_linear, 3, objective, *(leaf.detach() for leaf in leaves), student.scores, [111, 110, 110],
        {"block_rows": 48},
    )  # fmt: skip

    for part in parts:
        torch.testing.assert_close(part.values, whole.values.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.hidden_grad, hidden_grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part.head_grad for part in parts]), head_grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part.bias_grad for part in parts]), bias_grad, rtol=1e-4, atol=1e-5)
