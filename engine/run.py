"""The command: ``python -m engine.run RECIPE.py [--set a.b=value]… [--resume] [--out DIR] [--check] [--show]
[--simulate] [--simulate-from RUN_DIR] [--json]``.

Exit codes:
    0    the run is complete (or the check found nothing wrong; what is open is listed)
    1    the run failed; it can be continued from its last checkpoint with --resume
    2    recipe, input or surroundings are wrong; nothing was started
    3    asked to stop by SIGINT or SIGTERM: drained, checkpoint written, continue with --resume
    130, 143    stopped at once by a second SIGINT or SIGTERM
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    before = {name: signal.signal(name, _stop_at_once) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Models are read from folders and nothing else: a hub is never asked, not even whether a newer file exists.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        # The terminal belongs to the picture of the run.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # Seconds of imports: from here on a signal ends the process with one line, and --help has been quick.
        from engine.command import command

        return command(options)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Before the run began, or after it ended: there is nothing to drain."""
    sys.stderr.write(f"stopped by {signal.Signals(number).name}; nothing was under way\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.run",
        description="Train a student on its own answers, scored token by token by a teacher.",
        epilog="Exit codes: 0 complete; 1 failed; 2 recipe, input or surroundings are wrong, nothing was started; "
        "3 stopped by a signal, continue with --resume; 130 and 143 stopped at once by a second signal.",
    )
    parser.add_argument("recipe", metavar="RECIPE.py", help="a Python file with `def recipe() -> Recipe`")
    parser.add_argument(
        "--set", metavar="a.b=value", action="append", default=[], help="override a field of the recipe; repeatable"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out (without it: the newest of this recipe's name)"
    )
    parser.add_argument("--out", metavar="DIR", type=_folder, help="folder of the run (runs/NAME-DATE-TIME)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate everything that can be, start nothing; of a recipe for GPUs, on a machine without any, what "
        "only the machine that runs it can answer is listed as open, with commands for it, and is no error",
    )
    parser.add_argument("--show", action="store_true", help="print actors, channels and the resolved recipe")
    parser.add_argument(
        "--simulate", action="store_true", help="predict throughput, waits and staleness; needs neither models nor GPUs"
    )
    parser.add_argument(
        "--simulate-from", metavar="RUN_DIR", type=Path, help="the same, with costs and lengths of an earlier run"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output on stdout")
    for word in sys.argv[1:] if arguments is None else arguments:
        # They go into JSON files and SQLite, which are UTF-8.
        if any("\ud800" <= character <= "\udfff" for character in word):
            parser.error(f"{word!r} is not UTF-8")
    return parser.parse_args(arguments)


def _folder(text: str) -> Path:
    if not text.strip():  # a variable of the shell that is not set; as a path it would be the folder we are called in
        raise argparse.ArgumentTypeError("expected a folder, got an empty text")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
