"""Manifests: what is found, what is refused, and the words it is refused with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.manifest import Manifest, SplitSpec, list_manifests, load_manifest
from pipeline.errors import DataError


def test_embedded_manifests_are_complete() -> None:
    manifests = {manifest.name: manifest for manifest in list_manifests()}
    assert set(manifests) == {
        *("digits", "digits-draws", "cifar10", "cifar10-binary", "svhn", "svhn-parquet"),
        *("imagenet", "imagenet-folder", "imagenet-webdataset", "imagenet-jft"),
        *("cifar10-4k", "cifar10-web", "svhn-1k", "imagenet-10pct"),
    }
    for manifest in manifests.values():
        assert set(manifest.splits) == {"labelled", "validation", "unlabelled", "test"}
        assert manifest.title
        assert manifest.license
        assert manifest.homepage


@pytest.mark.parametrize(
    ("name", "k", "row"),
    [
        ("cifar10", 50_000, (97.18, 98.22, 98.56)),
        ("cifar10-binary", 50_000, (97.18, 98.22, 98.56)),
        ("svhn", 35_000, (98.17, 98.71, 98.78)),
        ("imagenet", 12_800, (84.49, 85.81, 86.87)),
        ("imagenet-folder", 12_800, (84.49, 85.81, 86.87)),
        ("imagenet-webdataset", 12_800, (84.49, 85.81, 86.87)),
    ],
)
def test_papers_numbers(name: str, k: int, row: tuple[float, ...]) -> None:
    """Source: arXiv:2003.10580v1, table 2 and section 4.2."""
    paper = load_manifest(name).paper
    assert paper is not None
    assert paper["k"] == k
    assert (paper["supervised"], paper["noisy_student"], paper["reduced_mpl"]) == row


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        *(("cifar10", 4_000), ("cifar10-binary", 4_000), ("svhn", 7_300), ("svhn-parquet", 7_300)),
        *((name, 50_045) for name in ("imagenet", "imagenet-folder", "imagenet-webdataset", "imagenet-jft")),
    ],
)
def test_validation_rows_are_not_labelled_rows(name: str, held_out: int) -> None:
    manifest = load_manifest(name)
    total = manifest.files["train"].rows
    assert total is not None
    labelled, validation = manifest.splits["labelled"].rows(total), manifest.splits["validation"].rows(total)
    assert len(validation) == held_out
    assert labelled.stop == validation.start
    assert validation.stop == total
    assert labelled.start == 0


@pytest.mark.parametrize(
    ("name", "labelled", "pool", "held_out"),
    [
        ("cifar10-4k", 4_000, 41_000, 5_000),
        ("svhn-1k", 1_000, 596_088, 7_300),
        ("imagenet-10pct", 128_000, 1_231_122, 50_045),
    ],
)
def test_few_labels_and_the_training_images_as_the_pool(name: str, labelled: int, pool: int, held_out: int) -> None:
    """No row for training is held out; the pool is of other images than the labelled, but on ImageNet."""
    manifest = load_manifest(name)
    rows = {}
    for split in ("labelled", "unlabelled", "validation"):
        spec = manifest.splits[split]
        total = manifest.files[spec.source].rows
        assert total is not None
        before = 531_131 if spec.source == "extra-and-train" else 0  # images of extra, which come first
        rows[split] = {row - before for row in spec.rows(total)}
    assert [len(rows[split]) for split in ("labelled", "unlabelled", "validation")] == [labelled, pool, held_out]
    assert not rows["validation"] & (rows["labelled"] | rows["unlabelled"])
    assert bool(rows["labelled"] & rows["unlabelled"]) == (name == "imagenet-10pct")


def test_data_folders_own_manifest_comes_first(data_set: Callable[..., Path]) -> None:
    path = data_set(name="digits")
    assert load_manifest("digits", path.parent).folder == path.parent
    assert load_manifest("digits").folder is None
    assert load_manifest(path).class_names == ("cat", "dog")


def test_a_named_file_in_the_data_folder(data_set: Callable[..., Path]) -> None:
    path = data_set()
    path.rename(path.with_name("mine.yaml"))
    assert load_manifest("mine", path.parent).name == "mine"


def test_unknown_name_is_answered_with_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"no data set 'cifar'; did you mean cifar10\?.*digits.*svhn"):
        load_manifest("cifar")
    with pytest.raises(DataError, match="there is no such manifest"):
        load_manifest("nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clases": 2}, r"clases is not a key; did you mean classes\?"),
        ({"classes": "two"}, "classes: Input should be a valid integer"),
        ({"classes": 1}, "classes: Input should be greater than or equal to 2"),
        ({"class_names": ["cat"]}, "classes is 2, class_names has 1"),
        ({"class_names": ["cat", "cat"]}, "a name twice"),
        (
            {"splits": {"labelled": {"from": "trian"}}},
            r"splits.labelled.from is 'trian'.*did you mean train\?",
        ),
        ({"splits": {"labeled": {"from": "train"}}}, r"splits.labeled.*did you mean labelled\?"),
        (
            {"splits": {"labelled": {"from": "train", "frist": 3}}},
            r"frist is not a key; did you mean first\?",
        ),
        ({"splits": {"labelled": {"from": "train", "first": 3, "last": 3}}}, "give either `first` or `last`"),
        ({"splits": {"labelled": {"from": "train", "first": -3}}}, "greater than or equal to 0"),
        ({"splits": {"labelled": {"from": "train", "without": "labelled"}}}, "it is for the unlabelled split"),
        ({"splits": {"unlabelled": {"from": "train", "without": "labelled"}}}, "files that `labelled` is from"),
        ({"splits": {"labelled": {"from": "train", "also": [{"from": "tain"}]}}}, r"'tain'.*did you mean train\?"),
        ({"splits": {"labelled": {"from": "train", "also": [{"from": "train"}]}}}, "one run of rows of each"),
        (
            {"files": {"train": {"path": "a", "glob": "b", "reader": "parquet"}}},
            "give either `path` or `glob`",
        ),
        ({"files": {"train": {"reader": "parquet"}}}, "give either `path` or `glob`"),
        ({"files": {"train": {"path": "../a", "reader": "parquet"}}}, "leaves the data folder"),
        ({"files": {"train": {"path": "/a", "reader": "parquet"}}}, "leaves the data folder"),
        (
            {"files": {"train": {"path": "a", "reader": "parqet"}}},
            "files.train.reader: Input should be 'digits'",
        ),
        ({"folder": "x"}, "folder is not a key"),
        *(
            (change, "must be a plain name, without slashes")
            for change in (
                {"name": "../x"},
                {"name": ".."},
                {"name": "a\x1b[2J"},
                {"archives": {"../../escape": {"url": "https://x/a.tar"}}},
                {"archives": {"/etc/escape": {"url": "https://x/a.tar"}}},
                {"archives": {"a\\b": {"url": "https://x/a.tar"}}},
                {"files": {"../train": {"path": "a", "reader": "parquet"}}},
            )
        ),
        (
            {"files": {"train": {"path": "a", "reader": "parquet", "url": "ftp://x/a"}}},
            "files.train.url: String should match",
        ),
        (
            {"files": {"train": {"glob": "a*", "reader": "parquet", "url": "https://x/a"}}},
            "`url` is of one file: give its `path`",
        ),
        (
            {"files": {"train": {"path": "a", "reader": "parquet", "archive": "al"}}},
            "files.train.archive is 'al', which `archives` lacks",
        ),
        (
            {"files": {"train": {"path": "a", "reader": "parquet", "md5": "12"}}},
            "files.train.md5: String should match",
        ),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_remedy(
    data_set: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    path = data_set(**changes)
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "name: [", "3"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"bad\.yaml"):
        load_manifest(path)


@given(st.integers(0, 20), st.integers(0, 25), st.integers(0, 25), st.integers(0, 25) | st.none(), st.booleans())
def test_split_rows_equal_list_slicing(
    total: int, drop_first: int, drop_last: int, count: int | None, at_end: bool
) -> None:
    """Oracle: slices of a list, in the order in which the keys are documented."""
    rows = list(range(total))[drop_first:]
    rows = rows[: max(0, len(rows) - drop_last)]
    if count is not None:
        rows = rows[max(0, len(rows) - count) :] if at_end else rows[:count]
    limit = {} if count is None else {"last" if at_end else "first": count}
    spec = SplitSpec.model_validate({"from": "x", "drop_first": drop_first, "drop_last": drop_last, **limit})
    assert list(spec.rows(total)) == rows


def test_manifests_are_frozen() -> None:
    manifest: Manifest = load_manifest("digits")
    with pytest.raises(ValueError, match="frozen"):
        manifest.classes = 3  # type: ignore[misc]
