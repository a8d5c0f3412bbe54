"""The store: what is read is what was written, in both formats, and what was not written is refused."""

import hashlib
import io
import json
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from upath import UPath

from pipeline.errors import TargetsError
from pipeline.storage.files import write_sealed
from pipeline.storage.tables import fixed_binary
from pipeline.targets import TargetsStore
from pipeline.targets.files import (
    file_is_done,
    labelled_schema,
    pool_file_is_done,
    pool_schema,
    record_batches,
    remove_unfinished,
    suffix,
    write_pool_file,
    write_targets,
)
from pipeline.targets.manifest import MANIFEST, Origin, write_manifest
from pipeline.targets.store import normalised

NAMES = ("ant", "bee", "cat")
FORMATS = ("parquet", "webdataset")


def random_distributions(rows, seed):
    return np.random.RandomState(seed).dirichlet(np.full(len(NAMES), 0.3), rows)


def pool_table(file, count, dtype="float16", image=None):
    """A training shard of random numbers, and its distributions as they went in."""
    q = random_distributions(count, file)
    image = image or (lambda at: b"image %d %d" % (file, at))
    table = pa.table(
        {
            "key": [f"key-{file}-{at}" for at in range(count)],
            "shard": ["s"] * count,
            "row": np.arange(count) + 100 * file,
            "image": pa.array([image(at) for at in range(count)], pa.large_binary()),
            "distribution": fixed_binary(q.astype(dtype)),
            "classes": pa.array([[0, 2]] * count, pa.list_(pa.int32())),
            "repeat": np.arange(count) + 1,
        }
    )
    return table.cast(pool_schema(3, dtype)), q


def write_store(folder, dtype="float16", rows=(5, 4), labelled=6, format="parquet"):
    """A store of random numbers; returns its distributions as they went in."""
    wanted = []
    for file, count in enumerate(rows):
        table, q = pool_table(file, count, dtype)
        wanted.append(q)
        write_pool_file(folder, file, table, "f", format)
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
    write_targets(folder / "labelled-00000.parquet", table.cast(labelled_schema(3, dtype)), "f")
    write_manifest(folder, Origin("f", "t" * 64, NAMES, dtype, {"size": 8}), {})
    return np.concatenate(wanted), q


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """On disk, and in fsspec's own object storage."""
    if request.param == "disk":
        yield tmp_path
        return
    place = UPath(f"memory:///{tmp_path.name}")
    yield place
    if place.exists():
        place.fs.rm(place.path, recursive=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "error"), [("float16", 5e-4), ("float32", 1e-7)])
def test_what_is_read_is_what_was_written(folder, dtype, error, format):
    wanted, labelled = write_store(folder, dtype, format=format)
    store = TargetsStore.open(folder, teacher="t" * 64, class_names=NAMES, verify=True)
    assert store.count == 9
    q = store.distributions()
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=2e-7)
    np.testing.assert_allclose(q, wanted, atol=error)
    assert list(store.images())[5:7] == [b"image 1 0", b"image 1 1"]
    assert store.keys()[4:6] == ["key-0-4", "key-1-0"]
    assert store.classes() == [[0, 2]] * 9
    assert store.repeats().tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert store.uses().tolist() == [15, 10]
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
    assert [data for batch in batches for data in (sample.data for _, sample in batch.samples)] == list(store.images())
    held = sum(path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST)
    assert store.manifest["pool"]["bytes"] + store.manifest["labelled"]["bytes"] == held


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
    write_targets(tmp_path / "pool-00000.parquet", table.cast(pool_schema(3, "float16")), "f")
    write_manifest(tmp_path, Origin("f", "t", NAMES, "float16", {}), {})
    assert TargetsStore.open(tmp_path).distributions().tolist() == [[0.0, 1.0, 0.0]]


def test_another_teacher_or_class_list_is_refused(tmp_path):
    write_store(tmp_path)
    with pytest.raises(TargetsError, match="another teacher"):
        TargetsStore.open(tmp_path, teacher="u" * 64)
    with pytest.raises(TargetsError, match="class 2 is 'cat', expected 'dog'"):
        TargetsStore.open(tmp_path, class_names=("ant", "bee", "dog"))
    with pytest.raises(TargetsError, match="3 classes, expected 2"):
        TargetsStore.open(tmp_path, class_names=("ant", "bee"))


@pytest.mark.parametrize("rows", [0, 1, 1500])
def test_float16_rows_become_what_numpy_makes_of_them(rows):
    """To the bit, small numbers included; blocks of rows make no difference."""
    q = np.random.RandomState(1).dirichlet(np.full(300, 0.02), rows).astype(np.float16)
    wide = q.astype(np.float32)
    np.testing.assert_array_equal(normalised(q), wide / wide.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(normalised(wide), wide / wide.sum(axis=1, keepdims=True))


def test_the_tar_is_one_that_others_read(tmp_path):
    """Oracle: Python's tarfile. Names by format, in order; the sidecar is the table less the images."""
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

    def image(at):
        buffer = io.BytesIO()
        Image.new("RGB", (4 + at, 4), (at, 9, 200)).save(buffer, kinds[at])
        return buffer.getvalue()

    table, _ = pool_table(3, len(kinds), image=image)
    write_pool_file(tmp_path, 3, table, "f", "webdataset")
    path = tmp_path / "pool-00003.tar"
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        files = {member.name: tar.extractfile(member).read() for member in members}
    suffixes = ("jpg", "png", "webp", "gif", "bmp", "tif", "ppm", "jp2")
    names = [sorted((name, "json", "npy")) for name in suffixes]
    assert list(files) == [f"00003-{at:06d}.{name}" for at, three in enumerate(names) for name in three]
    found = [files[f"00003-{at:06d}.{name}"] for at, name in enumerate(suffixes)]
    assert found == table.column("image").to_pylist()
    assert path.stat().st_size % 10240 == 0
    sidecar = pq.read_table(tmp_path / "pool-00003.parquet")
    assert sidecar.column("bytes").to_pylist() == [len(data) for data in found]
    assert sidecar.column("crc32").to_pylist() == [zlib.crc32(data) for data in found]
    assert [path.read_bytes()[at : at + 4] for at in sidecar.column("offset").to_pylist()] == [d[:4] for d in found]
    assert sidecar.drop(["bytes", "crc32", "offset"]).equals(table.drop(["image"]))
    assert sidecar.schema.metadata[b"mpl.tar.sha256"].decode() == hashlib.sha256(path.read_bytes()).hexdigest()
    again = tmp_path / "again"
    write_pool_file(again, 3, table, "f", "webdataset")
    for name in ("pool-00003.tar", "pool-00003.parquet"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_images_of_any_length_lie_where_they_are_looked_for(tmp_path, batch):
    """At the edges of a tar's blocks of 512 bytes, too."""
    lengths = (512, 0, 511, 513, 1024, 1, 1536)
    table, _ = pool_table(0, len(lengths), image=lambda at: bytes([65 + at]) * lengths[at])
    write_pool_file(tmp_path, 0, table, "f", "webdataset")
    found = [
        image
        for part in record_batches(tmp_path / "pool-00000.parquet", ["image"], batch, tar=True)
        for image in part.column(0).to_pylist()
    ]
    assert found == table.column("image").to_pylist()
    with tarfile.open(tmp_path / "pool-00000.tar", "r:") as tar:
        assert [member.size for member in tar.getmembers() if member.name.endswith(".img")] == list(lengths)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its file open
def test_plain_webdataset_makes_training_batches(tmp_path):
    """Image, distribution, and what else is known, in one sample: no loader of ours is needed."""
    import webdataset

    table, _ = pool_table(0, 6, image=lambda at: png(at))
    write_pool_file(tmp_path, 0, table, "f", "webdataset")
    samples = webdataset.WebDataset(str(tmp_path / "pool-00000.tar"), shardshuffle=False, empty_check=False)
    batches = list(samples.decode("torchrgb").to_tuple("png", "npy", "json").batched(4))
    assert [len(images) for images, _, _ in batches] == [4, 2]
    images, q, told = batches[0]
    assert tuple(images.shape[1:]) == (3, 4, 5)
    assert np.asarray(q).dtype == np.float16
    stored = np.stack([np.frombuffer(value, "<f2") for value in table.column("distribution").to_pylist()])
    np.testing.assert_array_equal(np.asarray(q), stored[:4])
    for name in ("key", "shard", "row", "classes", "repeat"):
        assert [one[name] for one in told] == table.column(name).to_pylist()[:4]


def png(at):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (at, 9, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_distributions_do_not_depend_on_how_much_is_read_at_a_time(tmp_path, format, monkeypatch):
    wanted, _ = write_store(tmp_path, "float32", rows=(5, 1, 4), format=format)
    monkeypatch.setattr("pipeline.targets.store.ROWS", 2)
    np.testing.assert_allclose(TargetsStore.open(tmp_path).distributions(), wanted, atol=1e-7)


def test_an_unknown_image_still_has_a_suffix():
    assert suffix(b"") == suffix(b"image 0 0") == "img"
    assert suffix(b"\0\0\0\x1cftypavif....") == "avif"


def test_the_tar_of_no_images(tmp_path):
    write_store(tmp_path, rows=(0, 2), format="webdataset")
    with tarfile.open(tmp_path / "pool-00000.tar", "r:") as tar:
        assert tar.getmembers() == []
    assert list(TargetsStore.open(tmp_path).images()) == [b"image 1 0", b"image 1 1"]


def of(name):
    """A store's file, however its images are stored."""
    return lambda folder: folder / (name if (folder / name).exists() else name.replace(".tar", ".parquet"))


def cut_a_file(folder):
    path = folder / "pool-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def remove_a_file(folder):
    (folder / "labelled-00000.parquet").unlink()


def flip_a_byte(folder):
    path = of("pool-00000.tar")(folder)
    data = bytearray(path.read_bytes())
    data[data.find(b"image 0 3")] ^= 1
    path.write_bytes(data)


def swap_files(folder):
    one, other = folder / "pool-00000.parquet", folder / "pool-00001.parquet"
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)


def state_sizes(folder):
    """Have the manifest state the sizes that the pool's Parquet files have, so that these do not give them away."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for file in manifest["pool"]["files"]:
        file["bytes"] = (folder / file["name"]).stat().st_size
    write_sealed(folder / MANIFEST, manifest)


def put_a_file_of_another_store(folder):
    write_targets(folder / "pool-00000.parquet", pool_table(0, 5)[0], "g")


def remove_the_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_the_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])


def another_version(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    write_sealed(folder / MANIFEST, manifest | {"version": 7})


def lacking_keys(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["pool"]
    write_sealed(folder / MANIFEST, manifest)


def other_rows(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["pool"]["files"][0]["rows"] = 6
    write_sealed(folder / MANIFEST, manifest)


EVERY = (
    (cut_a_file, "cut short"),
    (remove_a_file, "labelled-00000.parquet is missing"),
    (flip_a_byte, "checksum differs"),
    (remove_the_manifest, "no finished store"),
    (cut_the_manifest, "cannot be read"),
    (another_version, "version 7, expected mpl-targets version 3"),
    (lacking_keys, "lacks pool"),
    (other_rows, "5 rows, its manifest says 6"),
)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("damage", "message"), EVERY)
def test_a_damaged_store_is_refused(tmp_path, damage, message, format):
    write_store(tmp_path, format=format)
    damage(tmp_path)
    with pytest.raises(TargetsError, match=message) as caught:
        TargetsStore.open(tmp_path)
    assert "mpl precompute" in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_image_is_found_on_reading_without_the_whole_checksum(tmp_path, format):
    write_store(tmp_path, format=format)
    flip_a_byte(tmp_path)
    store = TargetsStore.open(tmp_path, verify=False)
    assert store.distributions().shape == (9, 3)
    with pytest.raises(TargetsError, match="damaged"):
        list(store.images())


@pytest.mark.parametrize("format", FORMATS)
def test_swapped_files_are_noticed_without_reading_them(tmp_path, format):
    """Of one number of rows; each whole, of this store, and in the wrong place."""
    write_store(tmp_path, rows=(4, 4), format=format)
    swap_files(tmp_path)
    state_sizes(tmp_path)
    assert not pool_file_is_done(tmp_path, 0, "f", format)
    with pytest.raises(TargetsError, match=r"written as pool-0000[01]: files were swapped or renamed"):
        TargetsStore.open(tmp_path, verify=False)


def test_swapped_tars_are_noticed(tmp_path):
    """By the checksum of the whole, and without it by that of each image."""
    write_store(tmp_path, rows=(4, 4), format="webdataset")
    one, other = (tmp_path / f"pool-0000{i}.tar" for i in (0, 1))
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    with pytest.raises(TargetsError, match=r"pool-0000[01]\.tar is not the file that was written"):
        TargetsStore.open(tmp_path)
    with pytest.raises(TargetsError, match=r"image 0 of 4 .* was changed"):
        list(TargetsStore.open(tmp_path, verify=False).images())


def test_a_sidecar_of_another_tar_is_noticed(tmp_path):
    """The shard was made again with other images; its sidecar is of the former."""
    write_store(tmp_path, format="webdataset")
    new = tmp_path / "new"
    write_pool_file(new, 0, pool_table(0, 5, image=lambda at: b"other %d %d" % (0, at))[0], "f", "webdataset")
    (new / "pool-00000.parquet").rename(tmp_path / "pool-00000.parquet")
    state_sizes(tmp_path)
    with pytest.raises(TargetsError, match=r"belongs to another tar than pool-00000\.tar"):
        TargetsStore.open(tmp_path, verify=False)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_cut_or_missing_tar_is_noticed(folder, damage):
    write_store(folder, format="webdataset")
    assert pool_file_is_done(folder, 1, "f", "webdataset")
    path = folder / "pool-00001.tar"
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-512])
    assert not pool_file_is_done(folder, 1, "f", "webdataset")
    with pytest.raises(TargetsError, match=r"pool-00001\.tar (has 19,968 bytes|is missing)"):
        TargetsStore.open(folder, verify=False)


def test_a_file_of_another_store_is_noticed(tmp_path):
    write_store(tmp_path)
    size = (tmp_path / "pool-00000.parquet").stat().st_size
    put_a_file_of_another_store(tmp_path)
    assert (tmp_path / "pool-00000.parquet").stat().st_size == size
    with pytest.raises(TargetsError, match="belongs to another store"):
        TargetsStore.open(tmp_path, verify=False)


@pytest.mark.parametrize("format", FORMATS)
def test_whole_files_of_this_store_are_done(folder, format):
    other = {"parquet": "webdataset", "webdataset": "parquet"}[format]
    write_store(folder, format=format)
    assert pool_file_is_done(folder, 0, "f", format)
    assert not pool_file_is_done(folder, 0, "g", format)
    assert not pool_file_is_done(folder, 0, "f", other)
    assert file_is_done(folder / "labelled-00000.parquet", "f")
    assert not file_is_done(folder / "labelled-00000.parquet", "g")
    cut_a_file(folder)
    assert not pool_file_is_done(folder, 1, "f", format)
    assert not pool_file_is_done(folder, 2, "f", format)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_this_stores_is_removed(folder, format):
    write_store(folder, rows=(5, 4, 3, 2), format=format)
    write_pool_file(folder, 2, pool_table(2, 3)[0], "g", format)
    cut_a_file(folder)
    kept = {"pool-00000", "pool-00003", "labelled-00000"}
    remove_unfinished(folder, "f", format)
    assert {path.stem for path in folder.iterdir()} == kept | {"_manifest"}
    remove_unfinished(folder, "f", {"parquet": "webdataset", "webdataset": "parquet"}[format])
    assert {path.stem for path in folder.iterdir()} == {"labelled-00000", "_manifest"}


def test_a_store_of_the_former_version_is_read(tmp_path):
    """Version 1: Parquet alone, no uses, no names of files within them."""
    write_store(tmp_path)
    for path in tmp_path.glob("*.parquet"):
        table = pq.read_table(path)
        header = {"mpl.format": "mpl-targets", "mpl.version": "1", "mpl.fingerprint": "f"}
        pq.write_table(table.replace_schema_metadata(header), path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for file in manifest["pool"]["files"] + manifest["labelled"]["files"]:
        data = (tmp_path / file["name"]).read_bytes()
        file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        file.pop("uses", None)
    write_sealed(tmp_path / MANIFEST, manifest | {"version": 1})
    store = TargetsStore.open(tmp_path)
    assert store.uses().tolist() == [15, 10]
    assert store.keys()[4:6] == ["key-0-4", "key-1-0"]


def test_bytes_per_row(tmp_path):
    """Ten classes in float16 cost their 20 bytes and little else, beyond the image."""
    count, classes = 20_000, 10
    q = np.random.RandomState(0).dirichlet(np.full(classes, 0.1), count).astype("float16")
    column = fixed_binary(q)
    pq.write_table(pa.table({"distribution": column}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 21 * count
