"""Runs the demo's two processes side by side and leaves none behind: the teacher service, then the run.

    python -m recipes.demo [--port N] [-- ] [what `python -m engine.run` takes]

The teacher is up when ``/readyz`` says so; only then does the run start. A teacher that dies is reported
with the line that starts it again: the run waits for it and loses nothing. Signals go to the run, one for one: the
first has it drain and checkpoint, a second stops it at once; the teacher stays up until the run has ended, since a
drain needs it. Ends with the run's exit code, with 2 when the teacher cannot be started, with 128 + N when signal N
came before the run began.

Needs the models (``python -m recipes.smollm2_models``) and decides nothing about training: ``recipes/smollm2.py`` does.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

RECIPE = "recipes/smollm2.py"
TEACHER_MODEL = Path("models/smollm2/teacher")
TEACHER_LOG = Path("runs/teacher.log")
# Answers of one wave end within a few milliseconds: scored together, their common prompt is computed once.
TEACHER_OPTIONS = ("--dtype", "auto", "--linger-ms", "50")
HOST = "127.0.0.1"
DEFAULT_PORT = 8765
READY_WITHIN_S = 300.0
POLL_S = 0.25
STOP_WITHIN_S = 20.0
FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""What comes in here, and what the run gets for it: a closed terminal asks it to stop like anybody else."""

ENVIRONMENT = {
    # glibc gives big tensors back to the system and takes them again, page fault by page fault: 61 ms for a fresh
    # 131 MB, 10 ms when it may keep them.
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "HF_HUB_OFFLINE": "1",
}
# Two processes share the machine, and the run computes in two threads by itself: the teacher gets one core.
TEACHER_ENVIRONMENT = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}


class DemoError(Exception):
    """Something outside must change before the demo can run; shown as one line."""


class Interrupted(Exception):
    """A signal came before the run began."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """What came in and was not yet acted upon. The handler only takes note: no call is torn in the middle."""

    def __init__(self) -> None:
        self._pending: list[signal.Signals] = []
        for signum in FORWARDED:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup, SIGHUP stays ignored
                signal.signal(signum, self._note)

    def take(self) -> list[signal.Signals]:
        """The signals since the last call, in order."""
        taken, self._pending = self._pending, []
        return taken

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._pending.append(signal.Signals(signum))


class TeacherProcess:
    """The teacher service as a child in a session of its own, so that Ctrl-C in the terminal does not reach it."""

    def __init__(self, command: Sequence[str], *, port: int, log: Path) -> None:
        self._command = command
        self._url = f"http://{HOST}:{port}/readyz"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return shlex.join(["python", *self._command[1:]])

    def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | TEACHER_ENVIRONMENT,
                start_new_session=True,
            )

    def wait_ready(self, signals: Signals) -> None:
        """Return when ``/readyz`` answers 200.

        Raises:
            DemoError: the process ended, or was not ready after ``READY_WITHIN_S``.
            Interrupted: a signal came.
        """
        for _ in range(round(READY_WITHIN_S / POLL_S)):
            for signum in signals.take():
                raise Interrupted(signum)
            if self.wait(POLL_S) is not None:
                raise DemoError(f"the teacher did not start ({self.last_line()}); its output is in {self._log}")
            if self._is_ready():
                return
        raise DemoError(f"the teacher was not ready after {READY_WITHIN_S:.0f} s; its output is in {self._log}")

    def wait(self, timeout_s: float) -> int | None:
        """The exit code as soon as there is one; None when it runs on after ``timeout_s``."""
        assert self._process is not None, "start() first"
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that is not enough. Idempotent."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        if self.wait(STOP_WITHIN_S) is None:
            say(f"demo: the teacher did not stop within {STOP_WITHIN_S:.0f} s and is killed")
            self._process.kill()
            self._process.wait()

    def last_line(self) -> str:
        """What it said last."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._url, timeout=2.0) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):  # refused, reset, slow, or 503 while it loads
            return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo", description="Teacher and run, side by side.")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"of the teacher, on {HOST} (default %(default)s)"
    )
    arguments, for_run = parser.parse_known_args(argv)
    port: int = arguments.port
    teacher = TeacherProcess(
        [sys.executable, "-m", "teacher", "--model", str(TEACHER_MODEL), "--port", str(port), *TEACHER_OPTIONS],
        port=port,
        log=TEACHER_LOG,
    )
    try:
        check(port)
    except DemoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return launch(run_command(for_run, port=port), teacher=teacher)


def launch(command: Sequence[str], *, teacher: TeacherProcess) -> int:
    """Teacher up, run beside it, teacher down; returns the exit code. Takes over the process's signal handlers."""
    signals = Signals()
    try:
        say("demo: the teacher starts")
        teacher.start()
        teacher.wait_ready(signals)
        say(f"demo: {shlex.join(['python', *command[1:]])}")
        return run(command, teacher=teacher, signals=signals)
    except DemoError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Interrupted as interrupt:
        say(f"demo: stopped by {interrupt.signum.name} before the run began")
        return 128 + interrupt.signum
    finally:
        teacher.stop()


def run_command(for_run: Sequence[str], *, port: int) -> list[str]:
    """The run's command line: the recipe, told where the teacher is when it is not where the recipe says."""
    moved = [] if port == DEFAULT_PORT else ["--set", f'teacher.urls=["http://{HOST}:{port}"]']
    return [sys.executable, "-m", "engine.run", RECIPE, *moved, *(word for word in for_run if word != "--")]


def check(port: int) -> None:
    """Refuse early what would fail late.

    Raises:
        DemoError: no models, or somebody else listens on ``port`` (the run would ask a stranger for scores).
    """
    if not (TEACHER_MODEL / "config.json").exists():
        raise DemoError(f"no model in {TEACHER_MODEL}; make it with: python -m recipes.smollm2_models")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DemoError(
                f"port {port} is not free ({error.strerror}); is another demo running? name another one with --port"
            ) from error


def run(command: Sequence[str], *, teacher: TeacherProcess, signals: Signals) -> int:
    """Start the run and stay beside it until it ends.

    Returns:
        Its exit code, as a shell would say it: 128 + N when signal N killed it.
    """
    # A process group of its own: the terminal's Ctrl-C comes here, and from here to the run exactly once.
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, process_group=0)
    is_teacher_up = True
    while True:
        try:
            code = process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            for signum in signals.take():
                process.send_signal(FORWARDED[signum])
            if is_teacher_up and (ended := teacher.wait(0.0)) is not None:
                is_teacher_up = False
                say(f"demo: the teacher ended with code {ended}; the run waits, start another one with: {teacher}")
            continue
        return code if code >= 0 else 128 - code


def say(line: str) -> None:
    """One line for whoever watches."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
