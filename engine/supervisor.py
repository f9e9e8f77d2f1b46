"""Who runs the actors of a node, in which order they start and stop, and what becomes of one that fails.

The supervisor owns every task of every actor: when ``stop`` has returned, none is left. It knows the life cycle and
nothing of what actors do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from engine.actor import Actor, ActorState, RestartPolicy, next_delay
from engine.clock import Clock
from engine.errors import ActorFailed, UserError
from engine.messages import Control, Drain
from engine.tracing import bound, log


class ActorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one actor."""

    name: str
    state: ActorState
    restarts: int
    """Since the run began."""
    since: float
    """Clock seconds when it entered ``state``."""


class Supervisor:
    """Starts actors, runs them, restarts those that may fail, and stops all of them, once and in order.

    Example::

        supervisor = Supervisor(SystemClock())
        supervisor.add(learner)
        supervisor.add(sampler, restart=RestartPolicy())
        try:
            await supervisor.start_all()
            await supervisor.wait()
        finally:
            await supervisor.stop()
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slots: dict[str, _Slot] = {}
        self._failure: ActorFailed | None = None
        self._stop_turn = asyncio.Lock()

    def add(
        self, actor: Actor, restart: RestartPolicy | None = None, *, at_end: Callable[[], None] | None = None
    ) -> None:
        """Take an actor in. Order matters: they start in the order of adding and stop in the reverse order.

        Args:
            restart: how often it may fail; None means that its first failure ends the run.
            at_end: called when its ``run`` has come to an end of its own, without having been told to drain. What it
                raises is the actor's failure, for good.

        Raises:
            ValueError: the name is taken.
            RuntimeError: ``start_all`` was called already.
        """
        if actor.name in self._slots:
            raise ValueError(f"two actors are named {actor.name!r}; give each its own name")
        if any(slot.state is not ActorState.NEW for slot in self._slots.values()):
            raise RuntimeError(f"actor {actor.name!r} comes too late: the others have started")
        self._slots[actor.name] = _Slot(actor, restart, self._clock, at_end)

    def states(self) -> tuple[ActorStatus, ...]:
        """All actors in the order of adding."""
        return tuple(slot.status() for slot in self._slots.values())

    async def start_all(self) -> None:
        """Start every actor, one after the other; when all have started, let all of them run.

        If one fails, or the call is cancelled, those that had started are stopped in reverse order and none has run.

        Raises:
            ActorFailed: ``start`` of one raised; never tried again, whatever its restart policy.
        """
        try:
            for slot in self._slots.values():
                try:
                    await slot.start()
                except ActorFailed as failed:
                    self._fail(slot, failed)
                    raise
        except BaseException:
            await self.stop()
            raise
        for slot in self._slots.values():
            slot.task = asyncio.create_task(self._supervise(slot), name=slot.actor.name)

    async def wait(self) -> None:
        """Return when every actor has come to its end and has been stopped.

        Waits for: the runs of all actors. Unblocked by: their input ending, a ``Drain`` that they obey, ``stop``, or a
        failure that no policy forgives; then the others are cancelled and all are stopped in reverse order. Cancelling
        it leaves the actors running; ``stop`` ends them.

        Raises:
            ActorFailed: names the first actor that failed beyond its policy and why.
        """
        tasks = self._tasks()
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        await self.stop()
        if self._failure is not None:
            raise self._failure

    def tell(self, message: Control, *, to: Iterable[str] | None = None) -> None:
        """Deliver a control message to running actors (to those in ``to``, or to all), at once and beside their data.

        Each actor handles its messages one at a time in the order of telling; those who have not begun to run, or wait
        to be started again, get it when they run. Who has come to an end gets nothing.

        Raises:
            KeyError: a name that was never added.
        """
        for name in self._slots if to is None else to:
            self._slots[name].tell(message)

    async def stop(self) -> None:
        """Cancel what runs and stop every started actor, last started first. Idempotent; raises nothing of the actors.

        What an actor's ``stop`` raises is logged, and the next one is stopped. A second call waits for the first;
        after a call that was cancelled, the next one goes on with the rest.
        """
        async with self._stop_turn:
            await _cancel_and_join(self._tasks())
            for slot in reversed(self._slots.values()):
                await slot.stop()
                if slot.state not in (ActorState.NEW, ActorState.FAILED):
                    slot.enter(ActorState.STOPPED)

    def _tasks(self) -> set[asyncio.Task[None]]:
        return {slot.task for slot in self._slots.values() if slot.task is not None}

    async def _supervise(self, slot: _Slot) -> None:
        """Run one started actor until it ends, fails for good or is cancelled; it is stopped later, in its order.

        Raises:
            ActorFailed: it failed beyond its policy, or could not be started again.
        """
        with bound(actor=slot.actor.name):
            try:
                while (error := await slot.run()) is not None:
                    delay_s = slot.forgive(error)
                    if delay_s is None:
                        raise ActorFailed(slot.actor.name, error) from error
                    log.warning("actor.failed", error=repr(error), is_final=False, delay_s=delay_s, exc_info=error)
                    slot.enter(ActorState.STARTING)
                    await slot.stop()
                    await self._clock.sleep(delay_s)
                    await slot.start()
                    slot.restarts += 1
                    log.info("actor.restarted", restarts=slot.restarts)
                slot.conclude()
            except ActorFailed as failed:
                self._fail(slot, failed)
                raise
            except asyncio.CancelledError:
                slot.enter(ActorState.STOPPED)
                raise
            slot.enter(ActorState.STOPPED)

    def _fail(self, slot: _Slot, failed: ActorFailed) -> None:
        slot.enter(ActorState.FAILED)
        log.error("actor.failed", actor=slot.actor.name, error=repr(failed.cause), is_final=True, exc_info=failed.cause)
        if self._failure is None:
            self._failure = failed


class _Slot:
    """One actor, its state and its tasks."""

    def __init__(
        self, actor: Actor, policy: RestartPolicy | None, clock: Clock, at_end: Callable[[], None] | None
    ) -> None:
        self.actor = actor
        self.task: asyncio.Task[None] | None = None
        self.state = ActorState.NEW
        self.restarts = 0
        self._policy = policy
        self._at_end = at_end
        self._clock = clock
        self._since = clock.now()
        self._failure_times: list[float] = []
        self._owes_stop = False
        self._inbox: deque[Control] = deque()
        self._has_mail = asyncio.Event()
        self._drain: Drain | None = None

    def status(self) -> ActorStatus:
        return ActorStatus(name=self.actor.name, state=self.state, restarts=self.restarts, since=self._since)

    def enter(self, state: ActorState) -> None:
        if state is self.state:
            return
        log.info("actor.state_changed", actor=self.actor.name, before=self.state.value, after=state.value)
        self.state = state
        self._since = self._clock.now()

    def tell(self, message: Control) -> None:
        if self.state in (ActorState.STOPPED, ActorState.FAILED):
            log.debug("actor.control_dropped", actor=self.actor.name, message=type(message).__name__, reason="ended")
            return
        if isinstance(message, Drain):
            self._drain = message
            if self.state is ActorState.RUNNING:
                self.enter(ActorState.DRAINING)
        self._inbox.append(message)
        self._has_mail.set()

    def forgive(self, error: BaseException) -> float | None:
        """Seconds to wait before another start, or None when this failure is final."""
        now = self._clock.now()
        self._failure_times.append(now)
        if self._policy is None or isinstance(error, UserError):
            return None  # what the user must mend does not mend itself
        return next_delay(self._policy, self._failure_times, now)

    async def start(self) -> None:
        """Raises ActorFailed when the actor's ``start`` raises."""
        self.enter(ActorState.STARTING)
        self._owes_stop = True
        with bound(actor=self.actor.name):
            try:
                await self.actor.start()
            except BaseException as e:
                if _is_for_us(e):
                    raise
                raise ActorFailed(self.actor.name, e) from e

    async def run(self) -> BaseException | None:
        """Run one incarnation with its control messages beside it; its error, or None when it came to its end."""
        self.enter(ActorState.RUNNING if self._drain is None else ActorState.DRAINING)
        if self._drain is not None and self._drain not in self._inbox:
            self._inbox.append(self._drain)  # an earlier incarnation took it along when it failed
        run = asyncio.create_task(self.actor.run(), name=f"{self.actor.name} run")
        control = asyncio.create_task(self._deliver(), name=f"{self.actor.name} control")
        decisive: asyncio.Task[None] | None = None
        try:
            await asyncio.wait({run, control}, return_when=asyncio.FIRST_COMPLETED)
            decisive = control if control.done() and _error_of(control) is not None else run
            decisive = run if run.done() and _error_of(run) is not None else decisive
        finally:
            try:
                await _cancel_and_join({run, control})
            finally:
                for task in (run, control):
                    if task is not decisive and not task.cancelled() and (error := task.exception()) is not None:
                        log.error("actor.end_failed", error=repr(error), exc_info=error)
        return _error_of(decisive)

    def conclude(self) -> None:
        """Raises ActorFailed when ``at_end`` does."""
        if self._at_end is not None and self.state is ActorState.RUNNING:
            try:
                self._at_end()
            except Exception as e:
                raise ActorFailed(self.actor.name, e) from e

    async def _deliver(self) -> None:
        """Hand messages to the actor, oldest first.

        Waits for: mail. Unblocked by: ``tell``. Ends by being cancelled, or by what the actor raises.
        """
        while True:
            self._has_mail.clear()
            while self._inbox:
                message = self._inbox.popleft()
                log.debug("actor.control_delivered", message=type(message).__name__)
                await self.actor.control(message)
            await self._has_mail.wait()

    async def stop(self) -> None:
        """Call the actor's ``stop`` if it was started since the last time; log what it raises."""
        if not self._owes_stop:
            return
        self._owes_stop = False
        with bound(actor=self.actor.name):
            try:
                await self.actor.stop()
            except BaseException as e:
                if _is_for_us(e):
                    raise
                log.error("actor.stop_failed", error=repr(e), exc_info=e)


def _is_for_us(error: BaseException) -> bool:
    """True for a cancellation that was asked of this task, and for what ends the process.

    An actor that awaits something cancelled also raises CancelledError; that one is a failure like any other.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return not isinstance(error, Exception)


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    """What a finished task raised. Nobody cancelled it, so if it was cancelled, what it awaited was: an accident."""
    return (
        asyncio.CancelledError(f"{task.get_name()} was cancelled from within") if task.cancelled() else task.exception()
    )


async def _cancel_and_join(tasks: set[asyncio.Task[None]]) -> None:
    """Return when all tasks are done, also when this call is cancelled meanwhile; then the cancellation goes on."""
    for task in tasks:
        task.cancel()
    is_cancelled = False
    while pending := {task for task in tasks if not task.done()}:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            is_cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen here, so that asyncio does not report it as never retrieved
    if is_cancelled:
        raise asyncio.CancelledError
