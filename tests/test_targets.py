"""The store: what is read is what was written, and what was not written is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dense import fixed_binary
from pipeline.errors import TargetsError
from pipeline.targets import (
    MANIFEST,
    TargetsStore,
    file_is_done,
    labelled_schema,
    pool_schema,
    write_manifest,
    write_targets,
)

NAMES = ("ant", "bee", "cat")


def random_distributions(rows, seed):
    return np.random.RandomState(seed).dirichlet(np.full(len(NAMES), 0.3), rows)


def write_store(folder, dtype="float16", rows=(5, 4), labelled=6, extra=b""):
    """A store of random numbers; returns its distributions as they went in."""
    wanted = []
    for file, count in enumerate(rows):
        q = random_distributions(count, file)
        wanted.append(q)
        table = pa.table(
            {
                "key": [f"key-{file}-{at}" for at in range(count)],
                "shard": ["s"] * count,
                "row": np.arange(count) + 100 * file,
                "image": pa.array([b"image %d %d" % (file, at) + extra for at in range(count)], pa.large_binary()),
                "distribution": fixed_binary(q.astype(dtype)),
                "classes": pa.array([[0, 2]] * count, pa.list_(pa.int32())),
                "repeat": np.arange(count) + 1,
            }
        )
        write_targets(folder / f"pool-{file:05d}.parquet", table.cast(pool_schema(3, dtype, "f")))
    q = random_distributions(labelled, 99)
    table = pa.table(
        {
            "key": [f"l{at}" for at in range(labelled)],
            "shard": ["train"] * labelled,
            "row": np.arange(labelled),
            "label": np.arange(labelled) % 3,
            "distribution": fixed_binary(q.astype(dtype)),
        }
    )
    write_targets(folder / "labelled-00000.parquet", table.cast(labelled_schema(3, dtype, "f")))
    write_manifest(
        folder,
        fingerprint="f",
        teacher="t" * 64,
        class_names=NAMES,
        dtype=dtype,
        preprocessing={"size": 8},
        more={},
    )
    return np.concatenate(wanted), q


@pytest.mark.parametrize(("dtype", "error"), [("float16", 5e-4), ("float32", 1e-7)])
def test_what_is_read_is_what_was_written(tmp_path, dtype, error):
    wanted, labelled = write_store(tmp_path, dtype)
    store = TargetsStore.open(tmp_path, teacher="t" * 64, class_names=NAMES)
    assert store.count == 9
    q = store.distributions()
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=2e-7)
    np.testing.assert_allclose(q, wanted, atol=error)
    assert list(store.images())[5:7] == [b"image 1 0", b"image 1 1"]
    assert store.keys()[4:6] == ["key-0-4", "key-1-0"]
    assert store.classes() == [[0, 2]] * 9
    assert store.repeats().tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert [(shard, sample.row, sample.data) for shard, sample in store.samples()][6] == (
        "s",
        101,
        b"image 1 1",
    )
    found = store.labelled()
    np.testing.assert_allclose(found.distributions, labelled, atol=error)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.keys[3] == "l3"
    batches = list(store.batches(2))
    assert [len(batch.samples) for batch in batches] == [2, 2, 1, 2, 2]
    np.testing.assert_array_equal(np.concatenate([batch.distributions for batch in batches]), q)


def test_tiny_probabilities_survive_float16(tmp_path):
    """A row never loses its sum: the largest of C numbers is at least 1/C."""
    q = np.full((1, 3), 1e-12)
    q[0, 1] = 1 - 2e-12
    table = pa.table(
        {
            "key": ["a"], "shard": ["s"], "row": [0], "image": pa.array([b"x"], pa.large_binary()),
            "distribution": fixed_binary(q.astype("float16")), "classes": pa.array([[1]], pa.list_(pa.int32())),
            "repeat": [1],
        }
    )  # fmt: skip
    write_targets(tmp_path / "pool-00000.parquet", table.cast(pool_schema(3, "float16", "f")))
    write_manifest(
        tmp_path, fingerprint="f", teacher="t", class_names=NAMES, dtype="float16", preprocessing={}, more={}
    )
    assert TargetsStore.open(tmp_path).distributions().tolist() == [[0.0, 1.0, 0.0]]


def test_another_teacher_or_class_list_is_refused(tmp_path):
    write_store(tmp_path)
    with pytest.raises(TargetsError, match="another teacher"):
        TargetsStore.open(tmp_path, teacher="u" * 64)
    with pytest.raises(TargetsError, match="class 2 is 'cat', expected 'dog'"):
        TargetsStore.open(tmp_path, class_names=("ant", "bee", "dog"))
    with pytest.raises(TargetsError, match="3 classes, expected 2"):
        TargetsStore.open(tmp_path, class_names=("ant", "bee"))


def cut_a_file(folder):
    path = folder / "pool-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def remove_a_file(folder):
    (folder / "labelled-00000.parquet").unlink()


def flip_a_byte(folder):
    path = folder / "pool-00000.parquet"
    data = bytearray(path.read_bytes())
    data[data.find(b"image 0 3")] ^= 1
    path.write_bytes(data)


def remove_the_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_the_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])


def another_version(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 7}))


def lacking_keys(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["pool"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def other_rows(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["pool"]["files"][0]["rows"] = 6
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_a_file, "cut short"),
        (remove_a_file, "labelled-00000.parquet is missing"),
        (flip_a_byte, "checksum differs"),
        (remove_the_manifest, "no finished store"),
        (cut_the_manifest, "cannot be read"),
        (another_version, "version 7, expected mpl-targets version 1"),
        (lacking_keys, "lacks pool"),
        (other_rows, "5 rows, its manifest says 6"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path, damage, message):
    write_store(tmp_path)
    damage(tmp_path)
    with pytest.raises(TargetsError, match=message) as caught:
        TargetsStore.open(tmp_path)
    assert "mpl precompute" in str(caught.value)


def test_a_damaged_page_is_found_on_reading_without_the_whole_checksum(tmp_path):
    write_store(tmp_path)
    flip_a_byte(tmp_path)
    store = TargetsStore.open(tmp_path, verify=False)
    assert store.distributions().shape == (9, 3)
    with pytest.raises(TargetsError, match="damaged"):
        list(store.images())


def test_whole_files_of_this_store_are_done(tmp_path):
    write_store(tmp_path)
    path = tmp_path / "pool-00000.parquet"
    assert file_is_done(path, "f")
    assert not file_is_done(path, "g")
    cut_a_file(tmp_path)
    assert not file_is_done(tmp_path / "pool-00001.parquet", "f")
    assert not file_is_done(tmp_path / "pool-00002.parquet", "f")


def test_bytes_per_row(tmp_path):
    """Ten classes in float16 cost their 20 bytes and little else, beyond the image."""
    count, classes = 20_000, 10
    q = np.random.RandomState(0).dirichlet(np.full(classes, 0.1), count).astype("float16")
    column = fixed_binary(q)
    pq.write_table(pa.table({"distribution": column}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 21 * count
