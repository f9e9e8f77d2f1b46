"""Who gets the next free place at a replica: the one who has waited longest. Knows replicas and their room, not what is
done with a place, and never gives out more places than a replica has."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

from engine.clock import Clock
from teacher.replica import Replica, choose


class Places:
    """Hands out the right to send one request to one replica; ``Replica.in_flight`` counts those handed out.

    First come, first served. Whoever takes a place gives it back by lowering ``in_flight`` and then calling
    ``hand_out``, which must also be called when a replica gains room in any other way.
    """

    def __init__(self, replicas: Sequence[Replica], *, clock: Clock) -> None:
        self._replicas = replicas
        self._clock = clock
        self._waiting: OrderedDict[asyncio.Future[Replica], None] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def try_take(self) -> Replica | None:
        """A place now; None when there is no room, or when others have been waiting for it."""
        if self._waiting:
            return None
        replica = choose(self._replicas, self._clock.now())
        if replica is not None:
            replica.in_flight += 1
        return replica

    def try_take_second(self, first: Replica) -> Replica | None:
        """A place at a healthy replica other than ``first``; None when there is no such room."""
        replica = self._second(first)
        if replica is not None:
            replica.in_flight += 1
        return replica

    def has_second(self, first: Replica) -> bool:
        return self._second(first) is not None

    async def take(self) -> Replica:
        """Wait for a place. Cancelling gives up the turn; a place that was just handed out goes to the next in line.

        Raises:
            whatever ``fail_all`` was given.
        """
        turn: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                turn.result().in_flight -= 1
                self.hand_out()
            raise
        finally:
            self._waiting.pop(turn, None)

    def hand_out(self) -> None:
        """Give the places that are free to those who wait."""
        while self._waiting:
            replica = choose(self._replicas, self._clock.now())
            if replica is None:
                return
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                replica.in_flight += 1
                turn.set_result(replica)

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Send everybody who waits away, each with an error of its own."""
        while self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                turn.set_exception(error())

    def _second(self, first: Replica) -> Replica | None:
        others = (replica for replica in self._replicas if replica is not first and replica.state == "closed")
        return choose(others, self._clock.now())
