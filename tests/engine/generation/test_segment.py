"""A version in shared memory is what was sent, under the names of a checkpoint, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.generation.protocol import Bucket
from engine.generation.segment import Packed, Segment
from engine.generation.shareable import HostMemory
from engine.generation.version import TensorGroup
from engine.generation.vllm_model import tensor_groups_of
from engine.recipe import StudentConfig
from engine.training.export import buckets, named_tensors
from tests.support.models import load, tiny_model


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment(HostMemory())
    yield segment
    segment.close()


def read(packed: Packed) -> dict[str, torch.Tensor]:
    """As a process that knows nothing but ``packed`` sees it."""
    assert packed.address.path is not None
    memory = bytearray(Path(packed.address.path).read_bytes()[: packed.num_bytes])
    return {
        name: torch.frombuffer(
            memory, dtype=getattr(torch, dtype), count=int(torch.Size(shape).numel()), offset=offset
        ).view(shape)
        for name, dtype, shape, offset in zip(packed.names, packed.dtypes, packed.shapes, packed.offsets, strict=True)
    }


def pack(segment: Segment, sent: Iterator[Bucket], groups: list[TensorGroup]) -> Packed:
    packed = segment.pack(sent, groups, digest=None, is_wanted=lambda: True)
    assert packed is not None
    return packed


def test_a_version_of_a_dense_model_arrives_bit_for_bit_and_the_next_one_replaces_it(
    segment: Segment, tmp_path: Path
) -> None:
    folders = [tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    groups = tensor_groups_of(StudentConfig(path=str(folders[0])))

    for folder in folders:
        named = named_tensors(load(folder))
        arrived = read(pack(segment, buckets(named, bucket_bytes=10_000), groups))

        assert list(arrived) == [name for name, _ in named]
        assert all(torch.equal(arrived[name], tensor) for name, tensor in named)


def test_fused_experts_arrive_one_by_one_as_a_checkpoint_has_them(segment: Segment, tmp_path: Path) -> None:
    """transformers itself writes that checkpoint."""
    from safetensors.torch import load_file

    folder = tiny_model(tmp_path, arch="deepseek_v3", hidden=64, layers=2, tied=False)
    named = named_tensors(load(folder))

    arrived = read(
        pack(segment, buckets(named, bucket_bytes=1 << 20), tensor_groups_of(StudentConfig(path=str(folder))))
    )

    saved = load_file(folder / "model.safetensors")
    assert arrived.keys() == saved.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in saved.items())


def test_a_router_bias_is_part_of_a_version_for_engines_that_load_layer_by_layer(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, arch="deepseek_v3", hidden=64, layers=2, tied=False)

    groups = tensor_groups_of(StudentConfig(path=str(folder)))

    (bias,) = [group for group in groups if group.names[0].endswith("e_score_correction_bias")]
    assert bias.is_required


def test_what_is_not_wanted_any_more_is_not_packed_to_the_end(segment: Segment, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    answers = iter([True, False])

    packed = segment.pack(
        buckets(named_tensors(load(folder)), bucket_bytes=1),
        tensor_groups_of(StudentConfig(path=str(folder))),
        digest=None,
        is_wanted=lambda: next(answers),
    )

    assert packed is None


def test_memory_and_file_are_given_back(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:weights")

    folder = tiny_model(tmp_path)
    named, groups = named_tensors(load(folder)), tensor_groups_of(StudentConfig(path=str(folder)))
    files = len(os.listdir("/proc/self/fd"))

    for _ in range(3):
        segment = Segment(HostMemory())
        pack(segment, buckets(named, bucket_bytes=1 << 20), groups)
        assert mapped() == 1
        segment.close()
        segment.close()

    assert mapped() == 0
    assert len(os.listdir("/proc/self/fd")) == files
