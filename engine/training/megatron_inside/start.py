"""Import Megatron: what must be in place before, and what is put right after. Runs before any module of the package."""

from __future__ import annotations

import gc
import warnings

from engine.training.megatron_inside import cpu_shim, without_te

cpu_shim.install()
with warnings.catch_warnings():
    # It says at import, once per optional library, that this is not installed (TransformerEngine, Apex, ModelOpt).
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401
without_te.mend()
cpu_shim.install_megatron()
# What imports leave stays. Megatron collects garbage at every save and load, and would walk through all of it each
# time: 0.8 s of 0.9 for a small model.
gc.freeze()
