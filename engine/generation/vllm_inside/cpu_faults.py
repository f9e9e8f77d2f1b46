"""Three faults of vLLM 0.32 on CPU, and what mends each of them; on a GPU nothing here is used.

Found by comparing log-probabilities with the learner's after a weight update. ``tests/vllm/test_cpu_faults.py`` takes
each patch away again and fails when nothing goes wrong without it: then it can be deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise


class Fault:
    """One function of vLLM and the one that stands in for it.

    Args:
        owner: class or module whose attribute ``name`` is replaced, for good: layers keep what they found there.
        mend: gets the original, returns the one to use instead.
    """

    def __init__(self, owner: Any, name: str, mend: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._original = getattr(owner, name)
        self._mended = mend(self._original)
        self.is_mended = True

    def install(self) -> None:
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (self._mended if self.is_mended else self._original)(*args, **kwargs)

        setattr(self._owner, self._name, choose)


def _pack_tied_heads(original: Any) -> Any:
    """A tied output layer computes with a packed copy of the embedding. A reload never loads the head's own weight, so
    it is not packed again and goes on with the old one: 0.15 nats off."""

    def finalize_layerwise_processing(model: nn.Module, model_config: Any) -> None:
        original(model, model_config)
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    return finalize_layerwise_processing


def _rotate_pairs_in_torch(original: Any) -> Any:
    """The C++ operation is wrong when neighbours are rotated (``is_neox_style=False``: DeepSeek, Moonlight): 0.1."""

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if self.is_neox_style:
            return original(self, positions, query, key)
        return self.forward_native(positions, query, key)

    return forward_cpu


def _pack_experts_again(original: Any) -> Any:
    """Experts are packed for the grouped product when they are first loaded, and not after an update: 0.03."""

    def setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        is_update = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    return setup_kernel


FAULTS: Mapping[str, Fault] = {
    "tied head": Fault(layerwise, "finalize_layerwise_processing", _pack_tied_heads),
    "interleaved rope": Fault(RotaryEmbedding, "forward_cpu", _rotate_pairs_in_torch),
    "experts": Fault(UnquantizedFusedMoEMethod, "_setup_kernel", _pack_experts_again),
}
