from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.recipe import LearnerConfig
from engine.training.schedule import learning_rate


def rates(config: LearnerConfig, *, num_steps: int) -> list[float]:
    return [learning_rate(config, step=step, num_steps=num_steps) for step in range(1, num_steps + 1)]


def test_constant_is_constant() -> None:
    assert rates(LearnerConfig(lr=3e-4), num_steps=5) == [3e-4] * 5


def test_warm_up_rises_in_equal_steps_and_reaches_the_rate() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=4)

    assert rates(config, num_steps=6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_cosine_starts_at_the_rate_is_halfway_in_the_middle_and_would_end_one_step_after_the_last() -> None:
    config = LearnerConfig(lr=1.0, schedule="cosine", min_lr_share=0.2)

    found = rates(config, num_steps=8)
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.6)
    assert learning_rate(config, step=9, num_steps=8) == pytest.approx(0.2)
    assert learning_rate(config, step=100, num_steps=8) == pytest.approx(0.2)


@given(
    num_steps=st.integers(1, 50), warmup_steps=st.integers(0, 50), min_lr_share=st.floats(0, 1), lr=st.floats(1e-7, 1.0)
)
def test_cosine_rises_to_one_peak_falls_after_it_and_never_rests_at_zero(
    num_steps: int, warmup_steps: int, min_lr_share: float, lr: float
) -> None:
    warmup_steps = min(warmup_steps, num_steps)
    config = LearnerConfig(lr=lr, schedule="cosine", warmup_steps=warmup_steps, min_lr_share=min_lr_share)

    found = rates(config, num_steps=num_steps)
    peak = max(warmup_steps, 1)
    assert found[peak - 1] == lr
    assert found[:peak] == sorted(found[:peak])
    assert found[peak - 1 :] == sorted(found[peak - 1 :], reverse=True)
    assert min(found) > 0


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="steps count from 1, got 0"):
        learning_rate(LearnerConfig(), step=0, num_steps=3)
