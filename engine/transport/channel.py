"""A bounded first-in-first-out channel between actors of one event loop. Knows nothing of what flows through it.

An item stays in the buffer until a receiver takes it, and enters it only when its sender runs again: who waits is
*granted* a place or an item and woken, nothing is moved on its behalf. So a cancelled call has nothing to undo but its
grant, no item is ever between two places, and the bounds hold at every instant.

    len(items) + granted_items <= max_items
    weight + granted_weight    <= max_weight, or the one item in the channel is heavier than that
    promised                   <= len(items)          (items granted to receivers that were woken and have not run yet)
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Final, Generic, TypeVar

import msgspec

from engine.clock import Clock, SystemClock
from engine.errors import BrokenChannel, ClosedChannel, EndOfChannel, WouldBlock

T = TypeVar("T")


class ChannelStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a channel. The two waiting times are the bottleneck report: receivers that wait starve, senders that
    wait are held back by what comes after them."""

    name: str
    items: int
    """Unread."""
    weight: float
    """Of the unread items; 0 when the channel does not weigh."""
    max_items: int
    max_weight: float | None
    sent_total: int
    received_total: int
    peak_items: int
    waiting_senders: int
    """Calls that have not been granted a place yet."""
    waiting_receivers: int
    """Calls that have not been granted an item yet."""
    open_senders: int
    open_receivers: int
    send_wait_s: float
    """Summed over all ``send`` calls, with the waits in progress."""
    receive_wait_s: float
    """Summed over all ``receive`` calls, with the waits in progress."""


def open_channel(
    name: str,
    *,
    max_items: int,
    max_weight: float | None = None,
    weigh: Callable[[T], float] | None = None,
    clock: Clock | None = None,
) -> tuple[Sender[T], Receiver[T]]:
    """Make a channel and hand out its two ends.

    Args:
        max_items: unread items that it holds.
        max_weight: summed weight of the unread items, in the unit of ``weigh`` (tokens, bytes). An item heavier than
            this is not refused: it passes alone, when the channel is empty, so no item can stop the flow for good.
        weigh: weight of one item, 0 or more; called once per ``send``. Given together with ``max_weight``.
        clock: measures the waiting times; the machine's monotonic clock unless told otherwise.

    Raises:
        ValueError: a bound below its minimum, or only one of ``max_weight`` and ``weigh``.
    """
    if max_items < 1:
        raise ValueError(f"channel {name!r}: max_items must be >= 1, got {max_items}")
    if (max_weight is None) != (weigh is None):
        given = "max_weight" if weigh is None else "weigh"
        raise ValueError(f"channel {name!r}: only {given} was given; give max_weight and weigh together, or neither")
    if max_weight is not None and not max_weight > 0:
        raise ValueError(f"channel {name!r}: max_weight must be > 0, got {max_weight}")
    core: _Core[T] = _Core(name, max_items, max_weight, weigh, clock or SystemClock())
    return Sender(core), Receiver(core)


class _WaitMeter:
    """Seconds spent waiting by any number of calls, those still waiting included."""

    __slots__ = ("_clock", "_ended_s", "_num", "_sum_started")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended_s = 0.0
        self._num = 0
        self._sum_started = 0.0

    def begin(self) -> float:
        started = self._clock.now()
        self._num += 1
        self._sum_started += started
        return started

    def end(self, started: float) -> None:
        self._ended_s += self._clock.now() - started
        self._num -= 1
        # Back to an exact zero whenever nobody waits: otherwise rounding would add up over millions of waits.
        self._sum_started = self._sum_started - started if self._num else 0.0

    def total_s(self) -> float:
        return self._ended_s + (self._num * self._clock.now() - self._sum_started if self._num else 0.0)


class _Waiter:
    """One call that waits. ``granted`` ends True (take your place or item) or False (look why not)."""

    __slots__ = ("end", "granted", "weight")

    def __init__(self, end: object, weight: float = 0.0) -> None:
        self.end = end
        self.weight = weight
        self.granted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()


class _Core(Generic[T]):
    """What the ends share. All methods are synchronous and leave these true:

    * a waiting receiver means that every item in the buffer is promised to another one;
    * a waiting sender means that the first in line does not fit, or that a granted one is about to run;
    * ``free_until`` is ``max_items`` when nobody is before the next send, and 0 when it must look twice.
    """

    __slots__ = (
        "discarded",
        "free_until",
        "granted_items",
        "granted_weight",
        "items",
        "max_items",
        "max_weight",
        "name",
        "open_receivers",
        "open_senders",
        "peak_items",
        "promised",
        "receive_wait",
        "received",
        "receivers",
        "send_wait",
        "senders",
        "weigh",
        "weight",
        "weights",
    )

    def __init__(
        self, name: str, max_items: int, max_weight: float | None, weigh: Callable[[T], float] | None, clock: Clock
    ) -> None:
        self.name: Final = name
        self.max_items: Final = max_items
        self.max_weight: Final = math.inf if max_weight is None else max_weight
        self.weigh: Final = weigh
        self.items: Final[deque[T]] = deque()
        self.weights: Final[deque[float]] = deque()
        """Parallel to ``items`` when the channel weighs, else empty."""
        self.weight = 0.0
        self.granted_items = 0
        self.granted_weight = 0.0
        self.promised = 0
        self.free_until = max_items
        self.senders: Final[deque[_Waiter]] = deque()
        self.receivers: Final[deque[_Waiter]] = deque()
        self.open_senders = 0
        self.open_receivers = 0
        self.received = 0
        self.discarded = 0
        self.peak_items = 0
        self.send_wait: Final = _WaitMeter(clock)
        self.receive_wait: Final = _WaitMeter(clock)

    def check_weight(self, weight: float) -> None:
        if not weight >= 0:
            raise ValueError(f"channel {self.name!r}: weigh gave {weight}; a weight must be >= 0")

    def fits(self, weight: float) -> bool:
        num_items = len(self.items) + self.granted_items
        if num_items == 0:
            return True  # also what is heavier than max_weight: it passes alone
        if num_items >= self.max_items:
            return False
        return self.weight + self.granted_weight + weight <= self.max_weight

    def put_if_free(self, item: T, weight: float) -> bool:
        """Append unless there is no room or someone came earlier: a granted sender has not appended its item yet."""
        if self.senders or self.granted_items or not self.fits(weight):
            return False
        self.append(item, weight)
        return True

    def append(self, item: T, weight: float) -> None:
        self.items.append(item)
        if self.weigh is not None:
            self.weights.append(weight)
            self.weight += weight
        if self.receivers:
            self.wake_receivers()

    def take(self) -> T:
        num_items = len(self.items)
        if num_items > self.peak_items:  # the buffer only shrinks here, so this look sees every peak
            self.peak_items = num_items
        self.received += 1
        item = self.items.popleft()
        if self.weigh is not None:
            weight = self.weights.popleft()
            # An exact zero when empty, so that fractions cannot pile up into weight that nobody holds.
            self.weight = self.weight - weight if self.items else 0.0
        if self.senders:
            self.wake_senders()
        if not self.items and self.receivers:
            self.wake_receivers()  # the last item of a closed channel was taken: the others learn of the end
        return item

    def wake_senders(self) -> None:
        """Grant places to the senders in front while they fit, in their order."""
        while self.senders:
            waiter = self.senders[0]
            if waiter.granted.done():  # cancelled, and its task has not run yet
                self.senders.popleft()
                continue
            if not self.fits(waiter.weight):
                break
            self.senders.popleft()
            self.granted_items += 1
            self.granted_weight += waiter.weight
            waiter.granted.set_result(True)
        self.look_again()

    def wake_receivers(self) -> None:
        """Promise unread items to the receivers in front; tell all of them when there will be no more."""
        while self.receivers:
            is_end = not self.items and self.open_senders == 0
            if len(self.items) <= self.promised and not is_end:
                break
            waiter = self.receivers.popleft()
            if waiter.granted.done():
                continue
            if not is_end:
                self.promised += 1
            waiter.granted.set_result(not is_end)

    def return_place(self, weight: float) -> None:
        """A granted sender has come, or will never come, for its place."""
        self.granted_items -= 1
        self.granted_weight = self.granted_weight - weight if self.granted_items else 0.0

    def look_again(self) -> None:
        is_free = not (self.senders or self.granted_items) and self.open_receivers > 0
        self.free_until = self.max_items if is_free else 0

    def statistics(self) -> ChannelStatistics:
        num_items = len(self.items)
        return ChannelStatistics(
            name=self.name,
            items=num_items,
            weight=self.weight,
            max_items=self.max_items,
            max_weight=None if self.weigh is None else self.max_weight,
            sent_total=self.received + self.discarded + num_items,
            received_total=self.received,
            peak_items=max(self.peak_items, num_items),
            waiting_senders=_num_live(self.senders),
            waiting_receivers=_num_live(self.receivers),
            open_senders=self.open_senders,
            open_receivers=self.open_receivers,
            send_wait_s=self.send_wait.total_s(),
            receive_wait_s=self.receive_wait.total_s(),
        )


def _num_live(waiters: deque[_Waiter]) -> int:
    return sum(not waiter.granted.done() for waiter in waiters)


def _dismiss(waiters: deque[_Waiter], end: object | None) -> None:
    """Wake the waiters of one end (of all ends with None) to be told why not."""
    dismissed = [waiter for waiter in waiters if end is None or waiter.end is end]
    for waiter in dismissed:
        waiters.remove(waiter)
        if not waiter.granted.done():
            waiter.granted.set_result(False)


class Sender(Generic[T]):
    """The end that items go in at. Ends are cheap: give every producer its own ``clone()`` and let it close that."""

    __slots__ = ("_core", "_is_closed")

    def __init__(self, core: _Core[T]) -> None:
        self._core = core
        self._is_closed = False
        core.open_senders += 1

    @property
    def name(self) -> str:
        return self._core.name

    async def send(self, item: T) -> None:
        """Append one item, after those of every ``send`` that was called earlier; wait while it does not fit.

        Does not yield to the loop when it need not wait. Cancelling it leaves the item out: a call that was cancelled
        has sent nothing.

        Raises:
            ClosedChannel: ``close()`` was called on this end, perhaps while this call waited.
            BrokenChannel: every receiver closed, so nobody will read it.
        """
        core = self._core
        items = core.items
        # The way of nearly every call, written out: a function call more would cost a quarter of the hop.
        if len(items) < core.free_until and not self._is_closed:
            weigh = core.weigh
            if weigh is None:
                items.append(item)
                if core.receivers:
                    core.wake_receivers()
                return
            weight = weigh(item)
            # 0.0, not 0: two floats are compared faster than a float and an int.
            if weight >= 0.0 and (total := core.weight + weight) <= core.max_weight:
                items.append(item)
                core.weights.append(weight)
                core.weight = total
                if core.receivers:
                    core.wake_receivers()
                return
        else:
            self._check_open()
            weight = 0.0 if core.weigh is None else core.weigh(item)
        core.check_weight(weight)
        if not core.put_if_free(item, weight):
            await self._wait_for_place(weight)
            core.append(item, weight)
            core.wake_senders()

    def try_send(self, item: T) -> None:
        """Append one item now.

        Raises:
            WouldBlock: it does not fit, or others wait before it.
            ClosedChannel: ``close()`` was called on this end.
            BrokenChannel: every receiver closed.
        """
        self._check_open()
        core = self._core
        weight = 0.0 if core.weigh is None else core.weigh(item)
        core.check_weight(weight)
        if not core.put_if_free(item, weight):
            raise WouldBlock(f"channel {self.name!r}: no room for this item now")

    def clone(self) -> Sender[T]:
        """Another end of the same channel, to be closed on its own.

        Raises:
            ClosedChannel: this end is closed.
        """
        if self._is_closed:
            raise ClosedChannel(f"channel {self.name!r}: this end was closed by its owner")
        return Sender(self._core)

    def close(self) -> None:
        """Nothing more comes from this end; when the last one closes, receivers meet the end after what was sent.

        Idempotent. A ``send`` that waits on this end raises ClosedChannel.
        """
        if self._is_closed:
            return
        self._is_closed = True
        core = self._core
        core.open_senders -= 1
        _dismiss(core.senders, self)  # as they leave they wake those behind them, who may be lighter
        core.wake_receivers()

    def statistics(self) -> ChannelStatistics:
        return self._core.statistics()

    async def _wait_for_place(self, weight: float) -> None:
        """Return holding a place that the caller fills before it awaits anything."""
        core = self._core
        waiter = _Waiter(self, weight)
        core.senders.append(waiter)
        # Not woken here even if there is room, because a granted future does not suspend, and this item would overtake
        # those of granted senders that have not run yet. The last of them wakes this one.
        core.look_again()
        started = core.send_wait.begin()
        is_granted = False
        try:
            is_granted = await waiter.granted
            self._check_open()
        except BaseException:
            if is_granted or _is_granted(waiter):
                core.return_place(weight)
            elif waiter in core.senders:
                core.senders.remove(waiter)
            core.wake_senders()
            raise
        finally:
            core.send_wait.end(started)
        core.return_place(weight)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedChannel(f"channel {self.name!r}: this end was closed by its owner")
        if self._core.open_receivers == 0:
            raise BrokenChannel(f"channel {self.name!r}: every receiver is closed, nobody will read what is sent")

    def __enter__(self) -> Sender[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return _describe(self, self._is_closed, self._core)


class Receiver(AsyncIterator[T]):
    """The end that items come out of. Each item goes to one receiver; clones compete for them."""

    __slots__ = ("_core", "_is_closed")

    def __init__(self, core: _Core[T]) -> None:
        self._core = core
        self._is_closed = False
        core.open_receivers += 1

    @property
    def name(self) -> str:
        return self._core.name

    async def receive(self) -> T:
        """Take the oldest item; wait while there is none. What was sent before the senders closed is still delivered.

        Does not yield to the loop when it need not wait. Cancelling it leaves the item in: the next receiver gets it,
        in its old place in the order.

        Raises:
            EndOfChannel: every sender closed and the buffer is empty.
            ClosedChannel: ``close()`` was called on this end, perhaps while this call waited.
        """
        core = self._core
        items = core.items
        num_items = len(items)
        # ``take`` written out, for the same reason as in ``send``. Nobody else waits: the item is not promised.
        if num_items > core.promised and not self._is_closed:
            if num_items > core.peak_items:
                core.peak_items = num_items
            core.received += 1
            item = items.popleft()
            if core.weigh is not None:
                weight = core.weights.popleft()
                core.weight = core.weight - weight if num_items > 1 else 0.0
            if core.senders:
                core.wake_senders()
            return item
        self._check_open()
        await self._wait_for_item()
        return core.take()

    def try_receive(self) -> T:
        """Take the oldest item now.

        Raises:
            WouldBlock: there is none, or those there are promised to receivers that came earlier.
            EndOfChannel: every sender closed and the buffer is empty.
            ClosedChannel: ``close()`` was called on this end.
        """
        self._check_open()
        if len(self._core.items) <= self._core.promised:
            raise WouldBlock(f"channel {self.name!r}: nothing to receive now")
        return self._core.take()

    def clone(self) -> Receiver[T]:
        """Another end of the same channel, to be closed on its own.

        Raises:
            ClosedChannel: this end is closed.
        """
        if self._is_closed:
            raise ClosedChannel(f"channel {self.name!r}: this end was closed by its owner")
        return Receiver(self._core)

    def close(self) -> tuple[T, ...]:
        """Read no more from this end. A ``receive`` that waits on it raises ClosedChannel.

        When the last receiver closes, every sender gets BrokenChannel, also those that wait.

        Returns:
            What will never be read, oldest first: the whole buffer for the last receiver, else nothing. Idempotent: the
            second call returns nothing.
        """
        if self._is_closed:
            return ()
        self._is_closed = True
        core = self._core
        core.open_receivers -= 1
        _dismiss(core.receivers, self)
        if core.open_receivers > 0:
            return ()
        unread = tuple(core.items)
        core.peak_items = max(core.peak_items, len(unread))
        core.discarded += len(unread)
        core.items.clear()
        core.weights.clear()
        core.weight = 0.0
        _dismiss(core.senders, None)
        core.look_again()
        return unread

    def statistics(self) -> ChannelStatistics:
        return self._core.statistics()

    async def _wait_for_item(self) -> None:
        """Return with an item promised that the caller takes before it awaits anything."""
        core = self._core
        waiter = _Waiter(self)
        core.receivers.append(waiter)
        started = core.receive_wait.begin()
        is_granted = False
        try:
            is_granted = await waiter.granted
            self._check_open()
        except BaseException:
            if is_granted or _is_granted(waiter):
                core.promised -= 1
                core.wake_receivers()
            elif waiter in core.receivers:
                core.receivers.remove(waiter)
            raise
        finally:
            core.receive_wait.end(started)
        core.promised -= 1

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedChannel(f"channel {self.name!r}: this end was closed by its owner")
        if self._core.open_senders == 0 and not self._core.items:
            raise EndOfChannel(f"channel {self.name!r}: every sender is closed and the buffer is empty")

    async def __anext__(self) -> T:
        """As ``receive``; the end of the channel ends the loop."""
        try:
            return await self.receive()
        except EndOfChannel:
            raise StopAsyncIteration from None

    def __enter__(self) -> Receiver[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return _describe(self, self._is_closed, self._core)


def _is_granted(waiter: _Waiter) -> bool:
    granted = waiter.granted
    return granted.done() and not granted.cancelled() and granted.result()


def _describe(end: object, is_closed: bool, core: _Core[T]) -> str:
    state = "closed" if is_closed else "open"
    return f"<{type(end).__name__} {core.name!r} {state}, {len(core.items)} of {core.max_items} items unread>"
