"""What a user can get wrong: one clear message, the documented exit code, no traceback, nothing started."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors.torch import load_file, save_file

from engine.prompts import load_tokenizer
from engine.run import main
from teacher.fingerprint import fingerprint
from teacher.protocol import PROTOCOL, TeacherInfo
from tests.e2e.runs import (
    ROOT,
    World,
    assert_exactly_once,
    environment,
    finish,
    free_port,
    run,
    start_run,
    teacher_process,
    wait_for,
)
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
        ("import sys\n\ndef recipe():\n    sys.exit()\n", "r.py:4: it called sys.exit(None)"),
        ("raise SystemExit(0)\n", "r.py:1: it called sys.exit(0)"),
        ("def recipe():\n    raise KeyboardInterrupt\n", "r.py:2: KeyboardInterrupt"),
        ("async def recipe():\n    pass\n", "recipe() is async"),
    ],
)
def test_a_broken_recipe_file_is_named_with_its_line(tmp_path: Path, text: str, message: str, refuse: Refuse) -> None:
    path = tmp_path / "r.py"
    path.write_text(text)

    assert message in refuse(path, "--check")


def test_a_missing_recipe_file(tmp_path: Path, refuse: Refuse) -> None:
    assert "is not a file" in refuse(tmp_path / "none.py")
    assert "cannot be read" in refuse(tmp_path / f"{'n' * 5000}.py")


def test_what_a_recipe_prints_does_not_mix_with_the_document_on_stdout(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
print("loading")
_plain = recipe

def recipe():
    print("making")
    return _plain()
"""

    assert main([str(world.recipe(tmp_path / "r.py", more=text)), "--check", "--json"]) == 0

    stdout, stderr = capfd.readouterr()
    assert json.loads(stdout)["ok"]
    assert "loading" in stderr
    assert "making" in stderr


def test_words_that_are_not_utf_8_are_refused(world: World, tmp_path: Path, refuse: Refuse) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    path = tmp_path / "s.py"
    path.write_text(recipe.read_text().replace(repr(str(world.prompts)), repr("\udcff.jsonl")))

    for words in (["--out", "\udcff"], ["--set", "seed=\udcff"]):
        with pytest.raises(SystemExit) as refused:
            main([str(recipe), "--check", *words])
        assert refused.value.code == 2
    assert "is not UTF-8" in refuse(path, "--check")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", ": ZeroDivisionError: division by zero, in the graph function"),
        ("raise SystemExit", "it called sys.exit(None)"),
        ("return 7", "returned int, expected a Graph"),
        ("return Graph(actors=None, channels=())", "the graph's actors are None, expected a tuple of ActorSpec"),
        ("return Graph(actors=(1,), channels=())", "the graph's actors are (1,), expected a tuple of ActorSpec"),
        ("return graph.insert('mine', after='nobody', make=print)", "the graph has no actor 'nobody'"),
    ],
)
def test_a_broken_graph_function(world: World, tmp_path: Path, body: str, message: str, refuse: Refuse) -> None:
    assert message in refuse(_with_graph(world, tmp_path, body), "--check")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("lambda ports: 1 / 0", "actor 'mine': its make(ports) raised ZeroDivisionError: division by zero"),
        ("lambda ports: 7", "actor 'mine': its make(ports) returned int, expected an Actor"),
    ],
)
def test_an_actor_that_cannot_be_made(world: World, tmp_path: Path, make: str, message: str, refuse: Refuse) -> None:
    out = tmp_path / "o"
    body = f"return graph.insert('mine', after='sampler', make={make})"

    assert message in refuse(_with_graph(world, tmp_path, body), "--out", str(out))
    with (out / "ledger.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _with_graph(world: World, folder: Path, body: str) -> Path:
    """A recipe with ``def edit(graph): BODY`` beside it."""
    more = f"""
from engine.graph import Graph

_plain = recipe

def edit(graph):
    {body}

def recipe():
    return _plain(), edit
"""
    return world.recipe(folder / "r.py", more=more)


def test_a_value_that_is_no_setting_is_named(world: World, tmp_path: Path, refuse: Refuse) -> None:
    text = f"""
from pathlib import Path
import msgspec

_plain = recipe

def recipe():
    return msgspec.structs.replace(_plain(), student=StudentConfig(path=Path({str(world.student)!r})))
"""

    assert "student.path is PosixPath" in refuse(world.recipe(tmp_path / "r.py", more=text), "--check")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learner.lr=-1", "$.learner.lr"),
        ("learner.lr=inf", "$.learner.lr"),
        ("max_staleness=1000000000000", "$.max_staleness"),
        ("rollouts_per_step=1000000000000", "$.rollouts_per_step"),
        ("steps=99999999999999999999999", "$.steps"),
        ("learner.num_threads=100000000000", "$.learner.num_threads"),
        ("learner.autocast=yes", "expected one of 'auto', 'gpu', 'off'"),
        ("student.dtype=float16", "expected one of 'bfloat16', 'float32'"),
        ("data.too_long=x", "expected one of 'filter', 'refuse'"),
        ("teacher.kind=nope", "expected one of 'http', 'vllm_http', 'local'"),
        ("sampler.stop_ids=[384]", "sampler.stop_ids has 384, the student's ids are 0 to 383"),
        ("learner.lrr=1", "no field 'learner.lrr'"),
        ("nothing.at.all=1", "no section 'nothing'"),
        ("steps=many", "Expected `int`, got `str` - at `$.steps`"),
        ("deterministic=true", "deterministic=true needs max_staleness=0"),
        ("sampler.max_new_tokens=9999", "do not fit into learner.micro_batch_tokens"),
        ("data.reference_share=0.5", "needs data.reference_column"),
        ("student.path=nowhere", "is not a folder"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("data.prompt_column=question", "question"),
        ("learner.device=teapot", "is not a device"),
        ("sampler.device=meta", "sampler.device='meta' cannot compute here"),
        ("learner.device=vulkan", "learner.device='vulkan' cannot compute here"),
        ("learner.betas=[0.9, 1.0]", "$.learner.betas"),
        ("evaluation.max_new_tokens=200", "evaluation.max_new_tokens=200 = 328 tokens do not fit"),
        ("evaluation.data.max_prompt_tokens=250", "sampler.max_new_tokens=8 = 258 tokens do not fit"),
        ("evaluation.scorer=..a:x", "cannot be loaded"),
        ("evaluation.scorer=nowhere:score", "cannot be loaded"),
        ("evaluation.scorer=os:getcwd", "expected one that takes (prompt: str, answer: str)"),
        ("teacher.model=nowhere", "is not a folder"),
        ("node.host=0.0.0.0", "node.token_file is not set"),
    ],
)
def test_a_wrong_value_is_named(world: World, tmp_path: Path, assignment: str, message: str, refuse: Refuse) -> None:
    assert message in refuse(world.recipe(tmp_path / "r.py"), "--set", assignment, "--check")


def test_a_device_that_is_not_here_is_refused_at_the_start(world: World, tmp_path: Path, refuse: Refuse) -> None:
    assert "CUDA devices" in refuse(world.recipe(tmp_path / "r.py"), "--set", "learner.device=cuda:70")


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


@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_models_of_one_tokenizer_and_different_padding(
    world: World, tmp_path: Path, wider: str, refuse: Refuse
) -> None:
    tiny_model(tmp_path / "wide", hidden=32, layers=1, vocab=512, seed=5)
    field = "teacher.model" if wider == "teacher" else "student.path"

    text = refuse(world.recipe(tmp_path / "r.py"), "--check", "--set", f"{field}={tmp_path / 'wide'}")
    rows = {wider: 512, "teacher": 384, "student": 384} | {wider: 512}
    assert f"has {rows['teacher']} output rows" in text
    assert f"has {rows['student']}:" in text
    assert "resize_token_embeddings" in text


def test_replicas_that_are_different_teachers(
    world: World, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"http://a:1": "aaaa", "http://b:1": "bbbb"}

    class Replica:
        def __init__(self, url: str, **_: object) -> None:
            self.url = url

        async def info(self) -> TeacherInfo:
            return TeacherInfo(
                model="teacher",
                vocab_size=384,
                tokenizer_size=384,
                tokenizer_fingerprint=fingerprint(load_tokenizer(str(world.teacher))),
                weights_fingerprint=weights[self.url],
                max_length=512,
                max_top_k=384,
                protocol=PROTOCOL,
            )

        async def close(self) -> None:
            pass

    monkeypatch.setattr("teacher.pool.TeacherClient", Replica)
    recipe = world.recipe(tmp_path / "r.py", urls=tuple(weights))

    assert "http://a:1 and http://b:1 are not the same: weights_fingerprint is 'bbbb'" in refuse(recipe, "--check")


@pytest.mark.parametrize("url", ["http://[::1", "http://a:99999", "http://a:b", "a:80", "http://"])
def test_a_teacher_url_that_is_none(world: World, tmp_path: Path, url: str, refuse: Refuse) -> None:
    assert "is not one; expected for example" in refuse(world.recipe(tmp_path / "r.py", urls=(url,)), "--check")


def test_a_teacher_on_a_device_that_computes_nothing(world: World) -> None:
    command = [sys.executable, "-m", "teacher", "--model", str(world.teacher), "--port", "0", "--device", "meta"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert "teacher: --device 'meta' cannot compute here" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_size": "x"}, "config.json cannot be used"),
        ("config.json", {"num_attention_heads": 0}, "config.json cannot be used"),
        ("config.json", {"num_hidden_layers": 3}, "asks for 18 weights that the files lack"),
        ("config.json", {"hidden_size": 64}, "of shape [384, 64], the weights have [384, 32]"),
        ("config.json", "{}", "config.json cannot be used"),
        ("config.json", '{"model_type": "llama"}', "the weights have"),
        ("generation_config.json", "{", "generation_config.json cannot be read"),
        ("generation_config.json", "[]", "holds list, expected an object"),
        ("generation_config.json", {"eos_token_id": "x"}, 'eos_token_id is "x", expected ids from 0 to 383'),
        ("generation_config.json", {"eos_token_id": [2, 999]}, "eos_token_id is [2, 999], expected ids"),
    ],
)
def test_a_model_folder_with_a_broken_file(
    world: World, tmp_path: Path, file: str, change: str | dict[str, Any], message: str, refuse: Refuse
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(world.student, folder)
    path = folder / file
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))

    assert message in refuse(world.recipe(tmp_path / "r.py"), "--check", "--set", f"student.path={folder}")


@pytest.mark.parametrize("num_bytes", [-1, 100, 0])
def test_weights_that_were_cut_off(world: World, tmp_path: Path, num_bytes: int, refuse: Refuse) -> None:
    folder = tmp_path / "student"
    shutil.copytree(world.student, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])

    text = refuse(world.recipe(tmp_path / "r.py"), "--check", "--set", f"student.path={folder}")
    assert "model.safetensors" in text
    assert "was cut off" in text


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_not_finite_are_named(world: World, tmp_path: Path, role: str) -> None:
    folder = tmp_path / role
    shutil.copytree(getattr(world, role), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    field = "student.path" if role == "student" else "teacher.model"

    finished = run(
        world.recipe(tmp_path / "r.py"), "--out", str(tmp_path / "o"), "--set", f"{field}={folder}", expect=1
    )

    assert "not finite" in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


def test_a_missing_part_of_the_weights(world: World, tmp_path: Path, refuse: Refuse) -> None:
    folder = tmp_path / "student"
    shutil.copytree(world.student, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}')

    text = refuse(world.recipe(tmp_path / "r.py"), "--check", "--set", f"student.path={folder}")
    assert "lacks part-2.safetensors" in text


@pytest.mark.parametrize("code", ["def score(:\n", "1 / 0\n", "raise SystemExit(0)\n"])
def test_a_scorer_that_cannot_be_imported(
    world: World, tmp_path: Path, code: str, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_scorer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    text = refuse(world.recipe(tmp_path / "r.py"), "--check", "--set", "evaluation.scorer=broken_scorer:score")
    assert "evaluation.scorer='broken_scorer:score' cannot be loaded" in text


def test_a_folder_that_another_process_uses(world: World, tmp_path: Path, refuse: Refuse) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "o"
    out.mkdir()
    (out / "ledger.lock").write_text("4711\n")
    with (out / "ledger.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "is in use by process 4711" in refuse(recipe, "--check", "--out", str(out))
        assert "is in use by process 4711" in refuse(recipe, "--check", "--resume", "--out", str(out))

    assert main([str(recipe), "--check", "--out", str(out)]) == 0
    with (out / "ledger.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
    for check in ((), ("--check",)):
        assert "was started with seed=7" in refuse(recipe, "--out", out, "--resume", "--set", "seed=8", *check)
    assert "goes on after step 1" in run(recipe, "--out", out, "--resume", "--check").stdout


def test_a_resume_with_other_prompts(world: World, tmp_path: Path, refuse: Refuse) -> None:
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(world.prompts, prompts)
    recipe, out = world.recipe(tmp_path / "r.py"), str(tmp_path / "o")
    arguments = ("--out", out, "--set", f"data.path={prompts}")
    run(recipe, *arguments, "--set", "steps=1", "--json")
    write_jsonl(prompts, [{"prompt": f"Something else {i}."} for i in range(24)])

    for check in ((), ("--check",)):
        assert "belongs to another run: prompts is" in refuse(recipe, *arguments, "--resume", *check)


def test_corrupt_checkpoints_are_passed_over_and_refused_when_none_is_left(
    world: World, tmp_path: Path, refuse: Refuse
) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "o"
    run(recipe, "--out", str(out), "--set", "steps=4", "--json")
    _flip_a_bit(out / "checkpoints" / "step_000004" / "student" / "model.safetensors")
    run(recipe, "--out", str(out), "--resume", "--set", "steps=4", "--json")

    for step in (2, 4):
        _flip_a_bit(out / "checkpoints" / f"step_{step:06d}" / "student" / "model.safetensors")
    for check in ((), ("--check",)):
        assert "none of the 2 checkpoints" in refuse(recipe, "--out", str(out), "--resume", *check)


@pytest.mark.parametrize("damage", ["gone", "emptied"])
def test_a_ledger_that_is_not_the_checkpoints_is_told_by_the_check(
    world: World, tmp_path: Path, damage: str, refuse: Refuse
) -> None:
    recipe, out = world.recipe(tmp_path / "r.py"), tmp_path / "o"
    run(recipe, "--out", str(out), "--json", "--set", "steps=2")
    if damage == "gone":
        (out / "ledger.sqlite").unlink()
    else:
        with closing(sqlite3.connect(out / "ledger.sqlite")) as ledger:
            ledger.execute("DELETE FROM rollouts")
            ledger.commit()

    for check in ((), ("--check",)):
        text = refuse(recipe, "--out", str(out), "--resume", *check)
        assert ("the ledger is gone" if damage == "gone" else "the ledger holds 0 of the steps") in text


def test_measurements_that_cannot_be_read_are_one_line(world: World, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "o" / "evaluations.jsonl").mkdir(parents=True)

    assert "evaluations.jsonl: cannot be read" in refuse(world.recipe(tmp_path / "r.py"), "--out", str(tmp_path / "o"))


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


def test_an_empty_or_impossible_folder_is_refused(world: World, tmp_path: Path, refuse: Refuse) -> None:
    recipe = world.recipe(tmp_path / "r.py")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises(SystemExit) as refused:
        main([str(recipe), "--check", "--out", ""])
    assert refused.value.code == 2
    for out in (tmp_path / ("n" * 300), tmp_path / "loop" / "o"):
        assert "error: " in refuse(recipe, "--out", str(out))
    # Which of the two it cannot be, or be made, depends on whether runs/ exists already.
    assert " the run's folder" in refuse(recipe, "--set", f"name={'n' * 300}")


def test_show_and_check_together_answer_both(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe(tmp_path / "r.py")

    assert main([str(recipe), "--show", "--check"]) == 0
    shown = capfd.readouterr().out
    assert "[teacher_proxy]" in shown
    assert "ok    student" in shown
    assert main([str(recipe), "--show", "--check", "--json", "--set", "data.path=nowhere.jsonl"]) == 2
    document = json.loads(capfd.readouterr().out)
    assert document["recipe"]["name"] == "tiny"
    assert not document["ok"]


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
    filtered = ("--set", f"data.path={path}", "--set", "data.num_rows=null", "--set", "data.too_long=filter")
    stderr = run(recipe, "--out", str(tmp_path / "o"), *filtered, "--set", "steps=1").stderr
    assert f"{path}: 1 rows do not fit and are left out, 8 remain" in stderr


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
