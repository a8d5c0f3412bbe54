"""The embedded data set: scikit-learn's handwritten digits, and pieces of photographs that are none.

1,797 real 8×8 images in 17 grey levels. The partition is fixed and stratified: 5 of each class are
labelled, 30 validate, 50 test, the rest is the pool, where 400 pieces of scikit-learn's two
photographs join them. For draws of other labels, `train` has the labelled and the pool's digits together, and
`photographs` the pieces. Such a piece has the very grey levels of one of the pool's digits, placed in the
order of its own brightness, so that their histograms are the same and only their shapes differ.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.readers.shard import NO_LABEL, Sample, Shard
from pipeline.errors import DataError
from pipeline.seeds import permutation

CLASSES = 10
SIDE = 8  # pixels
LEVELS = 16  # the digits' grey levels are 0 … 16
PER_CLASS = {"labelled": 5, "validation": 30, "test": 50}  # the rest of each class is the pool
FOR_DRAWS = ("train", "photographs")
PHOTO_PIECES = 400
POOL_SHARDS = 2
FLAT = 4.0  # grey levels of 255: pieces with a smaller standard deviation (sky) are passed over


class _Subset(NamedTuple):
    images: np.ndarray  # uint8 (N, 8, 8)
    labels: np.ndarray  # int64 (N,), -1 for a piece of a photograph
    keys: list[str]


@dataclass(frozen=True)
class DigitsShard(Shard):
    """One subset of the embedded data set, or one of the pool's two halves."""

    name: str
    subset: str
    index: int = 0
    with_labels: bool = True

    def rows(self) -> int:
        return len(self._subset().keys)

    def fingerprint(self) -> str:
        subset = self._subset()  # of pixels: the PNG bytes may differ from one zlib to the next
        return hashlib.sha256(subset.images.tobytes() + subset.labels.tobytes()).hexdigest()

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        subset = self._subset()
        for row in range(*slice(start, stop).indices(len(subset.keys))):
            label = int(subset.labels[row]) if self.with_labels else NO_LABEL
            yield Sample(row, subset.keys[row], _png(subset.images[row]), label)

    def class_names(self) -> tuple[str, ...]:
        return tuple(str(digit) for digit in range(CLASSES))

    def _subset(self) -> _Subset:
        whole = _partition()[self.subset]
        if self.subset != "pool":
            return whole
        half = slice(self.index, None, POOL_SHARDS)
        return _Subset(whole.images[half], whole.labels[half], whole.keys[half])


def digits_shards(subset: str, with_labels: bool) -> list[DigitsShard]:
    """The shards of `labelled`, `validation`, `test`, `train`, `photographs` (one each) or `pool` (two)."""
    if subset == "pool":
        return [DigitsShard(f"pool-{i:05d}", subset, i, with_labels) for i in range(POOL_SHARDS)]
    if subset not in (*PER_CLASS, *FOR_DRAWS):
        known = ", ".join([*PER_CLASS, *FOR_DRAWS])
        raise DataError(f"the digits have no subset {subset!r}; there are {known} and pool")
    return [DigitsShard(subset, subset, with_labels=with_labels)]


@cache
def _partition() -> dict[str, _Subset]:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values.reshape(-1, SIDE, SIDE) * (255 / LEVELS)).astype(np.uint8)
    order = permutation(len(labels), 0, "digits", "partition")
    classes = [order[labels[order] == digit] for digit in range(CLASSES)]
    subsets, start = {}, 0
    for name, count in PER_CLASS.items():
        rounds = [rows[start : start + count] for rows in classes]
        # One of each class in turn, so that every prefix of 10·n rows is balanced.
        subsets[name] = _digits(images, labels, np.stack(rounds, axis=1).ravel())
        start += count
    rest = _digits(images, labels, np.concatenate([rows[start:] for rows in classes]))
    pieces = _photo_pieces(rest.images)
    few = subsets["labelled"]
    subsets["train"] = _shuffled(few, rest, "train")
    subsets["photographs"] = pieces
    subsets["pool"] = _shuffled(rest, pieces, "pool")
    return subsets


def _digits(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> _Subset:
    return _Subset(images[rows], labels[rows].astype(np.int64), [f"digit-{row:04d}" for row in rows])


def _shuffled(one: _Subset, other: _Subset, name: str) -> _Subset:
    images = np.concatenate([one.images, other.images])
    labels = np.concatenate([one.labels, other.labels])
    keys = one.keys + other.keys
    order = permutation(len(keys), 0, "digits", name)
    return _Subset(images[order], labels[order], [keys[row] for row in order])


def _photo_pieces(digits: np.ndarray) -> _Subset:
    pieces, keys = [], []
    for name, photo in _photographs():
        for y in range(0, photo.shape[0] - SIDE + 1, SIDE):
            for x in range(0, photo.shape[1] - SIDE + 1, SIDE):
                if (piece := photo[y : y + SIDE, x : x + SIDE]).std() >= FLAT:
                    pieces.append(piece)
                    keys.append(f"photo-{name}-{y:03d}-{x:03d}")
    chosen = permutation(len(pieces), 0, "digits", "photographs")[:PHOTO_PIECES]
    models = permutation(len(digits), 0, "digits", "grey levels")
    images = [_with_levels_of(pieces[row], digits[models[i]]) for i, row in enumerate(chosen)]
    return _Subset(np.stack(images), np.full(len(chosen), NO_LABEL), [keys[row] for row in chosen])


def _photographs() -> Iterator[tuple[str, np.ndarray]]:
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    for file, pixels in zip(samples.filenames, samples.images, strict=True):
        name = file.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".jpg")
        yield name, np.asarray(Image.fromarray(pixels).convert("L").reduce(2))


def _with_levels_of(piece: np.ndarray, model: np.ndarray) -> np.ndarray:
    """`piece` with the grey values of `model`, the darkest where the piece is darkest, uint8 (8, 8)."""
    ranks = piece.ravel().argsort(kind="stable").argsort(kind="stable")
    return np.sort(model, axis=None)[ranks].reshape(SIDE, SIDE)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
