"""What it costs to have a batch scored: our service on torch and on vLLM, a stock ``vllm serve``, and vLLM by itself.

    python -m tests.bench.bench_scoring [--quick] [--turns N] [--rollouts N] [--tokens T] [--top-k K] [--model DIR]

Every contender is a process of its own with one thread and float32, one after the other. All rollouts are asked for
together, each with a prompt of its own (so nobody gains by sharing one), T response tokens and the top K. The same
sequences go through vLLM as a library, with its own prompt log-probabilities (*bare vLLM scoring*) and without
(*forward pass alone*), which nothing that uses vLLM can beat.

Server CPU is that of all processes of the server; on a machine that is shared it says more than the wall. The client is
this process; *loop still* is the longest that its event loop did not turn while four answers came and were read. A
ratio is the contender's number by that of ours on vLLM: above 1, ours on vLLM is better. Needs vLLM's environment,
which ``make test-vllm`` makes, or its interpreter in --vllm-python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop
from transformers import AutoConfig, AutoTokenizer

from teacher.client import TeacherClient
from teacher.same_tokens import known
from teacher.vllm_client import VllmClient
from tests.bench.process_clock import cpu_s
from tests.bench.report import Report, Row, Target, add_options, finish, progress
from tests.e2e.runs import free_port
from tests.vllm.stock_server import stock_server

OURS_VLLM, OURS_TORCH = "ours, vLLM", "ours, torch"
STOCK, BARE, FORWARD = "vllm serve, JSON", "bare vLLM scoring", "forward pass alone"
PROMPT_TOKENS, BATCH_TOKENS = 32, 2048
NUM_WATCHED = 4
BARE_LIMIT, CLIENT_CPU_TARGET, BYTES_TARGET = 1.15, 3.0, 8.0


class Turn(NamedTuple):
    wall_s: float
    server_cpu_s: float
    client_cpu_s: float = 0.0
    num_bytes: float = 0.0
    still_s: float = 0.0


class Work(NamedTuple):
    model: Path
    ids: npt.NDArray[np.int64]
    """[rollouts, PROMPT_TOKENS + T]"""
    top_k: int
    turns: int
    python: str
    """Interpreter of the environment with vLLM."""

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return int(self.ids[:, PROMPT_TOKENS:].size)


def measure(work: Work, scratch: Path) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {}
    found |= measure_bare(work, scratch)
    for name, backend in ((OURS_VLLM, "vllm"), (OURS_TORCH, "torch")):
        progress(name)
        with our_service(work, backend) as (url, pid):
            found[name] = _run(measure_service(work, lambda: TeacherClient(url, timeout_s=3600.0), pid))
    progress(STOCK)
    length = work.ids.shape[1] + 1
    options = ["--enable-scale-out", "--max-logprobs", str(work.top_k), "--max-model-len", str(length)]
    options += ["--max-num-batched-tokens", str(BATCH_TOKENS), "--kv-cache-memory-bytes", str(512 << 20)]
    with stock_server(work.model, scratch, *options, python=work.python) as server:
        tokenizer, config = AutoTokenizer.from_pretrained(work.model), AutoConfig.from_pretrained(work.model)
        vocabulary = known(tokenizer, vocab_size=config.vocab_size, source="the model")
        found[STOCK] = _run(
            measure_service(
                work, lambda: VllmClient(server.url, known=vocabulary, timeout_s=3600.0), server.process.pid
            )
        )
    return found


def measure_bare(work: Work, scratch: Path) -> dict[str, list[Turn]]:
    tokens = scratch / "tokens.npy"
    np.save(tokens, work.ids)
    command = [work.python, "-m", "tests.bench.bare_scoring", "--model", str(work.model), "--tokens", str(tokens)]
    command += ["--top-k", str(work.top_k), "--batch-tokens", str(BATCH_TOKENS)]
    found: dict[str, list[Turn]] = {BARE: [], FORWARD: []}
    progress(BARE)
    with subprocess.Popen(command, env=_one_thread(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
        assert bare.stdin is not None
        assert bare.stdout is not None
        if bare.stdout.readline() != "ready\n":
            raise RuntimeError("vLLM as a library did not start; what it said is above")
        for turn in range(work.turns + 1):
            for name, word in ((BARE, "score"), (FORWARD, "forward")):
                # The first turn warms up.
                bare.stdin.write(f"{word} {len(work.ids) if turn > 0 else 1}\n")
                bare.stdin.flush()
                said = json.loads(bare.stdout.readline())
                if turn > 0:
                    found[name].append(Turn(wall_s=said["wall_s"], server_cpu_s=said["cpu_s"]))
        bare.stdin.close()
    return found


async def measure_service(work: Work, connect: Callable[[], TeacherClient | VllmClient], server_pid: int) -> list[Turn]:
    turns = []
    async with connect() as client:
        num_bytes = counting(client)
        await ask(client, work, 1)
        for _ in range(work.turns):
            num_bytes[0] = 0
            before_s, wall_s, client_s = session_cpu_s(server_pid), time.perf_counter(), time.process_time()
            await ask(client, work, len(work.ids))
            turn = Turn(
                wall_s=time.perf_counter() - wall_s,
                server_cpu_s=session_cpu_s(server_pid) - before_s,
                client_cpu_s=time.process_time() - client_s,
                num_bytes=num_bytes[0],
            )
            # By itself: a timer that rings all the time costs more than our answers do.
            async with watching() as still:
                await ask(client, work, NUM_WATCHED)
            turns.append(turn._replace(still_s=still[0]))
    return turns


async def ask(client: TeacherClient | VllmClient, work: Work, num: int) -> None:
    rows = work.ids[:num].tolist()
    await asyncio.gather(
        *(
            client.score(prompt_ids=row[:PROMPT_TOKENS], response_ids=row[PROMPT_TOKENS:], top_k=work.top_k)
            for row in rows
        )
    )


def counting(client: TeacherClient | VllmClient) -> list[int]:
    """Bytes of the answers' bodies, from now on."""
    counted, connection = [0], client._connection
    call: Callable[..., Awaitable[bytes]] = connection.call

    async def counted_call(*arguments: Any, **named: Any) -> bytes:
        body = await call(*arguments, **named)
        counted[0] += len(body)
        return body

    connection.call = counted_call  # type: ignore[method-assign]
    return counted


@asynccontextmanager
async def watching() -> AsyncIterator[list[float]]:
    """The longest that the loop came late to a timer of 5 ms."""
    worst = [0.0]

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.005
            await asyncio.sleep(0.005)
            worst[0] = max(worst[0], time.perf_counter() - due)

    task = asyncio.create_task(tick())
    yield worst
    task.cancel()


@contextmanager
def our_service(work: Work, backend: str) -> Iterator[tuple[str, int]]:
    port = free_port()
    command = [work.python, "-m", "teacher", "--model", str(work.model), "--backend", backend, "--port", str(port)]
    command += ["--num-threads", "1", "--max-batch-tokens", str(BATCH_TOKENS), "--kv-cache-bytes", str(512 << 20)]
    process = subprocess.Popen(command, env=_one_thread(), stderr=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _run(wait_ready(url, process))
        yield url, process.pid
    finally:
        process.kill()
        process.wait()


async def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    async with TeacherClient(url) as client:
        while not await client.ready():
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with {process.returncode} before it was ready")
            await asyncio.sleep(0.1)


def session_cpu_s(pid: int) -> float:
    """Of all living processes of the session that ``pid`` leads."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == pid:
                total += cpu_s(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return total


def rows_of(found: dict[str, list[Turn]], work: Work) -> list[Row]:
    load = f"{len(work.ids)} rollouts x {work.ids.shape[1] - PROMPT_TOKENS} tokens, top {work.top_k}"
    readings: tuple[tuple[str, Callable[[Turn], float]], ...] = (
        ("s", lambda turn: turn.wall_s),
        ("server CPU s", lambda turn: turn.server_cpu_s),
        ("client CPU s", lambda turn: turn.client_cpu_s),
        ("bytes/token", lambda turn: turn.num_bytes / work.num_tokens),
        ("ms loop still", lambda turn: turn.still_s * 1e3),
    )
    rows = []
    for unit, value in readings:
        ours = median([value(turn) for turn in found[OURS_VLLM]])
        for name, turns in found.items():
            theirs = median([value(turn) for turn in turns])
            if theirs > 0:
                ratio = None if name == OURS_VLLM else theirs / ours
                rows.append(Row(load=load, contender=name, value=theirs, unit=unit, ratio=ratio))
    return rows


def targets_of(found: dict[str, list[Turn]]) -> list[Target]:
    def of(name: str, field: str) -> float:
        return median([getattr(turn, field) for turn in found[name]])

    return [
        Target(
            what=f"CPU of our service on vLLM, by {BARE}'s",
            found=(of(OURS_VLLM, "server_cpu_s") + of(OURS_VLLM, "client_cpu_s")) / of(BARE, "server_cpu_s"),
            bound=BARE_LIMIT,
            at_most=True,
        ),
        Target(
            what=f"client CPU of {STOCK}, by ours",
            found=of(STOCK, "client_cpu_s") / of(OURS_VLLM, "client_cpu_s"),
            bound=CLIENT_CPU_TARGET,
        ),
        Target(
            what=f"bytes of {STOCK}, by ours",
            found=of(STOCK, "num_bytes") / of(OURS_VLLM, "num_bytes"),
            bound=BYTES_TARGET,
        ),
    ]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def vllm_python(named: str | None) -> str | None:
    """An interpreter that can import vllm: the one named, this one, or that of ``make test-vllm``."""
    for python in (named,) if named is not None else (sys.executable, ".venv-vllm/bin/python"):
        probe = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"]
        try:
            if subprocess.run(probe, check=False).returncode == 0:
                return python
        except OSError:
            continue
    return None


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _run(work: Any) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2/teacher"), metavar="DIR")
    parser.add_argument("--turns", type=int, default=1, help="a turn takes a minute and more for each contender")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vllm-python", metavar="FILE")
    add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rollouts, options.tokens = 8, 128
    python = vllm_python(options.vllm_python)
    if python is None:
        report = Report(bench="scoring", rows=(), failures=("no interpreter with vLLM; make test-vllm makes one",))
        return finish(report, as_json=options.json)
    config = msgspec.json.decode((options.model / "config.json").read_bytes(), type=dict[str, Any])
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config["vocab_size"], (options.rollouts, PROMPT_TOKENS + options.tokens))
    work = Work(model=options.model.absolute(), ids=ids, top_k=options.top_k, turns=options.turns, python=python)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(work, Path(scratch))
    report = Report(bench="scoring", rows=tuple(rows_of(found, work)), targets=tuple(targets_of(found)))
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
