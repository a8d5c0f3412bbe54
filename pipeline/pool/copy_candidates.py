"""Which evaluation images a picture could be a copy of, and in which window: a search among thumbnails.

A thumbnail is the low frequencies (a discrete cosine transform, without the mean) of a window of the luminance,
weighted by frequency, because photographs have most of their strength in the lowest, where all skies and lawns look
alike. Of an evaluation image there is one, of the inner 25 of 32 pixels. Of a pool image there are several: the inner
window, windows beside it, larger and smaller ones, each as it is and mirrored (which only changes signs), so that
shifted and trimmed copies, or those with a frame, have one that shows what the evaluation image's shows.

Thumbnails are rounded to whole numbers whose products add up to less than 2²⁴: float32 arithmetic on them is exact in
any order, so that the search gives the same answer in any batch and with any number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UsageError

SIDE = 32  # pixels at which images are compared; others are brought to it
INNER = 25.0  # side of the window
FREQUENCIES = 8  # each way; of these, the ones nearer than 8 to the mean
SAMPLES = 16  # of a window each way
SHIFTS = (-2.4, 0.0, 2.4)
ZOOMS = (1.14, 1.28, 0.85)
NORM = 2048.0
LUMA = (77, 150, 29)  # of 256; ITU-R BT.601
INVERTED_LISTS = 4096  # evaluation images from which not all of them are looked at
"""What is below costs nothing to search through; see benchmarks/copies.py."""


class Candidates(NamedTuple):
    """Of n images the m likeliest originals, likeliest first; places without one have `score` −1.

    Attributes:
        index: of the evaluation image, (n, m), int64.
        view: which view of the image agreed, (n, m), int64.
        score: correlation of the thumbnails, (n, m), float32.
    """

    index: Tensor
    view: Tensor
    score: Tensor


class View(NamedTuple):
    """A way to look at a pool image: turned, then a window of it."""

    transposed: bool
    mirrored: bool
    flipped: bool
    negative: bool
    x: float
    y: float
    zoom: float


def luminance(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, S, S, 3) → (n, 32, 32), uint8; exact, so the same in any batch."""
    size = images.shape[1]
    result = np.empty((len(images), SIDE, SIDE), np.uint8)
    weights, total = _resampling(size)
    for at in range(0, len(images), max(1, (1 << 22) // (size * size * 3))):
        part = images[at : at + max(1, (1 << 22) // (size * size * 3))]
        grey = part[..., 0] * np.uint16(LUMA[0])
        grey += part[..., 1] * np.uint16(LUMA[1])
        grey += part[..., 2] * np.uint16(LUMA[2])
        if size == SIDE:
            result[at : at + len(part)] = (grey + 128) >> 8
            continue
        exact = torch.from_numpy(grey.astype(np.float64))
        small = weights @ exact @ weights.T
        result[at : at + len(part)] = (small / (256 * total * total)).round().clamp(0, 255).to(torch.uint8).numpy()
    return result
