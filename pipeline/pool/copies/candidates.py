"""Which evaluation images a picture could be a copy of, and how it lies on them: a search among thumbnails.

Of a pool image the inner window is sought, as it is, mirrored, and turned otherwise (which changes signs and order of
its thumbnail only). Of an evaluation image there are many windows, side by side, larger and smaller, so that a copy
that was shifted, trimmed or framed finds one that shows what its inner window shows; and its four halves, for copies
of which a part is covered.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.pool.copies.thumbnails import FREQUENCIES, NORM, WIDTH, Window, frequencies, thumbnails

if TYPE_CHECKING:
    import faiss

LISTED = 1 << 12  # thumbnails from which on not all are looked at
PER_LIST, ROUNDS = 40, 6  # of k-means


class Turn(NamedTuple):
    """How a pool image may have been turned: first exchanged over its diagonal, then mirrored, then put on its head."""

    diagonal: bool
    mirrored: bool
    headlong: bool
    negative: bool


class Look(NamedTuple):
    """One search: a window of the pool image, in some turns, among windows of the evaluation images.

    Attributes:
        query: the window of the pool image, after it was turned.
        windows: those of the evaluation images.
        turns: into TURNS.
        nearest: thumbnails asked for.
        probes: lists that are looked at, where there are lists.
        likely: correlation of the thumbnails from which the images are compared.
    """

    query: Window
    windows: tuple[Window, ...]
    turns: tuple[int, ...]
    nearest: int
    probes: int
    likely: float


TURNS = (
    Turn(False, False, False, False),
    Turn(False, True, False, False),
    Turn(False, False, True, False),
    Turn(False, True, True, False),
    Turn(True, False, False, False),
    Turn(True, True, False, False),
    Turn(True, False, True, False),
    Turn(True, True, True, False),
    Turn(False, False, False, True),
    Turn(False, True, False, True),
)
COMMON = (0, 1)  # as it is, and mirrored
INNER = Window(0, 0, 25, 25)
AROUND = (
    *(Window(x, y, 25, 25) for y in (-3, -1.5, 0, 1.5, 3) for x in (-3, -1.5, 0, 1.5, 3)),
    *(Window(0, 0, 25 * zoom, 25 * zoom) for zoom in (0.78, 0.88, 1.2)),
)
HALVES = (Window(0, -6.5, 25, 12), Window(0, 6.5, 25, 12), Window(-6.5, 0, 12, 25), Window(6.5, 0, 12, 25))
LOOKS = (
    Look(INNER, AROUND, COMMON, nearest=8, probes=16, likely=0.74),  # shifted, trimmed, framed
    Look(INNER, (INNER,), tuple(range(2, len(TURNS))), nearest=1, probes=4, likely=0.85),  # turned, or negative
    *(Look(half, (half,), COMMON, nearest=2, probes=4, likely=0.82) for half in HALVES),  # partly covered
)
WINDOWS = tuple(dict.fromkeys(window for look in LOOKS for window in look.windows))


@dataclass(frozen=True, eq=False)
class Candidates:
    """Of n images the m likeliest originals, likeliest first.

    Attributes:
        index: of the evaluation image, (n, m), int64.
        window: of the evaluation image, into WINDOWS, (n, m), int64.
        turn: of the pool image, into TURNS, (n, m), int64.
        likely: whether the thumbnails are alike enough, (n, m), bool.
    """

    index: Tensor
    window: Tensor
    turn: Tensor
    likely: Tensor


class Thumbnails:
    """The thumbnails of N evaluation images, indexed with faiss, and the search among them.

    About 1.9 kB per image: 33 windows of 48 bytes, and their numbers.

    Args:
        grey: luminance, (N, 32, 32), uint8.
    """

    def __init__(self, grey: NDArray[np.uint8]):
        every = max(1, len(grey) * len(AROUND) // (PER_LIST * 4096))
        self._indexes = [
            _empty_index(
                thumbnails(grey[::every], look.windows).reshape(-1, WIDTH), len(grey) * len(look.windows), look
            )
            for look in LOOKS
        ]
        for begin in range(0, len(grey), 1024):
            for look, index in zip(LOOKS, self._indexes, strict=True):
                index.add(thumbnails(grey[begin : begin + 1024], look.windows).reshape(-1, WIDTH))

    def __getstate__(self) -> list[NDArray[np.uint8]]:
        return [load_faiss().serialize_index(index) for index in self._indexes]

    def __setstate__(self, state: list[NDArray[np.uint8]]) -> None:
        self._indexes = [load_faiss().deserialize_index(data) for data in state]

    def candidates(self, grey: NDArray[np.uint8], wanted: int) -> Candidates:
        """The `wanted` best of each image (n, 32, 32), uint8, over all looks, turns and windows."""
        n = len(grey)
        load_faiss().omp_set_num_threads(torch.get_num_threads())
        queries, order, sign, sources = _questions()
        seen = thumbnails(grey, queries)
        results, first = [], 0
        for look, searched in zip(LOOKS, self._indexes, strict=True):
            mine = slice(first, first + len(look.turns))
            sought = np.take_along_axis(seen[:, sources[mine]], order[None, mine], 2) * sign[mine]  # (n, T, WIDTH)
            score, place = searched.search(sought.reshape(-1, WIDTH), min(look.nearest, searched.ntotal))
            which = np.array([WINDOWS.index(window) for window in look.windows])[place % len(look.windows)]
            turns = np.tile(look.turns, n)[:, None].repeat(place.shape[1], 1)
            alike = (place >= 0) & (score >= look.likely * NORM**2)
            above = np.where(place >= 0, score - look.likely * NORM**2, -np.inf)
            columns = (place // len(look.windows), which, turns, alike, above)
            results.append([torch.from_numpy(x.reshape(n, -1)) for x in columns])
            first = mine.stop
        index, window, turn, likely, margin = (torch.cat(column, 1) for column in zip(*results, strict=True))
        return _distinct(index, window, turn, likely, margin, wanted)


def _distinct(index: Tensor, window: Tensor, turn: Tensor, likely: Tensor, margin: Tensor, wanted: int) -> Candidates:
    """The best of every evaluation image among (n, k); equal ones in the order of the evaluation images."""
    order = index.argsort(dim=1, stable=True)
    order = order.gather(1, margin.gather(1, order).argsort(dim=1, descending=True, stable=True))
    index, window, turn, likely = (x.gather(1, order) for x in (index, window, turn, likely))
    again = (index[:, :, None] == index[:, None, :]).tril(-1).any(2)
    first = again.byte().argsort(dim=1, stable=True)[:, :wanted]
    likely &= ~again
    index, window, turn, likely = (x.gather(1, first) for x in (index.clamp_min(0), window, turn, likely))
    return Candidates(index, window, turn, likely)


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


@cache
def _questions() -> tuple[tuple[Window, ...], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """What is asked of an image, look by look and turn by turn, Q in all: the windows of the image as it is; then how
    their thumbnails become those of the turned image, thumbnail[source][order] · sign: order and sign (Q, 48), source
    (Q,) into the windows. Every window that is not square about the centre is asked for mirrored at most."""
    low = frequencies()[0].numpy()
    down, across = np.divmod(low, FREQUENCIES)
    asked = [(look.query, TURNS[turn]) for look in LOOKS for turn in look.turns]
    order = np.tile(np.arange(WIDTH), (len(asked), 1))
    sign = np.ones((len(asked), WIDTH), np.float32)
    seen = [Window(-w.x if turn.mirrored else w.x, w.y, w.wide, w.high) for w, turn in asked]
    windows = tuple(dict.fromkeys(seen))
    for at, (_, turn) in enumerate(asked):
        if turn.diagonal:
            order[at, : len(low)] = np.searchsorted(low, across * FREQUENCIES + down)
        odd = across * turn.mirrored + down * turn.headlong + turn.negative
        sign[at, : len(low)] = 1 - 2 * (odd % 2)
    return windows, order, sign, np.array([windows.index(window) for window in seen])


def _empty_index(sample: NDArray[np.float32], expected: int, look: Look) -> "faiss.Index":
    """Exact below LISTED thumbnails; beyond, lists around centres, of which the nearest few are looked at."""
    faiss = load_faiss()
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed  # the whole numbers themselves, a byte each
    if expected < LISTED:
        index = faiss.IndexScalarQuantizer(WIDTH, kind, faiss.METRIC_INNER_PRODUCT)
    else:
        lists = 1 << round(np.log2(1.6 * expected**0.5))
        nearest = faiss.IndexFlatIP(WIDTH)
        nearest.add(_centres(sample, lists))
        index = faiss.IndexIVFScalarQuantizer(nearest, WIDTH, lists, kind, faiss.METRIC_INNER_PRODUCT, False)
        index.nprobe = look.probes
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


def load_faiss() -> Any:
    """The faiss module, imported only when copies are looked for."""
    try:
        import faiss
    except ImportError as error:
        raise UsageError("looking for copies needs faiss; install it with: pip install faiss-cpu") from error
    return faiss
