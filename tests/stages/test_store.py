"""Pools and outputs in object storage: the same files as on disk, and what happens when storage breaks."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.storage.files import location
from tests.data.made_images import encode, noise, write_parquet
from tests.object_storage import Storage, object_storage


@pytest.fixture(scope="module")
def _server() -> Iterator[Storage]:
    with object_storage() as storage:
        yield storage


@pytest.fixture
def storage(_server: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    _server.break_next(0)
    return _server


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A run with a teacher and nothing after it."""
    run = tmp_path / "begun"
    for name in ("teacher", "pretrain"):
        shutil.copytree(finished / name, run / name)
    shutil.copy(finished / "run.json", run)
    return run


def outputs(root: Path) -> dict[str, bytes]:
    """What the pool stages leave, by name."""
    found = {}
    for name in ("copies.json", "selection.parquet", "scores", "rejected", "targets"):
        for path in [root / name, *sorted((root / name).rglob("*"))]:
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def stored(storage: Storage, prefix: str) -> dict[str, bytes]:
    """The same, from the bucket."""
    root = storage.place(prefix)
    root.fs.invalidate_cache()
    found = {str(name).split(f"{prefix}/", 1)[1]: root.fs.cat_file(name) for name in root.fs.find(root.path)}
    return {name: data for name, data in found.items() if name != "store.json"}  # whose it is


def test_the_store_in_object_storage_holds_the_same_bytes(mpl, finished, begun, storage) -> None:
    for command in ("filter", "precompute", "train-reduced"):
        more = ["--store", storage.url("one")] if command == "filter" else []  # then the run knows it
        outcome = mpl(command, "--run", begun, *more)
        assert outcome.status == 0, outcome.err
    assert stored(storage, "one") == outputs(finished)
    assert not (begun / "scores").exists()
    for command in ("filter", "precompute", "train-reduced"):
        assert "already done" in mpl(command, "--run", begun).err
    assert mpl("precompute", "--run", begun, "--check", 20).status == 0
    fewer = mpl("filter", "--run", begun, "--k", 5)  # from the same scores
    assert "made again" in fewer.err
    assert "scored" not in fewer.err
    assert "made from another selection" in mpl("train-reduced", "--run", begun, "--force").err
    assert mpl("precompute", "--run", begun, "--force").status == 0


def test_a_store_belongs_to_one_run(mpl, begun, tmp_path) -> None:
    """Else `precompute` of one run would store what another one selected."""
    other = Path(shutil.copytree(begun, tmp_path / "other"))
    description = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(description | {"id": "another"}))
    store = tmp_path / "store"
    assert mpl("filter", "--run", begun, "--store", store, "--k", 5).status == 0
    outcome = mpl("filter", "--run", other, "--store", store, "--k", 9)
    assert outcome.status == 1
    assert f"belongs to the run {begun}" in outcome.err
    outcome = mpl("precompute", "--run", begun, "--store", tmp_path / "second")
    assert outcome.status == 1
    assert "another --store begins with mpl filter" in outcome.err
    assert mpl("precompute", "--run", begun).status == 0  # and the run still knows the first one
    assert mpl("reproduce", "table2", "--run", tmp_path / "table", "--store", tmp_path / "third").status == 2


@pytest.mark.parametrize("apart", [16, pytest.param(6, marks=pytest.mark.long)])
def test_files_that_cannot_be_reached_are_not_taken_for_unfinished(mpl, begun, storage, apart) -> None:
    """A moment of 503 must not have finished shards removed, or scored again."""
    url = storage.url(f"finished-{apart}")
    assert mpl("filter", "--run", begun, "--store", url).status == 0
    assert mpl("precompute", "--run", begun).status == 0
    before = stored(storage, f"finished-{apart}")
    for n in range(2, 40, apart):
        storage.break_next(n, "503", "HEAD")
        for command in ("precompute", "filter"):
            outcome = mpl(command, "--run", begun)
            assert outcome.status in (0, 1)
            told = "run the same command again" in outcome.err or "cannot be reached" in outcome.err
            assert outcome.status == 0 or told
        storage.break_next(0)
        assert stored(storage, f"finished-{apart}").items() >= before.items()


def test_a_tar_in_object_storage_is_not_read_to_be_recognised(storage, tmp_path) -> None:
    """Its ETag will do. Columns of a part are read without the others."""
    from pipeline.data.readers.webdataset import TarShard
    from pipeline.storage.tables import open_parquet

    storage.put("large.tar", bytes(10 << 20))
    seen = len(storage.requests)
    TarShard("large", location(storage.url("large.tar"))).fingerprint()
    assert sum(count for _, _, count in storage.requests[seen:]) < 1 << 16
    table = pa.table({"a": np.arange(100_000), "b": pa.array([bytes(100)] * 100_000, pa.binary(100))})
    pq.write_table(table, tmp_path / "part", compression="none", use_dictionary=False)
    storage.put("part", (tmp_path / "part").read_bytes())
    seen = len(storage.requests)
    with open_parquet(location(storage.url("part"))) as file:
        assert file.read(["a"]).equals(table.select(["a"]))
    assert sum(count for method, _, count in storage.requests[seen:] if method == "GET") < 2 << 20


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_storage_that_breaks_for_a_moment_is_asked_again(mpl, finished, begun, storage, kind) -> None:
    storage.break_next(1, kind)
    outcome = mpl("filter", "--run", begun, "--store", storage.url(f"moment-{kind}"))
    if outcome.status:  # it broke where the library does not try again: then the same command goes on
        assert "Traceback" not in outcome.err
        assert "Resume with: mpl filter" in outcome.err
        assert mpl("filter", "--run", begun, "--store", storage.url(f"moment-{kind}")).status == 0
    wanted = {name: data for name, data in outputs(finished).items() if not name.startswith("targets")}
    assert stored(storage, f"moment-{kind}") == wanted


@pytest.mark.parametrize("kind", ["503", pytest.param("drop", marks=pytest.mark.long)])
def test_storage_that_stays_broken_is_one_clear_message(mpl, finished, begun, storage, kind) -> None:
    """Uploads fail for good after the first scores; nothing half-written is left, and the command goes on later."""
    url = storage.url(f"broken-{kind}")
    storage.break_next(1000, kind, "PUT")
    outcome = mpl("filter", "--run", begun, "--store", url)
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
    assert f"cannot write {url}/" in outcome.err
    assert "Resume with: mpl filter" in outcome.err
    storage.break_next(0)
    assert stored(storage, f"broken-{kind}") == {}
    assert mpl("filter", "--run", begun, "--store", url).status == 0
    assert set(stored(storage, f"broken-{kind}")) == {n for n in outputs(finished) if not n.startswith("targets")}


def test_a_pool_in_object_storage(mpl, recipe, storage, tmp_path) -> None:
    """Labelled images and pool at one URL; workers read it too."""
    for place, (name, count) in enumerate((("train", 12), ("test", 4), ("pool-0", 9), ("pool-1", 9))):
        labels = None if name.startswith("pool") else [at % 2 for at in range(count)]
        images = [encode(noise(8, 100 * place + at)) for at in range(count)]
        path = write_parquet(tmp_path / f"{name}.parquet", images, labels)
        storage.put(f"set/{name}.parquet", path.read_bytes())
    source = {"path": "train.parquet", "reader": "parquet"}
    manifest = {
        "name": "far", "classes": 2, "class_names": ["cat", "dog"], "image": {"size": 8},
        "files": {"train": source, "test": source | {"path": "test.parquet"},
                  "pool": {"glob": "pool-*.parquet", "reader": "parquet"}},
        "splits": {"labelled": {"from": "train", "drop_last": 4}, "validation": {"from": "train", "last": 4},
                   "test": {"from": "test"}, "unlabelled": {"from": "pool"}},
    }  # fmt: skip
    storage.put("set/manifest.yaml", yaml.safe_dump(manifest).encode())
    common = ["--run", tmp_path / "run", "--set", "filter.copies.threshold=0.999"]
    first = ["--recipe", recipe, "--data", storage.url("set"), "--set", "data.manifest=far"]
    assert mpl("pretrain", "--run", tmp_path / "run", *first).status == 0
    outcome = mpl("filter", *common, "--workers", 2)
    assert outcome.status == 0, outcome.err
    assert "18 of 18 images kept" in outcome.err
    assert mpl("precompute", *common).status == 0
    assert mpl("train-reduced", *common).status == 0
    lost = storage.place("set/pool-1.parquet")
    lost.fs.rm(lost.path)
    outcome = mpl("filter", *common)
    assert outcome.status == 1
    assert "no longer in the pool (pool-1)" in outcome.err


def test_places_that_cannot_be_used(mpl, recipe, storage, tmp_path) -> None:
    for place in ("s3://there-is-no-such-bucket/x", "gs://needs/gcsfs", "nonsense://x"):
        outcome = mpl("pretrain", "--run", tmp_path / "run", "--recipe", recipe, "--data", place)
        assert outcome.status in (1, 2)
        assert place.split("//")[1].split("/")[0] in outcome.err
        assert "Traceback" not in outcome.err


def test_local_places_are_paths() -> None:
    assert isinstance(location("/a/b"), Path)
    assert location("file:///a/b") == Path("/a/b")
