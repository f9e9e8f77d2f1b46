"""Several replicas of one teacher as one ``Teacher`` that does not fail when they do.

A score is tried until a replica answers it: each attempt has a deadline, failed attempts are repeated after a random,
growing wait under the same request id, a slow one is asked a second time elsewhere. A replica that fails is left out
and looked at again later (``teacher.health``); ``teacher.places`` decides whose turn it is. When all are out, scores
wait. What is scored, and what a refusal means for it, is the caller's business.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from structlog.typing import FilteringBoundLogger

from engine.clock import Clock, SystemClock
from engine.errors import (
    Absent,
    RecipeError,
    TeacherMismatch,
    TeacherOverloaded,
    TeacherRefused,
    TeacherUnavailable,
    UserError,
)
from engine.recipe import HttpTeacher, RemoteTeacher, VllmTeacher
from engine.tracing import log
from teacher.client import TeacherClient
from teacher.health import PROBE_DEADLINE_S, Health, ReplicaClient
from teacher.places import Places
from teacher.protocol import Scores, TeacherInfo
from teacher.replica import MISCONFIGURED, Replica, State, backoff_s, difference
from teacher.same_tokens import Known
from teacher.vllm_client import VllmClient
from teacher.waits import Alarms, Interrupted, Scope, Tasks

JSON_BYTES = 72
"""Of one value in the answer of a stock vLLM server, about; a value of our own service takes 4 or 5."""

_DEADLINE, _ANSWERED, _CLOSED = "deadline", "answered by another replica", "closed"


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

    Background tasks (probers, and one keeper each of deadlines and of hedges, which wait for the clock) start with the
    first ``score`` and end with ``close``.

    Args:
        replicas: by name; names appear in the log and break ties. They are closed with the pool.
        config: times and limits; ``urls`` and ``token_file`` are ``connect``'s business.
        rng: jitter only; request ids do not come from it, so that pools with one seed do not share them.
    """

    def __init__(
        self,
        *,
        replicas: Mapping[str, ReplicaClient],
        config: RemoteTeacher,
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
        self._id_prefix = uuid.uuid4().hex
        self._ids = itertools.count()
        self._deadlines = Alarms[Scope](clock, after_s=config.deadline_s, ring=lambda scope: scope.interrupt(_DEADLINE))
        self._hedges: Alarms[_Race] | None = None
        if config.hedge_after_s is not None and len(self._replicas) > 1:
            self._hedges = Alarms(clock, after_s=config.hedge_after_s, ring=self._hedge)
        self._open: set[Scope] = set()
        """One for each score under way."""
        self._all_ended: asyncio.Future[None] | None = None
        self._tasks = Tasks(on_failure=self._end_with)
        self._health = Health(
            replicas=self._replicas,
            clients=self._clients,
            places=self._places,
            config=config,
            clock=clock,
            rng=rng,
            tasks=self._tasks,
            num_open=lambda: len(self._open),
            logger=logger,
        )
        self._is_started = False
        self._is_closed = False
        self._crash: BaseException | None = None
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
        if self._health.known is not None:
            return self._health.known
        found = await asyncio.gather(*(self._health.look_at(replica) for replica in self._replicas))
        failures: list[TeacherUnavailable | TeacherRefused] = []
        known: tuple[str, TeacherInfo] | None = None
        for replica, info in zip(self._replicas, found, strict=True):
            if isinstance(info, TeacherMismatch):
                raise info
            if not isinstance(info, TeacherInfo):
                failures.append(info)
            elif known is None:
                known = replica.name, info
            elif (why := difference(known[1], info)) is not None:
                raise TeacherMismatch(
                    f"teacher replicas {known[0]} and {replica.name} differ: at the second, {why}; "
                    "start all replicas with one model"
                )
        if known is None:
            raise _none_of(failures)
        if self._health.known is None:  # a prober may have been quicker
            self._health.known = known[1]
        return self._health.known

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
        self._health.end_parking()
        for scope in self._open:
            scope.interrupt(_CLOSED)
        if self._open:
            if self._all_ended is None:
                self._all_ended = asyncio.get_running_loop().create_future()
            # Shielded: a second close waits for the same scores.
            await asyncio.shield(self._all_ended)
        await self._tasks.cancel()
        closed = await asyncio.gather(*(client.close() for client in self._clients.values()), return_exceptions=True)
        for error in closed:
            if error is not None:
                raise error

    def statistics(self) -> PoolStatistics:
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
            num_parked=len(self._open) if self._health.is_parked else 0,
            retries_total=self._retries_total,
            hedges_total=self._hedges_total,
            hedge_wins_total=self._hedge_wins_total,
            parked_s=self._health.parked_s,
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
                if refusal.status not in MISCONFIGURED or self._health.everyone_refuses():
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
        if self._health.everyone_refuses():
            raise self._health.refusal()
        self._health.park_if_all_are_out()
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
            self._health.answered(replica, era)
            return scores
        except Interrupted as interrupted:
            replica.took_more_than(self._clock.now() - began)
            if interrupted.reason != _DEADLINE:
                raise
            reason = f"no answer from {replica.name} within {self._config.deadline_s:g} s"
            self._health.failed(replica, era, reason)
            raise TeacherUnavailable(reason) from None
        except TeacherRefused as refusal:
            if refusal.status in MISCONFIGURED:
                self._health.misconfigured(replica, era, refusal)
            else:
                self._health.answered(replica, era)
            raise
        except TeacherOverloaded as overload:
            self._health.overloaded(replica, era, overload.retry_after_s)
            raise
        except TeacherUnavailable as failure:
            self._health.failed(replica, era, str(failure))
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
            race.second = self._tasks.start(self._second(race), "teacher.hedge")

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

    # Tasks

    def _start(self) -> None:
        self._is_started = True
        self._tasks.start(self._deadlines.run(), "teacher.deadlines")
        if self._hedges is not None:
            self._tasks.start(self._hedges.run(), "teacher.hedges")
        self._health.start()

    def _end_with(self, error: BaseException) -> None:
        """A background task failed, which is a bug; without it scores would wait for ever, so they end with it."""
        if self._crash is None:
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


def connect(
    config: RemoteTeacher,
    *,
    known: Known | None = None,
    clock: Clock | None = None,
    rng: random.Random | None = None,
) -> ReplicaPool:
    """The replicas that a recipe names, as one teacher. Opens no connection yet.

    Args:
        known: the vocabulary that stock vLLM servers must have; needed for ``VllmTeacher``.

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
    clients = {url: client_of(config, url, known=known, timeout_s=timeout_s) for url in config.urls}
    if isinstance(config, VllmTeacher):
        log.warning("teacher.sends_json", replicas=len(clients), bytes_per_token=(config.top_k + 1) * JSON_BYTES)
    return ReplicaPool(replicas=clients, config=config, clock=clock or SystemClock(), rng=rng or random.Random())


def client_of(config: RemoteTeacher, url: str, *, known: Known | None, timeout_s: float) -> TeacherClient | VllmClient:
    """One replica of the kind that the recipe names.

    Raises:
        Absent: there is no such token file.
        RecipeError: it cannot be used, or ``url`` is none.
    """
    try:
        if isinstance(config, VllmTeacher):
            assert known is not None, "a stock server has no fingerprint of its own"
            return VllmClient(
                url,
                known=known,
                must_tell=config.model is None,
                served_name=config.served_name,
                token_file=config.token_file,
                timeout_s=timeout_s,
            )
        assert isinstance(config, HttpTeacher)
        return TeacherClient(url, token_file=config.token_file, values=config.values, timeout_s=timeout_s)
    except Absent:
        raise
    except UserError as error:
        # The message names the file or the URL.
        raise RecipeError(f"teacher.token_file or teacher.urls: {error}") from None


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
