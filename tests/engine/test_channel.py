"""The contract of a channel: order, bounds, cancellation, closing, and what its statistics say."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable

import hypothesis
import pytest
import uvloop
from hypothesis import strategies as st

from engine.errors import BrokenChannel, ClosedChannel, EndOfChannel, WouldBlock
from engine.transport.channel import Receiver, Sender, open_channel
from tests.bench.bench_channel import LIMIT, LOADS, Load, measure, ours, ours_weighing
from tests.support.clock import ManualClock, Settle

Ends = tuple[Sender[int], Receiver[int]]


def make_channel(*, max_items: int = 1, clock: ManualClock | None = None) -> Ends:
    return open_channel("test", max_items=max_items, clock=clock)


def make_weighing_channel(*, max_items: int = 100, max_weight: float = 10) -> Ends:
    """Items weigh what they are."""
    return open_channel("test", max_items=max_items, max_weight=max_weight, weigh=float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_items": 0}, r"^channel 'test': max_items must be >= 1, got 0$"),
        ({"max_items": 1, "max_weight": 0, "weigh": float}, r"^channel 'test': max_weight must be > 0, got 0$"),
        ({"max_items": 1, "max_weight": 5}, r"^channel 'test': only max_weight was given; give .* together"),
        ({"max_items": 1, "weigh": float}, r"^channel 'test': only weigh was given; give .* together"),
    ],
)
def test_bounds_that_make_no_sense_are_refused_with_the_channel_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_channel("test", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
async def test_a_weight_below_zero_is_refused_and_the_item_stays_out(weight: float) -> None:
    sender, receiver = make_weighing_channel()

    with pytest.raises(ValueError, match=r"weigh gave .*; a weight must be >= 0"):
        await sender.send(weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weigh gave"):
        sender.try_send(weight)  # type: ignore[arg-type]
    with pytest.raises(WouldBlock):
        receiver.try_receive()


async def test_items_come_out_in_the_order_they_went_in() -> None:
    sender, receiver = make_channel(max_items=100)
    for i in range(100):
        await sender.send(i)
    sender.close()

    assert [item async for item in receiver] == list(range(100))


async def test_send_waits_while_full_and_resumes_after_a_receive(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=1)
    await sender.send(1)
    blocked = asyncio.create_task(sender.send(2))
    await settle()
    assert sender.statistics().waiting_senders == 1

    assert await receiver.receive() == 1
    await blocked
    assert await receiver.receive() == 2


async def test_waiting_senders_are_served_in_their_order_and_nobody_overtakes_them(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=1)
    await sender.send(0)
    blocked = [asyncio.create_task(sender.send(i)) for i in (1, 2, 3)]
    await settle()

    got = [receiver.try_receive()]
    with pytest.raises(WouldBlock):
        sender.try_send(99)  # there is room, but it is granted to the first that waits
    blocked.append(asyncio.create_task(sender.send(4)))
    got += [await receiver.receive() for _ in range(4)]

    assert got == [0, 1, 2, 3, 4]
    await asyncio.gather(*blocked)


async def test_room_beyond_what_is_granted_does_not_let_a_newcomer_overtake(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=2)
    sender.try_send(0)
    sender.try_send(1)
    blocked = asyncio.create_task(sender.send(2))
    await settle()

    got = [receiver.try_receive(), receiver.try_receive()]
    with pytest.raises(WouldBlock):
        sender.try_send(99)  # two places are free, and one was granted
    await sender.send(3)
    got += [receiver.try_receive(), receiver.try_receive()]

    assert got == [0, 1, 2, 3]
    await blocked


async def test_waiting_receivers_are_served_in_their_order_and_nobody_overtakes_them(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=2)
    waiting = [asyncio.create_task(receiver.receive()) for _ in range(2)]
    await settle()

    sender.try_send(1)
    with pytest.raises(WouldBlock):
        receiver.try_receive()  # it is promised to the first that waits
    sender.try_send(2)

    assert await asyncio.gather(*waiting) == [1, 2]


async def test_a_cancelled_send_leaves_the_item_out(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=1)
    await sender.send(1)
    loser = asyncio.create_task(sender.send(2))
    await settle()
    loser.cancel()
    await settle()

    assert receiver.try_receive() == 1
    await sender.send(3)
    assert receiver.try_receive() == 3


async def test_a_send_cancelled_after_it_was_granted_its_place_leaves_the_item_out(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=1)
    await sender.send(1)
    loser = asyncio.create_task(sender.send(2))
    next_one = asyncio.create_task(sender.send(3))
    await settle()
    assert receiver.try_receive() == 1  # grants the place to the loser, which has not run since
    loser.cancel()
    await next_one

    assert loser.cancelled()
    assert receiver.try_receive() == 3


async def test_a_cancelled_receive_leaves_the_item_for_the_next_one(settle: Settle) -> None:
    sender, receiver = make_channel()
    loser = asyncio.create_task(receiver.receive())
    await settle()
    loser.cancel()
    await sender.send(7)

    assert await receiver.receive() == 7
    await settle()
    assert loser.cancelled()


async def test_a_receive_cancelled_after_it_was_promised_the_item_gives_it_to_the_next_in_line(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=3)
    loser = asyncio.create_task(receiver.receive())
    heir = asyncio.create_task(receiver.receive())
    await settle()
    sender.try_send(7)  # promised to the loser, which has not run since
    loser.cancel()
    await settle()
    sender.try_send(8)

    assert loser.cancelled()
    assert await heir == 7
    assert receiver.try_receive() == 8


async def test_a_receive_cancelled_after_it_was_promised_the_item_leaves_it_in_front(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=2)
    loser = asyncio.create_task(receiver.receive())
    await settle()
    sender.try_send(7)
    sender.try_send(8)
    loser.cancel()
    await settle()

    assert [receiver.try_receive(), receiver.try_receive()] == [7, 8]
    assert sender.statistics().peak_items == 2  # nothing was put back into a full buffer


async def test_a_timeout_around_receive_loses_nothing(settle: Settle) -> None:
    sender, receiver = make_channel()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await receiver.receive()
    await sender.send(1)

    assert await receiver.receive() == 1


async def test_weight_holds_senders_back_before_the_number_of_items_does(settle: Settle) -> None:
    sender, receiver = make_weighing_channel(max_weight=10)
    await sender.send(6)
    blocked = asyncio.create_task(sender.send(5))
    light = asyncio.create_task(sender.send(1))  # would fit, but waits its turn
    await settle()
    assert sender.statistics().waiting_senders == 2

    assert await receiver.receive() == 6
    await asyncio.gather(blocked, light)
    assert sender.statistics().weight == 6
    assert [await receiver.receive(), await receiver.receive()] == [5, 1]
    assert sender.statistics().weight == 0


async def test_an_item_heavier_than_the_bound_passes_alone(settle: Settle) -> None:
    sender, receiver = make_weighing_channel(max_weight=10)
    await sender.send(1)
    giant = asyncio.create_task(sender.send(50))
    behind = asyncio.create_task(sender.send(2))
    await settle()
    assert not giant.done()

    assert await receiver.receive() == 1
    await giant
    await settle()
    assert (receiver.statistics().items, behind.done()) == (1, False)
    assert [await receiver.receive(), await receiver.receive()] == [50, 2]
    await behind


async def test_a_lighter_sender_goes_on_when_the_heavy_one_before_it_gives_up(settle: Settle) -> None:
    sender, receiver = make_weighing_channel(max_weight=10)
    await sender.send(6)
    heavy = asyncio.create_task(sender.send(9))
    light = asyncio.create_task(sender.send(1))
    await settle()
    heavy.cancel()

    await light
    assert [receiver.try_receive(), receiver.try_receive()] == [6, 1]


async def test_a_lighter_sender_goes_on_when_the_heavy_one_before_it_is_closed(settle: Settle) -> None:
    sender, receiver = make_weighing_channel(max_weight=10)
    other = sender.clone()
    await sender.send(6)
    heavy = asyncio.create_task(sender.send(9))
    light = asyncio.create_task(other.send(1))
    await settle()
    sender.close()

    await light
    assert isinstance(heavy.exception(), ClosedChannel)
    assert [receiver.try_receive(), receiver.try_receive()] == [6, 1]


async def test_what_was_sent_before_closing_is_delivered_and_then_the_end(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=2)
    await sender.send(1)
    await sender.send(2)
    sender.close()
    sender.close()

    assert [await receiver.receive(), await receiver.receive()] == [1, 2]
    with pytest.raises(EndOfChannel):
        await receiver.receive()
    with pytest.raises(EndOfChannel):
        receiver.try_receive()


async def test_the_end_comes_when_the_last_clone_closes(settle: Settle) -> None:
    sender, receiver = make_channel()
    other = sender.clone()
    waiting = [asyncio.create_task(receiver.receive()) for _ in range(2)]
    await settle()
    sender.close()
    await settle()
    assert not any(task.done() for task in waiting)

    other.close()
    await settle()
    assert [type(task.exception()) for task in waiting] == [EndOfChannel, EndOfChannel]


async def test_a_receiver_behind_the_last_item_learns_of_the_end(settle: Settle) -> None:
    sender, receiver = make_channel()
    first, second = (asyncio.create_task(receiver.receive()) for _ in range(2))
    await settle()
    sender.try_send(1)
    sender.close()
    await settle()

    assert first.result() == 1
    assert isinstance(second.exception(), EndOfChannel)


async def test_a_closed_sender_refuses_and_ends_its_own_waiting_sends_alone(settle: Settle) -> None:
    sender, receiver = make_channel()
    other = sender.clone()
    await sender.send(1)
    mine = asyncio.create_task(sender.send(2))
    others = asyncio.create_task(other.send(3))
    await settle()
    sender.close()
    await settle()

    assert isinstance(mine.exception(), ClosedChannel)
    for call in (lambda: sender.try_send(4), sender.clone):
        with pytest.raises(ClosedChannel, match=r"^channel 'test': this end was closed by its owner$"):
            call()
    with pytest.raises(ClosedChannel):
        await sender.send(4)
    assert [await receiver.receive(), await receiver.receive()] == [1, 3]
    await others


async def test_a_send_granted_a_place_and_then_closed_has_sent_nothing(settle: Settle) -> None:
    sender, receiver = make_channel()
    await sender.send(1)
    granted = asyncio.create_task(sender.send(2))
    await settle()
    assert receiver.try_receive() == 1
    sender.close()
    await settle()

    assert isinstance(granted.exception(), ClosedChannel)
    with pytest.raises(EndOfChannel):
        receiver.try_receive()


async def test_when_the_last_receiver_closes_senders_learn_that_nobody_will_read(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=2)
    await sender.send(1)
    await sender.send(2)
    blocked = asyncio.create_task(sender.send(3))
    await settle()

    assert receiver.close() == (1, 2)
    assert receiver.close() == ()
    await settle()
    assert isinstance(blocked.exception(), BrokenChannel)
    for call in (sender.send(4), sender.clone().send(4)):
        with pytest.raises(BrokenChannel, match="nobody will read"):
            await call
    with pytest.raises(BrokenChannel):
        sender.try_send(4)
    with pytest.raises(ClosedChannel):
        await receiver.receive()
    seen = sender.statistics()
    assert (seen.items, seen.sent_total, seen.received_total, seen.peak_items, seen.weight) == (0, 2, 0, 2, 0)


async def test_a_receiver_that_closes_leaves_the_items_to_the_others(settle: Settle) -> None:
    sender, receiver = make_channel(max_items=2)
    other = receiver.clone()
    mine = asyncio.create_task(receiver.receive())
    others = asyncio.create_task(other.receive())
    await settle()
    sender.try_send(1)  # promised to the first
    assert receiver.close() == ()

    assert await others == 1
    assert isinstance(mine.exception(), ClosedChannel)
    with pytest.raises(ClosedChannel):
        receiver.clone()
    with pytest.raises(ClosedChannel):
        receiver.try_receive()
    await sender.send(2)
    assert await other.receive() == 2


async def test_leaving_the_with_block_closes_the_end() -> None:
    sender, receiver = make_channel(max_items=3)
    with receiver, sender:
        await sender.send(1)

    assert (sender.statistics().open_senders, sender.statistics().open_receivers) == (0, 0)
    assert repr(sender) == "<Sender 'test' closed, 0 of 3 items unread>"


async def test_calls_that_need_not_wait_make_no_future(monkeypatch: pytest.MonkeyPatch) -> None:
    channels = [make_channel(max_items=2), make_weighing_channel(max_items=2)]

    def refuse() -> None:
        raise AssertionError("a loop was asked for, so a future was about to be made")

    monkeypatch.setattr("engine.transport.channel.asyncio.get_running_loop", refuse)
    for sender, receiver in channels:
        for _ in range(3):
            await sender.send(1)
            await sender.send(2)
            assert [await receiver.receive(), await receiver.receive()] == [1, 2]


async def test_statistics_tell_who_waits_for_whom_and_how_long(settle: Settle, clock: ManualClock) -> None:
    sender, receiver = make_channel(max_items=1, clock=clock)
    starved = asyncio.create_task(receiver.receive())
    await clock.advance(3)
    assert receiver.statistics().receive_wait_s == 3  # in progress
    await sender.send(1)
    await starved
    await sender.send(2)
    held_back = asyncio.create_task(sender.send(3))
    also = asyncio.create_task(sender.send(4))
    await clock.advance(5)
    assert sender.statistics().send_wait_s == 10
    assert receiver.try_receive() == 2
    await held_back
    await clock.advance(1)

    seen = sender.statistics()
    assert seen == receiver.statistics()
    assert (seen.send_wait_s, seen.receive_wait_s) == (11, 3)
    assert (seen.name, seen.items, seen.max_items, seen.max_weight, seen.peak_items) == ("test", 1, 1, None, 1)
    assert (seen.sent_total, seen.received_total) == (3, 2)
    assert (seen.waiting_senders, seen.waiting_receivers, seen.open_senders, seen.open_receivers) == (1, 0, 1, 1)
    also.cancel()
    await settle()
    assert (sender.statistics().waiting_senders, sender.statistics().send_wait_s) == (0, 11)


def num_waiters() -> int:
    """Of all channels that anybody still holds."""
    gc.collect()
    return sum(type(thing).__name__ == "_Waiter" for thing in gc.get_objects())


async def test_a_thousand_cancelled_receives_leave_no_trace(settle: Settle) -> None:
    sender, receiver = make_channel()
    before = num_waiters()
    losers = [asyncio.create_task(receiver.receive()) for _ in range(1_000)]
    await settle()
    while losers:
        losers.pop().cancel()
    await settle()

    assert sender.statistics().waiting_receivers == 0
    assert num_waiters() == before
    await sender.send(1)
    assert receiver.try_receive() == 1


# --- random histories -----------------------------------------------------------------------------------------------

OPERATIONS = (
    *("send", "send", "receive", "receive", "send_now", "receive_now", "try_send", "try_receive", "fill", "empty"),
    *("cancel_send", "cancel_receive", "turn", "turn", "settle"),
    *("clone_sender", "clone_receiver", "close_sender", "close_receiver"),
)
Operation = tuple[str, int]


class History:
    """Runs operations against one channel and notes what every call came to."""

    def __init__(self, *, max_items: int, max_weight: float | None, weights: list[int]) -> None:
        self._weights = weights
        weigh = None if max_weight is None else self.weight_of
        sender, receiver = open_channel("random", max_items=max_items, max_weight=max_weight, weigh=weigh)
        self.max_items, self.max_weight = max_items, max_weight
        self.senders: list[Sender[int]] = [sender]
        self.receivers: list[Receiver[int]] = [receiver]
        self.sends: list[asyncio.Task[None]] = []
        self.receives: list[asyncio.Task[None]] = []
        self.num_calls = 0
        self.sent: list[int] = []
        self.refused: list[int] = []
        self.received: list[int] = []
        self.unread: list[int] = []

    def weight_of(self, item: int) -> float:
        return self._weights[item % len(self._weights)]

    def new_item(self) -> int:
        """Items are numbered in the order of the calls to send."""
        self.num_calls += 1
        return self.num_calls

    async def send(self, sender: Sender[int]) -> None:
        item = self.new_item()
        try:
            await sender.send(item)
        except (asyncio.CancelledError, ClosedChannel, BrokenChannel):
            self.refused.append(item)
        else:
            self.sent.append(item)

    async def receive(self, receiver: Receiver[int]) -> None:
        try:
            self.received.append(await receiver.receive())
        except (asyncio.CancelledError, ClosedChannel, EndOfChannel):
            return

    async def apply(self, operation: str, pick: int) -> None:
        sender = self.senders[pick % len(self.senders)]
        receiver = self.receivers[pick % len(self.receivers)]
        match operation:
            case "send":
                self.sends.append(asyncio.create_task(self.send(sender)))
            case "receive":
                self.receives.append(asyncio.create_task(self.receive(receiver)))
            case "try_send":
                self.try_send(sender)
            case "try_receive":
                self.try_receive(receiver)
            case "send_now":
                self.send_now(sender)
            case "receive_now":
                self.receive_now(receiver)
            case "fill":
                for _ in range(self.max_items):
                    self.try_send(sender)
            case "empty":
                for _ in range(self.max_items):
                    self.try_receive(receiver)
            case "cancel_send" if self.sends:
                self.sends[pick % len(self.sends)].cancel()
            case "cancel_receive" if self.receives:
                self.receives[pick % len(self.receives)].cancel()
            case "clone_sender" if not repr(sender).count("closed"):
                self.senders.append(sender.clone())
            case "clone_receiver" if not repr(receiver).count("closed"):
                self.receivers.append(receiver.clone())
            case "close_sender":
                sender.close()
            case "close_receiver":
                self.unread += receiver.close()
            case "turn":
                await asyncio.sleep(0)
            case "settle":
                await self.settle()

    def send_now(self, sender: Sender[int]) -> None:
        """One step of ``send`` ahead of all tasks; a call that waits is thrown away where it stands."""
        call = self.send(sender)
        with contextlib.suppress(StopIteration):
            call.send(None)
            call.close()
            self.refused.append(self.num_calls)

    def receive_now(self, receiver: Receiver[int]) -> None:
        call = self.receive(receiver)
        with contextlib.suppress(StopIteration):
            call.send(None)
            call.close()

    def try_send(self, sender: Sender[int]) -> None:
        item = self.new_item()
        try:
            sender.try_send(item)
        except (WouldBlock, ClosedChannel, BrokenChannel):
            self.refused.append(item)
        else:
            self.sent.append(item)

    def try_receive(self, receiver: Receiver[int]) -> None:
        try:
            self.received.append(receiver.try_receive())
        except (WouldBlock, ClosedChannel, EndOfChannel):
            return

    async def settle(self) -> None:
        for _ in range(8):
            await asyncio.sleep(0)
            self.check_bounds()

    def check_bounds(self) -> None:
        seen = self.senders[0].statistics()
        assert 0 <= seen.items <= seen.peak_items <= self.max_items
        if self.max_weight is not None:
            assert seen.weight <= self.max_weight or seen.items == 1

    def check_liveness(self) -> None:
        """Nobody waits for what is there. Holds when every task has had its turns."""
        seen = self.senders[0].statistics()
        if seen.waiting_receivers:
            assert seen.items == 0
            assert seen.open_senders > 0
        if seen.waiting_senders:
            assert seen.items == self.max_items or (self.max_weight is not None and seen.items > 0)
            assert seen.open_receivers > 0

    async def finish(self) -> None:
        """Let everything come to its end: read what is there, then close."""
        await self.settle()
        self.check_liveness()
        for receiver in self.receivers:
            for _ in range(len(self.sends) + self.max_items):
                self.try_receive(receiver)
                await self.settle()
        for sender in self.senders:
            sender.close()
        for receiver in self.receivers:
            self.unread += receiver.close()
        await asyncio.wait_for(asyncio.gather(*self.sends, *self.receives, return_exceptions=True), timeout=5)

    def check_account(self) -> None:
        assert sorted(self.received + self.unread) == sorted(self.sent), "nothing lost, nothing twice"
        assert not set(self.sent) & set(self.refused)
        assert self.received == sorted(self.received), "first in, first out"
        assert self.unread == sorted(self.unread)
        seen = self.senders[0].statistics()
        assert (seen.sent_total, seen.received_total) == (len(self.sent), len(self.received))
        assert (seen.items, seen.weight, seen.waiting_senders, seen.waiting_receivers) == (0, 0, 0, 0)
        assert (seen.open_senders, seen.open_receivers) == (0, 0)


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@hypothesis.settings(max_examples=500)
@hypothesis.given(
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7)), max_size=60),
    max_items=st.integers(1, 4),
    max_weight=st.none() | st.integers(1, 10),
    weights=st.lists(st.integers(0, 12), min_size=1, max_size=5),
)
def test_any_history_loses_nothing_doubles_nothing_keeps_order_and_bounds(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    operations: list[Operation],
    max_items: int,
    max_weight: int | None,
    weights: list[int],
) -> None:
    async def play() -> None:
        history = History(max_items=max_items, max_weight=max_weight, weights=weights)
        for operation, pick in operations:
            await history.apply(operation, pick)
            history.check_bounds()
        await history.finish()
        history.check_account()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(play())


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name.replace(" ", "_"))
def test_a_hop_costs_at_most_twice_a_bare_deque_with_events(load: Load) -> None:
    """The short form of ``tests/bench/bench_channel.py``; one noisy minute may be repeated, a slow channel stays
    slow."""
    for _ in range(3):
        costs = measure(load, {"ours": ours, "ours, weighing": ours_weighing}, num_items=20_000, repeats=7)
        if costs["ours"].ratio <= LIMIT and costs["ours, weighing"].ratio <= LIMIT:
            return
    pytest.fail(f"{load.name}: {costs}")
