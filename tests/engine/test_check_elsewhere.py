"""A recipe for GPUs, checked on a machine without one: what is there is checked, what is not there is left open."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.check.look import Checked, check
from engine.megatron_config import MegatronConfig
from engine.recipe import (
    DataConfig,
    HttpTeacher,
    LearnerConfig,
    LocalTeacher,
    NodeConfig,
    Recipe,
    SamplerConfig,
    StudentConfig,
    VllmConfig,
    VllmTeacher,
)
from tests.engine.test_check_teacher import serving
from tests.support.models import tiny_model, write_jsonl
from tests.teacher.test_vllm_client import Provider

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, so it may be the machine that runs it")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "student", hidden=16, layers=1)
    tiny_model(folder / "teacher", hidden=16, layers=1, seed=3)
    tiny_model(folder / "stranger", hidden=16, layers=1, vocab=300, seed=5)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "Why?"}, {"prompt": "How?"}])
    return folder


def recipe_of(world: Path, *, device: str = "cuda:0", student: str = "student", **more: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "r",
        "steps": 1,
        "student": StudentConfig(path=str(world / student)),
        "teacher": LocalTeacher(model=str(world / "teacher")),
        "data": DataConfig(path=str(world / "prompts.jsonl"), max_prompt_tokens=32),
        "sampler": SamplerConfig(device=device, max_new_tokens=16),
    }
    return Recipe(**(settings | more))


async def look(recipe: Recipe, *, may_run_elsewhere: bool = True) -> Checked:
    return await check(recipe, out=None, resume=False, may_run_elsewhere=may_run_elsewhere)


def states(checked: Checked) -> dict[str, str]:
    return {finding.subject: finding.state for finding in checked.findings}


async def test_what_is_there_is_checked_and_only_the_machine_is_left_open(world: Path) -> None:
    checked = await look(recipe_of(world))

    opened = {subject for subject, state in states(checked).items() if state == "open"}
    assert opened == {"devices", "disk"}
    assert {"student", "weights", "prompts", "lengths", "teacher"} <= states(checked).keys()
    assert checked.wrong == ()
    assert checked.inputs is None, "what is open does not start"


async def test_with_nothing_there_all_of_it_is_open(world: Path) -> None:
    nowhere = world / "nowhere"
    bring = {str(nowhere / "student"): "fetch the student", str(nowhere / "prompts.jsonl"): "fetch the prompts"}
    checked = await look(recipe_of(nowhere, bring=bring))

    assert set(states(checked).values()) == {"open", "ok"}
    by_subject = {finding.subject: finding for finding in checked.findings}
    assert by_subject["student"].to_do == "fetch the student"
    assert by_subject["prompts"].to_do == "fetch the prompts"
    assert by_subject["teacher"].state == "open"
    assert by_subject["devices"].text == "needs 1 GPU (sampler.device=cuda:0, learner.device=cpu, teacher.device=cpu)"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
async def test_a_start_takes_nothing_open(world: Path, device: str) -> None:
    checked = await look(recipe_of(world / "nowhere", device=device), may_run_elsewhere=False)

    assert {"student", "prompts", "teacher"} <= {finding.subject for finding in checked.wrong}
    assert "open" not in states(checked).values()
    assert (device == "cpu") is (states(checked)["devices"] == "ok")


async def test_a_wrong_path_in_a_recipe_for_the_cpu_is_wrong_anywhere(world: Path) -> None:
    checked = await look(recipe_of(world, device="cpu", student="stuudent"))

    assert [finding.subject for finding in checked.wrong] == ["student"]
    assert not checked.elsewhere


async def test_on_a_machine_with_a_gpu_what_is_missing_is_wrong(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.check.look.num_gpus_here", lambda: 1)
    checked = await look(recipe_of(world, device="cuda:3", student="nowhere"))

    assert {"student", "devices"} == {finding.subject for finding in checked.wrong}


@pytest.mark.parametrize("student", ["student", "nowhere"])
async def test_a_malformed_row_is_wrong_with_and_without_a_student(world: Path, tmp_path: Path, student: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    checked = await look(recipe_of(world, student=student, data=DataConfig(path=str(path), max_prompt_tokens=32)))

    (finding,) = checked.wrong
    assert finding.subject == "prompts"
    assert f"{path}:3: not JSON" in finding.text


async def test_a_teacher_of_another_vocabulary_is_wrong(world: Path) -> None:
    checked = await look(recipe_of(world, teacher=LocalTeacher(model=str(world / "stranger"))))

    (finding,) = checked.wrong
    assert finding.subject == "teacher"
    assert "token ids mean different things" in finding.text


async def test_a_student_whose_tokenizer_is_broken_is_wrong(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "student", tmp_path / "student")
    (tmp_path / "student" / "tokenizer.json").write_text("{")
    checked = await look(recipe_of(world, student=str(tmp_path / "student")))

    assert "student" in {finding.subject for finding in checked.wrong}


async def test_weights_of_another_model_are_wrong_and_none_are_open(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(world / "student", folder)
    (folder / "model.safetensors").unlink()
    without = await look(recipe_of(world, student=str(folder)))
    save_file({"model.embed_tokens.weight": torch.zeros(3, 5)}, folder / "model.safetensors")
    with_others = await look(recipe_of(world, student=str(folder)))

    assert states(without)["weights"] == "open"
    assert without.wrong == ()
    assert [finding.subject for finding in with_others.wrong] == ["weights"]


@pytest.mark.parametrize(("ranks", "state"), [(1, "ok"), (64, "wrong")])
async def test_a_layout_is_held_against_a_config_that_is_all_there_is(
    world: Path, tmp_path: Path, ranks: int, state: str
) -> None:
    (tmp_path / "student").mkdir()
    shutil.copy(world / "student" / "config.json", tmp_path / "student")
    learner = LearnerConfig(backend="megatron", device="cuda", megatron=MegatronConfig(tensor_parallel=ranks))
    checked = await look(recipe_of(world, student=str(tmp_path / "student"), learner=learner))

    assert states(checked)["layout"] == state
    assert states(checked)["student"] == "open"


async def test_a_teacher_that_answers_is_held_to_its_limits(world: Path) -> None:
    async with serving(Provider(cap=20)) as url:
        capped = await look(recipe_of(world, teacher=VllmTeacher(urls=(url,))))
        away = await look(recipe_of(world, teacher=VllmTeacher(urls=("http://127.0.0.1:9",))))

    assert [finding.subject for finding in capped.wrong] == ["teacher"]
    (teacher,) = (finding for finding in away.findings if finding.subject == "teacher")
    assert (teacher.state, teacher.text) == ("open", "no teacher at http://127.0.0.1:9")
    assert teacher.to_do is not None
    assert teacher.to_do.startswith("vllm serve")


async def test_a_service_that_is_no_teacher_is_there_and_wrong(world: Path) -> None:
    provider = Provider()
    provider.says["/v1/info"] = 200, {"hello": 1}
    async with serving(provider) as url:
        checked = await look(recipe_of(world, teacher=HttpTeacher(urls=(url,))))

    (finding,) = checked.wrong
    assert finding.text.startswith(f"no teacher at {url}, but something answers; ")


async def test_a_replica_that_is_away_does_not_hide_what_is_wrong_with_another(world: Path) -> None:
    async with serving(Provider(cap=20)) as url:
        checked = await look(recipe_of(world, teacher=VllmTeacher(urls=("http://127.0.0.1:9", url))))

    (finding,) = checked.wrong
    assert finding.subject == "teacher"
    assert url in finding.text


async def test_a_kind_of_file_that_nobody_reads_is_wrong_before_it_is_fetched(world: Path) -> None:
    checked = await look(recipe_of(world, data=DataConfig(path=str(world / "train.csv"), max_prompt_tokens=32)))

    assert ["unknown kind of file '.csv'" in finding.text for finding in checked.wrong] == [True]


@pytest.mark.parametrize(("content", "state"), [("\n", "wrong"), (None, "open")])
async def test_a_token_file_that_is_there_must_hold_a_token(
    world: Path, tmp_path: Path, content: str | None, state: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    checked = await look(recipe_of(world, node=NodeConfig(token_file=str(path))))

    assert states(checked)["token"] == state


async def test_a_name_that_is_no_device_is_wrong(world: Path) -> None:
    checked = await look(recipe_of(world, learner=LearnerConfig(device="teapot")))

    assert [finding.subject for finding in checked.wrong] == ["devices"]


@pytest.mark.parametrize(("max_length", "state"), [(47, "wrong"), (48, "ok"), (None, "ok")])
async def test_an_engine_must_hold_the_longest_text(world: Path, max_length: int | None, state: str) -> None:
    vllm = VllmConfig(max_length=max_length)
    checked = await look(
        recipe_of(world, sampler=SamplerConfig(backend="vllm", device="cuda:0", max_new_tokens=16, vllm=vllm))
    )

    assert states(checked)["lengths"] == state
