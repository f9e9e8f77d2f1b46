"""One answer of each step is reported token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.training.cases import make_step, started
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_tokens_of_one_rollout_add_up_to_its_loss_and_only_once_a_step(llama: Path, packing: str) -> None:
    trainer = started(llama, packing=packing)
    told = []
    for _ in range(3):
        step = make_step()
        first, second = trainer.accumulate(step[:4]), trainer.accumulate(step[4:])
        trainer.finish_step()
        assert second.token_losses is None
        tokens = first.token_losses
        assert tokens is not None
        told.append(tokens.index)
        rollout = step[tokens.index].rollout
        assert len(tokens.divergences) == len(tokens.logprobs) == rollout.num_tokens
        assert sum(tokens.divergences) / rollout.num_tokens == pytest.approx(
            first.rollout_losses[tokens.index], rel=1e-5
        )
        assert max(tokens.logprobs) < 0

    assert told == [0, 1, 2], "another one each time"


def test_a_rollout_of_a_later_forward_pass_is_found(llama: Path) -> None:
    """With a small budget a micro-batch is several passes, in an order of their own."""
    whole, split = started(llama), started(llama, packing="padded", micro_batch_tokens=66)
    for trainer in (whole, split):
        trainer.version = 5
    step = make_step()
    expected, found = whole.accumulate(step).token_losses, split.accumulate(step).token_losses

    assert expected is not None
    assert found is not None
    assert found.index == expected.index == 5
    assert found.divergences == pytest.approx(expected.divergences, rel=1e-4, abs=1e-6)
    assert found.logprobs == pytest.approx(expected.logprobs, rel=1e-4, abs=1e-6)
