"""What a run runs on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from engine.machine import commit_of, describe_node, gpu_names
from engine.tracing import Event, Tracing
from recipes import smollm2


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_is_that_of_the_checkout_and_says_when_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")

    assert commit_of(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{head}-dirty"


def test_a_folder_within_another_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "site-packages").mkdir()

    assert commit_of(tmp_path / "site-packages") is None


def test_a_checkout_without_a_commit_or_without_git_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    assert commit_of(tmp_path) is None

    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) is None


def test_a_run_on_cpus_asks_for_no_gpu() -> None:
    assert gpu_names(["cpu", "cpu"]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_gpus_names_them() -> None:
    assert gpu_names(["cpu", "cuda:0"]) == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def test_the_line_has_what_a_reader_compares() -> None:
    seen: list[Event] = []
    with Tracing() as tracing:
        tracing.subscribe("test", seen.append)
        describe_node(smollm2.recipe())

    (line,) = seen
    assert line["event"] == "node.described"
    assert line["command"]
    assert line["num_cpus"] >= 1
    assert line["packages"]["torch"] == torch.__version__
    assert line["gpus"] == []
