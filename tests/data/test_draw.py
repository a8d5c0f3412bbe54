"""Fewer labels: every class has its part, the seed decides, and what cannot be is refused by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DataSettings
from pipeline.data.dataset import DataSet
from pipeline.data.draw import _parts, stratified, without
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import Split, open_split
from pipeline.errors import DataError
from tests.data.made_images import encode, noise, write_parquet

IMAGES = [encode(noise(4, seed)) for seed in range(90)]


@pytest.fixture
def ordered(data_set: Callable[..., Path]) -> Split:
    """60 cats, then 30 dogs, in two files."""
    path = data_set(files={"train": {"glob": "t-*.parquet", "reader": "parquet"}})
    write_parquet(path.parent / "t-0.parquet", IMAGES[:50], [0] * 50)
    write_parquet(path.parent / "t-1.parquet", IMAGES[50:], [0] * 10 + [1] * 30)
    return open_split(load_manifest(path), "labelled")


def test_a_draw_has_its_part_of_every_class(ordered: Split) -> None:
    drawn = stratified(ordered, 15, seed=3)
    samples = [sample for _, sample in drawn.read()]
    assert np.bincount(drawn.labels()).tolist() == [10, 5]
    assert [sample.label for sample in samples] == drawn.labels().tolist()
    assert drawn.count() == 15
    whole = [(shard, sample) for shard, sample in ordered.read()]
    assert all(pair in whole for pair in drawn.read())  # rows, keys and bytes are those of the files
    assert [sample.data for _, sample in drawn.read()] != IMAGES[:15]
    assert [list(shard.read(1, 3)) for shard in drawn.shards] == [list(shard.read())[1:3] for shard in drawn.shards]


def test_the_seed_decides_and_a_larger_draw_holds_the_smaller(ordered: Split) -> None:
    def rows(count: int, seed: int) -> set[bytes]:
        return {sample.data for _, sample in stratified(ordered, count, seed).read()}

    assert rows(15, 0) == rows(15, 0) != rows(15, 1)
    assert rows(15, 0) < rows(30, 0) < rows(90, 0) == set(IMAGES)
    assert stratified(ordered, 15, 0).fingerprint() != stratified(ordered, 15, 1).fingerprint()


def test_what_cannot_be_drawn_is_refused_by_name(ordered: Split, data_set: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"data.labelled=1 is less than one image for each of 2 classes \(cat, dog\)"):
        stratified(ordered, 1, 0)
    with pytest.raises(DataError, match=r"data\.labelled=91: the labelled split has only 90 rows"):
        stratified(ordered, 91, 0)
    path = data_set()
    write_parquet(path.parent / "train.parquet", IMAGES[:5], [0] * 5)
    with pytest.raises(DataError, match="has no image of dog"):
        stratified(open_split(load_manifest(path), "labelled"), 4, 0)


def test_a_pool_without_what_is_labelled(data_set: Callable[..., Path]) -> None:
    """The rest of the labelled files first, then another file whose rows have the same numbers."""
    path = data_set(
        files={
            "train": {"path": "train.parquet", "reader": "parquet"},
            "web": {"path": "web.parquet", "reader": "parquet"},
        },
        splits={
            "labelled": {"from": "train"},
            "unlabelled": {
                "from": "train",
                "drop_last": 4,
                "without": "labelled",
                "also": [{"from": "web", "first": 6}],
            },
        },
    )
    write_parquet(path.parent / "train.parquet", IMAGES[:40], [0, 1] * 20)
    write_parquet(path.parent / "web.parquet", IMAGES[40:50])
    settings = DataSettings(manifest=str(path), image_size=4, labelled=10)
    for seed in range(2):
        data = DataSet(settings, path.parent, path.parent, seed=seed)
        drawn = {sample.data for _, sample in data.split("labelled").read()}
        pool = data.split("unlabelled")
        assert [sample.data for _, sample in pool.read()] == [
            *(image for image in IMAGES[:36] if image not in drawn),
            *IMAGES[40:46],
        ]
        assert set(pool.labels().tolist()) == {-1}
    assert pool.fingerprint() != DataSet(settings, path.parent, path.parent).split("unlabelled").fingerprint()
    everything = open_split(load_manifest(path), "unlabelled")
    assert everything.count() == 36 + 6
    with pytest.raises(DataError, match="no image that is not in the unlabelled one"):
        without(everything, everything)


def test_a_manifest_may_say_how_many_are_drawn(data_set: Callable[..., Path]) -> None:
    """A recipe's number goes before it; by itself it is another draw for each seed."""
    path = data_set(splits={"labelled": {"from": "train", "draw": 8}})
    write_parquet(path.parent / "train.parquet", IMAGES[:40], [0, 1] * 20)
    draws = []
    for seed in range(3):
        data = DataSet(DataSettings(manifest=str(path), image_size=4), path.parent, path.parent, seed=seed)
        assert data.drawn == 8
        draws.append([sample.key for _, sample in data.split("labelled").read()])
        assert np.bincount(data.split("labelled").labels()).tolist() == [4, 4]
    assert len({tuple(draw) for draw in draws}) == 3
    fewer = DataSet(DataSettings(manifest=str(path), image_size=4, labelled=6), path.parent, path.parent)
    assert {sample.key for _, sample in fewer.split("labelled").read()} < set(draws[0])


@pytest.mark.parametrize(("split", "draw"), [("unlabelled", 8), ("labelled", 1)])
def test_a_draw_is_of_labels_and_has_every_class(data_set: Callable[..., Path], split: str, draw: int) -> None:
    path = data_set(splits={"labelled": {"from": "train"}, split: {"from": "train", "draw": draw}})
    with pytest.raises(DataError, match=rf"splits.{split}.draw is {draw}: it is for the labelled split"):
        load_manifest(path)


def test_digits_draw_fifty_labels_and_leave_the_rest(tmp_path: Path) -> None:
    """Five of each digit, and every other image of `digits`' labelled and unlabelled splits is in the pool."""
    fixed = load_manifest("digits")
    everything = {s.key for name in ("labelled", "unlabelled") for _, s in open_split(fixed, name).read()}
    kept_away = {s.key for name in ("validation", "test") for _, s in open_split(fixed, name).read()}
    seen = set()
    for seed in range(4):
        data = DataSet(DataSettings(manifest="digits-draws", image_size=8), None, tmp_path, seed=seed)
        labelled, pool = ({s.key for _, s in data.split(name).read()} for name in ("labelled", "unlabelled"))
        assert labelled | pool == everything
        assert not labelled & pool
        assert np.bincount(data.split("labelled").labels()).tolist() == [5] * 10
        assert {s.key for name in ("validation", "test") for _, s in data.split(name).read()} == kept_away
        seen |= labelled
    assert len(seen) > 150


@given(st.lists(st.integers(1, 50), min_size=2, max_size=12), st.data())
def test_parts_are_proportional(present: list[int], data: st.DataObject) -> None:
    """Oracle: each part is within one of the exact share, or is the one that a small class must have."""
    count = data.draw(st.integers(len(present), sum(present)))
    parts = _parts(np.array(present), count, [str(i) for i in range(len(present))])
    assert parts.sum() == count
    assert (parts >= 1).all()
    assert (parts <= present).all()
    ideal = count * np.array(present) / sum(present)
    spare = np.maximum(1 - ideal, 0).sum()  # what the small classes take from the others
    assert (np.abs(parts - ideal) <= 1 + spare).all()
