"""What it costs to bring the teacher's scores to the learner: bytes and CPU, and requests through the real service.

    python -m tests.bench.bench_teacher_wire [--turns N] [--tokens T] [--top-k K]

*codec*: one answer of T tokens packed and unpacked, in CPU time of the process; the rivals take turns. JSON is what
log-probability APIs send (per token a map of ids to numbers), made and read by msgspec, the fastest JSON at hand; plain
is float32 and int32 arrays in one buffer, the least that an unpacked format could do. *service*: whole requests through
client, HTTP server and queue in one process, with a back end that has its answers ready: a small one at a time, and 64
long ones together.

Exits with 1 when an answer takes more than 65 % of the plain bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import structlog
import uvloop

from teacher import wire
from teacher.batcher import Batcher
from teacher.client import TeacherClient
from teacher.protocol import ScoreRequest, Scores, TeacherInfo
from teacher.server import TeacherServer

BYTES_LIMIT = 0.65
VOCABULARIES = (49_152, 151_936)


def make_scores(num_tokens: int, top_k: int, vocab_size: int) -> Scores:
    rng = np.random.default_rng(0)
    logprobs = -np.sort(rng.exponential(4.0, (num_tokens, top_k)).astype(np.float32), axis=1)
    return Scores(
        top_ids=rng.integers(0, vocab_size, (num_tokens, top_k), np.int32),
        top_logprobs=logprobs,
        sampled_logprobs=logprobs[:, 0].copy(),
    )


def through_frame(scores: Scores, vocab_size: int) -> int:
    frame = wire.encode_answer(scores, values="float16", vocab_size=vocab_size)
    wire.decode_answer(frame)
    return len(frame)


def through_plain(scores: Scores, _: int) -> int:
    parts = (scores.top_ids, scores.top_logprobs, scores.sampled_logprobs)
    buffer = b"".join(part.tobytes() for part in parts)
    np.frombuffer(buffer, np.int32, parts[0].size).reshape(parts[0].shape).copy()
    np.frombuffer(buffer, np.float32, offset=parts[0].nbytes).copy()
    return len(buffer)


def through_json(scores: Scores, _: int) -> int:
    rows = [
        dict(zip(map(str, ids), logprobs, strict=True))
        for ids, logprobs in zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    ]
    text = msgspec.json.encode({"top": rows, "sampled": scores.sampled_logprobs.tolist()})
    read = msgspec.json.decode(text)
    np.array([[int(key) for key in row] for row in read["top"] if len(row) == scores.top_ids.shape[1]], np.int32)
    np.array([list(row.values()) for row in read["top"] if len(row) == scores.top_ids.shape[1]], np.float32)
    return len(text)


def cpu_ms(rival: Callable[[Scores, int], int], scores: Scores, vocab_size: int) -> tuple[float, int]:
    began = time.process_time()
    num_bytes = rival(scores, vocab_size)
    return (time.process_time() - began) * 1e3, num_bytes


def bench_codec(num_tokens: int, top_k: int, turns: int) -> bool:
    is_small = True
    rivals = {"frame float16": through_frame, "plain": through_plain, "json": through_json}
    for vocab_size in VOCABULARIES:
        scores = make_scores(num_tokens, top_k, vocab_size)
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in rivals}
        for _ in range(turns):
            for name, rival in rivals.items():
                found[name].append(cpu_ms(rival, scores, vocab_size))
        plain_bytes = found["plain"][0][1]
        for name, turns_of in found.items():
            ms, num_bytes = statistics.median(ms for ms, _ in turns_of), turns_of[0][1]
            say(
                f"codec    V={vocab_size:<7} {name:<14} {ms:8.2f} CPU-ms {num_bytes / 2**20:7.2f} MiB"
                f" {num_bytes / plain_bytes:5.0%} of plain"
            )
        is_small &= found["frame float16"][0][1] <= BYTES_LIMIT * plain_bytes
    return is_small


class ReadyBackend:
    """Has its answers ready: what is measured is everything else."""

    def __init__(self, vocab_size: int) -> None:
        self.info = TeacherInfo(
            model="ready",
            vocab_size=vocab_size,
            tokenizer_size=vocab_size,
            tokenizer_fingerprint="",
            max_length=1 << 20,
            max_top_k=1024,
            protocol=1,
        )
        self._ready: dict[tuple[int, int], Scores] = {}

    def load(self) -> None: ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return [self._answer(len(request.response_ids), request.top_k) for request in requests]

    def _answer(self, num_tokens: int, top_k: int) -> Scores:
        if (num_tokens, top_k) not in self._ready:
            self._ready[num_tokens, top_k] = make_scores(num_tokens, top_k, self.info.vocab_size)
        return self._ready[num_tokens, top_k]


async def bench_service(num_tokens: int, top_k: int, turns: int) -> None:
    batcher = Batcher(backend=ReadyBackend(VOCABULARIES[0]), max_batch_tokens=1 << 20, max_queue=256, linger_s=0.0)
    server = TeacherServer(batcher=batcher, token=None, max_request_bytes=1 << 24, max_queue=256)
    await batcher.start()
    port = await server.start(host="127.0.0.1", port=0)
    async with TeacherClient(f"http://127.0.0.1:{port}") as client:
        small, long = [], []
        for _ in range(turns):
            began = time.perf_counter()
            for _ in range(100):
                await client.score(prompt_ids=[1] * 40, response_ids=[2] * 48, top_k=top_k)
            small.append(100 / (time.perf_counter() - began))
            began = time.perf_counter()
            await asyncio.gather(
                *(client.score(prompt_ids=[n] * 512, response_ids=[2] * num_tokens, top_k=top_k) for n in range(64))
            )
            long.append(time.perf_counter() - began)
    await server.stop()
    await batcher.stop()
    plain_mib = 64 * num_tokens * (top_k * 8 + 4) / 2**20
    seconds = statistics.median(long)
    say(f"service  48 tokens, one at a time         {statistics.median(small):8.0f} requests/s")
    rate = plain_mib / seconds
    say(f"service  64 x {num_tokens} tokens together      {seconds * 1e3:8.0f} ms, {rate:.0f} MiB/s of plain")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=64)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    is_small = bench_codec(options.tokens, options.top_k, options.turns)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bench_service(options.tokens, options.top_k, options.turns))
    return 0 if is_small else 1


if __name__ == "__main__":
    sys.exit(main())
