"""What a policy version must consist of before a generator takes it: every parameter of its model, no other name, no
other shape, and the bits that the learner sent. Where the tensors are copied to is the generator's business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import WeightsMismatch
from engine.transport.manifest import WeightDigest


class TensorGroup(NamedTuple):
    """Names that are one tensor (tied weights), as a checkpoint knows them."""

    names: tuple[str, ...]
    shape: torch.Size
    is_required: bool
    """A version without it is incomplete; where a generator allows it, a buffer may stay as it is."""


def tensor_groups(model: nn.Module) -> list[TensorGroup]:
    """Parameters and persistent buffers of a model as it was loaded, before any layer was packed."""
    persistent = model.state_dict().keys()
    names_of: dict[int, list[str]] = {}
    tensors: dict[int, tuple[Tensor, bool]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = (parameter, True)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            names_of.setdefault(id(buffer), []).append(name)
            tensors[id(buffer)] = (buffer, False)
    return [TensorGroup(tuple(names_of[key]), tensor.shape, required) for key, (tensor, required) in tensors.items()]


class Arrival:
    """One version on its way in: ``expect`` each tensor, copy it, ``add`` it, and at the end ``complete``.

    Args:
        groups: what the model has.
        digest: what all tensors must amount to, in the order in which they come; None: not compared.
    """

    def __init__(self, groups: Sequence[TensorGroup], *, digest: str | None) -> None:
        self._groups = groups
        self._index_of = {name: index for index, group in enumerate(groups) for name in group.names}
        self._expected_digest = digest
        self._digest = WeightDigest()
        self._arrived: set[int] = set()

    @property
    def arrived(self) -> frozenset[int]:
        """Indices of the groups that have come."""
        return frozenset(self._arrived)

    def expect(self, name: str, tensor: Tensor) -> int:
        """The index of the group that ``name`` belongs to.

        Raises:
            ValueError: the model has no such name, or another shape there.
        """
        index = self._index_of.get(name)
        if index is None:
            raise ValueError(
                f"weights: the model has no parameter {name!r}; names are those of its Hugging Face checkpoint, "
                f"such as {self._groups[0].names[0]!r}"
            )
        expected = self._groups[index].shape
        if tensor.shape != expected:
            raise ValueError(
                f"weights: {name!r} has shape {tuple(tensor.shape)}, the model's has {tuple(expected)}; "
                "was another model exported?"
            )
        return index

    def add(self, name: str, tensor: Tensor) -> None:
        """It is copied: take its bits into account."""
        self._arrived.add(self._index_of[name])
        if self._expected_digest is not None:
            self._digest.add(name, tensor)

    def complete(self) -> frozenset[int]:
        """What ``arrived``, now that nothing more comes.

        Raises:
            ValueError: parameters are missing.
            WeightsMismatch: what came has another digest.
        """
        groups = enumerate(self._groups)
        missing = [g.names[0] for index, g in groups if g.is_required and index not in self._arrived]
        if missing:
            raise ValueError(
                f"weights: {len(missing)} parameters did not come, among them {missing[0]!r}; a version is all of them "
                "(tied ones once), or old and new would mix"
            )
        if self._expected_digest is not None and self._digest.hexdigest() != self._expected_digest:
            raise WeightsMismatch(
                f"weights: what came has digest {self._digest.hexdigest()}, the version has {self._expected_digest}; "
                "they were changed while they travelled, so the generator keeps what it has"
            )
        return self.arrived
