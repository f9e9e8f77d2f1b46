"""Which rollout may begin, and which enters the optimizer step being built. Events in, instructions out: no await, no
clock.

    P = rollouts per step      S = max_staleness, in policy versions      N = steps of the run
    c = versions trained so far: the step being built starts at version c and makes version c + 1
    l = the version that every generator holds, l ≤ c

**Slots.** There are (S + 1)·P. One is taken at admission; P come back when a version is live, one when a rollout fails.

**Deadlines.** A rollout begun under version v must be in the step that starts at v + S or earlier. One that is admitted
but not begun can only begin under l or later, so it counts as due at l + S.

**Acceptance.** The step takes scored rollouts, earliest deadline first. It takes one with deadline D only if everything
due before D still fits: for every d in [c, D), the unfinished rollouts due at d or earlier are at most
(P − accepted − 1) + (d − c)·P. Reserving room in the step being built alone would not do: with S = 2 and P = 2, six
rollouts begun under version 0 and four quick ones begun later, steps 0 and 1 could both fill up with others and leave
step 2 with more than P rollouts that are due in it.

**Why it always works.** The condition "what is due at d or earlier fits into the steps up to d" holds at the start.
Admission keeps it, because of the slots: the rollouts in flight are at most (S + 1)·P minus those already accepted or
trained and not yet live, which is the room in the steps c … l + S. Beginning, failing and going live only move
deadlines out or remove rollouts. Acceptance keeps it by the rule above. So a rollout that is due is always acceptable,
the bound is hard and nothing is thrown away to keep it.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from enum import Enum

import msgspec


class RolloutState(Enum):
    """Where an unfinished rollout is, as far as the flow cares."""

    ADMITTED = "admitted"
    BEGUN = "begun"
    READY = "ready"
    ACCEPTED = "accepted"


class Train(msgspec.Struct, frozen=True, kw_only=True):
    """Run forward and backward on these now."""

    rollout_ids: tuple[int, ...]
    ages: tuple[int, ...]
    """Version trained minus version begun, of each."""


class FinishStep(msgspec.Struct, frozen=True, kw_only=True):
    """All P rollouts of the step have been handed out: clip, step the optimizer, call ``step_done``."""


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing to do until another event."""


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """The run is complete, or drained as far as it goes."""


Instruction = Train | FinishStep | Wait | Stop


class FlowSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    live: int
    slots: int
    in_use: int
    admitted: int
    begun: int
    ready: int
    accepted: int
    draining: bool


class _Entry(msgspec.Struct):
    state: RolloutState
    begun: int = -1
    num_tokens: int = 0


class Flow:
    """The schedule of one run.

    Args:
        rollouts_per_step: P ≥ 1.
        max_staleness: S ≥ 0.
        num_steps: N: no more is admitted than N steps can train.
        micro_batch_tokens: a micro-batch is handed out when the ready rollouts fill this many tokens …
        micro_batch_rollouts: … or are this many …
            … or complete the step.
        version: where the run starts (a checkpoint's step).
        min_wave: rollouts are admitted at least this many at a time, unless fewer are left or the step being built
            would starve; at most (S + 1)·P.
        by_ticket: compose micro-batches in ticket order instead of arrival, and admit in whole waves: what happens is
        then
            a function of the rollouts alone. Needs S = 0.

    Example, with S=1 and P=2::

        flow = Flow(rollouts_per_step=2, max_staleness=1, num_steps=9, micro_batch_tokens=10)
        assert flow.num_admissible() == 4
        for ticket in range(4):
            flow.admit(ticket)
            flow.begin(ticket, version=0)
        flow.ready(3, num_tokens=4)
        flow.ready(1, num_tokens=4)
        assert flow.next_instruction() == Train(rollout_ids=(1, 3), ages=(0, 0))
        assert flow.next_instruction() == FinishStep()
        flow.step_done()
        flow.weights_live(1)
        assert flow.num_admissible() == 2
    """

    def __init__(
        self,
        *,
        rollouts_per_step: int,
        max_staleness: int,
        num_steps: int,
        micro_batch_tokens: int,
        micro_batch_rollouts: int | None = None,
        version: int = 0,
        min_wave: int = 1,
        by_ticket: bool = False,
    ) -> None:
        if rollouts_per_step < 1:
            raise ValueError(f"rollouts_per_step must be >= 1, got {rollouts_per_step}")
        if max_staleness < 0:
            raise ValueError(f"max_staleness must be >= 0 versions, got {max_staleness}")
        if by_ticket and max_staleness:
            raise ValueError(f"by_ticket needs max_staleness=0, got {max_staleness}")
        if not 1 <= min_wave <= (max_staleness + 1) * rollouts_per_step:
            raise ValueError(
                f"min_wave must be in 1 … (max_staleness + 1) * rollouts_per_step, the slots there are, got {min_wave}"
            )
        if micro_batch_tokens < 1 or (micro_batch_rollouts is not None and micro_batch_rollouts < 1):
            raise ValueError(
                f"a micro-batch holds at least 1 token and 1 rollout, got micro_batch_tokens={micro_batch_tokens}, "
                f"micro_batch_rollouts={micro_batch_rollouts}"
            )
        if not 0 <= version <= num_steps:
            raise ValueError(f"version must be in 0 … num_steps={num_steps}, got {version}")
        self._per_step = rollouts_per_step
        self._staleness = max_staleness
        self._num_steps = num_steps
        self._micro_tokens = micro_batch_tokens
        self._micro_rollouts = micro_batch_rollouts or rollouts_per_step
        self._by_ticket = by_ticket
        self._min_wave = min_wave
        self._slots = (max_staleness + 1) * rollouts_per_step
        self._version = version
        self._live = version
        self._in_use = 0
        self._wave_left = 0
        self._draining = False
        self._entries: dict[int, _Entry] = {}
        """Everything in flight."""
        self._queue: deque[int] = deque()
        """When ``by_ticket``: what is admitted and not accepted, in ticket order. One that failed is passed over."""
        self._accepted: list[int] = []
        self._num_admitted = 0
        """In state ADMITTED: due at live + S."""
        self._due: dict[int, int] = {}
        """deadline → rollouts begun, not accepted."""
        self._ready: dict[int, list[int]] = {}
        """deadline → heap of tickets that are ready (unless ``by_ticket``, which looks at ``_queue``)."""
        self._ready_tokens: dict[int, int] = {}
        """deadline → their tokens in all."""
        self._num_ready = 0

    @property
    def version(self) -> int:
        """c: steps done."""
        return self._version

    @property
    def live(self) -> int:
        """l: the version every generator holds."""
        return self._live

    @property
    def num_in_flight(self) -> int:
        """Admitted and not yet accepted into a step."""
        return len(self._entries) - len(self._accepted)

    def snapshot(self) -> FlowSnapshot:
        return FlowSnapshot(
            version=self._version,
            live=self._live,
            slots=self._slots,
            in_use=self._in_use,
            admitted=self._num_admitted,
            begun=sum(self._due.values()) - self._num_ready,
            ready=self._num_ready,
            accepted=len(self._accepted),
            draining=self._draining,
        )

    # Generation side

    def num_admissible(self) -> int:
        """How many rollouts may be admitted now."""
        if self._draining:
            return 0
        still_needed = (self._num_steps - self._version) * self._per_step - len(self._entries)
        room = min(self._slots - self._in_use, still_needed)
        if not self._by_ticket:
            # What is in flight, accepted rollouts included, must be enough for a step: else it would wait for rollouts
            # that wait for slots that only it gives back.
            starves = len(self._entries) < self._per_step
            if self._wave_left == 0 and (starves or room >= min(self._min_wave, still_needed)):
                self._wave_left = room
            return room if self._min_wave == 1 else min(room, self._wave_left)
        # A wave is admitted whole, and the next one only when the fate of every rollout before it is known: otherwise
        # the moment at which a failure is noticed would decide which replacements are sampled together.
        if self._wave_left == 0 and self._num_ready == self.num_in_flight:
            self._wave_left = room
        return self._wave_left

    def admit(self, rollout_id: int) -> None:
        """Take one slot."""
        if self.num_admissible() < 1:
            raise RuntimeError(f"rollout {rollout_id} was admitted without room: {self.snapshot()}")
        if rollout_id in self._entries:
            raise RuntimeError(f"rollout {rollout_id} was admitted twice")
        if self._wave_left:
            self._wave_left -= 1
            bisect.insort(self._queue, rollout_id)
        self._entries[rollout_id] = _Entry(RolloutState.ADMITTED)
        self._num_admitted += 1
        self._in_use += 1

    def begin(self, rollout_id: int, *, version: int) -> None:
        """Its first token will be sampled under ``version``: from here on it has its deadline."""
        entry = self._expect(rollout_id, RolloutState.ADMITTED)
        if not self._live <= version <= self._version:
            raise RuntimeError(
                f"rollout {rollout_id} began under v{version}, outside the versions that generators may hold: "
                f"v{self._live} … v{self._version}"
            )
        entry.state = RolloutState.BEGUN
        entry.begun = version
        self._num_admitted -= 1
        self._due[version + self._staleness] = self._due.get(version + self._staleness, 0) + 1

    def requeue(self, rollout_id: int) -> None:
        """What was sampled of it is lost; it will begin again."""
        entry = self._entry(rollout_id)
        if entry.state is RolloutState.ADMITTED:
            return
        self._expect(rollout_id, RolloutState.BEGUN)
        self._forget_deadline(entry)
        entry.state = RolloutState.ADMITTED
        entry.begun = -1
        self._num_admitted += 1

    def ready(self, rollout_id: int, *, num_tokens: int) -> None:
        """It is scored; ``num_tokens`` (prompt and response) is what it adds to a micro-batch."""
        entry = self._expect(rollout_id, RolloutState.BEGUN)
        entry.state = RolloutState.READY
        entry.num_tokens = num_tokens
        if not self._by_ticket:
            self._push_ready(rollout_id, entry.begun + self._staleness)
        self._num_ready += 1

    def fail(self, rollout_id: int) -> None:
        """It will never be trained; its slot is free at once, so another one is admitted in its place."""
        entry = self._entry(rollout_id)
        if entry.state is RolloutState.ADMITTED:
            self._num_admitted -= 1
        else:
            self._expect(rollout_id, RolloutState.BEGUN)
            self._forget_deadline(entry)
        del self._entries[rollout_id]
        self._in_use -= 1

    # Training side

    def next_instruction(self) -> Instruction:
        """What the learner does now. ``Train`` accepts its rollouts into the step."""
        if self._version == self._num_steps:
            return Stop()
        if len(self._accepted) == self._per_step:
            return FinishStep()
        if self._draining and (not self._accepted or len(self._entries) < self._per_step):
            return Stop()
        chosen = self._choose_by_ticket() if self._by_ticket else self._choose_by_deadline()
        if not chosen:
            return Wait()
        ages = tuple(self._version - self._entries[ticket].begun for ticket in chosen)
        for ticket in chosen:
            entry = self._entries[ticket]
            entry.state = RolloutState.ACCEPTED
            self._forget_deadline(entry)
        while self._queue and self._queue[0] <= chosen[-1]:
            self._queue.popleft()
        self._num_ready -= len(chosen)
        self._accepted += chosen
        assert max(ages) <= self._staleness, f"staleness bound broken: ages {ages}, limit {self._staleness}"
        return Train(rollout_ids=tuple(chosen), ages=ages)

    def step_done(self) -> tuple[int, ...]:
        """The optimizer has stepped. Returns the tickets of the step, ascending."""
        if len(self._accepted) != self._per_step:
            raise RuntimeError(
                f"step {self._version + 1} ended with {len(self._accepted)} of {self._per_step} rollouts trained"
            )
        trained = tuple(sorted(self._accepted))
        for ticket in trained:
            del self._entries[ticket]
        self._accepted.clear()
        self._version += 1
        return trained

    def weights_live(self, version: int) -> None:
        """Every generator holds ``version``: the slots of the steps that made it come back."""
        if not self._live <= version <= self._version:
            raise RuntimeError(
                f"v{version} cannot go live after v{self._live} while the learner is at v{self._version}"
            )
        self._in_use -= (version - self._live) * self._per_step
        self._live = version

    def drain(self) -> None:
        """Admit nothing more. The step being built is finished if what is in flight can fill it; then ``Stop``."""
        self._draining = True

    # Choosing

    def _choose_by_deadline(self) -> list[int]:
        room = self._per_step - len(self._accepted)
        most = min(room, self._micro_rollouts)
        takable = self._takable(most)
        # Most calls end here, for one rollout more is seldom a micro-batch more: it takes O(S), not O(what is ready).
        num_takable = sum(number for _, number in takable)
        if num_takable < most and sum(self._ready_tokens[deadline] for deadline, _ in takable) < self._micro_tokens:
            return []
        chosen: list[int] = []
        tokens = 0
        for deadline, number in takable:
            heap = self._ready[deadline]
            for _ in range(number):
                num_tokens = self._entries[heap[0]].num_tokens
                if chosen and tokens + num_tokens > self._micro_tokens:
                    return chosen
                chosen.append(self._pop_ready(deadline))
                tokens += num_tokens
                if len(chosen) == most or tokens >= self._micro_tokens:
                    return chosen
        return self._give_back(chosen)

    def _takable(self, most: int) -> list[tuple[int, int]]:
        """(deadline, number of ready rollouts with it that the step may take), earliest first, ``most`` in all.

        With slack(d) = (P − accepted) + (d − c)·P − what is due at d or earlier, the rule of acceptance is: of those
        with a deadline after d, at most slack(d) may be taken, for every d.
        """
        found: list[tuple[int, int]] = []
        slack = self._per_step - len(self._accepted)
        left = most
        d = self._version
        for deadline in sorted(self._ready):
            while d < deadline:
                slack -= self._due.get(d, 0)
                if d == self._live + self._staleness:
                    slack -= self._num_admitted
                left = min(left, slack)
                slack += self._per_step
                d += 1
            number = min(left, len(self._ready[deadline]))
            if number <= 0:
                break
            found.append((deadline, number))
            left -= number
        return found

    def _pop_ready(self, deadline: int) -> int:
        heap = self._ready[deadline]
        ticket = heapq.heappop(heap)
        self._ready_tokens[deadline] -= self._entries[ticket].num_tokens
        if not heap:
            del self._ready[deadline], self._ready_tokens[deadline]
        return ticket

    def _push_ready(self, ticket: int, deadline: int) -> None:
        heapq.heappush(self._ready.setdefault(deadline, []), ticket)
        self._ready_tokens[deadline] = self._ready_tokens.get(deadline, 0) + self._entries[ticket].num_tokens

    def _choose_by_ticket(self) -> list[int]:
        chosen: list[int] = []
        tokens = 0
        room = self._per_step - len(self._accepted)
        for ticket in self._queue:
            entry = self._entries.get(ticket)
            if entry is None:
                continue
            if entry.state is not RolloutState.READY:
                return []
            if chosen and tokens + entry.num_tokens > self._micro_tokens:
                break
            chosen.append(ticket)
            tokens += entry.num_tokens
            if len(chosen) in (room, self._micro_rollouts) or tokens >= self._micro_tokens:
                break
        else:
            return []
        return chosen

    def _give_back(self, chosen: list[int]) -> list[int]:
        """Too few for a micro-batch: they stay ready, so that one with an earlier deadline may still go first."""
        for ticket in chosen:
            self._push_ready(ticket, self._entries[ticket].begun + self._staleness)
        return []

    # Bookkeeping

    def _entry(self, rollout_id: int) -> _Entry:
        try:
            return self._entries[rollout_id]
        except KeyError:
            raise RuntimeError(f"rollout {rollout_id} is not in flight") from None

    def _expect(self, rollout_id: int, state: RolloutState) -> _Entry:
        entry = self._entry(rollout_id)
        if entry.state is not state:
            raise RuntimeError(f"rollout {rollout_id} is {entry.state.value}, expected {state.value}")
        return entry

    def _forget_deadline(self, entry: _Entry) -> None:
        deadline = entry.begun + self._staleness
        left = self._due[deadline] - 1
        if left:
            self._due[deadline] = left
        else:
            del self._due[deadline]
