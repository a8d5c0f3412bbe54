"""Files of the code before: scores, selection and stores are read and taken for done; rejects are made again."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.pool.filter import filter_pool, is_filtered
from pipeline.pool.rejected import REJECTED
from pipeline.pool.scores import not_scored, open_scored, shard_file
from pipeline.pool.selection import Rules, read_selection, selection_fingerprint
from pipeline.storage.tables import fixed_numbers, header_if_whole, read_header
from pipeline.targets import TargetsStore
from pipeline.targets.build import Ingredients, check_targets, precompute
from pipeline.targets.manifest import StoreSettings, is_precomputed
from tests.pool.former import pool as former

RULES = Rules(**former.RULES)
FINGERPRINT = "ead034ddaa4ba25b3fb50fa5fdb33c48c6166729c13c7d50574f2edf9afe2a4f"  # as it was then


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy of the files."""
    return Path(shutil.copytree(former.HERE, tmp_path / "before"))


def scored(folder: Path):
    return open_scored(former.shards(), folder / "scores", former.MARK)


def test_scores_are_not_made_again(before) -> None:
    assert not_scored(former.shards(), before / "scores", former.MARK) == []
    pool = scored(before)
    assert (pool.rows, len(pool.shards), pool.class_names) == (27, 3, ("ant", "bee", "cat", "dog"))
    assert pool.place(np.array([0, 14, 15]))[1].tolist() == [0, 0, 100]
    for ordinals, batch in pool.stream(["row", "status", "log_odds"]):
        log_odds = fixed_numbers(batch.column("log_odds"), "<f4")[np.array(batch.column("status")) == "ok"]
        assert np.isfinite(log_odds).all()
        assert len(ordinals) == batch.num_rows
    assert selection_fingerprint(pool, RULES) == FINGERPRINT


def test_the_same_scores_give_the_same_selection_and_rejects_with_columns(before) -> None:
    """Every number of the sentences of then is in a column now."""
    pool, wanted = scored(before), read_selection(before / "selection.parquet")
    sentences = rejects(before)
    assert wanted.fingerprint == FINGERPRINT
    assert wanted.scores == pool.fingerprint()
    assert not is_filtered(pool, before, RULES)  # its rejects are of version 1
    filtered = filter_pool(pool, before, RULES)
    assert filtered.fingerprint == FINGERPRINT
    assert is_filtered(pool, before, RULES)
    again = read_selection(before / "selection.parquet")
    assert again.table.equals(wanted.table)
    assert again.class_names == wanted.class_names
    rows = rejects(before)
    assert rows.keys() == sentences.keys()
    for place, row in rows.items():
        old = sentences[place]
        assert [row[name] for name in ("key", "reason", "similarity", "match")] == [
            old[name] for name in ("key", "reason", "similarity", "match")
        ]
        if row["class"] is not None:
            numbers = f"log-odds {round(row['log_odds'], 4)}, needs {round(row['needed'], 4)}"
            assert old["detail"] == f"{pool.class_names[row['class']]}: {numbers}"
        else:
            assert (row["detail"], row["mirrored"] or False) == {
                None: (None, False),
                "mirrored": (None, True),
            }.get(old["detail"], (old["detail"], False))
    assert {row["reason"] for row in rows.values()} == {
        "empty", "decode_error", "eval_copy", "repeat_of", "below_probability", "below_k",
    }  # fmt: skip


def rejects(folder: Path) -> dict[tuple[str, int], dict]:
    rows = [row for path in sorted((folder / "rejected").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {(row["shard"], row["row"]): row for row in rows}


def test_rejects_of_version_1_are_refused_with_what_to_run(before) -> None:
    path = shard_file(before / "rejected", "pool c")
    assert header_if_whole(path, REJECTED) is None
    with pytest.raises(DataError, match=r"is mpl-rejected version 1, expected mpl-rejected version 2; run mpl filter"):
        read_header(path, REJECTED)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_store_is_read_and_counts_as_done(before, form, scorer) -> None:
    selection, settings = read_selection(before / "selection.parquet"), StoreSettings(**former.SETTINGS, format=form)
    folder = before / f"targets-{form}"
    assert is_precomputed(folder, selection, settings)
    store = TargetsStore.open(folder, teacher="t", class_names=("ant", "bee", "cat", "dog"), verify=True)
    files = {(shard.name, sample.row): sample.data for shard in former.shards() for sample in shard.read()}
    assert [sample.data for _, sample in store.samples()] == [
        files[shard, sample.row] for shard, sample in store.samples()
    ]
    assert sum(store.uses()) == store.repeats().sum() == store.manifest["uses"]
    assert store.labelled().row.tolist() == [0, 1, 2, 3, 5]
    assert check_targets(store, scorer, 100) < 1e-3


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_half_made_store_is_gone_on_with(before, form, scorer) -> None:
    """Files that are whole stay as they are; what is missing is made as it was."""
    settings, folder = StoreSettings(**former.SETTINGS, format=form), before / f"targets-{form}"
    wanted = {path.name: contents(path) for path in folder.glob("*.parquet")}
    (folder / "_manifest.json").unlink()
    (folder / "pool-00001.parquet").unlink()
    left = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    selection = read_selection(before / "selection.parquet")
    ingredients = Ingredients(selection, former.shards(), former.labelled(), scorer, scored(before))
    precompute(folder, ingredients, settings, preprocessing={"size": 16})
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert {path.name: contents(path) for path in folder.glob("*.parquet")} == wanted


def contents(path: Path) -> tuple[list[dict], dict[bytes, bytes]]:
    """Rows and header of a file; of a newer one less what is new."""
    table: pa.Table = pq.read_table(path)
    if "offset" in table.column_names:
        table = table.drop(["offset"])
    changed = (b"mpl.version", b"mpl.tar.bytes", b"mpl.tar.sha256")
    return table.to_pylist(), {name: text for name, text in table.schema.metadata.items() if name not in changed}
