"""Which lines of a log are faults, and what became of each. Pure.

Faults of whole processes (killed, failed, asked to stop) are not here: what became of those is known from the process
that came after them (``sections``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from engine.monitor.report.text import one_line
from engine.monitor.sentences import REPLICA_WORDS, sentence
from engine.tracing import Event

_MAX_REASONS = 64
"""Kept apart for each kind of fault; the rest are only counted."""
_SHOWN_REASONS = 3


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of fault, as far as it was met."""

    name: str
    count: int
    became: str
    """What became of it; empty when it was not met."""
    reasons: tuple[str, ...] = ()
    """The most frequent ones, with how often."""


class FaultLog:
    """Apply every line in order, then ask for ``faults``."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        """By the name of the line."""
        self._reasons: dict[str, Counter[str]] = {}
        self._restarted: Counter[str] = Counter()
        self._retried: set[str] = set()
        self._unscored = 0
        self._replicas: dict[str, str] = {}
        self._parked_s = 0.0
        self._is_parked = False
        self._requeued: set[int] = set()
        self._requeued_and_trained: set[int] = set()
        self._passed_over: set[str] = set()
        self._is_passing_over = False
        self._went_on_from: list[int] = []
        self._lines_lost = 0
        self._rewound = 0

    def apply(self, line: Event) -> None:
        """Take in one line.

        Raises:
            KeyError, TypeError, ValueError: a line of a known name has other fields.
        """
        handler = _HANDLERS.get(line["event"])
        if handler is not None:
            handler(self, line)
        elif line["level"] in ("warning", "error") and line["event"] not in _TOLD_ELSEWHERE:
            self._count("other", sentence(line) or str(line["event"]))

    @property
    def num_sampled_again_after_kills(self) -> int:
        """Rollouts that were under way when a process ended, or trained after the checkpoint that the next one went on
        from, and went back to its queue."""
        return self._rewound

    def faults(self, *, num_unreadable: int, num_not_understood: int) -> list[Fault]:
        """Every kind, met or not, in the order of a rollout's way.

        Args:
            num_unreadable: lines of the log that are none.
            num_not_understood: lines of known names with other fields.
        """
        count = self._counts
        return [
            self._fault("actor started again after a failure", "actor.restarted", self._restarted_became()),
            self._fault("rollout sampled again", "rollout.requeued", self._requeued_became()),
            self._fault("rollout given up", "rollout.failed", "another prompt occurrence took its place"),
            self._fault("request to a teacher repeated", "teacher.retried", self._retried_became()),
            self._fault("slow teacher: a second one asked", "teacher.hedged", "the first answer was taken"),
            self._fault("teacher replica taken out", "teacher.replica_changed", self._replicas_became()),
            self._fault("no teacher left", "teacher.parked", self._parked_became()),
            self._fault("step skipped", "learner.step_skipped", "the gradient was not finite; the weights stayed"),
            self._fault(
                "generator lost with weights on their way", "weights.push_failed", "it got them when it was back"
            ),
            self._fault(
                "generator lost while measuring", "eval.generator_lost", "the held-out prompts were asked again"
            ),
            Fault(
                name="checkpoint passed over",
                count=len(self._passed_over),
                became=self._passed_over_became(),
                reasons=self._most("checkpoint.corrupt"),
            ),
            self._fault(
                "checkpoint left half done", "checkpoint.leftover_removed", "removed; the one before it was whole"
            ),
            self._fault("checkpoint half replaced", "checkpoint.restored", "the old one was put back"),
            self._fault("old checkpoint not deleted", "checkpoint.not_removed", "it is still there"),
            Fault(
                name="line of the log lost or damaged",
                count=self._lines_lost + num_unreadable + num_not_understood,
                became=_log_became(self._lines_lost, num_unreadable, num_not_understood),
            ),
            Fault(
                name="other warning",
                count=count["other"],
                became="see events.jsonl" if count["other"] else "",
                reasons=self._most("other"),
            ),
        ]

    def _fault(self, name: str, event: str, became: str) -> Fault:
        count = self._counts[event]
        return Fault(name=name, count=count, became=became if count else "", reasons=self._most(event))

    def _count(self, event: str, reason: object = "") -> None:
        self._counts[event] += 1
        if reason:
            reasons = self._reasons.setdefault(event, Counter())
            text = one_line(str(reason), limit=200)
            if text in reasons or len(reasons) < _MAX_REASONS:
                reasons[text] += 1

    def _most(self, event: str) -> tuple[str, ...]:
        reasons = self._reasons.get(event, Counter()).most_common()
        shown = [text if times == 1 else f"{text} ({times:,} times)" for text, times in reasons[:_SHOWN_REASONS]]
        more = len(reasons) - len(shown)
        return (*shown, f"and {more} more") if more else tuple(shown)

    def _restarted_became(self) -> str:
        return ", ".join(f"{actor} {times}×" for actor, times in self._restarted.most_common()) + "; it ran on"

    def _requeued_became(self) -> str:
        trained, left = len(self._requeued_and_trained), len(self._requeued - self._requeued_and_trained)
        return f"{trained:,} trained afterwards" + (f", {left:,} not trained yet" if left else "")

    def _retried_became(self) -> str:
        end = f"{self._unscored:,} were not scored" if self._unscored else "all were scored"
        return f"{len(self._retried):,} different requests; {end}"

    def _replicas_became(self) -> str:
        return ", ".join(f"{name} is {REPLICA_WORDS.get(state, state)}" for name, state in self._replicas.items())

    def _parked_became(self) -> str:
        end = "; the wait was not over at the end of the log" if self._is_parked else ""
        return f"rollouts waited for {self._parked_s:.1f} s in all, none was skipped{end}"

    def _passed_over_became(self) -> str:
        if not self._passed_over:
            return ""
        steps = ", ".join(str(step) for step in self._went_on_from)
        return f"the run went on from step {steps}" if steps else "no other one was used yet"

    def _on_actor_restarted(self, line: Event) -> None:
        self._restarted[one_line(str(line["actor"]), limit=80)] += 1
        self._counts["actor.restarted"] += 1

    def _on_actor_failed(self, line: Event) -> None:
        if not line.get("is_final"):
            reasons = self._reasons.setdefault("actor.restarted", Counter())
            reasons[one_line(f"{line['actor']}: {line['error']}", limit=200)] += 1

    def _on_retried(self, line: Event) -> None:
        self._retried.add(str(line["request_id"]))
        self._count("teacher.retried", line.get("reason"))

    def _on_score(self, line: Event) -> None:
        self._unscored += line["level"] == "warning"

    def _on_replica(self, line: Event) -> None:
        name, state = one_line(str(line["replica"]), limit=80), str(line["state"])
        was_out = self._replicas.get(name) in ("open", "rejected")
        self._replicas[name] = state
        if state in ("open", "rejected") and not was_out:
            self._count("teacher.replica_changed", f"{name}: {line.get('reason') or 'no reason given'}")

    def _on_parked(self, line: Event) -> None:
        self._is_parked = True
        self._count("teacher.parked")

    def _on_resumed(self, line: Event) -> None:
        self._is_parked = False
        self._parked_s += float(line["parked_s"])

    def _on_requeued(self, line: Event) -> None:
        self._requeued.add(line["rollout_id"])
        self._count("rollout.requeued", line.get("reason"))

    def _on_step(self, line: Event) -> None:
        if self._requeued and line["outcome"] == "ok":
            self._requeued_and_trained.update(self._requeued.intersection(line.get("rollout_ids", ())))

    def _on_corrupt(self, line: Event) -> None:
        self._is_passing_over = True
        path = str(line["path"])
        if path not in self._passed_over:  # looked at by the check, and again by the run
            self._passed_over.add(path)
            self._count("checkpoint.corrupt", line.get("problem"))

    def _on_started(self, line: Event) -> None:
        self._is_parked = False
        if self._is_passing_over:
            self._is_passing_over = False
            self._went_on_from.append(int(line.get("step") or 0))

    def _on_rewound(self, line: Event) -> None:
        self._rewound += int(line["num_waiting"])

    def _on_lines_lost(self, line: Event) -> None:
        self._lines_lost += int(line["num_lost"])

    def _on_failed_rollout(self, line: Event) -> None:
        self._count("rollout.failed", line.get("reason"))

    def _on_skipped(self, line: Event) -> None:
        self._count("learner.step_skipped", f"step {line['step']}: rollouts kept in {line.get('rollouts', '?')}")

    def _on_error(self, line: Event) -> None:
        self._count(line["event"], line.get("error"))

    def _on_path(self, line: Event) -> None:
        self._count(line["event"], line.get("problem") or line.get("path"))

    def _on_hedged(self, line: Event) -> None:
        self._count("teacher.hedged")


def _log_became(lost: int, unreadable: int, not_understood: int) -> str:
    parts = [
        (lost, f"{lost:,} could not be written"),
        (unreadable, f"{unreadable:,} cannot be read"),
        (not_understood, f"{not_understood:,} have other fields than this program writes"),
    ]
    words = [text for count, text in parts if count]
    return f"{', '.join(words)}; left out here" if words else ""


_TOLD_ELSEWHERE = frozenset(
    # Ends of processes, and pieces of work whose failure has a line of its own.
    (
        "run.draining",
        "run.failed",
        "run.stopped_at_once",
        "run.start",
        "sampler.rollout",
        "sampler.wave",
        "learner.micro_batch",
        "learner.step",
        "weights.push",
        "eval.run",
        "checkpoint.save",
        "teacher.replica_rejected",
    )
)

_HANDLERS: Mapping[str, Callable[[FaultLog, Any], None]] = {
    "actor.restarted": FaultLog._on_actor_restarted,
    "actor.failed": FaultLog._on_actor_failed,
    "rollout.requeued": FaultLog._on_requeued,
    "rollout.failed": FaultLog._on_failed_rollout,
    "teacher.retried": FaultLog._on_retried,
    "teacher.hedged": FaultLog._on_hedged,
    "teacher.score": FaultLog._on_score,
    "teacher.replica_changed": FaultLog._on_replica,
    "teacher.parked": FaultLog._on_parked,
    "teacher.resumed": FaultLog._on_resumed,
    "learner.step": FaultLog._on_step,
    "learner.step_skipped": FaultLog._on_skipped,
    "weights.push_failed": FaultLog._on_error,
    "eval.generator_lost": FaultLog._on_error,
    "checkpoint.corrupt": FaultLog._on_corrupt,
    "checkpoint.leftover_removed": FaultLog._on_path,
    "checkpoint.restored": FaultLog._on_path,
    "checkpoint.not_removed": FaultLog._on_path,
    "run.started": FaultLog._on_started,
    "ledger.rewound": FaultLog._on_rewound,
    "log.lines_lost": FaultLog._on_lines_lost,
}
