"""Copies among images of less than 16 pixels: no detail to go by, so the luminance is compared as it is, and mirrored.

Whole numbers again (see `pipeline.pool.copy_candidates`), so that the answer is the same in any batch.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.pool.copy_candidates import load_faiss
from pipeline.pool.copy_thumbnails import LEAST, LUMA

NORM = 2048


class SmallIndex:
    """The evaluation images (N, S, S, 3), uint8, S < 16, with all their pixels."""

    def __init__(self, images: NDArray[np.uint8]):
        self._side = images.shape[1]
        self._index = load_faiss().IndexFlatIP(self._side**2)
        self._vectors = _vectors(images)  # (N, S, S)
        self._index.add(self._vectors.reshape(len(images), -1))

    def __getstate__(self) -> dict[str, Any]:
        return {"_side": self._side, "_vectors": self._vectors.astype(np.int16)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._side, self._vectors = state["_side"], state["_vectors"].astype(np.float32)
        self._index = load_faiss().IndexFlatIP(self._side**2)
        self._index.add(self._vectors.reshape(-1, self._side**2))

    def find(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
        """The nearest of each image (n, S, S, 3), the correlation in [−1, 1], 0 for flat images, and whether it is
        mirrored.

        Raises:
            ValueError: they have another size than the evaluation images.
        """
        if images.shape[1] != self._side:
            raise ValueError(f"images of {images.shape[1]} pixels, evaluation images of {self._side}")
        load_faiss().omp_set_num_threads(torch.get_num_threads())
        seen = _vectors(images)
        both = np.stack([seen, seen[:, :, ::-1]], 1)  # (n, 2, S, S)
        score, place = self._index.search(both.reshape(2 * len(images), -1), 1)
        score, place = score.reshape(-1, 2).astype(np.float64), place.reshape(-1, 2)
        mirrored = score[:, 1] > score[:, 0]
        row = np.arange(len(images))
        index = place[row, mirrored.astype(int)]
        norms = np.sqrt(_squares(seen) * _squares(self._vectors[index]))
        return index, score[row, mirrored.astype(int)] / np.maximum(norms, 1), mirrored


def _vectors(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, S, S, 3) → (n, S, S): luminance less its mean, of norm 2048, in whole numbers; flat ones 0."""
    grey = images.astype(np.int64) @ np.array(LUMA)  # 256ths of a grey level
    count = grey.shape[1] ** 2
    centred = (grey * count - grey.sum((1, 2), keepdims=True)).astype(np.float64)
    norm = np.sqrt(_squares(centred))[:, None, None]
    flat = norm < LEAST * 256 * count**1.5
    return np.where(flat, 0, np.rint(centred * (NORM / np.maximum(norm, 1)))).astype(np.float32)


def _squares(values: NDArray[Any]) -> NDArray[np.float64]:
    """Sums of squares of (n, S, S), (n,)."""
    return np.square(values, dtype=np.float64).sum((1, 2))
