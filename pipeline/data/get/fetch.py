"""Bringing a data set's files to the data folder: downloads with checksum, archives unpacked, or what to do instead.

All that is unfinished lies in `<data>/.fetch`, and a file appears under its own name when its checksum has been
verified. Nothing is ever unpickled or run.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from pipeline.data.get.download import Patience, discard, download
from pipeline.data.manifest import Archive, FileSpec, Manifest, suggestion
from pipeline.data.readers.tar import open_tar
from pipeline.data.sources import find_files
from pipeline.errors import DataError, UsageError
from pipeline.storage.files import read_json, sha256_file, sync_folder, write_json

WORK = ".fetch"
MARGIN = 64 << 20  # bytes that are left free
UNPACKED_LIMIT = 1 << 40  # bytes of one file of an archive; the free disk is checked besides
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Fetched:
    """What happened to an entry of `files` or `archives`."""

    name: str
    state: Literal["embedded", "present", "fetched", "missing"]
    detail: str = ""
    """For people: where it is, or what to do."""


@dataclass(frozen=True)
class _Download:
    name: str
    source: FileSpec | Archive
    part: Path

    @property
    def url(self) -> str:
        assert self.source.url is not None
        return self.source.url

    @property
    def checksum(self) -> str | None:
        """`<algorithm>:<hexadecimal>`."""
        for kind in ("sha256", "md5"):
            if value := getattr(self.source, kind):
                return f"{kind}:{value}"
        return None


def fetch(
    manifest: Manifest,
    data: Path,
    *,
    only: Iterable[str] = (),
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> Iterator[Fetched]:
    """Bring the files of a data set, one after another; what is there and right is left alone.

    Args:
        manifest: the data set.
        data: the data folder; it is made if need be.
        only: entries of `files`; none is all.
        patience: with servers.
        progress: called with the name, the bytes that are there and the bytes in all.

    Raises:
        DataError: a download fails, is another file than the manifest's, or does not fit on the disk; an
            archive holds what is refused; another process is fetching into `data`.
    """
    names = list(only) or list(manifest.files)
    for name in names:
        if name not in manifest.files:
            hint = suggestion(name, manifest.files) or f"there are {', '.join(manifest.files)}"
            raise UsageError(f"data set {manifest.name} has no {name!r} among its files; {hint}")
    if jobs := _downloads(manifest, names, data):
        with _alone(data):
            waiting = [job for job in jobs if not _is_there(manifest, job, data)]
            _require_space(data, sum(max(0, (job.source.bytes or 0) - _size(job.part)) for job in waiting), "download")
            for job in jobs:
                if job in waiting:
                    yield _bring(manifest, job, data, patience, progress)
                else:
                    yield Fetched(job.name, "present", "there, and its checksum is right" if job.checksum else "there")
    for name in names:
        if (file := _by_hand(manifest, name, data)) is not None:
            yield file


def _bring(
    manifest: Manifest, job: _Download, data: Path, patience: Patience | None, progress: Progress | None
) -> Fetched:
    """Download, verify, and put in place."""
    digest = _get(job, patience, None if progress is None else partial(progress, job.name))
    if isinstance(job.source, Archive):
        where = _unpack(manifest, job, data)
    else:
        where = str(_place(job.part, data / (job.source.path or "")))
    discard(job.part)
    return Fetched(job.name, "fetched", where if job.checksum else f"{where} (no checksum is known; {digest})")


def _downloads(manifest: Manifest, names: list[str], data: Path) -> list[_Download]:
    """Files with an address, and archives once each."""
    sources: dict[str, FileSpec | Archive] = {}
    for name in names:
        spec = manifest.files[name]
        if spec.archive is not None:
            sources[spec.archive] = manifest.archives[spec.archive]
        elif spec.url is not None:
            sources[name] = spec
    return [_Download(name, source, _part(data, source.url or "")) for name, source in sources.items()]


def _part(data: Path, url: str) -> Path:
    name = PurePosixPath(urlsplit(url).path).name or "download"
    return data / WORK / f"{name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part"


def _is_there(manifest: Manifest, job: _Download, data: Path) -> bool:
    """Whether files are in place whole: by checksum, or by length where there is none."""
    if isinstance(job.source, Archive):
        return _is_unpacked(manifest, job, data)
    path = data / (job.source.path or "")
    if not path.is_file() or (job.source.bytes is not None and path.stat().st_size != job.source.bytes):
        return False
    return job.checksum is None or _hash(path, job.checksum) == job.checksum


def _by_hand(manifest: Manifest, name: str, data: Path) -> Fetched | None:
    """The state of a file that no program can download."""
    spec = manifest.files[name]
    if spec.url is not None or spec.archive is not None:
        return None
    if spec.reader == "digits":
        return Fetched(name, "embedded", "inside scikit-learn")
    try:
        paths = find_files(manifest, spec, data)
    except DataError as error:
        place = data / (spec.path or spec.glob or "")
        what = spec.obtain or f"Put it at {place} ({error})"
        return Fetched(name, "missing", f"cannot be downloaded. {what}".strip())
    return Fetched(name, "present", f"{len(paths)} file(s)")


def _get(job: _Download, patience: Patience | None, progress: Callable[[int, int | None], None] | None) -> str:
    """Download until the checksum is right. Gives `<algorithm>:<hexadecimal>`."""
    for again in (True, False):
        resumed = download(job.url, job.part, total=job.source.bytes, patience=patience, progress=progress)
        digest = _hash(job.part, job.checksum or "sha256:")
        if job.checksum in (None, digest):
            return digest
        discard(job.part)
        if not (again and resumed):  # bytes of an earlier day may be wrong: once more, from the start
            break
    raise DataError(
        f"{job.url} gave a file with {digest}, and the manifest says {job.checksum}: it was damaged on the way, or is "
        "another version. Nothing was kept; try again, or see the data set's homepage"
    )


def _hash(path: Path, checksum: str) -> str:
    algorithm = checksum.partition(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _place(part: Path, target: Path) -> Path:
    """Move a whole file to its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def _unpack(manifest: Manifest, job: _Download, data: Path) -> str:
    """Unpack the members that the manifest names; first all are looked at, and nothing is written if one is refused."""
    specs = [spec for spec in manifest.files.values() if spec.archive == job.name]
    with open_tar(job.part, UNPACKED_LIMIT) as tar:
        sizes = {name: tar.size for name in iter(tar.next, None) if _wanted(name, specs)}
    _require_space(data, sum(sizes.values()), "unpack")
    work = job.part.with_suffix(".unpacked")
    shutil.rmtree(work, ignore_errors=True)
    digests = {}
    with open_tar(job.part, UNPACKED_LIMIT) as tar:
        while (name := tar.next()) is not None:
            if name in sizes:
                digests[name] = _write(tar.chunks(), work / name)
    for name in digests:
        _place(work / name, data / name)
    shutil.rmtree(work, ignore_errors=True)
    for spec in specs:
        find_files(manifest, spec, data)  # refuses an archive that lacks one
    write_json(_receipt(job, data), {"url": job.url, "checksum": job.checksum, "sha256": digests})
    return f"{len(digests)} file(s) from {PurePosixPath(urlsplit(job.url).path).name}"


def _write(chunks: Iterator[bytes], path: Path) -> str:
    """Write a file; its SHA-256."""
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; free some space") from error
    return digest.hexdigest()


def _wanted(name: str, specs: list[FileSpec]) -> bool:
    """Whether a member is a file of the manifest's: so none can take the place of another data set's."""
    path = PurePosixPath(name)
    return any(
        path.match(spec.glob) if spec.glob is not None else name == spec.path or name.startswith(f"{spec.path}/")
        for spec in specs
    )


def _is_unpacked(manifest: Manifest, job: _Download, data: Path) -> bool:
    """Whether all that was unpacked from this very archive is still there and unchanged."""
    receipt = _receipt(job, data)
    if not receipt.is_file():
        return False
    unpacked: dict[str, Any] = read_json(receipt)
    if unpacked["checksum"] != job.checksum or unpacked["url"] != job.url:
        return False
    paths = {data / name: digest for name, digest in unpacked["sha256"].items()}
    return all(path.is_file() and sha256_file(path) == digest for path, digest in paths.items())


def _receipt(job: _Download, data: Path) -> Path:
    return data / WORK / f"{job.name}.json"


def _require_space(data: Path, needed: int, purpose: str) -> None:
    free = shutil.disk_usage(data).free
    if needed and needed + MARGIN > free:
        raise DataError(
            f"{data} has {free / 1e9:,.2f} GB free, and {needed / 1e9:,.2f} GB are needed to {purpose} this; free some "
            "space or give another folder with --data. What has arrived is kept"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def _alone(data: Path) -> Iterator[None]:
    """One fetch at a time into a folder: two would write the same parts."""
    try:
        (data / WORK).mkdir(parents=True, exist_ok=True)
        with FileLock(data / WORK / "lock", timeout=0):
            yield
    except Timeout as error:
        raise DataError(f"another `mpl data fetch` works in {data}; wait for it to end") from error
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DataError(f"{data} cannot be written: {error.strerror or error}; give another folder") from error
