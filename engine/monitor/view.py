"""What is known of a run, made from the lines of its log alone: the same for a live run, a killed one and a finished
one. Pure: no terminal, no clock (time is the time of the last line). How it is shown is decided elsewhere.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import msgspec

from engine.monitor.curve import Curve
from engine.monitor.intervals import BusyTime
from engine.monitor.readings import Rate, Total
from engine.monitor.sentences import sentence
from engine.tracing import Event

WINDOW_S = 30.0
"""What "now" means for shares and rates: several steps of a small run, and short enough to see a change."""

_MAX_LOSSES = 4096
_MAX_NOTICES = 50
_MAX_TRAINED_ANSWERS = 5

STANDARD_GRAPH = (
    ("prompt_feeder", None, "prompts"),
    ("sampler", "prompts", "rollouts"),
    ("teacher_proxy", "rollouts", "scored"),
    ("learner", "scored", "versions"),
    ("weight_syncer", "versions", None),
)
"""(actor, channel that it consumes, channel that it produces); a ``run.graph`` line replaces it."""

_WORKER_OF = {
    "sampler": "sampler",
    "teacher": "teacher_proxy",
    "learner": "learner",
    "eval": "learner",
    "checkpoint": "learner",
    "weights": "weight_syncer",
}
"""Whose work a span is, by the first word of its name, when it does not say ``actor``."""


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor's time went to; the three add up to 1."""

    worked: float
    waited_input: float
    waited_room: float


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that people are told (``sentence``)."""

    at: datetime
    event: str
    level: str
    text: str


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement on held-out prompts; fields as in ``engine.actors.evaluator.Evaluation``."""

    version: int
    num_prompts: int
    kl: float
    reference_kl: float | None = None
    reference_nll: float | None = None
    score: float | None = None


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out answer."""

    version: int
    prompt: str
    answer: str
    kl: float


class TrainedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that a step was trained on, token by token (``answer.trained``)."""

    step: int
    rollout_id: int
    prompt: str
    pieces: tuple[str, ...]
    """[n] text of each token, of the first n; together the answer."""
    divergences: tuple[float | None, ...]
    """[n] the objective, nats; None where it was not finite."""
    student_logprobs: tuple[float | None, ...]
    """[n] nats, under the student that was trained."""
    teacher_logprobs: tuple[float | None, ...]
    """[n] nats."""
    versions: tuple[tuple[int, int, int], ...]
    """Tokens [start, end) were sampled by this version: (version, start, end)."""
    age: int
    """Versions, when it was trained on."""
    num_tokens: int
    """Of the whole answer."""
    finish_reason: str


class Faults(msgspec.Struct, kw_only=True):
    """What went wrong and was survived."""

    teacher_retries: int = 0
    teacher_outages: int = 0
    """Times that a replica was taken out."""
    teacher_parked_s: float = 0.0
    """Seconds that no replica was there while rollouts waited."""
    actor_restarts: int = 0
    rollouts_failed: int = 0
    rollouts_requeued: int = 0
    steps_skipped: int = 0
    warnings: int = 0
    """Other lines of level warning or error."""


class ActorView:
    """One actor, as far as its lines tell."""

    def __init__(self, name: str, consumes: str | None, produces: str | None) -> None:
        self.name = name
        self.consumes = consumes
        self.produces = produces
        self.state = "new"
        self.restarts = 0
        self.busy = BusyTime()
        self.busy_until: float | None = None
        """End of its last span; None when it logs none."""


class ChannelView:
    """One channel: its last reading, and how its waits grew."""

    def __init__(self) -> None:
        self.items = 0
        self.max_items = 0
        self.send_wait = Total(window_s=WINDOW_S)
        self.receive_wait = Total(window_s=WINDOW_S)


class RunView:
    """Apply every line in order; read the attributes at any time. Not for several threads at once."""

    def __init__(self) -> None:
        self.run = ""
        self.out = ""
        self.objective = ""
        """What the loss is: forward_kl, reverse_kl, …"""
        self.steps: int | None = None
        self.rollouts_per_step: int | None = None
        self.max_staleness: int | None = None
        self.ended: str | None = None
        """"finished", "stopped" or "failed"."""
        self.is_draining = False
        self.is_measuring = False
        self.parked_since: float | None = None
        self.started_at: float | None = None
        self.training_since: float | None = None
        """When the first rollout was dispatched."""
        self.now = 0.0
        """Epoch seconds of the last line."""
        self.step = 0
        self.live_version = 0
        self.sampler_version = 0
        """Of the generator, when it was last heard of."""
        self.losses: deque[float | None] = deque(maxlen=_MAX_LOSSES)
        """Of the steps so far, nats per token; None where it was not finite."""
        self.loss_curve = Curve()
        """The same for a run of any length, over the step."""
        self.trained_curve = Curve()
        """Trained tokens per second over the step."""
        self.sampled_curve = Curve()
        self.step_interval_s: float | None = None
        """Between the last two steps."""
        self.evaluations: list[Held] = []
        self.answers: dict[str, Shown] = {}
        """The latest answer to each held-out prompt that is shown."""
        self.trained_answers: deque[TrainedAnswer] = deque(maxlen=_MAX_TRAINED_ANSWERS)
        """One of each of the last steps, for trainers that tell."""
        self.ages: Counter[int] = Counter()
        self.totals: Counter[str] = Counter()
        """Rollouts that were dispatched, sampled, scored, trained."""
        self.in_flight: dict[int, str] = {}
        """State of each rollout between dispatch and training: sampling, at teacher, scored, in step."""
        self.begun_under: dict[int, int] = {}
        """Version at the first token of each rollout in flight that has been sampled."""
        self.trained_tokens = Rate(window_s=2 * WINDOW_S)
        self.sampled_tokens = Rate(window_s=2 * WINDOW_S)
        self.decoded_tokens = Total(window_s=WINDOW_S)
        self.generator_busy = Total(window_s=WINDOW_S)
        self.slots: tuple[int, int, int] | None = None
        """Sequences running, sequences waiting, slots."""
        self.replicas: dict[str, str] = {}
        self.replica_notes: dict[str, tuple[float, str]] = {}
        """Since when each is in its state (epoch seconds), and why."""
        self.checkpoint: tuple[int, str] | None = None
        """Step and path of the newest."""
        self.evaluation_s = 0.0
        self.checkpoint_s = 0.0
        self.loop_lag_max_s = 0.0
        self.faults = Faults()
        self.notices: deque[Notice] = deque(maxlen=_MAX_NOTICES)
        self.actors: dict[str, ActorView] = {}
        self.channels: dict[str, ChannelView] = {}
        self._step_times: deque[float] = deque(maxlen=11)
        self._set_graph(STANDARD_GRAPH)

    def apply(self, event: Event) -> Notice | None:
        """Take in one line; the notice that it gave rise to, if any. A line of an unknown name is no error."""
        at = datetime.fromisoformat(event["t"])
        self.now = max(self.now, at.timestamp())  # lines of different threads may come in the wrong order
        if event.get("kind") == "span":
            self._work(event)
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(self, event)
        elif event["level"] in ("warning", "error"):
            self.faults.warnings += 1
        text = sentence(event)
        if text is None:
            return None
        notice = Notice(at=at, event=event["event"], level=event["level"], text=text)
        self.notices.append(notice)
        return notice

    @property
    def phase(self) -> str:
        """One or two words: what the run is doing."""
        if self.ended is not None:
            return self.ended
        if self.parked_since is not None:
            return "waiting for the teacher"
        if self.is_draining:
            return "draining"
        if self.is_measuring:
            return "measuring"
        return "starting" if self.training_since is None else "training"

    @property
    def elapsed_s(self) -> float:
        return 0.0 if self.started_at is None else self.now - self.started_at

    def remaining_s(self, now: float) -> float | None:
        """Seconds until the last step at the pace of the last ten; None while there is no pace."""
        if self.steps is None or len(self._step_times) < 2 or self.ended is not None:
            return None
        pace = (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1)
        return max(0.0, pace * (self.steps - self.step) - (now - self._step_times[-1]))

    def rollouts_by_state(self) -> dict[str, int]:
        counts = Counter(self.in_flight.values())
        return {state: counts[state] for state in ("sampling", "at teacher", "scored", "in step")}

    def tokens_per_s(self) -> tuple[float | None, float | None]:
        """Trained, and sampled: decoded tokens when the generator reports them, else those of finished answers."""
        decoded = self.decoded_tokens.recent_rate()
        sampled = self.sampled_tokens.per_second(self.now) if decoded is None else decoded
        return self.trained_tokens.per_second(self.now), sampled

    def recent_shares(self, actor: ActorView) -> Shares:
        """Of the last ``WINDOW_S`` seconds. Work under way is unknown until its span ends, so the window of an actor
        that logs spans ends with its last one, unless that is half a window ago."""
        end = self.now
        if actor.busy_until is not None and end - actor.busy_until < WINDOW_S / 2:
            end = actor.busy_until
        start = max(end - WINDOW_S, self.training_since if self.training_since is not None else end - WINDOW_S)
        busy = actor.busy.within(start, end) / (end - start) if end > start else 0.0
        return self._shares(actor, busy=busy, rate=Total.recent_rate)

    def overall_shares(self, actor: ActorView) -> Shares:
        """Since the first rollout was dispatched."""
        seconds = 0.0 if self.training_since is None else self.now - self.training_since
        return self._shares(actor, busy=actor.busy.total_s / seconds if seconds > 0 else 0.0, rate=Total.overall_rate)

    def waits_for(self, actor: ActorView) -> tuple[str, str]:
        """Whom it waits for when it has no input, and whom when it has no room."""
        giver = next(
            (a.name for a in self.actors.values() if a.produces and a.produces == actor.consumes), "a free slot"
        )
        taker = next((a.name for a in self.actors.values() if a.consumes and a.consumes == actor.produces), "nobody")
        return giver, taker

    def _shares(self, actor: ActorView, *, busy: float, rate: Callable[[Total], float | None]) -> Shares:
        output = self.channels.get(actor.produces or "")
        source = self.channels.get(actor.consumes or "")
        room = (rate(output.send_wait) or 0.0) if output is not None else 0.0
        if actor.name == "sampler" and (generating := rate(self.generator_busy)) is not None:
            busy = generating
        elif actor.busy_until is None and source is not None and (waited := rate(source.receive_wait)) is not None:
            busy = 1.0 - waited - room  # it logs no spans: what is not waiting is work
        # Calls that wait side by side are summed by the channel, so a wait can exceed the time that there was.
        busy = min(1.0, max(0.0, busy))
        room = min(1.0 - busy, max(0.0, room))
        return Shares(worked=busy, waited_input=1.0 - busy - room, waited_room=room)

    def _set_graph(self, graph: Iterable[tuple[str, str | None, str | None]]) -> None:
        self.actors = {name: ActorView(name, consumes, produces) for name, consumes, produces in graph}

    def _actor(self, name: str) -> ActorView:
        if name not in self.actors:
            self.actors[name] = ActorView(name, None, None)
        return self.actors[name]

    def _work(self, event: Event) -> None:
        name = event.get("actor") or _WORKER_OF.get(event["event"].partition(".")[0])
        if name is None:
            return
        actor = self._actor(name)
        start = self.now - event["dur_us"] / 1e6
        actor.busy.add(max(start, self.training_since or start), self.now)
        actor.busy_until = self.now

    def _on_started(self, event: Event) -> None:
        self.run, self.out = event["recipe"], event.get("out", "")
        self.steps, self.rollouts_per_step = event["steps"], event["rollouts_per_step"]
        self.max_staleness = event["max_staleness"]
        self.objective = event.get("objective", "")
        self.step = event.get("step", self.step) or 0
        self.started_at = self.started_at if self.started_at is not None else self.now
        # A process that was killed took these along.
        self.in_flight.clear()
        self.begun_under.clear()
        self._step_times.clear()
        self.ended, self.parked_since, self.is_draining, self.is_measuring = None, None, False, False

    def _on_graph(self, event: Event) -> None:
        self._set_graph((a["name"], a.get("consumes"), a.get("produces")) for a in event["actors"])

    def _on_finished(self, event: Event) -> None:
        self.ended = "stopped" if event.get("stopped_by") else "finished"

    def _on_failed(self, event: Event) -> None:
        self.ended = "failed"
        self.faults.warnings += 1

    def _on_draining(self, event: Event) -> None:
        self.is_draining = True

    def _on_actor_state(self, event: Event) -> None:
        self._actor(event["actor"]).state = event["after"]

    def _on_actor_restarted(self, event: Event) -> None:
        self._actor(event["actor"]).restarts = event["restarts"]
        self.faults.actor_restarts += 1

    def _on_dispatched(self, event: Event) -> None:
        if self.training_since is None:
            self.training_since = self.now
            self.trained_tokens.begin(self.now)
            self.sampled_tokens.begin(self.now)
        self.totals["dispatched"] += 1
        self.in_flight[event["rollout_id"]] = "sampling"

    def _on_sampled(self, event: Event) -> None:
        if event.get("outcome", "ok") != "ok":
            return
        self.totals["sampled"] += 1
        self.sampled_tokens.add(self.now, event["num_tokens"])
        self.in_flight[event["rollout_id"]] = "at teacher"
        if "version_first" in event:
            self.begun_under[event["rollout_id"]] = event["version_first"]

    def _on_scored(self, event: Event) -> None:
        if event["outcome"] == "ok":
            self.totals["scored"] += 1
            self.in_flight[event["rollout_id"]] = "scored"

    def _on_rollout_failed(self, event: Event) -> None:
        self.in_flight.pop(event["rollout_id"], None)
        self.begun_under.pop(event["rollout_id"], None)
        self.faults.rollouts_failed += 1

    def _on_rollout_requeued(self, event: Event) -> None:
        self.in_flight[event["rollout_id"]] = "sampling"
        self.begun_under.pop(event["rollout_id"], None)
        self.faults.rollouts_requeued += 1

    def _on_micro_batch(self, event: Event) -> None:
        if event["outcome"] != "ok":
            return
        self.trained_tokens.add(self.now, event["num_tokens"])
        for rollout_id in event.get("rollout_ids", ()):
            self.in_flight[rollout_id] = "in step"

    def _on_step(self, event: Event) -> None:
        if event["outcome"] != "ok":
            return
        self.step = event["step"]
        loss = event["loss"]
        self.losses.append(loss if loss is not None and loss == loss else None)
        self.loss_curve.add(self.step, self.losses[-1])
        self.ages.update(event.get("ages", ()))
        self.totals["trained"] += event["num_rollouts"]
        for rollout_id in event.get("rollout_ids", ()):
            self.in_flight.pop(rollout_id, None)
            self.begun_under.pop(rollout_id, None)
        self.step_interval_s = self.now - self._step_times[-1] if self._step_times else None
        self._step_times.append(self.now)
        trained, sampled = self.tokens_per_s()
        self.trained_curve.add(self.step, trained)
        self.sampled_curve.add(self.step, sampled)

    def _on_trained_answer(self, event: Event) -> None:
        self.trained_answers.append(msgspec.convert({**event}, TrainedAnswer))

    def _on_skipped(self, event: Event) -> None:
        self.faults.steps_skipped += 1

    def _on_live(self, event: Event) -> None:
        self.live_version = self.sampler_version = event["version"]

    def _on_eval_started(self, event: Event) -> None:
        self.is_measuring = True

    def _on_eval(self, event: Event) -> None:
        self.is_measuring = False
        self.evaluation_s += event["dur_us"] / 1e6
        if event["outcome"] == "ok":
            self.evaluations.append(msgspec.convert({**event}, Held))

    def _on_answer(self, event: Event) -> None:
        self.answers.pop(event["prompt"], None)  # the latest comes last
        self.answers[event["prompt"]] = msgspec.convert({**event}, Shown)

    def _on_checkpoint_span(self, event: Event) -> None:
        self.checkpoint_s += event["dur_us"] / 1e6

    def _on_checkpoint(self, event: Event) -> None:
        self.checkpoint = (event["step"], event["path"])

    def _on_replica(self, event: Event) -> None:
        before = self.replicas.get(event["replica"])
        self.replicas[event["replica"]] = event["state"]
        if event["state"] != before:
            self.replica_notes[event["replica"]] = (self.now, str(event.get("reason") or ""))
        if event["state"] == "open" and before != "open":
            self.faults.teacher_outages += 1

    def _on_parked(self, event: Event) -> None:
        self.parked_since = self.now

    def _on_resumed(self, event: Event) -> None:
        self.parked_since = None
        self.faults.teacher_parked_s += event["parked_s"]

    def _on_retried(self, event: Event) -> None:
        self.faults.teacher_retries += 1

    def _on_channel(self, event: Event) -> None:
        channel = self.channels.setdefault(event["channel"], ChannelView())
        channel.items, channel.max_items = event["items"], event["max_items"]
        channel.send_wait.read(self.now, event["send_wait_s"])
        channel.receive_wait.read(self.now, event["receive_wait_s"])

    def _on_generator(self, event: Event) -> None:
        self.slots = (event["running"], event["waiting"], event["num_slots"])
        self.sampler_version = event["version"]
        self.decoded_tokens.read(self.now, event["tokens_total"])
        self.generator_busy.read(self.now, event["busy_s"])

    def _on_lag(self, event: Event) -> None:
        self.loop_lag_max_s = max(self.loop_lag_max_s, event["lag_s"])

    def _on_nothing(self, event: Event) -> None:
        """Counted with the line that it goes with."""


_HANDLERS: dict[str, Callable[[RunView, Any], None]] = {
    "run.started": RunView._on_started,
    "run.graph": RunView._on_graph,
    "run.finished": RunView._on_finished,
    "run.failed": RunView._on_failed,
    "run.draining": RunView._on_draining,
    "actor.state_changed": RunView._on_actor_state,
    "actor.restarted": RunView._on_actor_restarted,
    "rollout.dispatched": RunView._on_dispatched,
    "rollout.requeued": RunView._on_rollout_requeued,
    "rollout.failed": RunView._on_rollout_failed,
    "sampler.rollout": RunView._on_sampled,
    "teacher.score": RunView._on_scored,
    "teacher.replica_changed": RunView._on_replica,
    "teacher.replica_rejected": RunView._on_nothing,
    "teacher.parked": RunView._on_parked,
    "teacher.resumed": RunView._on_resumed,
    "teacher.retried": RunView._on_retried,
    "learner.micro_batch": RunView._on_micro_batch,
    "learner.step": RunView._on_step,
    "learner.step_skipped": RunView._on_skipped,
    "answer.trained": RunView._on_trained_answer,
    "weights.live": RunView._on_live,
    "eval.started": RunView._on_eval_started,
    "eval.run": RunView._on_eval,
    "eval.answer": RunView._on_answer,
    "checkpoint.save": RunView._on_checkpoint_span,
    "checkpoint.saved": RunView._on_checkpoint,
    "channel.stats": RunView._on_channel,
    "generator.stats": RunView._on_generator,
    "loop.lag": RunView._on_lag,
}
