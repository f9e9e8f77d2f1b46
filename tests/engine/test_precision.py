from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import precision
from engine.precision import compute_dtype, is_autocast
from engine.recipe_fields import Autocast, ComputeDtype
from engine.training import model as training_model
from tests.engine.training.cases import make_step, started, weights
from tests.support.models import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def set_hardware(monkeypatch: pytest.MonkeyPatch, *, has_bfloat16: bool) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: has_bfloat16)


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_auto_is_what_the_device_is_good_at(
    device: torch.device, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hardware(monkeypatch, has_bfloat16=has_bfloat16)

    assert compute_dtype("auto", device) == (torch.bfloat16 if has_bfloat16 else torch.float32)


@pytest.mark.parametrize(
    ("name", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_dtype_that_is_named_is_taken(
    name: ComputeDtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hardware(monkeypatch, has_bfloat16=False)

    assert compute_dtype(name, CPU) == expected


@pytest.mark.parametrize(
    ("mode", "device", "has_bfloat16", "expected"),
    [
        ("auto", CPU, True, True),
        ("auto", CPU, False, False),
        ("auto", GPU, True, True),
        ("auto", GPU, False, False),
        ("gpu", CPU, True, False),
        ("gpu", GPU, True, True),
        ("gpu", GPU, False, False),
        ("off", CPU, True, False),
        ("off", GPU, True, False),
    ],
)
def test_autocast_is_for_devices_that_gain_by_it(
    mode: Autocast, device: torch.device, has_bfloat16: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hardware(monkeypatch, has_bfloat16=has_bfloat16)

    assert is_autocast(mode, device) is expected


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_autocast_changes_gradients_by_rounding_only_and_measurements_not_at_all(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path)
    exact = started(folder, packing=packing, autocast="off")
    monkeypatch.setattr(training_model, "is_autocast", lambda mode, device: True)  # emulated where it must be
    rounded = started(folder, packing=packing)
    before, step = weights(exact), make_step()

    assert rounded.evaluate(step) == exact.evaluate(step)
    for trainer in (exact, rounded):
        trainer.accumulate(step)
    reports = [trainer.finish_step() for trainer in (exact, rounded)]

    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-2)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=2e-2)
    after = [weights(trainer) for trainer in (exact, rounded)]
    assert all(tensor.dtype == torch.float32 for tensor in after[1].values())
    moves = [torch.cat([(found[name] - before[name]).flatten() for name in before]) for found in after]
    assert not torch.equal(moves[0], moves[1])
    assert float(torch.cosine_similarity(moves[0], moves[1], dim=0)) > 0.999
