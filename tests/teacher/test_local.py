"""The teacher in process: loaded by the first call, closed at any time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ModelError, TeacherRefused, TeacherUnavailable
from engine.recipe import LocalTeacher as LocalTeacherConfig
from teacher.folder import read_config, refuse_quantised
from teacher.local import LocalTeacher
from teacher.protocol import Scores
from tests.support.models import tiny_model


async def test_calls_that_come_together_load_the_model_once_and_share_a_batch(teacher_folder: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))

    answers = await asyncio.gather(*(teacher.score(prompt_ids=[1, 2], response_ids=[n, 3], top_k=2) for n in range(4)))

    assert [answer.top_ids.shape for answer in answers] == [(2, 2)] * 4
    assert teacher.statistics().batches_total == 1
    await teacher.close()


async def test_a_whole_vocabulary_comes_in_the_order_of_its_ids_beside_shorter_lists(teacher_folder: Path) -> None:
    teacher = LocalTeacher(LocalTeacherConfig(model=str(teacher_folder)))

    async def ask(top_k: int) -> Scores:
        return await teacher.score(prompt_ids=[1, 2], response_ids=[7, 3], top_k=top_k)

    whole, few, nearly = await asyncio.gather(ask(384), ask(5), ask(383))

    assert teacher.statistics().batches_total == 1
    assert (whole.top_ids == np.arange(384)).all()
    np.testing.assert_allclose(np.exp(whole.top_logprobs.astype(np.float64)).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(whole.sampled_logprobs, whole.top_logprobs[[0, 1], [7, 3]])
    for some in (few, nearly):
        assert (np.diff(some.top_logprobs, axis=1) <= 0).all()
        np.testing.assert_array_equal(np.take_along_axis(whole.top_logprobs, some.top_ids, 1), some.top_logprobs)
    alone = await ask(5)
    np.testing.assert_array_equal(alone.top_ids, few.top_ids)
    np.testing.assert_allclose(alone.top_logprobs, few.top_logprobs, rtol=0, atol=1e-6)
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
