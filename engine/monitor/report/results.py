"""What came of a run, in words: curves, gap closed, where time went, staleness, sample answers. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from engine.evaluations import Answer, Evaluation
from engine.monitor.picture import clock
from engine.monitor.report.document import (
    Bar,
    Bars,
    Block,
    Column,
    Curve,
    Mark,
    Section,
    Series,
    Table,
    Text,
)
from engine.monitor.report.history import History, Process, Step
from engine.monitor.report.text import one_line, visible
from engine.monitor.report.thin import thin
from engine.monitor.sentences import number
from engine.monitor.view import Shares

MAX_ANSWERS = 12
_MAX_ANSWER = 2000
"""Characters of one answer."""
_MAX_AGES = 12
"""Bars of the histogram; with more ages than that neighbours share one."""


# Curves


def curves(history: History, evaluations: Sequence[Evaluation]) -> Section:
    blocks: list[Block] = [*_step_curves(history), *_held_out_curve(evaluations)]
    if not history.steps:
        blocks.insert(0, Text(text="No optimizer step was done."))
    return Section(title="Curves", blocks=tuple(blocks))


def _step_curves(history: History) -> Iterator[Curve]:
    if not history.steps:
        return
    resumed = dict.fromkeys(process.start_step for process in history.processes if process.start_step)
    marks = tuple(Mark(x=float(step), name="resumed") for step in resumed)
    bound, steps = history.view.max_staleness, history.steps.values()
    for title, unit, lines in _step_lines(history.view.objective):
        is_age = title == "Staleness"
        yield Curve(
            title=title,
            unit=unit,
            x_name="step",
            series=tuple(
                Series(name=name, points=thin([(float(s.step), y) for s in steps if (y := value(s)) is not None]))
                for name, value in lines
            ),
            limit=float(bound) if is_age and bound is not None else None,
            limit_name="bound" if is_age else "",
            marks=marks,
            from_zero=not title.startswith("Training loss"),
        )


def _step_lines(objective: str) -> Iterator[tuple[str, str, list[tuple[str, Callable[[Step], float | None]]]]]:
    """Title, unit, and what is drawn under which name; NaN is a gap, None nothing that is missed."""
    yield (
        f"Training loss ({objective})" if objective else "Training loss",
        "nats/token",
        [("loss", lambda s: _or_gap(s.loss))],
    )
    yield "Throughput", "trained tokens/s", [("tokens/s", lambda s: s.tokens_per_s)]
    yield "Staleness", "versions", [("mean", _mean_age), ("oldest", _max_age)]
    yield "Gradient norm", "before clipping", [("norm", lambda s: _or_gap(s.grad_norm))]
    yield "Learning rate", "", [("rate", lambda s: s.lr)]


def _or_gap(value: float | None) -> float:
    """JSON has no NaN: what was not finite is null in the log."""
    return math.nan if value is None else value


def _mean_age(step: Step) -> float | None:
    count = sum(n for _, n in step.ages)
    return sum(age * n for age, n in step.ages) / count if count else None


def _max_age(step: Step) -> float | None:
    return float(step.ages[-1][0]) if step.ages else None


def _held_out_curve(evaluations: Sequence[Evaluation]) -> Iterator[Curve]:
    if not evaluations:
        return
    lines: list[tuple[str, list[tuple[float, float | None]]]] = [
        ("student's answers", [(float(e.version), e.kl) for e in evaluations])
    ]
    if any(e.reference_kl is not None for e in evaluations):
        lines.append(("reference answers", [(float(e.version), e.reference_kl) for e in evaluations]))
    yield Curve(
        title="Held-out KL to the teacher",
        unit="nats/token",
        x_name="version",
        series=tuple(Series(name=name, points=thin(values)) for name, values in lines),
        from_zero=True,
    )


# Gap


def gap(evaluations: Sequence[Evaluation]) -> Section:
    return Section(title="Gap to the teacher", blocks=tuple(_gap(evaluations)))


def closed(before: float, after: float) -> str:
    """The share of a divergence that is gone."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return "not finite"
    if before <= 0.0:
        return "there was none"
    share = 1.0 - after / before
    return f"{share:.1%} closed" if share >= 0.0 else f"grew by {-share:.1%}"


def _gap(evaluations: Sequence[Evaluation]) -> Iterator[Block]:
    if not evaluations:
        yield Text(
            text="Not measured: there is no held-out measurement (a recipe asks for one with its section evaluation)."
        )
        return
    first, last = evaluations[0], evaluations[-1]
    yield Text(
        text=f"Measured on {last.num_prompts:,} held-out prompts, which are not trained on. The gap is the forward KL "
        "from teacher to student, in nats per token: on the student's own answers, and on the reference answers."
    )
    if len(evaluations) == 1:
        yield Text(text=f"Measured once, at version {first.version}: there is no before and after.")
    yield Table(
        columns=(
            Column(name=""),
            Column(name=f"version {first.version}", is_number=True),
            *([Column(name=f"version {last.version}", is_number=True)] if last is not first else []),
            *([Column(name="change")] if last is not first else []),
        ),
        rows=tuple(_gap_rows(first, last)),
    )
    if len(evaluations) > 2:
        yield _all_measurements(evaluations)


def _gap_rows(first: Evaluation, last: Evaluation) -> Iterator[tuple[str, ...]]:
    lines: tuple[tuple[str, float | None, float | None, Callable[[float, float], str]], ...] = (
        ("KL, own answers", first.kl, last.kl, closed),
        ("KL, reference answers", first.reference_kl, last.reference_kl, closed),
        ("reference answers, −log p", first.reference_nll, last.reference_nll, _difference),
        ("score", first.score, last.score, _difference),
    )
    for name, before, after, change in lines:
        if before is None and after is None:
            continue
        row: tuple[str, ...] = (name, _number(before))
        if last is not first:
            row += (_number(after), change(before, after) if before is not None and after is not None else "")
        yield row


def figure(value: float) -> str:
    return number(value if math.isfinite(value) else None)


def _difference(before: float, after: float) -> str:
    return f"{after - before:+.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else figure(value)


def _all_measurements(evaluations: Sequence[Evaluation]) -> Table:
    names = ("version", "prompts", "tokens", "KL", "reference KL", "reference −log p", "score")
    return Table(
        columns=tuple(Column(name=name, is_number=True) for name in names),
        rows=tuple(
            (
                f"{e.version}",
                f"{e.num_prompts:,}",
                f"{e.num_tokens:,}",
                _number(e.kl),
                _number(e.reference_kl),
                _number(e.reference_nll),
                _number(e.score),
            )
            for e in evaluations
        ),
        title="All measurements",
        is_folded=True,
    )


# Time


def time(history: History) -> Section:
    return Section(title="Where time went", blocks=tuple(_time(history)))


def _time(history: History) -> Iterator[Block]:
    training_s = sum(process.training_s for process in history.processes)
    if training_s <= 0.0:
        yield Text(text="No rollout was dispatched: there is no time to divide.")
    else:
        shares = {name: _overall(history.processes, name) for name in _actor_names(history.processes)}
        busiest = max(shares, key=lambda name: shares[name].worked, default=None)
        if busiest is not None and history.steps:
            yield Text(
                text=f"The bottleneck is {one_line(busiest)}: it worked {shares[busiest].worked:.1%} of the time, and "
                "the others waited for it."
            )
        yield Bars(
            title="Share of the time since the first rollout was dispatched",
            name="actor",
            parts=("worked", "waited for input", "waited for room"),
            value_names=("worked", "no input", "no room"),
            bars=tuple(
                Bar(name=one_line(name), shares=values, values=tuple(_share_words(v, training_s) for v in values))
                for name, share in shares.items()
                for values in [(share.worked, share.waited_input, share.waited_room)]
            ),
        )
    yield _beside(history, training_s)


def _share_words(share: float, seconds: float) -> str:
    return f"{share:.1%} ({_seconds(share * seconds)})"


def _actor_names(processes: Iterable[Process]) -> list[str]:
    """In the order in which data flows, as the last process that knew says."""
    names = dict.fromkeys(name for process in reversed(list(processes)) for name in process.view.actors)
    return [name for name in names if isinstance(name, str)]  # a line of somebody else's may name one otherwise


def _overall(processes: Iterable[Process], name: str) -> Shares:
    """Means of all processes, by how long each of them trained."""
    sums, total_s = [0.0, 0.0, 0.0], 0.0
    for process in processes:
        actor = process.view.actors.get(name)
        if actor is None or process.training_s <= 0.0:
            continue
        shares = process.view.overall_shares(actor)
        total_s += process.training_s
        for index, share in enumerate((shares.worked, shares.waited_input, shares.waited_room)):
            sums[index] += share * process.training_s
    if total_s <= 0.0:
        return Shares(worked=0.0, waited_input=1.0, waited_room=0.0)
    return Shares(worked=sums[0] / total_s, waited_input=sums[1] / total_s, waited_room=sums[2] / total_s)


def _beside(history: History, training_s: float) -> Table:
    processes = history.processes
    running_s = sum(process.wall_s for process in processes)
    rows = [
        ("in all", _seconds(running_s), _of_processes(len(processes))),
        ("before the first rollout", _seconds(running_s - training_s), "models, threads, connections"),
        ("measuring", _seconds(sum(p.view.evaluation_s for p in processes)), "held-out prompts; the learner stands"),
        ("saving", _seconds(sum(p.view.checkpoint_s for p in processes)), "checkpoints; the learner stands"),
        ("without a teacher", _seconds(sum(p.parked_s for p in processes)), "every replica was away, rollouts waited"),
    ]
    lag_s = max((process.view.loop_lag_max_s for process in processes), default=0.0)
    rows.append(("event loop late", f"{lag_s * 1000:.0f} ms", "at most"))
    return Table(
        columns=(Column(name=""), Column(name="", is_number=True), Column(name="")),
        rows=tuple(rows),
        title="Beside training",
    )


def _of_processes(count: int) -> str:
    return "one process" if count == 1 else f"{count:,} processes, the time between them left out"


def _seconds(seconds: float) -> str:
    seconds = max(0.0, seconds)
    return f"{seconds:.1f} s" if seconds < 60.0 else clock(seconds)


# Staleness


def staleness(history: History) -> Section:
    return Section(title="Staleness", blocks=tuple(_staleness(history)))


def _staleness(history: History) -> Iterator[Block]:
    ages, bound = history.ages(), history.view.max_staleness
    total = ages.total()
    if not total:
        yield Text(text="No rollout was trained: there are no ages.")
        return
    mean = sum(age * count for age, count in ages.items()) / total
    too_old = history.num_too_old()
    limit = "" if bound is None else f" The bound is {bound}."
    yield Text(
        text="Age of each rollout when it was trained: versions between its first token and its step. "
        f"Mean {mean:.2f}, oldest {max(ages)}.{limit}"
    )
    if too_old:
        yield Text(text=f"{too_old:,} rollouts were older than the bound that held in their step.", is_warning=True)
    elif bound is not None:
        yield Text(text="None was older than the bound.")
    yield Bars(
        title="Rollouts by age",
        name="in versions",
        parts=("rollouts",),
        value_names=("rollouts", "share"),
        bars=tuple(_age_bars(ages, bound)),
    )


def _age_bars(ages: Counter[int], bound: int | None) -> Iterator[Bar]:
    total = ages.total()
    # A bound of thousands with all ages at the bottom needs no bars for what never came.
    last = max(max(ages), min(bound or 0, max(ages) + _MAX_AGES))
    width = max(1, math.ceil((last + 1) / _MAX_AGES))
    for low in range(0, last + 1, width):
        high = min(low + width - 1, last)
        count = sum(n for age, n in ages.items() if low <= age <= high)
        yield Bar(
            name=f"age {low}" if low == high else f"age {low} to {high}",
            shares=(count / total,),
            values=(f"{count:,}", f"{count / total:.1%}"),
            is_beyond=bound is not None and low > bound and count > 0,
        )


# Answers


def answers(evaluations: Sequence[Evaluation]) -> Section:
    return Section(title="Sample answers", blocks=tuple(_answers(evaluations)))


def _answers(evaluations: Sequence[Evaluation]) -> Iterator[Block]:
    with_answers = [evaluation for evaluation in evaluations if evaluation.answers]
    if not with_answers:
        yield Text(text="None: no held-out answer was kept.")
        return
    first, last = with_answers[0], with_answers[-1]
    kind = "greedy; KL to the teacher over the answer's own tokens, nats per token"
    versions = f"version {last.version}" if first is last else f"version {first.version} before, {last.version} after"
    yield Text(text=f"Held-out prompts; the student's answers, {versions}, are {kind}.")
    before = {answer.prompt: answer for answer in first.answers} if first is not last else {}
    for index, after in enumerate(last.answers[:MAX_ANSWERS]):
        yield Table(
            columns=(Column(name=""), Column(name="KL", is_number=True), Column(name="answer")),
            rows=tuple(_answer_rows(index, last, before.get(after.prompt), after)),
            title=visible(after.prompt.strip(), limit=_MAX_ANSWER) or "(an empty prompt)",
        )
    rest = len(last.answers) - MAX_ANSWERS
    if rest > 0:
        yield Text(text=f"{rest:,} more are in evaluations.jsonl.")


def _answer_rows(index: int, last: Evaluation, before: Answer | None, after: Answer) -> Iterator[tuple[str, str, str]]:
    reference = last.references[index] if index < len(last.references) else ""
    if reference:
        yield "teacher", "", _prose(reference)
    if before is not None:
        yield "before", number(before.kl), _prose(before.answer)
    yield "student" if before is None else "after", number(after.kl), _prose(after.answer)


def _prose(text: str) -> str:
    return visible(text.strip(), limit=_MAX_ANSWER) or "(nothing)"
