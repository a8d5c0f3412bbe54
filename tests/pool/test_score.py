"""Scoring a shard: every row is there, the file is whole, done means done."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.data.readers.shard import Chosen
from pipeline.errors import DataError, RunError
from pipeline.log_odds import log_odds
from pipeline.pool.copies.index import CopyIndex, default_threshold
from pipeline.pool.score import score_shard
from pipeline.pool.scores import is_scored, open_scored, read_scores, read_shard_scores, score_schema, shard_file
from pipeline.storage.tables import fixed_numbers


def read_log_odds(path):
    return np.concatenate(
        [fixed_numbers(batch.column(0), "<f4") for batch in read_scores(read_shard_scores(path), ["log_odds"])]
    )


def test_every_row_is_scored_as_the_model_says(make_shards, scorer, images_of, tmp_path):
    shard = make_shards([30])[0]
    told = []
    counts = score_shard(shard, scorer, tmp_path, fingerprint="f", progress=lambda images: told.append(images))
    path = shard_file(tmp_path, shard.name)
    expected = log_odds(scorer.logits(images_of(30, 0))).numpy()
    np.testing.assert_allclose(read_log_odds(path), expected, rtol=1e-5, atol=1e-5)
    table = pq.read_table(path)
    assert table.column("row").to_pylist() == list(range(30))
    assert table.column("key").to_pylist() == [f"pool-00000-{at}" for at in range(30)]
    assert set(table.column("status").to_pylist()) == {"ok"}
    assert counts.rows == 30
    assert counts.status == {"ok": 30}
    assert told == [8, 8, 8, 6]
    assert 0 <= counts.waiting <= counts.seconds


def test_bad_images_and_bad_logits_keep_their_rows(make_shards, scorer, shard_of, tmp_path):
    class Broken(nn.Module):
        def forward(self, images):
            logits = scorer.model(images).clone()
            logits[images.mean(dim=(1, 2, 3)) > 10] = torch.nan
            return logits

    files = list(make_shards([10])[0].files)
    files[2], files[5], files[6] = b"", b"\x89PNG nonsense", files[6][:50]
    dirty = shard_of("dirty", tuple(files), first=40)
    score_shard(dirty, replace(scorer, model=Broken(), mean=(-20, -20, -20)), tmp_path, fingerprint="f")
    table = pq.read_table(shard_file(tmp_path, "dirty"))
    status = table.column("status").to_pylist()
    assert status[2] == "empty"
    assert status[5] == status[6] == "decode_error"
    assert all(status[at] == "nonfinite" for at in range(10) if at not in (2, 5, 6))
    assert table.column("row").to_pylist() == list(range(40, 50))
    assert table.column("log_odds").null_count == 10
    assert "0x" not in " ".join(text or "" for text in table.column("detail").to_pylist())  # no addresses


def test_the_same_bytes_again(make_shards, scorer, tmp_path):
    """Two runs, other threads, an index of copies: one file, byte for byte."""
    shard = make_shards([50])[0]
    for folder, workers in (("a", 1), ("b", 4)):
        score_shard(shard, replace(scorer, threads=workers), tmp_path / folder, fingerprint="f")
    assert shard_file(tmp_path / "a", shard.name).read_bytes() == shard_file(tmp_path / "b", shard.name).read_bytes()


def test_done_means_whole_and_of_these_inputs(make_shards, scorer, shard_of, tmp_path):
    shard = make_shards([12])[0]
    assert not is_scored(shard, tmp_path, "f")
    score_shard(shard, scorer, tmp_path, fingerprint="f")
    assert is_scored(shard, tmp_path, "f")
    assert not is_scored(shard, tmp_path, "another teacher")
    assert not is_scored(shard_of(shard.name, shard.files[:-1]), tmp_path, "f")
    path = shard_file(tmp_path, shard.name)
    path.write_bytes(path.read_bytes()[:-20])
    assert not is_scored(shard, tmp_path, "f")
    path.write_bytes(b"")
    assert not is_scored(shard, tmp_path, "f")


def test_a_failure_leaves_no_file(make_shards, scorer, shard_of, tmp_path):
    shard = make_shards([20])[0]

    class CutShort(shard_of):
        def read(self, start=0, stop=None):
            yield from super().read(0, 9)
            raise DataError("shard cut is cut short after 9 rows")

    with pytest.raises(DataError, match="cut short"):
        score_shard(CutShort("cut", shard.files), scorer, tmp_path, fingerprint="f")
    with pytest.raises(DataError, match="classes"):
        score_shard(shard, replace(scorer, class_names=("a", "b")), tmp_path, fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_changes_meanwhile_is_refused(make_shards, scorer, shard_of, tmp_path):
    shard = make_shards([20])[0]

    class Changing(shard_of):
        def fingerprint(self):
            return f"{super().fingerprint()} {len(self.reads)}"

    with pytest.raises(DataError, match="changed while it was being scored"):
        score_shard(Changing("c", shard.files), scorer, tmp_path, fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_chosen_rows(make_shards, scorer, tmp_path):
    """A pool may be what is left of a file; its rows keep their numbers, through the selection's places."""
    whole, other = make_shards([30, 9])
    left = Chosen(whole, (2, 3, 7, 20, 29))
    for shard in (left, other):
        score_shard(shard, scorer, tmp_path, fingerprint="f")
    pool = open_scored([left, other], tmp_path, "f")
    shard, row = pool.place(np.array([6, 0, 2, 4, 5, 4]))
    assert shard.tolist() == [1, 0, 0, 0, 1, 0]
    assert row.tolist() == [1, 2, 7, 29, 0, 29]
    assert [scores.first_row for scores in pool.shards] == [None, 0]
    everything = tmp_path / "all"
    score_shard(whole, scorer, everything, fingerprint="f")
    np.testing.assert_array_equal(
        read_log_odds(shard_file(tmp_path, left.name)),
        read_log_odds(shard_file(everything, whole.name))[list(left.places)],
    )


def test_a_place_that_cannot_be_written(make_shards, scorer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        score_shard(make_shards([5])[0], scorer, tmp_path / "file" / "scores", fingerprint="f")


def test_copies_are_written_with_their_match(make_shards, scorer, images_of, tmp_path):
    shard = make_shards([20])[0]
    index = CopyIndex(images_of(20, 0)[[4, 17]], ["test/t/0", "test/t/1"])
    score_shard(shard, scorer, tmp_path, fingerprint="f", copies=index)
    table = pq.read_table(shard_file(tmp_path, shard.name))
    similarity = np.array(table.column("similarity").to_pylist())
    assert np.flatnonzero(similarity >= default_threshold(8)).tolist() == [4, 17]
    assert table.column("match").to_pylist()[4] == "test/t/0"
    assert table.column("match").to_pylist()[17] == "test/t/1"


def test_names_that_are_no_file_names(scorer, shard_of, make_shards, tmp_path):
    name = "../a b/c%2F☃"
    score_shard(shard_of(name, make_shards([3])[0].files), scorer, tmp_path, fingerprint="f")
    (path,) = tmp_path.iterdir()
    assert path == shard_file(tmp_path, name)
    assert read_shard_scores(path).shard == name


def test_no_row_at_all(scorer, shard_of, tmp_path):
    shard = shard_of("none", ())
    assert score_shard(shard, scorer, tmp_path, fingerprint="f").rows == 0
    assert is_scored(shard, tmp_path, "f")


@pytest.mark.parametrize("change", ["text", "other"])
def test_a_file_that_is_no_part(tmp_path, change):
    path = tmp_path / "part-x.parquet"
    if change == "text":
        path.write_text("hello")
    else:
        pq.write_table(score_schema(2, 3).empty_table(), path)
    with pytest.raises(DataError, match=r"part-x\.parquet"):
        read_shard_scores(path)
