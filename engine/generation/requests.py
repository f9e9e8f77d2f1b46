"""What the event-loop side of every generator does alike: refuse what cannot be answered, outwait what cannot be
stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from engine.generation.protocol import GenerationRequest
from engine.generation.sampling import check_params


def check_requests(
    requests: Sequence[GenerationRequest], *, open_ids: Iterable[int], max_length: int | None, vocab_size: int
) -> None:
    """Refuse what no engine could answer.

    Args:
        open_ids: of requests that have not ended.
        max_length: tokens of prompt and answer together; None: no limit.

    Raises:
        ValueError: an id is open already, prompt and answer do not fit, or a token id or setting is out of range.
    """
    seen = set(open_ids)
    for request in requests:
        name = f"request {request.request_id}"
        if request.request_id in seen:
            raise ValueError(f"{name} is open already; ids must be unique among the open ones")
        seen.add(request.request_id)
        check_params(request.params)
        if not request.token_ids:
            raise ValueError(f"{name} has an empty prompt; expected at least one token")
        low, high = min(request.token_ids), max(request.token_ids)
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} has token ids from {low} to {high}; the model knows 0 to {vocab_size - 1}")
        if request.params.num_top_ids > vocab_size:
            raise ValueError(
                f"{name} asks for the {request.params.num_top_ids} most likely ids; the model knows {vocab_size}"
            )
        num_prompt, num_new = len(request.token_ids), request.params.max_new_tokens
        if max_length is not None and num_prompt + num_new > max_length:
            raise ValueError(
                f"{name}: {num_prompt} prompt tokens and max_new_tokens={num_new} make {num_prompt + num_new}, "
                f"the model has {max_length} positions"
            )
        if not 0 <= request.stream_key < 1 << 64:
            raise ValueError(f"{name}: stream_key must be an unsigned 64-bit number, got {request.stream_key}")


async def settled(future: asyncio.Future[Any]) -> None:
    """Wait for ``future`` through any further cancellation; its outcome is of no interest any more."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()
