"""The log of a made-up run: what the monitor's tests are fed with."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Log:
    """Writes lines at times of its own: ``log.at(12.5)`` and then ``log.line(...)``."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.now_s = 0.0

    def at(self, seconds: float) -> Log:
        self.now_s = seconds
        return self

    def line(self, event: str, *, level: str = "info", **fields: Any) -> dict[str, Any]:
        t = (BEGIN + timedelta(seconds=self.now_s)).isoformat(timespec="microseconds")
        made = {"t": t, "event": event, "level": level, "run": "smollm2", "node": "0", **fields}
        self.lines.append(made)
        return made

    def span(self, event: str, *, dur_s: float, outcome: str = "ok", **fields: Any) -> dict[str, Any]:
        dur_us = int(dur_s * 1e6)
        return self.line(event, kind="span", **fields, outcome=outcome, start_ns=0, dur_us=dur_us)

    def started(self, *, steps: int = 30, per_step: int = 8, max_staleness: int = 1, step: int = 0) -> None:
        self.line(
            "run.started",
            recipe="smollm2",
            steps=steps,
            rollouts_per_step=per_step,
            max_staleness=max_staleness,
            step=step,
            out="runs/smollm2-20260102-030405",
        )

    def channel(self, name: str, items: int, max_items: int, send_wait_s: float, receive_wait_s: float) -> None:
        self.line(
            "channel.stats",
            channel=name,
            items=items,
            max_items=max_items,
            sent_total=0,
            send_wait_s=send_wait_s,
            receive_wait_s=receive_wait_s,
        )

    def generator(self, *, busy_s: float, tokens_total: int, running: int = 4) -> None:
        self.line(
            "generator.stats",
            version=0,
            running=running,
            waiting=1,
            num_slots=16,
            tokens_total=tokens_total,
            busy_s=busy_s,
        )

    def step(self, step: int, *, loss: float | None = 0.5, ages: tuple[int, ...] = (0, 1), **fields: Any) -> None:
        facts: dict[str, Any] = {
            "version": step,
            "loss": loss,
            "grad_norm": 1.25,
            "lr": 2e-4,
            "num_rollouts": len(ages),
            "num_tokens": 45 * len(ages),
            "num_micro_batches": 2,
            "skipped": False,
            "staleness_max": max(ages),
            "staleness_mean": sum(ages) / len(ages),
            "ages": list(ages),
            "rollout_ids": [],
        }
        self.span("learner.step", dur_s=0.3, step=step, actor="learner", **{**facts, **fields})


def demo(*, steps: int = 12, of: int = 30, outage_at: int | None = 9) -> Iterator[dict[str, Any]]:
    """A run like the demo's: eight seconds a step, sampler nearly always busy, an outage of the teacher."""
    log = Log()
    log.started(steps=of)
    for actor in ("learner", "sampler", "teacher_proxy", "prompt_feeder", "weight_syncer"):
        log.line("actor.state_changed", actor=actor, before="new", after="starting")
        log.at(log.now_s + 0.5).line("actor.state_changed", actor=actor, before="starting", after="running")
    log.line("teacher.replica_changed", replica="127.0.0.1:8765", state="closed", reason="")
    ticket = 0
    for ticket in range(16):
        log.line("rollout.dispatched", rollout_id=ticket, epoch=0, prompt_index=ticket, sample_index=0)
    log.at(18.0).span("eval.run", dur_s=15.0, actor="learner", **_held_out(0))
    for index, (prompt, answer, kl) in enumerate(ANSWERS_BEFORE):
        log.at(18.0 + index / 1000).line("eval.answer", version=0, prompt=prompt, answer=answer, kl=kl)
    waits = dict.fromkeys(("prompts", "rollouts", "scored", "versions"), 0.0)
    busy_s, tokens = 0.0, 0
    for step in range(1, steps + 1):
        begin = 18.0 + (step - 1) * 8.0
        done = (step - 1) * 8
        for second in range(8):
            log.at(begin + second)
            busy_s += 0.86
            tokens += 92
            waits["prompts"] += 0.9
            log.channel("prompts", second % 3, 2, waits["prompts"], 0.1)
            log.channel("rollouts", second % 2, 16, 0.0, 0.0)
            log.channel("scored", 0, 16, 0.0, begin + second)
            log.channel("versions", 0, 3, 0.0, begin + second)
            log.generator(busy_s=busy_s, tokens_total=tokens, running=13 + second % 4)
            log.span(
                "sampler.rollout",
                dur_s=7.0,
                actor="sampler",
                rollout_id=done + second,
                version_first=max(0, step - 2),
                version_last=step - 1,
                num_tokens=45,
                num_prompt_tokens=30,
                finish_reason="stop",
            )
            ticket += 1
            log.line("rollout.dispatched", rollout_id=ticket, epoch=0, prompt_index=ticket, sample_index=0)
            log.at(begin + second + 0.4)
            log.span("teacher.score", dur_s=0.35, actor="teacher_proxy", rollout_id=done + second, num_tokens=45)
            if second in (3, 7):
                log.at(begin + second + 0.9).span(
                    "learner.micro_batch",
                    dur_s=2.4,
                    actor="learner",
                    step=step,
                    rollout_ids=list(range(done + second - 3, done + second + 1)),
                    num_rollouts=4,
                    num_tokens=180,
                    num_computed_tokens=300,
                    loss_sum=100.0,
                )
        if step == outage_at:
            log.line(
                "teacher.replica_changed",
                level="warning",
                replica="127.0.0.1:8765",
                state="open",
                reason="ConnectionRefusedError",
            )
            log.line("teacher.parked", level="warning", num_parked=3)
            log.line("teacher.replica_changed", replica="127.0.0.1:8765", state="closed", reason="probe")
            log.line("teacher.resumed", parked_s=4.2)
        log.at(begin + 8.0).step(
            step,
            loss=0.55 + 0.9 / step**0.5,
            ages=(0, 0, 0, 1, 1, 1, 1, 1),
            rollout_ids=list(range(done, done + 8)),
        )
        log.span("weights.push", dur_s=0.4, actor="weight_syncer", version=step)
        log.line("weights.live", version=step)
        if step % 10 == 0:
            log.span("checkpoint.save", dur_s=1.5, actor="learner", step=step)
            log.line(
                "checkpoint.saved",
                step=step,
                path=f"runs/smollm2-20260102-030405/checkpoints/step_{step:06d}",
                num_bytes=1_357_000_000,
            )
    if steps == of:
        log.at(log.now_s + 15.0).span("eval.run", dur_s=15.0, actor="learner", **_held_out(of))
        for prompt, answer, kl in ANSWERS_AFTER:
            log.line("eval.answer", version=of, prompt=prompt, answer=answer, kl=kl)
        log.line("run.finished", step=steps, stopped_by=None, wall_s=log.now_s)
    yield from log.lines


def _held_out(version: int) -> dict[str, Any]:
    return {
        "version": version,
        "step": version,
        "num_prompts": 16,
        "num_tokens": 700,
        "kl": 1.331 if version == 0 else 0.588,
        "reference_kl": 0.842 if version == 0 else 0.391,
        "reference_nll": 1.204 if version == 0 else 0.733,
        "score": None,
    }


ANSWERS_BEFORE = (
    ("Why is the sky blue?", "The sky is blue because the sky is the sun of the blue of the sun of the sky.", 1.61),
    ("Write one sentence about bread.", "Bread is a bread that is a bread made by a bread with the flour.", 1.22),
    ("Name three fruits.", "1. Apple\n2. Apple\n3. The fruit of the fruit is a fruit that is fruit", 1.05),
)
ANSWERS_AFTER = (
    ("Why is the sky blue?", "The sky appears blue because molecules in the air scatter blue light the most.", 0.52),
    ("Write one sentence about bread.", "Bread is a staple food made from flour, water and yeast.", 0.61),
    ("Name three fruits.", "Here are three fruits: 1. Apple 2. Banana 3. Orange", 0.44),
)
TEACHER_ANSWERS = (
    "The sky appears blue because of a phenomenon called Rayleigh scattering, in which shorter blue wavelengths are "
    "scattered more than longer red ones.",
    "Bread is a staple food made from flour, water, and yeast that people have baked for thousands of years.",
    "Here are three fruits: 1. Apple 2. Banana 3. Orange",
)
