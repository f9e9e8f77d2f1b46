"""TRL's side of ``bench_end_to_end``, in TRL's own environment: one of its two distillation trainers, as documented.

    python -m tests.bench.end_to_end.trl {distillation,gkd} FOLDER --steps N

Settings that cost time without being asked for are off (gradient checkpointing, saving, reporting, progress bars), so
that the trainer shows the best it can do on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tests.bench.end_to_end.workload import (
    BETAS,
    GRAD_CLIP,
    LR,
    NEW_TOKENS,
    NUM_PROMPTS,
    PROMPT_TOKENS,
    Outcome,
    Step,
    read_prompts,
)


class Clock(TrainerCallback):
    """CPU time at the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.process_time())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["distillation", "gkd"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(options.trainer, options.folder, steps=options.steps, scratch=scratch, clock=clock)
        num_tokens = _count_tokens(trainer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [
        Step(cpu_s=end - before, num_tokens=tokens, loss=loss)
        for (before, end), tokens, loss in zip(itertools.pairwise(clock.ends), num_tokens[1:], losses[1:], strict=True)
    ]
    sys.stdout.write(msgspec.json.encode(Outcome(steps=steps)).decode() + "\n")
    return 0


def _trainer(name: str, folder: Path, *, steps: int, scratch: str, clock: Clock) -> Any:
    common: dict[str, Any] = {
        "output_dir": scratch,
        "max_steps": steps,
        "per_device_train_batch_size": NUM_PROMPTS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": GRAD_CLIP,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "beta": 0.0,  # forward KL, in both
        "temperature": 1.0,
    }
    prompts = read_prompts(folder)
    models = {
        "model": _load(folder / "student"),
        "teacher_model": _load(folder / "teacher"),
        "processing_class": _tokenizer(folder / "student"),
        "callbacks": [clock],
    }
    if name == "distillation":
        config = DistillationConfig(**common, max_completion_length=NEW_TOKENS)
        rows = [{"prompt": prompt} for prompt in prompts]
        return DistillationTrainer(args=config, train_dataset=Dataset.from_list(rows), **models)
    config = GKDConfig(**common, max_new_tokens=NEW_TOKENS, lmbda=1.0, max_length=PROMPT_TOKENS[1] + NEW_TOKENS)
    # It divides the loss by the number of tokens in the data's answers, though it trains on others: as many, then.
    answer = " t1" * NEW_TOKENS
    talks = [{"messages": [_said("user", prompt), _said("assistant", answer)]} for prompt in prompts]
    return GKDTrainer(args=config, train_dataset=Dataset.from_list(talks), **models)


def _count_tokens(trainer: Any) -> list[int]:
    """A list that grows by the trained response tokens of each step, as the trainer's own mask says."""
    num_tokens: list[int] = []
    compute_loss = trainer.compute_loss

    def counting(model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        if "completion_mask" in inputs:
            mask_BT = inputs["completion_mask"] != 0
        else:
            mask_BT = inputs["labels"][:, inputs["prompts"].shape[1] :] != -100
        assert mask_BT.shape == (NUM_PROMPTS, NEW_TOKENS), mask_BT.shape
        num_tokens.append(int(mask_BT.sum()))
        return compute_loss(model, inputs, *arguments, **options)

    trainer.compute_loss = counting
    return num_tokens


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _tokenizer(folder: Path) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # DistillationTrainer wants an end of sequence. This id is one behind the model's last: it is never drawn.
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    sys.exit(main())
