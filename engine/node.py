"""One process of a run: what starts in which order, what a signal does, and what stops in which order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from engine.actor import ActorState
from engine.build.life import Built
from engine.errors import ActorFailed
from engine.generation.protocol import Generator
from engine.http_port import HttpPort
from engine.messages import Drain
from engine.metrics import NodeMetrics
from engine.monitor.feed import Feed
from engine.parts import Parts
from engine.supervisor import Supervisor
from engine.tracing import log, span
from engine.transport.channel import ChannelStatistics

_TICK_S = 1.0
_SHOW_CURSOR = "\x1b[?25h"
"""The live picture hides it."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    version: int
    """Optimizer steps done."""
    stopped_by: str | None
    """Signal that asked it to end before its last step."""
    wall_s: float


class Node:
    """Runs one built graph to its end.

    SIGINT and SIGTERM admit nothing more, let the step under way finish within ``node.grace_s`` and write a checkpoint;
    a second one ends the process at once.

    Args:
        metrics: told of the channels, asked for its text.
        feed: what the status page is made from; it is given the lines of the log by whoever owns that.
        on_start: called when every actor has started, and with them every library has been imported.
    """

    def __init__(
        self, parts: Parts, built: Built, *, metrics: NodeMetrics, feed: Feed, on_start: Callable[[], None]
    ) -> None:
        self._parts = parts
        self._built = built
        self._metrics = metrics
        self._on_start = on_start
        self._supervisor = Supervisor(parts.clock)
        for actor in built.actors:
            self._supervisor.add(actor, restart=built.restarts[actor.name], at_end=built.at_end.get(actor.name))
        self._port = HttpPort(
            parts.recipe.node,
            is_ready=self._is_ready,
            status=self._status,
            metrics=metrics.render,
            feed=feed,
            clock=parts.clock,
        )
        self._stopped_by: str | None = None
        self._grace: asyncio.Task[None] | None = None

    async def run(self) -> Outcome:
        """Start everything, wait for the end, stop everything; the port last, so that its page shows the end.

        Raises:
            ActorFailed: an actor failed and may not, or no longer, be restarted.
            RecipeError: the node's port cannot be had.
        """
        try:
            return await self._run()
        finally:
            await self._port.stop()

    async def _run(self) -> Outcome:
        parts = self._parts
        recipe = parts.recipe
        started = parts.clock.now()
        ticker: asyncio.Task[None] | None = None
        try:
            with self._signals():
                port = await self._port.start()
                self._write_node_file(port)
                log.info(
                    "run.started",
                    recipe=recipe.name,
                    steps=recipe.steps,
                    rollouts_per_step=recipe.rollouts_per_step,
                    max_staleness=recipe.max_staleness,
                    objective=recipe.objective.kind,
                    step=parts.schedule.version,
                    out=str(parts.run_dir.path),
                )
                log.info("run.graph", actors=self._built.wiring)
                ticker = asyncio.get_running_loop().create_task(self._tick())
                try:
                    with span("run.start"):
                        await self._supervisor.start_all()
                    self._on_start()
                    await self._supervisor.wait()
                finally:
                    await self._supervisor.stop()
        except ActorFailed as failure:
            log.error(
                "run.failed",
                failed_actor=failure.actor,
                cause=str(failure.cause),
                step=parts.schedule.version,
                exc_info=failure.cause,
            )
            raise
        finally:
            for task in (ticker, self._grace):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            await parts.teacher.close()
        outcome = Outcome(
            version=parts.schedule.version, stopped_by=self._stopped_by, wall_s=parts.clock.now() - started
        )
        log.info("run.finished", step=outcome.version, stopped_by=outcome.stopped_by, wall_s=outcome.wall_s)
        return outcome

    @property
    def stopped_by(self) -> str | None:
        """Signal that asked the run to end, if one did."""
        return self._stopped_by

    def _is_ready(self) -> bool:
        return all(view.state is ActorState.RUNNING for view in self._supervisor.states())

    def _status(self) -> object:
        return {
            "run": self._parts.recipe.name,
            "out": str(self._parts.run_dir.path),
            "steps": self._parts.recipe.steps,
            "flow": self._parts.schedule.snapshot(),
            "actors": [
                {"name": view.name, "state": view.state.value, "restarts": view.restarts}
                for view in self._supervisor.states()
            ],
            "channels": [sender.statistics() for sender in self._built.senders.values()],
            "generator": self._parts.generator.statistics(),
            "ledger": self._parts.ledger.counts(),
        }

    def _write_node_file(self, port: int) -> None:
        run_dir = self._parts.run_dir
        where = {"pid": os.getpid(), "host": self._parts.recipe.node.host, "port": port}
        run_dir.write(run_dir.node, msgspec.json.encode(where))

    async def _tick(self) -> None:
        """Once a second: how full the channels are, who waits, and how late this loop runs."""
        clock = self._parts.clock
        while True:
            before = clock.now()
            await clock.sleep(_TICK_S)
            self._metrics.observe_channels(say_statistics(self._built, self._parts.generator))
            log.info("loop.lag", lag_s=max(0.0, clock.now() - before - _TICK_S))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        for name in before:
            loop.add_signal_handler(name, self._on_signal, name)
        try:
            yield
        finally:
            for name, handler in before.items():
                loop.remove_signal_handler(name)
                signal.signal(name, handler)

    def _on_signal(self, name: signal.Signals) -> None:
        if self._stopped_by is not None:
            log.error("run.stopped_at_once", signal=name.name)
            if sys.stderr.isatty():
                sys.stderr.write(_SHOW_CURSOR)
            # By hand: the thread that shows the log would end with us.
            sys.stderr.write(
                f"stopped at once by {name.name}; continue with --resume --out {self._parts.run_dir.path}\n"
            )
            sys.stderr.flush()
            # No clean-up on purpose: whoever asks twice wants the process gone. What was committed is whole.
            os._exit(128 + name)
        self._stopped_by = name.name
        log.warning("run.draining", signal=name.name, grace_s=self._parts.recipe.node.grace_s)
        self._supervisor.tell(Drain(reason=name.name, grace_s=self._parts.recipe.node.grace_s))
        self._grace = asyncio.get_running_loop().create_task(self._end_grace())

    async def _end_grace(self) -> None:
        await self._parts.clock.sleep(self._parts.recipe.node.grace_s)
        log.warning("run.grace_ended", step=self._parts.schedule.version + 1)
        self._parts.schedule.finish()


def say_statistics(built: Built, generator: Generator) -> list[ChannelStatistics]:
    """Log how full the channels are, who waits, and what the generator does; returns what was read of the channels."""
    statistics = [sender.statistics() for sender in built.senders.values()]
    for channel in statistics:
        log.info(
            "channel.stats",
            channel=channel.name,
            items=channel.items,
            max_items=channel.max_items,
            sent_total=channel.sent_total,
            send_wait_s=channel.send_wait_s,
            receive_wait_s=channel.receive_wait_s,
        )
    generating = generator.statistics()
    log.info(
        "generator.stats",
        version=generating.version,
        running=generating.running,
        waiting=generating.waiting,
        num_slots=generating.num_slots,
        tokens_total=generating.tokens_total,
        decode_steps_total=generating.decode_steps_total,
        prefill_tokens_total=generating.prefill_tokens_total,
        busy_s=generating.busy_s,
        paused_s=generating.paused_s,
    )
    return statistics
