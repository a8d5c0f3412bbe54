"""Small pictures of a few images of a data set, as data: URIs. The original bytes are never embedded."""

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.decode import decode
from pipeline.data.readers.shard import Chosen, Sample, Shard, Window
from pipeline.data.readers.webdataset import TarShard
from pipeline.errors import UserError

LARGEST = 96  # pixels, side of a picture
LOSSLESS = 32  # pixels, side up to which pictures are PNG: JPEG would blur what there is
GAP = 64  # rows that are rather read than jumped over
JUMPS = 16  # in a shard, at most: each may begin with reading a row group anew
Place = tuple[str, str, int]  # split, shard, row


@dataclass
class Pictures:
    """Pictures by place.

    Attributes:
        uris: of the images that could be read.
        notes: what could not, for people.
        shards: that were opened.
    """

    uris: dict[Place, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shards: int = 0


def take_pictures(
    wanted: Iterable[tuple[Place, str | None]],
    shards_of: Callable[[str], Mapping[str, Shard]],
    size: int,
    changed: Callable[[str, Shard], bool],
) -> Pictures:
    """Read each shard that is needed once, and make a picture of each image that is wanted.

    Args:
        wanted: places, each with the key that must be found there (None: any).
        shards_of: the shards of a split by name.
        size: side in pixels at which images are looked at; pictures are not larger than LARGEST.
        changed: whether a split's shard is no longer the one that was scored.
    """
    pictures = Pictures()
    for split, by_shard in _grouped(wanted).items():
        try:
            shards = shards_of(split)
        except UserError as error:
            pictures.notes.append(f"No pictures from the {split} split: {error}")
            continue
        gone = [name for name in by_shard if name not in shards]
        if gone:
            pictures.notes.append(f"No pictures from {_named(gone)}: no longer in the {split} split")
        for name in sorted(by_shard.keys() & shards.keys()):
            try:
                if changed(split, shards[name]):
                    pictures.notes.append(f"No pictures from {name}: it has changed since it was scored")
                    continue
                pictures.shards += 1
                for sample in _samples(shards[name], by_shard[name].keys()):
                    key = by_shard[name][sample.row]
                    if key is not None and key != sample.key:
                        pictures.notes.append(
                            f"No pictures from {name}: row {sample.row} is now {sample.key}, was {key}"
                        )
                        break
                    if uri := picture(sample.data, min(size, LARGEST)):
                        pictures.uris[split, name, sample.row] = uri
            except (UserError, OSError) as error:
                pictures.notes.append(f"Some pictures from {name} are missing: {error}")
    return pictures


def picture(data: bytes, size: int) -> str | None:
    """A data: URI of `size` × `size` pixels made from an encoded image; None where it does not decode."""
    pixels, _, _ = decode(data, size)
    return None if pixels is None else data_uri(pixels)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """(S, S, 3) → PNG for small pictures, else JPEG, as a data: URI."""
    grey = bool((pixels[..., :1] == pixels).all())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    buffer = io.BytesIO()
    if len(pixels) <= LOSSLESS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=85, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _grouped(wanted: Iterable[tuple[Place, str | None]]) -> dict[str, dict[str, dict[int, str | None]]]:
    """The keys by split, shard and row."""
    groups: dict[str, dict[str, dict[int, str | None]]] = defaultdict(lambda: defaultdict(dict))
    for (split, shard, row), key in wanted:
        groups[split][shard][row] = groups[split][shard].get(row) or key
    return groups


def _samples(shard: Shard, rows: Collection[int]) -> Iterator[Sample]:
    """The samples at these rows; one pass, with jumps where the shard can jump."""
    while isinstance(shard, Window | Chosen):
        shard = shard.shard  # a sample keeps its row, which is its place in the whole one
    for run in _runs(sorted(rows), 1 if isinstance(shard, TarShard) else JUMPS):
        for sample in shard.read(run[0], run[-1] + 1):
            if sample.row in rows:
                yield sample


def _runs(rows: list[int], most: int) -> list[list[int]]:
    """Increasing rows cut at the widest gaps into at most `most` runs."""
    gaps = np.diff(rows)
    wide = [int(gap) for gap in np.argsort(-gaps, kind="stable")[: most - 1] if gaps[gap] > GAP]
    cuts = [0, *sorted(gap + 1 for gap in wide), len(rows)]
    return [rows[a:b] for a, b in pairwise(cuts)]


def _named(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3:,} more shards" if len(names) > 3 else "")
