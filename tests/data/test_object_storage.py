"""Data sets in object storage: the same samples as on disk, and one clear error where storage stays broken."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from s3fs import S3FileSystem
from upath import UPath

from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.readers.parquet import ParquetShard
from pipeline.data.readers.shard import Shard
from pipeline.data.readers.webdataset import TarShard
from pipeline.data.sources import open_split
from pipeline.errors import DataError
from stages.data import group
from tests.data.made_images import encode, noise, write_parquet
from tests.data.readers.test_raw import pictures, write_cifar, write_tiny
from tests.data.readers.test_svhn import save
from tests.data.readers.test_tar import labelled, pack
from tests.object_storage import Storage, object_storage

READERS = ("parquet", "webdataset", "compressed", "folder", "cifar-binary", "tinyimages-bin", "svhn-mat")


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with object_storage() as storage:
        yield storage


@pytest.fixture(autouse=True)
def _whole(storage: Storage) -> Iterator[None]:
    yield
    storage.break_next(0)


def made(folder: Path, reader: str) -> Manifest:
    """A data set of two files for a reader, with its manifest in the folder."""
    folder.mkdir(parents=True)
    spec: dict[str, object] = {"glob": "set/part-*", "reader": reader}
    (folder / "set").mkdir()
    for part in range(2):
        path = folder / "set" / f"part-{part}"
        match reader:
            case "parquet":
                images = [encode(noise(9, part * 10 + i)) for i in range(7)]
                write_parquet(path.with_suffix(".parquet"), images, [i % 2 for i in range(7)])
            case "webdataset":
                pack(path.with_suffix(".tar"), labelled(6))
            case "compressed":
                spec["reader"] = "webdataset"
                pack(path.with_suffix(".tar.gz"), labelled(6), "w:gz")
            case "folder":
                spec = {"path": "set", "reader": "folder"}
                for kind in ("cat", "dog"):
                    (folder / "set" / kind).mkdir(exist_ok=True)
                    (folder / "set" / kind / f"a b {part}.png").write_bytes(encode(noise(9, part)))
            case "cifar-binary":
                write_cifar(path.with_suffix(".bin"), pictures(5, part), [0, 1, 0, 1, 1])
            case "tinyimages-bin":
                write_tiny(path.with_suffix(".bin"), pictures(5, part))
            case "svhn-mat":
                save(path.with_suffix(".mat"), 5 + part)
    split = "unlabelled" if reader in ("tinyimages-bin", "svhn-mat") else "labelled"
    manifest = {"name": "mine", "classes": 2, "class_names": ["cat", "dog"], "image": {"size": 9}}
    text = yaml.safe_dump({**manifest, "files": {"all": spec}, "splits": {split: {"from": "all"}}})
    (folder / "manifest.yaml").write_text(text)
    return load_manifest("mine", folder)


def upload(storage: Storage, folder: Path, prefix: str) -> UPath:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return storage.place(prefix)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_what_it_gives_on_disk(storage: Storage, tmp_path: Path, reader: str) -> None:
    manifest = made(tmp_path / "here", reader)
    place = upload(storage, tmp_path / "here", f"readers/{reader}")
    split = next(iter(manifest.splits))
    local = open_split(manifest, split, tmp_path / "here")
    remote = open_split(load_manifest("mine", place), split, place)
    assert list(remote.read()) == list(local.read())
    assert remote.labels().tolist() == local.labels().tolist()
    assert remote.count() == local.count()
    for near, far in zip(local.shards, remote.shards, strict=True):
        assert far.name == near.name
        assert list(far.read(1, 4)) == list(near.read(1, 4))
        moved: Shard = pickle.loads(pickle.dumps(far))  # as a worker of another process gets it
        assert list(moved.read()) == list(near.read())
        assert moved.fingerprint() == far.fingerprint()


def test_the_environment_says_where_storage_is(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--data s3://…` from the command line, with the variables that every tool of S3 reads."""
    made(tmp_path / "here", "webdataset")
    upload(storage, tmp_path / "here", "by-environment")
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(group, ["check", "mine", "--data", storage.url("by-environment"), "--all", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(result.stdout.splitlines()[-1])["splits"]["labelled"]
    assert (report["rows"], report["shards"], report["read"]) == (12, 2, 12)
    assert report["per_class"] == {"cat": 6, "dog": 6}
    listed = CliRunner().invoke(group, ["list", "--data", storage.url("by-environment")])
    assert "mine" in listed.stderr
    nothing = CliRunner().invoke(group, ["check", "mine", "--data", storage.url("nowhere")])
    assert isinstance(nothing.exception, DataError)
    here = CliRunner().invoke(group, ["check", "cifar10", "--data", storage.url("by-environment")])
    assert "there is nothing of that name in s3://bucket/by-environment" in here.stderr


@pytest.mark.parametrize("kind", ["drop", "503"])
@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_trouble_that_passes_is_not_noticed(storage: Storage, tmp_path: Path, kind: str, form: str) -> None:
    """A connection dropped in the middle of the bytes, or 503, twice."""
    shard, expected = shard_of(storage, tmp_path, form, f"passing-{kind}.{form}")
    storage.broken.clear()
    storage.break_next(2, kind, "GET")  # type: ignore[arg-type]
    assert list(shard.read()) == expected
    assert len(storage.broken) == 2


@pytest.mark.parametrize("kind", ["drop", "503"])
@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("after", [0, 3])
def test_trouble_that_stays_is_one_error_that_names_the_place(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str, after: int
) -> None:
    """From the start, or in the middle. Nothing half-read is passed off as whole; what came before is right."""
    monkeypatch.setattr(S3FileSystem, "retries", 2)  # of five, for the test's sake
    shard, expected = shard_of(storage, tmp_path, form, f"staying-{kind}.{form}")
    samples = []
    if not after:
        storage.break_next(1_000, kind, "GET")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"s3://bucket/staying-{kind}\.{form} cannot be read"):  # noqa: PT012
        for sample in shard.read():
            samples.append(sample)
            if len(samples) == after:
                storage.break_next(1_000, kind, "GET")  # type: ignore[arg-type]
    assert samples == expected[: len(samples)]
    assert after <= len(samples) < len(expected)


def shard_of(storage: Storage, tmp_path: Path, form: str, key: str) -> tuple[Shard, list[object]]:
    """A shard in storage, and the samples of the same file on disk."""
    images = [noise(128, seed).tobytes() for seed in range(60)]  # 3 MB: more than one buffer
    if form == "tar":
        path = pack(tmp_path / "a.tar", [(f"{i:03d}.png", data) for i, data in enumerate(images)])
        make: Callable[..., Shard] = lambda place: TarShard("a", place)  # noqa: E731
    else:
        path = write_parquet(tmp_path / "a.parquet", images)
        make = lambda place: ParquetShard("a", place, label=None)  # noqa: E731
    storage.put(key, path.read_bytes())
    return make(storage.place(key, default_block_size=1 << 19)), list(make(path).read())


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_an_object_cut_short_is_an_error(storage: Storage, tmp_path: Path, form: str) -> None:
    """As an upload that was not finished leaves it."""
    shard, _ = shard_of(storage, tmp_path, form, f"cut.{form}")
    whole = (tmp_path / f"a.{form}").read_bytes()
    storage.put(f"cut.{form}", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"s3://bucket/cut\.{form} cannot be read"):
        list(shard.read())


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_changed_or_missing_object_is_noticed(storage: Storage, tmp_path: Path, form: str) -> None:
    shard, _ = shard_of(storage, tmp_path, form, f"changed.{form}")
    before = shard.fingerprint()
    assert shard.fingerprint() == before
    content = bytearray((tmp_path / f"a.{form}").read_bytes())
    content[len(content) // 2] ^= 1  # a change in the middle shows, for there is an ETag
    storage.put(f"changed.{form}", bytes(content))
    assert shard.fingerprint() != before
    storage.place(f"changed.{form}").unlink()
    for act in (lambda: list(shard.read()), shard.rows, shard.fingerprint):
        with pytest.raises(DataError, match=rf"s3://bucket/changed\.{form}: there is no such file"):
            act()


def test_bytes_are_fetched_once(storage: Storage, tmp_path: Path) -> None:
    """Reading a shard from front to back asks for little more than its bytes."""
    for form in ("tar", "parquet"):
        shard, expected = shard_of(storage, tmp_path, form, f"once.{form}")
        storage.requests.clear()
        assert len(list(shard.read())) == len(expected)
        size = (tmp_path / f"a.{form}").stat().st_size
        assert sum(sent for method, _, sent in storage.requests if method == "GET") <= 1.3 * size


def test_a_url_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(group, ["check", "--data", "nowhere://bucket"])
    assert isinstance(result.exception, DataError)
    assert "nowhere://bucket cannot be used" in str(result.exception)


def test_an_endpoint_that_does_not_answer(tmp_path: Path) -> None:
    place = UPath(
        "s3://bucket/x", endpoint_url="http://127.0.0.1:9", key="a", secret="b",
        config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1},
    )  # fmt: skip
    manifest = made(tmp_path / "here", "webdataset")
    with pytest.raises(DataError, match=r"s3://bucket/x/set/part-\* cannot be looked up: .*127\.0\.0\.1:9"):
        open_split(manifest, "labelled", place)
