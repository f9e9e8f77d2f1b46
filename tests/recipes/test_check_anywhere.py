"""Every recipe that comes with the project, checked and shown on a machine that has neither its models nor a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.run import main
from tests.e2e.runs import ROOT

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if "\ndef recipe(" in path.read_text())
FOR_GPUS = {
    "qwen3": ("needs 1 GPU (", "hf download Qwen/Qwen3-0.6B --local-dir {folder}/Qwen3-0.6B"),
    "qwen3_megatron": ("needs 2 GPUs (", "hf download Qwen/Qwen3-0.6B --local-dir {folder}/Qwen3-0.6B"),
    "moonlight_dsv3": ("needs 8 GPUs (", "hf download OWNER/NAME --local-dir {folder}/Moonlight-16B-A3B"),
}


def check(recipe: Path, folder: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """With nothing of the recipe's in ``folder``, which is also where it is called."""
    monkeypatch.chdir(folder)
    where = f"models={folder}" if recipe.stem in FOR_GPUS else f"student.path={folder / 'student'}"
    return main([str(recipe), "--check", "--set", where, *options])


@pytest.mark.skipif(torch.cuda.is_available(), reason="may be the machine that runs it")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_for_gpus_is_open_here_and_one_for_the_cpu_is_wrong(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = check(recipe, tmp_path, monkeypatch=monkeypatch)
    lines = capfd.readouterr().out.splitlines()

    if recipe.stem in FOR_GPUS:
        gpus, command = FOR_GPUS[recipe.stem]
        assert code == 0
        assert not any(line.startswith("WRONG") for line in lines)
        assert any(line.startswith(f"open  devices: {gpus}") for line in lines)
        to_do = [line.strip() for line in lines[lines.index("that runs it. There:") + 1 :]]
        assert to_do[0] == command.format(folder=tmp_path)
        assert to_do[1].startswith("hf download openai/gsm8k --repo-type dataset --local-dir ")
        assert "python -m teacher --backend vllm" in to_do[-2]
        assert to_do[-1] == f"python -m engine.run {recipe} --set models={tmp_path} --check"
        assert len(to_do) == len(set(to_do)), "each command once"
    else:
        assert code == 2
        assert any(line.startswith(f"WRONG student: student.path '{tmp_path}") for line in lines)
        assert not any(line.startswith("open") for line in lines)
    assert list(tmp_path.iterdir()) == [], "nothing was started"


@pytest.mark.skipif(torch.cuda.is_available(), reason="may be the machine that runs it")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_document_says_which_findings_are_open(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = check(recipe, tmp_path, "--show", "--json", monkeypatch=monkeypatch)
    document = json.loads(capfd.readouterr().out)

    is_for_gpus = recipe.stem in FOR_GPUS
    states = {finding["state"] for finding in document["findings"]}
    assert (code == 0) is document["ok"] is document["elsewhere"] is is_for_gpus
    assert not document["ready"]
    assert ("open" in states) is is_for_gpus
    assert ("wrong" in states) is not is_for_gpus
    assert document["recipe"]["student"]["path"].startswith(str(tmp_path))
    assert [actor["name"] for actor in document["actors"]][:2] == ["prompt_feeder", "sampler"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_shown_anywhere(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--show"]) == 0

    shown = capfd.readouterr().out
    assert "[learner]" in shown
    assert '"max_staleness":' in shown
