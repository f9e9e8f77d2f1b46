"""Whether a server without a fingerprint means the same tokens by the same ids, as far as its ``/tokenize`` shows it.

A text that holds as many tokens of a known tokenizer as possible is taken apart by the server, which names each piece
with its id: every pair must be one of the tokenizer's. How the text is cut does not matter, as in
``teacher.fingerprint``. Values in, values out: the asking is ``teacher.vllm_client``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from teacher.fingerprint import Vocabulary, fingerprint

_MOST_SAMPLES = 16_384
"""Ids that the text is made of, evenly spread; all of them where there are no more."""


class Decodes(Vocabulary, Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> Any: ...


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A vocabulary that is known, to hold against a server's."""

    source: str
    """Where it was read from, for people."""
    ids: dict[str, int]
    """By token."""
    text: str
    """What the server is to take apart."""
    fingerprint: str
    vocab_size: int
    """Rows of the output layer of the model that it was read with."""


def known(tokenizer: Decodes, *, vocab_size: int, source: str) -> Known:
    """Takes a few hundred milliseconds."""
    ids = tokenizer.get_vocab()
    spread = sorted(ids.values())
    step = -(-len(spread) // _MOST_SAMPLES)
    pieces = [str(tokenizer.decode([token_id], skip_special_tokens=False)) for token_id in spread[::step]]
    # A line each: words of one line could be cut across.
    text = "\n".join(piece for piece in pieces if "\ufffd" not in piece)
    return Known(source=source, ids=ids, text=text, fingerprint=fingerprint(tokenizer), vocab_size=vocab_size)


def difference(mine: Known, tokens: Sequence[str], token_ids: Sequence[int]) -> str | None:
    """The first pair of the server's that is not one of ``mine``, in words; None when there is none."""
    for token, token_id in zip(tokens, token_ids, strict=True):
        own = mine.ids.get(token)
        if own != token_id:
            here = "unknown to" if own is None else f"{own} in"
            return f"{token!r} is {token_id} there and {here} {mine.source}"
    return None
