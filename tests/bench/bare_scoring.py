"""vLLM as a library: the process that ``bench_scoring`` compares services with. One line per turn on stdout.

    python -m tests.bench.bare_scoring --model DIR --tokens FILE.npy --top-k K --batch-tokens N

Loads once. For every line on stdin, ``score N`` or ``forward N``, it takes the first N sequences of FILE through the
model and says how long that took. *score* asks for the top K of every token, in vLLM's flat form, which is its fastest;
*forward* for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import numpy as np

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--top-k", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True)
    options = parser.parse_args()
    os.environ.update(SETTINGS)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    torch.set_num_threads(1)
    sequences = np.load(options.tokens).tolist()
    engine = LLM(
        options.model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(sequences[0]) + 1,
        max_num_batched_tokens=options.batch_tokens,
        max_logprobs=options.top_k,
        kv_cache_memory_bytes=512 << 20,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        word, num = line.split()
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=options.top_k if word == "score" else None,
            flat_logprobs=True,
        )
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        engine.generate([tokens_input(ids) for ids in sequences[: int(num)]], params, use_tqdm=False)
        found = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
