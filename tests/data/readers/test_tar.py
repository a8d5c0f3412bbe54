"""WebDataset tars, written by hand and by the webdataset library's rules."""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import load_manifest
from pipeline.data.readers.shard import Sample
from pipeline.data.readers.tar import open_tar
from pipeline.data.readers.webdataset import TarShard
from pipeline.data.sources import open_split
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
    """8,000 members: a list of them would take more."""
    path = pack(tmp_path / "shard.tar", [(f"{i:06d}.png", b"x" * 2_000) for i in range(8_000)])
    tracemalloc.start()
    count = sum(1 for _ in TarShard("shard", path).read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8_000
    assert peak < 2.5e6  # the buffer of a MiB, and little else


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


def test_the_layout_of_img2dataset(data_set: Callable[..., Path]) -> None:
    """Source: img2dataset's WebDataset writer: tars with side files; a failed download is in the tables alone."""
    path = data_set(
        files={"pool": {"glob": "yfcc100m/*.tar", "reader": "webdataset"}},
        splits={"unlabelled": {"from": "pool"}},
    )
    folder = path.parent / "yfcc100m"
    folder.mkdir()
    pictures = {}
    for shard in range(2):
        members: list[Member] = []
        for i in range(6):
            key = f"{shard:05d}{i:04d}"
            if i not in (1, 4):  # these failed
                pictures[f"{shard:05d}", key] = data = encode(noise(6, shard * 10 + i), "JPEG")
                members += [
                    (f"{key}.jpg", data),
                    (f"{key}.json", b'{"status": "success"}'),
                    (f"{key}.txt", b"a caption"),
                ]
        pack(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    split = open_split(load_manifest(path), "unlabelled")
    read = list(split.read())
    assert {(shard, sample.key): sample.data for shard, sample in read} == pictures
    assert [(shard, sample.row) for shard, sample in read] == [(s, row) for s in ("00000", "00001") for row in range(4)]
    assert split.count() == 8


def test_the_same_key_in_two_shards_stays_two_samples(data_set: Callable[..., Path]) -> None:
    path = data_set(files={"pool": {"glob": "*.tar", "reader": "webdataset"}}, splits={"unlabelled": {"from": "pool"}})
    pack(path.parent / "a.tar", [("x.png", b"1"), ("x.json", b"{}")])
    pack(path.parent / "b.tar", [("x.png", b"2")])
    read = list(open_split(load_manifest(path), "unlabelled").read())
    assert [(shard, sample.row, sample.key, sample.data) for shard, sample in read] == [
        ("a", 0, "x", b"1"),
        ("b", 0, "x", b"2"),
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(blacklist_characters="\0/.", blacklist_categories=["Cs"]), min_size=1, max_size=90),
        min_size=1,
        max_size=5,
    ),
    folder=st.sampled_from(["", "a/", "./", "a" * 80 + "/", "é" * 70 + "/b/"]),
    size=st.integers(0, 1_200),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    seconds=st.sampled_from([0, 1.5, 2**40]),
)
def test_headers_equal_tarfiles(
    tmp_path: Path, names: list[str], folder: str, size: int, form: int, seconds: float
) -> None:
    """Oracle: Python's tarfile, on names short and long, of all letters, with the extensions that these need."""
    path = tmp_path / "any.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(f"{folder}{name}.png")
            info.size, info.mtime = size + i, seconds  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    with tarfile.open(path) as tar:
        theirs = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    ours = []
    with open_tar(path) as reader:
        while (name := reader.next()) is not None:
            ours.append((name, reader.read()))
    assert ours == theirs


@pytest.mark.parametrize("kind", ["v7", "base256", "signed", "posix prefix"])
def test_unusual_headers(tmp_path: Path, kind: str) -> None:
    """Forms that Python does not write: made from one that it does."""
    name = "é/" + "p" * 120 + "/x.png" if kind == "posix prefix" else "é.png"
    path = pack(tmp_path / "a.tar", [(name, b"data")], form=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    if kind == "v7":
        content[257:512] = bytes(255)
    if kind == "base256":
        content[124:136] = b"\x80" + (4).to_bytes(11, "big")
    content[148:156] = b" " * 8
    total = sum(b - 256 if b > 127 and kind == "signed" else b for b in content[:512])
    content[148:156] = b"%06o\0 " % total
    path.write_bytes(content)
    assert [(sample.key, sample.data) for sample in read(path)] == [(name.removesuffix(".png"), b"data")]


def test_every_bit_of_a_header_counts(tmp_path: Path) -> None:
    """The checksum is verified on the quick path, too: no header with a byte changed passes for another."""
    path = pack(tmp_path / "a.tar", [("x.png", b"data"), ("y.png", b"more")])
    content = path.read_bytes()
    for place in range(512):
        if 148 <= place < 156:
            continue
        changed = bytearray(content)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(DataError, match="no further header"):
            read(path)


def in_tar(tmp_path: Path, *names: str) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
    """(key, seed of the image or -1, label) of each sample of a tar of members, and what is told beside them.

    Members whose names end so are a label or text; the others are images of the seeds 0, 1, 2 …
    """
    seeds = {encode(noise(4, seed)): seed for seed in range(len(names))}
    data = dict(zip(names, seeds, strict=True))
    data |= {name: name.encode()[:1] for name in names if name.endswith((".cls", ".json", "README"))}
    shard = TarShard("a", pack(tmp_path / "a.tar", list(data.items())), ())
    samples = [(sample.key, seeds.get(sample.data, -1), sample.label) for sample in shard.read()]
    assert shard.rows() == len(samples)
    assert shard.labels().tolist() == [label for _, _, label in samples]
    return samples, [(entry.key, entry.reason) for entry in shard.left_out()]


def test_dots_in_keys(tmp_path: Path) -> None:
    """As screenshots and numbered frames have them: each image is a sample, with its own label."""
    frames, told = in_tar(tmp_path, "Shot 10.27.00.png", "Shot 10.27.01.png", "v1.0000.png", "v1.0001.png", "w.jpg")
    assert frames == [
        ("Shot 10.27.00", 0, -1), ("Shot 10.27.01", 1, -1), ("v1.0000", 2, -1), ("v1.0001", 3, -1), ("w", 4, -1)
    ]  # fmt: skip
    assert told == []
    samples, _ = in_tar(tmp_path, "1.a.cls", "1.a.png", "1.b.cls", "1.b.png")
    assert samples == [("1.a", 1, 1), ("1.b", 3, 1)]
    assert in_tar(tmp_path, "beach.jpg", "beach.sunset.jpg", *(f"{i}.jpg" for i in range(5)))[0][:2] == [
        ("beach", 0, -1), ("beach.sunset", 1, -1)
    ]  # fmt: skip


def test_views_of_a_sample_are_told(tmp_path: Path) -> None:
    """`seg.png` beside each `png` is no image of its own."""
    names = [f"{i}{suffix}" for i in range(3) for suffix in (".png", ".seg.png")]
    samples, told = in_tar(tmp_path, *names)
    assert samples == [("0", 0, -1), ("1", 2, -1), ("2", 4, -1)]
    assert told == [(f"{i}.seg.png", "another_view") for i in range(3)]
    samples, told = in_tar(tmp_path, "0.cls", "0.left.png", "0.right.png")
    assert samples == [("0", 1, 0)]
    assert told == [("0.right.png", "another_view")]


def test_images_without_an_images_name(tmp_path: Path) -> None:
    samples, told = in_tar(tmp_path, "a/1", "a/2.jpg", "a/2.jpg.1", "a/README", "a/._2.jpg", ".git/3.png", "b.dat")
    assert samples == [("a/1", 0, -1), ("a/2", 1, -1), ("a/2.jpg.1", 2, -1), ("b", 6, -1)]
    assert told == [("a/README", "no_image"), ("a/._2.jpg", "hidden"), (".git/3.png", "hidden")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_joined_archives_are_read_on(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    parts = [pack(tmp_path / f"{i}.tar", [(f"{i}.png", b"%d" % i)]).read_bytes() for i in range(3)]
    path = tmp_path / "joined.tar"
    path.write_bytes(b"".join(map(compress, parts)))
    assert [(sample.key, sample.data) for sample in read(path)] == [("0", b"0"), ("1", b"1"), ("2", b"2")]
    path.write_bytes(parts[0] + b"rubbish".ljust(512, b"-"))
    with pytest.raises(DataError, match="what follows its end is neither zeros nor another archive"):
        read(path)
