"""The embedded data set, against scikit-learn's own arrays."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.data.manifest import load_manifest
from pipeline.data.readers.shard import Sample
from pipeline.data.sources import open_split
from pipeline.errors import DataError

SPLITS = ("labelled", "validation", "unlabelled", "test")


def samples(split: str) -> list[Sample]:
    return [sample for _, sample in open_split(load_manifest("digits"), split).read()]  # type: ignore[arg-type]


def test_partition_uses_every_digit_once_and_tells_the_truth() -> None:
    """Oracle: the array that scikit-learn gives, at the index in the key."""
    images, truth = load_digits(return_X_y=True)
    seen = []
    for split in SPLITS:
        for sample in samples(split):
            if sample.key.startswith("digit-"):
                index = int(sample.key.removeprefix("digit-"))
                seen.append(index)
                pixels = np.asarray(Image.open(io.BytesIO(sample.data)), dtype=float)
                np.testing.assert_allclose(pixels / 255 * 16, images[index].reshape(8, 8), atol=0.04)
                assert sample.label == (-1 if split == "unlabelled" else truth[index])
    assert sorted(seen) == list(range(1797))


def test_counts_and_shards() -> None:
    counts = {split: open_split(load_manifest("digits"), split).count() for split in SPLITS}  # type: ignore[arg-type]
    assert counts == {"labelled": 50, "validation": 300, "unlabelled": 1347, "test": 500}
    pool = open_split(load_manifest("digits"), "unlabelled")
    assert [shard.name for shard in pool.shards] == ["pool-00000", "pool-00001"]
    assert [shard.rows() for shard in pool.shards] == [674, 673]
    assert sum(sample.key.startswith("photo-") for sample in samples("unlabelled")) == 400


@pytest.mark.parametrize("split", ["labelled", "validation", "test"])
def test_every_prefix_of_tens_is_balanced(split: str) -> None:
    labels = open_split(load_manifest("digits"), split).labels()  # type: ignore[arg-type]
    for rows in range(10, len(labels) + 1, 10):
        assert np.bincount(labels[:rows], minlength=10).tolist() == [rows // 10] * 10


def test_fewer_labels_on_request() -> None:
    cut = open_split(load_manifest("digits"), "labelled", first=20)
    assert [sample.key for _, sample in cut.read()] == [sample.key for sample in samples("labelled")[:20]]
    assert cut.fingerprint() != open_split(load_manifest("digits"), "labelled").fingerprint()


def test_the_photographs_have_grey_levels_of_digits() -> None:
    """Every level that a piece shows is one of the digits' 17, and the pieces are as dark on average."""
    levels = {round(level * 255 / 16) for level in range(17)}
    means: dict[bool, list[float]] = {True: [], False: []}
    for sample in samples("unlabelled"):
        pixels = np.asarray(Image.open(io.BytesIO(sample.data)))
        assert set(pixels.ravel().tolist()) <= levels
        means[sample.key.startswith("photo-")].append(float(pixels.mean()))
    assert abs(np.mean(means[True]) - np.mean(means[False])) < 2


def test_partition_is_what_it_was() -> None:
    """Written down once: another NumPy or scikit-learn must not move images between splits."""
    assert [sample.key for sample in samples("labelled")[:3]] == ["digit-1463", "digit-0846", "digit-0648"]
    assert [sample.key for sample in samples("test")[:3]] == ["digit-1573", "digit-0647", "digit-0002"]


def test_unknown_part() -> None:
    from pipeline.data.readers.digits import digits_shards

    with pytest.raises(DataError, match="no subset 'trian'"):
        digits_shards("trian", True)
