"""What each line of a run's log becomes in a trace. Takes lines in the order of time and gives events away at once, so
that a log of any length passes through little memory; only waits are drawn at the end, when all work is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from engine.monitor.log_files import LogLine
from engine.monitor.trace import chrome
from engine.monitor.trace.chrome import TraceEvent
from engine.monitor.trace.journeys import SAMPLED, SCORED, TRAINED, Journey, Journeys, Slice
from engine.monitor.trace.tracks import AWAY, EVENTS, FIRST_SPARE_TID, NODE, VERSIONS, Process, Track
from engine.monitor.trace.waits import NO_INPUT, NO_ROOM, ChannelWaits, waits

_DRAWN = frozenset(("t", "event", "run", "node", "kind", "outcome", "start_ns", "dur_us", "rollout_ids", "ages"))
"""Fields that are seen without a click, or would only repeat what is seen."""
_DRAWN_OF_SPAN = _DRAWN | {"actor", "level"}

_DAY_US = 86_400_000_000

_HUGE = 1e300
"""No quantity of a run; and an integer beyond it is no float."""

_STAGES = {"sampler.rollout": SAMPLED, "teacher.score": SCORED}
"""Spans of one rollout each; a micro-batch trains many."""


class Converter:
    """Lines in, events out.

    Args:
        emit: takes each event (``chrome``), in no particular order.
        files: names of the files that lines come from (``LogLine.source``).
    """

    def __init__(self, emit: Callable[[TraceEvent], None], *, files: tuple[Path, ...]) -> None:
        self.zero_us = 0
        """Microseconds from 1970 to the zero of the trace: midnight UTC, a day before the first line (work may have
        begun before the line that tells of it)."""
        self.num_spans = 0
        self.num_rollouts = 0
        """That have arrows."""
        self.begin_us: int | None = None
        self.end_us = 0
        self._emit = emit
        self._files = files
        self._processes: dict[tuple[int, str], Process] = {}
        self._latest: dict[int, Process] = {}
        """Of each file."""
        self._journeys = Journeys()
        self._spare_tids = itertools.count(FIRST_SPARE_TID)
        self._arrow_ids = itertools.count(1)

    @property
    def num_processes(self) -> int:
        return len(self._processes)

    def take(self, line: LogLine) -> None:
        """Take in one line. What it should have and has not is not drawn; no line is an error."""
        if not self._processes:
            self.zero_us = line.at_us - line.at_us % _DAY_US - _DAY_US
        process = self._process(line)
        fields = line.fields
        if line.event == "log.opened":
            process.restart()
            start_ns = fields.get("start_ns")
            process.clock.opened(line.at_us, start_ns if _is_int(start_ns) else None)
        start_ns, dur_us = fields.get("start_ns"), fields.get("dur_us")
        if fields.get("kind") == "span" and _is_below(start_ns, _HUGE) and _is_below(dur_us, line.at_us):
            start_us, end_us = process.clock.span(line.at_us, start_ns, dur_us)
            self._span(process, line, max(0, start_us - self.zero_us), max(0, end_us - self.zero_us))
        else:
            self._fact(process, line, max(0, process.clock.fact(line.at_us) - self.zero_us))

    def finish(self) -> None:
        """Nothing more comes: draw the waits, end the arrows, name the tracks."""
        for journey in self._journeys.rest():
            self._draw(journey)
        for order, process in enumerate(self._processes.values()):
            process.restart()
            for track, source, output in process.actors():
                if not len(track.periods) and len(track.busy):  # its states were not logged
                    track.periods.add(track.busy.start, track.busy.end)
                self._waits(process, track, source, output)
            for event in process.names(order=order):
                self._emit(event)

    def _process(self, line: LogLine) -> Process:
        node = line.fields.get("node")
        if not isinstance(node, str):  # log.lines_lost has none
            latest = self._latest.get(line.source)
            if latest is not None:
                return latest
            node = "?"
        process = self._processes.get((line.source, node))
        if process is None:
            name = f"node {node}"
            if any(other.name == name for other in self._processes.values()):
                name = f"{name} ({self._files[line.source].name})"
            process = Process(len(self._processes) + 1, name, spare_tid=self._spare_tids.__next__)
            self._processes[line.source, node] = process
        self._latest[line.source] = process
        return process

    def _seen(self, process: Process, start_us: int, end_us: int) -> None:
        self.begin_us = start_us if self.begin_us is None else min(self.begin_us, start_us)
        self.end_us = max(self.end_us, end_us)
        process.last_us = max(process.last_us, end_us)

    # Spans

    def _span(self, process: Process, line: LogLine, start_us: int, end_us: int) -> None:
        fields = line.fields
        actor = _actor(fields)
        track = process.own_track(NODE) if actor is None else process.track(actor)
        outcome = fields.get("outcome", "ok")
        name = line.event if outcome == "ok" else f"{line.event} ({outcome})"
        args = chrome.arguments(fields, without=_DRAWN_OF_SPAN)
        place = self._slice(process, track, name, start_us, end_us, args)
        track.busy.add(start_us, end_us, line.event)
        self.num_spans += 1
        if line.event == "learner.micro_batch":
            for trained in _ints(fields.get("rollout_ids")):
                self._reach(trained, TRAINED, place)
        if outcome != "ok":
            return
        rollout_id, stage = fields.get("rollout_id"), _STAGES.get(line.event)
        if stage is not None and _is_int(rollout_id):
            self._reach(rollout_id, stage, place)
        elif line.event == "sampler.wave":
            track.wave = place
        elif line.event == "learner.step":
            self._count(process, end_us, "loss", {"nats per token": fields.get("loss")})
            ages = {"mean": fields.get("staleness_mean"), "max": fields.get("staleness_max")}
            self._count(process, end_us, "staleness (versions)", ages)
        elif line.event == "eval.run":
            self._count(process, end_us, "held-out KL", {"nats per token": fields.get("kl")})

    def _slice(
        self, process: Process, track: Track, name: str, start_us: int, end_us: int, args: Mapping[str, object]
    ) -> Slice:
        self._seen(process, start_us, end_us)
        tid = track.tid(start_us, end_us)
        category = name.partition(".")[0]
        self._emit(
            chrome.complete(
                name, category=category, pid=process.pid, tid=tid, start_us=start_us, end_us=end_us, args=args
            )
        )
        return Slice(process.pid, tid, start_us, end_us)

    def _reach(self, rollout_id: int, stage: int, place: Slice) -> None:
        journey = self._journeys.reach(rollout_id, stage, place)
        if journey is not None:
            self._draw(journey)

    def _draw(self, journey: Journey) -> None:
        self.num_rollouts += 1
        for event in chrome.arrows("rollout", journey, arrow_id=next(self._arrow_ids)):
            self._emit(event)

    def _waits(self, process: Process, track: Track, source: ChannelWaits | None, output: ChannelWaits | None) -> None:
        channels = {NO_INPUT: source, NO_ROOM: output}
        for wait in waits(track.periods, busy=track.busy, source=source, output=output):
            channel = channels.get(wait.reason)
            self._emit(
                chrome.complete(
                    wait.reason,
                    category="wait",
                    pid=process.pid,
                    tid=track.wait_tid(),
                    start_us=wait.start_us,
                    end_us=wait.end_us,
                    args={} if channel is None else {"channel": channel.name},
                )
            )

    # Facts

    def _fact(self, process: Process, line: LogLine, at_us: int) -> None:
        self._seen(process, at_us, at_us)
        handle = _FACTS.get(line.event)
        if handle is not None:
            handle(self, process, line.fields, at_us)
        if line.event not in _NOT_DRAWN:
            self._instant(process, EVENTS, line.event, at_us, chrome.arguments(line.fields, without=_DRAWN))

    def _instant(self, process: Process, track: str, name: str, at_us: int, args: Mapping[str, object]) -> None:
        tid = process.own_track(track).only_tid()
        category = name.partition(".")[0]
        self._emit(chrome.instant(name, category=category, pid=process.pid, tid=tid, at_us=at_us, args=args))

    def _count(self, process: Process, at_us: int, name: str, values: Mapping[str, object]) -> None:
        series = {key: number for key, value in values.items() if (number := _number(value)) is not None}
        # A counter holds until it is told anew: what is as it was needs no event.
        if series and process.readings.get(name) != series:
            process.readings[name] = series
            self._emit(chrome.counter(name, pid=process.pid, at_us=at_us, series=series))

    def _on_graph(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        actors = fields.get("actors")
        if isinstance(actors, list) and all(isinstance(actor, dict) and "name" in actor for actor in actors):
            process.graph = {
                str(actor["name"]): (_text(actor.get("consumes")), _text(actor.get("produces"))) for actor in actors
            }

    def _on_state(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        actor = _actor(fields)
        if actor is not None:
            process.track(actor).enter(str(fields.get("after")), at_us)

    def _on_live(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        args = chrome.arguments(fields, without=_DRAWN_OF_SPAN)
        self._instant(process, VERSIONS, f"version {fields.get('version')}", at_us, args)

    def _on_channel(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        name = str(fields.get("channel"))
        items, max_items = _number(fields.get("items")), _number(fields.get("max_items"))
        sent_s, received_s = _number(fields.get("send_wait_s")), _number(fields.get("receive_wait_s"))
        self._count(process, at_us, f"channel {name}", {"items": items})
        if items is None or max_items is None or sent_s is None or received_s is None:
            return
        channel = process.channels.get(name)
        if channel is None:
            channel = process.channels[name] = ChannelWaits(name)
        channel.read(
            at_us, is_full=items >= max_items, is_empty=items == 0, send_wait_s=sent_s, receive_wait_s=received_s
        )

    def _on_generator(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        slots = {"running": fields.get("running"), "waiting": fields.get("waiting")}
        self._count(process, at_us, "generator (sequences)", slots)
        tokens = _number(fields.get("tokens_total"))
        if tokens is None:
            return
        if process.generated is not None and at_us > process.generated[0]:
            before_us, before = process.generated
            rate = max(0.0, (tokens - before) * 1e6 / (at_us - before_us))
            self._count(process, at_us, "generator (tokens per second)", {"decoded": round(rate, 1)})
        process.generated = (at_us, tokens)

    def _on_sampled(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        """A fact without duration: an answer of a wave. A reference answer was not sampled at all."""
        rollout_id, actor = fields.get("rollout_id"), _actor(fields)
        if not _is_int(rollout_id) or actor is None or fields.get("finish_reason") == "reference":
            return
        wave = process.track(actor).wave
        if wave is not None:
            self._reach(rollout_id, SAMPLED, wave)

    def _on_resumed(self, process: Process, fields: Mapping[str, Any], at_us: int) -> None:
        parked_s = _number(fields.get("parked_s"))
        if parked_s is not None and 0 < parked_s * 1e6 < at_us:
            args = chrome.arguments(fields, without=_DRAWN_OF_SPAN)
            start_us = at_us - int(parked_s * 1e6)
            self._slice(process, process.own_track(AWAY), "teacher away", start_us, at_us, args)


_FACTS: dict[str, Callable[[Converter, Process, Mapping[str, Any], int], None]] = {
    "run.graph": Converter._on_graph,
    "actor.state_changed": Converter._on_state,
    "weights.live": Converter._on_live,
    "channel.stats": Converter._on_channel,
    "generator.stats": Converter._on_generator,
    "sampler.rollout": Converter._on_sampled,
    "teacher.resumed": Converter._on_resumed,
}

_NOT_DRAWN = frozenset(
    (
        *("channel.stats", "generator.stats", "weights.live", "sampler.rollout"),
        # One per rollout or per second: their spans and counters say more.
        *("rollout.dispatched", "loop.lag"),
        # Long texts; the report has them.
        *("eval.answer", "answer.trained", "run.graph"),
    )
)
"""Facts that are no instants."""


def _actor(fields: Mapping[str, Any]) -> str | None:
    actor = fields.get("actor")
    return None if actor is None else str(actor)


def _ints(values: object) -> Iterator[int]:
    return (value for value in values if _is_int(value)) if isinstance(values, list) else iter(())


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_below(value: object, bound: float) -> TypeGuard[int]:
    return _is_int(value) and 0 <= value < bound


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_HUGE < value < _HUGE else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
