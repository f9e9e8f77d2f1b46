"""Arithmetic is counted as torch counts it in the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.training.flops import training_flops
from engine.training.megatron_student import read_shape
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.models import load


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_a_forward_pass_is_counted_as_torch_counts_it(name: str, tmp_path: Path) -> None:
    """Sequences of one token: there a causal mask hides nothing, and every product is really made."""
    folder, num_tokens = make_student(name, tmp_path), 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        load(folder)(input_ids=torch.arange(3, 3 + num_tokens)[:, None], use_cache=False)

    found = training_flops(read_shape(folder), [1] * num_tokens, num_head_rows=num_tokens) / 3

    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_a_causal_mask_hides_does_not_count(tmp_path: Path) -> None:
    shape = read_shape(make_student("qwen3", tmp_path))
    one, two = (training_flops(shape, [length], num_head_rows=0) for length in (10, 20))

    pairs = 3 * 4 * shape.num_heads * shape.head_dim * shape.num_layers
    assert two - 2 * one == pairs * (20 * 21 // 2 - 10 * 11)
