"""For which version of Megatron-core the repairs of this package were written."""

from __future__ import annotations

from importlib.metadata import version

REPAIRED = "0.16.1"


def check_version(purpose: str) -> None:
    """Refuse to repair what was not looked at.

    Raises:
        RuntimeError: another version is installed.
    """
    found = version("megatron-core")
    if found != REPAIRED:
        raise RuntimeError(
            f"{purpose} needs megatron-core {REPAIRED}, whose inner names engine.training.megatron_inside replaces, "
            f"and {found} is installed; install megatron-core=={REPAIRED}, or train on CUDA with TransformerEngine"
        )
