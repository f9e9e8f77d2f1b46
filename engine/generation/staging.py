"""How a new version's tensors get into a model that is decoding: copied aside first, exchanged in one go.

Copying 450 MB takes a tenth of a second and the sender may be slower still; the exchange moves pointers and takes well
under a millisecond. So that is all a decode step waits for, and a version that turns out incomplete has touched
nothing. The price is a second set of tensors; after an exchange the old ones are the space for the next version.

On CUDA sender, copier and decoder may each work on a stream of their own, so all that changes hands does so through
``handoff``: the sender's tensors to the copier, the copies to the decoder, and what they replace back to the copier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.generation.protocol import Bucket
from engine.generation.version import Arrival, TensorGroup
from engine.packed_linear import PackedLinear
from engine.transport.handoff import Ticket, consume, publish

Staged = frozenset[int]
"""Which groups of the model's tensors a staged version brings."""


class StagingArea:
    """The places of one model where weights lie, and the spare tensors beside them."""

    def __init__(self, model: nn.Module, groups: Sequence[TensorGroup], *, device: torch.device) -> None:
        self._groups = groups
        self._places = [_places(model, group) for group in groups]
        self._device = device
        self._handed: Ticket | None = None
        """The spare tensors on their way: staged ones to the decoder, replaced ones back to the copier."""

    def stage(self, buckets: Iterable[Bucket], *, is_wanted: Callable[[], bool], digest: str | None = None) -> Staged:
        """Copy a version aside. Called in a worker thread while the model decodes.

        Args:
            is_wanted: asked before each bucket; False ends the copying early.
            digest: what all tensors must amount to; None: not compared.

        Raises:
            ValueError: a name or shape that the model does not have, or parameters that are missing.
            WeightsMismatch: what came has another digest.
        """
        arrival = Arrival(self._groups, digest=digest)
        self._take_over()
        for bucket in buckets:
            if not is_wanted():
                return arrival.arrived
            for name, tensor in zip(bucket.names, written(bucket), strict=True):
                for place in self._places[arrival.expect(name, tensor)]:
                    place.stage(tensor)
                arrival.add(name, tensor)
            if self._device.type == "cuda":
                # The sender may overwrite the bucket as soon as it is asked for the next one.
                torch.cuda.current_stream(self._device).synchronize()
        staged = arrival.complete()
        self._hand_over(staged)
        return staged

    def exchange(self, staged: Staged) -> None:
        """Point the model at what was staged. Called by the thread that decodes, between two steps."""
        self._take_over()
        for index in staged:
            for place in self._places[index]:
                place.exchange()
        self._hand_over(staged)

    def _hand_over(self, staged: Iterable[int]) -> None:
        """What the calling thread has asked of the spare tensors comes before all that the other one will ask."""
        spares = [place.spare for index in staged for place in self._places[index] if isinstance(place, _PlainPlace)]
        tensors = [spare for spare in spares if spare is not None]
        self._handed = publish(tensors) if tensors else None

    def _take_over(self) -> None:
        if self._handed is not None:
            consume(self._handed)
            self._handed = None


def written(bucket: Bucket) -> tuple[Tensor, ...]:
    """Its tensors, and the calling thread's stream waits until they hold the version."""
    if bucket.written is None:
        return bucket.tensors
    return consume(Ticket(tensors=bucket.tensors, device=bucket.tensors[0].device, event=bucket.written))


class _Place(Protocol):
    def stage(self, tensor: Tensor) -> None: ...
    def exchange(self) -> None: ...


class _PlainPlace:
    def __init__(self, target: Tensor) -> None:
        self._target = target
        self.spare: Tensor | None = None

    def stage(self, tensor: Tensor) -> None:
        with torch.no_grad():
            if self.spare is None:
                self.spare = torch.empty_like(self._target, requires_grad=False)
            self.spare.copy_(tensor)

    def exchange(self) -> None:
        assert self.spare is not None, "nothing was staged"
        self._target.data, self.spare = self.spare, self._target.data


class _PackedPlace:
    """oneDNN lays out a tensor of its own each time, so there is nothing to reuse."""

    def __init__(self, linear: PackedLinear) -> None:
        self._linear = linear
        self._spare: tuple[Tensor, ...] | None = None

    def stage(self, tensor: Tensor) -> None:
        self._spare = self._linear.pack(tensor)

    def exchange(self) -> None:
        assert self._spare is not None, "nothing was staged"
        self._linear.packed, self._spare = self._spare, None


def _places(model: nn.Module, group: TensorGroup) -> list[_Place]:
    """One for the tensor that its names share, and one for each packed copy of it."""
    places: list[_Place] = []
    plain: dict[int, Tensor] = {}
    for name in group.names:
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(owner, PackedLinear) and attribute == "weight":
            places.append(_PackedPlace(owner))
        else:
            tensor = getattr(owner, attribute)
            plain[id(tensor)] = tensor
    return [*places, *map(_PlainPlace, plain.values())]
