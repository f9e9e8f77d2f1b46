from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.generation import staging
from engine.training import hf
from engine.training.export import buckets, named_tensors
from engine.transport.manifest import digest_of
from tests.engine.training.cases import make_step, make_trainer, started
from tests.support.models import load, tiny_model


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("qwen3", True), ("gpt2", True)])
def test_the_names_are_those_of_a_saved_model_with_tied_ones_once(tmp_path: Path, arch: str, tied: bool) -> None:
    from safetensors import safe_open

    folder = tiny_model(tmp_path, arch=arch, tied=tied)  # type: ignore[arg-type]
    model = load(folder)

    names = [name for name, _ in named_tensors(model)]
    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert set(names) == set(saved.keys())
    assert names == [name for name in model.state_dict() if name in set(names)]
    assert ("lm_head.weight" in names) is not tied


def test_persistent_buffers_are_part_of_a_version(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path))
    layer = model.get_submodule("model.layers.0")
    layer.register_buffer("expert_bias", torch.ones(3))
    layer.register_buffer("scratch", torch.ones(3), persistent=False)

    names = [name for name, _ in named_tensors(model)]
    assert "model.layers.0.expert_bias" in names
    assert "model.layers.0.scratch" not in names


@given(sizes=st.lists(st.integers(1, 40), max_size=12), limit=st.integers(1, 100))
def test_buckets_keep_the_order_and_the_limit_and_share_memory(sizes: list[int], limit: int) -> None:
    tensors = [(f"t{i}", torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]

    found = list(buckets(tensors, bucket_bytes=limit))
    flat = [pair for bucket in found for pair in zip(bucket.names, bucket.tensors, strict=True)]
    assert [name for name, _ in flat] == [name for name, _ in tensors]
    assert all(a.data_ptr() == b.data_ptr() for (_, a), (_, b) in zip(flat, tensors, strict=True))
    for bucket in found:
        assert len(bucket.names) == 1 or sum(t.numel() for t in bucket.tensors) <= limit
    for bucket, following in pairwise(found):
        assert sum(t.numel() for t in bucket.tensors) + following.tensors[0].numel() > limit


def test_every_bucket_says_when_the_version_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is of the moment of the optimizer's step, not of the export."""
    moments = iter(range(100))
    monkeypatch.setattr(hf, "record", lambda device: next(moments))
    trainer = started(tiny_model(tmp_path))

    def exported() -> set[object]:
        return {bucket.written for bucket in trainer.export(bucket_bytes=1 << 12)}

    assert exported() == exported() == {0}
    trainer.accumulate(make_step())
    assert exported() == {0}
    trainer.finish_step()
    assert exported() == {1}


def test_on_cpu_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    trainer = started(tiny_model(tmp_path))

    assert {bucket.written for bucket in trainer.export(bucket_bytes=1 << 12)} == {None}


@pytest.mark.gpu
def test_export_and_digest_wait_for_an_optimizer_that_is_still_at_work(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    training, copying = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    trainer = make_trainer(folder, device="cuda")
    with torch.cuda.stream(training):
        trainer.start()
        trainer.accumulate(make_step())
        torch.cuda.synchronize()
        step = trainer._loaded.optimizer.step

        def slow_step(**arguments: Any) -> None:
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
            step(**arguments)

        trainer._loaded.optimizer.step = slow_step  # type: ignore[method-assign]
        trainer.finish_step()
    with torch.cuda.stream(copying):
        digest = trainer.digest()
        copies = [
            (name, tensor.clone())
            for bucket in trainer.export(bucket_bytes=1 << 20)
            for name, tensor in zip(bucket.names, staging.written(bucket), strict=True)
        ]
    torch.cuda.synchronize()

    assert digest == digest_of(copies) == digest_of(named_tensors(trainer._loaded.student.model))


@given(
    num_bytes=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_changes_the_digest(num_bytes: int, dtype: torch.dtype, place: float, bit: int) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.arange(-(-num_bytes // size) * size, dtype=torch.int64).mul(37).remainder(251).to(torch.uint8)
    flipped = raw.clone()
    flipped[int(place * len(raw))] ^= 1 << bit

    assert digest_of([("w", raw.view(dtype))]) == digest_of([("w", raw.clone().view(dtype))])
    assert digest_of([("w", raw.view(dtype))]) != digest_of([("w", flipped.view(dtype))])


def test_the_digest_sees_names_shapes_dtypes_and_pieces_that_change_places() -> None:
    weight = torch.arange(2048.0).reshape(2, 1024)
    variants = [
        [("a", weight)],
        [("b", weight)],
        [("a", weight.reshape(1024, 2))],
        [("a", weight.view(torch.int32))],
        [("a", weight.flip(0))],
        [("a", weight[:1]), ("b", weight[1:])],
        [("a", -weight)],
        [("a", weight.t())],
        [],
    ]

    digests = [digest_of(variant) for variant in variants]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_of_values_not_of_memory_layout() -> None:
    weight = torch.randn(33, 77)

    assert digest_of([("w", weight)]) == digest_of([("w", nn.Parameter(weight.t().contiguous().t()))])
    assert digest_of([("w", torch.randn(1, 3 + 33 * 77)[0, 3:].copy_(weight.flatten()).view(33, 77))]) == digest_of(
        [("w", weight)]
    )


def test_the_digest_of_a_version_never_changes_meaning() -> None:
    """Checkpoints of other days carry it."""
    tensors = [("w", torch.arange(300, dtype=torch.int32)), ("b", torch.tensor([1.0, -2.0]))]

    assert digest_of(tensors) == "1c797ccf4c6050f1295832b9dea98753"
