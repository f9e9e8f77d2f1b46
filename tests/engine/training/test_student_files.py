"""A folder in Hugging Face format, read by slices and written bucket by bucket."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelError
from engine.training.export import buckets
from engine.training.student_files import INDEX, SINGLE, WeightFiles, write_weights
from engine.transport.flat import spec_of

VERSION: list[tuple[str, Tensor]] = [
    ("a.weight", torch.randn(3, 5).bfloat16()),
    ("a.mlp.experts.gate_up_proj", torch.randn(4, 6, 5)),
    ("a.mlp.experts.down_proj", torch.randn(4, 5, 3)),
    ("b.weight", torch.randn(40, 5)[::2].t()),
    ("b.bias", torch.randn(7)),
]


def write(folder: Path, *, bucket_bytes: int, shard_bytes: int) -> None:
    specs = [spec_of(name, tensor) for name, tensor in VERSION]
    write_weights(specs, buckets(VERSION, bucket_bytes=bucket_bytes), folder, shard_bytes=shard_bytes)


def as_in_a_checkpoint() -> dict[str, Tensor]:
    named = dict(VERSION)
    gate_up, down = named.pop("a.mlp.experts.gate_up_proj"), named.pop("a.mlp.experts.down_proj")
    for expert in range(4):
        prefix = f"a.mlp.experts.{expert}"
        named[f"{prefix}.gate_proj.weight"], named[f"{prefix}.up_proj.weight"] = gate_up[expert].chunk(2)
        named[f"{prefix}.down_proj.weight"] = down[expert]
    return named


@given(bucket_bytes=st.sampled_from([1, 100, 1 << 20]), shard_bytes=st.sampled_from([1, 130, 300, 1 << 20]))
def test_what_is_written_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, bucket_bytes: int, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("student")
    write(folder, bucket_bytes=bucket_bytes, shard_bytes=shard_bytes)

    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = as_in_a_checkpoint()
    assert found.keys() == expected.keys()
    assert all(tensor.dtype == expected[name].dtype for name, tensor in found.items())
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    assert (folder / INDEX).exists() == (len(files) > 1) == (shard_bytes < 1 << 20)
    if len(files) > 1:
        weight_map = msgspec.json.decode((folder / INDEX).read_bytes())["weight_map"]
        assert weight_map == {name: file.name for file in files for name in load_file(file)}


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_slices_are_read_from_whichever_file_has_them(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path, bucket_bytes=1 << 20, shard_bytes=shard_bytes)

    with WeightFiles(tmp_path) as files:
        assert files.names == as_in_a_checkpoint().keys()
        for name, tensor in as_in_a_checkpoint().items():
            assert files.shape(name) == tensor.shape
            region = tuple(slice(size // 3, size) for size in tensor.shape)
            assert files.read(name, region).equal(tensor[region])


def test_a_version_that_is_not_the_announced_one_is_refused(tmp_path: Path) -> None:
    specs = [spec_of(name, tensor) for name, tensor in VERSION]

    with pytest.raises(ValueError, match=r"1 tensors did not come, among them 'b.bias'"):
        write_weights(specs, buckets(VERSION[:-1], bucket_bytes=1), tmp_path)
    with pytest.raises(ValueError, match=r"'b.bias' .* came twice"):
        write_weights(specs, buckets([*VERSION, VERSION[-1]], bucket_bytes=1), tmp_path)
    with pytest.raises(ValueError, match=r"'b.bias' of torch.float64 \(7,\) was not announced"):
        write_weights(specs, buckets([*VERSION[:-1], ("b.bias", torch.zeros(7).double())], bucket_bytes=1), tmp_path)


def test_a_folder_without_usable_weights_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither model"):
        WeightFiles(tmp_path)

    (tmp_path / SINGLE).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        WeightFiles(tmp_path)

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "missing.safetensors"}}')
    with WeightFiles(tmp_path) as files, pytest.raises(ModelError, match=r"missing.safetensors cannot be read"):
        files.shape("a")

    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        WeightFiles(tmp_path)
