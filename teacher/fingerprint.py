"""When two tokenizers are the same one: same tokens, same ids. Decides nothing about models; imports no tokenizer."""

from __future__ import annotations

import hashlib
from typing import Protocol


class Vocabulary(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        ...


def fingerprint(tokenizer: Vocabulary) -> str:
    """Hex BLAKE2b (16 bytes) over the (token, id) pairs, sorted by id, then token.

    Equal for equal vocabularies on every machine and library version; a different, missing or moved token gives
    another one. Merges, normalisers and chat templates are not part of it: they change which ids a text becomes, not
    what an id means, and only ids go to the teacher.
    """
    digest = hashlib.blake2b(digest_size=16)
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        # Byte-level vocabularies may hold lone surrogates.
        text = token.encode("utf-8", "surrogatepass")
        digest.update(token_id.to_bytes(8, "little", signed=True) + len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()
