"""The report of a folder: whatever state its run is in, there is one, and it says what is so."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RunDirError
from engine.evaluations import Answer, Evaluation
from engine.monitor.report.compose import compose
from engine.monitor.report.files import write_report
from engine.monitor.report.gather import Facts, gather
from engine.monitor.report.history import History
from engine.monitor.report.html import html
from engine.monitor.report.markdown import markdown
from engine.monitor.report.results import closed
from engine.recipe import describe
from engine.report import main
from recipes import smollm2
from tests.engine.monitor.story import ANSWERS_AFTER, ANSWERS_BEFORE, TEACHER_ANSWERS, Log, demo

DEMO = list(demo(steps=30))


def make_run(
    folder: Path,
    lines: Iterable[dict[str, Any]] = DEMO,
    *,
    evaluations: Iterable[Evaluation] | None = None,
    torn: bytes = b"",
) -> Path:
    """A folder as ``engine.run`` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(describe(smollm2.recipe()))
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    (folder / "events.jsonl").write_bytes(text + torn)
    if evaluations is None:
        evaluations = (
            evaluation(0, ANSWERS_BEFORE, kl=1.331, reference_kl=0.842, reference_nll=1.204),
            evaluation(30, ANSWERS_AFTER, kl=0.588, reference_kl=0.391, reference_nll=0.733),
        )
    (folder / "evaluations.jsonl").write_bytes(b"".join(msgspec.json.encode(e) + b"\n" for e in evaluations))
    student = folder / "checkpoints" / "step_000030" / "student"
    student.mkdir(parents=True, exist_ok=True)
    (student / "config.json").write_text("{}")
    return folder


def evaluation(version: int, answers: tuple[tuple[str, str, float], ...] = (), **numbers: float) -> Evaluation:
    return Evaluation(
        version=version,
        num_prompts=16,
        num_tokens=700,
        answers=tuple(Answer(prompt=prompt, answer=answer, kl=kl) for prompt, answer, kl in answers),
        references=TEACHER_ANSWERS,
        **numbers,
    )


def report_of(folder: Path) -> str:
    """The Markdown, without its escapes."""
    written = write_report(folder)
    assert written.html.read_text().startswith("<!doctype html>")
    return written.markdown.read_text().replace("\\", "")


def test_a_finished_run_says_what_it_came_to(tmp_path: Path) -> None:
    text = report_of(make_run(tmp_path / "run"))

    assert "The run finished after 30 of 30 steps." in text
    assert "held-out KL 1.331 → 0.588 nats/token" in text
    assert "| KL, own answers | 1.331 | 0.588 | 55.8% closed |" in text
    assert "| KL, reference answers | 0.842 | 0.391 | 53.6% closed |" in text
    assert "The bottleneck is sampler" in text
    assert "Mean 0.62, oldest 1. The bound is 1." in text
    assert "None was older than the bound." in text
    assert "| age 1 | ███████████████ | 150 | 62.5% |" in text
    assert "| teacher replica taken out | 1 | 127.0.0.1:8765 is up<br>127.0.0.1:8765: ConnectionRefusedError |" in text
    assert "| no teacher left | 1 | rollouts waited for 4.2 s in all, none was skipped |" in text
    assert "| rollout given up | none |" in text
    assert "| learner.lr | 0.0003 | 0.00001 |" in text
    for before, after, teacher in zip(ANSWERS_BEFORE, ANSWERS_AFTER, TEACHER_ANSWERS, strict=True):
        assert before[0] in text
        assert before[1].replace("\n", "<br>") in text
        assert after[1].replace("\n", "<br>") in text
        assert teacher in text
    student = tmp_path / "run" / "checkpoints" / "step_000030" / "student"
    assert f'AutoModelForCausalLM.from_pretrained("{student}")' in text


def test_the_page_and_the_markdown_hold_the_same_numbers(tmp_path: Path) -> None:
    document = compose(gather(make_run(tmp_path)))
    page, text = html(document), markdown(document).replace("\\", "")

    for section in document.sections:
        for block in section.blocks:
            for row in getattr(block, "rows", ()):
                for cell in row:
                    assert cell.replace("\n", "<br>").replace("&", "&amp;") in text
                    assert cell.replace("&", "&amp;").replace("'", "&#x27;").replace('"', "&quot;") in page.replace(
                        "<wbr>", ""
                    )


@pytest.mark.parametrize("last", range(0, len(DEMO), 97))
def test_a_log_cut_anywhere_makes_a_report(tmp_path: Path, last: int) -> None:
    torn = msgspec.json.encode(DEMO[last])[:-9]
    text = report_of(make_run(tmp_path, DEMO[:last], torn=torn))

    assert "The log ends without an end" in text or "Nothing is known of this run" in text
    assert "| line of the log lost or damaged | none |" in text


def test_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b"\x00\xff garbage\n[1,2]\n{}\n\n" + b"[" * 5000 + b"\n")

    assert "| line of the log lost or damaged | 4 | 4 cannot be read; left out here |" in report_of(folder)


def test_a_run_of_no_steps_and_one_without_measurement(tmp_path: Path) -> None:
    log = Log()
    log.line("log.opened", pid=1, host="elsewhere", python="3.11.7", start_ns=0, healed=False)
    log.started(steps=30)
    folder = make_run(tmp_path, log.lines, evaluations=())
    text = report_of(folder)

    assert "No optimizer step was done." in text
    assert "Not measured: there is no held-out measurement" in text
    assert "No rollout was dispatched" in text
    assert "No rollout was trained" in text
    assert "None: no held-out answer was kept." in text


def test_one_measurement_is_no_before_and_after(tmp_path: Path) -> None:
    text = report_of(make_run(tmp_path, demo(steps=12), evaluations=(evaluation(0, ANSWERS_BEFORE, kl=1.3),)))

    assert "Measured once, at version 0" in text
    assert "| student | 1.61 |" in text
    assert "closed" not in text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (1.0, 0.25, "75.0% closed"),
        (1.0, 1.5, "grew by 50.0%"),
        (1.0, 1.0, "0.0% closed"),
        (0.0, 0.5, "there was none"),
        (0.5, float("nan"), "not finite"),
    ],
)
def test_the_gap_closed_is_a_share_of_what_was_open(before: float, after: float, words: str) -> None:
    assert closed(before, after) == words


def ended(*lines: tuple[str, dict[str, Any]], pid: int = 0, host: str = "elsewhere") -> list[dict[str, Any]]:
    log = Log()
    log.line("log.opened", pid=pid, host=host, python="3.11.7", start_ns=0, healed=False)
    log.started(steps=9)
    log.step(1)
    for event, fields in lines:
        log.line(event, **fields)
    return log.lines


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([("run.finished", {"step": 1, "stopped_by": None, "wall_s": 1.0})], "The run finished after 1 of 9 steps."),
        (
            [
                ("run.draining", {"signal": "SIGTERM", "grace_s": 60.0}),
                ("run.finished", {"step": 1, "stopped_by": "SIGTERM", "wall_s": 1.0}),
            ],
            "The run was stopped by SIGTERM after 1 of 9 steps; --resume goes on.",
        ),
        (
            [("run.failed", {"failed_actor": "learner", "cause": "NaN\nat step 2", "step": 1})],
            "The run failed after 1 of 9 steps: learner: NaN at step 2",
        ),
        ([("run.stopped_at_once", {"signal": "SIGINT"})], "The run was stopped at once by a second SIGINT"),
        ([], "The log ends without an end after 1 of 9 steps: the run goes on elsewhere, or was killed"),
    ],
)
def test_how_the_run_stands(tmp_path: Path, lines: list[tuple[str, dict[str, Any]]], words: str) -> None:
    assert words in report_of(make_run(tmp_path, ended(*lines)))


def test_a_run_that_goes_on_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    alive = ended(pid=os.getpid(), host=socket.gethostname())
    gone = ended(pid=(1 << 22) + 1, host=socket.gethostname())  # above the largest process id of Linux

    assert "The run is going on (starting), 1 of 9 steps so far." in report_of(make_run(tmp_path / "alive", alive))
    assert "The run was killed after 1 of 9 steps" in report_of(make_run(tmp_path / "gone", gone))


def test_what_it_ran_on_is_told_of_all_processes(tmp_path: Path) -> None:
    log = Log()
    for pid, cpus in ((1, 2), (2, 64)):
        log.line("log.opened", pid=pid, host=f"box{pid}", python="3.11.7", start_ns=0, healed=False)
        log.line(
            "node.described",
            command=["/usr/bin/python3", "-m", "engine.run", "a b.py", "--out", "x"],
            folder="/home",
            platform="Linux",
            cpu="Fast",
            num_cpus=cpus,
            memory_bytes=8_000_000_000,
            gpus=["H100", "H100"],
            packages={"torch": "2.13.0"},
            commit="abc-dirty",
        )
        log.started(steps=9)
    text = report_of(make_run(tmp_path, log.lines))

    assert "```\npython -m engine.run 'a b.py' --out x\n```" in text
    assert "| host | box1, then box2 |" in text
    assert "| CPUs that it may use | 2, then 64 |" in text
    assert "| memory | 8 GB |" in text
    assert "| GPUs | 2 × H100 |" in text
    assert "| commit | abc with uncommitted changes |" in text
    assert "| torch | 2.13.0 |" in text


def test_a_log_that_does_not_say_what_it_ran_on_is_complemented_by_the_checkpoint(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "checkpoints" / "step_000030" / "state.json").write_text('{"packages": {"torch": "2.12.1"}}')
    text = report_of(folder)

    assert "| torch | 2.12.1 |" in text
    assert "not recorded in this log" in text


@pytest.mark.parametrize("text", ["", "[]", "{", "\ud800".encode("utf-8", "surrogatepass").decode("latin1")])
def test_a_recipe_that_cannot_be_read_is_said(tmp_path: Path, text: str) -> None:
    folder = make_run(tmp_path)
    (folder / "recipe.json").write_text(text, encoding="latin1")

    assert "The settings are not known: recipe.json cannot be understood" in report_of(folder)


def test_hostile_answers_and_settings_are_text(tmp_path: Path) -> None:
    evil = "</td><script>alert(1)</script>\x00\u202e|`\n# x"
    folder = make_run(
        tmp_path, evaluations=(evaluation(0, ((evil, evil, 1.0),), kl=1.0), evaluation(9, ((evil, evil, 1.0),), kl=1.0))
    )
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["name"] = recipe["student"]["path"] = evil
    recipe["<script>"] = {"<b>": evil}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    written = write_report(folder)

    for path in (written.html, written.markdown):
        assert "<script" not in path.read_text()
        assert "\x00" not in path.read_text()
        assert "\u202e" not in path.read_text()


def test_hundreds_of_answers_are_a_dozen_and_a_line(tmp_path: Path) -> None:
    answers = tuple((f"prompt {i}", "x" * 9000, 0.5) for i in range(300))
    text = report_of(make_run(tmp_path, evaluations=(evaluation(0, answers, kl=1.0), evaluation(30, answers, kl=0.5))))

    assert "288 more are in evaluations.jsonl." in text
    assert len(text) < 200_000


def test_an_age_beyond_the_bound_is_loud(tmp_path: Path) -> None:
    log = Log()
    log.started(max_staleness=1)
    log.step(1, ages=(0, 5, 5))
    text = report_of(make_run(tmp_path, log.lines))

    assert "**2 rollouts were older than the bound that held in their step.**" in text
    assert "| (!) age 5 |" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: folder.mkdir(), "holds no log of a run"),
        (lambda folder: (folder.mkdir(), (folder / "events.jsonl").write_text("no\n")), "holds no run"),
    ],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(
    tmp_path: Path, make: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "no run"
    make(folder)

    assert main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err


def test_the_files_go_where_they_are_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    (tmp_path / "there").mkdir()

    for arguments, names in (
        ([], ("run/report.html", "run/report.md")),
        (["-o", f"{tmp_path}/one.html"], ("one.html", "one.md")),
        (["-o", f"{tmp_path}/two.md"], ("two.html", "two.md")),
        (["--out", f"{tmp_path}/there"], ("there/report.html", "there/report.md")),
    ):
        assert main([str(folder), *arguments]) == 0
        page, text = (tmp_path / name for name in names)
        assert capsys.readouterr().out == f"report: {page} and {text}\n"
        assert page.read_text().startswith("<!doctype html>")
        assert text.read_text().startswith("# Run smollm2\n")


@pytest.mark.parametrize("out", ["events.jsonl", "-", "nowhere/report.html"])
def test_a_place_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, out: str) -> None:
    folder = make_run(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(RunDirError, match="-o"):
        write_report(folder, tmp_path / out if out != "-" else Path(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
SHORT = list(demo(steps=3, of=3, outage_at=2))


@given(st.lists(st.tuples(st.integers(0, len(SHORT) - 1), st.integers(0, 20), JSON), min_size=1, max_size=8))
def test_fields_of_any_shape_make_a_report_all_the_same(changes: list[tuple[int, int, Any]]) -> None:
    lines = [dict(line) for line in SHORT]
    for index, which, value in changes:
        keys = [key for key in lines[index] if key not in ("t", "event", "level")]
        lines[index][keys[which % len(keys)]] = value
    history = History()
    for line in lines:
        history.apply(0, line)
    history.end()
    facts = Facts(
        folder=Path("runs/x"),
        history=history,
        recipe={},
        recipe_problem="",
        evaluations=history.evaluations([]),
        saved=None,
        num_unreadable=0,
        is_alive=None,
    )
    document = compose(facts)

    assert html(document)
    assert markdown(document)


def test_a_divergence_that_is_no_number_is_said(tmp_path: Path) -> None:
    log = Log()
    log.started()
    log.span("eval.run", dur_s=1, version=0, num_prompts=2, num_tokens=9, kl=0.5)
    log.step(1)
    log.span("eval.run", dur_s=1, version=1, num_prompts=2, num_tokens=9, kl=None)
    text = report_of(make_run(tmp_path, log.lines, evaluations=()))

    assert "| KL, own answers | 0.5 | not finite | not finite |" in text
    assert "| line of the log lost or damaged | none |" in text


@pytest.mark.parametrize("name", ["[bold]x", "a b", "é", "new\nline", "q\"uote'", "-o", os.fsdecode(b"\xff")])
def test_a_folder_of_any_name(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / name)

    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    (line,) = [line for line in (folder / "report.md").read_text().splitlines() if "from_pretrained" in line]
    path = eval(line.removeprefix("AutoModelForCausalLM.from_pretrained(").removesuffix(")"))
    assert Path(path).is_dir()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "report.html").mkdir()

    with pytest.raises(RunDirError, match=r"cannot write .*report.html"):
        write_report(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
