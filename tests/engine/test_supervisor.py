"""Order of start and stop, restarts, escalation and draining; no task outlives the supervisor."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import structlog
from structlog.testing import capture_logs

from engine.actor import Actor, ActorState, RestartPolicy
from engine.errors import ActorFailed, GeneratorDied, ModelError
from engine.messages import Control, Drain, Message
from engine.supervisor import Supervisor
from tests.support.clock import ManualClock, Settle

POLICY = RestartPolicy(max_restarts=2, window_s=100.0, backoff_s=1.0, max_backoff_s=30.0)

Journal = list[str]


class Note(Message, frozen=True, kw_only=True):
    """A message that asks for nothing: how messages travel does not depend on what they say."""

    number: int


def note(number: int) -> Control:
    return cast(Control, Note(number=number))


class Scripted(Actor):
    """Notes what happens to it in a journal shared with the others, and fails when told to."""

    def __init__(self, name: str, journal: Journal) -> None:
        super().__init__(name)
        self.journal = journal
        self.heard: list[Control] = []
        self.on_start: Callable[[], object] | None = None
        self.on_stop: Callable[[], object] | None = None
        self.on_control: Callable[[Control], None] | None = None
        self.drains = True
        self._ending: asyncio.Future[None] | None = None

    def end(self, error: BaseException | None = None) -> None:
        assert self._ending is not None
        if isinstance(error, asyncio.CancelledError):
            self._ending.cancel()
        elif error is not None:
            self._ending.set_exception(error)
        elif not self._ending.done():
            self._ending.set_result(None)

    async def start(self) -> None:
        self.journal.append(f"{self.name} start")
        if self.on_start is not None:
            self.on_start()
        await asyncio.sleep(0)

    async def run(self) -> None:
        self.journal.append(f"{self.name} run")
        self._ending = asyncio.get_running_loop().create_future()
        await self._ending

    async def control(self, message: Control) -> None:
        self.heard.append(message)
        if self.on_control is not None:
            self.on_control(message)
        if isinstance(message, Drain) and self.drains:
            self.end()

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.journal.append(f"{self.name} stop")
        if self.on_stop is not None:
            self.on_stop()


class Stage:
    """A supervisor with three scripted actors."""

    def __init__(self, clock: ManualClock, restart: RestartPolicy | None) -> None:
        self.journal: Journal = []
        self.supervisor = Supervisor(clock)
        self.a, self.b, self.c = (Scripted(name, self.journal) for name in "abc")
        for actor in (self.a, self.b, self.c):
            self.supervisor.add(actor, restart=restart)

    def states(self) -> list[ActorState]:
        return [status.state for status in self.supervisor.states()]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with capture_logs():
        yield


def assert_no_other_task() -> None:
    assert [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


async def test_all_start_in_order_before_any_runs_and_stop_in_reverse_order(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    assert stage.states() == [ActorState.NEW] * 3
    await stage.supervisor.start_all()
    await settle()
    assert stage.states() == [ActorState.RUNNING] * 3
    waiting = asyncio.create_task(stage.supervisor.wait())
    for actor in (stage.a, stage.b):
        actor.end()
    await settle()
    assert stage.states() == [ActorState.STOPPED, ActorState.STOPPED, ActorState.RUNNING]
    assert not waiting.done()
    stage.c.end()
    await waiting

    assert stage.states() == [ActorState.STOPPED] * 3
    assert stage.journal == [
        *("a start", "b start", "c start"),
        *("a run", "b run", "c run"),
        *("c stop", "b stop", "a stop"),
    ]
    assert_no_other_task()


async def test_the_first_failure_without_a_policy_stops_all_and_names_actor_and_cause(
    clock: ManualClock, settle: Settle
) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    waiting = asyncio.create_task(stage.supervisor.wait())
    await settle()
    cause = GeneratorDied("engine is gone")
    with capture_logs() as lines:
        stage.b.end(cause)
        with pytest.raises(ActorFailed, match=r"^actor 'b' failed: GeneratorDied: engine is gone$") as failed:
            await waiting

    assert (failed.value.actor, failed.value.cause, failed.value.__cause__) == ("b", cause, cause)
    assert stage.states() == [ActorState.STOPPED, ActorState.FAILED, ActorState.STOPPED]
    assert stage.journal[-3:] == ["c stop", "b stop", "a stop"]
    [line] = [line for line in lines if line["event"] == "actor.failed"]
    assert (line["actor"], line["error"], line["is_final"]) == ("b", "GeneratorDied('engine is gone')", True)
    assert_no_other_task()


async def test_a_failed_actor_is_stopped_waits_its_backoff_and_starts_again(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, POLICY)
    await stage.supervisor.start_all()
    await settle()
    stage.journal.clear()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        stage.b.end(GeneratorDied("once"))
        await settle()
        assert stage.journal == ["b stop"]
        assert stage.states() == [ActorState.RUNNING, ActorState.STARTING, ActorState.RUNNING]
        await clock.advance(0.9)
        assert stage.journal == ["b stop"]
        await clock.advance(0.1)

    assert stage.journal == ["b stop", "b start", "b run"]
    status = stage.supervisor.states()[1]
    assert (status.name, status.state, status.restarts, status.since) == ("b", ActorState.RUNNING, 1, 1.0)
    seen = [(line["event"], line["actor"]) for line in lines if line["event"] != "actor.state_changed"]
    assert seen == [("actor.failed", "b"), ("actor.restarted", "b")]
    changes = [(line["before"], line["after"]) for line in lines if line["event"] == "actor.state_changed"]
    assert changes == [("running", "starting"), ("starting", "running")]
    await stage.supervisor.stop()
    assert_no_other_task()


async def test_failures_beyond_the_policy_escalate(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, POLICY)
    await stage.supervisor.start_all()
    waiting = asyncio.create_task(stage.supervisor.wait())
    for number in range(3):
        await settle()
        stage.b.end(GeneratorDied(f"failure {number}"))
        await clock.advance(10)

    with pytest.raises(ActorFailed, match="failure 2"):
        await waiting
    assert stage.supervisor.states()[1].restarts == 2
    assert_no_other_task()


async def test_what_the_user_must_mend_is_not_tried_again(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, POLICY)
    await stage.supervisor.start_all()
    await settle()
    stage.b.end(ModelError("folder is missing"))

    with pytest.raises(ActorFailed, match="folder is missing"):
        await stage.supervisor.wait()


async def test_an_actor_that_is_cancelled_from_within_has_failed(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    await settle()
    stage.b.end(asyncio.CancelledError())

    with pytest.raises(ActorFailed, match=r"actor 'b' failed: CancelledError: .* cancelled from within"):
        await stage.supervisor.wait()


@pytest.mark.parametrize("error", [ModelError("broken"), asyncio.CancelledError()])
async def test_a_failed_start_stops_what_had_started_and_nothing_runs(clock: ManualClock, error: BaseException) -> None:
    stage = Stage(clock, POLICY)
    stage.b.on_start = raiser(error)
    with pytest.raises(ActorFailed, match="actor 'b' failed") as failed:
        await stage.supervisor.start_all()

    assert failed.value.cause is error
    assert stage.journal == ["a start", "b start", "b stop", "a stop"]
    assert stage.states() == [ActorState.STOPPED, ActorState.FAILED, ActorState.NEW]
    with pytest.raises(ActorFailed):
        await stage.supervisor.wait()
    assert_no_other_task()


async def test_a_failed_start_of_a_restart_escalates(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, POLICY)
    await stage.supervisor.start_all()
    await settle()
    stage.b.on_start = raiser(GeneratorDied("cannot come back"))
    stage.b.end(GeneratorDied("went away"))
    await clock.advance(1)

    with pytest.raises(ActorFailed, match="cannot come back"):
        await stage.supervisor.wait()
    assert stage.journal.count("b stop") == 2  # one for each start
    assert_no_other_task()


async def test_a_cancelled_start_all_stops_what_had_started(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    starting = asyncio.create_task(stage.supervisor.start_all())
    stage.b.on_start = starting.cancel
    await asyncio.wait({starting})

    assert starting.cancelled()
    assert stage.journal == ["a start", "b start", "b stop", "a stop"]
    assert stage.states() == [ActorState.STOPPED, ActorState.STOPPED, ActorState.NEW]
    assert_no_other_task()


async def test_a_stop_that_fails_is_logged_and_the_first_cause_wins(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    stage.c.on_stop = raiser(OSError("c will not stop"))
    stage.b.on_stop = raiser(asyncio.CancelledError())
    await stage.supervisor.start_all()
    await settle()
    stage.a.end(GeneratorDied("the cause"))
    with capture_logs() as lines, pytest.raises(ActorFailed, match="the cause"):
        await stage.supervisor.wait()

    assert stage.journal[-3:] == ["c stop", "b stop", "a stop"]
    errors = [line["error"] for line in lines if line["event"] == "actor.stop_failed"]
    assert errors == ["OSError('c will not stop')", "CancelledError()"]


async def test_of_two_failures_the_first_is_the_cause(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    await settle()
    stage.c.end(GeneratorDied("first"))
    stage.a.end(GeneratorDied("second"))
    await settle()

    with pytest.raises(ActorFailed, match=r"^actor 'c' failed: GeneratorDied: first$"):
        await stage.supervisor.wait()
    assert_no_other_task()


async def test_control_messages_arrive_at_once_in_order_and_one_at_a_time(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    await settle()
    messages: list[Control] = [note(1), note(0), note(2)]
    for message in messages:
        stage.supervisor.tell(message, to=["b"])
    await settle()

    assert stage.b.heard == messages
    assert stage.a.heard == []
    with pytest.raises(KeyError):
        stage.supervisor.tell(note(0), to=["nobody"])
    await stage.supervisor.stop()


async def test_messages_told_before_an_actor_runs_wait_for_it(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    stage.supervisor.tell(note(1))
    await stage.supervisor.start_all()
    await settle()

    assert stage.a.heard == [note(1)]
    await stage.supervisor.stop()


async def test_an_error_in_a_control_message_is_a_failure_of_the_actor(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, POLICY)
    await stage.supervisor.start_all()
    await settle()
    stage.b.on_control = raiser(ValueError("no such shape"))
    stage.supervisor.tell(note(1), to=["b"])
    await clock.advance(1)

    assert stage.supervisor.states()[1].restarts == 1
    assert stage.states()[1] is ActorState.RUNNING
    await stage.supervisor.stop()
    assert_no_other_task()


async def test_drain_lets_every_actor_come_to_its_end(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    waiting = asyncio.create_task(stage.supervisor.wait())
    await settle()
    stage.c.drains = False
    stage.supervisor.tell(Drain(reason="SIGTERM"))
    await settle()
    assert stage.states() == [ActorState.STOPPED, ActorState.STOPPED, ActorState.DRAINING]
    stage.c.end()

    await waiting
    assert stage.a.heard == [Drain(reason="SIGTERM", grace_s=30.0)]
    assert stage.journal[-3:] == ["c stop", "b stop", "a stop"]
    assert_no_other_task()


async def test_a_drain_during_the_start_reaches_the_actors_when_they_run(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    stage.supervisor.tell(Drain(reason="SIGTERM"))
    await stage.supervisor.start_all()
    await stage.supervisor.wait()

    assert [actor.heard for actor in (stage.a, stage.b, stage.c)] == [[Drain(reason="SIGTERM", grace_s=30.0)]] * 3


async def test_an_actor_restarted_while_draining_is_told_to_drain_again(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, POLICY)
    stage.b.drains = False
    await stage.supervisor.start_all()
    waiting = asyncio.create_task(stage.supervisor.wait())
    await settle()
    stage.supervisor.tell(Drain(reason="SIGTERM"))
    await settle()
    stage.b.end(GeneratorDied("in the middle of it"))
    stage.b.drains = True
    await clock.advance(1)

    await waiting
    assert stage.b.heard == [Drain(reason="SIGTERM", grace_s=30.0)] * 2


async def test_nothing_is_told_to_an_actor_that_has_ended(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    await settle()
    stage.a.end()
    await settle()
    stage.supervisor.tell(note(0))
    await settle()

    assert stage.a.heard == []
    assert stage.b.heard == [note(0)]
    await stage.supervisor.stop()


async def test_stop_ends_everything_at_once_also_a_backoff_and_may_be_called_again(
    clock: ManualClock, settle: Settle
) -> None:
    stage = Stage(clock, POLICY)
    await stage.supervisor.start_all()
    await settle()
    stage.b.end(GeneratorDied("once"))
    await settle()
    assert clock.num_sleeping == 1  # in its back-off
    await asyncio.gather(stage.supervisor.stop(), stage.supervisor.stop())
    await stage.supervisor.wait()

    assert stage.states() == [ActorState.STOPPED] * 3
    assert [stage.journal.count(f"{name} stop") for name in "abc"] == [1, 1, 1]
    assert_no_other_task()


async def test_stop_before_the_actors_had_a_turn_leaves_them_stopped(clock: ManualClock) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    await stage.supervisor.stop()

    assert stage.states() == [ActorState.STOPPED] * 3
    assert stage.journal == ["a start", "b start", "c start", "c stop", "b stop", "a stop"]
    assert_no_other_task()


async def test_a_cancelled_stop_goes_on_with_the_rest_when_asked_again(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    await settle()
    stopping = asyncio.create_task(stage.supervisor.stop())
    stage.c.on_stop = stopping.cancel
    await asyncio.wait({stopping})
    assert stopping.cancelled()
    await stage.supervisor.stop()

    assert stage.journal[-2:] == ["c stop", "a stop"]  # b's was under way when the cancellation came
    assert stage.states() == [ActorState.STOPPED] * 3
    assert_no_other_task()


async def test_a_cancelled_wait_leaves_the_actors_running(clock: ManualClock, settle: Settle) -> None:
    stage = Stage(clock, None)
    await stage.supervisor.start_all()
    waiting = asyncio.create_task(stage.supervisor.wait())
    await settle()
    waiting.cancel()
    await settle()

    assert stage.states() == [ActorState.RUNNING] * 3
    await stage.supervisor.stop()
    assert_no_other_task()


async def test_an_error_while_being_cancelled_is_logged(clock: ManualClock, settle: Settle) -> None:
    class Messy(Scripted):
        async def run(self) -> None:
            try:
                await super().run()
            finally:
                raise OSError("could not tidy up")

    supervisor = Supervisor(clock)
    supervisor.add(Messy("messy", []))
    await supervisor.start_all()
    await settle()
    with capture_logs() as lines:
        await supervisor.stop()

    assert [line["error"] for line in lines if line["event"] == "actor.end_failed"] == ["OSError('could not tidy up')"]
    assert_no_other_task()


async def test_log_lines_of_an_actor_carry_its_name(clock: ManualClock, settle: Settle) -> None:
    seen: list[dict[str, Any]] = []

    class Speaking(Actor):
        async def start(self) -> None:
            seen.append(structlog.contextvars.get_contextvars())

        async def run(self) -> None:
            seen.append(structlog.contextvars.get_contextvars())

        async def stop(self) -> None:
            seen.append(structlog.contextvars.get_contextvars())

    supervisor = Supervisor(clock)
    supervisor.add(Speaking("speaker"))
    await supervisor.start_all()
    await supervisor.wait()

    assert seen == [{"actor": "speaker"}] * 3


async def test_names_are_unique_and_nobody_joins_late(clock: ManualClock) -> None:
    stage = Stage(clock, None)
    with pytest.raises(ValueError, match=r"^two actors are named 'a'; give each its own name$"):
        stage.supervisor.add(Scripted("a", []))
    await stage.supervisor.start_all()
    with pytest.raises(RuntimeError, match=r"^actor 'd' comes too late: the others have started$"):
        stage.supervisor.add(Scripted("d", []))
    await stage.supervisor.stop()


async def test_a_supervisor_without_actors_has_nothing_to_wait_for(clock: ManualClock) -> None:
    supervisor = Supervisor(clock)
    await supervisor.start_all()
    await supervisor.wait()
    assert supervisor.states() == ()


@pytest.mark.parametrize("seed", range(40))
async def test_any_history_ends_with_one_stop_for_each_start_and_no_task(clock: ManualClock, seed: int) -> None:
    """Random failures, drains and cancellations at random moments."""
    dice = random.Random(seed)
    stage = Stage(clock, POLICY if dice.random() < 0.7 else None)
    actors = (stage.a, stage.b, stage.c)
    waiting: asyncio.Task[None] | None = None
    for actor in actors:
        actor.drains = dice.random() < 0.7
    await stage.supervisor.start_all()
    for _ in range(12):
        actor = dice.choice(actors)
        match dice.choice(["fail", "end", "tell", "advance", "turn", "wait", "cancel wait", "drain", "bad start"]):
            case "fail" if actor._ending is not None and not actor._ending.done():
                actor.end(GeneratorDied("by the dice"))
            case "end" if actor._ending is not None and not actor._ending.done():
                actor.end()
            case "tell":
                stage.supervisor.tell(note(1))
            case "advance":
                await clock.advance(dice.choice([0.5, 1, 5]))
            case "turn":
                await asyncio.sleep(0)
            case "wait" if waiting is None:
                waiting = asyncio.create_task(stage.supervisor.wait())
            case "cancel wait" if waiting is not None:
                waiting.cancel()
            case "drain":
                stage.supervisor.tell(Drain(reason="dice"))
            case "bad start" if dice.random() < 0.3:
                actor.on_start = raiser(GeneratorDied("will not start"))
    await stage.supervisor.stop()
    await asyncio.gather(*filter(None, (waiting,)), return_exceptions=True)

    for name in "abc":
        turns = [line.split()[1] for line in stage.journal if line.startswith(name) and not line.endswith("run")]
        assert turns == ["start", "stop"] * (len(turns) // 2)
    assert all(state in (ActorState.STOPPED, ActorState.FAILED) for state in stage.states())
    assert_no_other_task()
