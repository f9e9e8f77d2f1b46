"""``python -m teacher``: one teacher service in one process. Decides start order, signals and exit codes.

Exit codes: 0 after a drain, 1 when something broke or the drain did not end in time, 2 when the user can mend it (one
line says how), 128 + signal when a second signal stopped it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import structlog
import uvloop

from engine.errors import UserError
from engine.recipe import value_of
from engine.recipe_fields import ComputeDtype
from teacher.batcher import Batcher
from teacher.protocol import ScoreRequest, Scores, TeacherInfo
from teacher.server import TeacherServer, check_exposure
from teacher.token import read_token

if TYPE_CHECKING:
    from teacher.batcher import Backend

log = structlog.get_logger()


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    options = _parser().parse_args(argv)
    _configure_log(options.log)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(options))
    except UserError as error:
        sys.stderr.write(f"teacher: {error}\n")
        return error.exit_code


async def _serve(options: argparse.Namespace) -> int:
    token = read_token(options.token_file) if options.token_file is not None else None
    check_exposure(options.host, has_token=token is not None, is_open=options.allow_anyone)
    batcher = _batcher(options)
    server = TeacherServer(
        batcher=batcher, token=token, max_request_bytes=options.max_request_bytes, max_queue=options.max_queue
    )
    asked_to_stop = _watch_signals()
    port = await server.start(host=options.host, port=options.port)
    log.info("teacher.listening", host=options.host, port=port, has_token=token is not None)
    try:
        if options.port_file is not None:
            _write_port(Path(options.port_file), port)
        if not await _load(batcher, asked_to_stop):
            _leave_at_once(0)
        await asked_to_stop.wait()
        waiting = batcher.statistics()
        log.info("teacher.draining", waiting=waiting.waiting, computing=waiting.computing, grace_s=options.grace_s)
        try:
            async with asyncio.timeout(options.grace_s):
                await batcher.drain()
        except TimeoutError:
            left = batcher.statistics()
            log.error("teacher.cut_off", waiting=left.waiting, computing=left.computing, grace_s=options.grace_s)
            _leave_at_once(1)
    finally:
        await server.stop()
    await batcher.stop()
    log.info("teacher.stopped", requests_total=batcher.statistics().requests_total)
    return 0


class _LateBackend:
    """The back end that was asked for, whose libraries are imported where the model is loaded.

    They take seconds, in which the port is open already and signals are heard; --help and a wrong token file need none.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._backend: Backend

    @property
    def info(self) -> TeacherInfo:
        return self._backend.info

    def load(self) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        _check_device(self._options.device)
        self._backend = (
            _vllm_backend(self._options) if self._options.backend == "vllm" else _torch_backend(self._options)
        )
        self._backend.load()

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return self._backend.score(requests)


def _torch_backend(options: argparse.Namespace) -> Backend:
    from teacher.backend_torch import TorchBackend

    return TorchBackend(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        num_threads=options.num_threads,
        block_rows=options.block_rows,
        max_top_k=options.max_top_k,
        max_length=options.max_length,
        padded_tokens=options.max_batch_tokens,
        allow_quantised=options.allow_quantised,
        trust_remote_code=options.trust_remote_code,
    )


def _vllm_backend(options: argparse.Namespace) -> Backend:
    from teacher.backend_vllm import VllmBackend

    return VllmBackend(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        num_threads=options.num_threads,
        block_rows=options.block_rows,
        max_batch_tokens=options.max_batch_tokens,
        max_top_k=options.max_top_k,
        max_length=options.max_length,
        tensor_parallel=options.tensor_parallel,
        kv_cache_bytes=options.kv_cache_bytes,
        memory_share=options.memory_share,
        allow_quantised=options.allow_quantised,
        engine_options=dict(options.engine_option),
        trust_remote_code=options.trust_remote_code,
    )


def _check_device(name: str) -> None:
    """Refuse a device from which no number comes back, before a model is read."""
    import torch

    try:
        torch.empty(1, device=name).cpu()
    except Exception as error:  # each back end has its own: RuntimeError, AssertionError, ImportError
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"--device {name!r} cannot compute here: {reason}; use cpu or cuda:N") from None


async def _load(batcher: Batcher, asked_to_stop: asyncio.Event) -> bool:
    """Load the model; False when a signal came first.

    Raises:
        ModelError: from the back end.
    """
    began = time.monotonic()
    loading = asyncio.create_task(batcher.start())
    stopping = asyncio.create_task(asked_to_stop.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not loading.done():
        return False
    loading.result()
    log.info("teacher.ready", **_facts(batcher), dur_us=int((time.monotonic() - began) * 1e6))
    return True


def _facts(batcher: Batcher) -> dict[str, object]:
    info = batcher.info
    return {
        "model": info.model,
        "vocab_size": info.vocab_size,
        "max_length": info.max_length,
        "max_top_k": info.max_top_k,
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
    }


def _batcher(options: argparse.Namespace) -> Batcher:
    return Batcher(
        backend=_LateBackend(options),
        max_batch_tokens=options.max_batch_tokens,
        max_queue=options.max_queue,
        linger_s=options.linger_ms / 1e3,
    )


def _watch_signals() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process."""
    asked_to_stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if asked_to_stop.is_set():
            log.warning("teacher.killed", signal=signal.Signals(number).name)
            _leave_at_once(128 + number)
        asked_to_stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return asked_to_stop


def _leave_at_once(code: int) -> NoReturn:
    # The worker thread is inside torch and cannot be interrupted; a normal exit would wait for it.
    sys.stderr.flush()
    os._exit(code)


def _write_port(path: Path, port: int) -> None:
    """Write the port so that a reader sees all of it or nothing."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(f"{port}\n")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"--port-file {str(path)!r} cannot be written: {error.strerror}") from None


def _configure_log(style: str) -> None:
    is_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    renderer: structlog.typing.Processor
    renderer = structlog.processors.JSONRenderer() if is_json else structlog.dev.ConsoleRenderer()
    tail = [structlog.processors.format_exc_info] if is_json else []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="t"),
            *tail,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m teacher",
        description="Serve the log-probabilities of a causal language model over HTTP (docs/protocol.md).",
        epilog="SIGTERM or SIGINT: answer what waits, refuse what is new, exit 0; a second one exits at once. "
        "Exit code 2: something in the command line, the files or the model must change; one line says what.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder in Hugging Face format, with tokenizer")
    add("--backend", default="torch", choices=("torch", "vllm"), help="what computes; vllm needs the package vllm")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=8900, help="0: any free one (see --port-file)")
    add("--port-file", metavar="FILE", help="write the port there once it is open")
    add("--token-file", metavar="FILE", help="file whose first line is the bearer token that requests must carry")
    add("--allow-anyone", action="store_true", help="listen on an address other machines can reach without a token")
    add("--device", default="cpu", help="where torch computes, for example cuda:0")
    add(
        "--dtype",
        default="float32",
        choices=get_args(ComputeDtype),
        help="of the weights; auto: bfloat16 where the device multiplies it in hardware",
    )
    add("--num-threads", type=_positive, metavar="N", help="CPU threads of the model; not set: torch's choice")
    add("--max-batch-tokens", type=_positive, default=2048, metavar="N", help="token positions of one forward pass")
    add("--block-rows", type=_positive, default=128, metavar="N", help="full-vocabulary rows held at a time")
    add("--max-top-k", type=_positive, default=8192, metavar="N", help="largest top_k, and extra ids per token")
    add("--max-length", type=_positive, metavar="N", help="prompt and response tokens; not set: the model's limit")
    add("--max-queue", type=_positive, default=256, metavar="N", help="requests that may wait; then 429")
    add("--max-request-bytes", type=_positive, default=16 << 20, metavar="N", help="of one body; then 413")
    add("--linger-ms", type=_milliseconds, default=2.0, metavar="MS", help="wait of an idle teacher for a fuller batch")
    add("--grace-s", type=_seconds, default=60.0, metavar="S", help="longest drain after a signal; then exit code 1")
    add("--tensor-parallel", type=_positive, default=1, metavar="N", help="vllm: devices that share the model")
    add("--kv-cache-bytes", type=_positive, metavar="N", help="vllm: memory for keys and values; needed on CPU")
    add("--memory-share", type=_share, default=0.9, metavar="X", help="vllm, without the above: of a device, for all")
    add(
        "--engine-option",
        type=_named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="vllm: one more field of its EngineArgs, as JSON (pipeline_parallel_size=2); may be repeated",
    )
    add("--allow-quantised", action="store_true", help="take a checkpoint that says it is quantised")
    add("--trust-remote-code", action="store_true", help="run Python code that lies in the model folder")
    add("--log", default="auto", choices=("auto", "json", "human"), help="style of the lines on stderr")
    return parser


def _positive(text: str) -> int:
    return _bounded(int(text), 1, 1 << 40)


def _port(text: str) -> int:
    return _bounded(int(text), 0, 65535)


def _bounded(value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def _named_value(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name.strip(), value_of(value)


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000 milliseconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
