"""What it costs to bring the teacher's scores to the learner: bytes and CPU, and requests through the real service.

    python -m tests.bench.bench_teacher_wire [--quick] [--turns N] [--tokens T] [--top-k K]

*packing*: one answer of T tokens packed and unpacked in one process, in CPU time. Plain is float32 and int32 arrays in
one buffer, the least that an unpacked format could do. *service*: client and service in a process each, the answers
ready, so what is left is client, wire and server. *small* requests (48 tokens) go one after the other; of *long* ones
(T tokens) 16 are asked for together: of ours and the JSON service at the same time, of ZMQ's in one message, as verl
does. MB/s are those of the plain arrays that arrive, whatever they travelled as.

JSON is made and read by msgspec, the fastest at hand. All send rows for the response only (verl's teacher sends the
prompt's as well).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

import aiohttp
import msgspec
import numpy as np
import torch
import uvloop

from teacher import wire
from teacher.client import TeacherClient
from teacher.protocol import Scores
from tests.bench.report import OURS, Report, Row, Target, add_options, fair_environment, finish
from tests.bench.wire_servers import VOCAB, as_json, from_json, loaded, make_scores, saved

BYTES_LIMIT = 0.65
"""Of the plain arrays."""

SMALL_TOKENS = 48
NUM_SMALL, NUM_LONG = 100, 16
ZMQ, JSON, PLAIN = "torch.save, ZMQ", "JSON, HTTP", "plain arrays"


# Packing, in one process.


def through_frame(scores: Scores) -> int:
    frame = wire.encode_answer(scores, values="float16", vocab_size=VOCAB)
    wire.decode_answer(frame)
    return len(frame)


def through_plain(scores: Scores) -> int:
    parts = (scores.top_ids, scores.top_logprobs, scores.sampled_logprobs)
    buffer = b"".join(part.tobytes() for part in parts)
    np.frombuffer(buffer, np.int32, parts[0].size).reshape(parts[0].shape).copy()
    np.frombuffer(buffer, np.float32, offset=parts[0].nbytes).copy()
    return len(buffer)


def through_json(scores: Scores) -> int:
    text = as_json(scores)
    from_json(text)
    return len(text)


def through_torch(scores: Scores) -> int:
    data = saved(tuple(map(torch.from_numpy, (scores.top_ids, scores.top_logprobs, scores.sampled_logprobs))))
    loaded(data)
    return len(data)


PACKINGS: dict[str, Callable[[Scores], int]] = {
    OURS: through_frame,
    PLAIN: through_plain,
    "torch.save": through_torch,
    "JSON": through_json,
}


def measure_packing(num_tokens: int, top_k: int, turns: int) -> list[Row]:
    scores = make_scores(num_tokens, top_k)
    costs_ms: dict[str, list[float]] = {name: [] for name in PACKINGS}
    num_bytes: dict[str, int] = {}
    for _ in range(turns):
        for name, pack in PACKINGS.items():
            began = time.process_time()
            num_bytes[name] = pack(scores)
            costs_ms[name].append((time.process_time() - began) * 1e3)
    load = f"one answer, {num_tokens} x top {top_k}"
    return [
        *(
            Row(
                load=load,
                contender=name,
                value=num_bytes[name] / num_tokens,
                unit="bytes/token",
                ratio=None if name == OURS else num_bytes[name] / num_bytes[OURS],
            )
            for name in PACKINGS
        ),
        *(
            Row(
                load=load,
                contender=name,
                value=statistics.median(costs_ms[name]),
                unit="CPU ms",
                ratio=None if name == OURS else median_ratio(costs_ms[name], costs_ms[OURS]),
            )
            for name in PACKINGS
        ),
    ]


# Through services.

Ask = Callable[[Sequence[int]], Awaitable[None]]
"""Asks for answers of these lengths, all of them together."""


@asynccontextmanager
async def asking_ours(port: int, top_k: int) -> AsyncIterator[Ask]:
    async with TeacherClient(f"http://127.0.0.1:{port}") as client:

        async def ask(lengths: Sequence[int]) -> None:
            await asyncio.gather(
                *(
                    client.score(prompt_ids=[n + 1] * 512, response_ids=[2] * t, top_k=top_k)
                    for n, t in enumerate(lengths)
                )
            )

        yield ask


@asynccontextmanager
async def asking_json(port: int, top_k: int) -> AsyncIterator[Ask]:
    async with aiohttp.ClientSession() as session:

        async def one(length: int) -> None:
            body = msgspec.json.encode({"prompt": [1] * 512, "response": [2] * length, "top_k": top_k})
            async with session.post(f"http://127.0.0.1:{port}/score", data=body) as response:
                from_json(await response.read())

        async def ask(lengths: Sequence[int]) -> None:
            await asyncio.gather(*map(one, lengths))

        yield ask


@asynccontextmanager
async def asking_zmq(port: int, top_k: int) -> AsyncIterator[Ask]:
    import zmq

    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(f"tcp://127.0.0.1:{port}")

        async def ask(lengths: Sequence[int]) -> None:
            socket.send(saved([([1] * 512, [2] * length) for length in lengths]))
            loaded(socket.recv())

        yield ask


CLIENTS = {OURS: ("ours", asking_ours), ZMQ: ("zmq", asking_zmq), JSON: ("json", asking_json)}


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float
    """Of the client."""


async def measure_service(num_tokens: int, top_k: int, turns: int) -> dict[str, dict[str, list[Cost]]]:
    """Per contender and load ("small", "long")."""
    contenders = {name: client for name, client in CLIENTS.items() if name != ZMQ or has_zmq()}
    costs: dict[str, dict[str, list[Cost]]] = {name: {"small": [], "long": []} for name in contenders}
    for name, (kind, asking) in contenders.items():
        with serving(kind, top_k) as port:
            async with asking(port, top_k) as ask:
                for turn in range(turns + 1):
                    began = _now()
                    for _ in range(NUM_SMALL):
                        await ask([SMALL_TOKENS])
                    small, began = _since(began), _now()
                    await ask([num_tokens] * NUM_LONG)
                    if turn > 0:  # the first turn warms up
                        costs[name]["small"].append(small)
                        costs[name]["long"].append(_since(began))
    return costs


@contextmanager
def serving(kind: str, top_k: int) -> Iterator[int]:
    """A service in a process of its own; gives its port."""
    command = [sys.executable, "-m", "tests.bench.wire_servers", kind, "--top-k", str(top_k)]
    process = subprocess.Popen(command, env=fair_environment(), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def service_rows(costs: dict[str, dict[str, list[Cost]]], num_tokens: int, top_k: int) -> list[Row]:
    plain_mb = NUM_LONG * num_tokens * (top_k * 8 + 4) / 1e6
    readings: tuple[tuple[str, str, Callable[[Cost], float]], ...] = (
        ("small", "requests/s", lambda cost: NUM_SMALL / cost.wall_s),
        ("small", "client CPU ms/request", lambda cost: cost.cpu_s / NUM_SMALL * 1e3),
        ("long", "MB/s", lambda cost: plain_mb / cost.wall_s),
        ("long", "client CPU ms/request", lambda cost: cost.cpu_s / NUM_LONG * 1e3),
    )
    names = {
        "small": f"{SMALL_TOKENS} tokens, one at a time",
        "long": f"{NUM_LONG} x {num_tokens} tokens together",
    }
    rows: list[Row] = []
    for kind, unit, value in readings:
        for name in costs:
            values, ours = ([value(cost) for cost in costs[who][kind]] for who in (name, OURS))
            better = median_ratio(ours, values) if unit.endswith("/s") else median_ratio(values, ours)
            rows.append(
                Row(
                    load=names[kind],
                    contender=name,
                    value=statistics.median(values),
                    unit=unit,
                    ratio=None if name == OURS else better,
                )
            )
    return rows


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def has_zmq() -> bool:
    return importlib.util.find_spec("zmq") is not None


def targets_of(rows: Sequence[Row]) -> list[Target]:
    found = [
        Target(
            what="an answer's bytes, of the plain arrays",
            found=1 / next(row.ratio for row in rows if row.contender == PLAIN and row.ratio is not None),
            bound=BYTES_LIMIT,
            at_most=True,
            unit="of them",
        )
    ]
    for rival in (ZMQ, JSON):
        for row in rows:
            if row.contender == rival and row.unit in ("requests/s", "MB/s") and row.ratio is not None:
                found.append(Target(what=f"{row.unit} of {rival}", found=row.ratio, bound=1.0))
    return found


def _now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def _since(began: Cost) -> Cost:
    now = _now()
    return Cost(now.wall_s - began.wall_s, now.cpu_s - began.cpu_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=64)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    turns = 2 if options.quick else options.turns
    rows = measure_packing(options.tokens, options.top_k, turns)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        costs = runner.run(measure_service(options.tokens, options.top_k, turns))
    rows += service_rows(costs, options.tokens, options.top_k)
    report = Report(
        bench="teacher wire",
        rows=tuple(rows),
        targets=tuple(targets_of(rows)),
        failures=() if has_zmq() else ("pyzmq is not installed; the extra `bench` has it",),
    )
    return finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
