"""How a new version's tensors get into a model that is decoding: copied aside first, exchanged in one go.

Copying 450 MB takes 60 ms and the sender may be slower still; the exchange moves pointers and takes microseconds, so that is
all a decode step waits for, and a version that turns out incomplete has touched nothing. The price is a second set of
tensors; after an exchange the old ones become the space for the next version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.generation.protocol import Bucket


Staged = frozenset[int]
"""Which tensors of the model a staged version brings."""


class StagingArea:
    """The tensors of one model and the spare ones beside them."""

    def __init__(self, model: PreTrainedModel) -> None:
        persistent = model.state_dict().keys()
        self._targets: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._required = {id(tensor) for tensor in self._targets.values()}
        for name, buffer in model.named_buffers(remove_duplicate=False):
            if name in persistent:
                self._targets[name] = buffer
        self._spare: dict[int, Tensor] = {}
        self._device = model.device

    def stage(self, buckets: Iterable[Bucket], *, is_wanted: Callable[[], bool]) -> Staged:
        """Copy a version aside. Called in a worker thread while the model decodes.

        Args:
            is_wanted: asked before each bucket; False ends the copying early.

        Raises:
            ValueError: a name or shape that the model does not have, or parameters that are missing.
        """
        staged: set[int] = set()
        for bucket in buckets:
            if not is_wanted():
                break
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                staged.add(self._copy(name, tensor))
            if self._device.type == "cuda":
                # The sender may overwrite the bucket as soon as it is asked for the next one.
                torch.cuda.current_stream(self._device).synchronize()
        else:
            self._check_complete(staged)
        return frozenset(staged)

    def exchange(self, staged: Staged) -> None:
        """Point the model at what was staged. Called by the thread that decodes, between two steps."""
        for target in {id(tensor): tensor for tensor in self._targets.values()}.values():
            if id(target) in staged:
                target.data, self._spare[id(target)] = self._spare[id(target)], target.data

    def _copy(self, name: str, tensor: Tensor) -> int:
        target = self._targets.get(name)
        if target is None:
            raise ValueError(
                f"weights: the model has no parameter {name!r}; names are those of its Hugging Face checkpoint, "
                f"such as {next(iter(self._targets))!r}"
            )
        if target.shape != tensor.shape:
            raise ValueError(
                f"weights: {name!r} has shape {tuple(tensor.shape)}, the model's has {tuple(target.shape)}; "
                "was another model exported?"
            )
        spare = self._spare.get(id(target))
        if spare is None:
            spare = self._spare[id(target)] = torch.empty_like(target, requires_grad=False)
        with torch.no_grad():
            spare.copy_(tensor)
        return id(target)

    def _check_complete(self, staged: set[int]) -> None:
        missing = [name for name, tensor in self._targets.items() if id(tensor) in self._required - staged]
        if missing:
            raise ValueError(
                f"weights: {len(missing)} parameters did not come, among them {missing[0]!r}; a version is all of them "
                "(tied ones once), or old and new would mix"
            )
