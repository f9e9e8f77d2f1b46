"""The plain serial script of ``bench_end_to_end``: sample, score, one step, with what transformers and torch offer.

    python -m tests.bench.end_to_end.serial FOLDER --steps N

Whole vocabulary on both sides. It is no straw man: only the answers' rows go through the output layers, the teacher
keeps no graph, and nothing is computed twice.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.end_to_end.workload import BETAS, GRAD_CLIP, LR, NEW_TOKENS, Outcome, Step, read_prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = _load(options.folder / "student"), _load(options.folder / "teacher")
    teacher.requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder / "student", padding_side="left")
    prompts = tokenizer(read_prompts(options.folder), return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    steps, before = [], time.process_time()
    for _ in range(options.steps):
        divergence_BT = on_policy_divergence(student, teacher, prompts)
        loss = divergence_BT.mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), GRAD_CLIP)
        optimizer.step()
        now = time.process_time()
        steps.append(Step(cpu_s=now - before, num_tokens=divergence_BT.numel(), loss=loss.item()))
        before = now
    sys.stdout.write(msgspec.json.encode(Outcome(steps=steps[1:])).decode() + "\n")
    return 0


def on_policy_divergence(student: Any, teacher: Any, prompts: Any) -> Tensor:
    """[B, T] forward KL of answers that the student samples, one per prompt."""
    ids = student.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, NEW_TOKENS), value=1)
    inputs = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": NEW_TOKENS + 1,
        "use_cache": False,
    }
    with torch.no_grad():
        wanted_BTV = teacher(ids, **inputs).logits[:, :-1].log_softmax(-1)
    given_BTV = student(ids, **inputs).logits[:, :-1].log_softmax(-1)
    return torch.nn.functional.kl_div(given_BTV, wanted_BTV, reduction="none", log_target=True).sum(-1)


def _load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
