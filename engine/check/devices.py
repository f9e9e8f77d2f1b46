"""The devices that a recipe names: that they are devices, how many there must be, and that they compute here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import RecipeError
from engine.recipe import LocalTeacher, Recipe, VllmConfig

if TYPE_CHECKING:
    import torch


def named_devices(recipe: Recipe) -> dict[str, str]:
    """Field → what it says."""
    named = {"sampler.device": recipe.sampler.device, "learner.device": recipe.learner.device}
    if isinstance(recipe.teacher, LocalTeacher):
        named["teacher.device"] = recipe.teacher.device
    return named


def num_gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def check_names(recipe: Recipe) -> dict[str, torch.device]:
    """The devices by field, whether this machine has them or not.

    Raises:
        RecipeError: a text that names no device, or one that this part of the recipe cannot use on any machine.
    """
    import torch

    devices = {}
    for field, name in named_devices(recipe).items():
        try:
            devices[field] = torch.device(name)
        except RuntimeError as error:
            raise RecipeError(f"{field}={name!r} is not a device: {error}") from error
    learner = devices["learner.device"]
    # Rank r computes on device r, so learner.device only says on which kind.
    if recipe.learner.backend == "megatron" and (learner.type not in ("cpu", "cuda") or learner.index is not None):
        raise RecipeError(
            f"learner.device={recipe.learner.device!r}: with learner.backend='megatron' it is 'cuda' (rank r on device "
            "r) or 'cpu'"
        )
    return devices


def check_devices(recipe: Recipe) -> tuple[str, None]:
    """That all are here and compute."""
    import torch

    num_gpus = num_gpus_here()
    for field, device in check_names(recipe).items():
        name = named_devices(recipe)[field]
        if device.type == "cuda":
            if field == "learner.device" and recipe.learner.backend == "megatron":
                _check_ranks(recipe.learner.megatron.num_ranks, num_gpus=num_gpus)
            if (device.index or 0) >= num_gpus:
                raise RecipeError(f"{field}={name!r}: this machine has {num_gpus} CUDA devices; use 'cpu'")
            if field == "sampler.device" and recipe.sampler.backend == "vllm":
                _check_engines(recipe.sampler.vllm, first=device.index or 0, num_gpus=num_gpus)
        try:
            torch.empty(1, device=device).cpu()
        except Exception as error:  # each back end has its own: RuntimeError, AssertionError, ImportError
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise RecipeError(f"{field}={name!r} cannot compute here: {reason}; use 'cpu' or 'cuda:N'") from error
    return _listed(recipe), None


def gpus_to_bring(recipe: Recipe) -> str:
    """What the machine that runs the recipe must have, in words.

    Raises:
        RecipeError: as ``check_names``.
    """
    num_gpus = 0
    for field, device in check_names(recipe).items():
        if device.type != "cuda":
            continue
        first, num_used = device.index or 0, 1
        if field == "learner.device" and recipe.learner.backend == "megatron":
            num_used = recipe.learner.megatron.num_ranks
        elif field == "sampler.device" and recipe.sampler.backend == "vllm":
            num_used = _num_used(recipe.sampler.vllm)
        num_gpus = max(num_gpus, first + num_used)
    return f"needs {num_gpus} GPU{'s' if num_gpus > 1 else ''} ({_listed(recipe)})"


def _listed(recipe: Recipe) -> str:
    return ", ".join(f"{field}={name}" for field, name in named_devices(recipe).items())


def _num_used(vllm: VllmConfig) -> int:
    return vllm.num_engines * vllm.tensor_parallel * vllm.data_parallel


def _check_engines(vllm: VllmConfig, *, first: int, num_gpus: int) -> None:
    if first + _num_used(vllm) > num_gpus:
        raise RecipeError(
            f"sampler.vllm: num_engines={vllm.num_engines} × tensor_parallel={vllm.tensor_parallel} × data_parallel="
            f"{vllm.data_parallel} need {_num_used(vllm)} devices from number {first} on, this machine has {num_gpus}; "
            "lower one of them"
        )


def _check_ranks(num_ranks: int, *, num_gpus: int) -> None:
    if num_gpus < num_ranks:
        raise RecipeError(
            f"learner.megatron: {num_ranks} ranks (tensor × pipeline × context × data parallel) need as many CUDA "
            f"devices, this machine has {num_gpus}; make the layout smaller, or set learner.device='cpu'"
        )
