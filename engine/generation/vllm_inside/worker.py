"""What vLLM's worker processes import because ``worker_extension_cls`` names it: our transfer back ends and patches.

Runs in vLLM's processes, before a model is loaded. Nothing in our own process imports this package.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from engine.generation.vllm_inside import cpu_faults, two_logprobs
from engine.generation.vllm_inside.owner import end_with_owner
from engine.generation.vllm_inside.plane_weights import PlaneWeightsEngine
from engine.generation.vllm_inside.shared_weights import SharedWeightsEngine

end_with_owner()
# A worker imports this once; a test that has vLLM in its own process may come here again by another name.
for name, engine in (("shm", SharedWeightsEngine), ("plane", PlaneWeightsEngine)):
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, engine)
two_logprobs.install()
if current_platform.is_cpu():
    for fault in cpu_faults.FAULTS.values():
        fault.install()


class WorkerExtension:
    """Mixed into vLLM's worker class; its methods are called by ``AsyncLLM.collective_rpc``."""

    weight_transfer_engine: Any
    """The worker's own."""

    def process_id(self) -> int:
        return os.getpid()

    def fetch_weights(self) -> None:
        """Back end ``plane``: begin to receive a version while answers go on."""
        self.weight_transfer_engine.fetch()

    def mend_cpu_fault(self, name: str, is_mended: bool) -> None:
        """Switch one patch off, to see whether vLLM still has the fault, and on again."""
        cpu_faults.FAULTS[name].is_mended = is_mended
