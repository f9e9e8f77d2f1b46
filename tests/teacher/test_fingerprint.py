"""When two folders hold the same weights, and what of a change is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from teacher.fingerprint import weights_fingerprint
from tests.support.models import tiny_model

BIG = 3 << 20
"""Bytes: more than is sampled of a file."""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    save_file({"w": torch.arange(BIG).remainder(251).to(torch.uint8)}, folder / "model.safetensors")
    return folder


def test_it_is_of_the_weights_and_not_of_the_folder(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "teacher", seed=1)
    found = weights_fingerprint(folder)
    copied = shutil.copytree(folder, tmp_path / "another name")
    tensors = load_file(copied / "model.safetensors")
    save_file(dict(reversed(tensors.items())), copied / "model.safetensors", metadata={"made_by": "somebody else"})
    (copied / "config.json").write_text("{}")
    (copied / "adapter.safetensors").write_bytes(b"of another program")

    assert len(found) == 32
    assert weights_fingerprint(copied) == found
    assert weights_fingerprint(tiny_model(tmp_path / "elsewhere" / "teacher", seed=2)) != found


def test_names_dtypes_and_shapes_are_part_of_it(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32)
    variants = [
        {"a": weight},
        {"b": weight},
        {"a": weight.reshape(2, 3)},
        {"a": weight.view(torch.int32)},
        {"a": weight[:3].clone(), "b": weight[3:].clone()},
        {"a": weight[:5].clone()},
        {},
    ]
    found = set()
    for variant in variants:
        save_file(variant, tmp_path / "model.safetensors")
        found.add(weights_fingerprint(tmp_path))

    assert len(found) == len(variants)


@given(place=st.integers(0, 499), bit=st.integers(0, 7))
def test_of_a_small_file_every_bit_is_seen(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("small")
    weight = torch.arange(500).remainder(251).to(torch.uint8)
    save_file({"w": weight}, folder / "model.safetensors")
    before = weights_fingerprint(folder)
    weight[place] ^= 1 << bit
    save_file({"w": weight}, folder / "model.safetensors")

    assert weights_fingerprint(folder) != before


@pytest.mark.parametrize("start", [0, 1_000_000, BIG - 16_384])
def test_of_a_big_file_any_stretch_as_long_as_a_gap_is_seen(big: Path, tmp_path: Path, start: int) -> None:
    weight = load_file(big / "model.safetensors")["w"]
    weight[start : start + 16_384] += 1
    save_file({"w": weight}, tmp_path / "model.safetensors")

    assert weights_fingerprint(tmp_path) != weights_fingerprint(big)


@pytest.mark.parametrize("place", [0, BIG - 1])
def test_both_ends_of_a_big_file_are_seen(big: Path, tmp_path: Path, place: int) -> None:
    weight = load_file(big / "model.safetensors")["w"]
    weight[place] += 1
    save_file({"w": weight}, tmp_path / "model.safetensors")

    assert weights_fingerprint(tmp_path) != weights_fingerprint(big)


def test_shards_are_all_read(tmp_path: Path) -> None:
    found = set()
    for value in (1.0, 2.0):
        for name, shard in (("a", "one.safetensors"), ("b", "two.safetensors")):
            save_file({name: torch.full((4,), value if name == "b" else 0.0)}, tmp_path / shard)
        index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        found.add(weights_fingerprint(tmp_path))

    assert len(found) == 2


def test_weights_of_the_older_format_have_one_too(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"a" * 10_000)
    before = weights_fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a" * 9_999 + b"b")

    assert weights_fingerprint(tmp_path) != before


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x05" + 7 * b"\0" + b"{]", b"\x02" + 7 * b"\0" + b"[]"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelError, match="has no weight files"):
        weights_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors' cannot be read as weights"):
        weights_fingerprint(tmp_path)
