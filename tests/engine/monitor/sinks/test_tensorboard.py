"""Real event files, read back as TensorBoard reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engine.errors import RecipeError
from engine.monitor.sinks.points import Point
from engine.monitor.sinks.tensorboard import TensorBoardSink
from tests.support.recipes import recipe_with

pytest.importorskip("tensorboard", reason="needs the package tensorboard (extra tensorboard)")


def a_point(step: int, **values: float) -> Point:
    return Point(step=step, at_s=1_767_323_045.5 + step, values={f"train/{name}": v for name, v in values.items()})


def write(folder: Path, *points: Point, step: int = 0) -> None:
    sink = TensorBoardSink(folder=folder, recipe=recipe_with(tensorboard=True), step=step)
    assert sink.open() == str(folder)
    for point in points:
        sink.write(point)
    sink.flush()
    sink.close(ok=True)


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def test_each_metric_is_a_series_over_steps_at_the_time_of_the_step(tmp_path: Path) -> None:
    write(tmp_path / "tb", a_point(1, loss=1.5, lr=0.25), a_point(2, loss=1.25))

    assert scalars(tmp_path / "tb", "train/loss") == [(1, 1.5), (2, 1.25)]
    assert scalars(tmp_path / "tb", "train/lr") == [(1, 0.25)]
    assert [event.wall_time for event in read(tmp_path / "tb").Scalars("train/loss")] == [
        1_767_323_046.5,
        1_767_323_047.5,
    ]


def test_a_series_carries_its_unit_and_reduction(tmp_path: Path) -> None:
    write(tmp_path, a_point(1, loss=1.5), a_point(2, loss=1.25))

    metadata = read(tmp_path).SummaryMetadata("train/loss")
    assert metadata.summary_description == "nats per token, mean over tokens. The objective."


def test_a_loss_that_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    write(tmp_path, a_point(1, loss=float("nan")))

    assert math.isnan(scalars(tmp_path, "train/loss")[0][1])


def test_the_resolved_recipe_is_there_as_text_and_as_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    write(tmp_path)

    found = read(tmp_path)
    (text,) = found.Tensors("recipe/text_summary")
    assert '"max_staleness": 1' in text.tensor_proto.string_val[0].decode()
    data = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    settings = data.session_start_info.hparams
    assert settings["learner.lr"].number_value == 3e-4
    assert settings["teacher.kind"].string_value == "local"
    assert settings["deterministic"].string_value == "false"
    assert settings["learner.betas"].string_value == "[0.9,0.95]"


@pytest.mark.parametrize("step", [0, 2])
def test_what_a_resumed_run_does_again_hides_what_it_did_before(tmp_path: Path, step: int) -> None:
    write(tmp_path, *(a_point(number, loss=1.0) for number in (0, 1, 2, 3, 4)))
    write(tmp_path, a_point(step + 1, loss=0.5), step=step)

    assert scalars(tmp_path, "train/loss") == [*((number, 1.0) for number in range(step + 1)), (step + 1, 0.5)]


def test_what_was_flushed_can_be_read_before_the_end(tmp_path: Path) -> None:
    sink = TensorBoardSink(folder=tmp_path, recipe=recipe_with(tensorboard=True), step=0)
    sink.open()
    sink.write(a_point(1, loss=1.5))
    sink.flush()

    assert scalars(tmp_path, "train/loss") == [(1, 1.5)]
    sink.close(ok=True)


def test_the_check_says_version_and_folder(tmp_path: Path) -> None:
    found = TensorBoardSink(folder=tmp_path / "a" / "b", recipe=recipe_with(), step=0).check()

    assert found.startswith("tensorboard 2.")
    assert found.endswith(str(tmp_path / "a" / "b"))


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")

    with pytest.raises(RecipeError, match=r"sinks\.tensorboard: .*a/b cannot be written, .*/a is a file"):
        TensorBoardSink(folder=tmp_path / "a" / "b", recipe=recipe_with(), step=0).check()
