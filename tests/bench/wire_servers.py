"""Three services that have a teacher's answers ready, for ``bench_teacher_wire``: what is left is the wire.

    python -m tests.bench.wire_servers {ours,zmq,json} --top-k K

Each writes its port as one line and serves until it is killed. *ours* is the real service with a back end that computes
nothing. *zmq* is a REP socket with torch.save on both ways, as verl's teacher has it. *json* is an HTTP service that
gives, per token, a map of ids to log-probabilities, as OpenAI-like servers do.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import structlog
import torch
import uvloop
from aiohttp import web

from teacher.batcher import Batcher
from teacher.protocol import ScoreRequest, Scores, TeacherInfo
from teacher.server import TeacherServer

VOCAB = 49_152
MAX_BODY_BYTES = 1 << 26


def make_scores(num_tokens: int, top_k: int, vocab_size: int = VOCAB) -> Scores:
    """Noise of a plausible shape: descending, a few nats apart."""
    rng = np.random.default_rng(0)
    logprobs = -np.sort(rng.exponential(4.0, (num_tokens, top_k)).astype(np.float32), axis=1)
    # A prime step through the vocabulary: no id twice in a row.
    ids = ((rng.integers(0, vocab_size, (num_tokens, 1)) + 613 * np.arange(top_k)) % vocab_size).astype(np.int32)
    return Scores(top_ids=ids, top_logprobs=logprobs, sampled_logprobs=logprobs[:, 0].copy())


class ReadyScores:
    """Makes the answer for each length once."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._ready: dict[int, Scores] = {}

    def of_length(self, num_tokens: int) -> Scores:
        if num_tokens not in self._ready:
            self._ready[num_tokens] = make_scores(num_tokens, self._top_k)
        return self._ready[num_tokens]


class ReadyBackend:
    """A back end of the teacher service."""

    def __init__(self, ready: ReadyScores) -> None:
        self.info = TeacherInfo(
            model="ready",
            vocab_size=VOCAB,
            tokenizer_size=VOCAB,
            tokenizer_fingerprint="",
            max_length=1 << 20,
            max_top_k=1024,
            protocol=1,
        )
        self._ready = ready

    def load(self) -> None: ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return [self._ready.of_length(len(request.response_ids)) for request in requests]


def as_json(scores: Scores) -> bytes:
    rows = [
        dict(zip(map(str, ids), logprobs, strict=True))
        for ids, logprobs in zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    ]
    return msgspec.json.encode({"top": rows, "sampled": scores.sampled_logprobs.tolist()})


def from_json(text: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """ids and log-probabilities of the top-k, and of the sampled tokens."""
    read = msgspec.json.decode(text)
    ids = np.array([[int(key) for key in row] for row in read["top"]], np.int32)
    logprobs = np.array([list(row.values()) for row in read["top"]], np.float32)
    return ids, logprobs, np.array(read["sampled"], np.float32)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> Any:
    """What the rival does with what it is sent; nothing of ours reads bytes like this."""
    return torch.load(io.BytesIO(data))


def say_port(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


async def serve_ours(ready: ReadyScores) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    batcher = Batcher(backend=ReadyBackend(ready), max_batch_tokens=1 << 20, max_queue=256, linger_s=0.0)
    server = TeacherServer(batcher=batcher, token=None, max_request_bytes=MAX_BODY_BYTES, max_queue=256)
    await batcher.start()
    say_port(await server.start(host="127.0.0.1", port=0))
    await asyncio.Event().wait()


async def serve_json(ready: ReadyScores) -> None:
    async def score(request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await request.read())
        body = as_json(ready.of_length(len(wanted["response"])))
        return web.Response(body=body, content_type="application/json")

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/score", score)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    say_port(runner.addresses[0][1])
    await asyncio.Event().wait()


def serve_zmq(ready: ReadyScores) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        say_port(socket.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            lengths = [len(response) for _, response in loaded(socket.recv())]
            answers = [ready.of_length(length) for length in lengths]
            socket.send(
                saved([tuple(map(torch.from_numpy, (a.top_ids, a.top_logprobs, a.sampled_logprobs))) for a in answers])
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["ours", "zmq", "json"])
    parser.add_argument("--top-k", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ready = ReadyScores(options.top_k)
    if options.kind == "zmq":
        serve_zmq(ready)
    else:
        uvloop.run(serve_ours(ready) if options.kind == "ours" else serve_json(ready))


if __name__ == "__main__":
    main()
