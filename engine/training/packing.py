"""How token sequences are laid out for one forward pass of a causal model. numpy only; runs nothing.

Two layouts. *Packed*: the sequences are merged into a token trie, so what several of them begin with (the prompt of n
samples, a system prompt) is computed once; a boolean tree mask keeps the branches apart. *Padded*: one row per
sequence, filled up on the right. Both say where each token of each sequence went, so what comes after the forward pass
is the same.

    N nodes of the trie = token positions computed      B sequences      L tokens of one sequence, or of the longest

The nodes lie in depth-first order, so the descendants of node j are the rows j+1 … end[j]−1, and row i may attend to
row j exactly when j ≤ i < end[j].
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Tokens = Sequence[int] | npt.NDArray[np.integer]
"""Token ids of one sequence: a list, a tuple or an array in one dimension."""

_BYTES = 8
"""Of one id in a sort key."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A trie of sequences in one row; ``[None]`` in front of each array makes the model's batch of one."""

    token_ids: Ints
    """[N]"""
    position_ids: Ints
    """[N]: depth in the trie, from 0."""
    parent: Ints
    """[N]: row of the token before; −1 where a sequence begins."""
    end: Ints
    """[N]: one past the last descendant's row."""
    index: tuple[Ints, ...]
    """For each sequence, in the order given: [L] row of each of its tokens."""

    @property
    def num_tokens(self) -> int:
        """Token positions that the forward pass computes."""
        return len(self.token_ids)

    def mask(self) -> Bools:
        """[N, N]: row i attends to column j when j is i or an ancestor of i. Takes N² bytes.

        transformers takes it as it is ([1, 1, N, N] bool) only under sdpa attention. Eager attention *adds* the mask to
        the scores, so a boolean one is silently wrong there: give it 0 and the dtype's minimum instead.
        """
        rows = np.arange(self.num_tokens)
        return np.logical_and(rows[None, :] <= rows[:, None], rows[:, None] < self.end[None, :])


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """One row per sequence, padding on the right."""

    token_ids: Ints
    """[B, L]"""
    position_ids: Ints
    """[B, L]: 0 … L−1 in each row."""
    mask: Bools
    """[B, L]: False at padding."""
    index: tuple[Ints, ...]
    """For each sequence: its positions in the flattened [B·L] batch."""

    @property
    def num_tokens(self) -> int:
        """Token positions that the forward pass computes, padding included."""
        return int(self.token_ids.size)


class PrefixCounter:
    """Counts the nodes of a growing trie without building it.

    Example::

        counter = PrefixCounter()
        counter.add([1, 2, 3])
        assert counter.cost_of([1, 2, 4]) == 1
    """

    def __init__(self) -> None:
        self._sorted: list[bytes] = []
        self.num_tokens = 0
        """Nodes so far."""

    def cost_of(self, sequence: Tokens) -> int:
        """Nodes that ``add(sequence)`` would add."""
        return self._cost(_key(sequence))

    def add(self, sequence: Tokens) -> int:
        """Put one sequence in; returns the nodes that it added."""
        key = _key(sequence)
        cost = self._cost(key)
        insort(self._sorted, key)
        self.num_tokens += cost
        return cost

    def _cost(self, key: bytes) -> int:
        # The sequence with the longest common prefix is always a neighbour in lexicographic order.
        place = bisect_left(self._sorted, key)
        neighbours = self._sorted[max(0, place - 1) : place + 1]
        return len(key) // _BYTES - max((_common_prefix(neighbour, key) for neighbour in neighbours), default=0)


def pack(sequences: Sequence[Tokens]) -> PackedBatch:
    """Merge sequences into a trie. The layout depends on the *set* of sequences; equal ones share all their rows.

    Raises:
        ValueError: no sequence, or an empty one.
    """
    arrays = _arrays(sequences)
    keys = [_key(array) for array in arrays]
    tokens: list[Ints] = []
    positions: list[Ints] = []
    parents: list[Ints] = []
    index: list[Ints] = [np.empty(0, np.int64)] * len(arrays)
    end = np.empty(sum(map(len, arrays)), np.int64)
    path = np.empty(0, np.int64)  # rows of the branch that is open
    previous = b""
    num_nodes = 0
    for i in sorted(range(len(arrays)), key=keys.__getitem__):
        array = arrays[i]
        shared = _common_prefix(previous, keys[i])
        num_new = len(array) - shared
        end[path[shared:]] = num_nodes
        path = np.concatenate((path[:shared], np.arange(num_nodes, num_nodes + num_new)))
        tokens.append(array[shared:])
        positions.append(np.arange(shared, len(array)))
        parents.append(np.concatenate(([-1], path))[shared:-1])
        index[i] = path
        previous = keys[i]
        num_nodes += num_new
    end[path] = num_nodes
    return PackedBatch(
        token_ids=np.concatenate(tokens),
        position_ids=np.concatenate(positions),
        parent=np.concatenate(parents),
        end=end[:num_nodes].copy(),
        index=tuple(index),
    )


def pad(sequences: Sequence[Tokens], *, pad_id: int = 0) -> PaddedBatch:
    """One row per sequence, in the order given.

    Raises:
        ValueError: no sequence, or an empty one.
    """
    arrays = _arrays(sequences)
    longest = max(map(len, arrays))
    token_ids = np.full((len(arrays), longest), pad_id, np.int64)
    mask = np.zeros((len(arrays), longest), np.bool_)
    for row, array in enumerate(arrays):
        token_ids[row, : len(array)] = array
        mask[row, : len(array)] = True
    return PaddedBatch(
        token_ids=token_ids,
        position_ids=np.broadcast_to(np.arange(longest), token_ids.shape).copy(),
        mask=mask,
        index=tuple(np.arange(row * longest, row * longest + len(array)) for row, array in enumerate(arrays)),
    )


def split_by_budget(sequences: Sequence[Tokens], budget: int) -> list[list[int]]:
    """Cut the sequences, in the order given, into groups whose tries have at most ``budget`` nodes each.

    Returns:
        Indices of the sequences of each group.

    Raises:
        ValueError: one sequence alone is longer than ``budget`` tokens.
    """
    groups: list[list[int]] = []
    counter = PrefixCounter()
    for i, sequence in enumerate(sequences):
        _check_fits(i, len(sequence), budget)
        if not groups or counter.num_tokens + counter.cost_of(sequence) > budget:
            groups.append([])
            counter = PrefixCounter()
        counter.add(sequence)
        groups[-1].append(i)
    return groups


def split_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut sequences of these lengths into groups of similar length, each at most ``budget`` tokens with its padding.

    Returns:
        Indices of the sequences of each group, shortest first; equal lengths keep their order.

    Raises:
        ValueError: one sequence alone is longer than ``budget`` tokens.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        _check_fits(i, lengths[i], budget)
        if not groups or (len(groups[-1]) + 1) * lengths[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def packing_obstacle(config: object, *, longest: int) -> str | None:
    """Why a model with this transformers config cannot run packed sequences of up to ``longest`` tokens, or None.

    Only plain attributes are read. A packed batch replaces the model's own mask and gives explicit positions, which is
    wrong for whatever reads order from somewhere else. A ``None`` covers what configs say; a model with recurrent
    layers under an unknown name is found by comparing packed and separate logits once, as the teacher does when it
    loads.
    """
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa", "eager"):
        return f"attention {attention!r} takes no tree mask; load the model with attn_implementation='sdpa' or 'eager'"
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if strange:
        return f"layers of type {', '.join(sorted(strange))} read tokens in row order"
    if not kinds or kinds - {"full_attention"}:
        windows = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
        narrow = [window for window in windows if window is not None and window < longest]
        if narrow and getattr(config, "use_sliding_window", True):
            return f"attention windows of {min(narrow)} tokens are narrower than sequences of up to {longest} tokens"
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt"):
        return "its attention bias (ALiBi) counts rows, not positions"
    return rope_obstacle(config)


def rope_obstacle(config: object) -> str | None:
    """Why a sequence gets other position embeddings beside longer ones, packed or padded; None if it does not."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in nested:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in ("dynamic", "longrope"):
            return f"rope of type {kind!r} depends on the longest sequence of the batch"
    return None


def _arrays(sequences: Sequence[Tokens]) -> list[Ints]:
    if len(sequences) == 0:
        raise ValueError("expected at least one sequence, got none")
    arrays = [np.asarray(sequence, np.int64) for sequence in sequences]
    for i, array in enumerate(arrays):
        if len(array) == 0:
            raise ValueError(f"sequence {i} of {len(arrays)} is empty; expected at least one token")
    return arrays


def _key(sequence: Tokens) -> bytes:
    # Big-endian bytes of non-negative ids sort as the ids do, and compare at the speed of memcmp.
    return np.asarray(sequence, ">i8").tobytes()


def _common_prefix(a: bytes, b: bytes) -> int:
    """Number of leading ids that two keys have in common."""
    shortest = min(len(a), len(b)) // _BYTES
    differ = np.frombuffer(a, np.int64, shortest) != np.frombuffer(b, np.int64, shortest)
    first = int(differ.argmax()) if shortest else 0
    return first if shortest and differ[first] else shortest


def _check_fits(i: int, length: int, budget: int) -> None:
    if length > budget:
        raise ValueError(f"sequence {i} has {length} tokens and the budget is {budget}; raise the budget or cut it")
