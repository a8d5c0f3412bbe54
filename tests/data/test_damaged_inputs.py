"""Damage to what a person brings – pools, archives, pictures, predictions: a sentence or a status, never a traceback,
and never the end of the process, which the death of a test's worker would show."""

import csv
import io
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.answers.importing import Predictions, import_predictions
from pipeline.answers.reading import find_predictions
from pipeline.correction import class_map_of
from pipeline.data.decode import Status, decode
from pipeline.data.get.found import Source
from pipeline.data.get.importing import import_images
from pipeline.data.readers.parquet import ParquetShard
from pipeline.data.readers.shard import Shard
from pipeline.data.readers.webdataset import TarShard
from pipeline.errors import UserError
from tests.conftest import MemoryShard
from tests.data.made_images import encode, noise, write_parquet
from tests.stages.test_fuzz import damaged

IMAGES = [encode(noise(8, at)) for at in range(24)]
NAMES = ("cat", "dog")
KEYS = tuple(f"{at:03d}.png" for at in range(24))
P = np.random.default_rng(0).dirichlet(np.ones(2), 24).astype(np.float32)


def parquet(path: Path, **options: object) -> None:
    """Images with labels, in pages of another compression."""
    table = pq.read_table(write_parquet(path, IMAGES, [at % 2 for at in range(24)], names=NAMES))
    pq.write_table(table, path, row_group_size=8, **options)


def tar(path: Path, mode: str, form: int) -> None:
    """A WebDataset shard."""
    with tarfile.open(path, mode, format=form) as archive:
        for at, image in enumerate(IMAGES):
            for suffix, data in (("png", image), ("cls", str(at % 2).encode()), ("json", b'{"a": 1}')):
                info = tarfile.TarInfo(f"folder/{at:03d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def zipped(path: Path) -> None:
    """Folders of classes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for at, image in enumerate(IMAGES):
            archive.writestr(f"{NAMES[at % 2]}/{at:03d}.png", image)


def predictions(path: Path) -> None:
    """Of one form or another."""
    if path.suffix == ".parquet":
        table = pa.table({"key": list(KEYS), "probabilities": P.tolist()})
        pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(NAMES)}), path)
    elif path.suffix == ".npz":
        np.savez(path, key=np.array(KEYS), probabilities=P, class_names=np.array(NAMES))
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"key": key, "label": NAMES[at % 2]}) for at, key in enumerate(KEYS)]
        path.write_text("\n".join(lines))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["key", *NAMES], *([key, *p] for key, p in zip(KEYS, P.tolist(), strict=True))])


def pool(shard: Shard) -> None:
    """All that scoring asks of it."""
    shard.fingerprint()
    shard.rows()
    list(shard.identities())
    for sample in shard.read():
        decode(sample.data, 8)


def labelled(shard: Shard) -> None:
    shard.class_names()
    shard.labels()
    list(shard.read())


def imported(path: Path) -> None:
    out = path.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    import_images([Source(path)], out)


def answers(path: Path) -> None:
    folder = path.with_name("answers")
    shutil.rmtree(folder, ignore_errors=True)
    teachers = (tuple(find_predictions(str(path))),)
    splits = {"unlabelled": [MemoryShard("a", tuple(b"x" for _ in KEYS), 0, KEYS)]}
    found = Predictions(teachers, None, None, NAMES)
    import_predictions(folder, path.with_name("scratch"), found, splits, "mark")


def picture(path: Path) -> None:
    pixels, status, _ = decode(path.read_bytes(), 8)
    assert (pixels is not None) == (status is Status.ok)


Maker, Reader = Callable[[Path], None], Callable[[Path], object]
KINDS: dict[str, tuple[str, Maker, Reader]] = {
    "pool in Parquet, snappy": ("a.parquet", parquet, lambda p: pool(ParquetShard("a", p, label=None))),
    "pool in Parquet, zstd, one page": (
        "a.parquet",
        lambda p: parquet(p, compression="zstd", use_dictionary=False, data_page_version="2.0"),
        lambda p: pool(ParquetShard("a", p, label=None)),
    ),
    "labelled Parquet": ("a.parquet", parquet, lambda p: labelled(ParquetShard("a", p))),
    "pool in a tar": ("a.tar", lambda p: tar(p, "w", tarfile.GNU_FORMAT), lambda p: pool(TarShard("a", p))),
    "pool in a tar, pax": ("a.tar", lambda p: tar(p, "w", tarfile.PAX_FORMAT), lambda p: pool(TarShard("a", p))),
    "pool in a tar.gz": ("a.tar.gz", lambda p: tar(p, "w:gz", tarfile.GNU_FORMAT), lambda p: pool(TarShard("a", p))),
    "import of a zip": ("a.zip", zipped, imported),
    "import of a tar": ("a.tar", lambda p: tar(p, "w", tarfile.GNU_FORMAT), imported),
    "import of Parquet": ("a.parquet", parquet, imported),
    "picture, png": ("a.png", lambda p: p.write_bytes(encode(noise(16))), picture),
    "picture, jpeg": ("a.jpg", lambda p: p.write_bytes(encode(noise(16), "JPEG")), picture),
    "picture, webp": ("a.webp", lambda p: p.write_bytes(encode(noise(16), "WEBP")), picture),
    "picture, gif": ("a.gif", lambda p: p.write_bytes(encode(noise(16), "GIF")), picture),
    "predictions in Parquet": ("p.parquet", predictions, answers),
    "predictions in npz": ("p.npz", predictions, answers),
    "predictions in CSV": ("p.csv", predictions, answers),
    "predictions in JSON lines": ("p.jsonl", predictions, answers),
    "class map": (
        "map.yaml",
        lambda p: p.write_text(json.dumps({"cat": ["tabby", "tiger cat"], "dog": "beagle"})),
        lambda p: class_map_of(p, ("tabby", "tiger cat", "beagle"), NAMES, complete=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_a_sentence_or_a_status(tmp_path: Path, kind: str, count: int) -> None:
    name, make, read = KINDS[kind]
    path = tmp_path / name
    make(path)
    read(path)
    whole, chance = path.read_bytes(), random.Random(kind)
    for number in range(count):
        path.write_bytes(damaged(whole, chance))
        try:
            read(path)
        except UserError:
            pass
        except Exception as error:
            shutil.copy(path, tmp_path / f"damage-{number}")
            raise AssertionError(f"damage {number} to {kind} is no sentence: {error!r}") from error
