"""Copies of evaluation images: near-duplicates, not look-alikes.

Two looks. Candidates come from thumbnails (`pipeline.pool.copies.candidates`). Each likely one is then laid over the
image by an affine map, and compared by the correlation of their *detail* (`pipeline.pool.copies.alignment`). A copy
keeps its detail through re-encoding, a change of brightness, contrast or colour, a shift, a trim, a slight turn or a
mirror; another picture of the same thing shares the large forms, which is why thumbnails alone cannot tell, but not
the detail. A teacher's features are class features, not copy features, and play no part.

How it was measured: benchmarks/copies.py; what was found: docs/results/copies.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.pool.copies.alignment import Pairs, similarity_of
from pipeline.pool.copies.candidates import COMMON, LOOKS, TURNS, WINDOWS, Candidates, Thumbnails, turned
from pipeline.pool.copies.small import SmallIndex
from pipeline.pool.copies.thumbnails import SIDE, luminance

CANDIDATES = 6
HANDICAP = 0.1
"""Taken from the similarity of images turned by more than a mirror, or negative: a tower that lies down is like a ship
more often than a ship is turned."""
VERSION = 2  # of the comparison: scores made by another one are made again
SMALL = 16  # pixels; see `pipeline.pool.copies.small`
TOGETHER = 512  # pairs
DECIMALS = 4  # of a similarity


@dataclass(frozen=True, eq=False)
class Matches:
    """The nearest evaluation image of each of n images.

    Attributes:
        index: into the evaluation images, (n,), int64.
        similarity: correlation of the detail at the best alignment, (n,), float32, in [−1, 1]; 0 where no
            evaluation image is like enough to be compared, or the image is flat.
        mirrored: whether the match is a mirror image, (n,), bool.
    """

    index: NDArray[np.int64]
    similarity: NDArray[np.float32]
    mirrored: NDArray[np.bool_]


def descriptor(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Thumbnail of the luminance of decoded images (n, S, S, 3): uint8, (n, 64)."""
    grey = luminance(images).reshape(-1, 8, SIDE // 8, 8, SIDE // 8)
    return ((grey.sum((2, 4), dtype=np.int64) * 2 + 16) // 32).astype(np.uint8).reshape(-1, 64)


def default_threshold(size: int) -> float:
    """Similarity from which an image of `size` pixels is a copy; measured by benchmarks/copies.py.

    The smaller the images, the less detail there is to tell them apart by. Below 16 pixels there is none: honest
    digits correlate up to 0.987.
    """
    return 0.99 if size < SMALL else 0.9 - min(size, SIDE) / 160  # 0.8 at 16 pixels, 0.7 from 32 on


class CopyIndex:
    """The evaluation images, ready to be searched. About 2.7 kB are kept of each, whatever its size; it can be
    pickled, and finds the same in another process.

    Args:
        images: decoded, (N, S, S, 3), uint8.
        names: of each, kept as evidence with every removal.

    Raises:
        ValueError: there are no images, or not as many names.
        UsageError: faiss is not installed.
    """

    def __init__(self, images: NDArray[np.uint8], names: Sequence[str]):
        if len(images) != len(names):
            raise ValueError(f"{len(names)} names for {len(images)} images")
        if not len(images):
            raise ValueError("no evaluation images to look for copies of")
        self.names = list(names)
        if images.shape[1] < SMALL:
            self._small: SmallIndex | None = SmallIndex(images)
        else:
            self._small = None
            self._grey = luminance(images)  # (N, 32, 32)
            self._thumbnails = Thumbnails(self._grey)

    def find(self, images: NDArray[np.uint8]) -> Matches:
        """The best match of each image (n, S, S, 3), n of a few hundred at a time. What is found for an image does
        not depend on the others, nor on the number of threads."""
        if self._small is not None:
            index, similarity, mirrored = self._small.find(images)
            return Matches(index, similarity.round(DECIMALS).astype(np.float32), mirrored)
        grey = luminance(images)
        candidates = self._thumbnails.candidates(grey, CANDIDATES)
        alike = self._compared(torch.from_numpy(grey), candidates)  # (n, m)
        best = alike.argmax(1, keepdim=True)
        return Matches(
            candidates.index.gather(1, best)[:, 0].numpy(),
            alike.gather(1, best)[:, 0].numpy(),
            MIRRORED[candidates.turn.gather(1, best)[:, 0]].numpy(),
        )

    def ranked(self, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The `count` best matches of each image (n, S, S, 3), best first: evaluation images and similarities, both
        (n, count); a similarity is 0 where no more are like enough to be compared."""
        if self._small is not None:
            return self._small.ranked(images, count)
        grey = luminance(images)
        candidates = self._thumbnails.candidates(grey, count)
        alike, order = self._compared(torch.from_numpy(grey), candidates).sort(dim=1, descending=True, stable=True)
        index, found = candidates.index.gather(1, order).numpy(), alike.double().numpy()
        missing = ((0, 0), (0, count - index.shape[1]))
        return np.pad(index, missing), np.pad(found, missing)

    def _compared(self, grey: Tensor, candidates: Candidates) -> Tensor:
        """Similarity, (n, m), of the likely candidates; 0 of the others."""
        result = torch.zeros(candidates.likely.shape)
        image, rank = candidates.likely.nonzero(as_tuple=True)
        for begin in range(0, len(image), TOGETHER):
            i, r = image[begin : begin + TOGETHER], rank[begin : begin + TOGETHER]
            of, window, turn = candidates.index[i, r], candidates.window[i, r], candidates.turn[i, r]
            pairs = Pairs(
                torch.from_numpy(self._grey[of.numpy()]).float(),
                turned(grey[i].float(), turn),
                STARTS[window],
            )
            alike = similarity_of(pairs) - HANDICAP * (turn >= len(COMMON))
            result[i, r] = alike.round(decimals=DECIMALS)
        return result


MIRRORED = torch.tensor([how.mirrored ^ how.headlong ^ how.diagonal for how in TURNS])


def _starts() -> Tensor:
    """From every window of an evaluation image to the window of the pool image that was sought in it, (W, 2, 3)."""
    maps = {}
    for look in LOOKS:
        for window in look.windows:
            across, down = look.query.wide / window.wide, look.query.high / window.high
            x, y = look.query.x - across * window.x, look.query.y - down * window.y
            maps[window] = [[across, 0, x], [0, down, y]]
    return torch.tensor([maps[window] for window in WINDOWS])


STARTS = _starts()
