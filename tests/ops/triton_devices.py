"""Where the tests of Triton kernels run: interpreted on CPU, and on a card where there is one."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED: bool = triton.knobs.runtime.interpret

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="there is a card: nothing is interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
