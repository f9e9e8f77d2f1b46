"""The teacher: that it answers, speaks the student's vocabulary, and gives what the recipe wants of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import msgspec

from engine.check.asked import longest, wanted_top_k
from engine.check.student import Student
from engine.errors import Absent, RecipeError, TeacherMismatch, TeacherUnavailable, TeacherUnreachable
from engine.model_folder import look_at_model, vocab_size
from engine.prompts import load_tokenizer
from engine.recipe import LocalTeacher, Recipe, RemoteTeacher, VllmTeacher
from teacher.fingerprint import fingerprint
from teacher.health import PROBE_DEADLINE_S
from teacher.protocol import PROTOCOL, Teacher, TeacherInfo
from teacher.replica import difference
from teacher.same_tokens import Known, known
from teacher.self_test import SelfTest
from teacher.vllm_abilities import WITHOUT_EXTRA_IDS

if TYPE_CHECKING:
    from teacher.vllm_client import Looked


_UNCOMPARED = ", to be compared with the student's when that is here"


class FoundTeacher(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    known: Known | None = None
    """The vocabulary that stock servers are held against; None: the teacher is of another kind."""
    most_top_k: int | None = None
    """Largest top_k that it gives, where that is less than the recipe wants; None: it is not."""


async def find_teacher(recipe: Recipe, student: Student | None) -> FoundTeacher:
    """Ask every replica.

    Args:
        student: to compare with; None: it is not here, and only what the teacher says of itself is looked at.

    Raises:
        Absent: nobody answers, a local one has no folder, or there is nothing to compare a stock server with.
        TeacherMismatch: it is not the student's teacher, or does not give what the recipe wants.
        EngineError: it refuses or breaks off.
    """
    from teacher.pool import client_of
    from teacher.vllm_client import VllmClient

    teacher = recipe.teacher
    if isinstance(teacher, LocalTeacher):
        return FoundTeacher(text=_local_teacher(teacher, recipe, student))
    vocabulary = _known(teacher, recipe, student) if isinstance(teacher, VllmTeacher) else None
    async with AsyncExitStack() as clients:
        found, away = [], []
        for url in teacher.urls:
            client = client_of(teacher, url, known=vocabulary, timeout_s=teacher.deadline_s)
            clients.push_async_callback(client.close)
            try:
                info = await _info(recipe, teacher, url, client)
            except Absent as error:  # what the others say may be wrong, and that one may be open
                away.append(error)
                continue
            _compare(url, info, recipe, student)
            found.append((url, client, info))
        if away:
            raise away[0]
        (url, client, info), *others = found
        for other_url, _, other in others:
            if (why := difference(info, other)) is not None:
                raise TeacherMismatch(
                    f"teachers {url} and {other_url} are not the same: {why}; start all replicas with one --model"
                )
        disagreements = await _disagreements(teacher, found)
    text = f"{url}: {info.model}, vocabulary {info.vocab_size:,}"
    if isinstance(client, VllmClient):
        text += _about_stock(client.looked, info)
    if others:
        text += f", and {len(others)} more replicas"
    if student is None:
        text += _UNCOMPARED
    lowered = info.max_top_k if info.max_top_k < wanted_top_k(recipe) else None
    if lowered is not None:
        text += f"; the top {wanted_top_k(recipe)} that are wanted are lowered to the {lowered} that it gives"
    return FoundTeacher(text="; but ".join((text, *disagreements)), known=vocabulary, most_top_k=lowered)


async def _info(recipe: Recipe, teacher: RemoteTeacher, url: str, client: Teacher) -> TeacherInfo:
    bring = recipe.bring.get(url) or _start(teacher, url)
    try:
        async with asyncio.timeout(PROBE_DEADLINE_S):
            return await client.info()
    except (TeacherUnreachable, TimeoutError) as error:
        reason = str(error) or f"no answer within {PROBE_DEADLINE_S:g} s"
        raise Absent(f"no teacher at {url}", remedy=f"{reason}; start one with: {bring}", bring=bring) from error
    except TeacherUnavailable as error:
        raise TeacherUnavailable(
            f"no teacher at {url}, but something answers; {error}; start one with: {bring}"
        ) from error


async def _disagreements(teacher: RemoteTeacher, found: Sequence[tuple[str, Teacher, TeacherInfo]]) -> list[str]:
    """What self-tests found, unless the recipe does not mind or does not want them."""
    if teacher.self_test_bound is None:
        return []
    self_test = SelfTest(bound=teacher.self_test_bound)
    told = [str(one) for one in [await self_test.examine(*replica) for replica in found] if one is not None]
    if told and teacher.on_disagreement == "refuse":
        raise TeacherMismatch("; ".join(told))
    return told


def _known(teacher: VllmTeacher, recipe: Recipe, student: Student | None) -> Known:
    if teacher.model is None:
        if student is None:
            raise Absent(
                f"{teacher.urls[0]} is compared with the student's tokenizer, which cannot be read here",
                remedy="bring or mend the student first",
                bring=recipe.bring.get(teacher.urls[0]) or _start(teacher, teacher.urls[0]),
            )
        return known(student.tokenizer, vocab_size=student.vocab_size, source=f"the student {recipe.student.path}")
    config = look_at_model(teacher.model, trust_remote_code=teacher.trust_remote_code, role="teacher.model")
    return known(
        load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code),
        vocab_size=vocab_size(config, path=teacher.model, role="teacher.model"),
        source=f"teacher.model {teacher.model}",
    )


def _about_stock(looked: Looked | None, info: TeacherInfo) -> str:
    """What was seen and what had to be believed."""
    assert looked is not None, "it has been asked"
    abilities = looked.abilities
    vocabulary = "as it says" if abilities.vocab_size is not None else "which it does not say itself"
    tokens = "its tokens not seen, teacher.model believed"
    if looked.num_tokens is not None:
        tokens = f"{looked.num_tokens:,} of its tokens compared"
    return f" {vocabulary}, {tokens}; vLLM {abilities.version} at {abilities.route}, top {info.max_top_k} at most"


def _start(teacher: RemoteTeacher, url: str) -> str:
    port = url.rpartition(":")[2].strip("/")
    if isinstance(teacher, VllmTeacher):
        return f"vllm serve DIR --enable-scale-out --max-logprobs {teacher.top_k} --port {port}"
    return f"python -m teacher --model DIR --port {port}"


def _local_teacher(teacher: LocalTeacher, recipe: Recipe, student: Student | None) -> str:
    config = look_at_model(
        teacher.model,
        trust_remote_code=teacher.trust_remote_code,
        role="teacher.model",
        bring=recipe.bring.get(teacher.model),
    )
    size = vocab_size(config, path=teacher.model, role="teacher.model")
    tokenizer = load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
    info = TeacherInfo(
        model=teacher.model,
        vocab_size=size,
        tokenizer_size=len(tokenizer.get_vocab()),
        tokenizer_fingerprint=fingerprint(tokenizer),
        max_length=getattr(config, "max_position_embeddings", None) or 1 << 30,
        max_top_k=size,
        protocol=PROTOCOL,
    )
    _compare(teacher.model, info, recipe, student)
    return f"{teacher.model}: in this process, vocabulary {info.vocab_size:,}{_UNCOMPARED if student is None else ''}"


def _compare(name: str, info: TeacherInfo, recipe: Recipe, student: Student | None) -> None:
    if student is not None:
        _compare_tokens(name, info, recipe, student)
    _check_limits(name, info, recipe)


def _compare_tokens(name: str, info: TeacherInfo, recipe: Recipe, student: Student) -> None:
    ours = fingerprint(student.tokenizer)
    if info.tokenizer_fingerprint != ours:
        raise TeacherMismatch(
            f"teacher {name} ({info.model}) has tokenizer {info.tokenizer_fingerprint[:12]} with "
            f"{info.tokenizer_size:,} tokens, the student {recipe.student.path} has {ours[:12]} with "
            f"{len(student.tokenizer.get_vocab()):,}: their token ids mean different "
            "things; use a teacher and a student of one family"
        )
    # One tokenizer, but another padding: a row that the other model lacks has no counterpart in the divergence.
    if info.vocab_size != student.vocab_size:
        raise TeacherMismatch(
            f"teacher {name} ({info.model}) has {info.vocab_size:,} output rows, the student {recipe.student.path} has "
            f"{student.vocab_size:,}: with one tokenizer this is padding of different size; make them equal with "
            "resize_token_embeddings on the student, or use models of one vocab_size"
        )
    if recipe.objective.num_top_ids > student.vocab_size:
        raise RecipeError(
            f"objective: k={recipe.objective.num_top_ids} of the student's most likely ids, and its vocabulary has "
            f"{student.vocab_size:,}; lower k"
        )


def _check_limits(name: str, info: TeacherInfo, recipe: Recipe) -> None:
    stock = recipe.teacher if isinstance(recipe.teacher, VllmTeacher) else None
    if (top_k := wanted_top_k(recipe)) > info.max_top_k and (stock is None or stock.on_top_k_cap == "refuse"):
        option = "--max-top-k" if stock is None else "--max-logprobs, or set teacher.on_top_k_cap='lower'"
        raise TeacherMismatch(
            f"teacher {name} gives at most the top {info.max_top_k}, the recipe asks for {top_k}; lower teacher.top_k "
            f"or evaluation.top_k, or start the teacher with a larger {option}"
        )
    if recipe.objective.num_top_ids > 0 and not info.gives_extra_ids:
        raise TeacherMismatch(
            f"objective: the student's {recipe.objective.num_top_ids} most likely ids are to be scored, and teacher "
            f"{name} {WITHOUT_EXTRA_IDS}"
        )
    most = longest(recipe)
    if most > info.max_length:
        raise TeacherMismatch(
            f"teacher {name} takes at most {info.max_length} tokens, prompts and answers may be {most} long; lower "
            "data.max_prompt_tokens or sampler.max_new_tokens"
        )
