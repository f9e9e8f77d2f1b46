"""What the end of a run says: one value for machines (``summary.json``, ``--json``) and its picture for people. Decides
what a run is measured by; measures nothing itself.

All times and counts are those of this process: a resumed run counts from its resumption. Held-out measurements are
those of the whole run.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Protocol

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.evaluations import Evaluation, read_evaluations
from engine.ledger import Ledger
from engine.monitor.picture import STYLE_LABEL, STYLE_LOUD, STYLE_QUIET, UNICODE, bar, clock
from engine.monitor.sentences import number, printable
from engine.monitor.view import Faults, RunView, Shares
from engine.node import Outcome
from engine.recipe import Recipe
from engine.run_dir import RunDir

_MAX_ANSWER_LINES = 6


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out number before and after. ``ratio`` is after / before."""

    before: float
    after: float
    ratio: float


class AnswerRow(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    teacher: str | None
    """The reference answer, when the file has one."""
    before: str
    after: str
    kl_before: float
    """Nats per token, of the student's own answer."""
    kl_after: float


class ActorShare(msgspec.Struct, frozen=True, kw_only=True):
    actor: str
    worked: float
    waited_input: float
    waited_room: float
    restarts: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    run: str
    out: str
    step: int
    """Optimizer steps done, earlier processes included."""
    steps: int
    """Asked for."""
    stopped_by: str | None
    wall_s: float
    held_out_version: int | None = None
    """Of the "after" numbers."""
    num_held_out: int | None = None
    """Prompts."""
    kl: HeldOut | None = None
    """Forward KL(teacher to student) on the student's own held-out answers, nats per token."""
    reference_kl: HeldOut | None = None
    """The same on the reference answers (the teacher's own greedy ones, say)."""
    reference_nll: HeldOut | None = None
    """−log-probability of the reference answers under the student, nats per token."""
    score: HeldOut | None = None
    """Mean of the recipe's scorer."""
    answers: tuple[AnswerRow, ...] = ()
    loss_first: float | None = None
    """Of the first step of this process, nats per token."""
    loss_last: float | None = None
    """Mean of the last tenth of the steps."""
    actors: tuple[ActorShare, ...] = ()
    """Since the first rollout was dispatched; in the order in which data flows."""
    bottleneck: str | None = None
    """The actor that worked the largest share of the time: the others wait for it."""
    ledger: dict[str, int] = msgspec.field(default_factory=dict)
    """Rollouts of the whole run in each state."""
    rollouts_trained: int = 0
    rollouts_per_s: float | None = None
    tokens_trained: int = 0
    """Response tokens."""
    tokens_per_s: float | None = None
    """Trained, over the time since the first rollout was dispatched."""
    staleness_bound: int = 0
    staleness_max: int | None = None
    """Versions."""
    staleness_mean: float | None = None
    evaluation_s: float = 0.0
    checkpoint_s: float = 0.0
    loop_lag_max_s: float = 0.0
    faults: Faults = msgspec.field(default_factory=Faults)
    checkpoint: str | None = None
    """Folder of the newest checkpoint."""
    student: str | None = None
    """Folder that transformers loads."""
    load: str | None = None
    """The line of Python that does."""
    report: str | None = None
    """The page that says all of this at length (``python -m engine.report``); Markdown lies beside it."""


class HasLedger(Protocol):
    """What is read of ``engine.parts.Parts``."""

    @property
    def ledger(self) -> Ledger: ...


def summarise(*, recipe: Recipe, run_dir: RunDir, outcome: Outcome, view: RunView, parts: HasLedger) -> Summary:
    """Put together what the log (``view``), the measurements, the ledger and the checkpoints of a run say at its end.
    The ledger may be closed."""
    evaluations = read_evaluations(run_dir.evaluations)
    seconds = view.now - view.training_since if view.training_since is not None else 0.0
    trained = view.totals["trained"]
    num_ages = view.ages.total()
    losses = [loss for loss in view.losses if loss is not None]
    actors = _actors(view)
    student = _student(view, run_dir)
    return Summary(
        run=recipe.name,
        out=str(run_dir.path),
        step=outcome.version,
        steps=recipe.steps,
        stopped_by=outcome.stopped_by,
        wall_s=outcome.wall_s,
        held_out_version=evaluations[-1].version if evaluations else None,
        num_held_out=evaluations[-1].num_prompts if evaluations else None,
        kl=_before_after(evaluations, "kl"),
        reference_kl=_before_after(evaluations, "reference_kl"),
        reference_nll=_before_after(evaluations, "reference_nll"),
        score=_before_after(evaluations, "score"),
        answers=_answers(evaluations),
        loss_first=losses[0] if losses else None,
        loss_last=statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None,
        actors=actors,
        bottleneck=max(actors, key=lambda share: share.worked).actor if actors and trained else None,
        ledger={str(state): count for state, count in parts.ledger.counts().items()},
        rollouts_trained=trained,
        rollouts_per_s=trained / seconds if seconds > 0 else None,
        tokens_trained=int(view.trained_tokens.total),
        tokens_per_s=view.trained_tokens.total / seconds if seconds > 0 else None,
        staleness_bound=recipe.max_staleness,
        staleness_max=max(view.ages) if num_ages else None,
        staleness_mean=sum(age * n for age, n in view.ages.items()) / num_ages if num_ages else None,
        evaluation_s=view.evaluation_s,
        checkpoint_s=view.checkpoint_s,
        loop_lag_max_s=view.loop_lag_max_s,
        faults=view.faults,
        checkpoint=str(student.parent) if student else None,
        student=str(student) if student else None,
        load=f'AutoModelForCausalLM.from_pretrained("{student}")' if student else None,
    )


def _before_after(evaluations: list[Evaluation], field: str) -> HeldOut | None:
    values = [value for e in evaluations if (value := getattr(e, field)) is not None]
    if len({e.version for e in evaluations}) < 2 or len(values) < 2:
        return None
    before, after = values[0], values[-1]
    return HeldOut(before=before, after=after, ratio=after / before if before else float("nan"))


def _answers(evaluations: list[Evaluation]) -> tuple[AnswerRow, ...]:
    if not evaluations:
        return ()
    first = {answer.prompt: answer for answer in evaluations[0].answers}
    last = evaluations[-1]
    rows = []
    for index, after in enumerate(last.answers):
        before = first.get(after.prompt)
        if before is None:
            continue
        teacher = last.references[index] if index < len(last.references) else ""
        rows.append(
            AnswerRow(
                prompt=after.prompt,
                teacher=teacher or None,
                before=before.answer,
                after=after.answer,
                kl_before=before.kl,
                kl_after=after.kl,
            )
        )
    return tuple(rows)


def _actors(view: RunView) -> tuple[ActorShare, ...]:
    out = []
    for actor in view.actors.values():
        shares = view.overall_shares(actor)
        out.append(
            ActorShare(
                actor=actor.name,
                worked=shares.worked,
                waited_input=shares.waited_input,
                waited_room=shares.waited_room,
                restarts=actor.restarts,
            )
        )
    return tuple(out)


def _student(view: RunView, run_dir: RunDir) -> Path | None:
    """Of the newest checkpoint: this process's own, or one that an earlier process left."""
    if view.checkpoint is not None:
        return Path(view.checkpoint[1]) / "student"
    found = sorted(run_dir.checkpoints.glob("step_*/student"))
    return found[-1] if found else None


def print_summary(summary: Summary, console: Console) -> None:
    """For people, in the width of ``console`` (60 columns at least)."""
    width = max(60, console.width)
    parts: list[RenderableType] = [Text(), _headline(summary), Text(), _facts(summary)]
    if summary.answers:
        parts += [Text(), _answer_table(summary.answers, width)]
    if summary.actors:
        parts += [Text(), _actor_table(summary, width)]
    console.print(Group(*parts))
    if summary.load is not None:
        console.print(Text("\nload the student with transformers", style=STYLE_LABEL))
        # Soft: a terminal may fold it, but no newline gets into what is there to be copied.
        console.print(Text(f"  {summary.load}", style=STYLE_LOUD), soft_wrap=True)
    if summary.report is not None:
        console.print(Text("\nreport", style=STYLE_LABEL))
        console.print(Text(f"  {summary.report}", style=STYLE_LOUD), soft_wrap=True)


def _headline(summary: Summary) -> Text:
    end = f"stopped by {summary.stopped_by}" if summary.stopped_by else "finished"
    text = Text(summary.run, style=STYLE_LOUD)
    return text.append(
        f" {end} after {summary.step} of {summary.steps} steps, {clock(summary.wall_s)}", style="default"
    )


def _facts(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=STYLE_LABEL, no_wrap=True)
    table.add_column(overflow="fold")
    if summary.kl is not None:
        table.add_row("held-out KL to the teacher", _change(summary.kl, "nats/token"))
    if summary.reference_nll is not None:
        text = _change(summary.reference_nll, "nats/token")
        table.add_row("reference answers, -log p", text)
    if summary.reference_kl is not None:
        table.add_row("reference answers, KL", _change(summary.reference_kl, "nats/token"))
    if summary.score is not None:
        table.add_row("score", _change(summary.score, ""))
    if summary.loss_first is not None:
        table.add_row("training loss", f"{number(summary.loss_first)} → {number(summary.loss_last)} nats/token")
    table.add_row("trained", f"{summary.rollouts_trained:,} rollouts, {summary.tokens_trained:,} tokens")
    if summary.rollouts_per_s is not None and summary.tokens_per_s is not None:
        table.add_row(
            "throughput", f"{summary.rollouts_per_s:.2f} rollouts/s, {summary.tokens_per_s:.0f} trained tokens/s"
        )
    if summary.staleness_mean is not None:
        table.add_row(
            "staleness",
            f"mean {summary.staleness_mean:.2f}, max {summary.staleness_max}, bound {summary.staleness_bound} versions",
        )
    table.add_row("beside training", f"{summary.evaluation_s:.1f} s measuring, {summary.checkpoint_s:.1f} s saving")
    table.add_row("faults", _faults(summary.faults))
    table.add_row("checkpoint", summary.checkpoint or Text("none", style="yellow"))
    return table


def _change(value: HeldOut, unit: str) -> Text:
    text = Text(f"{number(value.before)} → {number(value.after)}", style=STYLE_LOUD)
    return text.append(f" {unit}   × {value.ratio:.2f}", style="default")


def _faults(faults: Faults) -> Text:
    met = [
        (faults.teacher_retries, f"{faults.teacher_retries} teacher retries"),
        (faults.teacher_outages, f"{faults.teacher_outages} teacher outages"),
        (faults.teacher_parked_s, f"{faults.teacher_parked_s:.1f} s without a teacher"),
        (faults.actor_restarts, f"{faults.actor_restarts} actor restarts"),
        (faults.rollouts_requeued, f"{faults.rollouts_requeued} rollouts sampled again"),
        (faults.rollouts_failed, f"{faults.rollouts_failed} rollouts given up"),
        (faults.steps_skipped, f"{faults.steps_skipped} steps skipped"),
        (faults.warnings, f"{faults.warnings} other warnings"),
    ]
    words = [text for count, text in met if count]
    return Text(", ".join(words), style="yellow") if words else Text("none")


def _answer_table(answers: tuple[AnswerRow, ...], width: int) -> RenderableType:
    """Prompt over its answers: three columns of prose would be too narrow to read on 80."""
    has_teacher = any(row.teacher for row in answers)
    parts: list[RenderableType] = [Text("held-out answers", style=STYLE_LABEL)]
    for row in answers:
        if row is not answers[0]:
            parts.append(Text())
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style=STYLE_QUIET, no_wrap=True)
        grid.add_column(max_width=max(30, min(width, 120) - 12))
        grid.add_row("", Text(printable(row.prompt), style="bold italic"))
        if has_teacher:
            grid.add_row("  teacher", _prose(row.teacher or "", width))
        grid.add_row("  before", _prose(row.before, width))
        grid.add_row("  after", _prose(row.after, width))
        parts.append(grid)
    return Group(*parts)


def _prose(text: str, width: int) -> Text:
    room = (max(30, min(width, 120) - 12)) * _MAX_ANSWER_LINES
    text = printable(" ".join(text.split()))
    return Text(text if len(text) <= room else text[: room - 1] + "…")


def _actor_table(summary: Summary, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=STYLE_LABEL, no_wrap=True)
    for _ in range(4):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(
        "share of time", "", *(Text(word, style=STYLE_QUIET) for word in ("worked", "no input", "no room")), ""
    )
    bar_width = max(8, min(40, width - 60))
    for share in summary.actors:
        shares = Shares(worked=share.worked, waited_input=share.waited_input, waited_room=share.waited_room)
        table.add_row(
            f"  {share.actor}",
            bar(shares, bar_width, UNICODE),
            f"{share.worked:.0%}",
            f"{share.waited_input:.0%}",
            f"{share.waited_room:.0%}",
            Text("bottleneck", style="bold") if share.actor == summary.bottleneck else Text(),
        )
    return table
