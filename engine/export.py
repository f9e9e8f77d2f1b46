"""The command: ``python -m engine.export RUN_DIR -o metrics.csv|metrics.parquet [--evaluations FILE]``.

The numbers of a run as a table for notebooks: one row per optimizer step, and one per held-out measurement in a second
file. The run may be going on, or have been killed.

Exit codes:
    0    written
    2    there is no such run, or the file cannot be written
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from engine.errors import RunDirError, UserError
from engine.metric_catalogue import EVALUATION_METRICS, OBJECTIVE_METRICS, RANK_METRICS, STEP_METRICS
from engine.monitor.table import Table, read_table
from engine.monitor.table_files import check_target, write_csv, write_table
from engine.run_dir import RunDir

_STDOUT = Path("-")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    try:
        return _export(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the table has seen enough. Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return UserError.exit_code


def _export(options: argparse.Namespace) -> int:
    run = _run_dir(options.run_dir)
    targets = [path for path in (options.out, options.evaluations) if path is not None]
    if not targets:
        raise UserError("nothing to write; name a file with -o FILE.csv or -o FILE.parquet")
    if len(targets) == 2 and targets[0].absolute() == targets[1].absolute():
        raise UserError(f"-o and --evaluations both name {targets[0]}; give each table a file of its own")
    for path in targets:
        if path != _STDOUT:
            check_target(path)
    if options.out is not None:
        _write(steps_of(run), options.out, "step")
    if options.evaluations is not None:
        _write(evaluations_of(run), options.evaluations, "evaluation")
    return 0


def steps_of(run: RunDir) -> Table:
    """One row per optimizer step of the history that the run stands on.

    Raises:
        UserError: the file cannot be read.
    """
    return read_table(run.metrics, key="step", declared=STEP_METRICS, known=(*OBJECTIVE_METRICS, *RANK_METRICS))


def evaluations_of(run: RunDir) -> Table:
    """One row per held-out measurement; without the answers, which are texts.

    Raises:
        UserError: the file cannot be read.
    """
    return read_table(run.evaluations, key="version", declared=EVALUATION_METRICS)


def _run_dir(path: Path) -> RunDir:
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise RunDirError(f"{path}: {what}; expected the folder of a run, for example runs/NAME-DATE-TIME")
    run = RunDir(path)
    if not any(file.exists() for file in (run.recipe, run.metrics, run.evaluations, run.events)):
        raise RunDirError(f"{path} holds no run (no recipe.json, no metrics.jsonl); expected the folder of a run")
    return run


def _write(table: Table, path: Path, what: str) -> None:
    if path == _STDOUT:
        write_csv(table, sys.stdout)
        sys.stdout.flush()
    else:
        write_table(table, path)
    # Not to stdout: the table may go there.
    sys.stderr.write(f"{path}: {_counted(table.num_rows, what)}, {_counted(len(table.columns), 'column')}")
    if table.num_undone:
        sys.stderr.write(f"; left out: {_counted(table.num_undone, what)} that a resumed run went back behind")
    if table.num_unreadable:
        sys.stderr.write(f"; passed over: {_counted(table.num_unreadable, 'line')} that cannot be read")
    sys.stderr.write("\n")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.export",
        description="Write the numbers of a run as a table: one row per optimizer step.",
        epilog="The name says the format: .csv or .parquet, which also holds unit and reduction of each column; - is "
        "CSV on stdout. Exit codes: 0 written; 2 there is no such run, or the file cannot be written.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, finished, going on or killed")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="the table of optimizer steps")
    parser.add_argument(
        "--evaluations", metavar="FILE", type=Path, help="also, or only: the table of held-out measurements"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
