"""_manifest.json: what a finished store consists of; and whether its files are those."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.errors import TargetsError
from pipeline.storage.files import Location, opened, sha256_file, write_json
from pipeline.targets.layout import FORMAT, MANIFEST, READABLE, REMEDY, VERSION, Dtype
from pipeline.targets.tables import footer

REQUIRED = {"fingerprint", "teacher", "class_names", "dtype", "pool", "labelled"}
THREADS = 4  # that read and hash files; hashing and waiting for storage leave the interpreter's lock
T = TypeVar("T")
R = TypeVar("R")


def write_manifest(
    folder: Location,
    *,
    fingerprint: str,
    teacher: str,
    class_names: Sequence[str],
    dtype: Dtype,
    preprocessing: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write _manifest.json over the files that lie in `folder`, and return it; this completes the store.

    Args:
        folder: targets/.
        fingerprint: of all that the store was made from.
        teacher: fingerprint of the teacher.
        class_names: in order.
        dtype: of the distributions.
        preprocessing: size, mean, std.
        more: counts for people.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for kind in ("pool", "labelled"):
        paths: list[Location] = sorted(folder.glob(f"{kind}-*.parquet"))
        files = in_threads(_entry, paths)
        held = [*files, *(file["tar"] for file in files if "tar" in file)]
        kinds[kind] = {
            "rows": sum(file["rows"] for file in files),
            "bytes": sum(file["bytes"] for file in held),
            "files": files,
        }
    pool = kinds["pool"]["files"]
    kinds["pool"] = {
        "format": "webdataset" if any("tar" in file for file in pool) else "parquet",
        **kinds["pool"],
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "teacher": teacher,
        "class_names": list(class_names),
        "dtype": dtype,
        "preprocessing": preprocessing,
        **more,
        **kinds,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Location) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        TargetsError: there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    try:
        with opened(path) as file:
            manifest: dict[str, Any] = json.loads(file.read())
    except FileNotFoundError as error:
        raise TargetsError(f"{folder} is no finished store: {MANIFEST} is missing; run `mpl precompute`") from error
    except (OSError, ValueError) as error:
        raise TargetsError(f"{path} cannot be read ({error}); {REMEDY}") from error
    kind, version = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if kind != FORMAT or version not in READABLE:
        raise TargetsError(f"{path} is {kind} version {version}, expected {FORMAT} version {VERSION}; {REMEDY}")
    lacking = REQUIRED - manifest.keys()
    if lacking:
        raise TargetsError(f"{path} lacks {', '.join(sorted(lacking))}; {REMEDY}")
    return manifest


def check_files(folder: Location, manifest: dict[str, Any], full: bool) -> None:
    """Compare the files with the manifest; `full` reads them all.

    Raises:
        TargetsError: one is missing, cut short, foreign or changed.
    """
    files = [file for kind in ("pool", "labelled") for file in manifest[kind]["files"]]
    mark = manifest["fingerprint"]
    in_threads(lambda file: _check_file(folder, file, mark, full), files)


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` of every item, in order; the first error is raised."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(work, items))


def _entry(path: Location) -> dict[str, Any]:
    rows, notes = footer(path)
    entry = {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    if "uses" in notes:
        entry["uses"] = int(notes["uses"])  # of the pool, in an epoch
    if "tar.bytes" in notes:
        name = path.with_suffix(".tar").name
        entry["tar"] = {"name": name, "bytes": int(notes["tar.bytes"]), "sha256": notes["tar.sha256"]}
    return entry


def _check_file(folder: Location, file: dict[str, Any], mark: str, full: bool) -> None:
    path = folder / file["name"]
    for one in (file, *([file["tar"]] if "tar" in file else [])):
        _check_size(folder / one["name"], one)
    try:
        rows, notes = footer(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TargetsError(f"{path} is not a whole Parquet file ({error}); {REMEDY}") from error
    if rows != file["rows"]:
        raise TargetsError(f"{path} has {rows:,} rows, its manifest says {file['rows']:,}; {REMEDY}")
    if notes.get("fingerprint") != mark:
        raise TargetsError(f"{path} belongs to another store; {REMEDY}")
    if notes.get("file", path.stem) != path.stem:
        raise TargetsError(f"{path} was written as {notes['file']}: files were swapped or renamed; {REMEDY}")
    if "tar" in file and notes.get("tar.sha256") != file["tar"]["sha256"]:
        raise TargetsError(f"{path} belongs to another tar than {file['tar']['name']}; {REMEDY}")
    for one in (file, *([file["tar"]] if "tar" in file else [])) if full else ():
        if sha256_file(folder / one["name"]) != one["sha256"]:
            raise TargetsError(
                f"{folder / one['name']} is not the file that was written: its checksum differs; {REMEDY}"
            )


def _check_size(path: Location, file: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise TargetsError(f"{path} is missing; {REMEDY}") from error
    except OSError as error:
        raise TargetsError(f"{path} cannot be reached ({error}); run the same command again") from error
    if size != file["bytes"]:
        raise TargetsError(
            f"{path} has {size:,} bytes, its manifest says {file['bytes']:,}: it was cut short or changed; {REMEDY}"
        )
