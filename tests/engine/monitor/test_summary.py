"""What the end of a run says."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from engine.evaluations import Answer, Evaluation
from engine.monitor.summary import Summary, print_summary, summarise
from engine.monitor.view import RunView
from tests.engine.monitor.story import ANSWERS_AFTER, ANSWERS_BEFORE, TEACHER_ANSWERS, demo


def evaluation(version: int, answers: tuple[tuple[str, str, float], ...], **numbers: float) -> Evaluation:
    return Evaluation(
        version=version,
        num_prompts=16,
        num_tokens=700,
        answers=tuple(Answer(prompt=prompt, answer=answer, kl=kl) for prompt, answer, kl in answers),
        references=TEACHER_ANSWERS,
        **numbers,
    )


def make_summary(folder: Path, *, steps: int = 30, evaluations: tuple[Evaluation, ...] | None = None) -> Summary:
    if evaluations is None:
        evaluations = (
            evaluation(0, ANSWERS_BEFORE, kl=1.331, reference_kl=0.842, reference_nll=1.204),
            evaluation(30, ANSWERS_AFTER, kl=0.588, reference_kl=0.391, reference_nll=0.733),
        )
    path = folder / "evaluations.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(e) + b"\n" for e in evaluations))
    view = RunView()
    for line in demo(steps=steps):
        view.apply(line)
    run_dir: Any = SimpleNamespace(path=folder, evaluations=path, checkpoints=folder / "checkpoints")
    recipe: Any = SimpleNamespace(name="smollm2", steps=30, max_staleness=1)
    outcome: Any = SimpleNamespace(version=steps, stopped_by=None if steps == 30 else "SIGINT", wall_s=290.0)
    parts: Any = SimpleNamespace(ledger=SimpleNamespace(counts=lambda: {"trained": 240, "waiting": 2}))
    return summarise(recipe=recipe, run_dir=run_dir, outcome=outcome, view=view, parts=parts)


def printed(summary: Summary, *, width: int = 80) -> str:
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=width))
    return out.getvalue()


def test_before_and_after_are_the_first_and_the_last_measurement(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)

    assert summary.kl is not None
    assert (summary.kl.before, summary.kl.after) == (1.331, 0.588)
    assert summary.kl.ratio == pytest.approx(0.4418, abs=1e-4)
    assert summary.reference_nll is not None
    assert summary.reference_nll.after == 0.733
    assert summary.answers[0].teacher == TEACHER_ANSWERS[0]
    assert (summary.answers[1].before, summary.answers[1].after) == (ANSWERS_BEFORE[1][1], ANSWERS_AFTER[1][1])


def test_the_shares_of_an_actor_add_up_and_the_busiest_is_the_bottleneck(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)

    for share in summary.actors:
        assert share.worked + share.waited_input + share.waited_room == pytest.approx(1.0)
    assert summary.bottleneck == "sampler"


def test_counts_and_rates(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)

    assert (summary.rollouts_trained, summary.tokens_trained) == (240, 10_800)
    assert summary.rollouts_per_s == pytest.approx(240 / 270, rel=0.03)
    assert (summary.staleness_max, summary.staleness_mean) == (1, 0.625)
    assert summary.ledger == {"trained": 240, "waiting": 2}
    assert summary.faults.teacher_parked_s == 4.2


def test_it_is_json_as_it_is(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    text = msgspec.json.encode(summary)

    assert msgspec.json.decode(text, type=Summary) == summary
    assert json.loads(text)["kl"]["after"] == 0.588


def test_a_run_without_measurements_or_checkpoint_has_a_summary_too(tmp_path: Path) -> None:
    summary = make_summary(tmp_path, steps=2, evaluations=())

    assert (summary.kl, summary.answers, summary.student, summary.load) == (None, (), None, None)
    text = printed(summary)
    assert "stopped by SIGINT after 2 of 30 steps" in text
    assert re.search(r"^checkpoint +none *$", text, flags=re.MULTILINE)


def test_one_measurement_alone_is_no_change(tmp_path: Path) -> None:
    assert make_summary(tmp_path, steps=2, evaluations=(evaluation(0, ANSWERS_BEFORE, kl=1.3),)).kl is None


def test_a_checkpoint_of_an_earlier_process_is_found(tmp_path: Path) -> None:
    for step in (4, 10):
        (tmp_path / "checkpoints" / f"step_{step:06d}" / "student").mkdir(parents=True)

    assert make_summary(tmp_path, steps=2).student == str(tmp_path / "checkpoints" / "step_000010" / "student")


@pytest.mark.parametrize("width", [80, 120])
def test_on_paper_it_keeps_to_the_width_and_the_line_to_copy_is_whole(tmp_path: Path, width: int) -> None:
    summary = make_summary(tmp_path)
    text = printed(summary, width=width)

    assert f"\n  {summary.load}\n" in text
    assert summary.load == (
        'AutoModelForCausalLM.from_pretrained("runs/smollm2-20260102-030405/checkpoints/step_000030/student")'
    )
    assert "held-out KL to the teacher  1.331 → 0.588 nats/token   × 0.44" in text
    others = [line for line in text.splitlines() if "from_pretrained" not in line]
    assert max(len(line) for line in others) <= width


def test_answers_are_shown_on_one_line_each_without_control_characters(tmp_path: Path) -> None:
    nasty = (("Q\x1b[2J", "a\n\nb\x07", 1.0),)
    text = printed(make_summary(tmp_path, evaluations=(evaluation(0, nasty, kl=1.0), evaluation(3, nasty, kl=0.5))))

    assert "\x1b" not in text
    assert "a b\\x07" in text
