"""Which lines of the log people are told about while a run goes on, and in which words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.tracing import Event, human_line

REPLICA_WORDS = {
    "closed": "up",
    "suspect": "looked at again",
    "half_open": "on probation",
    "open": "away",
    "rejected": "refused by us",
}
"""States of a teacher replica (``teacher.replica``), for people."""


def sentence(event: Event) -> str | None:
    """What to tell of one line; None: nothing. A warning that has no words of its own is told as it is written.

    Free text in it (answers, messages of libraries) has its control characters escaped.
    """
    make = _SENTENCES.get(event["event"])
    if make is not None:
        text = make(event)
        return None if text is None else printable(text)
    if event["event"] in _STEPS_OF_SOMETHING_ELSE or event["level"] in ("debug", "info"):
        return None
    return human_line({key: value for key, value in event.items() if key != "exception"}).split(" ", 2)[-1]


def step_line(event: Event, *, steps: int | None, interval_s: float | None) -> str:
    """One optimizer step (``learner.step``) as one line, for output that cannot be drawn over."""
    of = f"/{steps}" if steps else ""
    parts = [
        f"step {event['step']}{of}",
        f"loss {number(event['loss'])} nats/token",
        f"grad norm {number(event['grad_norm'])}",
        f"lr {event['lr']:.2g}",
        f"{event['num_rollouts']} rollouts, {event['num_tokens']} tokens",
        f"staleness {event['staleness_mean']:.2f} (max {event['staleness_max']})",
    ]
    if interval_s:
        parts += [f"{event['num_tokens'] / interval_s:.0f} tokens/s", f"{interval_s:.1f} s"]
    return "  ".join(parts)


def number(value: Any) -> str:
    """Four digits, or what stands for a number that is none: a loss may be NaN, which JSON writes as null."""
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"


def printable(text: str) -> str:
    """On one line, and nothing in it can move a cursor or colour what follows."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _eval_run(event: Event) -> str | None:
    if event["outcome"] != "ok":
        return f"measuring held-out prompts ended with {event['outcome']}"
    parts = [
        f"version {event['version']}, {event['num_prompts']} held-out prompts: KL {number(event['kl'])} nats/token"
    ]
    if event.get("reference_nll") is not None:
        parts.append(f"reference answers {number(event['reference_nll'])} nats/token")
    if event.get("score") is not None:
        parts.append(f"score {number(event['score'])}")
    return ", ".join(parts)


def _run_started(event: Event) -> str:
    return (
        f"run {event['recipe']}: {event['steps']} steps of {event['rollouts_per_step']} rollouts, at most "
        f"{event['max_staleness']} versions stale, in {event['out']}"
    )


def _run_finished(event: Event) -> str:
    end = f"stopped by {event['stopped_by']}" if event.get("stopped_by") else "finished"
    return f"{end} after step {event['step']}, {event['wall_s']:.1f} s"


def _node_listening(event: Event) -> str:
    host = f"[{event['host']}]" if ":" in event["host"] else event["host"]
    how = "?token=… with the token of node.token_file" if event.get("has_token") else ""
    return f"status page on http://{host}:{event['port']}/{how}"


def _replica_changed(event: Event) -> str:
    reason = f" ({event['reason']})" if event.get("reason") else ""
    return f"teacher {event['replica']} is {REPLICA_WORDS.get(event['state'], event['state'])}{reason}"


def _checkpoint_save(event: Event) -> str | None:
    return None if event["outcome"] == "ok" else f"checkpoint of step {event['step']} ended with {event['outcome']}"


def _actor_failed(event: Event) -> str:
    then = "the run ends" if event.get("is_final") else f"starting again in {event.get('delay_s', 0):.1f} s"
    return f"{event['actor']} failed: {event['error']}; {then}"


def _teacher_disagrees(event: Event) -> str:
    other = "itself a moment before" if event["other"] is None else event["other"]
    then = "left out" if event["refused"] else "used all the same"
    return f"teacher {event['replica']} differs from {other} by {event['difference']:.3g} nats: {then}"


_SENTENCES: Mapping[str, Callable[[Event], str | None]] = {
    "run.started": _run_started,
    "run.resumed": lambda e: f"going on after step {e['step']}",
    "run.draining": lambda e: f"{e.get('signal') or e.get('reason')}: nothing new, then a checkpoint; again: at once",
    "run.grace_ended": lambda e: f"step {e['step']} was not ready in time and is left out",
    "run.finished": _run_finished,
    "run.failed": lambda e: f"the run failed at step {e['step']}: {e['failed_actor']}: {e['cause']}",
    "run.restoring": lambda e: (
        f"the learner's ranks were lost: going on from the last checkpoint with new ones "
        f"(again at most {e['restores_left']} times)"
    ),
    "ranks.lost": lambda e: f"the {e['group']}'s ranks are stopped: {e['cause']}",
    "node.listening": _node_listening,
    "eval.run": _eval_run,
    "checkpoint.save": _checkpoint_save,
    "checkpoint.saved": lambda e: f"checkpoint of step {e['step']} in {e['path']} ({size(e['num_bytes'])})",
    "teacher.sends_json": lambda e: (
        f"a stock vLLM server scores: {e['bytes_per_token']:,} bytes of JSON per token, of prompts, too; "
        "python -m teacher --backend vllm sends a tenth"
    ),
    "teacher.top_k_lowered": lambda e: f"the teacher gives its top {e['given']}, not the {e['wanted']} of the recipe",
    "teacher.disagrees": _teacher_disagrees,
    "teacher.parked": lambda e: f"every teacher is away: {e['num_parked']} rollouts wait for one",
    "teacher.resumed": lambda e: f"a teacher is back after {e['parked_s']:.1f} s",
    "teacher.replica_changed": _replica_changed,
    "rollout.failed": lambda e: f"rollout {e['rollout_id']} is given up: {e['reason']}",
    "rollout.requeued": lambda e: f"rollout {e['rollout_id']} is sampled again: {e['reason']}",
    "actor.failed": _actor_failed,
    "actor.restarted": lambda e: f"{e['actor']} runs again (restart {e['restarts']})",
    "sink.opened": lambda e: f"{e['sink']} is told of this run: {e['where']}",
    "sink.dropped": lambda e: f"{e['sink']} is behind: {e['num_dropped']} points were left out",
    "sink.failed": lambda e: f"{e['sink']} is switched off: {e['error']}; the run goes on",
    "learner.step_skipped": lambda e: f"step {e['step']}: gradient not finite, weights unchanged; see {e['rollouts']}",
    "log.message": lambda e: f"{e['logger']}: {e['message']}" if e["level"] in ("warning", "error") else None,
}

_STEPS_OF_SOMETHING_ELSE = frozenset(
    # Each of these comes with a line that has words.
    (
        "sampler.rollout",
        "teacher.score",
        "learner.micro_batch",
        "learner.step",
        "weights.push",
        "teacher.replica_rejected",
    )
)
