"""What ``--check`` says of remote teachers: limits, what is not given, and replicas that disagree."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from engine.check.finding import Finding
from engine.check.look import Inputs, check
from engine.errors import RecipeError
from engine.objective_config import ObjectiveConfig
from engine.recipe import DataConfig, Recipe, SamplerConfig, StudentConfig, VllmTeacher
from tests.support.models import tiny_model, write_jsonl
from tests.teacher.test_vllm_client import Provider


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "Why?"}])
    return tiny_model(folder, hidden=16, layers=1)


@asynccontextmanager
async def serving(provider: Provider) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", provider.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def recipe_of(student: Path, *urls: str, objective: ObjectiveConfig | None = None, **teacher: Any) -> Recipe:
    return Recipe(
        name="r",
        steps=1,
        student=StudentConfig(path=str(student)),
        teacher=VllmTeacher(urls=urls, **teacher),
        data=DataConfig(path=str(student / "prompts.jsonl"), max_prompt_tokens=32),
        sampler=SamplerConfig(max_new_tokens=16),
        objective=objective or ObjectiveConfig(),
    )


async def look(recipe: Recipe) -> tuple[Finding, Inputs | None]:
    checked = await check(recipe, out=None, resume=False)
    (finding,) = (finding for finding in checked.findings if finding.subject == "teacher")
    return finding, checked.inputs


async def test_a_cap_below_what_is_wanted_is_refused_unless_the_recipe_lowers_it(student: Path) -> None:
    async with serving(Provider(cap=20)) as url:
        refused, _ = await look(recipe_of(student, url))
        lowered, inputs = await look(recipe_of(student, url, on_top_k_cap="lower"))
        enough, whole = await look(recipe_of(student, url, top_k=20))

    assert refused.state == "wrong"
    assert "gives at most the top 20, the recipe asks for 64" in refused.text
    assert "teacher.on_top_k_cap='lower'" in refused.text
    assert lowered.state == "ok"
    assert "the top 64 that are wanted are lowered to the 20 that it gives" in lowered.text
    assert inputs is not None
    assert inputs.most_top_k == 20
    assert enough.state == "ok"
    assert whole is not None
    assert whole.most_top_k is None


async def test_what_was_seen_and_what_was_believed_is_said(student: Path) -> None:
    provider = Provider()
    async with serving(provider) as url:
        seen, _ = await look(recipe_of(student, url, top_k=8))
        provider.says["/tokenize"] = 404, {"detail": "Not Found"}
        refused, _ = await look(recipe_of(student, url, top_k=8))
        believed, _ = await look(recipe_of(student, url, top_k=8, model=str(student)))

    assert "which it does not say itself, 0 of its tokens compared" in seen.text
    assert refused.state == "wrong"
    assert "teacher.model" in refused.text
    assert believed.state == "ok"
    assert "its tokens not seen, teacher.model believed" in believed.text


async def test_ids_of_the_students_own_need_a_server_that_scores_them(student: Path) -> None:
    objective = ObjectiveConfig(kind="student_topk_reverse_kl", k=4)
    async with serving(Provider()) as url:
        finding, _ = await look(recipe_of(student, url, top_k=8, objective=objective))

    assert finding.state == "wrong"
    assert "prompt_logprob_token_ids" in finding.text
    assert "python -m teacher" in finding.text


@pytest.mark.parametrize("action", ["warn", "refuse"])
async def test_replicas_that_disagree_are_told_with_the_number(student: Path, action: str) -> None:
    async with serving(Provider()) as one, serving(Provider(logprob=-4.0)) as other:
        finding, _ = await look(recipe_of(student, one, other, top_k=8, on_disagreement=action))

    assert finding.state == ("ok" if action == "warn" else "wrong")
    assert f"teacher {other} says of a fixed text what differs from the answer of {one} by 1 nats" in finding.text


async def test_a_server_that_is_not_there_is_named_with_the_command_that_starts_one(student: Path) -> None:
    finding, _ = await look(recipe_of(student, "http://127.0.0.1:9"))

    assert finding.state == "wrong"
    assert "vllm serve DIR --enable-scale-out --max-logprobs 64 --port 9" in finding.text


def test_a_deterministic_run_is_refused_as_no_answer_is_scored_alone(student: Path) -> None:
    with pytest.raises(RecipeError, match="scores each answer alone"):
        msgspec.structs.replace(recipe_of(student, "http://127.0.0.1:9"), deterministic=True, max_staleness=0)
