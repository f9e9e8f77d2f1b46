"""Training a low-rank adapter: what is trained, what goes out, what lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.errors import CheckpointError, ModelError
from engine.generation.vllm_model import tensor_groups_of
from engine.objective_config import ObjectiveConfig
from engine.recipe import LearnerConfig, LoraConfig, StudentConfig
from engine.training.hf import HFTrainer
from tests.engine.training.cases import make_scored
from tests.support.models import load, plain_logits, tiny_model

LORA = LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
IDS = list(range(3, 40))


def make(folder: Path, *, lora: LoraConfig | None = LORA, exports_adapter: bool = True) -> HFTrainer:
    return HFTrainer(
        config=LearnerConfig(lr=1e-2, micro_batch_tokens=512, lora=lora),
        student=StudentConfig(path=str(folder)),
        objective=ObjectiveConfig(),
        steps=8,
        exports_adapter=exports_adapter,
    )


def train(trainer: HFTrainer, steps: int = 2) -> None:
    for step in range(steps):
        trainer.accumulate([make_scored(seed=step)])
        trainer.finish_step()


def exported(trainer: HFTrainer) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for bucket in trainer.export(bucket_bytes=1000)
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("student"), arch="qwen3", hidden=64)


def test_a_version_is_the_adapter_alone_and_has_the_names_and_shapes_that_an_engine_expects(folder: Path) -> None:
    trainer = make(folder)
    trainer.start()
    train(trainer)

    sent = exported(trainer)

    groups = tensor_groups_of(StudentConfig(path=str(folder)), LORA)
    assert [(group.names[0], group.shape) for group in groups] == [(name, t.shape) for name, t in sent.items()]
    assert sum(tensor.numel() for tensor in sent.values()) * 10 < sum(p.numel() for p in load(folder).parameters())


def test_merged_weights_compute_what_the_adapted_student_computes_and_nothing_else_has_changed(folder: Path) -> None:
    trainer = make(folder, exports_adapter=False)
    trainer.start()
    before = exported(trainer)
    train(trainer)
    after = exported(trainer)

    plain = load(folder)
    assert set(after) == set(exported(started(folder, lora=None)))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(LORA.target_modules)
    plain.load_state_dict(after, strict=False)
    expected = plain_logits(plain, IDS)[:-1].log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert trainer.score(IDS) == pytest.approx(expected.tolist(), abs=1e-5)


def started(folder: Path, *, lora: LoraConfig | None = LORA) -> HFTrainer:
    trainer = make(folder, lora=lora, exports_adapter=False)
    trainer.start()
    return trainer


def test_a_checkpoint_loads_with_transformers_and_with_peft_and_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    trainer = make(folder)
    trainer.start()
    train(trainer)
    trainer.save(tmp_path)
    scores = trainer.score(IDS)

    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    adapted: Any = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    models: list[Any] = [merged, adapted]
    for model in models:
        model.eval()
        found = plain_logits(model, IDS)[:-1].log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
        assert found.tolist() == pytest.approx(scores, abs=1e-5)
    train(trainer)
    again = make(folder)
    again.load(tmp_path)
    train(again)
    assert again.digest() == trainer.digest()


def test_an_adapter_of_another_rank_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder)
    trainer.start()
    trainer.save(tmp_path)

    with pytest.raises(CheckpointError, match="resume with the rank and modules that the run began with"):
        make(folder, lora=LoraConfig(rank=8, target_modules=LORA.target_modules)).load(tmp_path)


def test_modules_that_the_student_does_not_have_are_refused(folder: Path) -> None:
    lora = LoraConfig(target_modules=("c_attn",))
    with pytest.raises(ModelError, match="c_attn"):
        make(folder, lora=lora).start()
    with pytest.raises(ModelError, match=r"no linear layers named c_attn"):
        tensor_groups_of(StudentConfig(path=str(folder)), lora)
