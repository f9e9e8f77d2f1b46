"""Both log-probabilities of a sampled token, where vLLM's sampler returns one kind or the other, and the ids that the
model itself finds most likely, where it returns those that are left after top-k and top-p.

The engine runs with ``logprobs_mode="processed_logprobs"``: column 0 of what it returns is the sampled token under the
distribution that it was drawn from. A request that asks for one more log-probability gets in column 1 the same token at
temperature 1 over the whole vocabulary; one that asks for k more than that, the k most likely ids at temperature 1.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.sampler import Sampler


def install() -> None:
    """Once in a process."""
    if getattr(Sampler.forward, "gives_both", False):
        return
    original = Sampler.forward

    def forward(self: Any, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        num_asked = sampling_metadata.max_num_logprobs or 0
        # Before: sampling divides and masks these logits in place.
        plain = self.compute_logprobs(logits) if num_asked else None
        output = original(self, logits, sampling_metadata, *args, **kwargs)
        tensors = output.logprobs_tensors
        if plain is not None and tensors is not None:
            sampled = output.sampled_token_ids.long()
            tensors.logprobs[:, 1] = plain.gather(1, sampled)[:, 0]
            tensors.logprob_token_ids[:, 1] = sampled[:, 0].to(tensors.logprob_token_ids.dtype)
            if num_asked > 1:
                likely = plain.topk(num_asked - 1, dim=-1)
                tensors.logprobs[:, 2 : num_asked + 1] = likely.values
                tensors.logprob_token_ids[:, 2 : num_asked + 1] = likely.indices.to(tensors.logprob_token_ids.dtype)
        return output

    forward.gives_both = True  # type: ignore[attr-defined]
    Sampler.forward = forward
