"""Which replicas are out, when they are looked at again, and whether there is anyone left to ask.

``teacher.replica`` decides what a happening means for one replica; this module hears of what happened, acts on it
(probes, rests, sends away, parks) and says so in the log. It sends no scores.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from structlog.typing import FilteringBoundLogger

from engine.clock import Clock
from engine.errors import TeacherMismatch, TeacherOverloaded, TeacherRefused, TeacherUnavailable
from engine.recipe import RemoteTeacher
from teacher.places import Places
from teacher.protocol import Teacher, TeacherInfo
from teacher.replica import MISCONFIGURED, Happening, Replica, difference
from teacher.self_test import Disagreement, SelfTest
from teacher.waits import Interrupted, Scope, Tasks

ResultT = TypeVar("ResultT")

PROBE_DEADLINE_S = 10.0
"""A health probe asks for no computation; what takes longer is not healthy."""

MAX_REST_S = 60.0
"""The longest that a replica is left alone on its own word: no overload lasts longer without an operator."""


class ReplicaClient(Teacher, Protocol):
    """One replica (``TeacherClient``): a teacher that can be asked how it is. Nothing it says may come from a cache."""

    async def ready(self) -> bool:
        """Whether it would take a score now; not reached is not ready."""
        ...


class Health:
    """Keeps the state of all replicas.

    One prober per replica that is out:
        waits for:     ``probe_every_s`` (± a quarter), the probe's answer
        unblocked by:  the clock, the replica

    Args:
        tasks: owns the probers.
        num_open: how many scores are wanted now.
    """

    def __init__(
        self,
        *,
        replicas: Sequence[Replica],
        clients: Mapping[str, ReplicaClient],
        places: Places,
        config: RemoteTeacher,
        clock: Clock,
        rng: random.Random,
        tasks: Tasks,
        num_open: Callable[[], int],
        logger: FilteringBoundLogger,
    ) -> None:
        self._replicas = replicas
        self._clients = clients
        self._places = places
        self._config = config
        self._clock = clock
        self._rng = rng
        self._tasks = tasks
        self._num_open = num_open
        self._log = logger
        self.known: TeacherInfo | None = None
        """What the first replica said of itself: what all must be."""
        bound = config.self_test_bound
        self._self_test = None if bound is None else SelfTest(bound=bound)
        self._probing: set[Replica] = set()
        self._resting: set[Replica] = set()
        self._parked_since: float | None = None
        self._parked_s = 0.0

    def start(self) -> None:
        """Look at every replica."""
        for replica in self._replicas:
            self._start_probing(replica)

    # What happened to a request; ``era`` is the replica's of when it was sent

    def answered(self, replica: Replica, era: int) -> None:
        """With scores, or with a refusal of this one request: it works."""
        self._note(replica, era, "answered", "answers")

    def failed(self, replica: Replica, era: int, reason: str) -> None:
        replica.failures_total += 1
        self._note(replica, era, "failed", reason)

    def misconfigured(self, replica: Replica, era: int, refusal: TeacherRefused) -> None:
        """It refuses for reasons of its own."""
        self._note(replica, era, "misconfigured", str(refusal), refusal=refusal)

    def overloaded(self, replica: Replica, era: int, retry_after_s: float) -> None:
        """Leave it alone for as long as it asked for, and a little longer: it asked everybody."""
        rest_s = min(max(0.0, retry_after_s), MAX_REST_S) + self._rng.uniform(0.0, self._config.backoff_s)
        replica.overloaded(self._clock.now(), rest_s=rest_s)
        if replica not in self._resting:
            self._resting.add(replica)
            self._tasks.start(self._wake(replica), f"teacher.rest {replica.name}")
        self._note(replica, era, "answered", "answers")

    # What is left

    def everyone_refuses(self) -> bool:
        """No replica takes requests, and all are out for refusing one: waiting would be for nothing."""
        return all(replica.refusal is not None for replica in self._replicas)

    def refusal(self) -> TeacherRefused:
        """To raise when everyone refuses; a new one for each who raises it."""
        refusal = self._replicas[0].refusal
        assert refusal is not None
        return TeacherRefused(f"every teacher replica refuses: {refusal}", status=refusal.status)

    @property
    def is_parked(self) -> bool:
        return self._parked_since is not None

    @property
    def parked_s(self) -> float:
        """Seconds that all replicas were out while scores were wanted, up to now."""
        return self._parked_s + (0.0 if self._parked_since is None else self._clock.now() - self._parked_since)

    def park_if_all_are_out(self) -> None:
        """Call when a score begins to wait: before that, nobody missed the replicas."""
        if self.is_parked or self._num_open() == 0:
            return
        if not any(replica.state in ("closed", "suspect") for replica in self._replicas):
            self._parked_since = self._clock.now()
            self._log.warning("teacher.parked", num_parked=self._num_open())

    def end_parking(self) -> float:
        """Seconds that it lasted."""
        if self._parked_since is None:
            return 0.0
        parked_s = self._clock.now() - self._parked_since
        self._parked_since = None
        self._parked_s += parked_s
        return parked_s

    async def look_at(self, replica: Replica) -> TeacherInfo | TeacherUnavailable | TeacherRefused | TeacherMismatch:
        """What a replica that is ready says of itself, or why there is no such thing."""

        async def look() -> TeacherInfo:
            client = self._clients[replica.name]
            if not await client.ready():
                raise TeacherUnavailable(f"{replica.name} is not ready")
            return await client.info()

        try:
            return await self._within(min(PROBE_DEADLINE_S, self._config.deadline_s), look())
        except Interrupted:
            return TeacherUnavailable(f"{replica.name} does not answer a health probe")
        except (TeacherUnavailable, TeacherRefused, TeacherMismatch) as error:
            return error

    def _note(
        self, replica: Replica, era: int, happening: Happening, reason: str, *, refusal: TeacherRefused | None = None
    ) -> None:
        if era != replica.era or not replica.note(happening, reason, refusal=refusal):
            return
        state = replica.state
        emit = self._log.warning if state in ("open", "rejected") else self._log.info
        emit("teacher.replica_changed", replica=replica.name, state=state, reason=reason)
        if state == "rejected":
            self._log.warning("teacher.replica_rejected", replica=replica.name, reason=reason)
        if state == "closed":
            if self.is_parked:
                self._log.info("teacher.resumed", parked_s=round(self.end_parking(), 3))
        elif state != "half_open":
            self._start_probing(replica)
            if self.everyone_refuses():
                self._places.fail_all(self.refusal)
            else:
                self.park_if_all_are_out()

    def _start_probing(self, replica: Replica) -> None:
        if replica not in self._probing:
            self._probing.add(replica)
            self._tasks.start(self._probe_until_back(replica), f"teacher.probe {replica.name}")

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
        info = await self.look_at(replica)
        if isinstance(info, TeacherMismatch):
            return "mismatch", str(info)
        if not isinstance(info, TeacherInfo):
            return "probe_failed", str(info)
        if self.known is None:
            self.known = info
        why = difference(self.known, info)
        if why is not None:
            return "mismatch", why
        if self._self_test is None:
            return "probe_ok", "ready"
        return await self._tested(replica, info, self._self_test)

    async def _tested(self, replica: Replica, info: TeacherInfo, self_test: SelfTest) -> tuple[Happening, str]:
        """What a self-test makes of a replica that is ready. It computes, so it has a request's time."""
        deadline_s = self._config.deadline_s

        async def test() -> Disagreement | None:
            while True:
                try:
                    return await self_test.examine(replica.name, self._clients[replica.name], info)
                except TeacherOverloaded as overload:  # by others: it is well
                    rest_s = min(max(0.0, overload.retry_after_s), MAX_REST_S)
                await self._clock.sleep(rest_s + self._rng.uniform(0.0, self._config.backoff_s))

        try:
            disagreement = await self._within(deadline_s, test())
        except Interrupted:
            return "probe_failed", f"{replica.name} does not answer a self-test within {deadline_s:g} s"
        except TeacherRefused as refusal:
            if refusal.status in MISCONFIGURED:
                self.misconfigured(replica, replica.era, refusal)
            return "probe_failed", f"self-test: {refusal}"
        except TeacherUnavailable as error:
            return "probe_failed", f"self-test: {error}"
        if disagreement is None:
            return "probe_ok", "ready"
        is_refused = self._config.on_disagreement == "refuse"
        if replica.state != "rejected":  # else it was said, and is looked at again every second
            self._log.warning(
                "teacher.disagrees",
                replica=disagreement.replica,
                other=disagreement.other,
                difference=round(disagreement.difference, 6),
                bound=disagreement.bound,
                refused=is_refused,
            )
        return ("mismatch", str(disagreement)) if is_refused else ("probe_ok", "ready")

    def _probe_wait_s(self) -> float:
        # Jitter, so that many pools do not probe a replica that comes back in step.
        return self._config.probe_every_s * self._rng.uniform(0.75, 1.25)

    async def _within(self, seconds: float, work: Awaitable[ResultT]) -> ResultT:
        """
        Raises:
            Interrupted: ``work`` took longer, and was cancelled.
        """
        scope = Scope()

        async def ring() -> None:
            await self._clock.sleep(seconds)
            scope.interrupt("deadline")

        alarm = self._tasks.start(ring(), "teacher.probe deadline")
        try:
            with scope:
                return await work
        finally:
            alarm.cancel()

    async def _wake(self, replica: Replica) -> None:
        while (left_s := replica.rest_until - self._clock.now()) > 0:
            await self._clock.sleep(left_s)
        self._resting.discard(replica)
        self._places.hand_out()
