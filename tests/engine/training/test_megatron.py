"""The Megatron trainer as the node sees it, over real ranks: what it says is what the torch trainer says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.errors import ModelError, NonFiniteError, RanksLost, RunDirError
from engine.generation.protocol import Bucket
from engine.megatron_config import MegatronConfig
from engine.objective_config import ObjectiveConfig
from engine.recipe import StudentConfig
from engine.training.hf import HFTrainer
from engine.training.megatron import MegatronTrainer
from engine.transport.manifest import digest_of
from tests.engine.training.cases import CONFIG, make_scored, make_step, started
from tests.support.disk import tiny_disk
from tests.support.models import tiny_model

pytest.importorskip("megatron.core")

LAYOUT = MegatronConfig(data_parallel=2, dtype="float32", start_timeout_s=120.0, command_timeout_s=60.0)


def make_trainer(student: Path, folder: Path, **layout: Any) -> MegatronTrainer:
    return MegatronTrainer(
        config=msgspec.structs.replace(CONFIG, backend="megatron", megatron=msgspec.structs.replace(LAYOUT, **layout)),
        student=StudentConfig(path=str(student)),
        objective=ObjectiveConfig(),
        steps=10,
        folder=folder,
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    tiny_model(folder, arch="qwen3", hidden=32, layers=2, seed=2)
    return folder


@pytest.fixture(scope="module")
def trainer(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MegatronTrainer]:
    """Two data-parallel ranks, shared: a test takes steps from where the one before it left off."""
    trainer = make_trainer(student, tmp_path_factory.mktemp("ranks"))
    trainer.start()
    yield trainer
    trainer.stop()


@pytest.fixture(scope="module")
def torch_trainer(student: Path) -> HFTrainer:
    """Takes every step beside it."""
    return started(student)


def step_of_both(trainer: MegatronTrainer, torch_trainer: HFTrainer, seed: int) -> None:
    for one in (trainer, torch_trainer):
        one.accumulate(make_step(seed=seed))
        one.finish_step()


def test_a_step_and_its_report_are_those_of_the_torch_trainer(
    trainer: MegatronTrainer, torch_trainer: HFTrainer
) -> None:
    # In two calls: what is reported first must not be forgotten.
    for part in (make_step(seed=5)[:4], make_step(seed=6)[4:]):
        ours, theirs = trainer.accumulate(part), torch_trainer.accumulate(part)
        assert (ours.num_rollouts, ours.num_tokens) == (theirs.num_rollouts, theirs.num_tokens)
        assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-5)
        assert ours.rollout_losses == pytest.approx(theirs.rollout_losses, rel=1e-4)
        assert (ours.token_losses is None) == (theirs.token_losses is None)
        if ours.token_losses is not None:
            told = ours.token_losses
            assert sum(told.divergences) / len(told.divergences) == pytest.approx(ours.rollout_losses[told.index])
    report, expected = trainer.finish_step(), torch_trainer.finish_step()

    assert (report.step, report.num_rollouts, report.num_tokens, report.num_micro_batches) == (
        expected.step,
        expected.num_rollouts,
        expected.num_tokens,
        expected.num_micro_batches,
    )
    assert (report.loss, report.grad_norm, report.lr) == pytest.approx(
        (expected.loss, expected.grad_norm, expected.lr), rel=1e-5
    )
    assert trainer.version == torch_trainer.version == report.step


def test_held_out_answers_and_scores_come_back_in_order(trainer: MegatronTrainer, torch_trainer: HFTrainer) -> None:
    held_out = [make_scored(rollout_id=i, prompt=range(5, 8 + i), response=range(9, 10 + 2 * i)) for i in range(6)]
    ours, theirs = trainer.evaluate(held_out), torch_trainer.evaluate(held_out)

    assert [result.num_tokens for result in ours] == [1, 3, 5, 7, 9, 11]
    assert [result.kl_sum for result in ours] == pytest.approx([result.kl_sum for result in theirs], rel=1e-4)
    assert trainer.score([5, 6, 7, 8]) == pytest.approx(torch_trainer.score([5, 6, 7, 8]), abs=1e-4)
    assert trainer.evaluate([]) == []


def test_what_is_exported_is_the_torch_trainers_version_in_any_size_of_bucket(
    trainer: MegatronTrainer, torch_trainer: HFTrainer
) -> None:
    step_of_both(trainer, torch_trainer, seed=1)
    small, large = copied(trainer.export(bucket_bytes=4096)), copied(trainer.export(bucket_bytes=1 << 24))
    expected = copied(torch_trainer.export(bucket_bytes=1 << 24))

    assert list(small) == list(large)
    assert all(torch.equal(small[name], large[name]) for name in small)
    assert small.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-4, atol=1e-5)
    assert trainer.digest() == digest_of(small.items())


def test_a_version_can_leave_while_the_next_step_is_computed(
    trainer: MegatronTrainer, torch_trainer: HFTrainer
) -> None:
    before = copied(trainer.export(bucket_bytes=4096))
    buckets = trainer.export(bucket_bytes=4096)
    left: dict[str, torch.Tensor] = {}
    for seed, bucket in enumerate(buckets):
        if seed < 3:
            for one in (trainer, torch_trainer):
                one.accumulate(make_step(seed=seed))
        left |= copied(iter([bucket]))

    assert all(torch.equal(left[name], before[name]) for name in before)
    trainer.finish_step()
    torch_trainer.finish_step()


def test_a_call_over_the_budget_is_refused_and_costs_nothing(
    trainer: MegatronTrainer, torch_trainer: HFTrainer
) -> None:
    with pytest.raises(ValueError, match=r"600 .* takes 512 at a time .* = 256 × 2 × 1"):
        trainer.accumulate([make_scored(prompt=range(3, 103), response=range(100)) for _ in range(3)])
    with pytest.raises(ValueError, match=r"rollout 0 has 300 .* allows 256"):
        trainer.accumulate([make_scored(prompt=range(3, 103), response=range(200))])
    with pytest.raises(RuntimeError, match="has no tokens"):
        trainer.finish_step()

    step_of_both(trainer, torch_trainer, seed=7)


def test_a_disk_that_takes_no_checkpoint_is_said_as_itself_and_leaves_the_ranks(
    trainer: MegatronTrainer, torch_trainer: HFTrainer, tmp_path: Path
) -> None:
    """It is no loss of ranks: a run that is restored for it would train the same steps again and meet the same disk."""
    with tiny_disk(tmp_path / "disk") as disk:
        disk.fill(spare_bytes=16_384)
        with pytest.raises(RunDirError, match=r"/disk/a cannot be written: .*(No space left|is the disk full)"):
            trainer.save(disk.path / "a")
        disk.set_read_only()
        with pytest.raises(RunDirError, match=r"/disk/b cannot be written: .*Read-only file system"):
            trainer.save(disk.path / "b")

    step_of_both(trainer, torch_trainer, seed=9)


def test_a_loss_that_is_not_finite_is_said_as_itself_and_leaves_the_weights(
    trainer: MegatronTrainer,
) -> None:
    """The last one with this trainer: the step under way is lost, as its protocol says."""
    before = trainer.digest()
    good = make_scored()
    scores = msgspec.structs.replace(good.scores, top_logprobs=np.full_like(good.scores.top_logprobs, np.nan))
    with pytest.raises(NonFiniteError, match=r"the loss of 2 of 2 response tokens is not finite"):
        trainer.accumulate([msgspec.structs.replace(good, scores=scores)])

    assert trainer.digest() == before
    assert trainer.score([5, 6, 7]), "the ranks are there"


def test_what_rank_0_alone_cannot_write_ends_the_ranks_that_wait_for_it(student: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "student").write_text("in the way")
    trainer = make_trainer(student, tmp_path / "ranks")
    trainer.start()
    try:
        with pytest.raises(RunDirError, match=r"checkpoint cannot be written: .*File exists: '.*student'$"):
            trainer.save(tmp_path / "checkpoint")
        with pytest.raises(RanksLost, match=r"rank 0 of 2 failed in save: RunDirError: "):
            trainer.score([5, 6, 7])
        pids = trainer.rank_pids
    finally:
        trainer.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_student_that_is_not_there_is_refused_as_itself_and_leaves_no_rank(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "nobody", tmp_path / "ranks", data_parallel=1)
    try:
        with pytest.raises(ModelError, match=r"nobody.*no config\.json"):
            trainer.start()
    finally:
        trainer.stop()
    trainer.stop()  # again: nothing to do


def copied(buckets: Iterator[Bucket]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for bucket in buckets for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    }
