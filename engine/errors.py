"""Every error that this project raises on purpose.

* EngineError
    * UserError                         something outside the program must change before a run can start
        * RecipeError(ValueError)       a recipe field, or a pair of fields, is wrong
        * DataError(ValueError)         a prompt file cannot be read as the recipe says
        * ModelError(ValueError)        a model folder is missing, broken or of the wrong kind
        * TeacherMismatch               teacher and student do not speak the same vocabulary
        * TeacherRefused                the teacher will never accept this request (a 4xx answer)
        * RunDirError(OSError)          the run's folder cannot be used (read-only, full, taken)
        * CheckpointError               no checkpoint is usable, or one does not verify
        * Absent                        what is named is not on this machine; nothing is known to be wrong with it
            * ModelAbsent(ModelError), DataAbsent(DataError), PackageAbsent(RecipeError)
    * TeacherUnavailable                this attempt failed; another one may succeed
        * TeacherUnreachable            nobody answers there
        * TeacherOverloaded             429: come back after ``retry_after_s``
    * NonFiniteError(ArithmeticError)   loss or gradient is NaN or infinite
    * WeightsMismatch                   a generator received other bits than the learner sent
    * GeneratorDied                     the engine that held rollouts is gone
    * RanksLost                         a process of the learner died, hung or failed, and all of them were stopped
    * AnswerLost                        one of several engines is gone, with an answer; ask again
    * TensorPlaneError                  weights did not travel: a sender or receiver is gone, or does not answer
    * MalformedFrame(ValueError)        bytes that are not a frame of the wire format
    * ActorFailed                       an actor failed for good, so the run ends; names actor and cause
    * Deadlock                          a simulated run hangs: everybody waits for somebody else
    * ChannelError
        * ClosedChannel                 this end was closed by its owner
        * BrokenChannel                 the other end is gone; what is sent now can never arrive
        * WouldBlock                    a ``try_`` call that would have had to wait

``EndOfChannel`` is not an error: it is how a stream ends.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class UserError(EngineError):
    """The user can mend this; the message says how. Shown without a traceback."""

    exit_code: ClassVar[int] = 2


class RecipeError(UserError, ValueError):
    """A recipe cannot run as written; the message names the field path and the fix."""


class DataError(UserError, ValueError):
    """A prompt file cannot be used; the message names file and line."""


class ModelError(UserError, ValueError):
    """A model or tokenizer folder cannot be used; the message names the folder."""


class TeacherMismatch(UserError):
    """Teacher and student would talk about different tokens; refused before any work."""


class TeacherRefused(UserError):
    """The teacher answered 4xx: the same request can never succeed."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_refused, (str(self), self.status))


def _rebuild_refused(message: str, status: int) -> TeacherRefused:
    return TeacherRefused(message, status=status)


class RunDirError(UserError, OSError):
    """The folder of a run cannot be written, is full, or belongs to another run."""


class CheckpointError(UserError):
    """There is no checkpoint to resume from, or none that verifies."""


class Absent(UserError):
    """What is named is not on this machine. Of what it is nothing is known, so nothing is known to be wrong with it."""

    def __init__(self, what: str, *, remedy: str, bring: str | None = None) -> None:
        """Args:
        what: is not there.
        remedy: what was expected and what to do, for who needs it here.
        bring: the command that brings it.
        """
        super().__init__(f"{what}; {remedy}")
        self.what = what
        self.remedy = remedy
        self.bring = bring

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_absent, (type(self), self.what, self.remedy, self.bring))


def _rebuild_absent(kind: type[Absent], what: str, remedy: str, bring: str | None) -> Absent:
    return kind(what, remedy=remedy, bring=bring)


class ModelAbsent(Absent, ModelError):
    """There is no such folder, or it lacks a part altogether: config, weights or tokenizer."""


class DataAbsent(Absent, DataError):
    """There is no such prompt file, or nothing here that could read it."""


class PackageAbsent(Absent, RecipeError):
    """A package that the recipe needs is not installed."""


class TeacherUnavailable(EngineError):
    """No answer this time: connection refused, reset, timed out, 5xx, or a torn body."""


class TeacherUnreachable(TeacherUnavailable):
    """Nobody answers there: not reached, or not in time."""


class TeacherOverloaded(TeacherUnavailable):
    """The teacher is alive and asks to be left alone for ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_overloaded, (str(self), self.retry_after_s))


def _rebuild_overloaded(message: str, retry_after_s: float) -> TeacherOverloaded:
    return TeacherOverloaded(message, retry_after_s=retry_after_s)


class NonFiniteError(EngineError, ArithmeticError):
    """Loss or gradient is not finite; the offending rollouts have been saved."""


class WeightsMismatch(EngineError):
    """What a generator received does not have the digest of the version; it goes on with the version that it has."""


class GeneratorDied(EngineError):
    """The generation engine is gone; what it held must be sampled again."""


class RanksLost(EngineError):
    """A rank of a group died, hangs or raised what it should not; all ranks were stopped, and what they held is lost.
    The message names the rank and shows its traceback or the end of its log."""


class AnswerLost(EngineError):
    """What one of a generator's engines held is gone with it; the generator goes on, and may be asked again."""


class TensorPlaneError(EngineError):
    """Weights did not travel whole; who was to receive them goes on with the version that it has."""


class MalformedFrame(EngineError, ValueError):
    """Bytes from outside that are not what the wire format says; nothing of them was used."""


class ActorFailed(EngineError):
    """An actor failed beyond what its restart policy forgives. The one error that ends a run."""

    def __init__(self, actor: str, cause: BaseException) -> None:
        super().__init__(f"actor {actor!r} failed: {type(cause).__name__}: {cause}")
        self.actor = actor
        self.cause = cause
        """What the actor raised; also when it is a ``UserError``, the run had started and ends with exit code 1."""

    def __reduce__(self) -> tuple[object, ...]:
        return (ActorFailed, (self.actor, self.cause))


class Deadlock(EngineError):
    """A simulated run hangs: nothing can run and no timer is set, so nobody who waits will ever be woken."""

    def __init__(self, waiting: str) -> None:
        super().__init__(
            "the simulated run hangs: nothing can run and no timer is set. Does an actor keep a rollout that it "
            f"neither hands on nor reports to schedule.failed? Who waits, and in which call:\n{waiting}"
        )
        self.waiting = waiting

    def __reduce__(self) -> tuple[object, ...]:
        return (Deadlock, (self.waiting,))


class ChannelError(EngineError):
    """Base of the three ways a channel call can fail."""


class ClosedChannel(ChannelError):
    """This end was already closed by its owner."""


class BrokenChannel(ChannelError):
    """The other end is gone: what is sent now can never arrive."""


class WouldBlock(ChannelError):
    """A ``try_send`` or ``try_receive`` that would have had to wait."""


class EndOfChannel(Exception):
    """Every sender closed and the buffer is empty: the normal end of a stream."""
