"""SVHN's .mat files, written by SciPy and compared with its reader."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.decode import decode
from pipeline.data.manifest import load_manifest
from pipeline.data.readers import svhn
from pipeline.data.readers.shard import Sample
from pipeline.data.readers.svhn import svhn_shards
from pipeline.data.sources import open_split
from pipeline.errors import DataError


def save(path: Path, count: int, *, compressed: bool = True, **changes: object) -> Path:
    random = np.random.RandomState(count)
    variables: dict[str, object] = {
        "X": random.randint(0, 256, (32, 32, 3, count)).astype(np.uint8),
        "y": (np.arange(count)[:, None] % 10 + 1).astype(np.uint8),
    }
    variables.update(changes)
    scipy.io.savemat(path, {k: v for k, v in variables.items() if v is not None}, do_compression=compressed)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("label_type", [np.uint8, np.float64, np.int32])
def test_images_and_labels_equal_scipys(tmp_path: Path, compressed: bool, label_type: type) -> None:
    """Oracle: scipy.io.loadmat. Label 10 is the digit 0."""
    labels = (np.arange(37)[:, None] % 10 + 1).astype(label_type)
    path = save(tmp_path / "train_32x32.mat", 37, compressed=compressed, y=labels)
    theirs = scipy.io.loadmat(path)
    (shard,) = svhn_shards("train_32x32", path, True)
    samples = list(shard.read())
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(decode(sample.data, 32)[0], theirs["X"][:, :, :, i])
    expected = [0 if label == 10 else int(label) for label in theirs["y"][:, 0]]
    assert [sample.label for sample in samples] == expected == shard.labels().tolist()
    assert 0 in expected
    assert 10 not in expected
    assert samples[3].key == "train_32x32-00000003"
    (pool,) = svhn_shards("extra", path, False)
    assert {sample.label for sample in pool.read()} == {-1} == set(pool.labels().tolist())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(each=st.integers(1, 12), chunk=st.integers(1, 5), start=st.integers(0, 10), stop=st.integers(0, 10) | st.none())
def test_shards_cut_the_list_of_images(tmp_path: Path, each: int, chunk: int, start: int, stop: int | None) -> None:
    path = tmp_path / "extra_32x32.mat"
    if not path.exists():
        save(path, 23)
    pixels = scipy.io.loadmat(path)["X"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svhn, "ROWS_PER_SHARD", each)
        patch.setattr(svhn, "CHUNK", chunk)
        shards = svhn_shards("extra_32x32", path, True)
        for number, shard in enumerate(shards):
            places = list(range(23))[number * each : (number + 1) * each]
            samples = list(shard.read(start, stop))
            assert [sample.key for sample in samples] == [f"extra_32x32-{i:08d}" for i in places[start:stop]]
            assert [sample.label for sample in samples] == [(i % 10 + 1) % 10 for i in places[start:stop]]
            for sample, i in zip(samples, places[start:stop], strict=True):
                np.testing.assert_array_equal(decode(sample.data, 32)[0], pixels[:, :, :, i])
        assert sum(shard.rows() for shard in shards) == 23
        assert len({shard.fingerprint() for shard in shards}) == len(shards)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """37 MB of pixels, of which a thousandth is looked at."""
    path = save(tmp_path / "extra.mat", 12_000, X=np.zeros((32, 32, 3, 12_000), np.uint8))
    tracemalloc.start()
    (shard,) = svhn_shards("extra", path, True)
    count = sum(1 for _ in shard.read(11_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_000
    assert peak < 16 << 20


def test_one_image(tmp_path: Path) -> None:
    """MATLAB drops a last dimension of one."""
    path = save(tmp_path / "one.mat", 1, X=np.zeros((32, 32, 3), np.uint8))
    assert svhn_shards("one", path, True)[0].rows() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": None}, r"cannot be read: there is no array of numbers 'y' in it"),
        ({"X": None}, "there is no array of numbers 'X'"),
        ({"X": np.zeros((32, 32, 3, 5))}, r"X is \(32, 32, 3, 5\) of float64; SVHN's is \(32, 32, 3, N\) of uint8"),
        ({"X": np.zeros((28, 28, 5), np.uint8)}, r"X is \(28, 28, 5, 1\)"),
        ({"y": np.zeros((4, 1), np.uint8)}, "X has 5 images and y 4 labels"),
        ({"X": np.array([["a", 3]], dtype=object)}, "there is no array of numbers 'X'"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = save(tmp_path / "train.mat", 5, **changes)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        svhn_shards("train", path, True)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_file_cut_anywhere_is_an_error_after_the_rows_before(tmp_path: Path, compressed: bool) -> None:
    path = save(tmp_path / "train.mat", 9, compressed=compressed)
    whole = list(svhn_shards("train", path, False)[0].read())
    (shard,) = svhn_shards("train", path, True)
    content = path.read_bytes()
    for cut in (*range(0, len(content), 997), len(content) - (1 if compressed else 9)):
        path.write_bytes(content[:cut])
        samples: list[Sample] = []
        with pytest.raises(DataError, match=r"train\.mat cannot be read"):
            samples.extend(shard.read())  # keeps what came before the error
        assert [sample.data for sample in samples] == [sample.data for sample in whole[: len(samples)]]
    path.write_bytes(content)
    assert len(list(shard.read())) == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "format 5.*another format"),
        (b"not a mat at all" * 100, "another format"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", "HDF5: save it with '-v7'"),
        (b"x" * 124 + b"\x00\x01IM" + b"\x0f\0\0\0\x40\0\0\0" + b"\xff" * 64, "cut short, or is another format"),
        (b"x" * 124 + b"\x00\x01IM" + b"\x0e\0\0\0\x40\0\0\0" + b"\x06\0\0\0\xff\xff\xff\x7f" * 8, "is not possible"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.mat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        svhn_shards("train", path, True)
    with pytest.raises(DataError, match="there is no such file"):
        svhn_shards("train", tmp_path / "gone.mat", True)


def test_the_manifest(tmp_path: Path) -> None:
    """Facts: torchvision and TensorFlow Datasets state the same checksums."""
    whole = load_manifest("svhn")
    (tmp_path / "svhn").mkdir()
    for name, count in (("train", 9), ("extra", 12), ("test", 5)):
        save(tmp_path / "svhn" / f"{name}_32x32.mat", count)
    rows = {"train": 9, "extra": 12, "test": 5}
    files = {n: f.model_copy(update={"rows": rows[n], "bytes": None}) for n, f in whole.files.items()}
    splits = {
        "labelled": whole.splits["labelled"].model_copy(update={"drop_last": 3}),
        "unlabelled": whole.splits["unlabelled"],
    }
    manifest = whole.model_copy(update={"files": files, "splits": splits})
    assert open_split(manifest, "labelled", tmp_path).labels().tolist() == [1, 2, 3, 4, 5, 6]
    assert open_split(manifest, "unlabelled", tmp_path).labels().tolist() == [-1] * 12
    assert sum(file.bytes or 0 for file in whole.files.values()) == 182_040_794 + 1_329_278_602 + 64_275_384
