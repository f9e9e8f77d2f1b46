"""What earlier processes of a resumed run measured, for the curves of the one that goes on: read from the run's folder
once, before it starts. What lies after the checkpoint is left out: its weights are lost, and it will be done again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.evaluations import read_evaluations
from engine.monitor.readings import Rate
from engine.monitor.view import WINDOW_S, Held, RunView, Shown
from engine.run_dir import RunDir


class _Step(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``metrics.jsonl``, as far as it is drawn."""

    step: int
    loss: float | None = None
    num_tokens: int = 0
    interval_s: float | None = None


def remember(view: RunView, run_dir: RunDir, *, until: int) -> None:
    """Put the steps, and the measurements of versions, up to ``until`` into ``view``. Lines that do not parse are left
    out: a killed process tears its last one."""
    _remember_steps(view, run_dir.metrics, until)
    evaluations = {each.version: each for each in read_evaluations(run_dir.evaluations) if each.version <= until}
    for version in sorted(evaluations):
        each = evaluations[version]
        view.evaluations.append(
            Held(
                version=version,
                num_prompts=each.num_prompts,
                kl=each.kl,
                reference_kl=each.reference_kl,
                reference_nll=each.reference_nll,
                score=each.score,
            )
        )
        for answer in each.answers:
            view.answers[answer.prompt] = Shown(
                version=version, prompt=answer.prompt, answer=answer.answer, kl=answer.kl
            )


def _remember_steps(view: RunView, path: Path, until: int) -> None:
    if not path.exists():
        return
    decoder = msgspec.json.Decoder(_Step)
    trained, at = Rate(window_s=2 * WINDOW_S), 0.0
    trained.begin(at)
    with path.open("rb") as lines:
        for line in lines:
            try:
                done = decoder.decode(line)
            except ValueError:  # not JSON, not UTF-8, or other fields
                continue
            if done.step > until:
                continue
            if done.interval_s is not None:  # the first step of a process has none
                at += done.interval_s
                trained.add(at, done.num_tokens)
            view.loss_curve.add(done.step, done.loss)
            view.trained_curve.add(done.step, trained.per_second(at))
