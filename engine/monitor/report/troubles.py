"""Faults met and survived, in words: how often, and what became of each. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.monitor.report.document import Block, Column, Section, Table, Text
from engine.monitor.report.faults import Fault
from engine.monitor.report.history import History, Process
from engine.monitor.report.text import one_line


def faults(history: History, *, num_unreadable: int) -> list[Fault]:
    """Every kind, met or not. The last process is no fault of this list: how it ended is how the run stands."""
    log = history.faults
    return [
        *_ends_of_processes(history),
        *log.faults(num_unreadable=num_unreadable, num_not_understood=history.num_not_understood),
    ]


def troubles(found: Sequence[Fault]) -> Section:
    return Section(title="Faults met and survived", blocks=tuple(_troubles(found)))


def _troubles(found: Sequence[Fault]) -> Iterator[Block]:
    met = [fault for fault in found if fault.count]
    yield Text(text=f"{len(met)} of {len(found)} kinds were met." if met else "None.")
    yield Table(
        columns=(Column(name="fault"), Column(name="times", is_number=True), Column(name="what became of it")),
        rows=tuple(
            (fault.name, f"{fault.count:,}" if fault.count else "none", _became(fault))
            for fault in [*met, *_not_met(found)]
        ),
    )


def _not_met(found: Sequence[Fault]) -> list[Fault]:
    return [fault for fault in found if not fault.count]


def _became(fault: Fault) -> str:
    return "\n".join(line for line in (fault.became, *fault.reasons) if line)


def _ends_of_processes(history: History) -> Iterator[Fault]:
    followed = [
        (process, later)
        for process in history.processes
        if (later := _follower(history.processes, process)) is not None
    ]
    killed = [later for process, later in followed if process.view.ended is None and not process.stopped_at_once]
    yield _end("process killed", killed)
    stopped = [later for process, later in followed if process.view.ended == "stopped" or process.stopped_at_once]
    yield _end("process stopped by a signal", stopped)
    failed = [(process, later) for process, later in followed if process.view.ended == "failed"]
    yield _end("process failed", [later for _, later in failed], tuple(_cause(process) for process, _ in failed))
    redone = history.num_given_up
    yield Fault(
        name="step given up",
        count=redone,
        became="the run went on from a checkpoint before it; of a step that was trained again the later one counts"
        if redone
        else "",
    )
    again = history.faults.num_sampled_again_after_kills
    yield Fault(
        name="rollout put back when a process ended",
        count=again,
        became="under way, or trained in a step that was given up; sampled again by the next process" if again else "",
    )


def _follower(processes: Sequence[Process], process: Process) -> Process | None:
    """The process that went on where this one ended."""
    later = processes[processes.index(process) + 1 :]
    return next((other for other in later if other.source == process.source), None)


def _end(name: str, followers: Sequence[Process], reasons: tuple[str, ...] = ()) -> Fault:
    steps = ", ".join(f"{process.start_step:,}" for process in followers[:20])
    more = f" and {len(followers) - 20:,} more" if len(followers) > 20 else ""
    became = f"the run went on after step {steps}{more}" if followers else ""
    return Fault(name=name, count=len(followers), became=became, reasons=reasons[:20])


def _cause(process: Process) -> str:
    line = process.failure
    return one_line(f"{line.get('failed_actor')}: {line.get('cause')}")
