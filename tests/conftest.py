"""What every test shares: the event loop, time, order, and the tests that a machine cannot run."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Callable, Mapping

import pytest

from tests.support.clock import ManualClock, Settle
from tests.support.clock import settle as settle_loop

# Before torch is imported anywhere: tests share the cores, and tiny models get slower with more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# A script starts jobs in the background with SIGINT ignored, and whatever a test then starts would ignore it, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before triton is imported anywhere: where there is no card its kernels are interpreted.
if importlib.util.find_spec("triton") is not None:
    import torch.cuda

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import hypothesis
except ModuleNotFoundError:
    # GPU tests also run in images that hold torch and pytest alone; the property tests are not among them.
    pass
else:
    # No deadline: a shared machine may stall any example.
    hypothesis.settings.register_profile("shared-machine", deadline=None)
    hypothesis.settings.load_profile("shared-machine")


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Async tests run on the loop that the product runs on."""
    import uvloop

    return {"uvloop": uvloop.new_event_loop}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture
def settle() -> Settle:
    """``await settle()``: every task has had its turns and waits for something else."""
    return settle_loop


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
