"""The cifar10 manifest on the real files, where MPL_DATA names a folder that has them."""

import os
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.decode import Status, decode_stream
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split

DATA = Path(os.environ.get("MPL_DATA", "nowhere"))
pytestmark = pytest.mark.skipif(not (DATA / "cifar10" / "train.parquet").is_file(), reason="MPL_DATA has no CIFAR-10")


def test_splits() -> None:
    manifest = load_manifest("cifar10", DATA)
    counts = {split: open_split(manifest, split, DATA).count() for split in manifest.splits}
    assert counts["labelled"] == 46_000
    assert counts["validation"] == 4_000
    assert counts["test"] == 10_000
    labels = open_split(manifest, "validation", DATA).labels()
    assert len(set(labels.tolist())) == 10
    few = open_split(manifest, "labelled", DATA, first=4_000)
    assert min(Counter(few.labels().tolist()).values()) > 300  # train.parquet is shuffled


def test_dirty_rows_of_the_pool_have_a_status() -> None:
    shard = open_split(load_manifest("cifar10", DATA), "unlabelled", DATA).shards[0]
    stream = decode_stream(shard.read(), 32, data_of=lambda sample: sample.data)
    statuses = Counter(status for _, _, status, _ in stream)
    assert sum(statuses.values()) == shard.rows()
    assert statuses[Status.ok] > 0.99 * shard.rows()
    assert len(statuses) > 1
