"""Sequences laid out together are the same sequences: tokens, positions, who sees whom, and what a real model says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.training.packing import (
    PackedBatch,
    PrefixCounter,
    pack,
    packing_obstacle,
    pad,
    rope_obstacle,
    split_by_budget,
    split_padded,
)
from tests.support.models import Arch, load, plain_logits, tiny_model

# Few different ids, so that common prefixes, repeats and prefixes of one another are frequent.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=10)


def ancestors_and_self(batch: PackedBatch, row: int) -> set[int]:
    """The definition: follow the parents."""
    found = set()
    while row >= 0:
        found.add(row)
        row = int(batch.parent[row])
    return found


@given(sequences)
def test_every_sequence_is_recovered_through_its_index(given_sequences: list[list[int]]) -> None:
    batch = pack(given_sequences)

    for sequence, index in zip(given_sequences, batch.index, strict=True):
        assert batch.token_ids[index].tolist() == sequence
        assert batch.position_ids[index].tolist() == list(range(len(sequence)))
        assert batch.parent[index].tolist() == [-1, *index[:-1].tolist()]


@given(sequences)
def test_each_different_prefix_is_computed_once(given_sequences: list[list[int]]) -> None:
    prefixes = {tuple(s[: n + 1]) for s in given_sequences for n in range(len(s))}

    assert pack(given_sequences).num_tokens == len(prefixes)


@given(sequences)
def test_a_row_attends_to_itself_and_its_ancestors_and_to_nothing_else(given_sequences: list[list[int]]) -> None:
    batch = pack(given_sequences)
    mask = batch.mask()

    assert mask.sum(axis=1).tolist() == (batch.position_ids + 1).tolist()
    for row in range(batch.num_tokens):
        assert set(np.flatnonzero(mask[row]).tolist()) == ancestors_and_self(batch, row)


@given(sequences, st.randoms(use_true_random=False))
def test_the_layout_does_not_depend_on_the_order_of_the_sequences(
    given_sequences: list[list[int]], random: Any
) -> None:
    order = list(range(len(given_sequences)))
    random.shuffle(order)
    batch, shuffled = pack(given_sequences), pack([given_sequences[i] for i in order])

    np.testing.assert_array_equal(batch.token_ids, shuffled.token_ids)
    np.testing.assert_array_equal(batch.end, shuffled.end)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(shuffled.index[place], batch.index[i])


@given(sequences)
def test_a_counter_counts_what_a_trie_would_hold(given_sequences: list[list[int]]) -> None:
    counter = PrefixCounter()
    for n, sequence in enumerate(given_sequences):
        before = counter.num_tokens
        assert counter.cost_of(sequence) == counter.add(sequence) == counter.num_tokens - before
        assert counter.num_tokens == pack(given_sequences[: n + 1]).num_tokens


@given(sequences)
def test_a_padded_row_is_its_sequence_and_masked_padding(given_sequences: list[list[int]]) -> None:
    batch = pad(given_sequences, pad_id=9)

    for row, (sequence, index) in enumerate(zip(given_sequences, batch.index, strict=True)):
        assert batch.token_ids.reshape(-1)[index].tolist() == sequence
        assert batch.token_ids[row][batch.mask[row]].tolist() == sequence
        assert set(batch.token_ids[row][~batch.mask[row]].tolist()) <= {9}


@given(sequences, st.integers(8, 30))
def test_groups_keep_the_order_and_the_budget(given_sequences: list[list[int]], budget: int) -> None:
    groups = split_by_budget(given_sequences, budget)

    assert [i for group in groups for i in group] == list(range(len(given_sequences)))
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        assert pack([given_sequences[i] for i in group]).num_tokens <= budget
        if following:  # the next one would not have fitted
            assert pack([given_sequences[i] for i in [*group, following[0]]]).num_tokens > budget


@given(st.lists(st.integers(1, 8), max_size=12), st.integers(8, 30))
def test_padded_groups_hold_each_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = split_padded(lengths, budget)

    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= budget for group in groups)


def test_a_sequence_over_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"^sequence 1 has 5 tokens and the budget is 4"):
        split_by_budget([[1], [1, 2, 3, 4, 5]], 4)
    with pytest.raises(ValueError, match=r"^sequence 1 has 5 tokens and the budget is 4"):
        split_padded([1, 5], 4)


@pytest.mark.parametrize("layout", [pack, pad])
def test_nothing_and_an_empty_sequence_are_refused(layout: Any) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        layout([])
    with pytest.raises(ValueError, match=r"^sequence 1 of 2 is empty"):
        layout([[1], []])


def test_arrays_lists_and_tuples_are_the_same_sequence() -> None:
    mixed = pack([[1, 2], (1, 2), np.array([1, 2], np.int32)])

    assert mixed.token_ids.tolist() == [1, 2]
    assert [index.tolist() for index in mixed.index] == [[0, 1]] * 3


def test_ids_are_ordered_as_numbers() -> None:
    assert pack([[256], [1], [70_000], [255]]).token_ids.tolist() == [1, 255, 256, 70_000]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_says_the_same_of_packed_and_of_separate_sequences(arch: Arch, attention: str, tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path, arch=arch))
    model.set_attn_implementation(attention)
    stem = list(range(5, 25))
    given_sequences = [[*stem, *[n] * n, 7] for n in (1, 1, 2, 9)] + [[9, 8, 7], stem]
    batch = pack(given_sequences)
    mask = torch.from_numpy(batch.mask())
    if attention == "eager":  # adds the mask to the scores
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    with torch.no_grad():
        packed = model(
            input_ids=torch.from_numpy(batch.token_ids)[None],
            position_ids=torch.from_numpy(batch.position_ids)[None],
            attention_mask=mask[None, None],
            use_cache=False,
        ).logits[0]

    for sequence, index in zip(given_sequences, batch.index, strict=True):
        torch.testing.assert_close(packed[torch.from_numpy(index)], plain_logits(model, sequence), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, None),
        ({"_attn_implementation": "sdpa"}, None),
        ({"_attn_implementation": "flash_attention_2"}, "takes no tree mask"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention read tokens in row order"),
        ({"sliding_window": 8}, "attention windows of 8 tokens are narrower than sequences of up to 9"),
        ({"sliding_window": 9}, None),
        ({"sliding_window": 8, "use_sliding_window": False}, None),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "attention windows of 8"),
        ({"attention_chunk_size": 4, "layer_types": ["chunked_attention"]}, "attention windows of 4"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"alibi": True}, "ALiBi"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope of type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope of type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, None),
    ],
)
def test_a_model_that_cannot_run_packed_is_told_by_its_config(config: dict[str, Any], reason: str | None) -> None:
    found = packing_obstacle(SimpleNamespace(**config), longest=9)

    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_only_rope_that_looks_at_the_batch_stands_against_padding() -> None:
    assert rope_obstacle(SimpleNamespace(rope_parameters={"rope_type": "default"})) is None
    assert rope_obstacle(SimpleNamespace(rope_parameters=None)) is None
    assert "depends on the longest sequence" in str(
        rope_obstacle(SimpleNamespace(rope_scaling={"rope_type": "dynamic"}))
    )
