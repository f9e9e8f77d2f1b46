from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.errors import CheckpointError, ModelError
from engine.training.hf import HFTrainer
from tests.engine.training.cases import make_step, make_trainer, started
from tests.support.models import load, tiny_model


def train(trainer: HFTrainer, *steps: int) -> None:
    for seed in steps:
        trainer.accumulate(make_step(seed=seed)[:4])
        trainer.accumulate(make_step(seed=seed)[4:])
        trainer.finish_step()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("arch", "tied", "packing"),
    [("llama", True, "packed"), ("llama", False, "padded"), ("qwen3", True, "packed"), ("gpt2", True, "padded")],
)
@pytest.mark.parametrize("saved_after", [0, 2])
def test_a_resumed_run_ends_in_the_bits_of_an_undisturbed_one(
    tmp_path: Path, arch: Any, tied: bool, packing: str, saved_after: int
) -> None:
    folder = tiny_model(tmp_path / "student", arch=arch, tied=tied)
    schedule: dict[str, Any] = {"packing": packing, "schedule": "cosine", "warmup_steps": 2, "steps": 5}
    undisturbed = started(folder, **schedule)
    train(undisturbed, *range(saved_after))
    undisturbed.save(tmp_path / "checkpoint")
    train(undisturbed, *range(saved_after, saved_after + 2))

    resumed = make_trainer(folder, **schedule)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.version == saved_after
    train(resumed, *range(saved_after, saved_after + 2))
    assert resumed.version == undisturbed.version
    assert resumed.digest() == undisturbed.digest()


def test_the_student_loads_with_transformers_together_with_its_tokenizer(llama: Path, tmp_path: Path) -> None:
    trainer = started(llama)
    train(trainer, 0)

    trainer.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.decode(tokenizer.encode("rain")) == "rain"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(llama).chat_template
    assert model.generation_config.eos_token_id == load(llama).generation_config.eos_token_id
    for bucket in trainer.export(bucket_bytes=1 << 20):
        for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
            assert torch.equal(model.get_parameter(name), tensor)


def test_what_is_accumulated_of_a_step_is_not_saved(llama: Path, tmp_path: Path) -> None:
    trainer = started(llama)
    trainer.accumulate(make_step())

    trainer.save(tmp_path)
    resumed, fresh = make_trainer(llama), started(llama)
    resumed.load(tmp_path)
    train(resumed, 0)
    train(fresh, 0)
    assert resumed.digest() == fresh.digest()


def test_a_skipped_step_counts_in_the_schedule_of_a_resumed_run(llama: Path, tmp_path: Path) -> None:
    trainer = started(llama, on_nonfinite="skip", warmup_steps=4)
    item = make_step()[0]
    logprobs = item.scores.top_logprobs * float("nan")
    broken = msgspec.structs.replace(item, scores=msgspec.structs.replace(item.scores, top_logprobs=logprobs))
    trainer.accumulate([broken])
    assert trainer.finish_step().skipped

    trainer.save(tmp_path)
    resumed = make_trainer(llama, warmup_steps=4)
    resumed.load(tmp_path)
    resumed.accumulate(make_step())
    assert resumed.finish_step().step == 2


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    trainer = started(llama)
    train(trainer, 0)
    trainer.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["trainer/optimizer.safetensors", "trainer/state.json"])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_damaged_trainer_state_is_refused(llama: Path, checkpoint: Path, name: str, damage: str) -> None:
    path = checkpoint / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])

    with pytest.raises(CheckpointError, match=r"trainer state in .* cannot be read"):
        make_trainer(llama).load(checkpoint)


def test_a_damaged_student_is_refused(llama: Path, checkpoint: Path) -> None:
    (checkpoint / "student" / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="not loadable as a causal language model"):
        make_trainer(llama).load(checkpoint)


def test_optimizer_state_of_another_model_is_refused(llama: Path, checkpoint: Path) -> None:
    path = checkpoint / "trainer" / "optimizer.safetensors"
    state = load_file(path)
    norm = state.pop("exp_avg.model.norm.weight")
    save_file(state, path)

    with pytest.raises(CheckpointError, match=r"disagree on 1 entries, among them 'exp_avg\.model\.norm\.weight'"):
        make_trainer(llama).load(checkpoint)
    save_file(state | {"exp_avg.model.norm.weight": norm[:-1].clone()}, path)
    with pytest.raises(CheckpointError, match=r"of 'model.norm.weight' has shape \(31,\), the parameter has \(32,\)"):
        make_trainer(llama).load(checkpoint)


def test_state_of_a_later_format_is_refused(llama: Path, checkpoint: Path) -> None:
    (checkpoint / "trainer" / "state.json").write_bytes(b'{"format": 2, "version": 1}')

    with pytest.raises(CheckpointError, match="has format 2, this program reads 1"):
        make_trainer(llama).load(checkpoint)
