"""Copies among images of less than 16 pixels: no detail to go by, so the luminance is compared as it is, and mirrored.

Whole numbers again (see `pipeline.pool.copies.candidates`), so that the answer is the same in any batch.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.pool.copies.candidates import load_faiss
from pipeline.pool.copies.thumbnails import LEAST, LUMA

NORM = 2048
NEAREST = 4  # looked at exactly


class SmallIndex:
    """The evaluation images (N, S, S, 3), uint8, S < 16, with all their pixels."""

    def __init__(self, images: NDArray[np.uint8]):
        self._side = images.shape[1]
        self._centred = _centred(images)  # (N, S²)
        self._index = _indexed(self._centred)

    def __getstate__(self) -> dict[str, Any]:
        return {"_side": self._side, "_centred": self._centred.astype(np.int32)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._side, self._centred = state["_side"], state["_centred"].astype(np.float64)
        self._index = _indexed(self._centred)

    def find(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
        """The nearest of each image (n, S, S, 3), the correlation in [−1, 1], 0 for flat images, and whether it is
        mirrored.

        Raises:
            ValueError: they have another size than the evaluation images.
        """
        if images.shape[1] != self._side:
            raise ValueError(f"images of {images.shape[1]} pixels, evaluation images of {self._side}")
        near, alike = self._nearest(images, NEAREST)
        best = alike.argmax(1)[:, None]
        index = np.take_along_axis(near, best, 1)[:, 0]
        return index, np.take_along_axis(alike, best, 1)[:, 0], best[:, 0] >= near.shape[1] // 2

    def ranked(self, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The `count` best of each image (n, S, S, 3), best first, and their correlations, both (n, count)."""
        near, alike = self._nearest(images, count)
        order = np.argsort(-alike, axis=1, kind="stable")
        near, alike = np.take_along_axis(near, order, 1), np.take_along_axis(alike, order, 1)
        again = (near[:, :, None] == near[:, None, :]) & np.tri(near.shape[1], k=-1, dtype=bool)
        first = np.argsort(again.any(2), axis=1, kind="stable")[:, :count]
        alike = np.where(np.take_along_axis(again.any(2), first, 1), 0.0, np.take_along_axis(alike, first, 1))
        missing = ((0, 0), (0, count - first.shape[1]))
        return np.pad(np.take_along_axis(near, first, 1), missing), np.pad(alike, missing)

    def _nearest(self, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The nearest of each image as it is, then of its mirror image, and their correlations, (n, 2 · count)."""
        load_faiss().omp_set_num_threads(torch.get_num_threads())
        n = len(images)
        seen = np.stack([_centred(images), _centred(images[:, :, ::-1])], 1)  # (n, 2, S²)
        _, near = self._index.search(_scaled(seen.reshape(2 * n, -1)), min(count, self._index.ntotal))
        near = np.sort(near.reshape(n, 2, -1), axis=2)  # of equal ones, the first
        there = self._centred[near]  # (n, 2, k, S²)
        norms = np.sqrt(np.square(seen).sum(2, keepdims=True) * np.square(there).sum(3))
        alike = (seen[:, :, None] * there).sum(3) / np.maximum(norms, 1)
        return near.reshape(n, -1), alike.reshape(n, -1)


def _centred(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, S, S, 3) → (n, S²): luminance less its mean, times 256 S², in whole numbers; flat ones 0."""
    grey = (images.astype(np.int64) @ np.array(LUMA)).reshape(len(images), -1)
    count = grey.shape[1]
    centred = (grey * count - grey.sum(1, keepdims=True)).astype(np.float64)
    flat = np.square(centred).sum(1, keepdims=True) < (LEAST * 256 * count) ** 2 * count
    return np.where(flat, 0, centred)


def _scaled(centred: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of norm 2048, in whole numbers."""
    norm = np.sqrt(np.square(centred).sum(1, keepdims=True))
    return np.rint(centred * (NORM / np.maximum(norm, 1))).astype(np.float32)


def _indexed(centred: NDArray[np.float64]) -> Any:
    index = load_faiss().IndexFlatIP(centred.shape[1])
    index.add(_scaled(centred))
    return index
