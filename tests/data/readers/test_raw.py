"""Raw pixels: CIFAR-10's binary files and TinyImages, against arrays that NumPy lays out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.decode import FORMATS, Status, decode
from pipeline.data.manifest import load_manifest
from pipeline.data.readers import raw
from pipeline.data.readers.raw import RawReader, raw_shards
from pipeline.data.sources import open_split
from pipeline.errors import DataError


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """uint8 (N, 32, 32, 3), rows and columns as seen."""
    return np.random.RandomState(seed).randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def write_cifar(path: Path, images: np.ndarray, labels: list[int]) -> Path:
    """As its homepage says: a label, then red, green and blue, each row by row."""
    with path.open("wb") as file:
        for image, label in zip(images, labels, strict=True):
            file.write(bytes([label]))
            for channel in range(3):
                for row in range(32):
                    file.write(bytes(image[row, :, channel].tolist()))
    return path


def write_tiny(path: Path, images: np.ndarray) -> Path:
    """As MATLAB's fwrite lays out 32×32×3: the first index (rows) runs fastest."""
    with path.open("wb") as file:
        for image in images:
            file.write(image.flatten(order="F").tobytes())
    return path


def pixels(data: bytes) -> np.ndarray:
    image, status, _ = decode(data, 32)
    assert status is Status.ok
    assert image is not None
    return image


def test_cifar_pixels_and_labels(tmp_path: Path) -> None:
    images, labels = pictures(7), [3, 0, 9, 1, 1, 8, 2]
    (shard,) = raw_shards(
        "data_batch_1", write_cifar(tmp_path / "data_batch_1.bin", images, labels), "cifar-binary", True
    )
    samples = list(shard.read())
    np.testing.assert_array_equal(np.stack([pixels(sample.data) for sample in samples]), images)
    assert [sample.label for sample in samples] == labels == shard.labels().tolist()
    assert [sample.key for sample in samples][:2] == ["data_batch_1-00000000", "data_batch_1-00000001"]
    (unlabelled,) = raw_shards("x", tmp_path / "data_batch_1.bin", "cifar-binary", False)
    assert {sample.label for sample in unlabelled.read()} == {-1}


def test_tiny_images_are_column_major(tmp_path: Path) -> None:
    images = pictures(5)
    (shard,) = raw_shards("tiny_images", write_tiny(tmp_path / "tiny_images.bin", images), "tinyimages-bin", False)
    samples = list(shard.read())
    np.testing.assert_array_equal(np.stack([pixels(sample.data) for sample in samples]), images)
    assert {sample.label for sample in samples} == {-1}
    assert "PPM" in FORMATS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    count=st.integers(0, 23),
    each=st.integers(1, 9),
    chunk=st.integers(1, 5),
    start=st.integers(0, 10),
    stop=st.integers(0, 10) | st.none(),
    reader=st.sampled_from(["cifar-binary", "tinyimages-bin"]),
)
def test_shards_cut_the_list_of_records(
    tmp_path: Path, count: int, each: int, chunk: int, start: int, stop: int | None, reader: RawReader
) -> None:
    """Oracle: slices of the list of images; every image in one shard, its key its place in the file."""
    images = pictures(count)
    path = tmp_path / "file.bin"
    if reader == "cifar-binary":
        write_cifar(path, images, [i % 10 for i in range(count)])
    else:
        write_tiny(path, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "RECORDS_PER_SHARD", each)
        patch.setattr(raw, "CHUNK", chunk)
        shards = raw_shards("file", path, reader, True)
        places = [list(range(count))[first : first + each] for first in range(0, max(count, 1), each)]
        assert [shard.rows() for shard in shards] == [len(place) for place in places]
        assert len({shard.name for shard in shards}) == len(shards)
        for shard, place in zip(shards, places, strict=True):
            wanted = place[start:stop]
            samples = list(shard.read(start, stop))
            assert [sample.key for sample in samples] == [f"file-{i:08d}" for i in wanted]
            assert [sample.row for sample in samples] == list(range(len(place)))[start:stop]
            for sample, i in zip(samples, wanted, strict=True):
                np.testing.assert_array_equal(pixels(sample.data), images[i])


def test_reading_seeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """79 million images: what lies before is not read. The file is a hole of 20 GB with one image near its end."""
    path = tmp_path / "tiny_images.bin"
    image = pictures(1)
    with path.open("wb") as file:
        file.seek(6_999_999 * 3072)
        file.write(image[0].flatten(order="F").tobytes())
    shards = raw_shards("tiny_images", path, "tinyimages-bin", False)
    assert len(shards) == 350
    assert shards[-1].name == "tiny_images-00349"
    (sample,) = shards[-1].read(19_999)
    assert sample.key == "tiny_images-06999999"
    np.testing.assert_array_equal(pixels(sample.data), image[0])


def test_troubles_are_named(tmp_path: Path) -> None:
    path = write_cifar(tmp_path / "test_batch.bin", pictures(4), [0, 1, 2, 3])
    shard = raw_shards("test_batch", path, "cifar-binary", True)[0]
    before = shard.fingerprint()
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"has 12,287 bytes, which is no multiple of 3,073"):
        raw_shards("test_batch", path, "cifar-binary", True)
    with pytest.raises(DataError, match=r"test_batch\.bin ends in record 3: it has become shorter"):
        list(shard.read())
    path.write_bytes(content[:-5] + b"12345")
    assert shard.fingerprint() != before
    path.unlink()
    for act in (lambda: list(shard.read()), shard.fingerprint, lambda: raw_shards("x", path, "cifar-binary", True)):
        with pytest.raises(DataError, match="there is no such file"):
            act()


def test_the_manifest_on_files_of_the_right_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, splits and labels of cifar10-binary, at a thousandth of the size."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for batch in range(1, 6):
        write_cifar(folder / f"data_batch_{batch}.bin", pictures(10, batch), [batch] * 10)
    write_cifar(folder / "test_batch.bin", pictures(10, 9), [7] * 10)
    whole = load_manifest("cifar10-binary")
    files = {
        "train": whole.files["train"].model_copy(update={"rows": 50}),
        "test": whole.files["test"].model_copy(update={"rows": 10}),
    }
    splits = {
        "labelled": whole.splits["labelled"].model_copy(update={"drop_last": 4}),
        "validation": whole.splits["validation"].model_copy(update={"last": 4}),
        "test": whole.splits["test"],
    }
    manifest = whole.model_copy(update={"files": files, "splits": splits})
    assert (
        open_split(manifest, "labelled", tmp_path).labels().tolist()
        == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10 + [5] * 6
    )
    validation = list(open_split(manifest, "validation", tmp_path).read())
    assert [(shard, sample.row, sample.label) for shard, sample in validation] == [
        ("data_batch_5", row, 5) for row in range(6, 10)
    ]
    assert open_split(manifest, "test", tmp_path).class_names[7] == "horse"
    tiny = whole.files["pool"]
    assert tiny.rows is not None
    assert tiny.bytes == tiny.rows * 3072
    assert "withdrawn by its authors" in tiny.obtain
