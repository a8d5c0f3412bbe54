"""Which evaluation images a picture could be a copy of, and how it lies on them: a search among thumbnails.

A thumbnail is the low frequencies (a discrete cosine transform, without the mean) of a window of the luminance,
weighted by frequency, because photographs have most of their strength in the lowest, where all skies and lawns look
alike. Of a pool image there is one, of its inner window, as it is, mirrored, and turned otherwise (which changes signs
and order only). Of an evaluation image there are many, of windows side by side, larger and smaller ones, so that a
copy that was shifted, trimmed or framed finds one that shows what its inner window shows.

Thumbnails are whole numbers whose products add up to less than 2²⁴: float32 arithmetic on them is exact in any order,
so that the search gives the same answer in any batch and with any number of threads.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UsageError

if TYPE_CHECKING:
    import faiss

SIDE = 32  # pixels at which images are compared; others are brought to it
LUMA = (77, 150, 29)  # of 256; ITU-R BT.601
INNER = 25.0  # side of the window
SAMPLES = 16  # of a window each way
FREQUENCIES = 7  # each way; of these, the ones nearer than 7 to the mean
WIDTH = 48  # of a thumbnail: 42 numbers, and noughts for the sake of vector instructions
NORM = 127  # of a thumbnail
LEAST = 1.0  # grey levels of deviation, roughly, below which a window is flat and resembles nothing
SHIFTS = (-3.0, -1.5, 0.0, 1.5, 3.0)  # pixels
ZOOMS = (0.88, 0.78, 1.2)
NEAREST = 8  # thumbnails asked for
LISTED = 1 << 12  # thumbnails from which on not all are looked at
PROBES = {"windows": 16, "whole": 4}  # lists that are looked at
PER_LIST, ROUNDS = 40, 6  # of k-means


class Turn(NamedTuple):
    """How a pool image may have been turned: first exchanged over its diagonal, then mirrored, then put on its head."""

    diagonal: bool
    mirrored: bool
    headlong: bool
    negative: bool


TURNS = (
    Turn(False, False, False, False),
    Turn(False, True, False, False),  # these two are sought in all windows, the rest in the whole picture alone
    Turn(False, False, True, False),
    Turn(False, True, True, False),
    Turn(True, False, False, False),
    Turn(True, True, False, False),
    Turn(True, False, True, False),
    Turn(True, True, True, False),
    Turn(False, False, False, True),
    Turn(False, True, False, True),
)
COMMON = 2
WINDOWS = tuple((x, y, 1.0) for y in SHIFTS for x in SHIFTS) + tuple((0.0, 0.0, zoom) for zoom in ZOOMS)
WHOLE = WINDOWS.index((0.0, 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class Candidates:
    """Of n images the m likeliest originals, likeliest first; places without one have the score −1.

    Attributes:
        index: of the evaluation image, (n, m), int64.
        window: of the evaluation image, into WINDOWS, (n, m), int64.
        turn: of the pool image, into TURNS, (n, m), int64.
        score: correlation of the thumbnails, (n, m), float32.
    """

    index: Tensor
    window: Tensor
    turn: Tensor
    score: Tensor


class Thumbnails:
    """The thumbnails of N evaluation images, indexed with faiss, and the search among them.

    About 1.6 kB per image: 28 windows of 48 bytes, and their numbers.

    Args:
        grey: luminance, (N, 32, 32), uint8.
    """

    def __init__(self, grey: NDArray[np.uint8]):
        every = max(1, len(grey) * len(WINDOWS) // (PER_LIST * 4096))
        sample = thumbnails(grey[::every]) if len(grey) else np.empty((0, len(WINDOWS), WIDTH), np.float32)
        self._windows = _empty_index(sample.reshape(-1, WIDTH), len(grey) * len(WINDOWS), PROBES["windows"])
        self._whole = _empty_index(sample[:, WHOLE], len(grey), PROBES["whole"])
        for at in range(0, len(grey), 1024):
            part = thumbnails(grey[at : at + 1024])
            self._windows.add(part.reshape(-1, WIDTH))
            self._whole.add(np.ascontiguousarray(part[:, WHOLE]))

    def __getstate__(self) -> dict[str, NDArray[np.uint8]]:
        faiss = _faiss()
        return {name: faiss.serialize_index(index) for name, index in vars(self).items()}

    def __setstate__(self, state: dict[str, NDArray[np.uint8]]) -> None:
        faiss = _faiss()
        for name, data in state.items():
            setattr(self, name, faiss.deserialize_index(data))

    def candidates(self, grey: NDArray[np.uint8], wanted: int) -> Candidates:
        """The `wanted` best of each image (n, 32, 32), uint8, over all turns and windows."""
        n = len(grey)
        order, sign = _turning()
        turned = thumbnails(grey, (WINDOWS[WHOLE],))[:, 0, order] * sign  # (n, T, WIDTH)
        common, place = self._search(self._windows, turned[:, :COMMON])  # (n, 2, k)
        other, at = self._search(self._whole, turned[:, COMMON:])
        score = torch.from_numpy(np.concatenate([common.reshape(n, -1), other.reshape(n, -1)], 1)) / NORM**2
        place = np.concatenate([place.reshape(n, -1), (at * len(WINDOWS) + WHOLE).reshape(n, -1)], 1)
        turn = np.concatenate([np.arange(COMMON).repeat(common.shape[2]), np.arange(COMMON, len(TURNS)).repeat(other.shape[2])])
        return _distinct(torch.from_numpy(place), torch.from_numpy(turn).expand(n, -1), score, wanted)

    def _search(self, index: "faiss.Index", sought: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        _faiss().omp_set_num_threads(torch.get_num_threads())
        nearest = NEAREST if index is self._windows else 1
        score, place = index.search(np.ascontiguousarray(sought).reshape(-1, WIDTH), min(nearest, index.ntotal))
        return (x.reshape(*sought.shape[:2], -1) for x in (score, place))


def _distinct(place: Tensor, turn: Tensor, score: Tensor, wanted: int) -> Candidates:
    """The best of every evaluation image among (n, k) found; equal ones in the order of their places."""
    score = torch.where(place >= 0, score, -1.0)
    order = place.argsort(dim=1, stable=True)
    order = order.gather(1, score.gather(1, order).argsort(dim=1, descending=True, stable=True))
    place, turn, score = (x.gather(1, order) for x in (place.clamp_min(0), turn, score))
    index = place // len(WINDOWS)
    again = (index[:, :, None] == index[:, None, :]).tril(-1).any(2)
    first = again.byte().argsort(dim=1, stable=True)[:, :wanted]
    score = torch.where(again, -1.0, score)
    return Candidates(*(x.gather(1, first) for x in (index, place % len(WINDOWS), turn, score)))


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """Images (n, s, s) of values in [0, 255], each turned as TURNS says."""
    result = images.clone()
    for number, how in enumerate(TURNS):
        if number == 0:
            continue
        which = (turn == number).nonzero()[:, 0]
        if not len(which):
            continue
        part = images[which]
        part = part.transpose(1, 2) if how.diagonal else part
        part = part.flip(2) if how.mirrored else part
        part = part.flip(1) if how.headlong else part
        result[which] = 255 - part if how.negative else part
    return result


def luminance(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, S, S, 3) → (n, 32, 32), uint8. In whole numbers until the last division, so the same in any batch."""
    size = images.shape[1]
    weights, total = _resampling(size)
    result = np.empty((len(images), SIDE, SIDE), np.uint8)
    step = max(1, (1 << 20) // (size * size))
    for at in range(0, len(images), step):
        part = images[at : at + step]
        grey = part[..., 0] * np.uint16(LUMA[0])
        grey += part[..., 1] * np.uint16(LUMA[1])
        grey += part[..., 2] * np.uint16(LUMA[2])
        if size == SIDE:
            result[at : at + step] = (grey + np.uint16(128)) >> 8
        else:
            small = weights @ torch.from_numpy(grey.astype(np.float64)) @ weights.T
            small = (small / (256 * total * total)).round().clamp(0, 255)
            result[at : at + step] = small.to(torch.uint8).numpy()
    return result


def thumbnails(
    grey: NDArray[np.uint8], windows: tuple[tuple[float, float, float], ...] = WINDOWS
) -> NDArray[np.float32]:
    """Of windows (x, y, zoom) of (n, 32, 32) uint8: (n, W, 48), whole numbers, of norm 127; nought if flat."""
    lines, pairs = _lines(windows)
    low, weight = _frequencies()
    exact = torch.from_numpy(grey).double()
    rows = lines @ exact[:, None]  # (n, L, 7, 32)
    found = torch.stack([(rows[:, y] @ lines[x].T).flatten(1)[:, low] for x, y in pairs], 1) * weight
    norm = torch.linalg.vector_norm(found, dim=2, keepdim=True)
    flat = norm < LEAST * SCALE**2 * SAMPLES
    scaled = torch.where(flat, 0.0, found * (NORM / norm.clamp_min(1e-9))).round()
    result = torch.zeros(len(grey), len(windows), WIDTH)
    result[:, :, : len(low)] = scaled
    return result.numpy()


SCALE = 4096  # of the whole numbers that stand for a window's cosines


@cache
def _lines(windows: tuple[tuple[float, float, float], ...]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cosines (L, 7, 32) of the windows' sides, whole numbers, and for every window which one across and down."""
    sides = sorted({(at, zoom) for x, y, zoom in windows for at in (x, y)})
    lines = torch.stack([_cosines(at, INNER * zoom) for at, zoom in sides])
    return lines, [(sides.index((x, zoom)), sides.index((y, zoom))) for x, y, zoom in windows]


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
def _frequencies() -> tuple[Tensor, Tensor]:
    """Which of the 7 × 7 products of cosines are in a thumbnail, (42,), and their weights."""
    down, across = np.divmod(np.arange(FREQUENCIES**2), FREQUENCIES)
    far = np.hypot(down, across)
    low = np.flatnonzero((far > 0) & (far < FREQUENCIES))
    return torch.from_numpy(low), torch.from_numpy(far[low])


@cache
def _turning() -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The thumbnail of a turned image is thumbnail[order[t]] · sign[t]; both (T, 48)."""
    low = _frequencies()[0].numpy()
    down, across = np.divmod(low, FREQUENCIES)
    order = np.tile(np.arange(WIDTH), (len(TURNS), 1))
    sign = np.ones((len(TURNS), WIDTH), np.float32)
    for turn, how in enumerate(TURNS):
        if how.diagonal:
            order[turn, : len(low)] = np.searchsorted(low, across * FREQUENCIES + down)
        odd = across * how.mirrored + down * how.headlong + how.negative
        sign[turn, : len(low)] = 1 - 2 * (odd % 2)
    return order, sign


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


def _empty_index(sample: NDArray[np.float32], expected: int, probes: int) -> "faiss.Index":
    """Exact below LISTED thumbnails; beyond, lists around centres, of which the nearest few are looked at."""
    faiss = _faiss()
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed  # the whole numbers themselves, a byte each
    if expected < LISTED:
        index = faiss.IndexScalarQuantizer(WIDTH, kind, faiss.METRIC_INNER_PRODUCT)
    else:
        lists = 1 << round(np.log2(1.6 * expected**0.5))
        nearest = faiss.IndexFlatIP(WIDTH)
        nearest.add(_centres(sample, lists))
        index = faiss.IndexIVFScalarQuantizer(nearest, WIDTH, lists, kind, faiss.METRIC_INNER_PRODUCT, False)
        index.nprobe = probes
    index.is_trained = True
    return index


def _centres(sample: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """k-means by angle, in whole numbers, so that every machine finds the same centres."""
    sample = np.ascontiguousarray(sample[:: max(1, len(sample) // (PER_LIST * count))])
    centres = sample[np.arange(count) * len(sample) // count]
    for _ in range(ROUNDS):
        nearest = np.concatenate([(sample[at : at + 4096] @ centres.T).argmax(1) for at in range(0, len(sample), 4096)])
        total = np.zeros((count, WIDTH))
        np.add.at(total, nearest, sample)
        norm = np.linalg.norm(total, axis=1, keepdims=True)
        centres = np.where(norm > 0, np.rint(total * (NORM / np.maximum(norm, 1))), centres).astype(np.float32)
    return centres


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UsageError("looking for copies needs faiss; install it with: pip install faiss-cpu") from error
    return faiss
