"""Several replicas of one teacher as one ``Teacher`` that does not fail when they do.

A score is tried until a replica answers it: each attempt has a deadline, failed attempts are repeated after a random,
growing wait under the same request id, a slow one is asked a second time elsewhere. A replica that fails is left out
and probed (``teacher.replica`` decides when, ``teacher.places`` who goes where). When all are out, scores wait. What is
scored, and what a refusal means for it, is the caller's business.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from structlog.typing import FilteringBoundLogger

from engine.clock import Clock, SystemClock
from engine.errors import (
    RecipeError,
    TeacherMismatch,
    TeacherOverloaded,
    TeacherRefused,
    TeacherUnavailable,
    UserError,
)
from engine.recipe import HttpTeacher
from engine.tracing import log
from teacher.client import TeacherClient
from teacher.places import Places
from teacher.protocol import Scores, Teacher, TeacherInfo
from teacher.replica import MISCONFIGURED, Happening, Replica, State, backoff_s, difference
from teacher.waits import Alarms, Interrupted, Scope

ResultT = TypeVar("ResultT")

PROBE_DEADLINE_S = 10.0
"""A health probe asks for no computation; what takes longer is not healthy."""

MAX_REST_S = 60.0
"""The longest that a replica is left alone on its own word: no overload lasts longer without an operator."""

_DEADLINE, _ANSWERED, _CLOSED = "deadline", "answered by another replica", "closed"


class ReplicaClient(Teacher, Protocol):
    """One replica (``TeacherClient``): a teacher that can be asked how it is. Nothing it says may come from a cache."""

    async def ready(self) -> bool:
        """Whether it would take a score now.

        Raises:
            TeacherUnavailable: it cannot be reached.
        """
        ...


class ReplicaStatistics(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: State
    reason: str
    """Of the state, in words."""
    in_flight: int
    successes_total: int
    """Answers with scores."""
    failures_total: int
    """Requests without an answer: connection lost, deadline over, 5xx. Refusals and overloads are answers."""
    overloads_total: int
    latency_s: float | None
    """Moving average of the time to an answer; None before the first."""
    opened_total: int
    """How often the replica was taken out."""


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    replicas: tuple[ReplicaStatistics, ...]
    num_open: int
    """Scores that have been asked for and not been given."""
    num_waiting: int
    """Of these: wait for a place at a replica."""
    num_parked: int
    """``num_open`` while every replica is out, else 0."""
    retries_total: int
    hedges_total: int
    """Second replicas asked because the first was slow."""
    hedge_wins_total: int
    """Of these: answered before the first did."""
    parked_s: float
    """Seconds that every replica was out while scores were wanted."""


class ReplicaPool:
    """A ``Teacher`` over several.

    ``score`` never raises ``TeacherUnavailable`` while the pool is open: it waits, if need be for ever, and the log
    says so (``teacher.parked``, ``teacher.resumed``). It may be cancelled at any time and leaves nothing behind.

    A request goes to the replica with the fewest requests in flight, at most ``max_in_flight`` of them; others wait,
    first come, first served. A replica is probed before its first request, and again before the next one after any
    failure: it must be ready and be the same teacher as the others (``teacher.replica.difference``), because a service
    that was restarted with another model would poison the run without a sound.

    Background tasks start with the first ``score`` and end with ``close``:
        a prober per replica that is out     waits for:     ``probe_every_s`` (± a quarter), the probe's answer
                                             unblocked by:  the clock, the replica
        a keeper of deadlines, one of hedges waits for:     the oldest request's time
                                             unblocked by:  the clock

    Args:
        replicas: by name; names appear in the log and break ties. They are closed with the pool.
        config: times and limits; ``urls`` and ``token_file`` are ``connect``'s business.
        rng: jitter only; request ids do not come from it, so that pools with one seed do not share them.
    """

    def __init__(
        self,
        *,
        replicas: Mapping[str, ReplicaClient],
        config: HttpTeacher,
        clock: Clock,
        rng: random.Random,
        logger: FilteringBoundLogger = log,
    ) -> None:
        if not replicas:
            raise ValueError("a pool needs at least one replica, got none")
        self._config = config
        self._clock = clock
        self._rng = rng
        self._log = logger
        self._clients = dict(replicas)
        self._replicas = tuple(
            Replica(name, max_in_flight=config.max_in_flight, max_failures=config.breaker_failures)
            for name in sorted(replicas)
        )
        self._places = Places(self._replicas, clock=clock)
        self._known: TeacherInfo | None = None
        """What the first replica said of itself: what all must be."""
        self._id_prefix = uuid.uuid4().hex
        self._ids = itertools.count()
        self._deadlines = Alarms[Scope](clock, after_s=config.deadline_s, ring=lambda scope: scope.interrupt(_DEADLINE))
        self._hedges: Alarms[_Race] | None = None
        if config.hedge_after_s is not None and len(self._replicas) > 1:
            self._hedges = Alarms(clock, after_s=config.hedge_after_s, ring=self._hedge)
        self._open: set[Scope] = set()
        """One for each score under way."""
        self._all_ended: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._probing: set[Replica] = set()
        self._resting: set[Replica] = set()
        self._is_started = False
        self._is_closed = False
        self._crash: BaseException | None = None
        self._parked_since: float | None = None
        self._parked_s = 0.0
        self._retries_total = 0
        self._hedges_total = 0
        self._hedge_wins_total = 0

    async def info(self) -> TeacherInfo:
        """What the first replica to be heard said of itself. Asks all of them the first time.

        Raises:
            TeacherMismatch: two replicas are different teachers.
            TeacherRefused: no replica answers, and one of them refuses (a wrong token).
            TeacherUnavailable: no replica answers, or the pool is closed.
        """
        self._require_open()
        if self._known is not None:
            return self._known
        found = await asyncio.gather(*(self._try_info(replica) for replica in self._replicas))
        known: tuple[str, TeacherInfo] | None = None
        for replica, info in zip(self._replicas, found, strict=True):
            if not isinstance(info, TeacherInfo):
                continue
            if known is None:
                known = replica.name, info
            elif (why := difference(known[1], info)) is not None:
                raise TeacherMismatch(
                    f"teacher replicas {known[0]} and {replica.name} differ: at the second, {why}; "
                    "start all replicas with one model"
                )
        if known is None:
            raise _none_of([error for error in found if not isinstance(error, TeacherInfo)])
        if self._known is None:  # a prober may have been quicker
            self._known = known[1]
        return self._known

    async def score(
        self,
        *,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        top_k: int,
        extra_ids: npt.NDArray[np.int32] | None = None,
        alone: bool = False,
        request_id: str | None = None,
    ) -> Scores:
        """Score one response; arguments as in ``Teacher.score``. Every attempt carries the same request id.

        Raises:
            TeacherRefused: the request can never succeed; or every replica refuses whatever it is asked (its status is
                in ``teacher.replica.MISCONFIGURED``), and then the fault is not the request's.
            TeacherUnavailable: the pool is closed, or was closed meanwhile.
        """
        self._require_open()
        if not self._is_started:
            self._start()
        ask = {
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "top_k": top_k,
            "extra_ids": extra_ids,
            "alone": alone,
            "request_id": request_id if request_id is not None else f"{self._id_prefix}-{next(self._ids)}",
        }
        scope = Scope()
        self._open.add(scope)
        try:
            with scope:
                return await self._score(ask)
        except Interrupted:
            raise self._why_ended() from self._crash
        finally:
            self._open.discard(scope)
            if self._all_ended is not None and not self._open and not self._all_ended.done():
                self._all_ended.set_result(None)

    async def close(self) -> None:
        """End everything: open scores get ``TeacherUnavailable``, background tasks stop, replicas are closed. Returns
        when all of that has happened. Idempotent."""
        self._is_closed = True
        self._end_parking()
        for scope in self._open:
            scope.interrupt(_CLOSED)
        if self._open:
            if self._all_ended is None:
                self._all_ended = asyncio.get_running_loop().create_future()
            # Shielded: a second close waits for the same scores.
            await asyncio.shield(self._all_ended)
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))
        closed = await asyncio.gather(*(client.close() for client in self._clients.values()), return_exceptions=True)
        for error in closed:
            if error is not None:
                raise error

    def statistics(self) -> PoolStatistics:
        parked_now_s = 0.0 if self._parked_since is None else self._clock.now() - self._parked_since
        return PoolStatistics(
            replicas=tuple(
                ReplicaStatistics(
                    name=replica.name,
                    state=replica.state,
                    reason=replica.reason,
                    in_flight=replica.in_flight,
                    successes_total=replica.successes_total,
                    failures_total=replica.failures_total,
                    overloads_total=replica.overloads_total,
                    latency_s=replica.latency_s,
                    opened_total=replica.opened_total,
                )
                for replica in self._replicas
            ),
            num_open=len(self._open),
            num_waiting=self._places.num_waiting,
            num_parked=0 if self._parked_since is None else len(self._open),
            retries_total=self._retries_total,
            hedges_total=self._hedges_total,
            hedge_wins_total=self._hedge_wins_total,
            parked_s=self._parked_s + parked_now_s,
        )

    def __repr__(self) -> str:
        states = ", ".join(f"{replica.name} {replica.state}" for replica in self._replicas)
        return f"<ReplicaPool {'closed' if self._is_closed else f'{len(self._open)} open'}: {states}>"

    # One score

    async def _score(self, ask: dict[str, Any]) -> Scores:
        """Attempt after attempt until one is answered."""
        for attempt in itertools.count(1):
            replica = self._places.try_take()
            if replica is None:
                replica = await self._wait_for_place()
            try:
                if self._hedges is None:
                    return await self._ask(replica, ask, Scope())
                return await self._race(replica, ask, self._hedges)
            except TeacherRefused as refusal:
                if refusal.status not in MISCONFIGURED or self._everyone_refuses():
                    raise
                delay_s, reason = 0.0, str(refusal)  # that replica is out now: nobody is asked twice
            except TeacherOverloaded as overload:
                # The replica rests, not the request: it queues for a place, here or elsewhere.
                delay_s, reason = 0.0, str(overload)
            except TeacherUnavailable as failure:
                config = self._config
                delay_s = backoff_s(attempt, first_s=config.backoff_s, max_s=config.max_backoff_s, rng=self._rng)
                reason = str(failure)
            self._retries_total += 1
            self._log.info(
                "teacher.retried",
                request_id=ask["request_id"],
                attempt=attempt + 1,
                replica=replica.name,
                delay_s=round(delay_s, 3),
                reason=reason,
            )
            if delay_s > 0:
                await self._clock.sleep(delay_s)
        raise AssertionError("unreachable")

    async def _wait_for_place(self) -> Replica:
        if self._everyone_refuses():
            raise self._refusal()
        self._park_if_all_are_out()
        return await self._places.take()

    async def _ask(self, replica: Replica, ask: dict[str, Any], scope: Scope) -> Scores:
        """One request to one replica, whose place the caller has taken; gives it back and tells what it has learnt.

        Raises:
            TeacherRefused, TeacherUnavailable: what the replica said, or the deadline is over.
            Interrupted: ``scope`` was interrupted for another reason than the deadline.
        """
        era, began = replica.era, self._clock.now()
        try:
            try:
                self._deadlines.set(scope, began)
                with scope:
                    scores = await self._clients[replica.name].score(**ask)
            finally:
                self._deadlines.clear(scope)
                replica.in_flight -= 1
            replica.successes_total += 1
            replica.took(self._clock.now() - began)
            self._note(replica, era, "answered", "answers")
            return scores
        except Interrupted as interrupted:
            replica.took_more_than(self._clock.now() - began)
            if interrupted.reason != _DEADLINE:
                raise
            reason = f"no answer from {replica.name} within {self._config.deadline_s:g} s"
            self._failed(replica, era, reason)
            raise TeacherUnavailable(reason) from None
        except TeacherRefused as refusal:
            if refusal.status in MISCONFIGURED:
                self._note(replica, era, "misconfigured", str(refusal), refusal=refusal)
            else:
                self._note(replica, era, "answered", "answers")
            raise
        except TeacherOverloaded as overload:
            self._rest(replica, overload.retry_after_s)
            self._note(replica, era, "answered", "answers")
            raise
        except TeacherUnavailable as failure:
            self._failed(replica, era, str(failure))
            raise
        finally:
            self._places.hand_out()

    # Hedging

    async def _race(self, first: Replica, ask: dict[str, Any], alarms: Alarms[_Race]) -> Scores:
        """One attempt at one replica, and at a second one when the first is slow."""
        race = _Race(first, ask)
        alarms.set(race, self._clock.now())
        try:
            return await self._ask(first, ask, race.scope)
        except Interrupted:
            assert race.second is not None, "only the second replica's answer ends the first request"
            outcome = race.second.result()
        except (TeacherUnavailable, TeacherRefused) as failure:
            if race.second is None or _is_final(failure):
                raise
            outcome = await race.second
            if not _is_final(outcome):
                raise
        finally:
            alarms.clear(race)
            if race.second is not None:
                race.second.cancel()
        if isinstance(outcome, Scores):
            self._hedge_wins_total += 1
            return outcome
        raise outcome

    def _hedge(self, race: _Race) -> None:
        """The first replica has been slow for ``hedge_after_s``."""
        if self._places.has_second(race.first):
            race.second = self._spawn(self._second(race), "teacher.hedge")

    async def _second(self, race: _Race) -> Scores | TeacherUnavailable | TeacherRefused:
        # The place is taken here and not by the caller: a task cancelled before its first step gives nothing back.
        replica = self._places.try_take_second(race.first)
        if replica is None:
            return TeacherUnavailable("no other replica has room")
        self._hedges_total += 1
        self._log.info(
            "teacher.hedged",
            request_id=race.ask["request_id"],
            replica=race.first.name,
            second=replica.name,
            after_s=self._config.hedge_after_s,
        )
        outcome: Scores | TeacherUnavailable | TeacherRefused
        try:
            outcome = await self._ask(replica, race.ask, Scope())
        except (TeacherUnavailable, TeacherRefused) as failure:
            outcome = failure
        if _is_final(outcome):
            race.scope.interrupt(_ANSWERED)
        return outcome

    # What is known of the replicas

    def _failed(self, replica: Replica, era: int, reason: str) -> None:
        replica.failures_total += 1
        self._note(replica, era, "failed", reason)

    def _note(
        self, replica: Replica, era: int, happening: Happening, reason: str, *, refusal: TeacherRefused | None = None
    ) -> None:
        """Take in what happened to a request that was sent in ``era``, and do what follows from it."""
        if era != replica.era or not replica.note(happening, reason, refusal=refusal):
            return
        state = replica.state
        emit = self._log.warning if state in ("open", "rejected") else self._log.info
        emit("teacher.replica_changed", replica=replica.name, state=state, reason=reason)
        if state == "rejected":
            self._log.warning("teacher.replica_rejected", replica=replica.name, reason=reason)
        if state == "closed":
            self._resume()
        elif state != "half_open":
            self._start_probing(replica)
            if self._everyone_refuses():
                self._places.fail_all(self._refusal)
            else:
                self._park_if_all_are_out()

    def _start_probing(self, replica: Replica) -> None:
        if replica not in self._probing and not self._is_closed:
            self._probing.add(replica)
            self._spawn(self._probe_until_back(replica), f"teacher.probe {replica.name}")

    async def _probe_until_back(self, replica: Replica) -> None:
        # A suspect is looked at now, because a request may be waiting for it alone. What is out has time.
        wait_s = 0.0 if replica.state == "suspect" else self._probe_wait_s()
        while True:
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            happening, reason = await self._probe(replica)
            if happening == "probe_ok":
                # Before the change is told: the change may call for the next prober.
                self._probing.discard(replica)
            self._note(replica, replica.era, happening, reason)
            self._places.hand_out()
            if happening == "probe_ok":
                return
            wait_s = self._probe_wait_s()

    async def _probe(self, replica: Replica) -> tuple[Happening, str]:
        info = await self._try_info(replica)
        if not isinstance(info, TeacherInfo):
            return "probe_failed", str(info)
        if self._known is None:
            self._known = info
        why = difference(self._known, info)
        return ("probe_ok", "ready") if why is None else ("mismatch", why)

    async def _try_info(self, replica: Replica) -> TeacherInfo | TeacherUnavailable | TeacherRefused:
        async def look() -> TeacherInfo:
            client = self._clients[replica.name]
            if not await client.ready():
                raise TeacherUnavailable(f"{replica.name} is not ready")
            return await client.info()

        try:
            return await self._within(min(PROBE_DEADLINE_S, self._config.deadline_s), look())
        except Interrupted:
            return TeacherUnavailable(f"{replica.name} does not answer a health probe")
        except (TeacherUnavailable, TeacherRefused) as error:
            return error

    async def _within(self, seconds: float, work: Awaitable[ResultT]) -> ResultT:
        """
        Raises:
            Interrupted: ``work`` took longer, and was cancelled.
        """
        scope = Scope()

        async def ring() -> None:
            await self._clock.sleep(seconds)
            scope.interrupt(_DEADLINE)

        alarm = self._spawn(ring(), "teacher.probe deadline")
        try:
            with scope:
                return await work
        finally:
            alarm.cancel()

    def _probe_wait_s(self) -> float:
        # Jitter, so that many pools do not probe a replica that comes back in step.
        return self._config.probe_every_s * self._rng.uniform(0.75, 1.25)

    def _rest(self, replica: Replica, retry_after_s: float) -> None:
        """Leave an overloaded replica alone for as long as it asked for, and a little longer: it asked everybody."""
        rest_s = min(max(0.0, retry_after_s), MAX_REST_S) + self._rng.uniform(0.0, self._config.backoff_s)
        replica.overloaded(self._clock.now(), rest_s=rest_s)
        if replica not in self._resting:
            self._resting.add(replica)
            self._spawn(self._wake(replica), f"teacher.rest {replica.name}")

    async def _wake(self, replica: Replica) -> None:
        while (left_s := replica.rest_until - self._clock.now()) > 0:
            await self._clock.sleep(left_s)
        self._resting.discard(replica)
        self._places.hand_out()

    # Parking

    def _everyone_refuses(self) -> bool:
        return all(replica.refusal is not None for replica in self._replicas)

    def _refusal(self) -> TeacherRefused:
        refusal = self._replicas[0].refusal
        assert refusal is not None
        return TeacherRefused(f"every teacher replica refuses: {refusal}", status=refusal.status)

    def _park_if_all_are_out(self) -> None:
        if (
            self._parked_since is None
            and self._open
            and not any(r.state in ("closed", "suspect") for r in self._replicas)
        ):
            self._parked_since = self._clock.now()
            self._log.warning("teacher.parked", num_parked=len(self._open))

    def _resume(self) -> None:
        if self._parked_since is not None:
            parked_s = self._end_parking()
            self._log.info("teacher.resumed", parked_s=round(parked_s, 3))

    def _end_parking(self) -> float:
        if self._parked_since is None:
            return 0.0
        parked_s = self._clock.now() - self._parked_since
        self._parked_since = None
        self._parked_s += parked_s
        return parked_s

    # Tasks

    def _start(self) -> None:
        self._is_started = True
        self._spawn(self._deadlines.run(), "teacher.deadlines")
        if self._hedges is not None:
            self._spawn(self._hedges.run(), "teacher.hedges")
        for replica in self._replicas:
            self._start_probing(replica)

    def _spawn(self, work: Coroutine[Any, Any, ResultT], name: str) -> asyncio.Task[ResultT]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """A task of ours that fails is a bug; without it scores would wait for ever, so they end with it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._crash is None:
            self._crash = error
            for scope in self._open:
                scope.interrupt(_CLOSED)

    def _require_open(self) -> None:
        if self._is_closed or self._crash is not None:
            raise self._why_ended() from self._crash

    def _why_ended(self) -> Exception:
        if self._crash is not None:
            return RuntimeError(f"the teacher pool's own task failed: {self._crash!r}")
        return TeacherUnavailable("the teacher pool is closed; it gives no more scores")


class _Race:
    """One attempt that may be made at two replicas."""

    __slots__ = ("ask", "first", "scope", "second")

    def __init__(self, first: Replica, ask: dict[str, Any]) -> None:
        self.first = first
        self.ask = ask
        self.scope = Scope()
        """Of the request to ``first``."""
        self.second: asyncio.Task[Scores | TeacherUnavailable | TeacherRefused] | None = None


def connect(config: HttpTeacher, *, clock: Clock | None = None, rng: random.Random | None = None) -> ReplicaPool:
    """The replicas that a recipe names, as one teacher. Opens no connection yet.

    Raises:
        RecipeError: the token file cannot be used, or a URL is none or there twice.
    """
    if len(set(config.urls)) < len(config.urls):
        twice = next(url for n, url in enumerate(config.urls) if url in config.urls[:n])
        raise RecipeError(
            f"teacher.urls names {twice!r} twice; a replica counts once, raise teacher.max_in_flight instead"
        )
    # The client's own time-out is there for those who use it alone; here the pool's deadline comes first.
    timeout_s = config.deadline_s + PROBE_DEADLINE_S
    try:
        clients = {
            url: TeacherClient(url, token_file=config.token_file, values=config.values, timeout_s=timeout_s)
            for url in config.urls
        }
    except UserError as error:
        # The message names the file or the URL.
        raise RecipeError(f"teacher.token_file or teacher.urls: {error}") from None
    return ReplicaPool(replicas=clients, config=config, clock=clock or SystemClock(), rng=rng or random.Random())


def _is_final(outcome: Scores | TeacherUnavailable | TeacherRefused) -> bool:
    """Whether another replica could not say anything better."""
    if isinstance(outcome, TeacherRefused):
        return outcome.status not in MISCONFIGURED
    return isinstance(outcome, Scores)


def _none_of(errors: Sequence[TeacherUnavailable | TeacherRefused]) -> TeacherUnavailable | TeacherRefused:
    """What to raise when no replica gave an answer."""
    for error in errors:
        if isinstance(error, TeacherRefused):
            return error
    if len(errors) == 1:
        return errors[0]
    return TeacherUnavailable("no teacher replica answers: " + "; ".join(str(error) for error in errors))
