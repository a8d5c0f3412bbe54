"""A pool that is damaged, changes, or does not fit: a clear message, nothing lost, the same command goes on."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.data.made_images import encode, write_parquet
from tests.stages.commands import start

RECIPE = """
name: trouble
data: {manifest: dirty, image_size: 16}
pretrain: {model: {name: wrn_10_1}, steps: 2, batch: 8, optimizer: {rule: sgd, lr: 0.01}}
filter: {k: 15, batch: 8}
train_reduced: {model: {name: wrn_10_1}, steps: 2}
finetune: {steps: 2}
"""


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def images(count: int, seed: int) -> list[bytes]:
    coarse = np.random.RandomState(seed).randint(0, 256, (count, 12, 12, 3)).astype(np.uint8)
    return [encode(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)) for pixels in coarse]


def members(count: int, seed: int) -> list[tuple[str, bytes]]:
    return [(f"{at:04d}.png", data) for at, data in enumerate(images(count, seed))]


@pytest.fixture(scope="module")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two classes with three tars as the pool, and a run with a teacher."""
    root = tmp_path_factory.mktemp("trouble")
    data = root / "data"
    for seed, (name, count) in enumerate((("labelled", 12), ("test", 6))):
        write_parquet(data / f"{name}.parquet", images(count, seed), [at % 2 for at in range(count)])
    for shard in range(3):
        tar(data / f"pool-{shard}.tar", members(12, 10 + shard))
    manifest = {
        "name": "dirty", "classes": 2, "class_names": ["cat", "dog"], "image": {"size": 16},
        "files": {"labelled": {"path": "labelled.parquet", "reader": "parquet"},
                  "test": {"path": "test.parquet", "reader": "parquet"},
                  "pool": {"glob": "pool-*.tar", "reader": "webdataset"}},
        "splits": {"labelled": {"from": "labelled", "drop_last": 4}, "validation": {"from": "labelled", "last": 4},
                   "test": {"from": "test"}, "unlabelled": {"from": "pool"}},
    }  # fmt: skip
    (data / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    (root / "recipe.yaml").write_text(RECIPE)
    process = start("pretrain", "--run", root / "run", "--recipe", root / "recipe.yaml", "--data", data)
    assert process.wait() == 0, process.err
    return root


@pytest.fixture
def place(_prepared: Path, tmp_path: Path, mpl: Callable[..., object]) -> Path:
    """A copy of both, to be changed; `data` and `run` in it."""
    root = tmp_path / "place"
    shutil.copytree(_prepared, root)
    return root


@pytest.fixture
def filtered(place: Path, mpl) -> Callable[..., object]:
    """`mpl filter` (or another command) there."""

    def call(*more: object, command: str = "filter"):
        return mpl(command, "--run", place / "run", "--data", place / "data", *more)

    return call


def parts(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (place / "run/scores").glob("part-*")}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tar_cut_in_the_middle_is_named_and_the_others_are_scored(place, filtered, mpl, workers) -> None:
    path = place / "data/pool-1.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    outcome = filtered("--workers", workers)
    assert outcome.status == 1
    assert "1 of 3 could not be done; the others are, and stay" in outcome.err
    assert "pool-1.tar cannot be read to its end" in outcome.err
    assert "Traceback" not in outcome.err
    before = parts(place)
    assert set(before) == {"part-pool-0.parquet", "part-pool-2.parquet"}
    assert "2 shards scored" in mpl("status", "--run", place / "run").out
    path.write_bytes(whole)
    outcome = filtered("--workers", workers)
    assert outcome.status == 0
    assert "2 of 3 shards are scored already" in outcome.err
    assert "of 36 images kept" in outcome.err
    assert before.items() <= parts(place).items()


def test_a_shard_that_changed_is_scored_again_and_only_that(place, filtered) -> None:
    assert filtered().status == 0
    before = parts(place)
    tar(place / "data/pool-2.tar", members(20, 99))
    outcome = filtered()
    assert outcome.status == 0
    assert "2 of 3 shards are scored already" in outcome.err
    assert "of 44 images kept" in outcome.err
    after = parts(place)
    assert [name for name in after if after[name] != before[name]] == ["part-pool-2.parquet"]
    tar(place / "data/pool-3.tar", members(5, 100))  # the pool grows
    assert "of 49 images kept" in filtered().err


def test_a_shard_that_is_gone_is_asked_for(place, filtered) -> None:
    assert filtered().status == 0
    selection = (place / "run/selection.parquet").read_bytes()
    (place / "data/pool-1.tar").rename(place / "elsewhere.tar")
    outcome = filtered()
    assert outcome.status == 1
    assert "1 shards that were scored are no longer in the pool (pool-1)" in outcome.err
    assert (place / "run/selection.parquet").read_bytes() == selection
    (place / "run/scores/part-pool-1.parquet").unlink()
    assert "of 24 images kept" in filtered().err


def test_shards_that_overlap_and_keys_that_come_twice(place, filtered) -> None:
    """The same file under two names: its images count once. One key twice in a tar: two images."""
    shutil.copy(place / "data/pool-0.tar", place / "data/pool-9.tar")
    pair = images(2, 77)
    tar(place / "data/pool-5.tar", [("same.png", pair[0]), ("same.png", pair[1])])
    outcome = filtered("--k", 100)
    assert outcome.status == 0
    assert "38 of 50 images kept; rejected: 12 repeat_of" in outcome.err
    assert "37 images have a key that an earlier image has" in outcome.err  # 12 in each later tar, and one `same`
    table = pq.read_table(place / "run/selection.parquet").to_pylist()
    assert {(row["shard"], row["row"]) for row in table if row["key"] == "same"} == {("pool-5", 0), ("pool-5", 1)}
    rejected = pq.read_table(place / "run/rejected/part-pool-9.parquet").to_pylist()
    assert [row["match"] for row in rejected] == [f"pool-0/{row['row']}" for row in rejected]


def test_a_shard_that_changed_is_not_stored_under_its_old_selection(place, filtered) -> None:
    """Whoever the teacher is."""
    assert filtered().status == 0
    tar(place / "data/pool-2.tar", members(12, 99))
    for more in ([], ["--teacher", place / "run/teacher"]):
        outcome = filtered(*more, command="precompute")
        assert outcome.status == 1
        assert "its shard pool-2 has changed since" in outcome.err


def test_check_uses_the_precision_of_the_scores(place, filtered) -> None:
    assert filtered("--precision", "bf16").status == 0
    assert filtered(command="precompute").status == 0
    outcome = filtered("--check", 20, command="precompute")
    assert outcome.status == 0, outcome.err


def test_ray_decides_on_the_device(place, filtered) -> None:
    outcome = filtered("--engine", "ray", "--device", "cuda")
    assert outcome.status == 2
    assert "the device is cpu; leave --device out" in outcome.err
    assert filtered("--cpus-per-worker", 2).status == 2


def test_an_evaluation_set_that_is_absent_is_refused_unless_told(place, filtered) -> None:
    (place / "data/test.parquet").unlink()
    outcome = filtered()
    assert outcome.status == 1
    assert "test.parquet" in outcome.err
    assert "--set filter.copies.enabled=false" in outcome.err
    assert not (place / "run/scores").exists()
    assert filtered("--set", "filter.copies.enabled=false").status == 0


def test_a_data_set_without_evaluation_splits(place, filtered) -> None:
    path = place / "data/manifest.yaml"
    manifest = yaml.safe_load(path.read_text())
    for name in ("validation", "test"):
        del manifest["splits"][name]
    path.write_text(yaml.safe_dump(manifest))
    outcome = filtered()
    assert outcome.status == 0, outcome.err
    assert "copies of evaluation images: not looked for (there are no evaluation images)" in outcome.err


def test_copies_are_told_and_may_be_kept(place, filtered) -> None:
    """Four of 36 images are test images; the threshold and what it rests on are said; kept ones are counted."""
    beside = [("._x.png", b"-"), ("README", b"-")]
    copied = [(f"t{at}.png", data) for at, data in enumerate(images(4, 1))]
    tar(place / "data/pool-0.tar", [*members(8, 10), *copied, *beside])
    outcome = filtered()
    assert outcome.status == 0, outcome.err
    assert "copies of evaluation images: 4, from similarity 0.95 on" in outcome.err
    assert "38 files found: 36 in the pool; not in it: 1 hidden, 1 no_image (such as ._x.png: its name" in outcome.err
    assert "of the 18 labelled and evaluation images are as like another one. These are few images" in outcome.err
    assert "WARNING: 11.1% of the pool are taken for copies" in outcome.err
    rejected = pq.read_table(place / "run/rejected").to_pylist()
    assert sorted(row["match"] for row in rejected if row["reason"] == "eval_copy") == [
        f"test/test/{i}" for i in range(4)
    ]
    before = (place / "run/copies.json").stat().st_mtime_ns
    kept = filtered("--keep-copies")
    assert "copies of evaluation images: 4, kept, from" in kept.err
    assert "WARNING" not in kept.err
    assert (place / "run/copies.json").stat().st_mtime_ns == before  # made once
    assert not any(row["reason"] == "eval_copy" for row in pq.read_table(place / "run/rejected").to_pylist())
    assert (
        "copies of evaluation images: 4, from similarity 0.80"
        in filtered("--remove-copies", "--set", "filter.copies.threshold=0.8").err
    )


def test_a_teacher_of_other_classes(place, filtered) -> None:
    path = place / "data/manifest.yaml"
    path.write_text(path.read_text().replace("- dog", "- dog\n- owl").replace("classes: 2", "classes: 3"))
    outcome = filtered()
    assert outcome.status == 1
    assert "has other classes than the data set: 2 against 3; it lacks owl" in outcome.err


@pytest.mark.parametrize(("command", "limit"), [("filter", 2_000), ("precompute", 8_000)])
def test_a_full_disk(place, filtered, command, limit) -> None:
    if command == "precompute":
        assert filtered().status == 0
    process = start(command, "--run", place / "run", "--data", place / "data", file_bytes=limit)
    assert process.wait() == 1
    assert "cannot write" in process.err
    assert f"Resume with: mpl {command}" in process.err
    assert "Traceback" not in process.err
    assert not list((place / "run").rglob("*.tmp"))
    assert filtered(command=command).status == 0


def test_a_store_that_cannot_be_written(place, filtered) -> None:
    outcome = filtered("--store", place / "recipe.yaml" / "below-a-file")
    assert outcome.status == 1
    assert "recipe.yaml" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_parquet_shard_without_rows_or_with_another_schema(place, filtered) -> None:
    path = place / "data/manifest.yaml"
    path.write_text(path.read_text().replace("pool-*.tar", "pool-*.parquet").replace("webdataset", "parquet"))
    write_parquet(place / "data/pool-0.parquet", images(5, 3))
    write_parquet(place / "data/pool-1.parquet", [])
    assert "5 of 5 images kept" in filtered().err
    pq.write_table(pq.read_table(place / "data/pool-0.parquet").rename_columns(["picture"]),
                   place / "data/pool-2.parquet")  # fmt: skip
    outcome = filtered()
    assert outcome.status == 1
    assert "pool-2.parquet has no column 'image'; it has picture" in outcome.err
