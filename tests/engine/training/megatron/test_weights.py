"""Weights go into Megatron and come out again, bit for bit, whatever family and layout. Real ranks under gloo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelError
from engine.training.export import named_tensors
from engine.transport.manifest import digest_of
from tests.engine.training.megatron.students import STUDENTS, make_student
from tests.support.models import load
from tests.support.worlds import Worlds

ON_RANKS = "tests.engine.training.megatron.weights_on_ranks"

DENSE_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_parallel": 2, "sequence_parallel": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {},
    "TP2 SP": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "PP3": {"pipeline_parallel": 3, "first_stage_layers": 1, "last_stage_layers": 1},
    "CP2": {"context_parallel": 2},
    "DP2": {"data_parallel": 2},
    "TP2 SP PP2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"data_parallel": 2, "expert_parallel": 2},
    "EP2 PP2": {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
    "TP2 SP EP2 PP2": {"tensor_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
}

SAVING = ("1", "TP2", "TP2 SP PP2", "TP2 SP EP2 PP2")
"""Layouts whose weights are also written to a folder."""


class Saved(NamedTuple):
    """A student as transformers saved it."""

    folder: Path
    fingerprints: list[tuple[str, str]]
    """Name and digest of each of its tensors."""


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    saved = {}
    for name in STUDENTS:
        folder = make_student(name, tmp_path_factory.mktemp("student"))
        saved[name] = Saved(folder, fingerprints_of(folder))
    return saved


def fingerprints_of(folder: Path) -> list[tuple[str, str]]:
    return [(name, digest_of([(name, tensor)])) for name, tensor in named_tensors(load(folder))]


def num_ranks(layout: dict[str, Any]) -> int:
    size = 1
    for name in ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel"):
        size *= layout.get(name, 1)
    return size


@pytest.mark.parametrize("layout_name", [*LAYOUTS, *DENSE_LAYOUTS, *EXPERT_LAYOUTS])
def test_there_and_back_is_the_identity(
    layout_name: str, students: dict[str, Saved], worlds: Worlds, tmp_path: Path
) -> None:
    """Names, order, dtypes, shapes and bits are those of the transformers model; what is saved loads as that model."""
    layout = (LAYOUTS | DENSE_LAYOUTS | EXPERT_LAYOUTS)[layout_name]
    for number, (name, student) in enumerate(students.items()):
        other = DENSE_LAYOUTS if hasattr(STUDENTS[name], "moe_intermediate_size") else EXPERT_LAYOUTS
        if layout_name in other:
            continue
        saved = tmp_path / str(number) if layout_name in SAVING else None
        of_ranks = worlds.run(f"{ON_RANKS}:there_and_back", num_ranks(layout), student.folder, layout, saved)

        assert of_ranks[0] == [student.fingerprints] * 2, f"{name} in {layout_name}"
        assert all(found == [[], []] for found in of_ranks[1:])
        if saved is not None:
            assert fingerprints_of(saved) == student.fingerprints


def test_a_student_trained_in_bfloat16_is_saved_so_and_its_routers_choose_as_before(
    students: dict[str, Saved], worlds: Worlds, tmp_path: Path
) -> None:
    """A bias of the router that is rounded with the weights sends tokens to other experts."""
    folder = shutil.copytree(students["moonlight"].folder, tmp_path / "source")
    (folder / "tokenizer_config.json").write_text("{}")

    worlds.run(f"{ON_RANKS}:there_and_back", 1, folder, {"dtype": "bfloat16"}, tmp_path / "saved")

    assert (tmp_path / "saved" / "tokenizer_config.json").is_file()
    assert msgspec.json.decode((tmp_path / "saved" / "config.json").read_bytes())["dtype"] == "bfloat16"
    found = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert found[name].dtype == expected.dtype
        assert found[name].equal(expected), name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model.norm.weight": None}, r"its weights lack 1 tensors, among them 'model.norm.weight'"),
        ({"model.norm.bias": torch.zeros(32)}, r"takes 1 of its tensors, among them 'model.norm.bias'"),
        ({"model.norm.weight": torch.zeros(31)}, r"model.norm.weight has shape \(31,\) in the files and \(32,\) by"),
    ],
)
def test_a_folder_whose_weights_are_not_its_configs_is_refused_by_name(
    change: dict[str, Tensor | None], complaint: str, students: dict[str, Saved], worlds: Worlds, tmp_path: Path
) -> None:
    folder = shutil.copytree(students["qwen3"].folder, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")

    with pytest.raises(ModelError, match=complaint):
        worlds.run(f"{ON_RANKS}:there_and_back", 1, folder, {}, None)


def test_what_a_checkpoint_has_for_others_is_passed_over(
    students: dict[str, Saved], worlds: Worlds, tmp_path: Path
) -> None:
    """A second copy of a tied head, frequencies of positions, layers that predict further tokens."""
    folder = shutil.copytree(students["qwen3"].folder, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")

    found, *_ = worlds.run(f"{ON_RANKS}:there_and_back", 1, folder, {}, None)

    assert found == [students["qwen3"].fingerprints] * 2
