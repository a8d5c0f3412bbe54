"""What a store is made from, and _manifest.json: what a finished one consists of, and whether its files are those."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pipeline.correction import CORRECTION_FILE, Correction
from pipeline.errors import TargetsError
from pipeline.pool.selection import SelectionFile
from pipeline.storage.files import Location, discard, opened, sha256_file, unsealed, write_sealed
from pipeline.storage.files import fingerprint as fingerprint_of
from pipeline.storage.tables import read_header
from pipeline.targets.files import TARGETS, Dtype, PoolFormat

MANIFEST = "_manifest.json"
REMEDY = TARGETS.remedy
REQUIRED = {"fingerprint", "teacher", "class_names", "dtype", "pool", "labelled"}
THREADS = 4  # that read and hash files; hashing and waiting for storage leave the interpreter's lock
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class StoreSettings:
    """How the store is made.

    Attributes:
        teacher: fingerprint of the teacher.
        labelled: fingerprint of the labelled split.
        dtype: of the stored distributions.
        format: "parquet", or "webdataset": tars with the distributions in files beside them.
        shard_rows: images of a training shard, at most.
        seed: of the shuffle.
        preprocessing: fingerprint of how a teacher that did not score the pool is shown images; None for the one that
            did, whose scores carry it.
        embedding: numbers of each image's embedding, at most; None: there is none.
    """

    teacher: str
    labelled: str
    dtype: Dtype = "float16"
    format: PoolFormat = "parquet"
    shard_rows: int = 20_000
    seed: int = 0
    preprocessing: str | None = None
    embedding: int | None = None


@dataclass(frozen=True)
class Origin:
    """What a store was made from.

    Attributes:
        fingerprint: of all of it.
        teacher: fingerprint of the teacher.
        class_names: of the teacher, in the order of the distributions.
        dtype: of the distributions.
        preprocessing: size, mean, std; told in the manifest.
        correction: from the teacher's classes, which the distributions are over, to the data set's.
    """

    fingerprint: str
    teacher: str
    class_names: Sequence[str]
    dtype: Dtype
    preprocessing: dict[str, Any]
    correction: Correction | None = None


def write_manifest(folder: Location, origin: Origin, counts: dict[str, Any]) -> dict[str, Any]:
    """Write _manifest.json over the files that lie in `folder`, and return it; this completes the store.

    Args:
        folder: targets/.
        origin: of the store.
        counts: further ones, for people.
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
        "format": TARGETS.name,
        "version": TARGETS.version,
        "fingerprint": origin.fingerprint,
        "teacher": origin.teacher,
        "class_names": list(origin.class_names),
        "dtype": origin.dtype,
        "preprocessing": origin.preprocessing,
        **_corrected(folder, origin.correction),
        **counts,
        **kinds,
    }
    write_sealed(folder / MANIFEST, manifest)
    return manifest


def _corrected(folder: Location, correction: Correction | None) -> dict[str, Any]:
    """Write what makes the data set's classes of the stored ones; what the manifest says of it."""
    if correction is None or correction.kind == "identity":
        discard(folder / CORRECTION_FILE)
        return {}
    correction.save(folder / CORRECTION_FILE)
    return {"target_class_names": list(correction.class_names), "correction": correction.fingerprint()}


def read_manifest(folder: Location) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        TargetsError: there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    try:
        with opened(path) as file:
            manifest: dict[str, Any] = unsealed(json.loads(file.read()))
    except FileNotFoundError as error:
        raise TargetsError(f"{folder} is no finished store: {MANIFEST} is missing; run `mpl precompute`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TargetsError(f"{path} cannot be read ({error}); {REMEDY}") from error
    kind, version = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    TARGETS.require(path, {"format": str(kind), "version": str(version)})
    lacking = REQUIRED - manifest.keys()
    if lacking:
        raise TargetsError(f"{path} lacks {', '.join(sorted(lacking))}; {REMEDY}")
    return manifest


def store_fingerprint(selection: SelectionFile, settings: StoreSettings) -> str:
    """Of all that the store is made from."""
    later = ("preprocessing", "embedding")  # as before there were any
    values = {name: value for name, value in asdict(settings).items() if name not in later or value is not None}
    return fingerprint_of(["targets", selection.fingerprint, values])


def is_precomputed(folder: Location, selection: SelectionFile, settings: StoreSettings) -> bool:
    """Whether `folder` holds the finished store of this selection under these settings."""
    try:
        return bool(read_manifest(folder)["fingerprint"] == store_fingerprint(selection, settings))
    except TargetsError:
        return False


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
    header = read_header(path, TARGETS)
    entry = {"name": path.name, "rows": header.rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    if "uses" in header.notes:
        entry["uses"] = int(header.notes["uses"])  # of the pool, in an epoch
    if "tar.bytes" in header.notes:
        name = path.with_suffix(".tar").name
        entry["tar"] = {
            "name": name,
            "bytes": int(header.notes["tar.bytes"]),
            "sha256": header.notes["tar.sha256"],
        }
    return entry


def _check_file(folder: Location, file: dict[str, Any], mark: str, full: bool) -> None:
    path = folder / file["name"]
    entries = [file, file["tar"]] if "tar" in file else [file]
    for entry in entries:
        _check_size(folder / entry["name"], entry)
    header = read_header(path, TARGETS)
    written_as = header.notes.get("file", path.stem)
    if header.rows != file["rows"]:
        raise TargetsError(f"{path} has {header.rows:,} rows, its manifest says {file['rows']:,}; {REMEDY}")
    if header.fingerprint != mark:
        raise TargetsError(f"{path} belongs to another store; {REMEDY}")
    if written_as != path.stem:
        raise TargetsError(f"{path} was written as {written_as}: files were swapped or renamed; {REMEDY}")
    if "tar" in file and header.notes.get("tar.sha256") != file["tar"]["sha256"]:
        raise TargetsError(f"{path} belongs to another tar than {file['tar']['name']}; {REMEDY}")
    for entry in entries if full else ():
        if sha256_file(folder / entry["name"]) != entry["sha256"]:
            raise TargetsError(
                f"{folder / entry['name']} is not the file that was written: its checksum differs; {REMEDY}"
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
