"""WebDataset tars, written by hand and by the webdataset library's rules."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.manifest import load_manifest
from pipeline.data.shards import Sample
from pipeline.data.sources import open_split
from pipeline.data.webdataset import TarShard
from pipeline.errors import DataError
from tests.data.made_images import encode, noise

Member = tuple[str, bytes]


def pack(path: Path, members: list[Member], mode: str = "w", form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def images(count: int) -> list[Member]:
    return [(f"a/{i:03d}.png", encode(noise(4 + i % 7, i))) for i in range(count)]


def labelled(count: int) -> list[Member]:
    return [
        member
        for i, (name, data) in enumerate(images(count))
        for member in ((name, data), (name.replace(".png", ".cls"), b"%d\n" % (i % 2)))
    ]


def read(path: Path, names: tuple[str, ...] | None = ()) -> list[Sample]:
    return list(TarShard("shard", path, names).read())


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_labels_and_rows(tmp_path: Path, suffix: str, mode: str, form: int) -> None:
    path = pack(tmp_path / f"shard.{suffix}", labelled(9), mode, form)
    expected = [Sample(row, name.removesuffix(".png"), data, row % 2) for row, (name, data) in enumerate(images(9))]
    assert read(path) == expected
    shard = TarShard("shard", path, ())
    assert shard.rows() == 9
    assert shard.labels().tolist() == [sample.label for sample in expected]
    assert list(shard.read(2, 5)) == expected[2:5]
    assert [sample.label for sample in read(path, None)] == [-1] * 9


def test_grouping_follows_webdataset(tmp_path: Path) -> None:
    """Source: webdataset's `base_plus_ext`: the suffix is all from the first dot of the file name on."""
    members: list[Member] = [
        ("a.b/x.seg.png", b"1"), ("a.b/x.json", b"{}"), ("a.b/x.cls", b"1"),
        ("a.b/y.JPG", b"2"), ("__meta__", b"-"), ("README", b"-"), ("a.b/._y.jpg", b"-"),
        ("y.jpg", b"3"), ("z.cls", b"0"),
    ]  # fmt: skip
    samples = read(pack(tmp_path / "shard.tar", members))
    assert [(sample.key, sample.data, sample.label) for sample in samples] == [
        ("a.b/x", b"1", 1), ("a.b/y", b"2", -1), ("y", b"3", -1), ("z", b"", 0)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves the file open
def test_the_library_agrees(tmp_path: Path) -> None:
    """Oracle: the webdataset library reads the same keys, bytes and labels from the same file."""
    webdataset = pytest.importorskip("webdataset")
    path = pack(tmp_path / "shard.tar", labelled(20))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(one["__key__"], one["png"], int(one["cls"])) for one in theirs] == [
        (sample.key, sample.data, sample.label) for sample in read(path)
    ]


def test_a_repeated_key_stays_two_samples(tmp_path: Path) -> None:
    members: list[Member] = [
        ("x.png", b"1"), ("x.cls", b"0"), ("x.png", b"2"), ("x.cls", b"1"), ("y.png", b"3"), ("x.png", b"4")
    ]  # fmt: skip
    samples = read(pack(tmp_path / "shard.tar", members))
    assert [(sample.row, sample.key, sample.data, sample.label) for sample in samples] == [
        (0, "x", b"1", 0), (1, "x", b"2", 1), (2, "y", b"3", -1), (3, "x", b"4", -1)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("x.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"shard\.tar: x\.png is a link or a device"):
        read(path)


@pytest.mark.parametrize("name", ["/x.png", "../x.png", "a/../../x.png"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="points outside the archive"):
        read(pack(tmp_path / "shard.tar", [(name, b"1")]))


def test_folders_in_the_archive_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "x.png").write_bytes(b"1")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "photos", "photos")
    assert [sample.key for sample in read(tmp_path / "shard.tar")] == ["photos/a/x"]


def test_a_tar_cut_anywhere_gives_the_rows_until_then_and_an_error(tmp_path: Path) -> None:
    """tarfile itself takes many of these cuts for the end of the archive, and says nothing."""
    path = pack(tmp_path / "shard.tar", labelled(6))
    whole, content = read(path), path.read_bytes()
    needed = -(-len(content.rstrip(b"\0")) // 512) * 512 + 512  # the first block of zeros ends the archive
    for cut in {*range(0, needed, 97), *range(0, needed, 512), needed - 1}:
        path.write_bytes(content[:cut])
        samples: list[Sample] = []
        with pytest.raises(DataError, match=r"shard\.tar cannot be read to its end"):
            samples.extend(TarShard("shard", path, ()).read())  # keeps what came before the error
        assert samples == whole[: len(samples)]
        with pytest.raises(DataError):
            TarShard("shard", path, ()).rows()
    path.write_bytes(content[:needed])
    assert read(path) == whole


def test_a_compressed_tar_cut_short_loses_nothing_in_silence(tmp_path: Path) -> None:
    path = pack(tmp_path / "shard.tar.gz", labelled(6), "w:gz")
    whole, content = read(path), path.read_bytes()
    for cut in range(0, len(content), 13):
        path.write_bytes(content[:cut])
        samples = []
        try:
            for sample in TarShard("shard", path, ()).read():
                samples.append(sample)
        except DataError:
            assert samples == whole[: len(samples)]
        else:
            assert samples == whole
            assert cut > len(content) - 40


def test_a_header_overwritten_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = pack(tmp_path / "shard.tar", images(4))
    content = bytearray(path.read_bytes())
    second = content.index(b"a/001.png")
    content[second + 150 : second + 160] = b"x" * 10
    path.write_bytes(content)
    with pytest.raises(DataError, match="no further header"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match="it is no tar, or was cut short"):
        read(path)


def test_labels_that_are_no_number(tmp_path: Path) -> None:
    path = pack(tmp_path / "shard.tar", [("x.png", b"1"), ("x.cls", b"dog")])
    assert read(path, ("cat", "dog"))[0].label == 1
    with pytest.raises(DataError, match=r"row 0 \(x\) has the label 'dog', which is neither a number"):
        read(path)
    assert read(path, None)[0].label == -1


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """The list of members that tarfile keeps is emptied."""
    path = pack(tmp_path / "shard.tar", images(300))
    with TarShard("shard", path)._open() as tar:
        shard = TarShard("shard", path)
        groups = shard._groups(with_images=True)
        for _ in range(200):
            next(groups)
        frame = groups.gi_frame  # type: ignore[attr-defined]
        assert len(frame.f_locals["tar"].members) <= 1
        assert tar is not None
        groups.close()  # type: ignore[attr-defined]


def test_splits_of_tars(data_set: Callable[..., Path]) -> None:
    path = data_set(
        files={"pool": {"glob": "pool-*.tar", "reader": "webdataset"}},
        splits={"labelled": {"from": "pool", "first": 4}, "unlabelled": {"from": "pool", "drop_first": 4}},
    )
    pack(path.parent / "pool-0.tar", labelled(3))
    pack(path.parent / "pool-1.tar", labelled(5))
    manifest = load_manifest(path)
    assert open_split(manifest, "labelled").labels().tolist() == [0, 1, 0, 0]
    pool = [(shard, sample.row, sample.label) for shard, sample in open_split(manifest, "unlabelled").read()]
    assert pool == [("pool-1", row, -1) for row in range(1, 5)]
