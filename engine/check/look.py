"""Everything that can be known to be wrong before anything starts. ``--check`` prints it; every run begins with it.

What is looked at, in which order, and what may be looked at when something else is missing. Each look lies in a file
beside this one and returns one line of what it found, or raises an error that says what to mend; ``finding`` decides
how that counts. All are tried, so that one look shows all mistakes.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.check.devices import check_devices, gpus_to_bring, named_devices, num_gpus_here
from engine.check.finding import Finding, Findings, is_elsewhere
from engine.check.folder import (
    check_earlier_run,
    check_folder,
    check_port,
    check_room,
    check_token,
    checkpoint_bytes,
)
from engine.check.packages import check_megatron, check_peft, check_vllm
from engine.check.scorer import load_scorer
from engine.check.student import (
    Student,
    check_lengths,
    has_config,
    look_at_heads,
    look_at_layout,
    look_at_weights,
    read_held_out,
    read_prompts,
    read_student,
)
from engine.check.teacher import FoundTeacher, find_teacher
from engine.errors import EngineError, RecipeError
from engine.monitor.sinks.attach import check_sinks
from engine.prompts import PromptSet
from engine.recipe import Recipe
from engine.run_dir import RunDir
from teacher.same_tokens import Known


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
    elsewhere: bool
    """This is not the machine that will run the recipe."""
    inputs: Inputs | None
    """None when something is wrong or open."""

    @property
    def wrong(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == "wrong")


async def check(recipe: Recipe, *, out: Path | None, resume: bool, may_run_elsewhere: bool = False) -> Checked:
    """Look at everything that ``recipe`` names.

    Args:
        out: the run's folder; None: not known yet, so only the space on this disk is looked at.
        resume: the folder may hold a run.
        may_run_elsewhere: nothing is to be started here: what a machine without a GPU lacks for a recipe that asks for
            one is left open. Otherwise it is wrong.
    """
    elsewhere = may_run_elsewhere and is_elsewhere(named_devices(recipe).values(), num_gpus=num_gpus_here())
    findings = Findings(elsewhere=elsewhere)
    student = findings.look("student", lambda: read_student(recipe))
    if student is not None:
        findings.look("weights", lambda: look_at_weights(recipe, student))
    prompts = findings.look("prompts", lambda: read_prompts(recipe, student))
    held_out = None
    if (evaluation := recipe.evaluation) is not None:
        held_out = findings.look("held-out", lambda: read_held_out(recipe, evaluation, student))
        if (scorer := evaluation.scorer) is not None:
            findings.look("scorer", lambda: _scorer(scorer))
    if student is not None:
        findings.look("lengths", lambda: check_lengths(recipe, student))
    teacher = await _teacher(recipe, student, findings)
    _machine(recipe, student, findings, out=out)
    if out is not None:
        _folder(recipe, prompts, findings, out=out, resume=resume)
    inputs = None
    if all(finding.state == "ok" for finding in findings.all):
        assert student is not None, "it was found"
        assert prompts is not None, "with a student they are read"
        assert teacher is not None, "it was found"
        inputs = Inputs(
            student=student,
            prompts=prompts,
            held_out=held_out,
            known=teacher.known,
            most_top_k=teacher.most_top_k,
        )
    return Checked(findings=tuple(findings.all), elsewhere=elsewhere, inputs=inputs)


def _scorer(name: str) -> tuple[str, None]:
    load_scorer(name)
    return name, None


async def _teacher(recipe: Recipe, student: Student | None, findings: Findings) -> FoundTeacher | None:
    try:
        teacher = await find_teacher(recipe, student)
    except EngineError as error:
        findings.failed("teacher", error)
        return None
    findings.found("teacher", teacher.text)
    return teacher


def _folder(recipe: Recipe, prompts: PromptSet | None, findings: Findings, *, out: Path, resume: bool) -> None:
    if findings.elsewhere and not out.exists():
        return  # another machine is to write there
    findings.look("folder", lambda: check_folder(out, resume=resume))
    if resume and RunDir(out).recipe.exists():
        findings.look("resume", lambda: check_earlier_run(recipe, prompts, out))


def _machine(recipe: Recipe, student: Student | None, findings: Findings, *, out: Path | None) -> None:
    """What the recipe wants of the machine that it runs on."""
    if findings.elsewhere:
        try:
            findings.leave_open("devices", gpus_to_bring(recipe))
        except RecipeError as error:
            findings.failed("devices", error)
    else:
        findings.look("devices", lambda: check_devices(recipe))
    if recipe.sampler.backend == "vllm":
        findings.look("vllm", lambda: check_vllm(recipe.sampler.device))
        if student is not None:
            findings.look("heads", lambda: look_at_heads(recipe, student))
    if recipe.learner.backend == "megatron":
        findings.look("megatron", check_megatron)
        if has_config(recipe):
            findings.look("layout", lambda: look_at_layout(recipe))
    if recipe.learner.lora is not None:
        findings.look("lora", check_peft)
    if findings.elsewhere:
        room = "" if student is None else f", up to {checkpoint_bytes(recipe, student) / 2**20:,.0f} MiB"
        findings.leave_open("disk", f"needs room for checkpoints{room}")
    elif student is not None:
        findings.look("disk", lambda: check_room(recipe, student, out))
    if (token_file := recipe.node.token_file) is not None:
        findings.look("token", lambda: check_token(token_file))
    findings.look("port", lambda: check_port(recipe), of_machine=True)
    if recipe.sinks.tensorboard or recipe.sinks.wandb.project is not None:
        folder = out or Path("runs") / recipe.name
        findings.look("sinks", lambda: (check_sinks(recipe, folder), None), of_machine=True)
