"""What a distribution cannot show of an image: an embedding of it, stored beside, as a further input of a calibrator.

The raw one is what the teacher's last layer sees, or a column of the predictions. It is reduced to its principal
directions on the pool, and scaled so that a number of it is 1 in the mean square.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError
from pipeline.storage.files import Location, opened, whole_file
from pipeline.storage.tables import fixed_binary
from pipeline.targets.files import EMBEDDING_ITEM

REDUCTION_FILE = "embedding.safetensors"
SAMPLE = 4096  # images that the directions are found on
LARGEST = 6e4  # of a number, as float16 holds it


class Embedder(Protocol):
    """Gives raw embeddings of images."""

    def embed(self, split: str, shard: str, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """Of images of one shard, (n, D), finite.

        Raises:
            DataError: one has none.
        """
        ...

    def placed(self, worker: int, threads: int) -> "Embedder":
        """For one of several workers."""
        ...

    def without_weights(self) -> "Embedder":
        """The same, for workers that do not ask it."""
        ...


@dataclass(frozen=True, eq=False)
class Reduction:
    """(n, D) → (n, E): e = (x − mean) · directions.

    Attributes:
        mean: (D,), float64.
        directions: (D, E), float64: orthogonal, of one length.
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]

    @classmethod
    def fit(cls, raw: NDArray[np.floating[Any]], numbers: int) -> "Reduction":
        """Of the embeddings of n images, (n, D): their first principal directions, at most `numbers`.

        Raises:
            DataError: they do not differ.
        """
        values = raw.astype(np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        _, scales, directions = np.linalg.svd(centred, full_matrices=False)  # (k,), (k, D)
        kept = min(numbers, int((scales > 1e-6 * scales[:1]).sum())) if len(scales) else 0
        if not kept:
            raise DataError(f"the embeddings of {len(raw)} images do not differ, and say nothing of them")
        directions = directions[:kept]
        directions *= np.sign(directions[np.arange(kept), np.abs(directions).argmax(axis=1)])[:, None]  # of two signs
        size = np.sqrt(np.square(scales[:kept]).sum() / (len(raw) * kept))
        return cls(mean, directions.T / size)

    @property
    def numbers(self) -> int:
        """E."""
        return self.directions.shape[1]

    def __call__(self, raw: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """(n, E) of (n, D)."""
        return (raw.astype(np.float64) - self.mean) @ self.directions

    def save(self, path: Location, fingerprint: str) -> None:
        """Write it, whole or not at all; `fingerprint` of the store."""
        arrays = {name: np.ascontiguousarray(array) for name, array in vars(self).items()}
        with whole_file(path) as temporary:
            save_file(arrays, temporary, {"fingerprint": fingerprint})


def read_reduction(path: Location, fingerprint: str) -> Reduction | None:
    """What a store with this fingerprint has; None where there is none, or it is another's or damaged."""
    try:
        with opened(path) as file:
            data = file.read()
        size = int.from_bytes(data[:8], "little")
        if json.loads(data[8 : 8 + size])["__metadata__"]["fingerprint"] != fingerprint:
            return None
        return Reduction(**load(data))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, eq=False)
class Embedding:
    """What is stored of an image: its reduced embedding."""

    source: Embedder
    reduction: Reduction

    def of(self, split: str, shard: str, samples: Sequence[Sample]) -> NDArray[np.float16]:
        """Of images of one shard, (n, E)."""
        if not samples:
            return np.empty((0, self.reduction.numbers), np.float16)
        return np.clip(self.reduction(self.source.embed(split, shard, samples)), -LARGEST, LARGEST).astype(np.float16)

    def placed(self, worker: int, threads: int) -> "Embedding":
        """For one of several workers."""
        return Embedding(self.source.placed(worker, threads), self.reduction)

    def without_weights(self) -> "Embedding":
        """The same, for workers that do not ask it."""
        return Embedding(self.source.without_weights(), self.reduction)


def embedding_column(
    embedding: Embedding | None, split: str, shard: str, samples: Sequence[Sample]
) -> dict[str, pa.Array]:
    """The column of some images of a shard, by its name; nothing where there are no embeddings."""
    if embedding is None:
        return {}
    return {"embedding": fixed_binary(embedding.of(split, shard, samples).astype(EMBEDDING_ITEM))}
