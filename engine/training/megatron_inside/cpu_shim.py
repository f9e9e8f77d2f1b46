"""Megatron on a machine without CUDA: what it says of CUDA unconditionally is made to mean the CPU.

Three parts: entry points of ``torch.cuda`` that answer for the CPU; a mode of torch that reads ``device="cuda"``,
``.cuda()`` and ``.type()`` that way; and functions of Megatron that neither can reach. Nothing here is used where there
is a CUDA device.

``install`` comes before the first import of ``megatron.core``, ``install_megatron`` after it. Both hold for the rest of
the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.training.megatron_inside.versions import check_version

_CPU = torch.device("cpu")


def install() -> None:
    """Idempotent.

    Raises:
        RuntimeError: another version of Megatron-core than the one that this was written for.
    """
    if torch.cuda.is_available() or _Installed.mode is not None:
        return
    check_version("a learner without CUDA")
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # One generator stands for CUDA's; tensor-parallel ranks still draw from streams of their own.
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    _Installed.mode = _CudaIsCpu()
    _Installed.mode.__enter__()  # type: ignore[no-untyped-call]


def install_megatron() -> None:
    """What has names of its own in Megatron's modules."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_host


class _Installed:
    mode: _CudaIsCpu | None = None


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not options:
            # The optimizer tells parameters apart by "torch.cuda.FloatTensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _means_cuda(options.get("device")):
            options["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if options.get("pin_memory"):
            options["pin_memory"] = False
        return func(*args, **options)


def _means_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _as_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The original turns a tensor into numpy only on its way from a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


class _Stream:
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0
