"""What a run did, from all lines of its log: one ``RunView`` per process, and the steps, measurements and faults of the
run as a whole. Pure.

A run that was killed and resumed has several processes in one file. What was trained after the checkpoint that it went
on from is given up: of two lines with one step the later one holds, and a step beyond the resumption counts only when
it has been trained again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import msgspec

from engine.evaluations import Answer, Evaluation
from engine.monitor.report.faults import FaultLog
from engine.monitor.view import RunView
from engine.tracing import Event

_MAY_COME_FIRST = (
    "ledger.",
    "checkpoint.",
    "data.",
    "log.",
    "eval.line",
    "teacher.replica",
    "teacher.sends_json",
    "teacher.top_k_lowered",
)
"""What a process may have to say before its log is open: such lines stand in the file before its ``log.opened``."""


Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class StartFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a ``run.started`` line."""

    recipe: str
    steps: Count
    rollouts_per_step: Count
    max_staleness: Count
    step: Count | None = None
    out: str = ""
    objective: str = ""


class StepFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a ``learner.step`` line."""

    outcome: str
    step: Count
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    num_rollouts: Count = 0
    num_tokens: Count = 0
    ages: list[Count] = []
    """Versions, of each rollout."""


class SavedFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a ``checkpoint.saved`` line."""

    step: Count
    path: str


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step that counts."""

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    num_rollouts: int
    num_tokens: int
    tokens_per_s: float | None
    """Trained, since the step before; None for the first one of a process."""
    ages: tuple[tuple[int, int], ...]
    """(age in versions, rollouts), youngest first."""
    max_staleness: int | None
    """The bound under which it was trained."""


class Process:
    """One process of the run, from its first line to its last."""

    def __init__(self, source: int) -> None:
        self.source = source
        """Which log file it writes."""
        self.view = RunView()
        self.opened: Event = {}
        """Its ``log.opened`` line; empty when there is none."""
        self.described: Event = {}
        """Its ``node.described`` line; empty when there is none."""
        self.began_at: float | None = None
        """Epoch seconds of its first line."""
        self.start_step = 0
        """Steps that were done when it began."""
        self.failure: Event = {}
        """Its ``run.failed`` line; empty when it did not fail."""
        self.stopped_at_once = ""
        """The second signal."""
        self.stopped_by = ""

    @property
    def wall_s(self) -> float:
        return 0.0 if self.began_at is None else self.view.now - self.began_at

    @property
    def training_s(self) -> float:
        """Since its first rollout was dispatched."""
        return 0.0 if self.view.training_since is None else self.view.now - self.view.training_since

    @property
    def parked_s(self) -> float:
        """Seconds without any teacher, also of a wait that did not end."""
        since = self.view.parked_since
        return self.view.faults.teacher_parked_s + (0.0 if since is None else self.view.now - since)


class History:
    """Apply every line in order (``log_files.merged``), then ``end``; read the attributes afterwards."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        """In the order in which they began."""
        self.steps: dict[int, Step] = {}
        """By step, ascending."""
        self.step = 0
        """Done, of the run as it stands."""
        self.num_given_up = 0
        """Steps that were trained and did not count, because the run went on from before them."""
        self.faults = FaultLog()
        self.num_not_understood = 0
        """Lines of known names with other fields."""
        self._measured: dict[int, Evaluation] = {}
        self._last: dict[int, Process] = {}
        self._waiting: dict[int, list[Event]] = {}
        """Of each file: lines of which it is not known yet whose they are."""
        self._last_step_at: dict[int, float] = {}
        self._histograms: dict[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] = {}

    def apply(self, source: int, line: Event) -> None:
        """Take in one line; one that is not understood is counted and left out."""
        name = line["event"]
        if name == "log.opened" and self._last.get(source) is not None and self._last[source].opened:
            self._begin(source)
        elif name.startswith(_MAY_COME_FIRST) and name != "log.opened" and "actor" not in line:
            self._waiting.setdefault(source, []).append(line)
            return
        self._catch_up(source)
        self._take(source, line)

    def end(self) -> None:
        """No more lines."""
        for source in list(self._waiting):
            self._catch_up(source)

    @property
    def view(self) -> RunView:
        """Of the last process that ran the learner, or of the last one at all; an empty one when there is none."""
        return self._learners()[-1].view

    @property
    def first(self) -> Process:
        return self.processes[0] if self.processes else Process(0)

    @property
    def last(self) -> Process:
        """The newest on the node of the learner: how it ended is how the run stands."""
        source = self._learners()[-1].source
        return [process for process in self.processes if process.source == source][-1] if self.processes else Process(0)

    def evaluations(self, written: list[Evaluation]) -> list[Evaluation]:
        """By version, ascending: those ``written`` to ``evaluations.jsonl``, and the ones that only the log knows.

        A version that was given up does not count, and of two of one version the later one does.
        """
        found = {**self._measured, **{evaluation.version: evaluation for evaluation in written}}
        return [found[version] for version in sorted(found) if version <= self.step]

    def ages(self) -> Counter[int]:
        """Rollouts by the age that they had when they were trained, in versions."""
        counted: Counter[int] = Counter()
        for step in self.steps.values():
            counted.update(dict(step.ages))
        return counted

    def num_too_old(self) -> int:
        """Rollouts that were trained beyond the bound that held then."""
        return sum(
            count
            for step in self.steps.values()
            if step.max_staleness is not None
            for age, count in step.ages
            if age > step.max_staleness
        )

    def _learners(self) -> list[Process]:
        """Those that ran one; else all; at least one."""
        return [p for p in self.processes if p.view.steps is not None] or self.processes or [Process(0)]

    def _begin(self, source: int) -> Process:
        process = Process(source)
        self.processes.append(process)
        self._last[source] = process
        self._last_step_at.pop(source, None)
        return process

    def _catch_up(self, source: int) -> None:
        for line in self._waiting.pop(source, ()):
            self._take(source, line)

    def _take(self, source: int, line: Event) -> None:
        process = self._last.get(source) or self._begin(source)
        try:
            line = _mended(line)
            facts = _checked(line)
            process.view.apply(line)
            handler = _HANDLERS.get(line["event"])
            if handler is not None:
                handler(self, process, facts)
            self.faults.apply(line)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, msgspec.MsgspecError):
            self.num_not_understood += 1
            return
        if process.began_at is None:
            process.began_at = process.view.now

    def _on_opened(self, process: Process, line: Event) -> None:
        process.opened = line

    def _on_described(self, process: Process, line: Event) -> None:
        process.described = line

    def _on_started(self, process: Process, facts: StartFacts) -> None:
        process.start_step = self.step = facts.step or 0
        self._give_up(self.step + 1)

    def _on_failed(self, process: Process, line: Event) -> None:
        process.failure = line

    def _on_draining(self, process: Process, line: Event) -> None:
        process.stopped_by = str(line.get("signal") or line.get("reason") or "")

    def _on_stopped_at_once(self, process: Process, line: Event) -> None:
        process.stopped_at_once = str(line["signal"])

    def _on_step(self, process: Process, facts: StepFacts) -> None:
        if facts.outcome != "ok":
            return
        self._give_up(facts.step)
        now = process.view.now
        before = self._last_step_at.get(process.source)
        self._last_step_at[process.source] = now
        ages = tuple(sorted(Counter(facts.ages).items()))
        self.step = facts.step
        self.steps[facts.step] = Step(
            step=facts.step,
            loss=facts.loss,
            grad_norm=facts.grad_norm,
            lr=facts.lr,
            num_rollouts=facts.num_rollouts,
            num_tokens=facts.num_tokens,
            tokens_per_s=facts.num_tokens / (now - before) if before is not None and now > before else None,
            # The same few histograms come again and again: one of each is kept.
            ages=self._histograms.setdefault(ages, ages),
            max_staleness=process.view.max_staleness,
        )

    def _on_eval(self, process: Process, line: Event) -> None:
        if line["outcome"] == "ok":
            measured = msgspec.convert(line, Evaluation)
            self._measured[measured.version] = measured

    def _on_answer(self, process: Process, line: Event) -> None:
        measured = self._measured.get(line["version"])
        if measured is not None:
            answers = (*measured.answers, msgspec.convert(line, Answer))
            self._measured[measured.version] = msgspec.structs.replace(measured, answers=answers)

    def _give_up(self, first: int) -> None:
        """Steps from ``first`` on are not part of the run any more."""
        for step in list(_from_the_end(self.steps, first)):
            del self.steps[step]
            self.num_given_up += 1


def _mended(line: Event) -> Event:
    """JSON has no NaN: a divergence that was none is null in the log."""
    return {**line, "kl": math.nan} if line["event"] == "eval.run" and line.get("kl", 0.0) is None else line


def _checked(line: Event) -> Any:
    """Of lines that make a run what it is, what is read of them; other lines as they are.

    Raises:
        msgspec.ValidationError: a field is missing or of another type.
    """
    shape = _SHAPES.get(line["event"])
    return line if shape is None else msgspec.convert(line, shape)


def _from_the_end(steps: dict[int, Step], first: int) -> Iterator[int]:
    for step in reversed(steps):
        if step < first:
            return
        yield step


_SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "run.started": StartFacts,
    "learner.step": StepFacts,
    "checkpoint.saved": SavedFacts,
}

_HANDLERS: Mapping[str, Callable[[History, Process, Any], None]] = {
    "log.opened": History._on_opened,
    "node.described": History._on_described,
    "run.started": History._on_started,
    "run.failed": History._on_failed,
    "run.draining": History._on_draining,
    "run.stopped_at_once": History._on_stopped_at_once,
    "learner.step": History._on_step,
    "eval.run": History._on_eval,
    "eval.answer": History._on_answer,
}
