"""One tiny teacher per session, and teacher services as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.models import tiny_model

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """``python -m teacher`` as a child process."""

    def __init__(self, process: subprocess.Popen[bytes], port_file: Path, log: Path) -> None:
        self.process = process
        self._port_file = port_file
        self._log = log

    @property
    def url(self) -> str:
        """Waits until the port is open."""
        give_up = time.monotonic() + 60
        # A poll with a real wait: the other side is a process, and shows nothing else.
        while not self._port_file.exists():
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise AssertionError(f"the service did not open its port:\n{self.log}")
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        return f"http://127.0.0.1:{int(self._port_file.read_text())}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, if it still runs, and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.exit_code()

    def exit_code(self) -> int:
        """Wait until it has ended by itself."""
        return self.process.wait(60)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("teacher") / "tiny-teacher", seed=1)


@pytest.fixture(scope="session")
def start_service(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """``start_service("--max-queue", "2", …)``; all are killed at the end of the session.

    ``module="tests.teacher.slow_teacher"`` starts in a moment and takes its time for each batch.
    """
    started: list[Service] = []

    def start(*options: str, model: Path = teacher_folder, module: str = "teacher") -> Service:
        folder = tmp_path_factory.mktemp("service")
        port_file, log = folder / "port", folder / "log"
        command = [sys.executable, "-m", module, "--model", str(model), "--num-threads", "1"]
        command += ["--port", "0", "--port-file", str(port_file), *options]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
        started.append(Service(process, port_file, log))
        return started[-1]

    yield start
    for service in started:
        service.end(signal.SIGKILL)
