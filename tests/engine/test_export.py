"""The command that makes tables of a run: what notebooks read back, and what it says of runs that are none."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from engine.export import main
from engine.metric_catalogue import EVALUATION_METRICS, OBJECTIVE_METRICS, STEP_METRICS

ROOT = Path(__file__).parents[2]


def a_step(step: int, /, **more: Any) -> dict[str, Any]:
    return {
        "t": f"2026-01-02T03:04:{step:02d}.250000+00:00",
        "step": step,
        "loss": 1 / step,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "num_rollouts": 8,
        "num_tokens": 340,
        "num_micro_batches": 1,
        "staleness_max": 1,
        "staleness_mean": 0.125,
        "skipped": False,
        "interval_s": None if step == 1 else 6.25,
        "teacher_mass": 0.875,
        **more,
    }


def an_evaluation(version: int, kl: float) -> dict[str, Any]:
    return {
        "version": version,
        "num_prompts": 16,
        "num_tokens": 640,
        "kl": kl,
        "reference_kl": None,
        "reference_nll": 1.5,
        "score": None,
        "answers": [{"prompt": "a", "answer": "b", "kl": 1.0}],
        "references": ["c"],
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run, with a comma"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    write(folder / "metrics.jsonl", *(a_step(step) for step in (1, 2, 3)))
    write(folder / "evaluations.jsonl", an_evaluation(0, 1.25), an_evaluation(3, 0.5))
    return folder


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_one_plain_header_and_one_row_per_step(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "-o", str(tmp_path / "metrics.csv")]) == 0

    rows = read_csv(tmp_path / "metrics.csv")
    assert list(rows[0]) == [*(metric.name for metric in STEP_METRICS), "teacher_mass"]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == [1, 1 / 2, 1 / 3], "every bit"
    assert (rows[0]["interval_s"], rows[1]["interval_s"], rows[0]["skipped"]) == ("", "6.25", "false")


def test_parquet_has_types_and_each_column_its_unit_and_reduction(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "-o", str(tmp_path / "metrics.parquet")]) == 0

    read = pyarrow.parquet.read_table(tmp_path / "metrics.parquet")
    row = read.to_pylist()[1]
    assert (row["step"], row["loss"], row["skipped"]) == (2, 0.5, False)
    assert row["t"] == datetime(2026, 1, 2, 3, 4, 2, 250_000, tzinfo=UTC)
    declared = {metric.name: metric for metric in (*STEP_METRICS, *OBJECTIVE_METRICS)}
    for field in read.schema:
        assert field.metadata[b"unit"].decode() == declared[field.name].unit
        assert field.metadata[b"reduction"].decode() == declared[field.name].reduction
    assert read.schema.field("loss").type == pyarrow.float64()
    assert read.schema.field("num_tokens").type == pyarrow.int64()


@pytest.mark.parametrize("suffix", ["csv", "parquet", "PARQUET"])
def test_evaluations_go_into_a_file_of_their_own(run: Path, tmp_path: Path, suffix: str) -> None:
    steps, evaluations = tmp_path / f"steps.{suffix}", tmp_path / f"evaluations.{suffix}"
    assert main([str(run), "-o", str(steps), "--evaluations", str(evaluations)]) == 0

    assert steps.exists()
    if suffix == "csv":
        rows = read_csv(evaluations)
        assert [(row["version"], row["kl"], row["reference_kl"]) for row in rows] == [
            ("0", "1.25", ""),
            ("3", "0.5", ""),
        ]
    else:
        read = pyarrow.parquet.read_table(evaluations)
        assert read.column_names == [metric.name for metric in EVALUATION_METRICS]
        assert read.column("kl").to_pylist() == [1.25, 0.5]


def test_a_metric_of_a_trainer_of_yours_becomes_a_column(run: Path, tmp_path: Path) -> None:
    write(run / "metrics.jsonl", a_step(1), a_step(2, **{"reward, total": 0.5}))
    main([str(run), "-o", str(tmp_path / "m.csv")])
    main([str(run), "-o", str(tmp_path / "m.parquet")])

    assert [row["reward, total"] for row in read_csv(tmp_path / "m.csv")] == ["", "0.5"]
    field = pyarrow.parquet.read_schema(tmp_path / "m.parquet").field("reward, total")
    assert field.metadata[b"unit"] == b""


def test_a_run_without_a_step_gives_a_header(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()

    assert main([str(run), "-o", str(tmp_path / "m.csv")]) == 0
    assert main([str(run), "-o", str(tmp_path / "m.parquet")]) == 0
    assert (tmp_path / "m.csv").read_text().startswith("t,step,loss,")
    assert read_csv(tmp_path / "m.csv") == []
    assert pyarrow.parquet.read_table(tmp_path / "m.parquet").num_rows == 0
    assert "0 steps" in capsys.readouterr().err


def test_it_says_what_it_wrote_and_what_it_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run / "metrics.jsonl", *(a_step(step) for step in (1, 2, 3, 2)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')

    assert main([str(run), "-o", str(tmp_path / "m.csv")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"{tmp_path / 'm.csv'}: 2 steps, 13 columns; left out: 2 steps that a resumed run went back behind; "
        "passed over: 1 line that cannot be read\n"
    )


def test_csv_goes_to_stdout_for_a_dash(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "-o", "-"]) == 0

    assert [row["step"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))] == ["1", "2", "3"]


def test_who_stops_reading_stdout_hears_no_complaint(run: Path) -> None:
    write(run / "metrics.jsonl", *(a_step(1 + step % 59, step=step) for step in range(20_000)))
    with subprocess.Popen(
        [sys.executable, "-m", "engine.export", str(run), "-o", "-"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()

    assert (process.returncode, err) == (0, b"")


def test_an_existing_file_is_replaced_and_nothing_is_left_beside_it(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "m.csv"
    target.parent.mkdir()
    target.write_text("old")
    main([str(run), "-o", str(target)])

    assert target.read_text().startswith("t,step")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "-o", "{tmp}/m.txt"], r"m\.txt: unknown kind of file '\.txt'; expected a name that ends in \.csv"),
        (["{run}", "-o", "{tmp}/metrics"], r"unknown kind of file ''"),
        (["{run}", "-o", "{tmp}/nowhere/m.csv"], r"there is no folder .*nowhere; make it"),
        (["{run}", "-o", "{tmp}/folder.csv"], r"folder\.csv is a folder; expected the name of a file"),
        (["{run}"], r"nothing to write; name a file with -o"),
        (["{run}", "-o", "{tmp}/m.csv", "--evaluations", "{tmp}/m.csv"], r"both name .*m\.csv; give each table"),
        (["{tmp}/gone", "-o", "{tmp}/m.csv"], r"gone: there is no such folder; expected the folder of a run"),
        (["{run}/recipe.json", "-o", "{tmp}/m.csv"], r"recipe\.json: is a file; expected the folder of a run"),
        (["{tmp}/folder.csv", "-o", "{tmp}/m.csv"], r"holds no run \(no recipe\.json, no metrics\.jsonl\)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "folder.csv").mkdir()

    assert main([word.format(run=run, tmp=tmp_path) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert re.search(message, err), err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(run: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "engine.export", str(run), "-o", "-"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_pyarrow_csv_works_and_parquet_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert main([str(run), "-o", str(tmp_path / "m.csv")]) == 0
    assert main([str(run), "-o", str(tmp_path / "m.parquet")]) == 2
    assert "pip install 'slipstream[parquet]'" in capsys.readouterr().err
