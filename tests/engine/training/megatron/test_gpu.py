"""On CUDA, without TransformerEngine and over NCCL, a step is what it is on CPU. A process for each, since without CUDA
Megatron is told that the CPU is it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="the learner on Megatron is an extra"
)


def run(folder: Path, dtype: str, *options: str, on_cpu: bool) -> dict[str, Any]:
    folder.mkdir()
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    command = [sys.executable, "-m", "tests.engine.training.megatron.one_step", str(folder), dtype, *options]
    root = Path(__file__).parents[4]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = torch.load(folder / "out.pt")
    return found


def compare(found: dict[str, Any], expected: dict[str, Any], *, tolerance: float) -> None:
    for name, theirs in expected.items():
        ours = found[name]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance)
        off = {
            key: float((ours["gradients"][key] - gradient).norm() / gradient.norm())
            for key, gradient in theirs["gradients"].items()
        }
        assert max(off.values()) <= tolerance, (name, max(off, key=off.__getitem__), max(off.values()))


def test_half_precision_is_close_to_full(tmp_path: Path) -> None:
    full, half = (run(tmp_path / dtype, dtype, on_cpu=True) for dtype in ("float32", "bfloat16"))

    compare(half, full, tolerance=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_step_on_cuda_is_that_on_cpu(dtype: str, tolerance: float, tmp_path: Path) -> None:
    on_cuda = run(tmp_path / "cuda", dtype, on_cpu=False)
    assert {one["device"] for one in on_cuda.values()} == {"cuda"}

    compare(on_cuda, run(tmp_path / "cpu", "float32", on_cpu=True), tolerance=tolerance)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_and_gathers_beside_the_passes_change_no_weight(dtype: str, device: str, tmp_path: Path) -> None:
    """On CUDA over NCCL, on a stream of its own; one rank, whose sums are copies."""
    plain, overlapped = (
        run(tmp_path / f"run{number}", dtype, *options, on_cpu=device == "cpu")
        for number, options in enumerate(((), ("overlap",)))
    )

    for name, theirs in plain.items():
        ours = overlapped[name]
        assert (ours["device"], ours["num_buckets"] > 3 > theirs["num_buckets"]) == (device, True)
        for key, weight in theirs["weights"].items():
            # On CUDA a backward pass adds up in any order.
            close = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
            torch.testing.assert_close(ours["weights"][key], weight, **close)
