"""Errors keep their kind, their text and their values, also across a process border."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from engine import errors
from engine.errors import (
    ActorFailed,
    ChannelError,
    EndOfChannel,
    EngineError,
    GeneratorDied,
    ModelAbsent,
    TeacherOverloaded,
    TeacherRefused,
    TeacherUnavailable,
    UserError,
)

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_tree_at_the_head_of_the_module(kind: type[Exception]) -> None:
    assert kind in (EngineError, EndOfChannel) or issubclass(kind, EngineError)
    assert errors.__doc__ is not None
    assert re.search(rf"\b{kind.__name__}\b", errors.__doc__)


def test_what_the_user_can_mend_ends_with_2_and_the_rest_with_1() -> None:
    for kind in ALL:
        if issubclass(kind, EngineError):
            assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)


def test_the_end_of_a_channel_is_no_error() -> None:
    assert not issubclass(EndOfChannel, ChannelError | EngineError)


def test_values_survive_a_process_border() -> None:
    refused = pickle.loads(pickle.dumps(TeacherRefused("prompt is too long", status=413)))
    assert (type(refused), str(refused), refused.status) == (TeacherRefused, "prompt is too long", 413)
    busy = pickle.loads(pickle.dumps(TeacherOverloaded("busy", retry_after_s=1.5)))
    assert (type(busy), str(busy), busy.retry_after_s) == (TeacherOverloaded, "busy", 1.5)
    absent = pickle.loads(pickle.dumps(ModelAbsent("no folder", remedy="fetch it with: get it", bring="get it")))
    assert (type(absent), str(absent)) == (ModelAbsent, "no folder; fetch it with: get it")
    assert (absent.what, absent.remedy, absent.bring) == ("no folder", "fetch it with: get it", "get it")
    failed = pickle.loads(pickle.dumps(ActorFailed("sampler", GeneratorDied("gone"))))
    assert (type(failed), str(failed)) == (ActorFailed, "actor 'sampler' failed: GeneratorDied: gone")
    assert (failed.actor, type(failed.cause), str(failed.cause)) == ("sampler", GeneratorDied, "gone")


def test_an_overloaded_teacher_is_worth_another_attempt() -> None:
    assert issubclass(TeacherOverloaded, TeacherUnavailable)
    assert not issubclass(TeacherUnavailable, UserError)
