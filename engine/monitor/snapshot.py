"""What the status page is told of a run: a ``RunView`` as plain values, in sections that change at different times.

Decides what is on the page and in which numbers; how it looks is the page's business, when it is sent is ``feed``'s.
Pure. Times are epoch seconds, divergences and log-probabilities nats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from engine.monitor.curve import MAX_POINTS, Curve
from engine.monitor.sentences import REPLICA_WORDS
from engine.monitor.view import ActorView, Faults, Held, Notice, RunView, Shares, TrainedAnswer

_MAX_NOTICES = 12
_MAX_TEXT = 4_000
"""Characters of one answer, prompt or message; the log has all of it."""
_MAX_REPLICAS = 256

Point = tuple[int, float | None]
"""Step or version, and a value; None is a gap."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every section."""


class Head(Part, frozen=True, kw_only=True):
    """Which run, how far, how long."""

    run: str
    out: str
    objective: str
    phase: str
    is_over: bool
    step: int
    steps: int | None
    max_staleness: int | None
    now: float
    """Of the last line of the log: it moves every second while the process lives."""
    started_at: float | None
    remaining_s: float | None
    parked_since: float | None
    """Every teacher replica has been away since then."""
    checkpoint_step: int | None


class Weights(Part, frozen=True, kw_only=True):
    """Which version is where."""

    learner: int
    live: int
    """Every generator holds it."""
    coming: int | None
    """On its way to the generators."""
    sampler: int
    in_flight: tuple[tuple[int, int], ...]
    """(version that began them, rollouts): sampled, not yet trained."""
    num_sampling: int
    """Rollouts whose answer is not complete."""


class Channel(Part, frozen=True, kw_only=True):
    name: str
    items: int | None
    """None: nothing is known of it yet."""
    max_items: int | None
    to: str
    """Who receives from it."""


class Stage(Part, frozen=True, kw_only=True):
    """One actor and the channel into which it sends."""

    name: str
    state: str
    restarts: int
    shares: Shares | None
    """Of the last half minute, of all the time when the run is over; None before there is work."""
    waits_for: str
    """In words; empty when it works all the time."""
    channel: Channel | None


class Pipeline(Part, frozen=True, kw_only=True):
    stages: tuple[Stage, ...]
    """In the order in which data flows."""
    rollouts: dict[str, int]
    """sampling, at teacher, scored, in step, trained, failed."""
    slots: tuple[int, int, int] | None
    """Sequences that are decoded, that wait, and that have room."""


class Curves(Part, frozen=True, kw_only=True):
    loss: tuple[Point, ...]
    """Objective per step."""
    held_out: tuple[Held, ...]
    """Thinned like the curves; the first and the last are always there."""
    trained: tuple[Point, ...]
    """Tokens per second, of the last minute."""
    sampled: tuple[Point, ...]


class Rates(Part, frozen=True, kw_only=True):
    """Of the last minute; beside ``Curves``, which are long and change once per step."""

    trained_per_s: float | None
    sampled_per_s: float | None
    trained_total: int
    is_measuring: bool
    """Held-out prompts, now."""


class Staleness(Part, frozen=True, kw_only=True):
    ages: tuple[tuple[int, int], ...]
    """(versions, rollouts trained at that age), ascending."""
    mean: float | None
    limit: int | None


class Replica(Part, frozen=True, kw_only=True):
    name: str
    state: str
    words: str
    since: float | None
    reason: str


class Teacher(Part, frozen=True, kw_only=True):
    replicas: tuple[Replica, ...]
    """The first ones; ``num_replicas`` is all."""
    num_replicas: int
    num_up: int
    num_scored: int
    """Rollouts, also by a teacher without replicas: one in this process."""
    retries: int


class HeldOutAnswer(Part, frozen=True, kw_only=True):
    version: int
    prompt: str
    answer: str
    kl: float


class Answers(Part, frozen=True, kw_only=True):
    trained: tuple[TrainedAnswer, ...]
    """Newest first."""
    held_out: tuple[HeldOutAnswer, ...]
    is_objective_kl: bool


class Message(Part, frozen=True, kw_only=True):
    at: float
    level: str
    text: str


class Messages(Part, frozen=True, kw_only=True):
    newest: tuple[Message, ...]
    """Newest first."""
    faults: Faults


Sections = dict[str, Callable[[RunView], Part]]


def head(view: RunView) -> Head:
    return Head(
        run=view.run,
        out=view.out,
        objective=view.objective,
        phase=view.phase,
        is_over=view.ended is not None,
        step=view.step,
        steps=view.steps,
        max_staleness=view.max_staleness,
        now=round(view.now, 1),
        started_at=view.started_at,
        remaining_s=_rounded(view.remaining_s(view.now)),
        parked_since=view.parked_since,
        checkpoint_step=None if view.checkpoint is None else view.checkpoint[0],
    )


def weights(view: RunView) -> Weights:
    begun = Counter(view.begun_under.values())
    return Weights(
        learner=view.step,
        live=view.live_version,
        coming=view.step if view.step > view.live_version and view.ended is None else None,
        sampler=view.sampler_version,
        in_flight=tuple(sorted(begun.items())),
        num_sampling=len(view.in_flight) - begun.total(),
    )


def pipeline(view: RunView) -> Pipeline:
    return Pipeline(
        stages=tuple(_stage(view, actor) for actor in view.actors.values()),
        rollouts=view.rollouts_by_state() | {"trained": view.totals["trained"], "failed": view.faults.rollouts_failed},
        slots=view.slots,
    )


def curves(view: RunView) -> Curves:
    return Curves(
        loss=_points(view.loss_curve),
        held_out=tuple(_thinned(view.evaluations)),
        trained=_points(view.trained_curve),
        sampled=_points(view.sampled_curve),
    )


def rates(view: RunView) -> Rates:
    trained, sampled = view.tokens_per_s()
    return Rates(
        trained_per_s=_rounded(trained),
        sampled_per_s=_rounded(sampled),
        trained_total=int(view.trained_tokens.total),
        is_measuring=view.is_measuring,
    )


def staleness(view: RunView) -> Staleness:
    total = view.ages.total()
    return Staleness(
        ages=tuple(sorted(view.ages.items())),
        mean=sum(age * count for age, count in view.ages.items()) / total if total else None,
        limit=view.max_staleness,
    )


def teacher(view: RunView) -> Teacher:
    # Those that are not up first: with more replicas than have room these are the ones to look at.
    names = sorted(view.replicas, key=lambda name: (view.replicas[name] == "closed", name))[:_MAX_REPLICAS]
    return Teacher(
        replicas=tuple(_replica(view, name) for name in sorted(names)),
        num_replicas=len(view.replicas),
        num_up=sum(state == "closed" for state in view.replicas.values()),
        num_scored=view.totals["scored"],
        retries=view.faults.teacher_retries,
    )


def answers(view: RunView) -> Answers:
    trained = list(reversed(view.trained_answers))
    prompts = without_common_lines([answer.prompt for answer in trained])
    return Answers(
        trained=tuple(
            msgspec.structs.replace(answer, prompt=prompt[-_MAX_TEXT:])
            for answer, prompt in zip(trained, prompts, strict=True)
        ),
        held_out=tuple(
            HeldOutAnswer(version=a.version, prompt=a.prompt[:_MAX_TEXT], answer=a.answer[:_MAX_TEXT], kl=a.kl)
            for a in list(view.answers.values())[-5:]
        ),
        is_objective_kl=view.objective.endswith("kl"),
    )


def messages(view: RunView) -> Messages:
    chosen: list[Notice] = []
    for notice in reversed(view.notices):
        # Of a row of the same kind only the newest, unless it is a warning.
        if not chosen or notice.event != chosen[-1].event or notice.level != "info":
            chosen.append(notice)
        if len(chosen) == _MAX_NOTICES:
            break
    return Messages(
        newest=tuple(
            Message(at=round(notice.at.timestamp(), 1), level=notice.level, text=notice.text[:_MAX_TEXT])
            for notice in chosen
        ),
        faults=msgspec.structs.replace(view.faults, teacher_parked_s=round(view.faults.teacher_parked_s, 1)),
    )


SECTIONS: Sections = {
    "head": head,
    "weights": weights,
    "pipeline": pipeline,
    "curves": curves,
    "rates": rates,
    "staleness": staleness,
    "teacher": teacher,
    "answers": answers,
    "messages": messages,
}


def without_common_lines(prompts: Sequence[str]) -> list[str]:
    """The prompts without the lines that all of them begin, or end, with: a chat template says those every time.

    With fewer than two different prompts nothing is known to be common.
    """
    if len(set(prompts)) < 2:
        return list(prompts)
    split = [prompt.split("\n") for prompt in prompts]
    most = min(map(len, split)) - 1  # of each prompt one line stays
    before = _num_common(split, most)
    after = _num_common([lines[::-1] for lines in split], most - before)
    return ["\n".join(lines[before : len(lines) - after]) for lines in split]


def _num_common(texts: Sequence[Sequence[str]], most: int) -> int:
    for number in range(most):
        if len({lines[number] for lines in texts}) > 1:
            return number
    return most


def _stage(view: RunView, actor: ActorView) -> Stage:
    shares = None
    if actor.state in ("running", "draining", "stopped") and view.training_since is not None:
        shares = view.recent_shares(actor) if view.ended is None else view.overall_shares(actor)
    giver, taker = view.waits_for(actor)
    waits_for = ""
    if shares is not None and shares.worked <= 0.98:
        waits_for = f"room at {taker}" if shares.waited_room > shares.waited_input else giver
    return Stage(
        name=actor.name,
        state=actor.state,
        restarts=actor.restarts,
        shares=None if shares is None else _rounded_shares(shares),
        waits_for=waits_for,
        channel=None if actor.produces is None else _channel(view, actor.produces, taker),
    )


def _channel(view: RunView, name: str, to: str) -> Channel:
    seen = view.channels.get(name)
    return Channel(
        name=name,
        items=None if seen is None else seen.items,
        max_items=None if seen is None else seen.max_items,
        to=to,
    )


def _replica(view: RunView, name: str) -> Replica:
    state = view.replicas[name]
    since, reason = view.replica_notes.get(name, (None, ""))
    return Replica(
        name=name, state=state, words=REPLICA_WORDS.get(state, state), since=since, reason=reason[:_MAX_TEXT]
    )


def _points(curve: Curve) -> tuple[Point, ...]:
    return tuple((x, _rounded(y)) for x, y in curve.points())


def _thinned(evaluations: Sequence[Held]) -> Sequence[Held]:
    every = -(-len(evaluations) // MAX_POINTS)
    if every <= 1:
        return evaluations
    chosen = list(evaluations[::every])
    return chosen if chosen[-1] is evaluations[-1] else [*chosen, evaluations[-1]]


def _rounded_shares(shares: Shares) -> Shares:
    """Bars of a few hundred pixels need no more, and what has not changed is not sent again."""
    worked, room = round(shares.worked, 2), round(shares.waited_room, 2)
    return Shares(worked=worked, waited_input=round(max(0.0, 1.0 - worked - room), 2), waited_room=room)


def _rounded(value: float | None) -> float | None:
    """To four digits: 500 points in full precision are three times the bytes."""
    return None if value is None else float(f"{value:.4g}")
