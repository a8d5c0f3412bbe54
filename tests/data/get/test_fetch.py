"""`mpl data fetch`: files in place with the right checksum, or a clear word."""

import gzip
import hashlib
import io
import json
import tarfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from click.testing import CliRunner, Result

from pipeline.data.get import download, fetch
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.errors import DataError, UsageError
from stages.data import group
from tests.data.file_server import Server, file_server
from tests.data.readers.test_raw import pictures, write_cifar

DataSet = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = download.Patience(attempts=3, first_wait=0.01, longest_wait=0.05, timeout=(60, 60))
    monkeypatch.setattr(download, "Patience", lambda: quick)


@pytest.fixture
def server() -> Iterator[Server]:
    with file_server() as server:
        yield server


def run(manifest: Path | str, data: Path | None, *more: str) -> Result:
    where = [] if data is None else ["--data", str(data)]
    return CliRunner().invoke(group, ["fetch", str(manifest), *where, "--json", *more], env={"MPL_DATA": ""})


def states(result: Result) -> dict[str, str]:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {file["name"]: file["state"] for file in told["files"]}


def cifar_tar(folder: Path, more: dict[str, bytes] | None = None) -> bytes:
    """Two files of CIFAR-10's form in a .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("data_batch_1.bin", "data_batch_2.bin"):
            tar.add(write_cifar(folder / name, pictures(4, len(name)), [0, 1, 1, 0]), f"batches/{name}")
        for name, data in (more or {}).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def archived(data_set: DataSet, server: Server, **archive: object) -> Path:
    """A manifest whose files lie in an archive; the manifest itself is in a folder of its own."""
    digest = hashlib.sha256(server.content).hexdigest()
    manifest = data_set(
        archives={"all": {"url": f"{server.url}/all.tar.gz", "sha256": digest, **archive}},
        files={"train": {"glob": "batches/data_batch_*.bin", "reader": "cifar-binary", "rows": 8, "archive": "all"}},
    )
    return manifest.rename(manifest.with_name("mine.yaml"))


def single(data_set: DataSet, server: Server, **changes: object) -> Path:
    spec = {
        "path": "raw/test.bin",
        "reader": "cifar-binary",
        "url": f"{server.url}/test.bin",
        "bytes": len(server.content),
        "md5": hashlib.md5(server.content).hexdigest(),
    }
    spec.update(changes)
    manifest = data_set(files={"train": {k: v for k, v in spec.items() if v is not None}})
    return manifest.rename(manifest.with_name("mine.yaml"))


@pytest.fixture
def records(tmp_path: Path) -> bytes:
    return write_cifar(tmp_path / "made.bin", pictures(40), [i % 2 for i in range(40)]).read_bytes()


def test_a_file_is_fetched_once(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    server.content = records
    manifest, data = single(data_set, server), tmp_path / "new" / "data"
    result = run(manifest, data)
    assert states(result) == {"train": "fetched"}, result.output
    assert (data / "raw" / "test.bin").read_bytes() == records
    assert open_split(load_manifest(manifest), "labelled", data).labels().tolist() == [0, 1] * 20
    again = run(manifest, data)
    assert states(again) == {"train": "present"}
    assert "its checksum is right" in again.stderr
    assert len(server.asked) == 1
    assert not list((data / fetch.WORK).glob("*.part*"))


def test_a_damaged_file_is_replaced(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    """Of the right length, too."""
    server.content = records
    manifest, data = single(data_set, server), tmp_path / "data"
    run(manifest, data)
    for damaged in (records[:-1], records[:-1] + b"?"):
        (data / "raw" / "test.bin").write_bytes(damaged)
        assert states(run(manifest, data)) == {"train": "fetched"}
        assert (data / "raw" / "test.bin").read_bytes() == records


def test_a_wrong_file_is_not_left_in_place(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    server.content = records
    manifest, data = single(data_set, server), tmp_path / "data"
    right = hashlib.md5(records).hexdigest()
    server.content = wrong = records[:-1] + b"?"
    result = run(manifest, data)
    assert isinstance(result.exception, DataError)
    assert f"gave a file with md5:{hashlib.md5(wrong).hexdigest()}, and the manifest says md5:{right}" in str(
        result.exception
    )
    assert not (data / "raw").exists()
    assert not list((data / fetch.WORK).glob("*.part*"))
    (data / "raw").mkdir()
    (data / "raw" / "test.bin").write_bytes(b"what was there")
    assert isinstance(run(manifest, data).exception, DataError)
    assert (data / "raw" / "test.bin").read_bytes() == b"what was there"


def test_pieces_of_two_days_are_fetched_anew(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    """A server without tags changed its file to the right one after the first half: nothing but the checksum tells."""
    server.content = records
    manifest, data = single(data_set, server), tmp_path / "data"
    server.content, server.tag, server.breaks = bytes(len(records)), None, [5_000, 0, 0]
    assert isinstance(run(manifest, data).exception, DataError)
    server.content = records
    assert states(run(manifest, data)) == {"train": "fetched"}
    assert server.asked[-2:] == ["bytes=5000-", None]


def test_breaks_resume_between_commands(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    server.content = records
    manifest, data = single(data_set, server), tmp_path / "data"
    server.breaks = [50_000, 0, 0]
    assert "the same command goes on" in str(run(manifest, data).exception)
    assert states(run(manifest, data)) == {"train": "fetched"}
    assert server.sent == len(records)


def test_an_archive_is_unpacked_once(data_set: DataSet, server: Server, tmp_path: Path) -> None:
    """Only what the manifest names, so that nothing else in the folder can be replaced."""
    more = {"manifest.yaml": b"name: evil", "batches/readme.html": b"-", "other/data_batch_9.bin": b"x"}
    server.content = cifar_tar(tmp_path, more)
    manifest, data = archived(data_set, server), tmp_path / "data"
    assert states(run(manifest, data)) == {"all": "fetched"}
    assert sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()) == [
        ".fetch/all.json", ".fetch/lock", "batches/data_batch_1.bin", "batches/data_batch_2.bin"
    ]  # fmt: skip
    assert open_split(load_manifest(manifest), "labelled", data).labels().tolist() == [0, 1, 1, 0] * 2
    assert states(run(manifest, data)) == {"all": "present"}
    assert len(server.asked) == 1
    victim = data / "batches" / "data_batch_2.bin"
    content = victim.read_bytes()
    victim.write_bytes(b"?" + content[1:])
    assert states(run(manifest, data)) == {"all": "fetched"}
    assert victim.read_bytes() == content


@pytest.mark.parametrize("name", ["../evil.bin", "/tmp/evil.bin", "batches/../../evil.bin"])
def test_an_archive_that_reaches_out_is_refused(data_set: DataSet, server: Server, tmp_path: Path, name: str) -> None:
    """Also where the manifest does not name the member; and nothing at all was written."""
    server.content = cifar_tar(tmp_path, {name: b"x"})
    data = tmp_path / "data"
    result = run(archived(data_set, server), data)
    assert isinstance(result.exception, DataError)
    assert "points outside the archive" in str(result.exception)
    assert not (data / "batches").exists()
    assert not list(tmp_path.rglob("evil*"))


def test_an_archive_with_a_link_is_refused(data_set: DataSet, server: Server, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("batches/data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    server.content = gzip.compress(buffer.getvalue())
    assert "is a link or a device" in str(run(archived(data_set, server), tmp_path / "data").exception)


def test_an_archive_without_the_files_is_refused(data_set: DataSet, server: Server, tmp_path: Path) -> None:
    server.content = cifar_tar(tmp_path)
    manifest = archived(data_set, server)
    manifest.write_text(manifest.read_text().replace("data_batch_*", "data_match_*"))
    assert "needs batches/data_match_*.bin" in str(run(manifest, tmp_path / "data").exception)
    server.content = b"no archive"
    manifest = archived(data_set, server)
    assert "it is no tar, or was cut short" in str(run(manifest, tmp_path / "data").exception)


def test_too_little_space_is_told_before_anything_is_asked(
    data_set: DataSet, server: Server, records: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = records
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 10**9))
    result = run(single(data_set, server, bytes=2 * 10**9), tmp_path / "data")
    assert "has 1.00 GB free, and 2.00 GB are needed to download" in str(result.exception)
    assert not server.asked
    server.content = cifar_tar(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 10**6))
    assert "are needed to unpack" in str(run(archived(data_set, server), tmp_path / "data").exception)


def test_what_cannot_be_downloaded_is_told_with_what_to_do(tmp_path: Path) -> None:
    result = run("imagenet", tmp_path)
    assert result.exit_code == 1
    assert states(result) == {"train": "missing", "test": "missing", "pool": "missing"}
    assert "train: missing: cannot be downloaded. ImageNet is for those who accept its terms" in result.stderr
    assert "img2dataset" in result.stderr
    result = run("cifar10-binary", tmp_path, "--only", "pool")
    assert result.exit_code == 1
    assert "TinyImages was withdrawn by its authors in 2020" in result.stderr
    result = run("cifar10", tmp_path)
    assert "cifar10-binary" in result.stderr
    (tmp_path / "yfcc100m").mkdir()
    (tmp_path / "yfcc100m" / "00000.tar").write_bytes(b"")
    assert states(run("imagenet", tmp_path, "--only", "pool")) == {"pool": "present"}


def test_the_embedded_digits_need_nothing(tmp_path: Path) -> None:
    result = run("digits", tmp_path)
    assert result.exit_code == 0
    assert set(states(result).values()) == {"embedded"}


def test_without_a_checksum_the_files_own_is_told(
    data_set: DataSet, server: Server, records: bytes, tmp_path: Path
) -> None:
    server.content = records
    result = run(single(data_set, server, md5=None), tmp_path / "data")
    assert f"no checksum is known; sha256:{hashlib.sha256(records).hexdigest()}" in result.stderr


def test_only_some_files(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    server.content = records
    manifest = single(data_set, server)
    result = run(manifest, tmp_path / "data", "--only", "trian")
    assert isinstance(result.exception, UsageError)
    assert "did you mean train?" in str(result.exception)


def test_two_at_once_and_bad_places(data_set: DataSet, server: Server, records: bytes, tmp_path: Path) -> None:
    server.content = records
    manifest, data = single(data_set, server), tmp_path / "data"
    (data / fetch.WORK).mkdir(parents=True)
    with filelock.FileLock(data / fetch.WORK / "lock"):
        assert "another `mpl data fetch` works in" in str(run(manifest, data).exception)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in str(run(manifest, tmp_path / "file" / "below").exception)
    assert isinstance(run(manifest, None).exception, UsageError)
    remote = CliRunner().invoke(group, ["fetch", str(manifest), "--data", "s3://bucket/x"])
    assert "needs a folder on disk" in str(remote.exception)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("svhn", {"train": (182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
                  "test": (64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
                  "extra": (1_329_278_602, "a93ce644f1a588dc4d68dda5feec44a7")}),
        ("cifar10-binary", {"cifar-10-binary": (170_052_171, "c32a1d4ab5d03f1284b67883e8d87530")}),
    ],
)  # fmt: skip
def test_checksums_of_the_papers_data_sets(name: str, facts: dict[str, tuple[int, str]]) -> None:
    """Source: torchvision's datasets and CIFAR-10's homepage."""
    manifest = load_manifest(name)
    sources = {**manifest.files, **manifest.archives}
    assert {key: (sources[key].bytes, sources[key].md5) for key in facts} == facts
    assert all(len(sources[key].sha256 or "") == 64 for key in facts)
    assert np.all([sources[key].url for key in facts])
