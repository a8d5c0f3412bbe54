"""What people have: folders of splits, archives, tables, Hugging Face's; each image with its label, or told."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.get.found import Source
from pipeline.data.get.importing import Imported, ImportSettings, append_images, import_images, look_at
from pipeline.data.get.layout import layout_of
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.errors import DataError
from tests.data.made_images import encode, noise

Files = dict[str, int]  # path → seed of its image
WHOLE = ImportSettings(validation=0, test=0)
CLASSES: Files = {"cat/0.png": 0, "cat/kittens/1.png": 1, "dog/0.png": 2, "dog/3.png": 3, "unlabelled/web/4.png": 4}


def image(seed: int) -> bytes:
    return encode(noise(6, seed))


def folder(root: Path, files: Files) -> Path:
    for name, seed in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(seed))
    return root


def tar(path: Path, files: Files, mode: str = "w", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, seed in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(image(seed))
            archive.addfile(info, io.BytesIO(image(seed)))
    return path


def zipped(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, seed in files.items():
            archive.writestr(f"photos/{name}", image(seed))
        archive.writestr("__MACOSX/photos/._0.png", b"-")
    return path


def table(path: Path, rows: Sequence[Sequence[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def read(imported: Imported, out: Path) -> dict[str, dict[int, str | None]]:
    """Split → seed of each image → its class, by way of the manifest."""
    seeds = {image(seed): seed for seed in range(40)}
    manifest = load_manifest(out / "manifest.yaml")
    found: dict[str, dict[int, str | None]] = {}
    for split in manifest.splits:
        samples = [sample for _, sample in open_split(manifest, split).read()]
        found[split] = {seeds[s.data]: None if s.label < 0 else manifest.class_names[s.label] for s in samples}
        assert len(found[split]) == len(samples) == imported.counts[split]
    return found


def of(source: Path, tmp_path: Path, settings: ImportSettings = WHOLE, **more: Any) -> tuple[Imported, dict[str, Any]]:
    imported = import_images([Source(source, **more)], tmp_path / "out", settings=settings)
    return imported, read(imported, tmp_path / "out")


ALL = {"labelled": {0: "cat", 1: "cat", 2: "dog", 3: "dog"}, "unlabelled": {4: None}}
PACKED: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: folder(path / "photos", CLASSES | {"cover.png": 5}),
    "folder in a folder": lambda path: folder(path / "a/photos", CLASSES | {"cover.png": 5}).parent,
    "tar": lambda path: tar(path / "a.tar", CLASSES | {"cover.png": 5}),
    "tar of a folder": lambda path: tar(path / "a.tar", CLASSES | {"cover.png": 5}, prefix="photos/"),
    "tar of .": lambda path: tar(path / "a.tar.gz", CLASSES | {"cover.png": 5}, "w:gz", prefix="./photos/"),
    "zip": lambda path: zipped(path / "a.zip", CLASSES | {"cover.png": 5}),
    "tars of classes": lambda path: tar((path / "a").mkdir() or path / "a/1.tar", CLASSES | {"cover.png": 5}).parent,
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_same_images_however_they_are_packed(kind: str, tmp_path: Path) -> None:
    imported, found = of(PACKED[kind](tmp_path), tmp_path)
    assert found == ALL
    told = [(entry.key.rpartition("/")[2], entry.reason) for entry in imported.left_out]
    assert sorted(told) == sorted([("cover.png", "no_class")] + [("._0.png", "hidden")] * (kind == "zip"))


SPLIT: Files = {
    "train/cat/0.png": 0, "train/dog/1.png": 1, "train/dog/2.png": 2, "val/cat/3.png": 3, "val/dog/4.png": 4
}  # fmt: skip


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "validation", "Testing")])
def test_folders_of_splits_stay_as_they_are(words: tuple[str, str, str], tmp_path: Path) -> None:
    files = SPLIT | {"test/cat/5.png": 5, "test/dog/6.png": 6, "unlabelled/7.png": 7, "extra/8.png": 8}
    names = dict(files)
    for old, new in zip(("train", "val", "test"), words, strict=True):
        names = {new + n.removeprefix(old) if n.startswith(f"{old}/") else n: s for n, s in names.items()}
    imported, found = of(folder(tmp_path / "photos", names), tmp_path, ImportSettings())
    assert found == {
        "labelled": {0: "cat", 1: "dog", 2: "dog"},
        "validation": {3: "cat", 4: "dog"},
        "test": {5: "cat", 6: "dog"},
        "unlabelled": {7: None},
    }
    assert [(entry.key, entry.reason) for entry in imported.left_out] == [("extra/8.png", "no_class")]


def test_what_a_split_lacks_is_cut_when_asked_for(tmp_path: Path) -> None:
    files = {f"train/{name}/{i}.png": 10 * n + i for n, name in enumerate(("cat", "dog")) for i in range(10)}
    source = folder(tmp_path / "photos", files | {"val/cat/30.png": 30, "val/dog/31.png": 31})
    assert look_at([Source(source)]).counts == {"labelled": 20, "validation": 2}
    assert look_at([Source(source)], ImportSettings(test=0.3)).counts == {"labelled": 14, "validation": 2, "test": 6}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/0.png", "test/1.png"], "test and train look like splits, but hold no folder for each class"),
        (["train/cat/0.png", "bus/1.png"], "'train' looks like a split.*beside it are folders that do not"),
        ([f"{top}/{name}/0.png" for top in ("images", "masks") for name in ("cat", "dog")], "--class-level 1 .*or 2"),
        ([f"x/{top}/images/{name}/0.png" for top in ("web", "dslr") for name in ("cat", "dog")], "level 2 .*or 4"),
    ],
)
def test_what_may_be_a_split_or_a_class_is_refused(paths: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        layout_of(paths, "photos")


def test_splits_below_the_classes(tmp_path: Path) -> None:
    files = {
        "cat/train/0.png": 0,
        "dog/train/1.png": 1,
        "cat/test/2.png": 2,
        "dog/test/3.png": 3,
        "unlabelled/4.png": 4,
    }
    _, found = of(folder(tmp_path / "photos", files), tmp_path, ImportSettings())
    assert found == {"labelled": {0: "cat", 1: "dog"}, "test": {2: "cat", 3: "dog"}, "unlabelled": {4: None}}


def test_the_classes_may_be_at_any_level(tmp_path: Path) -> None:
    files = {f"{a}/{b}/{n}.png": n for n, (a, b) in enumerate([("x", "cat"), ("x", "dog"), ("y", "cat"), ("y", "dog")])}
    source = folder(tmp_path / "photos", files)
    _, found = of(source, tmp_path, class_level=2)
    assert found["labelled"] == {0: "cat", 1: "dog", 2: "cat", 3: "dog"}
    assert look_at([Source(source, class_level=1)], WHOLE).per_class["labelled"] == {"x": 2, "y": 2}
    deep = folder(tmp_path / "deep", {f"a/b/{name}": seed for name, seed in CLASSES.items()})
    assert look_at([Source(deep)], WHOLE).per_class["labelled"] == {"cat": 2, "dog": 2}


def test_a_class_without_an_image_for_training_is_told(tmp_path: Path) -> None:
    """`val/images` of Tiny ImageNet is no class."""
    files = {"train/cat/0.png": 0, "train/dog/1.png": 1, "val/images/2.png": 2, "val/images/3.png": 3}
    imported, found = of(folder(tmp_path / "a", files), tmp_path)
    assert found == {"labelled": {0: "cat", 1: "dog"}}
    assert [(entry.key, entry.reason) for entry in imported.left_out] == [
        ("val/images/2.png", "not_trained"), ("val/images/3.png", "not_trained")
    ]  # fmt: skip


def test_a_pool_may_lie_as_it_likes(tmp_path: Path) -> None:
    pool = folder(tmp_path / "pool", {f"{a}/{b}/{n}.png": 10 + n for n, (a, b) in enumerate(["xx", "xy", "yx", "yy"])})
    sources = [Source(folder(tmp_path / "a", {"cat/0.png": 0, "dog/1.png": 1})), Source(pool, "unlabelled")]
    assert look_at(sources, WHOLE).counts == {"labelled": 2, "unlabelled": 4}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    _, found = of(folder(tmp_path / "photos", {"train/0.png": 0, "bus/1.png": 1}), tmp_path)
    assert found == {"labelled": {0: "train", 1: "bus"}}


def test_other_folders_for_validation_and_test(tmp_path: Path) -> None:
    """By the names of their classes, whatever their order or number."""
    source = folder(tmp_path / "a", {"ape/0.png": 0, "cat/1.png": 1, "dog/2.png": 2})
    other = folder(tmp_path / "b", {"dog/3.png": 3, "cat/4.png": 4})
    sources = [Source(source), Source(other, "test")]
    imported = import_images(sources, tmp_path / "out", settings=ImportSettings())
    assert read(imported, tmp_path / "out") == {
        "labelled": {0: "ape", 1: "cat", 2: "dog"}, "test": {3: "dog", 4: "cat"}
    }  # fmt: skip


def test_numeric_names_are_in_order_of_value_in_all_splits(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", {f"{n}/x.png": n for n in range(12)})
    imported, found = of(source, tmp_path)
    assert imported.manifest.class_names == tuple(str(n) for n in range(12))
    assert found["labelled"] == {n: str(n) for n in range(12)}
    with pytest.raises(DataError, match=r"two classes have one name, '0?1' and '0?1'"):
        look_at([Source(folder(source, {"01/y.png": 30}))], WHOLE)


ROWS = [("a/0.png", "cat"), ("a/1.png", "dog"), ("2.png", ""), ("3.png", "dog")]
TABLES: dict[str, Callable[[Path], Path]] = {
    "csv": lambda root: table(root / "t.csv", [("file_name", "label"), *ROWS]),
    "csv, other names": lambda root: table(
        root / "t.csv", [("id", "Category", "Image"), *((9, c, f) for f, c in ROWS)]
    ),
    "csv, no header": lambda root: table(root / "t.csv", ROWS),
    "semicolons": lambda root: table(root / "t.csv", [("path", "class"), *ROWS], ";"),
    "tsv": lambda root: table(root / "t.tsv", [("filename", "target"), *ROWS], "\t"),
    "jsonl": lambda root: write_text(
        root / "t.jsonl", "".join(json.dumps({"file": f, "label": c or None}) + "\n" for f, c in ROWS)
    ),
    "parquet": lambda root: write_parquet(
        root / "t.parquet", {"file": [f for f, _ in ROWS], "y": [c for _, c in ROWS]}
    ),
    "no suffix": lambda root: table(root / "t.csv", [("id", "breed"), *((f.removesuffix(".png"), c) for f, c in ROWS)]),
    "a spreadsheet's": lambda root: write_text(
        root / "t.csv", "Filename\tClass\n" + "".join(f.replace("/", "\\") + f"\t{c}\n" for f, c in ROWS), "utf-16"
    ),
    "metadata.csv": lambda root: table(root / "metadata.csv", [("file_name", "label"), *ROWS]).parent,
}


def write_text(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_file_and_label(kind: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", {"a/0.png": 0, "a/1.png": 1, "2.png": 2, "3.png": 3, "4.png": 4})
    columns = {"parquet": {"label": "y"}, "no suffix": {"file": "id", "label": "breed"}}.get(kind, {})
    imported, found = of(TABLES[kind](root), tmp_path, columns=columns)
    assert found == {"labelled": {0: "cat", 1: "dog", 3: "dog"}, "unlabelled": {2: None}}
    expected = "no_class" if kind == "metadata.csv" else "not_in_table"
    assert [(entry.key, entry.reason) for entry in imported.left_out] == [("4.png", expected)]


def test_a_table_of_splits_and_its_troubles(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", {f"{i}.png": i for i in range(6)})
    header = ("file", "label", "split")
    rows = [("0.png", "7", "train"), ("1.png", "10", "train"), ("2.png", "7", "test"), ("3.png", "10", "val"),
            ("9.png", "7", "train"), ("1.png", "10", "train"), ("4.png", "7", "train"), ("4.png", "10", "train"),
            ("5.png", "", "unlabelled")]  # fmt: skip
    imported, found = of(table(tmp_path / "t.csv", [header, *rows]), tmp_path, ImportSettings(), images=root)
    assert imported.manifest.class_names == ("7", "10")
    assert found == {
        "labelled": {0: "7", 1: "10"}, "test": {2: "7"}, "validation": {3: "10"}, "unlabelled": {5: None}
    }  # fmt: skip
    assert sorted((entry.key, entry.reason) for entry in imported.left_out) == [
        ("1.png", "repeat_of"), ("4.png", "two_classes"), ("4.png", "two_classes"), ("9.png", "no_file")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b"), ("0.png", "x")], "no column names files; it has a, b. Say which: --column file=NAME"),
        ([("file", "label", "class"), ("0.png", 0, "x")], "the label may be column label or class"),
        ([("file", "label"), ("0.png", "x", "y")], "row 2 has 3 cells, the header 2"),
        ([("file", "kind"), ("0.png", "x")], "no column is the label"),
        ([("file", "label"), ("8.png", "x")], "none of its 1 files is in .*--images DIR"),
        ([("file", "label", "split"), ("0.png", "x", "fold3")], "'fold3', which is no split"),
    ],
)
def test_tables_that_are_not_clear(rows: list[tuple[object, ...]], message: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", {"0.png": 0})
    with pytest.raises(DataError, match=message):
        look_at([Source(table(root / "t.csv", rows))], WHOLE)


def hugging_face(path: Path, seeds: Sequence[int], labels: Sequence[int], names: Sequence[str] | None) -> Path:
    """As `datasets` writes: an Arrow stream, or Parquet, with the features in the schema."""
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    images = pa.array([{"bytes": image(seed), "path": None} for seed in seeds],
                      pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = pa.table({"image": images, "label": pa.array(labels, pa.int64())}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(rows, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(rows)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001-ab12.parquet"),
        ("imagefolder-train.arrow", "imagefolder-test.arrow"),
    ],
)
def test_a_hugging_face_data_set(names: tuple[str, str], tmp_path: Path) -> None:
    """Saved, downloaded, or in the cache; each file's labels by its own names; -1 is no label."""
    root = tmp_path / "hf"
    hugging_face(root / names[0], [0, 1, 2], [0, 1, -1], ["cat", "dog"])
    hugging_face(root / names[1], [3, 4], [0, 1], ["dog", "cat"])
    hugging_face(root / "cache-0123456789abcdef.arrow", [5], [0], ["cat", "dog"])
    (root / "dataset_info.json").write_text("{}")
    imported, found = of(root, tmp_path, ImportSettings())
    assert found == {"labelled": {0: "cat", 1: "dog"}, "test": {3: "dog", 4: "cat"}, "unlabelled": {2: None}}
    assert {entry.key for entry in imported.left_out} == {"cache-0123456789abcdef.arrow", "dataset_info.json"}


def test_a_choice_of_rows_is_not_read_whole(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf/data-00000-of-00001.arrow", [0, 1], [0, 1], ["cat", "dog"])
    (tmp_path / "hf/state.json").write_text(json.dumps({"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        look_at([Source(tmp_path / "hf")], WHOLE)


def test_the_pool_grows_and_the_files_that_are_there_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_images([Source(folder(tmp_path / "a", CLASSES))], out, settings=WHOLE)
    before = (out / "pool-00000.parquet").stat().st_mtime_ns
    more = folder(tmp_path / "more", {"x/10.png": 10, "11.png": 11})
    (more / "notes.txt").write_text("no image")
    sources = [Source(more, "unlabelled"), Source(tar(tmp_path / "b.tar", {"12": 12}), "unlabelled")]
    added, left_out = append_images(sources, out)
    assert (added, [entry.key for entry in left_out]) == (3, ["notes.txt"])
    assert (out / "pool-00000.parquet").stat().st_mtime_ns == before
    pool = open_split(load_manifest(out / "manifest.yaml"), "unlabelled")
    assert [sample.data for _, sample in pool.read()] == [image(seed) for seed in (4, 11, 10, 12)]
    assert (out / "left_out.csv").read_text().splitlines()[1].startswith("notes.txt,no_image")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_data_set_without_a_pool_gets_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_images([Source(folder(tmp_path / "a", {"cat/0.png": 0, "dog/1.png": 1}))], out, settings=WHOLE)
    append_images([Source(folder(tmp_path / "b", {"2.png": 2}), "unlabelled")], out)
    assert open_split(load_manifest(out / "manifest.yaml"), "unlabelled").count() == 1


def test_a_labelled_image_in_two_splits_stays_in_the_test(tmp_path: Path) -> None:
    imported, found = of(
        folder(tmp_path / "a", SPLIT | {"train/cat/7.png": 7, "test/cat/9.png": 0, "test/dog/8.png": 8}), tmp_path
    )
    assert found["test"] == {0: "cat", 8: "dog"}
    assert 0 not in found["labelled"]
    assert [tuple(entry) for entry in imported.left_out] == [("train/cat/0.png", "repeat_of", "test/cat/9.png")]
