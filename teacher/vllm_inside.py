"""What a vLLM worker computes for a teacher: from the hidden states of a prompt exactly the values that were asked for.

vLLM's own prompt log-probabilities take all rows through the output layer at once, hold them twice, know nothing of
ids that the caller names on most devices, and become dictionaries on their way out. Here only the rows of the response
are taken, ``block_rows`` at a time, on the device that holds the model, and what comes out are arrays. A prompt needs
no rows, so what is cached of it is used. Imported by vLLM's workers, by name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from engine.generation.vllm_inside import cpu_faults
from teacher.backend_torch import score_block

WANTED = "scores"
"""Key in ``SamplingParams.extra_args``: what a request is about, as ``backend_vllm`` puts it there."""


def _scores_of_prompts(
    self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
) -> dict[str, LogprobsTensors | None]:
    """Stands in for ``GPUModelRunner._get_prompt_logprobs_dict``; a prompt may come in several pieces."""
    finished: dict[str, LogprobsTensors | None] = {}
    for req_id in list(self.num_prompt_logprobs):
        num_tokens = num_scheduled_tokens.get(req_id)
        if num_tokens is None:
            continue
        request = self.requests[req_id]
        wanted = request.sampling_params.extra_args[WANTED]
        num_prompt = len(request.prompt_token_ids)
        if request.in_progress_prompt_logprobs_cpu is None:
            request.in_progress_prompt_logprobs_cpu = _empty(wanted)
        scores = request.in_progress_prompt_logprobs_cpu
        start = request.num_computed_tokens
        stop = min(start + num_tokens, num_prompt)
        # Row t of the answer is the distribution after position first + t.
        first = num_prompt - len(wanted["lookup_ids"])
        offset = int(self.query_start_loc.np[self.input_batch.req_id_to_index[req_id]]) - start
        for begin in range(max(start, first), stop, wanted["block_rows"]):
            end = min(begin + wanted["block_rows"], stop)
            logits = self.model.compute_logits(hidden_states[offset + begin : offset + end])
            if logits is not None:  # with tensor parallelism, whole rows are on one rank
                _write(scores, slice(begin - first, end - first), logits, wanted)
        if stop == num_prompt:
            finished[req_id] = scores
            del self.num_prompt_logprobs[req_id]
            request.in_progress_prompt_logprobs_cpu = None
    return finished


def _empty(wanted: dict[str, Any]) -> LogprobsTensors:
    """[T, 1 + E + K]: sampled token, ids that the caller named, top-k."""
    num_rows, num_lookups = wanted["lookup_ids"].shape
    width = num_lookups + wanted["top_k"]
    return LogprobsTensors(
        torch.empty((num_rows, width), dtype=torch.int32),
        torch.empty((num_rows, width), dtype=torch.float32),
        torch.zeros(num_rows, dtype=torch.int32),
    )


def _write(scores: LogprobsTensors, rows: slice, logits_RV: torch.Tensor, wanted: dict[str, Any]) -> None:
    lookup_ids = torch.from_numpy(wanted["lookup_ids"][rows])
    num_rows, num_lookups = lookup_ids.shape
    flat = lookup_ids.reshape(-1).long().to(logits_RV.device)
    row_of = torch.arange(num_rows, device=logits_RV.device).repeat_interleave(num_lookups)
    top_ids, top_logprobs, looked_up = score_block(logits_RV, top_k=wanted["top_k"], rows=row_of, ids=flat)
    scores.logprob_token_ids[rows, :num_lookups] = lookup_ids.to(torch.int32)
    scores.logprob_token_ids[rows, num_lookups:] = top_ids.cpu()
    scores.logprobs[rows, :num_lookups] = looked_up.reshape(num_rows, num_lookups).cpu()
    scores.logprobs[rows, num_lookups:] = top_logprobs.cpu()


def _keep_tensors(self: Any, prompt_logprobs_tensors: LogprobsTensors) -> None:
    """Stands in for ``LogprobsProcessor._update_prompt_logprobs``, which would make Python objects of every number."""
    self.prompt_logprobs = prompt_logprobs_tensors


_cached_blocks_of = KVCacheManager.get_computed_blocks


def _cached_blocks_of_the_prompt(self: Any, request: Any) -> Any:
    """Stands in for ``KVCacheManager.get_computed_blocks``: what comes out of the cache has no hidden states, so it
    ends before the first row that was asked for, also when the whole response was computed before."""
    wanted = request.sampling_params.extra_args[WANTED]
    up_to_first_row = SimpleNamespace(
        skip_reading_prefix_cache=request.skip_reading_prefix_cache,
        block_hashes=request.block_hashes,
        # Of so many tokens, vLLM leaves the last one to be computed.
        num_tokens=request.num_prompt_tokens - len(wanted["lookup_ids"]) + 1,
    )
    return _cached_blocks_of(self, up_to_first_row)


KVCacheManager.get_computed_blocks = _cached_blocks_of_the_prompt
GPUModelRunner._get_prompt_logprobs_dict = _scores_of_prompts
LogprobsProcessor._update_prompt_logprobs = _keep_tensors
if current_platform.is_cpu():
    for fault in cpu_faults.FAULTS.values():
        fault.install()


class WorkerExtension:
    """Mixed into vLLM's worker class; that this module is imported is all it is for."""
