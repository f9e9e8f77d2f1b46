"""What one hop through a channel costs, beside the least that asyncio could do, asyncio.Queue and anyio's streams.

    python -m tests.bench.bench_channel [--quick] [--repeats N] [--items N]

Three loads, each on a fresh uvloop: *burst* (one task sends 64 items and then receives them, nobody waits), *stream* (a
producer and a consumer with room for 64 items between them), *round trip* (two tasks and two channels for one item;
every receive waits). The contenders take turns, and a ratio is the median over the turns of two costs of the same turn:
CPU time of the process, so that neighbours on the machine matter little.

The least is a bare deque and events: in *burst* no bound at all, elsewhere a bound and nothing else; no fairness, no
closing, no safety under cancellation, no statistics.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import uvloop

from engine.transport.channel import Receiver, Sender, open_channel
from tests.bench.report import OURS, Report, Row, Target, add_options, finish

LIMIT = 2.0
"""What fairness, closing, cancellation and statistics may cost."""
BURST = 64
ANYIO = "anyio stream"


class Pipe(Protocol):
    async def send(self, item: int) -> None: ...

    async def receive(self) -> int: ...


class UnboundedBare:
    """A deque and one event."""

    def __init__(self) -> None:
        self._items: deque[int] = deque()
        self._is_ready = asyncio.Event()

    async def send(self, item: int) -> None:
        self._items.append(item)
        self._is_ready.set()

    async def receive(self) -> int:
        while not self._items:
            self._is_ready.clear()
            await self._is_ready.wait()
        return self._items.popleft()


class BoundedBare:
    """A deque and two events, the least that also holds the sender back."""

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._items: deque[int] = deque()
        self._is_ready = asyncio.Event()
        self._has_room = asyncio.Event()

    async def send(self, item: int) -> None:
        while len(self._items) >= self._max_items:
            self._has_room.clear()
            await self._has_room.wait()
        self._items.append(item)
        self._is_ready.set()

    async def receive(self) -> int:
        while not self._items:
            self._is_ready.clear()
            await self._is_ready.wait()
        item = self._items.popleft()
        self._has_room.set()
        return item


class Ends:
    """Two ends under one name; the bound methods are the ends' own, so this adds nothing to a call."""

    def __init__(self, send: Callable[[int], Awaitable[None]], receive: Callable[[], Awaitable[int]]) -> None:
        self.send = send
        self.receive = receive


def ours(max_items: int) -> Pipe:
    ends: tuple[Sender[int], Receiver[int]] = open_channel("bench", max_items=max_items)
    sender, receiver = ends
    return Ends(sender.send, receiver.receive)  # type: ignore[return-value]


def ours_weighing(max_items: int) -> Pipe:
    sender, receiver = open_channel("bench", max_items=max_items, max_weight=1e9, weigh=_weigh)
    return Ends(sender.send, receiver.receive)  # type: ignore[return-value]


def _weigh(item: int) -> float:
    return 1.0


def asyncio_queue(max_items: int) -> Pipe:
    queue: asyncio.Queue[int] = asyncio.Queue(max_items)
    return Ends(queue.put, queue.get)  # type: ignore[return-value]


def anyio_stream(max_items: int) -> Pipe:
    import anyio

    sender, receiver = anyio.create_memory_object_stream[int](max_items)
    return Ends(sender.send, receiver.receive)  # type: ignore[return-value]


async def burst(make: Callable[[int], Pipe], num_items: int) -> None:
    pipe = make(BURST)
    send, receive = pipe.send, pipe.receive
    for _ in range(num_items // BURST):
        for i in range(BURST):
            await send(i)
        for _ in range(BURST):
            await receive()


async def stream(make: Callable[[int], Pipe], num_items: int) -> None:
    pipe = make(BURST)

    async def produce() -> None:
        send = pipe.send
        for i in range(num_items):
            await send(i)

    producer = asyncio.create_task(produce())
    receive = pipe.receive
    for _ in range(num_items):
        await receive()
    await producer


async def round_trip(make: Callable[[int], Pipe], num_items: int) -> None:
    there, back = make(1), make(1)

    async def echo() -> None:
        for _ in range(num_items // 2):
            await back.send(await there.receive())

    peer = asyncio.create_task(echo())
    for i in range(num_items // 2):
        await there.send(i)
        await back.receive()
    await peer


class Load(NamedTuple):
    name: str
    run: Callable[[Callable[[int], Pipe], int], Awaitable[None]]
    bare: Callable[[int], Pipe]
    share: float
    """Of the items asked for: a load whose hops cost more gets fewer."""


LOADS = (
    Load("burst", burst, lambda max_items: UnboundedBare(), 1.0),
    Load("stream", stream, BoundedBare, 1.0),
    Load("round trip", round_trip, BoundedBare, 0.1),
)


def rivals() -> dict[str, Callable[[int], Pipe]]:
    found: dict[str, Callable[[int], Pipe]] = {
        OURS: ours,
        "ours, weighing": ours_weighing,
        "asyncio.Queue": asyncio_queue,
    }
    try:
        import anyio  # noqa: F401 (only whether it is there)
    except ModuleNotFoundError:
        return found
    return found | {ANYIO: anyio_stream}


class Cost(NamedTuple):
    hop_us: float
    """CPU microseconds from one send to its receive, median over the turns."""
    ratio: float
    """To the bare one, median over the turns."""


def measure(load: Load, makers: dict[str, Callable[[int], Pipe]], *, num_items: int, repeats: int) -> dict[str, Cost]:
    """Run all makers and the bare one in turns, ``repeats`` times, in a different order each time."""
    num_items = max(int(num_items * load.share) // BURST, 1) * BURST
    contenders = {"bare": load.bare} | makers
    costs_us: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cost_us = _cpu_us(load, contenders[name], num_items)
            if turn > 0:  # the first turn warms up
                costs_us[name].append(cost_us)
    return {
        name: Cost(
            hop_us=statistics.median(costs),
            ratio=statistics.median(cost / bare for cost, bare in zip(costs, costs_us["bare"], strict=True)),
        )
        for name, costs in costs_us.items()
    }


def _cpu_us(load: Load, make: Callable[[int], Pipe], num_items: int) -> float:
    async def timed() -> float:
        gc.disable()  # a collection would charge one rival for the garbage of all
        try:
            started_ns = time.process_time_ns()
            await load.run(make, num_items)
            return (time.process_time_ns() - started_ns) / 1_000 / num_items
        finally:
            gc.enable()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(timed())


def rows_of(load: Load, costs: dict[str, Cost]) -> list[Row]:
    ours = costs[OURS].ratio
    return [
        Row(
            load=load.name,
            contender="deque + event" if name == "bare" else name,
            value=cost.hop_us,
            unit="CPU µs/hop",
            ratio=None if name == OURS else cost.ratio / ours,
        )
        for name, cost in costs.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--items", type=int, default=100_000)
    add_options(parser)
    options = parser.parse_args()
    repeats, num_items = (3, 20_000) if options.quick else (options.repeats, options.items)
    rows: list[Row] = []
    targets: list[Target] = []
    for load in LOADS:
        costs = measure(load, rivals(), num_items=num_items, repeats=repeats)
        rows += rows_of(load, costs)
        targets += [
            Target(
                what=f"{load.name}, {name}, times the bare deque + event",
                found=cost.ratio,
                bound=LIMIT,
                at_most=True,
            )
            for name, cost in costs.items()
            if name.startswith(OURS)
        ]
    is_complete = any(row.contender == ANYIO for row in rows)
    report = Report(
        bench="channel hop",
        rows=tuple(rows),
        targets=tuple(targets),
        failures=() if is_complete else ("anyio is not installed; the extra `bench` has it",),
    )
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
