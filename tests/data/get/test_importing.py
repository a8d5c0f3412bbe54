"""A person's own images become a data set: nothing lost, nothing twice, nothing half done."""

import csv
import errno
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.data.get import importing
from pipeline.data.get import writing as layout
from pipeline.data.get.found import Source
from pipeline.data.get.importing import Imported, ImportSettings
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.errors import DataError, RunError, UsageError
from tests.data.made_images import encode, noise

SPLITS = ("labelled", "validation", "test")
KINDS = {"ant": 20, "bee": 11, "cat": 40}


def photos(root: Path, kinds: dict[str, int] = KINDS, pool: int = 7) -> Path:
    """A folder of classes; every image is unlike every other."""
    seed = 0
    for kind, count in {**kinds, "unlabelled/web": pool}.items():
        for number in range(count):
            path = root / kind / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(noise(10 + number % 3, seed)))
            seed += 1
    return root


def contents(out: Path) -> dict[str, list[tuple[str, bytes, int]]]:
    """Split → (key, bytes, label) of the data set in `out`, by way of its manifest."""
    manifest = load_manifest(out / "manifest.yaml")
    return {
        split: [(one.key, one.data, one.label) for _, one in open_split(manifest, split).read()]
        for split in manifest.splits
    }


def import_images(source: Path, out: Path, *, unlabelled: Path | None = None, **more: Any) -> Imported:
    """A source, and a pool."""
    pool = [Source(unlabelled, "unlabelled")] if unlabelled else []
    return importing.import_images([Source(source), *pool], out, **more)


def counts(imported: Imported) -> dict[str, int]:
    return {str(split): count for split, count in imported.counts.items()}


def test_every_image_is_in_one_split_with_its_class(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    imported = import_images(source, tmp_path / "out")
    assert imported.manifest.class_names == ("ant", "bee", "cat")
    assert imported.left_out == []
    assert imported.manifest.name == "out"
    assert imported.manifest.image.size == 11
    found = contents(tmp_path / "out")
    everything = [entry for split in found.values() for entry in split]
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.png")}
    assert len(everything) == len(files) == 78
    assert {key: data for key, data, _ in everything} == files
    for split in SPLITS:
        assert all(imported.manifest.class_names[label] == key.split("/")[0] for key, _, label in found[split])
    assert all(key.startswith("unlabelled/") and label == -1 for key, _, label in found["unlabelled"])
    assert counts(imported) == {split: len(rows) for split, rows in found.items()}


def test_splits_are_stratified(tmp_path: Path) -> None:
    """Each class gives its rounded part to test and validation."""
    imported = import_images(
        photos(tmp_path / "photos"), tmp_path / "out", settings=ImportSettings(validation=0.1, test=0.25)
    )
    assert imported.per_class == {
        "labelled": {"ant": 13, "bee": 7, "cat": 26},
        "validation": {"ant": 2, "bee": 1, "cat": 4},
        "test": {"ant": 5, "bee": 3, "cat": 10},
    }
    for split, rows in contents(tmp_path / "out").items():
        if split in SPLITS:
            kinds = Counter(key.split("/")[0] for key, _, _ in rows)
            assert kinds == imported.per_class[split]  # type: ignore[index]


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_images(source, tmp_path / name, name="same", settings=ImportSettings(seed=seed))
    found = {name: contents(tmp_path / name) for name in "abc"}
    assert found["a"] == found["b"]
    assert {key for key, _, _ in found["a"]["test"]} != {key for key, _, _ in found["c"]["test"]}
    order = [key for key, _, _ in found["a"]["labelled"]]
    assert order != sorted(order)  # shuffled, so that the first rows are a random draw


def pack(source: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(source, source.name)
    return path


def test_a_tar_of_folders_gives_what_the_folder_gives(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", pool=0)
    unlabelled = photos(tmp_path / "web", {"x": 9}, pool=0)
    plain = import_images(source, tmp_path / "a", unlabelled=unlabelled)
    tars = pack(source, tmp_path / "photos.tar"), pack(unlabelled, tmp_path / "web.tar")
    packed = import_images(tars[0], tmp_path / "b", unlabelled=tars[1])
    assert plain.per_class == packed.per_class
    assert plain.counts == packed.counts
    for split, rows in contents(tmp_path / "b").items():
        assert {data for _, data, _ in rows} <= {path.read_bytes() for path in tmp_path.rglob("*.png")}
        assert len(rows) == plain.counts[split]  # type: ignore[index]


def test_a_webdataset_has_its_labels_in_cls(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(60):
            for suffix, data in ((".png", encode(noise(5, i))), (".cls", b"%d" % (i % 12))):
                info = tarfile.TarInfo(f"{i:03d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    imported = import_images(path, tmp_path / "out")
    assert imported.manifest.class_names == tuple(str(i) for i in range(12))  # by value: 2 before 10
    for split in SPLITS:
        assert all(int(key.split(".")[0]) % 12 == label for key, _, label in contents(tmp_path / "out")[split])


def test_files_of_one_stem_are_several_images(tmp_path: Path) -> None:
    """`IMG.1.png` and `IMG.2.png` are one sample to webdataset; in a tar of folders they are two images."""
    source = tmp_path / "photos"
    for i, name in enumerate(("a/IMG.1.png", "a/IMG.2.png", "b/IMG.1.png", "b/IMG.2.png", "b/IMG.3.png")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(encode(noise(5, i)))
    settings = ImportSettings(validation=0, test=0)
    imported = import_images(pack(source, tmp_path / "photos.tar"), tmp_path / "out", settings=settings)
    assert imported.per_class == {"labelled": {"a": 2, "b": 3}}
    assert set(imported.manifest.splits) == {"labelled"}


def test_what_is_left_out_is_told_with_its_reason(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    (source / "ant" / "900.png").write_bytes(b"junk")
    (source / "ant" / "901.jpg").write_bytes(b"")
    (source / "ant" / "902.png").write_bytes((source / "ant" / "000.png").read_bytes())
    (source / "cat" / "903.png").write_bytes((source / "ant" / "001.png").read_bytes())
    (source / "904.png").write_bytes(encode(noise(6, 999)))
    (source / "unlabelled" / "905.png").write_bytes(b"junk")
    (source / "unlabelled" / "906.png").write_bytes((source / "ant" / "000.png").read_bytes())
    imported = import_images(source, tmp_path / "out")
    reasons = {left.key: (left.reason, left.detail) for left in imported.left_out}
    assert {key: reason for key, (reason, _) in reasons.items()} == {
        "ant/900.png": "decode_error",
        "ant/901.jpg": "empty",
        "ant/902.png": "repeat_of",
        "ant/001.png": "two_classes",
        "cat/903.png": "two_classes",
        "904.png": "no_class",
        "unlabelled/905.png": "decode_error",
    }
    assert reasons["ant/902.png"][1] == "ant/000.png"
    assert reasons["cat/903.png"][1] == "cat; the same image is ant/001.png (ant)"
    assert reasons["ant/001.png"][1] == "ant; the same image is cat/903.png (cat)"  # which is right is not known
    with (tmp_path / "out" / "left_out.csv").open() as file:
        assert [tuple(row) for row in csv.reader(file)][1:] == [tuple(left) for left in imported.left_out]
    assert sum(imported.counts.values()) + len(imported.left_out) == 78 + 7
    assert imported.counts["unlabelled"] == 8  # a pool's repeats are the filter's to judge


def test_the_pool_is_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ROWS_PER_FILE", 5)
    monkeypatch.setattr(layout, "GROUP_ROWS", 2)
    import_images(photos(tmp_path / "photos", pool=12), tmp_path / "out")
    pool = open_split(load_manifest("out", tmp_path / "out"), "unlabelled")
    assert [(shard.name, shard.rows()) for shard in pool.shards] == [
        ("pool-00000", 5), ("pool-00001", 5), ("pool-00002", 2)
    ]  # fmt: skip
    assert pq.ParquetFile(tmp_path / "out" / "pool-00000.parquet").num_row_groups == 3


def test_the_class_names_are_in_the_files_too(tmp_path: Path) -> None:
    import_images(photos(tmp_path / "photos"), tmp_path / "out")
    assert (
        b'"names": ["ant", "bee", "cat"]' in pq.read_schema(tmp_path / "out" / "test.parquet").metadata[b"huggingface"]
    )


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        ({}, {}, "at least two classes are needed and none was found"),
        ({"ant": 3}, {}, "only 'ant' was found"),
        (
            {"ant": 2, "bee": 2},
            {"validation": 0},
            "the test split would be empty: no class has three images",
        ),
        ({"ant": 2, "bee": 1}, {}, "the validation split would be empty.*go without: --validation 0"),
    ],
)
def test_too_little(tmp_path: Path, kinds: dict[str, int], settings: dict[str, float], message: str) -> None:
    source = photos(tmp_path / "photos", kinds)
    with pytest.raises(DataError, match=message):
        import_images(source, tmp_path / "out", settings=ImportSettings(**settings))  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize("parts", [(-0.1, 0.2), (0.5, 0.5), (0, 1.0)])
def test_impossible_parts(parts: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="each at least 0, together less than 1"):
        ImportSettings(*parts)


def test_every_class_keeps_a_labelled_image(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", {"ant": 1, "bee": 2, "cat": 3, "dog": 9})
    imported = import_images(source, tmp_path / "out", settings=ImportSettings(validation=0.3, test=0.69))
    assert imported.per_class == {
        "labelled": {"ant": 1, "bee": 2, "cat": 1, "dog": 1},
        "validation": {"ant": 0, "bee": 0, "cat": 1, "dog": 2},
        "test": {"ant": 0, "bee": 0, "cat": 1, "dog": 6},
    }


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(DataError, match="is there and not empty; give a new folder"):
        import_images(source, source)
    assert sorted(path.name for path in source.iterdir()) == before
    (tmp_path / "out").mkdir()
    import_images(source, tmp_path / "out")  # an empty one is taken


def test_a_missing_or_cut_source_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        import_images(tmp_path / "nowhere", tmp_path / "out")
    path = pack(photos(tmp_path / "photos"), tmp_path / "photos.tar")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match="was cut short"):
        import_images(path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "photos.tar"]


@pytest.mark.parametrize("interruption", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    source = photos(tmp_path / "photos")

    def fail(*args: object) -> None:
        raise interruption

    monkeypatch.setattr(layout, "_table", fail)
    with pytest.raises((DataError, RunError, KeyboardInterrupt)) as caught:
        import_images(source, tmp_path / "out")
    assert isinstance(interruption, KeyboardInterrupt) or "No space left on device" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "..", "x\x1b[2J"])
def test_a_data_set_has_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"plain name.*--name NAME"):
        importing.import_images([], tmp_path / "out", name=name)
    assert not list(tmp_path.iterdir())
