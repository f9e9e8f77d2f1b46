"""Lines of a run's log as its listeners get them, with what matters to a test set by it."""

from __future__ import annotations

from typing import Any

from engine.tracing import Event


def event(name: str, **fields: Any) -> Event:
    return {"t": "2026-01-02T03:04:05.000000+00:00", "event": name, "level": "info", **fields}


def step_event(step: int = 1, **fields: Any) -> Event:
    facts = {
        "step": step,
        "version": step,
        "loss": 0.5,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "num_rollouts": 2,
        "num_tokens": 30,
        "num_micro_batches": 1,
        "skipped": False,
        "staleness_max": 1,
        "staleness_mean": 0.5,
        "ages": [0, 1],
        "outcome": "ok",
        "dur_us": 40_000,
        "kind": "span",
    }
    return event("learner.step", **{**facts, **fields})
