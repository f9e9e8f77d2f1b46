"""The command: ``python -m engine.trace RUN_DIR [-o FILE]``. Turns the logs of a run, finished, going on or killed,
into one trace for ui.perfetto.dev.

Exit codes:
    0    the trace is written
    2    there is no log, or the trace cannot be written
    130    stopped by SIGINT or SIGTERM; nothing is left behind
    141    nobody reads the standard output any more
"""

from __future__ import annotations

import argparse
import gzip
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from engine.errors import RunDirError, UserError
from engine.monitor.log_files import LogFile, find_logs, merged
from engine.monitor.trace.chrome import TraceEvent
from engine.monitor.trace.convert import Converter

EXIT_OK, EXIT_WRONG, EXIT_INTERRUPTED, EXIT_NO_READER = 0, 2, 130, 141

_STDOUT = Path("-")
_HEADER = b'{"displayTimeUnit":"ms","traceEvents":['
_BUFFER_BYTES = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    target = options.out or options.run_dir / "trace.json"
    try:
        files = [LogFile(path) for path in find_logs(options.run_dir)]
        _refuse_log(target, files)
        with _open(target) as out:
            converter = write_trace(files, out)
    except BrokenPipeError:
        # What is still buffered has no reader either; without this the interpreter would say so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_WRONG
    except KeyboardInterrupt:
        sys.stderr.write("stopped; no trace was written\n")
        return EXIT_INTERRUPTED
    for file in files:
        for remark in _remarks(file):
            sys.stderr.write(f"{remark}\n")
    says = sys.stderr if target == _STDOUT else sys.stdout
    says.write(f"{_summary(converter, target)}\n")
    return EXIT_OK


def write_trace(files: Sequence[LogFile], out: BinaryIO) -> Converter:
    """Write the trace of these logs, event by event; returns what counted them.

    Raises:
        RunDirError: a log cannot be read.
        OSError: ``out`` cannot be written.
    """
    encode = msgspec.json.Encoder().encode
    separator = b"\n"

    def emit(event: TraceEvent) -> None:
        nonlocal separator
        out.write(separator + encode(event))
        separator = b",\n"

    converter = Converter(emit, files=tuple(file.path for file in files))
    out.write(_HEADER)
    for line in merged(files):
        converter.take(line)
    converter.finish()
    zero = datetime.fromtimestamp(converter.zero_us / 1e6, UTC).isoformat()
    out.write(b'\n],"otherData":{"time zero":"%s"}}\n' % zero.encode())
    return converter


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.trace",
        description="Turn the logs of a run into a trace for ui.perfetto.dev: a track per actor, waits, an arrow for "
        "each rollout from sampling to training. The run may be finished, going on or killed.",
        epilog="Exit codes: 0 written; 2 there is no log, or the trace cannot be written; 130 stopped by a signal.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run, the one with events.jsonl")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        help="where the trace goes (RUN_DIR/trace.json); compressed when it ends in .gz; - is the standard output",
    )
    return parser.parse_args(arguments)


def _refuse_log(target: Path, files: Sequence[LogFile]) -> None:
    if target != _STDOUT and os.path.exists(target) and any(os.path.samefile(target, file.path) for file in files):
        raise RunDirError(f"{target} is the log itself; name another file with -o")


@contextmanager
def _open(target: Path) -> Iterator[BinaryIO]:
    """What the trace is written to: aside, and renamed when it is whole. A pipe or a device is written to as it is.

    Raises:
        RunDirError: it cannot be written.
    """
    if target == _STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(os.path.realpath(target))  # the file that a link leads to is replaced, not the link
    is_special = os.path.exists(target) and not os.path.isfile(target)
    aside = target if is_special else target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with aside.open("wb", buffering=_BUFFER_BYTES) as file:
            if target.suffix == ".gz":
                # Level 3: half the time of the default for a tenth more bytes.
                with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=3) as packed:
                    yield cast(BinaryIO, packed)
            else:
                yield file
        if not is_special:
            aside.replace(target)
    except RunDirError:
        raise
    except OSError as error:
        raise RunDirError(
            f"cannot write {target}: {error.strerror}; name a file in a writable folder with room for it with -o"
        ) from error
    finally:
        if not is_special:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def _remarks(file: LogFile) -> Iterator[str]:
    if file.num_left_out:
        lines = "line is" if file.num_left_out == 1 else "lines are"
        yield (
            f"{file.path}: {file.num_left_out} of {file.num_lines} {lines} not JSON of the log's form and left out "
            f"(the first is line {file.first_left_out})"
        )
    if file.is_torn:
        yield f"{file.path}: the last line is not complete and left out; the run goes on, or was killed"


def _summary(converter: Converter, target: Path) -> str:
    if converter.begin_us is None:
        return f"wrote {target}: an empty trace, the log holds no events yet"
    seconds = (converter.end_us - converter.begin_us) / 1e6
    counts = (
        _count(converter.num_spans, "span"),
        _count(converter.num_rollouts, "rollout"),
        _count(converter.num_processes, "process", "es"),
    )
    return f"wrote {target}: {', '.join(counts)}, {seconds:,.0f} s; open it at https://ui.perfetto.dev"


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{'' if number == 1 else plural}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
