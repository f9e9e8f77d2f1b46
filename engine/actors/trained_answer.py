"""One answer of a step, token by token, as a line of the log: about which words teacher and student differ. Pure; which
answer it is, and what its tokens cost, the trainer says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from engine.training.protocol import TokenLosses
from engine.types import ScoredRollout
from teacher.protocol import Scores

Decode = Callable[[Sequence[int], bool], str]
"""Token ids → text; the second argument leaves special tokens out."""

MAX_TOKENS = 512
"""Of an answer that are written: 16 kB a line. Nobody reads more of one answer than that."""
_MAX_PROMPT_TOKENS = 512
_MAX_PENDING = 8
"""A character has 4 bytes, and a token holds at least one of them; after twice that it is no text that is being held
back."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def describe(
    scored: ScoredRollout[Scores], losses: TokenLosses, *, step: int, age: int, decode: Decode
) -> dict[str, object]:
    """Fields of ``answer.trained`` (docs/events.md). Decodes each token twice: 0.6 ms for 100."""
    rollout = scored.rollout
    count = min(rollout.num_tokens, MAX_TOKENS)
    return {
        "step": step,
        "rollout_id": rollout.rollout_id,
        "prompt": decode(rollout.prompt.token_ids[-_MAX_PROMPT_TOKENS:], True).strip(),
        "pieces": list(pieces(lambda ids: decode(ids, False), rollout.response_ids[:count])),
        "divergences": _rounded(losses.divergences[:count]),
        "student_logprobs": _rounded(losses.logprobs[:count]),
        "teacher_logprobs": _rounded(scored.scores.sampled_logprobs[:count].tolist()),
        "versions": [(span.version, span.start, span.end) for span in rollout.spans],
        "age": age,
        "num_tokens": rollout.num_tokens,
        "finish_reason": rollout.finish_reason,
    }


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> Iterator[str]:
    """The text of each token, so that together they are the text of all.

    What a token says depends on its neighbours: spaces at the beginning of words, characters of several tokens. So
    each is decoded together with the one before, and a token that ends within a character says nothing: the one that
    completes the character says it.
    """
    begin = done = 0  # [begin, done) has been said and is decoded again for what it does to what follows
    for end in range(1, len(ids) + 1):
        before = decode(ids[begin:done])
        text = decode(ids[begin:end])
        is_whole = not text.endswith(_INCOMPLETE) or end - done >= _MAX_PENDING or end == len(ids)
        if not is_whole:
            yield ""
            continue
        # A decoder may say less with one token more (it tidies up spaces): then this one says nothing.
        yield text[len(before) :]
        begin, done = done, end


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]
