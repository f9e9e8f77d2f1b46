"""The demo's launcher, with real processes: small programs stand in for the teacher and the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.demo import DemoError, check, run_command

ROOT = Path(__file__).resolve().parents[2]

TEACHER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
with open(sys.argv[2], "a") as pids:
    pids.write(f"{os.getpid()}\\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

DRIVER = """
import sys
from pathlib import Path
from recipes.demo import TeacherProcess, launch
teacher_program, run_program, port, pids, log = sys.argv[1:]
teacher = TeacherProcess([sys.executable, teacher_program, port, pids], port=int(port), log=Path(log))
sys.exit(launch([sys.executable, run_program, pids], teacher=teacher))
"""


class Demo:
    """A launcher under test, and what it started."""

    def __init__(self, folder: Path, *, run: str, teacher: str) -> None:
        self.pids = folder / "pids"
        self.log = folder / "teacher.log"
        programs = [folder / "teacher.py", folder / "run.py"]
        for path, text in zip(programs, (teacher, run), strict=True):
            path.write_text(textwrap.dedent(text))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, programs), str(port), str(self.pids), str(self.log)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line: str) -> None:
        """Return when the launcher, or the run in it, says a line that holds this."""
        assert self.process.stdout is not None
        for said in self.process.stdout:
            if line in said:
                return
        pytest.fail(f"the demo ended without saying {line!r}")

    def end(self) -> tuple[int, str]:
        """Exit code and what stood on stderr; asserts that no teacher is left."""
        _, errors = self.process.communicate(timeout=30)
        for pid in self.pids.read_text().split() if self.pids.exists() else ():
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)
        return self.process.returncode, errors


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[list[Demo]]:
    """Demos put here are killed at the end, whatever the test came to."""
    started: list[Demo] = []
    yield started
    for demo in started:
        demo.process.kill()
        demo.process.communicate()


def start(demos: list[Demo], folder: Path, *, run: str, teacher: str = TEACHER) -> Demo:
    demo = Demo(folder, run=run, teacher=teacher)
    demos.append(demo)
    return demo


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_demo_ends_with_the_code_of_the_run_and_without_a_teacher(
    code: int, tmp_path: Path, demos: list[Demo]
) -> None:
    demo = start(demos, tmp_path, run=f"raise SystemExit({code})")

    assert demo.end() == (code, "")


WAITS = """
    import signal, sys
    signals = []
    def note(signum, frame):
        signals.append(signum)
        print("got", signum, flush=True)
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    print("run is up", flush=True)
    while len(signals) < {count}:
        signal.pause()
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)],
)
def test_a_signal_reaches_the_run_once_and_the_teacher_outlives_the_run(
    sent: signal.Signals, arrives: signal.Signals, tmp_path: Path, demos: list[Demo]
) -> None:
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip("these tests run under nohup, which has all processes below it ignore this signal")
    demo = start(demos, tmp_path, run=WAITS.format(count=2))
    demo.wait_for("run is up")

    demo.process.send_signal(sent)
    demo.wait_for(f"got {int(arrives)}")
    os.kill(int(demo.pids.read_text()), 0)  # the teacher is there: the run that drains needs it
    demo.process.send_signal(sent)

    assert demo.end() == (3, "")


def test_a_run_that_a_signal_killed_is_told_as_a_shell_tells_it(tmp_path: Path, demos: list[Demo]) -> None:
    demo = start(demos, tmp_path, run="import os\nos.kill(os.getpid(), 9)")

    assert demo.end() == (137, "")


def test_a_teacher_that_is_killed_is_reported_with_what_starts_another(tmp_path: Path, demos: list[Demo]) -> None:
    demo = start(demos, tmp_path, run=WAITS.format(count=1))
    demo.wait_for("run is up")
    os.kill(int(demo.pids.read_text()), signal.SIGKILL)

    demo.wait_for("the teacher ended with code -9; the run waits, start another one with: python ")
    demo.process.send_signal(signal.SIGTERM)
    assert demo.end() == (3, "")


def test_a_teacher_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path, demos: list[Demo]) -> None:
    demo = start(demos, tmp_path, run="", teacher="raise SystemExit('error: no such model')")

    code, errors = demo.end()

    assert code == 2
    assert errors == (
        f"error: the teacher did not start (error: no such model); its output is in {tmp_path / 'teacher.log'}\n"
    )


def test_a_signal_before_the_run_begins_stops_the_teacher(tmp_path: Path, demos: list[Demo]) -> None:
    demo = start(demos, tmp_path, run="", teacher="import signal\nsignal.pause()")
    demo.wait_for("the teacher starts")

    demo.process.send_signal(signal.SIGTERM)

    assert demo.end() == (143, "")


def test_a_port_that_is_taken_is_refused_before_a_stranger_is_asked_for_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/smollm2/teacher").mkdir(parents=True)
    (tmp_path / "models/smollm2/teacher/config.json").touch()
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(DemoError, match=rf"^port {port} is not free .* name another one with --port$"):
            check(port)


def test_missing_models_are_named_with_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DemoError, match=r"make it with: python -m recipes.smollm2_models$"):
        check(0)


def test_the_run_is_told_of_a_port_that_is_not_the_one_in_the_recipe() -> None:
    command = run_command(["--", "--set", "steps=2"], port=9000)

    assert command[3:] == [
        "recipes/smollm2.py",
        "--set",
        'teacher.urls=["http://127.0.0.1:9000"]',
        "--set",
        "steps=2",
    ]
