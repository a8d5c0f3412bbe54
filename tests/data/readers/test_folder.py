"""Image folders."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.manifest import load_manifest
from pipeline.data.readers import folder
from pipeline.data.sources import open_split
from pipeline.errors import DataError
from tests.data.made_images import encode, noise, write_parquet

FILES = ["cat/1.png", "cat/deeper/2.PNG", "dog/3.jpg", "dog/4.jpeg", "dog/5.webp"]


def fill(root: Path, files: list[str]) -> Path:
    for seed, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(4, seed)))
    return root


def manifest(data_set: Callable[..., Path], **changes: object) -> Path:
    files = {"photos": {"path": "photos", "reader": "folder"}}
    splits = {"labelled": {"from": "photos"}, "unlabelled": {"from": "photos"}}
    return data_set(files=files, splits=splits, **changes)


def test_sub_folders_are_classes_and_paths_are_keys(data_set: Callable[..., Path]) -> None:
    path = manifest(data_set, class_names=[])
    root = fill(path.parent / "photos", FILES)
    fill(root, [".hidden/6.png", "dog/.7.png"])
    (root / "dog" / "notes.txt").write_text("no image")
    split = open_split(load_manifest(path), "labelled")
    read = list(split.read())
    assert split.class_names == ("cat", "dog")
    assert [sample.key for _, sample in read] == FILES
    assert [sample.label for _, sample in read] == [0, 0, 1, 1, 1] == split.labels().tolist()
    assert all(sample.data == (root / sample.key).read_bytes() for _, sample in read)
    pool = open_split(load_manifest(path), "unlabelled")
    assert pool.labels().tolist() == [-1] * 5
    assert pool.shards[0].name == "photos-00000"


def test_labels_follow_the_manifests_names(data_set: Callable[..., Path]) -> None:
    path = manifest(data_set, class_names=["dog", "cat"])
    fill(path.parent / "photos", FILES)
    assert open_split(load_manifest(path), "labelled").labels().tolist() == [1, 1, 0, 0, 0]
    fill(path.parent / "photos", ["emu/1.png"])
    with pytest.raises(DataError, match="sub-folder 'emu' is no class of the manifest; its classes are dog, cat"):
        open_split(load_manifest(path), "labelled")


def test_a_class_absent_from_a_test_folder_shifts_no_label(data_set: Callable[..., Path]) -> None:
    """The labelled split's classes hold for all splits, not each folder's own."""
    path = data_set(
        classes=3,
        class_names=[],
        files={name: {"path": name, "reader": "folder"} for name in ("train", "held_out")},
        splits={"labelled": {"from": "train"}, "test": {"from": "held_out"}},
    )
    fill(path.parent / "train", ["ape/1.png", "cat/1.png", "dog/1.png"])
    fill(path.parent / "held_out", ["cat/1.png", "dog/1.png"])
    assert open_split(load_manifest(path), "test").labels().tolist() == [1, 2]


def test_many_files_make_several_shards(data_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FILES_PER_SHARD", 2)
    path = manifest(data_set)
    fill(path.parent / "photos", FILES)
    split = open_split(load_manifest(path), "labelled")
    assert [(shard, sample.row) for shard, sample in split.read()] == [
        ("photos-00000", 0), ("photos-00000", 1), ("photos-00001", 0), ("photos-00001", 1),
        ("photos-00002", 0),
    ]  # fmt: skip


def test_fingerprint_follows_the_files(data_set: Callable[..., Path]) -> None:
    path = manifest(data_set)
    root = fill(path.parent / "photos", FILES)
    before = open_split(load_manifest(path), "unlabelled").fingerprint()
    assert open_split(load_manifest(path), "unlabelled").fingerprint() == before
    (root / FILES[0]).write_bytes(encode(noise(5)))
    assert open_split(load_manifest(path), "unlabelled").fingerprint() != before


def test_troubles_are_named(data_set: Callable[..., Path]) -> None:
    path = manifest(data_set)
    root = path.parent / "photos"
    root.mkdir()
    with pytest.raises(DataError, match="labelled split of mine is empty"):
        open_split(load_manifest(path), "labelled")
    fill(root, ["1.png"])
    with pytest.raises(DataError, match="row 0 has no label"):
        open_split(load_manifest(path), "labelled").labels()
    split = open_split(load_manifest(path), "unlabelled")
    (root / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png cannot be read: No such file"):
        list(split.read())
    root.rename(path.parent / "elsewhere")
    root.write_text("a file")
    with pytest.raises(DataError, match="photos is not a folder"):
        open_split(load_manifest(path), "unlabelled")


def test_a_shuffled_folder_holds_out_all_classes(data_set: Callable[..., Path]) -> None:
    """In the order of paths the last rows would be of one class. The order is fixed, and splits do not meet."""
    path = data_set(
        files={"photos": {"path": "photos", "reader": "folder", "shuffle": 0}},
        splits={"labelled": {"from": "photos", "drop_last": 20}, "validation": {"from": "photos", "last": 20}},
    )
    names = [f"{kind}/{i:02d}.png" for kind in ("cat", "dog") for i in range(30)]
    fill(path.parent / "photos", names)
    held_out = [sample.key for _, sample in open_split(load_manifest(path), "validation").read()]
    rest = [sample.key for _, sample in open_split(load_manifest(path), "labelled").read()]
    assert sorted(held_out + rest) == names
    assert 5 <= sum(name.startswith("cat") for name in held_out) <= 15
    assert held_out == [sample.key for _, sample in open_split(load_manifest(path), "validation").read()]


def test_every_file_is_an_image_or_told(data_set: Callable[..., Path]) -> None:
    """By its name, else by its first bytes; links are followed, though not in circles."""
    path = manifest(data_set)
    root = fill(path.parent / "photos", ["a.PNG", "no-suffix", "photo.jpg.1", "deep/b.JPeG", "c.HEIC"])
    (root / "c.HEIC").write_bytes(b"not a picture")  # an image's name: a sample, which will not decode
    fill(path.parent / "elsewhere", ["d.png", "more/e.png"])
    (root / "linked").symlink_to(path.parent / "elsewhere")
    (path.parent / "elsewhere/more/round").symlink_to(root)
    (root / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    (root / "notes.txt").write_text("no image")
    (root / "unknown").write_text("no image")
    fill(root, [".hidden.png"])
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes(encode(noise(4, 9)))
    split = open_split(load_manifest(path), "unlabelled")
    assert [sample.key for _, sample in split.read()] == [
        "a.PNG", "c.HEIC", "caf\\xe9.png", "deep/b.JPeG", "linked/d.png", "linked/more/e.png", "no-suffix",
        "photo.jpg.1",
    ]  # fmt: skip
    assert sorted((entry.key, entry.reason) for _, entry in split.left_out()) == [
        (".hidden.png", "hidden"), ("gone.png", "no_file"), ("linked/more/round", "linked_above"),
        ("notes.txt", "no_image"), ("pipe.png", "no_file"), ("unknown", "no_image"),
    ]  # fmt: skip
    assert split.fingerprint() == open_split(load_manifest(path), "unlabelled").fingerprint()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_cannot_be_listed_is_an_error(data_set: Callable[..., Path]) -> None:
    path = manifest(data_set)
    root = fill(path.parent / "photos", FILES)
    (root / "dog").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be listed"):
            open_split(load_manifest(path), "unlabelled")
    finally:
        (root / "dog").chmod(0o755)


def test_numeric_classes_are_in_order_of_value(data_set: Callable[..., Path]) -> None:
    """Case 04: integer labels of another file mean these classes."""
    path = data_set(
        classes=12,
        class_names=[],
        files={"tr": {"path": "train", "reader": "folder"}, "te": {"path": "te.parquet", "reader": "parquet"}},
        splits={"labelled": {"from": "tr"}, "test": {"from": "te"}},
    )
    fill(path.parent / "train", [f"{n}/x.png" for n in range(12)])
    write_parquet(path.parent / "te.parquet", [encode(noise(4))] * 12, list(range(12)))
    split = open_split(load_manifest(path), "labelled")
    assert [split.class_names[sample.label] for _, sample in split.read()] == [
        sample.key.split("/")[0] for _, sample in split.read()
    ]
    assert open_split(load_manifest(path), "test").labels().tolist() == list(range(12))
    fill(path.parent / "train", ["07/x.png"])
    with pytest.raises(DataError, match=r"two classes have one name, '0?7' and '0?7'"):
        open_split(load_manifest(path), "labelled")
