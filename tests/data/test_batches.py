"""Images in memory, and the order in which they are seen."""

import errno
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import batches
from pipeline.data.batches import batch_indices, load_images
from pipeline.data.decode import Status
from pipeline.data.shards import Sample
from pipeline.errors import DataError
from tests.data.made_images import encode, noise

SIZE = 6


def entries(count: int, bad: tuple[int, ...] = ()) -> list[tuple[str, Sample]]:
    return [
        (
            f"shard-{i // 100}",
            Sample(i % 100, f"key{i}", b"junk" if i in bad else encode(noise(SIZE, i)), i % 3),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1 << 40, 10_000, 0])
def test_pixels_order_and_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, limit: int) -> None:
    """In memory, spilled half way and spilled from the start: the same."""
    spilled = []
    spill = batches._Pixels._spill
    monkeypatch.setattr(batches._Pixels, "_spill", lambda *args: spilled.append(1) or spill(*args))
    bad = (0, 255, 256, 700)
    images = load_images(entries(701, bad), SIZE, cache=tmp_path, memory_limit=limit, workers=workers)
    good = [i for i in range(701) if i not in bad]
    expected = np.stack([noise(SIZE, i).transpose(2, 0, 1) for i in good])
    assert images.images.dtype == torch.uint8
    np.testing.assert_array_equal(images.images.numpy(), expected)
    assert images.labels.tolist() == [i % 3 for i in good]
    assert images.labels.dtype == torch.int64
    assert images.keys == [f"key{i}" for i in good]
    assert len(images) == 697
    assert images.shards == [f"shard-{i // 100}" for i in good]
    assert images.rows.tolist() == [i % 100 for i in good]
    assert [(one.shard, one.row, one.key, one.status) for one in images.skipped] == [
        (f"shard-{i // 100}", i % 100, f"key{i}", Status.decode_error) for i in bad
    ]
    assert bool(spilled) == (limit < 1 << 40)
    assert list(tmp_path.iterdir()) == []  # the file has no name: nothing to clear up, whatever happens


def test_a_repeated_key_confuses_nothing() -> None:
    samples = [("a", Sample(i, "same", encode(noise(SIZE, i)), 0)) for i in range(3)]
    images = load_images(samples, SIZE)
    assert images.keys == ["same"] * 3
    assert images.rows.tolist() == [0, 1, 2]


def test_nothing_decoded() -> None:
    with pytest.raises(DataError, match=r"no image could be decoded, of 2 entries; the first: key0: not an image"):
        load_images(entries(2, (0, 1)), SIZE)
    with pytest.raises(DataError, match="of 0 entries"):
        load_images([], SIZE)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(**options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batches.tempfile, "TemporaryFile", no_space)
    with pytest.raises(DataError, match=r"cannot be kept in .*: No space left on device. Free some space"):
        load_images(entries(9), SIZE, cache=tmp_path, memory_limit=0)


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
