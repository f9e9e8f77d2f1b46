"""How tensors change hands on their way into a model: who waits for whom. What is decoded then is the contract's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from engine.generation import staging
from engine.generation.protocol import Bucket
from engine.generation.staging import StagingArea
from engine.generation.version import tensor_groups
from engine.transport.handoff import Ticket, record

Journal = list[str]


def always() -> bool:
    return True


def make_area(model: nn.Module) -> StagingArea:
    return StagingArea(model, tensor_groups(model), device=next(model.parameters()).device)


def version_of(value: float, written: object = None) -> Iterator[Bucket]:
    yield Bucket(names=("weight",), tensors=(torch.full((2, 3), value),), written=written)  # type: ignore[arg-type]
    yield Bucket(names=("bias",), tensors=(torch.full((2,), value),), written=written)  # type: ignore[arg-type]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    """Each ``publish`` and ``consume`` of a staging area: the event of a ticket is the number of its publishing."""
    lines: Journal = []
    published = iter(range(100))

    def publish(tensors: list[torch.Tensor]) -> Ticket:
        event = next(published)
        lines.append(f"publish {event}: {sorted(float(tensor.sum() / tensor.numel()) for tensor in tensors)}")
        return Ticket(tensors=tuple(tensors), device=tensors[0].device, event=event)  # type: ignore[arg-type]

    def consume(ticket: Ticket) -> tuple[torch.Tensor, ...]:
        lines.append(f"consume {ticket.event}")
        return ticket.tensors

    monkeypatch.setattr(staging, "publish", publish)
    monkeypatch.setattr(staging, "consume", consume)
    return lines


def test_tensors_change_hands_from_the_sender_to_the_decoder_and_back(journal: Journal) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.0)
    nn.init.constant_(model.bias, 0.0)
    area = make_area(model)

    area.exchange(area.stage(version_of(1.0, "written 1"), is_wanted=always))
    assert journal == [
        "consume written 1",
        "consume written 1",
        "publish 0: [1.0, 1.0]",  # the copies
        "consume 0",
        "publish 1: [0.0, 0.0]",  # what they replaced
    ]
    journal.clear()
    area.stage(version_of(2.0, "written 2"), is_wanted=always)
    assert journal[0] == "consume 1"


def test_a_version_given_up_leaves_nothing_for_the_decoder(journal: Journal) -> None:
    area = make_area(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="1 parameters did not come"):
        area.stage([next(version_of(1.0))], is_wanted=always)
    area.stage(version_of(1.0), is_wanted=lambda: False)

    assert journal == []


def test_a_bucket_without_an_event_is_taken_as_it_is(journal: Journal) -> None:
    model = nn.Linear(3, 2)
    area = make_area(model)
    area.exchange(area.stage(version_of(4.0), is_wanted=always))

    assert [line.split(":")[0] for line in journal] == ["publish 0", "consume 0", "publish 1"]
    assert model.weight.eq(4.0).all()


# --- on a device ----------------------------------------------------------------------------------------------------

A_WHILE = 200_000_000
"""Cycles: about 0.1 s, and for ever beside the microseconds that a launch takes."""


class Streams(NamedTuple):
    sender: torch.cuda.Stream
    copier: torch.cuda.Stream
    decoder: torch.cuda.Stream


def new_streams() -> Streams:
    return Streams(*(torch.cuda.Stream() for _ in Streams._fields))  # type: ignore[no-untyped-call]


def keep_busy() -> None:
    torch.cuda._sleep(A_WHILE)  # type: ignore[no-untyped-call]


def on_device() -> nn.Linear:
    model = nn.Linear(1024, 1024, bias=False).cuda().requires_grad_(False)
    model.weight.zero_()
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("is_careful", [True, False])
def test_weights_that_are_still_being_written_are_waited_for(is_careful: bool) -> None:
    streams, model = new_streams(), on_device()
    area, weight = make_area(model), torch.zeros(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(streams.sender):
        keep_busy()
        weight.fill_(1)
        written = record(weight.device)
    with torch.cuda.stream(streams.copier):
        bucket = Bucket(names=("weight",), tensors=(weight,), written=written if is_careful else None)
        staged = area.stage([bucket], is_wanted=always)
    with torch.cuda.stream(streams.decoder):
        area.exchange(staged)
        read = model.weight.clone()
    torch.cuda.synchronize()

    assert bool(read.eq(1).all()) is is_careful


@pytest.mark.gpu
def test_old_weights_are_written_over_only_when_the_decoder_has_read_them() -> None:
    streams, model = new_streams(), on_device()
    area = make_area(model)
    torch.cuda.synchronize()

    def stage(value: float) -> staging.Staged:
        with torch.cuda.stream(streams.copier):
            weight = torch.full((1024, 1024), value, device="cuda")
            return area.stage([Bucket(names=("weight",), tensors=(weight,))], is_wanted=always)

    staged = stage(1.0)
    with torch.cuda.stream(streams.decoder):
        keep_busy()
        before = model.weight.clone()
        area.exchange(staged)
        after = model.weight.clone()
    stage(2.0)
    torch.cuda.synchronize()

    assert before.eq(0).all()
    assert after.eq(1).all()
