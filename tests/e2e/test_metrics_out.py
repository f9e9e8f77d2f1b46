"""One real run that is stopped and resumed, and every way in which its numbers come out."""

from __future__ import annotations

import csv
import json
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.export import main as export
from engine.metric_catalogue import EVALUATION_METRICS, METRICS, OBJECTIVE_METRICS, STEP_METRICS
from tests.e2e.runs import World, events, finish, run, start_run, stop, wait_for
from tests.support.offline_wandb import read_offline_run

pytestmark = pytest.mark.slow

DECLARED = {metric.name for metric in (*STEP_METRICS, *OBJECTIVE_METRICS)}


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a run left behind that was stopped after a few steps and resumed for a few more."""

    out: Path
    metrics_text: str
    """Of ``/metrics``, after the first step."""
    stopped_at: int
    last_step: int

    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def evaluations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def told(world: World, tmp_path_factory: pytest.TempPathFactory) -> Told:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard (extra tensorboard)")
    pytest.importorskip("wandb", reason="needs the package wandb (extra wandb)")
    folder = tmp_path_factory.mktemp("metrics_out")
    recipe, out = world.recipe(folder / "tiny.py"), folder / "run"
    sinks = ["sinks.tensorboard=true", "sinks.wandb.project=tiny", "sinks.wandb.mode=offline"]
    options = [word for sink in sinks for word in ("--set", sink)]
    process = start_run(recipe, "--out", str(out), *options, "--set", "steps=1000")
    wait_for(out, "learner.step", process=process, count=3)
    node = json.loads((out / "node.json").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{node['port']}/metrics", timeout=30) as answer:
        metrics_text = answer.read().decode()
    stop(process)
    stopped = finish(process)
    assert stopped.code == 3, stopped.stderr
    stopped_at = max(event["step"] for event in events(out) if event["event"] == "learner.step")
    run(recipe, "--resume", "--out", str(out), *options, "--set", f"steps={stopped_at + 2}")
    return Told(out=out, metrics_text=metrics_text, stopped_at=stopped_at, last_step=stopped_at + 2)


def test_no_sink_failed_or_was_behind(told: Told) -> None:
    names = [event["event"] for event in events(told.out)]

    assert names.count("sink.opened") == 4
    assert not {"sink.failed", "sink.dropped", "log.listener_failed", "log.message"} & set(names)


def test_every_number_of_a_step_and_of_a_measurement_is_declared(told: Told) -> None:
    assert {name for step in told.steps() for name in step} == DECLARED
    assert {name for line in told.evaluations() for name in line} - {"answers", "references"} == {
        metric.name for metric in EVALUATION_METRICS
    }


def test_every_series_is_declared_and_the_declared_ones_are_there(told: Told) -> None:
    families = {family.name: family for family in text_string_to_metric_families(told.metrics_text)}
    declared = {metric.name.removesuffix("_total"): metric for metric in METRICS}

    assert set(families) == set(declared)
    for name, metric in declared.items():
        assert (families[name].type, families[name].documentation) == (metric.kind, metric.doc)


def test_a_table_has_each_step_once(told: Told, tmp_path: Path) -> None:
    assert export([str(told.out), "-o", str(tmp_path / "m.csv"), "--evaluations", str(tmp_path / "e.csv")]) == 0

    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, told.last_step + 1))
    by_step = {step["step"]: step for step in told.steps()}
    assert [float(row["loss"]) for row in rows] == [by_step[step]["loss"] for step in range(1, told.last_step + 1)]
    with (tmp_path / "e.csv").open(newline="") as file:
        assert [int(row["version"]) for row in csv.DictReader(file)] == [0, told.last_step]


def test_tensorboard_was_told_all_of_it(told: Told) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(told.out / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()

    by_step = {step["step"]: step for step in told.steps()}
    for name in ("loss", "grad_norm", "lr", "staleness_mean", "teacher_mass"):
        got = {event.step: event.value for event in found.Scalars(f"train/{name}")}
        assert got == pytest.approx({step: by_step[step][name] for step in range(1, told.last_step + 1)}, rel=1e-6)
    kl = {event.step: event.value for event in found.Scalars("eval/kl")}
    assert kl == pytest.approx({line["version"]: line["kl"] for line in told.evaluations()}, rel=1e-6)


def test_weights_and_biases_was_told_all_of_it_in_one_run(told: Told) -> None:
    stopped, resumed = (read_offline_run(path) for path in sorted((told.out / "wandb").glob("offline-run-*")))

    assert stopped.run_id == resumed.run_id
    assert (stopped.exit_code, resumed.exit_code) == (0, 0)
    assert (stopped.config["learner"]["lr"], resumed.config["steps"]) == (3e-3, told.last_step)
    rows = [*stopped.history, *resumed.history]
    by_step = {step["step"]: step for step in told.steps()}
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {step: by_step[step]["loss"] for step in range(1, told.last_step + 1)}
    kl = {row["step"]: row["eval/kl"] for row in rows if "eval/kl" in row}
    assert kl == {line["version"]: line["kl"] for line in told.evaluations()}


def test_what_a_sink_lacks_is_found_before_anything_starts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    (tmp_path / "a file").write_text("")
    sinks = [f"sinks.tensorboard={tmp_path / 'a file'}", "sinks.wandb.project=tiny"]
    options = [word for sink in sinks for word in ("--set", sink)]

    checked = run(world.recipe(tmp_path / "tiny.py"), "--check", "--json", *options, expect=2)

    (finding,) = [found for found in checked.json()["findings"] if found["state"] != "ok"]
    assert finding["subject"] == "sinks"
    assert "a file is a file; name another folder; and sinks.wandb would send" in finding["text"]
    assert "Traceback" not in checked.stderr
