"""When an actor may start again, its own thread, and what is said to it."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from engine.actor import Actor, RestartPolicy, Worker, next_delay
from engine.messages import Control, Drain
from tests.support.clock import Settle


def make_policy(**changes: float) -> RestartPolicy:
    fields = {"max_restarts": 3, "window_s": 100.0, "backoff_s": 1.0, "max_backoff_s": 3.0} | changes
    return RestartPolicy(**fields)  # type: ignore[arg-type]


# --- restart policy -------------------------------------------------------------------------------------------------


def test_the_delay_doubles_up_to_its_limit_and_then_the_failure_escalates() -> None:
    failures = [0.0, 1.0, 2.0, 3.0]

    assert [next_delay(make_policy(), failures[: n + 1], now) for n, now in enumerate(failures)] == [1, 2, 3, None]


def test_failures_older_than_the_window_are_forgotten() -> None:
    assert next_delay(make_policy(), [0.0, 1.0, 2.0, 101.5], 101.5) == 2.0


def test_no_restarts_at_all_means_that_the_first_failure_escalates() -> None:
    assert next_delay(make_policy(max_restarts=0), [5.0], 5.0) is None


@given(
    failures=st.lists(st.floats(0, 1e6), max_size=2_000).map(sorted),
    max_restarts=st.integers(0, 3_000),
    backoff_s=st.floats(0, 10),
)
def test_a_delay_is_never_negative_nor_above_its_limit_nor_an_overflow(
    failures: list[float], max_restarts: int, backoff_s: float
) -> None:
    policy = make_policy(max_restarts=max_restarts, window_s=1e7, backoff_s=backoff_s, max_backoff_s=10)
    delay_s = next_delay(policy, failures, 1e6)

    if len(failures) > max_restarts:
        assert delay_s is None
    else:
        assert delay_s is not None
        assert 0 <= delay_s <= 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_restarts": -1}, r"^max_restarts must be >= 0, got -1$"),
        ({"window_s": 0}, r"^window_s must be > 0 seconds, got 0$"),
        ({"backoff_s": 5}, r"^backoff_s=5 and max_backoff_s=3.0 must satisfy 0 <= backoff_s <= max_backoff_s seconds$"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(**changes)


# --- worker ---------------------------------------------------------------------------------------------------------


async def test_calls_run_one_after_the_other_in_a_thread_that_bears_the_name() -> None:
    worker = Worker("learner")
    seen: list[tuple[int, str]] = []

    def note(number: int) -> int:
        seen.append((number, threading.current_thread().name))
        return number * 10

    assert await asyncio.gather(*(worker.call(note, i) for i in range(5))) == [0, 10, 20, 30, 40]
    assert seen == [(i, "learner") for i in range(5)]
    await worker.close()
    assert "learner" not in [thread.name for thread in threading.enumerate()]


async def test_what_the_call_raises_reaches_the_caller_and_the_worker_goes_on() -> None:
    worker = Worker("learner")
    with pytest.raises(ZeroDivisionError):
        await worker.call(divmod, 1, 0)

    assert await worker.call(divmod, 7, 2) == (3, 1)
    await worker.close()


async def test_log_context_and_context_variables_are_there_in_the_thread_and_stay_the_callers() -> None:
    worker = Worker("learner")
    step: contextvars.ContextVar[int] = contextvars.ContextVar("step", default=0)
    step.set(41)

    def look() -> tuple[int, dict[str, object]]:
        here = step.get()
        step.set(99)
        return here, structlog.contextvars.get_contextvars()

    with structlog.contextvars.bound_contextvars(run="r1"):
        assert await worker.call(look) == (41, {"run": "r1"})
    assert step.get() == 41
    await worker.close()


async def test_stop_iteration_does_not_leave_the_caller_waiting_for_ever() -> None:
    worker = Worker("learner")
    with pytest.raises(RuntimeError, match=r"^next raised StopIteration in a worker; give next\(\) a default$"):
        await worker.call(next, iter(()))
    await worker.close()


async def test_a_cancelled_call_still_ends_before_close_returns(settle: Settle) -> None:
    worker = Worker("learner")
    has_begun, may_end, has_ended = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(has_begun.set)
        may_end.wait(10)
        has_ended.set()

    call = asyncio.create_task(worker.call(work))
    await has_begun.wait()
    call.cancel()
    await settle()
    assert call.cancelled()
    closing = asyncio.create_task(worker.close())
    await settle()
    assert not closing.done()  # and the loop was not blocked by it

    may_end.set()
    await closing
    assert has_ended.is_set()


async def test_a_call_cancelled_before_it_began_never_runs() -> None:
    worker = Worker("learner")
    has_begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    seen: list[str] = []

    def work() -> None:
        loop.call_soon_threadsafe(has_begun.set)
        may_end.wait(10)

    first = asyncio.create_task(worker.call(work))
    await has_begun.wait()
    second = asyncio.create_task(worker.call(seen.append, "second"))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    may_end.set()
    await first
    await worker.close()

    assert seen == []


async def test_an_error_that_finds_nobody_waiting_is_logged_with_the_callers_context() -> None:
    worker = Worker("learner")
    has_begun, may_fail = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def fail() -> None:
        loop.call_soon_threadsafe(has_begun.set)
        may_fail.wait(10)
        raise OSError("disk is gone")

    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        with structlog.contextvars.bound_contextvars(step=41):
            call = asyncio.create_task(worker.call(fail))
        await has_begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        may_fail.set()
        await worker.close()

    [line] = lines
    assert (line["event"], line["worker"], line["step"]) == ("worker.call_failed", "learner", 41)
    assert line["error"] == "OSError('disk is gone')"


async def test_a_closed_worker_refuses_and_closing_again_is_harmless() -> None:
    worker = Worker("learner")
    await worker.close()
    await worker.close()

    with pytest.raises(RuntimeError, match=r"^worker 'learner' is closed; it cannot run divmod$"):
        await worker.call(divmod, 1, 1)


async def test_a_close_that_was_cancelled_can_be_asked_again(settle: Settle) -> None:
    worker = Worker("learner")
    may_end = threading.Event()
    call = asyncio.create_task(worker.call(may_end.wait, 10))
    await settle()
    closing = asyncio.create_task(worker.close())
    await settle()
    closing.cancel()
    await settle()
    assert closing.cancelled()

    may_end.set()
    await worker.close()
    assert await call is True
    assert "learner" not in [thread.name for thread in threading.enumerate()]


# --- control --------------------------------------------------------------------------------------------------------


class Idle(Actor):
    async def run(self) -> None:
        return


async def test_an_actor_that_obeys_nothing_says_so() -> None:
    actor = Idle("idle")
    with capture_logs() as lines:
        await actor.start()
        await actor.control(Drain(reason="asked"))
        await actor.stop()

    assert [(line["event"], line["message"]) for line in lines] == [("actor.control_ignored", "Drain")]
    assert repr(actor) == "<Idle 'idle'>"


def test_a_control_message_is_tagged_with_its_name() -> None:
    drain = Drain(reason="signal", grace_s=5.0)
    frame = msgspec.msgpack.encode(drain)

    assert msgspec.msgpack.decode(frame)["type"] == "Drain"
    assert msgspec.msgpack.decode(frame, type=Control) == drain
