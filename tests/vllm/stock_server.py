"""An unmodified ``vllm serve`` in a process of its own, on CPU or GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.e2e.runs import free_port

_PATIENCE_S = 240.0


@contextmanager
def stock_server(folder: Path, scratch: Path, *options: str, python: str = sys.executable) -> Iterator[StockServer]:
    """Serve the model in ``folder``; what the server says and needs on disk lies in ``scratch``.

    Args:
        python: interpreter of the environment that has vLLM.
    """
    port = free_port()
    command = [str(Path(python).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    log = scratch / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=_environment(scratch, python), stdout=output, stderr=output, start_new_session=True
        )
    server = StockServer(process, port, log)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


class StockServer:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    def wait_ready(self) -> None:
        give_up = time.monotonic() + _PATIENCE_S
        # A poll with a real wait: the other side is a process, and shows nothing else.
        while time.monotonic() < give_up:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                try:
                    self.process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
                break
        raise AssertionError(f"vllm serve did not get ready:\n{self._log.read_text()[-6000:]}")

    def end(self) -> None:
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_engine(self) -> None:
        """The process that computes, not the one that listens."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_mine = os.getpgid(int(folder.name)) == self.process.pid
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if is_mine and b"EngineCore" in command:
                os.kill(int(folder.name), signal.SIGKILL)


def _environment(scratch: Path, python: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    asked = "import importlib.metadata as m; print(*(d.version for d in m.distributions(name='vllm-cpu')))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    if not version:
        return environment
    # The command asks for a package of the name "vllm" and takes a GPU's paths when there is none that says "cpu".
    told = scratch / "path" / f"vllm-{version}+cpu.dist-info"
    told.mkdir(parents=True, exist_ok=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    path = [str(told.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(path)}
