"""Files, on disk or in object storage, that appear whole or not at all; and their fingerprints.

A `Location` is a `pathlib.Path`, or for a URL (`s3://bucket/pool`) a `UPath`, which has the same methods over
fsspec. Read through `opened`, write through `whole_file`, and both kinds behave the same.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from upath import UPath

from pipeline.errors import DataError, RunError

Location = Path | UPath

SEAL = "content_sha256"  # key of a JSON object
CHUNK = 1 << 20  # bytes of either end of a file that `quick_fingerprint` is of

TEMPORARY = re.compile(r"\..*\.mpl\.tmp|\.step-\d+(\.\w+)?\.tmp")  # of what is not whole yet
UPLOAD = "mpl-upload-"  # of temporary files on their way to object storage
UPLOADING = re.compile(UPLOAD + r"(\d{1,9})-\w+\.mpl\.tmp")
REMOTE = frozenset(
    {
        "aiobotocore",
        "aiohttp",
        "botocore",
        "fsspec",
        "gcsfs",
        "adlfs",
        "s3fs",
        "urllib3",
        "httpx",
        "httpx2",
        "httpcore",
        "huggingface_hub",
    }
)


def location(place: str | Location) -> Location:
    """A path on disk, or a place in object storage where `place` is a URL.

    Raises:
        DataError: nothing that is installed understands URLs of this kind.
    """
    if not isinstance(place, str) or "://" not in place:
        return Path(place) if isinstance(place, str) else place
    if place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    try:
        path = UPath(place)
        path.fs  # noqa: B018  (imports the implementation)
    except (ImportError, ValueError) as error:
        hint = "; please install s3fs (pip install 'reduced-mpl[s3]')" if place.startswith("s3://") else ""
        raise DataError(f"{place} cannot be used: {error}{hint}") from error
    return path


def is_local(place: Location) -> bool:
    """Whether it lies on a disk of this machine."""
    return isinstance(place, Path)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Failures of object storage become OSError, whatever library they come from."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] in REMOTE:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        raise


def is_storage_error(error: BaseException) -> bool:
    """Whether it comes from a library of object storage, directly or by way of other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.partition(".")[0] in REMOTE:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def opened(place: Location, *, random: bool = False) -> Iterator[IO[bytes]]:
    """Open for reading bytes; seekable.

    Args:
        place: the file.
        random: pieces here and there are wanted; in object storage nothing is then read ahead of them.

    Raises:
        OSError: it is not there, or cannot be read; so also inside the `with`, on a dropped connection
            that stays so through the retries of the storage's library.
    """
    with storage_errors():
        if isinstance(place, Path):
            file: IO[bytes] = place.open("rb")
        else:
            file = place.fs.open(place.path, "rb", **({"cache_type": "none"} if random else {}))
        with file:
            yield file


def read_at_most(place: Location, limit: int) -> bytes:
    """The bytes of a plain file, and no more than `limit` of one on disk.

    Raises:
        OSError: it cannot be read, or is no plain file (a pipe would be waited for, a device has no end).
    """
    if not isinstance(place, Path):
        with storage_errors():
            return place.read_bytes()
    if not stat.S_ISREG(place.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    with place.open("rb") as file:
        return file.read(limit)


@contextmanager
def whole_file(path: Location) -> Iterator[Path]:
    """Yield a temporary path on disk; on a clean exit its content appears at `path` at once.

    On disk it lies beside `path`, and is synced and renamed into place; in object storage it is uploaded (an
    object appears when its upload is complete). On any exception, a full disk included, the temporary file is
    removed and `path` is as it was.

    Raises:
        RunError: the place cannot be written (the disk is full, a parent is a file, storage refuses, …).
    """
    temporary: Path | None = None
    try:
        local = isinstance(path, Path)
        folder = path.parent if isinstance(path, Path) else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}." if local else f"{UPLOAD}{os.getpid()}-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".mpl.tmp", dir=folder)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if isinstance(path, Path):
            _move_into_place(temporary, path)
        else:
            with storage_errors():
                path.fs.put_file(str(temporary), path.path)
    except OSError as error:
        by_way_of = "" if isinstance(path, Path) else f" (by way of {tempfile.gettempdir()})"
        unwritten = RunError(
            f"cannot write {path}{by_way_of}: {error.strerror or error}. What was there before is untouched; "
            "free some space or choose a place that can be written, then run the same command again"
        )
        unwritten.resumable = True
        raise unwritten from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(*folders: Location) -> None:
    """Remove what a killed process left of files that it was writing into these folders, or uploading from here.

    Only for someone who holds the lock on the folders: no other process is writing there.
    """
    for folder in folders:
        if isinstance(folder, Path):
            for path in folder.glob(".*.mpl.tmp"):
                path.unlink(missing_ok=True)
    for path in Path(tempfile.gettempdir()).glob(f"{UPLOAD}*"):
        ours = UPLOADING.fullmatch(path.name)
        if ours and not _is_alive(int(ours[1])):
            with suppress(OSError):  # gone, or of another user
                path.unlink()


def names_in(folder: Location) -> set[str]:
    """Names of what lies in a folder; none where there is no such folder."""
    with storage_errors(), suppress(FileNotFoundError, NotADirectoryError):
        if isinstance(folder, Path):
            return {path.name for path in folder.iterdir()}
        folder.fs.invalidate_cache()  # a listing may be older than what workers have written
        return {str(name).rstrip("/").rsplit("/", 1)[-1] for name in folder.fs.ls(folder.path, detail=False)}
    return set()


def discard(*places: Location) -> None:
    """Remove files and whole folders; what is not there is no error."""
    for place in places:
        if isinstance(place, Path):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        else:
            with storage_errors(), suppress(FileNotFoundError):
                place.fs.rm(place.path, recursive=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move_into_place(temporary: Path, path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide results from colleagues
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system allows it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_text(path: Location, text: str) -> None:
    """Write `text` (UTF-8) whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Location, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_sealed(path: Location, value: dict[str, Any]) -> None:
    """Write a JSON object with the fingerprint of its content, so that damage and edits show when it is read."""
    content = json.loads(json.dumps({key: value[key] for key in value if key != SEAL}, allow_nan=False))
    write_json(path, content | {SEAL: fingerprint(content)})


def unsealed(value: Any) -> Any:
    """What `write_sealed` was given; other values, and objects of former versions, as they are.

    Raises:
        ValueError: the content was changed since.
    """
    if not isinstance(value, dict) or SEAL not in value:
        return value
    content = {key: value[key] for key in value if key != SEAL}
    if fingerprint(content) != value[SEAL]:
        raise ValueError("its content is not what was written")
    return content


def sha256_file(path: Location) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typed for files on disk alone


def quick_fingerprint(path: Location) -> str:
    """Size plus SHA-256 of the first and last MiB: cheap for shards of any size.

    A Parquet footer and a tar's end lie in the last MiB, so a file cut short or written anew differs.
    It does not see a change of equal length in the middle of a large file. In object storage, size and ETag
    where there is one: a single request, and a change anywhere shows.
    """
    if not isinstance(path, Path):
        with storage_errors():
            path.fs.invalidate_cache()  # a listing may be older than the object
            info = path.fs.info(path.path)
        if tag := info.get("ETag") or info.get("etag"):
            return fingerprint(["etag", info["size"], str(tag)])
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        file.seek(0)
        digest.update(file.read(CHUNK))
        file.seek(max(0, size - CHUNK))
        digest.update(file.read(CHUNK))
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys, hexadecimal: equal settings, equal fingerprint."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Location) -> Any:
    """Read JSON, sealed or not.

    Raises:
        RunError: the file is missing, cut short or edited into something else.
    """
    try:
        with opened(path) as file:
            return unsealed(json.loads(file.read()))
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it and run the stage again") from error
