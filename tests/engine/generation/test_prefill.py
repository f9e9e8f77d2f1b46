"""How known tokens become forward passes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.generation.prefill import plan_prefill


def test_equal_sequences_are_computed_once_for_all_their_rows() -> None:
    (batch,) = plan_prefill([((1, 2, 3), 0), ((1, 2, 3), 5), ((4, 5, 6), 2)])

    assert batch.token_ids == [[1, 2, 3], [4, 5, 6]]
    assert dict(zip(batch.rows, batch.sources, strict=True)) == {0: 0, 5: 0, 2: 1}
    assert batch.num_tokens == 6


def test_lengths_that_differ_much_go_into_separate_passes() -> None:
    batches = plan_prefill([((1,) * 100, 0), ((2,) * 20, 1), ((3,) * 19, 2)])

    assert [batch.rows for batch in batches] == [[2, 1], [0]]


def test_a_row_without_known_tokens_needs_no_pass() -> None:
    assert plan_prefill([((), 0)]) == []


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=30).map(tuple), st.none()), max_size=25))
def test_every_row_gets_exactly_its_own_tokens(wanted: list[tuple[tuple[int, ...], None]]) -> None:
    rows = {row: tokens for row, (tokens, _) in enumerate(wanted)}

    batches = plan_prefill([(tokens, row) for row, tokens in rows.items()])

    given_rows = [row for batch in batches for row in batch.rows]
    assert sorted(given_rows) == [row for row, tokens in rows.items() if tokens]
    for batch in batches:
        assert len({len(line) for line in batch.token_ids}) == 1
        for row, source in zip(batch.rows, batch.sources, strict=True):
            assert tuple(batch.token_ids[source][: len(rows[row])]) == rows[row]
