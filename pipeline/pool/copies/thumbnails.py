"""Thumbnails of windows of a picture, in whole numbers.

A thumbnail is the low frequencies (a discrete cosine transform, without the mean) of a window of the luminance,
weighted by frequency, because photographs have most of their strength in the lowest, where all skies and lawns look
alike.

Everything is computed from whole numbers, exactly, up to one division and rounding for each result, so that a picture
has one thumbnail, whatever stands beside it in a batch. The products of two thumbnails add up to less than 2²⁴, so that
float32 arithmetic on them is exact in any order.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32  # pixels at which images are compared; others are brought to it
LUMA = (77, 150, 29)  # of 256; ITU-R BT.601
SAMPLES = 16  # of a window each way
FREQUENCIES = 7  # each way; of these, the ones nearer than 7 to the mean
WIDTH = 48  # of a thumbnail: 42 numbers, and zeros for the sake of vector instructions
NORM = 127  # of a thumbnail
SCALE = 4096  # of the whole numbers that stand for a window's cosines
LEAST = 1.0  # grey levels of deviation, roughly, below which a window is flat and resembles nothing


class Window(NamedTuple):
    """A part of a picture: centre, from the picture's to the right and down, and sides; in 32nds of its side."""

    x: float
    y: float
    wide: float
    high: float


def luminance(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, S, S, 3) → (n, 32, 32), uint8. In whole numbers until the last division, so the same in any batch."""
    size = images.shape[1]
    weights, total = _resampling(size)
    result = np.empty((len(images), SIDE, SIDE), np.uint8)
    step = max(1, (1 << 20) // (size * size))
    for begin in range(0, len(images), step):
        part = images[begin : begin + step]
        grey = np.multiply(part[..., 0], LUMA[0], dtype=np.uint16)  # stated: NumPy 1 would multiply in uint8
        grey += np.multiply(part[..., 1], LUMA[1], dtype=np.uint16)
        grey += np.multiply(part[..., 2], LUMA[2], dtype=np.uint16)
        if size == SIDE:
            result[begin : begin + step] = (grey + np.uint16(128)) >> 8
        else:
            small = weights @ torch.from_numpy(grey.astype(np.float64)) @ weights.T
            small = (small / (256 * total * total)).round().clamp(0, 255)
            result[begin : begin + step] = small.to(torch.uint8).numpy()
    return result


def thumbnails(grey: NDArray[np.uint8], windows: tuple[Window, ...]) -> NDArray[np.float32]:
    """Of windows of (n, 32, 32) uint8: (n, W, 48), whole numbers, of norm 127; zero if flat."""
    lines, pairs = _lines(windows)
    low, weight = frequencies()
    rows = lines @ torch.from_numpy(grey).double()[:, None]  # (n, L, 7, 32)
    values = torch.stack([(rows[:, down] @ lines[across].T).flatten(1)[:, low] for across, down in pairs], 1) * weight
    norm = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    flat = norm < LEAST * SCALE**2 * SAMPLES
    result = torch.zeros(len(grey), len(windows), WIDTH)
    result[:, :, : len(low)] = torch.where(flat, 0.0, values * (NORM / norm.clamp_min(1e-9))).round()
    return result.numpy()


@cache
def _lines(windows: tuple[Window, ...]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cosines (L, 7, 32) of the windows' sides, whole numbers, and for every window which one across and down."""
    sides = sorted({(w.x, w.wide) for w in windows} | {(w.y, w.high) for w in windows})
    lines = torch.stack([_cosines(centre, side) for centre, side in sides])
    return lines, [(sides.index((w.x, w.wide)), sides.index((w.y, w.high))) for w in windows]


def _cosines(centre: float, side: float) -> Tensor:
    """(7, 32): from a line of 32 pixels to the cosine transform of 16 samples of a stretch of it; edges repeat."""
    edges = np.linspace(-side / 2, side / 2, SAMPLES + 1) + centre + SIDE / 2
    pixel = np.arange(SIDE)
    cover = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)  # (16, 32)
    cover = np.maximum(cover, 0)
    cover[:, 0] += np.maximum(0, np.minimum(edges[1:], 0) - edges[:-1])
    cover[:, -1] += np.maximum(0, edges[1:] - np.maximum(edges[:-1], SIDE))
    cover *= SAMPLES / side
    cosines = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * (np.arange(SAMPLES) + 0.5) / SAMPLES)
    cosines *= np.sqrt(np.where(np.arange(FREQUENCIES) == 0, 1, 2) / SAMPLES)[:, None]
    return torch.from_numpy(np.rint(cosines @ cover * SCALE))


@cache
def frequencies() -> tuple[Tensor, Tensor]:
    """Which of the 7 × 7 products of cosines are in a thumbnail, (42,), and their weights."""
    down, across = np.divmod(np.arange(FREQUENCIES**2), FREQUENCIES)
    far = np.hypot(down, across)
    low = np.flatnonzero((far > 0) & (far < FREQUENCIES))
    return torch.from_numpy(low), torch.from_numpy(far[low])


@cache
def _resampling(size: int) -> tuple[Tensor, int]:
    """Whole-number weights (32, size) that bring a line to 32 pixels, and what each row adds up to: areas for larger
    images, straight lines between pixels for smaller ones."""
    out, pixel = np.arange(SIDE)[:, None], np.arange(size)[None]
    if size >= SIDE:  # in units of a 32nd of a pixel
        cover = np.minimum((out + 1) * size, (pixel + 1) * SIDE) - np.maximum(out * size, pixel * SIDE)
        return torch.from_numpy(np.maximum(cover, 0).astype(np.float64)), size
    place = np.clip((2 * out + 1) * size - SIDE, 0, 2 * SIDE * (size - 1))  # in units of a 64th of a pixel
    near = np.maximum(2 * SIDE - np.abs(place - pixel * 2 * SIDE), 0)
    return torch.from_numpy(near.astype(np.float64)), 2 * SIDE
