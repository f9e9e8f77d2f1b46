"""The real library in offline mode: no network, no account; what it wrote is read back from its own file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import RecipeError
from engine.monitor.sinks.points import Point
from engine.monitor.sinks.wandb import WandbSink
from engine.recipe import WandbConfig
from tests.support.offline_wandb import read_offline_run
from tests.support.recipes import recipe_with

pytest.importorskip("wandb", reason="needs the package wandb (extra wandb)")


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    (tmp_path / "home").mkdir()


@pytest.fixture(autouse=True, scope="module")
def nothing_of_it_stays_behind() -> Iterator[None]:
    yield
    _until_all_is_written()


def _until_all_is_written() -> None:
    """The library's process may write the last block of a file after ``finish``; it ends when all is written. A node
    waits for that as it exits."""
    import wandb

    wandb.teardown()


def sink(folder: Path, *, mode: str = "offline", **config: Any) -> WandbSink:
    recipe = recipe_with(wandb=WandbConfig(project="distillation", **config))
    return WandbSink(folder=folder, recipe=recipe, mode=mode)


def a_point(step: int, **values: float) -> Point:
    return Point(
        step=step, at_s=1_767_323_045.5 + step, values={name.replace("_", "/", 1): v for name, v in values.items()}
    )


def test_an_offline_run_leaves_a_folder_whose_data_can_be_read_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    one = sink(folder, tags=("a", "b"), group="g")
    where = one.open()
    one.write(a_point(0, eval_kl=1.25))
    one.write(a_point(1, train_loss=1.5, train_lr=0.25))
    one.write(a_point(2, train_loss=float("nan")))
    one.flush()
    one.close(ok=True)
    resumed = sink(folder)
    resumed.open()
    resumed.write(a_point(2, train_loss=1.25))
    resumed.close(ok=False)
    _until_all_is_written()

    first, second = (read_offline_run(path) for path in sorted((folder / "wandb").glob("offline-run-*")))
    assert where.startswith(str(folder / "wandb"))
    assert [row["step"] for row in first.history] == [0, 1, 2]
    assert [row.get("eval/kl") for row in first.history] == [1.25, None, None]
    assert [str(row.get("train/loss")) for row in first.history] == ["None", "1.5", "nan"]
    assert (first.project, first.name, first.group, first.tags) == ("distillation", "first", "g", ["a", "b"])
    assert first.config["learner"]["lr"] == 3e-4
    assert first.config["metrics"]["train/loss"] == "nats per token, mean over tokens. The objective."
    assert first.exit_code == 0
    assert (second.run_id, second.exit_code) == (first.run_id, 1)
    assert [(row["step"], row["train/loss"]) for row in second.history] == [(2, 1.25)]
    assert capfd.readouterr() == ("", ""), "the terminal belongs to the picture of the run"


def test_the_check_says_version_mode_and_project(tmp_path: Path) -> None:
    found = sink(tmp_path).check()

    assert found.endswith(", offline, project distillation")
    assert not (tmp_path / "wandb").exists(), "a check leaves nothing behind"


def test_to_send_somebody_must_be_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"nobody is logged in; run `wandb login`, set WANDB_API_KEY, or set sinks"):
        sink(tmp_path, mode="online").check()
    monkeypatch.setenv("WANDB_API_KEY", "no key at all")
    with pytest.raises(RecipeError, match=r"sinks\.wandb: WANDB_API_KEY invalid: .*; mend the key, or set sinks"):
        sink(tmp_path, mode="online").check()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert ", online, project" in sink(tmp_path, mode="online").check()


@pytest.mark.parametrize("content", ["", "../../etc", "deadbeef"])
def test_a_name_that_was_not_written_to_its_end_is_made_anew(tmp_path: Path, content: str) -> None:
    from engine.monitor.sinks.wandb import _run_id

    path = tmp_path / "wandb" / "id"
    path.parent.mkdir()
    path.write_text(content)

    made = _run_id(path)
    assert made != content
    assert _run_id(path) == made
