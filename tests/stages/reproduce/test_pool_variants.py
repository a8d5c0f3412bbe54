"""Variants of the embedded digits, against the labels that scikit-learn gives and against each other."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.config import DataSettings
from pipeline.data.dataset import DataSet
from pipeline.data.manifest import load_manifest
from pipeline.data.readers.shard import Sample
from pipeline.data.sources import open_split
from pipeline.errors import UsageError
from stages.reproduce.pool_variants import PoolVariant, write_variant

TRUTH = load_digits().target


def pool(folder: Path, variant: PoolVariant) -> list[Sample]:
    name = write_variant(folder, variant)
    return [sample for _, sample in open_split(load_manifest(name, folder), "unlabelled", folder).read()]


def kinds(samples: list[Sample]) -> Counter[int]:
    """Images by true class, by the index in the key; -1: a piece of a photograph."""
    return Counter(int(TRUTH[int(s.key.removeprefix("digit-"))]) if s.key.startswith("digit-") else -1 for s in samples)


@pytest.mark.parametrize("outside", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("size", [100, 320])
def test_share_out_of_domain_with_everything_else_even(tmp_path: Path, size: int, outside: float) -> None:
    found = kinds(pool(tmp_path, PoolVariant(size, outside=outside)))
    assert found.total() == size
    assert found[-1] == round(size * outside)
    digits = [found[c] for c in range(10)]
    assert max(digits) - min(digits) <= 1


@pytest.mark.parametrize("draw", [0, 1, 4])
@pytest.mark.parametrize("imbalance", [1, 4, 16])
def test_prior_is_a_geometric_row(tmp_path: Path, imbalance: float, draw: int) -> None:
    """Oracle: sorted, each class has r times the next one's images, r^9 = imbalance; the nearest whole numbers."""
    found = kinds(pool(tmp_path, PoolVariant(320, imbalance=imbalance, draw=draw)))
    assert found.total() == 320
    assert found[-1] == 0
    row = imbalance ** (-np.arange(10) / 9)
    counts = sorted((found[c] for c in range(10)), reverse=True)
    exact = 320 * row / row.sum()
    np.testing.assert_allclose(counts, exact, atol=1 - 1e-9)
    up = counts > exact
    assert np.mod(exact[up], 1).min(initial=1) >= np.mod(exact[~up], 1).max(initial=0)


def test_order_of_classes_is_the_draws() -> None:
    def order(draw: int, imbalance: float) -> list[int]:
        return np.argsort(-PoolVariant(3000, imbalance=imbalance, draw=draw).per_class()).tolist()

    assert order(0, 4) == order(0, 16) != order(1, 16)
    assert len({tuple(order(draw, 16)) for draw in range(20)}) == 20


def test_no_image_twice_and_none_of_another_split(tmp_path: Path) -> None:
    for variant in (PoolVariant(320, outside=0.6), PoolVariant(320, imbalance=16, draw=3)):
        samples = pool(tmp_path, variant)
        digits = DataSet(DataSettings(manifest="digits-draws", image_size=8), None, tmp_path, seed=variant.draw)
        whole = {sample.key: sample.data for _, sample in digits.split("unlabelled").read()}
        own = DataSet(DataSettings(manifest=variant.name, image_size=8), tmp_path, tmp_path, seed=variant.draw)
        assert own.split("labelled").fingerprint() == digits.split("labelled").fingerprint()
        assert len({s.key for s in samples}) == len({s.data for s in samples}) == 320
        assert all(whole[s.key] == s.data for s in samples)
        assert {s.label for s in samples} == {-1}


def test_neighbouring_variants_share_their_images(tmp_path: Path) -> None:
    even, half, tail = (
        {s.key for s in pool(tmp_path, v)}
        for v in (PoolVariant(320), PoolVariant(320, outside=0.5), PoolVariant(320, imbalance=16))
    )
    assert {key for key in half if key.startswith("digit-")} < even
    counts = PoolVariant(320, imbalance=16).per_class()
    assert len(even & tail) == np.minimum(counts, 32).sum()
    other = {s.key for s in pool(tmp_path, PoolVariant(320, draw=1))}
    assert len(even & other) < 200  # a draw of 32 of about 95, twice: about 11 of each class in common


def test_pure_function_of_its_settings(tmp_path: Path) -> None:
    """Another folder, or the same again: equal bytes, equal fingerprints."""
    variant = PoolVariant(120, outside=0.25, imbalance=2.5, draw=7)
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        folder.mkdir(exist_ok=True)
        name = write_variant(folder, variant)
        digests.add(tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())))
        assert sorted(p.name for p in folder.iterdir()) == [f"{name}.parquet", f"{name}.yaml"]
        manifest = load_manifest(name, folder)
        for split in ("labelled", "validation", "test"):
            assert open_split(manifest, split, folder).fingerprint() == (
                open_split(load_manifest("digits-draws"), split).fingerprint()
            )
        assert [shard.name for shard in open_split(manifest, "unlabelled", folder).shards] == [name]
    assert len(digests) == 1


def test_too_few_images_of_a_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs 401 pieces of photographs and the embedded pool has 400"):
        write_variant(tmp_path, PoolVariant(401, outside=1.0))
    with pytest.raises(UsageError, match=r"images of class \d .* none of which is used twice"):
        write_variant(tmp_path, PoolVariant(900, imbalance=16))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"size": 0}, {"outside": 1.1}, {"imbalance": 0.5}, {"draw": -1}])
def test_impossible_settings(wrong: dict) -> None:
    with pytest.raises(UsageError, match="size is at least 1"):
        PoolVariant(**{"size": 10, **wrong})
