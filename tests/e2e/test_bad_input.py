"""What a user can get wrong: one clear message, the documented exit code, no traceback, nothing started."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Protocol

import pytest

from engine.run import main
from tests.e2e.runs import World, assert_exactly_once, finish, free_port, run, start_run, teacher_process, wait_for
from tests.support.disk import tiny_disk
from tests.support.models import tiny_model, write_jsonl


class Refuse(Protocol):
    def __call__(self, recipe: Path, *arguments: str) -> str: ...


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str]) -> Refuse:
    """The message of a run that must not start. In this process: what is refused has started nothing."""

    def refuse(recipe: Path, *arguments: str) -> str:
        assert main([str(recipe), *arguments]) == 2
        stdout, stderr = capfd.readouterr()
        assert "Traceback" not in stderr
        return stderr + stdout

    return refuse


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no function recipe()"),
        ("def recipe(:\n", "r.py:1: SyntaxError"),
        ("def recipe():\n    return 1 / 0\n", "r.py:2: ZeroDivisionError"),
        ("import nothing_of_that_name\n", "r.py:1: ModuleNotFoundError"),
        ("def recipe():\n    return 7\n", "recipe() returned int, expected a Recipe"),
    ],
)
def test_a_broken_recipe_file_is_named_with_its_line(tmp_path: Path, text: str, message: str, refuse: Refuse) -> None:
    path = tmp_path / "r.py"
    path.write_text(text)

    assert message in refuse(path, "--check")


def test_a_missing_recipe_file(tmp_path: Path, refuse: Refuse) -> None:
    assert "is not a file" in refuse(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learner.lr=-1", "$.learner.lr"),
        ("learner.lrr=1", "no field 'learner.lrr'"),
        ("nothing.at.all=1", "no section 'nothing'"),
        ("steps=many", "Expected `int`, got `str` - at `$.steps`"),
        ("deterministic=true", "deterministic=true needs max_staleness=0"),
        ("sampler.max_new_tokens=9999", "do not fit into learner.micro_batch_tokens"),
        ("data.reference_share=0.5", "needs data.reference_column"),
        ("student.path=nowhere", "is not a folder"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("data.prompt_column=question", "question"),
        ("learner.device=cuda:7", "CUDA devices"),
        ("learner.device=teapot", "is not a device"),
        ("evaluation.scorer=nowhere:score", "cannot be loaded"),
        ("teacher.model=nowhere", "is not a folder"),
        ("node.host=0.0.0.0", "node.token_file is not set"),
    ],
)
def test_a_wrong_value_is_named(world: World, tmp_path: Path, assignment: str, message: str, refuse: Refuse) -> None:
    assert message in refuse(world.recipe(tmp_path / "r.py"), "--set", assignment, "--check")


def test_all_mistakes_are_told_at_once(world: World, tmp_path: Path, refuse: Refuse) -> None:
    text = refuse(
        world.recipe(tmp_path / "r.py"), "--check", "--set", "data.path=nowhere.jsonl", "--set", "teacher.model=nowhere"
    )

    assert "WRONG prompts" in text
    assert "WRONG teacher" in text


def test_a_malformed_line_of_the_prompt_file_is_named(world: World, tmp_path: Path, refuse: Refuse) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')

    text = refuse(world.recipe(tmp_path / "r.py"), "--set", f"data.path={path}", "--set", "data.num_rows=null")
    assert "p.jsonl" in text
    assert "2" in text


def test_an_empty_prompt_file(world: World, tmp_path: Path, refuse: Refuse) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("")

    assert "p.jsonl" in refuse(world.recipe(tmp_path / "r.py"), "--set", f"data.path={path}")


def test_a_teacher_with_another_tokenizer_is_refused(world: World, tmp_path: Path, refuse: Refuse) -> None:
    tiny_model(tmp_path / "stranger", hidden=32, layers=1, vocab=300, seed=5)

    text = refuse(world.recipe(tmp_path / "r.py"), "--set", f"teacher.model={tmp_path / 'stranger'}")
    assert "token ids mean different things" in text


def test_a_teacher_that_is_not_there(world: World, tmp_path: Path, refuse: Refuse) -> None:
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{free_port()}",))

    assert "no teacher at" in refuse(recipe, "--check")


def test_a_wrong_token_is_told_from_a_missing_teacher(world: World, tmp_path: Path, refuse: Refuse) -> None:
    port = free_port()
    (tmp_path / "right").write_text("sesame-0123456789abcdef\n")
    (tmp_path / "wrong").write_text("mustard-0123456789abcdef\n")
    recipe = world.recipe(tmp_path / "r.py", urls=(f"http://127.0.0.1:{port}",))
    with teacher_process(world, port, "--token-file", str(tmp_path / "right")):
        assert "token" in refuse(recipe, "--check", "--set", f"teacher.token_file={tmp_path / 'wrong'}")
        assert "token" in refuse(recipe, "--check")
        run(recipe, "--check", "--set", f"teacher.token_file={tmp_path / 'right'}")


def test_a_port_in_use(world: World, tmp_path: Path, refuse: Refuse) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = refuse(world.recipe(tmp_path / "r.py"), "--out", str(tmp_path / "o"), "--set", f"node.port={port}")

    assert f"node.port={port} cannot be listened on" in text


def test_a_folder_that_is_a_file(world: World, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "o").write_text("")

    assert "is a file" in refuse(world.recipe(tmp_path / "r.py"), "--out", str(tmp_path / "o" / "run"))


def test_a_folder_with_another_run_and_a_resume_that_changes_the_run(
    world: World, tmp_path: Path, refuse: Refuse
) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), str(tmp_path / "o")
    run(recipe, "--out", out, "--set", "steps=1", "--json")

    assert "holds a run already" in refuse(recipe, "--out", out)
    assert "was started with seed=7" in refuse(recipe, "--out", out, "--resume", "--set", "seed=8")


def test_corrupt_checkpoints_are_passed_over_and_refused_when_none_is_left(
    world: World, tmp_path: Path, refuse: Refuse
) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "o"
    run(recipe, "--out", str(out), "--set", "steps=4", "--json")
    _flip_a_bit(out / "checkpoints" / "step_000004" / "student" / "model.safetensors")
    run(recipe, "--out", str(out), "--resume", "--set", "steps=4", "--json")

    for step in (2, 4):
        _flip_a_bit(out / "checkpoints" / f"step_{step:06d}" / "student" / "model.safetensors")
    assert "checkpoint" in refuse(recipe, "--out", str(out), "--resume")


def _flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_a_number_stops_or_is_left_out(world: World, tmp_path: Path, policy: str) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "o"
    finished = run(
        recipe,
        "--out",
        str(out),
        "--json",
        *("--set", "learner.lr=1e30", "--set", f"learner.on_nonfinite={policy}", "--set", "learner.grad_clip=null"),
        expect=1 if policy == "stop" else 0,
    )

    saved = sorted(out.glob("nonfinite_step_*.jsonl"))
    assert saved
    lines = [json.loads(line) for line in saved[0].read_text().splitlines()]
    assert all(line["rollout"]["response_ids"] for line in lines)
    if policy == "stop":
        assert "Traceback" not in finished.stderr
        assert saved[0].name in finished.stderr


def test_show_and_check_start_nothing(world: World, tmp_path: Path) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "o"
    shown = run(recipe, "--show").stdout
    checked = run(recipe, "--check", "--out", str(out)).stdout

    assert "[teacher_proxy]" in shown
    assert '"max_staleness": 1' in shown
    assert "WRONG" not in checked
    assert not out.exists()


def test_rows_that_do_not_fit_are_refused_or_filtered(world: World, tmp_path: Path, refuse: Refuse) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}] * 8 + [{"prompt": "word " * 200}])
    recipe = world.recipe(tmp_path / "r.py")
    arguments = ("--check", "--set", f"data.path={path}", "--set", "data.num_rows=null")

    assert "1 of 9 rows do not fit" in refuse(recipe, *arguments)
    assert "1 filtered" in run(recipe, *arguments, "--set", "data.too_long=filter").stdout


def test_a_disk_that_is_too_small_is_told_before_the_run(world: World, tmp_path: Path, refuse: Refuse) -> None:
    with tiny_disk(tmp_path / "disk", size="2m"):
        assert "disk" in refuse(world.recipe(tmp_path / "r.py"), "--out", str(tmp_path / "disk" / "o"))


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(world: World, tmp_path: Path) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "disk" / "o"
    with tiny_disk(tmp_path / "disk", size="16m") as disk:
        process = start_run(recipe, "--out", str(out), "--set", "steps=1000")
        wait_for(out, "checkpoint.saved", process=process, step=4)
        disk.fill()
        stopped = finish(process)
        assert stopped.code == 1, stopped.stderr[-3000:]
        assert "space" in stopped.stderr
        assert "Traceback" not in stopped.stderr

        disk.make_room()
        done = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step_*"))
        run(recipe, "--resume", "--out", str(out), "--json", "--set", f"steps={done + 2}")
        assert_exactly_once(out, steps=done + 2, per_step=4, max_staleness=1)
