"""What README and docs tell the reader to type or to copy is true: Python runs, commands and options exist, links lead
somewhere, queries are asked of a real ledger."""

from __future__ import annotations

import functools
import itertools
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from engine.graph import Graph
from engine.ledger import Ledger
from engine.load_recipe import load_recipe
from engine.recipe import Recipe
from engine.types import Prompt
from recipes import smollm2
from tests.support.documents import DOCUMENTS, ROOT, Block, Command, blocks, commands, links
from tests.support.models import tiny_model, write_jsonl

TEXTS = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}
BLOCKS = [block for document, text in TEXTS.items() for block in blocks(document, text)]
COMMANDS = [command for document, text in TEXTS.items() for command in commands(document, text)]

FOREIGN = {"git", "cd", "curl", "sqlite3", "kill", "pip"}
"""Commands that are not ours to check."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("docs")
    tiny_model(folder / "models/teacher", seed=1)
    tiny_model(folder / "models/student", seed=2)
    tiny_model(folder / "runs/first/checkpoints/step_000020/student", seed=3)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(8)])
    return folder


def of_language(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_in_the_docs_runs(block: Block, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile(block.code, str(block), "exec")
    if "no-run" in block.notes:
        return
    monkeypatch.chdir(place)
    path = tmp_path / "example.py"
    path.write_text(block.code)

    if "def recipe(" in block.code:
        recipe, graph = load_recipe(path, [])
        assert isinstance(recipe, Recipe)
        assert isinstance(graph, Graph)
    else:
        exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", of_language("sql"), ids=str)
def test_queries_in_the_docs_are_understood_by_a_ledger(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger.open(path, run_name="docs", seed=0)
    ledger.dispatched(Prompt(rollout_id=0, epoch=0, prompt_index=3, sample_index=0, token_ids=(1,)))
    ledger.commit()
    ledger.close()

    connection = sqlite3.connect(path)
    try:
        for statement in filter(str.strip, block.code.split(";")):
            connection.execute(statement).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_in_the_docs_can_be_typed(command: Command) -> None:
    program, *arguments = command.words
    if program == "make":
        check_make(arguments)
    elif program in ("python", ".venv/bin/python", ".venv-vllm/bin/python"):
        check_python(arguments)
    elif program.startswith(".venv/bin/"):
        tool = program.removeprefix(".venv/bin/")
        assert f'"{tool}>=' in (ROOT / "pyproject.toml").read_text(), f"no extra installs {tool}"
    else:
        assert program in FOREIGN, f"{program} is neither ours nor known"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_a_link_in_the_docs_leads_to_a_file(document: Path) -> None:
    targets = [(ROOT / document).parent / target for target in links(TEXTS[document])]

    assert [str(target) for target in targets if not target.exists()] == []


def check_make(arguments: list[str]) -> None:
    targets = [word for word in arguments if "=" not in word]
    dry = subprocess.run(
        ["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False, env=without_make()
    )
    assert dry.returncode == 0, dry.stderr
    variables = dict(word.split("=", 1) for word in arguments if "=" in word)
    for name in variables:
        assert re.search(rf"\$\({name}\)|^{name} ", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{name} is unused"
    if "ARGS" in variables and targets == ["demo"]:
        check_options("engine.run", variables["ARGS"].split())


def check_python(arguments: list[str]) -> None:
    assert arguments[0] == "-m", "modules are run with -m"
    module, *rest = arguments[1:]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in rest if "/" in word)
        return
    check_options(module, rest)


def check_options(module: str, words: list[str]) -> None:
    """Options are ones that the module's --help knows, overrides fields that a recipe has, recipes files of ours."""
    known = options_of(module)
    for word in words:
        if word.startswith("--"):
            assert word in known, f"python -m {module} has no {word}; it has {', '.join(sorted(known))}"
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file()
    overrides = [following for word, following in itertools.pairwise([*words, ""]) if word == "--set"]
    named = next((Path(word) for word in words if word.startswith("recipes/")), Path(smollm2.__file__))
    load_recipe(ROOT / named, [assignment for assignment in overrides if assignment != "a.b=value"])


def options_of(module: str) -> frozenset[str]:
    done = help_of(module)
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"--[a-z][a-z-]*", done.stdout))


@functools.cache
def help_of(module: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )


def without_make() -> dict[str, str]:
    """The environment without what a make that runs the tests passes on to the makes below it."""
    return {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}


def test_the_readme_begins_with_a_clone_and_make_demo() -> None:
    first = next(block for block in BLOCKS if block.document == Path("README.md") and block.language == "console")

    assert [command.words[0] for command in commands(Path("README.md"), f"```console\n{first.code}```")] == [
        "git",
        "cd",
        "make",
    ]
