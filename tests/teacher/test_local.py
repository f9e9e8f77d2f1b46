"""The teacher in process: loaded by the first call, closed at any time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from engine.errors import ModelError, TeacherRefused, TeacherUnavailable
from engine.recipe import LocalTeacher as LocalTeacherConfig
from teacher.folder import read_config, refuse_quantised
from teacher.local import LocalTeacher
from tests.support.models import tiny_model


async def test_calls_that_come_together_load_the_model_once_and_share_a_batch(teacher_folder: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))

    answers = await asyncio.gather(*(teacher.score(prompt_ids=[1, 2], response_ids=[n, 3], top_k=2) for n in range(4)))

    assert [answer.top_ids.shape for answer in answers] == [(2, 2)] * 4
    assert teacher.statistics().batches_total == 1
    await teacher.close()


async def test_a_folder_that_is_no_model_is_reported_by_every_call(tmp_path: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(tmp_path)))

    for _ in range(2):
        with pytest.raises(ModelError, match=r"has no config\.json"):
            await teacher.info()
    await teacher.close()


async def test_what_does_not_fit_is_refused(teacher_folder: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))

    with pytest.raises(TeacherRefused, match="vocabulary ends at 383"):
        await teacher.score(prompt_ids=[1], response_ids=[384], top_k=1)
    await teacher.close()


async def test_a_cancelled_first_call_leaves_the_load_to_the_others(teacher_folder: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))
    first, second = asyncio.create_task(teacher.info()), asyncio.create_task(teacher.info())
    await asyncio.sleep(0)
    first.cancel()

    assert (await second).vocab_size == 384
    await teacher.close()


async def test_a_closed_teacher_is_unavailable_loaded_or_not(teacher_folder: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))
    await teacher.close()
    await teacher.close()

    with pytest.raises(TeacherUnavailable, match="shutting down"):
        await teacher.score(prompt_ids=[1], response_ids=[2], top_k=1)


async def test_a_quantised_checkpoint_is_refused_as_its_errors_would_be_learnt(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    teacher = LocalTeacher(LocalTeacherConfig(model=str(folder)))

    with pytest.raises(ModelError, match=r"is quantised \(gptq\).*--allow-quantised"):
        await teacher.info()
    await teacher.close()

    read, _ = read_config(folder, trust_remote_code=False)
    refuse_quantised(read, folder=folder, is_allowed=True)
