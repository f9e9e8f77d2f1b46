"""What the command line does once it is parsed: check, show, or run. Errors become one line and an exit code here."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from engine.build.life import build
from engine.build.parts import make_parts
from engine.check.look import Checked, Inputs, check
from engine.check.show import as_document, as_text
from engine.clock import SystemClock
from engine.errors import ActorFailed, EngineError, RanksLost, RunDirError, UserError
from engine.graph import Graph
from engine.load_recipe import load_recipe
from engine.machine import describe_node
from engine.metrics import NodeMetrics
from engine.monitor.earlier import remember
from engine.monitor.feed import Feed
from engine.monitor.report.files import write_report
from engine.monitor.sinks.attach import Sinks
from engine.monitor.summary import Summary, summarise
from engine.monitor.terminal import Terminal
from engine.node import Node, Outcome
from engine.parts import Parts
from engine.recipe import Recipe, describe
from engine.run_dir import RunDir, default_out, newest_run
from engine.simulate.predict import predict, refuse_other_options
from engine.simulate.show import picture
from engine.step_log import StepLog
from engine.tracing import Tracing, log

EXIT_OK, EXIT_FAILED, EXIT_WRONG, EXIT_STOPPED = 0, 1, 2, 3


def command(options: argparse.Namespace) -> int:
    """Do what the options of ``engine.run`` say; returns the exit code."""
    try:
        recipe, graph = load_recipe(Path(options.recipe), options.set)
        if options.simulate or options.simulate_from is not None:
            return _simulate(recipe, graph, options)
        if options.show and not options.check:
            _write(_shown(recipe, graph, options, findings=None))
            return EXIT_OK
        return uvloop.run(_run_and_restore(recipe, graph, options))
    except UserError as error:
        _say_error(str(error), as_json=options.json)
        return EXIT_WRONG
    except ActorFailed as failure:
        _say_error(f"the run failed: {failure}", as_json=options.json)
        return EXIT_FAILED
    except EngineError as error:
        _say_error(str(error), as_json=options.json)
        return error.exit_code


class _NewRanksNeeded(Exception):
    """The run ended because ranks were lost, and may go on with new ones; ``__cause__`` is how it ended."""


async def _run_and_restore(recipe: Recipe, graph: Graph, options: argparse.Namespace) -> int:
    """Run, and again from the last checkpoint as often as the recipe says when the learner's ranks are lost.

    Each time everything is made anew, as ``--resume`` in another process would: the ledger is rewound to the
    checkpoint, so that every prompt occurrence is trained once.
    """
    out, resume = _out(recipe, options), options.resume
    is_run = not options.check
    for restores_left in range(recipe.learner.megatron.max_restores if is_run else 0, -1, -1):
        try:
            return await _run(recipe, graph, options, out=out, resume=resume, restores_left=restores_left)
        except _NewRanksNeeded:
            resume = True
    raise AssertionError("the last time nothing is restored")


async def _run(
    recipe: Recipe, graph: Graph, options: argparse.Namespace, *, out: Path, resume: bool, restores_left: int
) -> int:
    with Tracing() as tracing:
        checked = await check(recipe, out=out, resume=resume, may_run_elsewhere=options.check)
        if options.check:
            if options.show:
                _write(_shown(recipe, graph, options, findings=checked))
            else:
                _write(_found(checked, options))
            return EXIT_WRONG if checked.wrong else EXIT_OK
        if checked.inputs is None:
            raise UserError("\nerror: ".join(f"{problem.subject}: {problem.text}" for problem in checked.wrong))
        _say_left_out(checked.inputs)
        run_dir = RunDir.resume(out, recipe) if resume else RunDir.create(out)
        parts = make_parts(recipe, checked.inputs, run_dir=run_dir, resume=resume, clock=SystemClock())
        try:
            with closing(parts.ledger), Terminal(tracing, live=_is_live(options)) as terminal:
                outcome = await _run_node(parts, graph, tracing, restores_left=restores_left)
        except ActorFailed:
            if (report := _report(run_dir)) is not None:
                sys.stderr.write(f"report: {report}\n")
            raise
        summary = summarise(recipe=recipe, run_dir=run_dir, outcome=outcome, view=terminal.view, parts=parts)
        _keep(summary, run_dir)  # first without the report: a long log takes a while to read, and may be interrupted
        if (report := _report(run_dir)) is not None:
            summary = msgspec.structs.replace(summary, report=str(report))
            _keep(summary, run_dir)
        if options.json:
            _write(msgspec.json.encode(summary).decode())
        else:
            terminal.show(summary)
        if outcome.stopped_by is None or outcome.version >= recipe.steps:
            return EXIT_OK
        _say_how_to_continue(outcome, out, options)
        return EXIT_STOPPED


async def _run_node(parts: Parts, graph: Graph, tracing: Tracing, *, restores_left: int) -> Outcome:
    run_dir, metrics = parts.run_dir, NodeMetrics()
    try:
        # First: an actor of the user's that cannot be made must not leave a run behind.
        built = build(graph, parts)
    except UserError:
        await parts.teacher.close()
        raise
    run_dir.keep_recipe(parts.recipe)
    tracing.open(run_dir.path, run=parts.recipe.name, node="0")
    describe_node(parts.recipe)
    tracing.subscribe("metrics", metrics.apply)
    tracing.subscribe("metrics.jsonl", StepLog(run_dir.metrics).apply)
    feed = Feed()
    tracing.subscribe("page", feed.put)
    if parts.schedule.version:
        log.info("run.resumed", step=parts.schedule.version)
        remember(feed.view, run_dir, until=parts.schedule.version)
    with Sinks(parts.recipe, run_dir.path, tracing, step=parts.schedule.version):
        node = Node(parts, built, metrics=metrics, feed=feed, on_start=tracing.adopt_libraries)
        try:
            return await node.run()
        except ActorFailed as failure:
            # A run that was asked to stop is not begun again.
            if not isinstance(failure.cause, RanksLost) or restores_left == 0 or node.stopped_by is not None:
                raise
            log.warning("run.restoring", restores_left=restores_left - 1, cause=str(failure.cause).partition("\n")[0])
            raise _NewRanksNeeded from failure


def _keep(summary: Summary, run_dir: RunDir) -> None:
    run_dir.write(run_dir.summary, msgspec.json.format(msgspec.json.encode(summary), indent=2))


def _report(run_dir: RunDir) -> Path | None:
    """Write the report of a run that has ended; None when that fails, which is said and is no failure of the run."""
    try:
        return write_report(run_dir.path).html
    except Exception as error:
        log.warning("report.failed", error=repr(error), exc_info=error)
        again = shlex.join(["python", "-m", "engine.report", str(run_dir.path)])
        sys.stderr.write(f"warning: the report could not be written: {error}; try again with: {again}\n")
        return None


def _simulate(recipe: Recipe, graph: Graph, options: argparse.Namespace) -> int:
    refuse_other_options({"--check": options.check, "--show": options.show, "--resume": options.resume})
    prediction = predict(recipe, graph, earlier_run=options.simulate_from, out=options.out)
    _write(msgspec.json.encode(prediction).decode() if options.json else picture(prediction, recipe))
    return EXIT_OK


def _is_live(options: argparse.Namespace) -> bool:
    # A terminal that cannot move its cursor (an editor's, a console server's) gets lines like a file.
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return sys.stderr.isatty() and not is_dumb and not options.json


def _say_how_to_continue(outcome: Outcome, out: Path, options: argparse.Namespace) -> None:
    changes = [word for assignment in options.set for word in ("--set", assignment)]
    words = ["python", "-m", "engine.run", options.recipe, "--resume", "--out", str(out), *changes]
    sys.stderr.write(
        f"stopped by {outcome.stopped_by} after step {outcome.version}; continue with: {shlex.join(words)}\n"
    )


def _out(recipe: Recipe, options: argparse.Namespace) -> Path:
    newest = newest_run(recipe.name) if options.resume and options.out is None else None
    out = options.out or newest or default_out(recipe.name, datetime.now())
    try:
        out.exists()
    except OSError as error:  # a name that is too long, a loop of links: nothing that is looked at beneath it is there
        raise RunDirError(
            f"{str(out)[:200]!r} cannot be the run's folder: {error.strerror}; name another one"
        ) from error
    return Path(out)


def _shown(recipe: Recipe, graph: Graph, options: argparse.Namespace, *, findings: Checked | None) -> str:
    """What ``--show`` prints, with what ``--check`` found when both are asked for."""
    if not options.json:
        text = f"{graph.describe()}\n\n{describe(recipe)}"
        return text if findings is None else f"{text}\n\n{_found(findings, options)}"
    actors = [{"name": a.name, "consumes": a.consumes, "produces": a.produces, "about": a.about} for a in graph.actors]
    channels = [{"name": c.name, "carries": c.carries, "max_items": c.max_items} for c in graph.channels]
    shown: dict[str, Any] = {"actors": actors, "channels": channels, "recipe": msgspec.to_builtins(recipe)}
    if findings is not None:
        shown |= as_document(findings)
    return msgspec.json.encode(shown).decode()


def _found(checked: Checked, options: argparse.Namespace) -> str:
    if options.json:
        return msgspec.json.encode(as_document(checked)).decode()
    changes = [word for assignment in options.set for word in ("--set", assignment)]
    return as_text(checked, again=shlex.join(["python", "-m", "engine.run", options.recipe, *changes, "--check"]))


def _say_left_out(inputs: Inputs) -> None:
    for prompts in (inputs.prompts, inputs.held_out):
        if prompts is not None and prompts.num_filtered:
            sys.stderr.write(
                f"{prompts.path}: {prompts.num_filtered:,} rows do not fit and are left out, {len(prompts):,} remain\n"
            )


def _say_error(text: str, *, as_json: bool) -> None:
    if as_json:
        _write(msgspec.json.encode({"error": text}).decode())
    sys.stderr.write(f"error: {text}\n")


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
