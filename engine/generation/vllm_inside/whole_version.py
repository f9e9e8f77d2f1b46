"""What every way of our own to load a version has in common: vLLM's layers are loaded as from a checkpoint, and to
leave a tensor of the model without anything new is an error. How the tensors come is the subclass's business."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class WholeVersionEngine(WeightTransferEngine):  # type: ignore[misc]
    """A version is loaded by one ``update_weights`` between ``start_weight_update`` and ``finish_weight_update``."""

    def start_weight_update(self) -> None:
        # What the reload takes apart (tied tensors) is there before, what was derived from others (latent attention) is
        # not there after it: both are expected from nobody.
        before = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        self._expected = before & {name for name, _ in self.model.named_parameters()}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class synchronises the accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # the sender writes the next version into the same memory

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def load(self, parts: Iterable[Iterable[tuple[str, Tensor]]]) -> None:
        """All tensors of the version, in as many parts as they come in; a part may be gone when the next is asked for.

        Raises:
            RuntimeError: something of the model got nothing.
        """
        missing = set(self._expected)
        for part in parts:
            loaded = self.model.load_weights(part)
            # Some models do not say.
            missing = set() if loaded is None else missing - loaded
        if missing:
            raise RuntimeError(
                f"vLLM put nothing of the new version into {len(missing)} of its parameters, among them "
                f"{min(missing)!r}: it knows this architecture's tensors by other names than were sent"
            )
