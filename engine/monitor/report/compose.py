"""The order of a report, and its first screen: how the run stands, and the numbers that it is judged by. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.monitor.picture import clock
from engine.monitor.report import results, setup, troubles
from engine.monitor.report.document import Block, Document, Figure, Figures, Section, Text
from engine.monitor.report.faults import Fault
from engine.monitor.report.gather import Facts
from engine.monitor.report.text import one_line


def compose(facts: Facts) -> Document:
    """The whole report."""
    history = facts.history
    found = troubles.faults(history, num_unreadable=facts.num_unreadable)
    name = one_line(str(facts.recipe.get("name") or history.view.run or facts.folder.resolve().name))
    until = setup.moment(max((process.view.now for process in history.processes), default=None))
    return Document(
        title=f"Run {name}",
        subtitle=f"{one_line(str(facts.folder))}{f', as its log was at {until}' if until else ''}",
        sections=(
            Section(title="", blocks=tuple(_head(facts, found))),
            setup.what(facts),
            setup.where(facts),
            results.curves(history, facts.evaluations),
            results.gap(facts.evaluations),
            results.time(history),
            results.staleness(history),
            troubles.troubles(found),
            results.answers(facts.evaluations),
            setup.student(facts),
        ),
    )


def _head(facts: Facts, found: Sequence[Fault]) -> Iterator[Block]:
    text, is_warning = standing(facts)
    yield Text(text=text, is_warning=is_warning)
    yield Figures(figures=tuple(_figures(facts, found)))


def standing(facts: Facts) -> tuple[str, bool]:
    """How the run stands, in a sentence; whether somebody should look."""
    history, last = facts.history, facts.history.last
    after = f"after {_steps(facts)}"
    if not history.processes:
        return "Nothing is known of this run: its log is empty.", True
    if last.view.ended == "finished":
        return f"The run finished {after}.", False
    if last.view.ended == "failed":
        failed, cause = last.failure.get("failed_actor"), last.failure.get("cause")
        return one_line(f"The run failed {after}: {failed}: {cause}"), True
    if last.stopped_at_once:
        return (
            f"The run was stopped at once by a second {one_line(last.stopped_at_once)} {after}; --resume goes on.",
            True,
        )
    if last.view.ended == "stopped":
        return f"The run was stopped by {one_line(last.stopped_by or 'a signal')} {after}; --resume goes on.", False
    if facts.is_alive:
        return f"The run is going on ({last.view.phase}), {_steps(facts)} so far.", False
    if facts.is_alive is False:
        return f"The run was killed {after}: its log has no end and its process is gone; --resume goes on.", True
    return f"The log ends without an end {after}: the run goes on elsewhere, or was killed; --resume goes on.", True


def _steps(facts: Facts) -> str:
    steps = facts.history.view.steps
    return f"{facts.history.step:,}{f' of {steps:,}' if steps else ''} steps"


def _figures(facts: Facts, found: Sequence[Fault]) -> Iterator[Figure]:
    history, evaluations = facts.history, facts.evaluations
    running_s = sum(process.wall_s for process in history.processes)
    yield Figure(name="optimizer steps", value=_steps(facts).removesuffix(" steps"), note=f"{clock(running_s)} in all")
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        yield Figure(
            name="gap to the teacher",
            value=results.closed(first.kl, last.kl),
            note=f"held-out KL {results.figure(first.kl)} → {results.figure(last.kl)} nats/token",
        )
    else:
        yield Figure(name="gap to the teacher", value="not known", note="no measurement before and after")
    rollouts = sum(step.num_rollouts for step in history.steps.values())
    tokens = sum(step.num_tokens for step in history.steps.values())
    yield Figure(name="tokens trained on", value=f"{tokens:,}", note=f"{rollouts:,} rollouts")
    training_s = sum(process.training_s for process in history.processes)
    if training_s > 0.0 and tokens:
        yield Figure(
            name="tokens per second",
            value=f"{tokens / training_s:,.4g}",
            note=f"{rollouts / training_s:,.3g} rollouts/s, since the first one was dispatched",
        )
    ages, bound = history.ages(), history.view.max_staleness
    if ages:
        limit = "" if bound is None else f", bound {bound}"
        mean = sum(age * count for age, count in ages.items()) / ages.total()
        yield Figure(
            name="oldest rollout",
            value=f"{max(ages)} version{'' if max(ages) == 1 else 's'}",
            note=f"mean {mean:.2f}{limit}",
        )
    met = [fault for fault in found if fault.count]
    yield Figure(
        name="faults met", value=f"{len(met)} kinds" if met else "none", note=", ".join(f.name for f in met[:3])
    )
