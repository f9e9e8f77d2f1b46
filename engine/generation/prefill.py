"""How known tokens are put together into forward passes. Pure: sequences and rows in, padded batches out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MAX_TOKENS = 4096
"""Padded tokens of one pass: bounds its activations. A longer sequence goes alone."""

_FREE_PADDING = 16
"""Padded tokens that cost less than reading the weights once more for a second pass."""


class Prefill(NamedTuple):
    """One forward pass."""

    token_ids: list[list[int]]
    """[b, length], each sequence once, padded at the end with its own last token."""
    rows: list[int]
    """Cache rows to fill …"""
    sources: list[int]
    """… and the batch row that each is filled from."""
    num_tokens: int
    """Without padding."""


def plan_prefill(wanted: Iterable[tuple[tuple[int, ...], int]]) -> list[Prefill]:
    """Batches of similar length, shortest first; equal sequences are computed once for all their rows.

    Args:
        wanted: pairs of (tokens, cache row); a row without tokens needs no pass.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for tokens, row in wanted:
        if tokens:
            rows_of.setdefault(tokens, []).append(row)
    batches: list[list[tuple[int, ...]]] = []
    for tokens in sorted(rows_of, key=len):
        if not batches or not _fits(batches[-1], len(tokens)):
            batches.append([])
        batches[-1].append(tokens)
    return [_batch(sequences, rows_of) for sequences in batches]


def _fits(batch: Sequence[tuple[int, ...]], length: int) -> bool:
    """At most a quarter of a pass is padding; ``length`` is at least that of every sequence in ``batch``."""
    padded = length * (len(batch) + 1)
    padding = padded - length - sum(map(len, batch))
    return padded <= _MAX_TOKENS and padding <= max(_FREE_PADDING, padded // 4)


def _batch(sequences: Sequence[tuple[int, ...]], rows_of: dict[tuple[int, ...], list[int]]) -> Prefill:
    length = max(map(len, sequences))
    rows, sources = [], []
    for source, tokens in enumerate(sequences):
        rows += rows_of[tokens]
        sources += [source] * len(rows_of[tokens])
    return Prefill(
        token_ids=[[*tokens, *[tokens[-1]] * (length - len(tokens))] for tokens in sequences],
        rows=rows,
        sources=sources,
        num_tokens=sum(map(len, sequences)),
    )
