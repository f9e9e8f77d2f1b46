"""The main job against a plain serial script: same models, prompts, answers per step, held-out prompts and measure.

    python -m tests.bench.bench_main_job [--serial-steps 30]

Needs ``make models`` and about 12 minutes. Both sides start from the student on disk and get the whole machine, one
after the other. Held-out KL is the divergence over the whole vocabulary on the student's own answers; this file
measures it in the same way for both, outside their time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from recipes.demo import ENVIRONMENT
from recipes.smollm2_models import FIRST_HELD_OUT_ROW
from tests.bench.report import OURS, Report, Row, Target, add_options, finish, progress

SERIAL = "serial"
RECIPE = "recipes/smollm2.py"
AGREEMENT = 0.15
"""Of a run with what is predicted from its log, in rollouts per second."""
MODELS = Path("models/smollm2")
NEW_TOKENS = 48
END = 2


class Result(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    """Wall time of training, without measuring held-out prompts and without start-up."""
    steps: int
    before: float
    after: float
    """Held-out KL, nats per token."""
    prediction: Prediction | None = None


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Rollouts per second, and who holds the others up: in a run, and as simulated from its log."""

    rollouts_per_s: float
    simulated_per_s: float
    bottleneck: str
    simulated_bottleneck: str


class Serial:
    """Sample eight answers, score them, one step: the script that anybody would write."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODELS / "teacher", padding_side="left")
        self.teacher: Any = _load(MODELS / "teacher")
        self.student: Any = _load(MODELS / "student")

    def divergence(self, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Summed forward KL over the vocabulary on answers sampled from the student, and their tokens."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            ids = self.student.generate(
                **batch,
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=END,
            )
        start = batch["input_ids"].shape[1]
        answer = ids[:, start:]
        is_end = (answer == END).int()
        real = (is_end.cumsum(1) - is_end) == 0
        mask = torch.cat([batch["attention_mask"], torch.ones_like(answer)], 1)
        inputs = {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "logits_to_keep": answer.shape[1] + 1,
        }
        with torch.no_grad():
            wanted = self.teacher(ids, **inputs).logits[:, :-1].log_softmax(-1)
        given = self.student(ids, **inputs).logits[:, :-1].log_softmax(-1)
        divergence = (wanted.exp() * (wanted - given)).sum(-1)
        return divergence[real].sum(), int(real.sum())

    def measure(self, prompts: Sequence[str]) -> float:
        """Held-out KL, from four answers to each prompt."""
        torch.manual_seed(0)
        total, count = 0.0, 0
        for _ in range(4):
            with torch.no_grad():
                divergence, num_tokens = self.divergence(prompts)
            total, count = total + float(divergence), count + num_tokens
        return total / count

    def train(self, prompts: Sequence[str], steps: int, lr: float) -> float:
        """Returns the seconds that it took."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        started = time.monotonic()
        for step in range(steps):
            divergence, num_tokens = self.divergence(random.Random(step).sample(list(prompts), 8))
            optimizer.zero_grad()
            (divergence / num_tokens).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()
        return time.monotonic() - started


def serial(train: Sequence[str], held_out: Sequence[str], steps: int) -> Result:
    script = Serial()
    before = script.measure(held_out)
    seconds = script.train(train, steps, lr=2e-4)
    return Result(seconds=seconds, steps=steps, before=before, after=script.measure(held_out))


def ours(held_out: Sequence[str]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = ["--set", "checkpoint.every_steps=0"]
        command = [sys.executable, "-m", "recipes.demo", "--out", str(out), *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        summary = json.loads((out / "summary.json").read_text())
        prediction = predict(out, summary, settings)
        script = Serial()
        before = script.measure(held_out)
        script.student = _load(summary["student"])
        after = script.measure(held_out)
    # Measuring overlaps with the first answers and follows the last step; all of it is taken out, to our disadvantage
    # where it overlapped.
    return Result(
        seconds=_training_seconds(summary), steps=summary["step"], before=before, after=after, prediction=prediction
    )


def predict(out: Path, summary: dict[str, Any], settings: Sequence[str]) -> Prediction:
    command = [sys.executable, "-m", "engine.run", RECIPE, "--simulate-from", str(out), "--json", *settings]
    simulated = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return Prediction(
        rollouts_per_s=summary["rollouts_per_s"],
        simulated_per_s=simulated["rollouts_per_s"],
        bottleneck=summary["bottleneck"],
        simulated_bottleneck=simulated["bottleneck"],
    )


def _training_seconds(summary: dict[str, Any]) -> float:
    return float(summary["wall_s"] - summary["evaluation_s"] - summary["checkpoint_s"])


def _load(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def _one_side(side: str, serial_steps: int) -> Result:
    torch.set_num_threads(os.cpu_count() or 1)
    rows = [json.loads(line)["prompt"] for line in Path("recipes/data/prompts.jsonl").read_text().splitlines()]
    train, held_out = rows[:FIRST_HELD_OUT_ROW], rows[FIRST_HELD_OUT_ROW:]
    return ours(held_out) if side == OURS else serial(train, held_out, serial_steps)


def rows_of(side: str, result: Result) -> list[Row]:
    load = f"{result.steps} steps"
    return [
        Row(load=load, contender=side, value=result.seconds, unit="s"),
        Row(load=load, contender=side, value=result.before, unit="nats/token before"),
        Row(load=load, contender=side, value=result.after, unit="nats/token after"),
    ]


def targets_of(prediction: Prediction | None) -> list[Target]:
    if prediction is None:
        return []
    apart = abs(prediction.simulated_per_s / prediction.rollouts_per_s - 1.0)
    is_same = prediction.bottleneck == prediction.simulated_bottleneck
    names = f"{prediction.bottleneck} in the run, {prediction.simulated_bottleneck} in the simulation"
    return [
        Target(what="simulated from its log, rollouts/s off by", found=apart, bound=AGREEMENT, at_most=True, unit=""),
        Target(what=f"the same bottleneck ({names})", found=float(is_same), bound=1.0, unit=""),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serial-steps", type=int, default=30)
    parser.add_argument("--side", choices=[OURS, SERIAL], help="measure one side and print it as JSON")
    add_options(parser)
    options = parser.parse_args()
    if options.side is not None:
        sys.stdout.write(msgspec.json.encode(_one_side(options.side, options.serial_steps)).decode())
        return 0
    if not (MODELS / "student" / "config.json").is_file():
        failure = f"no models in {MODELS}; make them with: make models"
        return finish(Report(bench="main job", rows=(), failures=(failure,)), as_json=options.json)
    results = {}
    for side in (OURS, SERIAL):
        # Each in a process of its own, with the same allocator settings.
        command = [sys.executable, "-m", __spec__.name, "--side", side, "--serial-steps", str(options.serial_steps)]
        environment = {**os.environ, **ENVIRONMENT}
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        result = results[side] = msgspec.json.decode(done.stdout, type=Result)
        progress(
            f"{side:7} {result.steps:3} steps  {result.seconds:5.0f} s  held-out KL {result.before:.3f} -> "
            f"{result.after:.3f} nats/token (x {result.after / result.before:.2f})"
        )
    ours, serial = results[OURS], results[SERIAL]
    report = Report(
        bench="main job",
        rows=(*rows_of(OURS, ours), *rows_of(SERIAL, serial)),
        targets=(
            Target(
                what="held-out KL, share left", found=ours.after / ours.before, bound=0.5, at_most=True, unit="of it"
            ),
            Target(what="seconds of the serial script", found=serial.seconds / ours.seconds, bound=1.0),
            *targets_of(ours.prediction),
        ),
    )
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
