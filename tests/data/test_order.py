"""The order in which images are seen."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import order as batches
from pipeline.data.order import batch_indices
from pipeline.errors import DataError


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 45), st.integers(0, 2**40), st.integers(0, 5))
def test_batches_are_consecutive_parts_of_one_sequence_of_epochs(n: int, batch: int, seed: int, steps: int) -> None:
    """Every epoch is a permutation, whatever the batch; a remainder is not lost."""
    sequence = np.concatenate([batch_indices(n, batch, seed, "x", step) for step in range(steps + 1)])
    assert len(sequence) == (steps + 1) * batch
    assert sequence.dtype == np.int64
    for start in range(0, len(sequence) - n + 1, n):
        assert sorted(sequence[start : start + n]) == list(range(n))
    one_by_one = [batch_indices(n, 1, seed, "x", step)[0] for step in range(len(sequence))]
    assert sequence.tolist() == one_by_one


def test_order_depends_on_seed_purpose_and_epoch_alone() -> None:
    def epoch(seed: int, purpose: str, number: int) -> tuple[int, ...]:
        return tuple(batch_indices(50, 50, seed, purpose, number))

    orders = {epoch(seed, purpose, number) for seed in (0, 1) for purpose in ("a", "b") for number in (0, 1)}
    assert len(orders) == 8
    batches._epoch_order.cache_clear()
    assert epoch(1, "b", 1) in orders


def test_orders_are_uniform() -> None:
    """Every image comes first about equally often: 6,000 epochs of 6, within five standard deviations."""
    first = Counter(int(batch_indices(6, 6, 0, "x", step)[0]) for step in range(6_000))
    assert all(abs(count - 1_000) < 5 * (6_000 * 5 / 36) ** 0.5 for count in first.values())


def test_what_cannot_be_drawn() -> None:
    for n, batch, step in ((0, 4, 0), (4, 0, 0), (4, 4, -1)):
        with pytest.raises(DataError, match="cannot be drawn"):
            batch_indices(n, batch, 0, "x", step)


def test_the_result_is_not_the_cached_order() -> None:
    drawn = batch_indices(10, 10, 0, "x", 0)
    drawn[:] = 0
    assert sorted(batch_indices(10, 10, 0, "x", 0)) == list(range(10))
