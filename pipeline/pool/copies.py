"""Copies of evaluation images: near-duplicates, not look-alikes.

Two looks. Candidates come from thumbnails (`pipeline.pool.copy_candidates`). Each likely one is then laid over the
image by an affine map, and compared by the correlation of their *detail* (`pipeline.pool.copy_alignment`). A copy
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

from pipeline.pool.copy_alignment import Pairs, similarity
from pipeline.pool.copy_candidates import COMMON, SIDE, TURNS, WINDOWS, Candidates, Thumbnails, luminance, turned

CANDIDATES = 6
LIKELY = 0.7  # correlation of the thumbnails from which a candidate is looked at
UNUSUAL = 0.85  # the same where the image is turned by more than a mirror, or negative: these are sought whole
HANDICAP = 0.1  # of the similarity of such: a tower lies down to be a ship more often than a ship is turned
SMALL = 16  # pixels; smaller images have no detail and are compared as they are
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

    Below 16 pixels there is no detail: honest digits correlate up to 0.99, and copies beyond.
    """
    return 0.7 if size >= SMALL else 0.99


class CopyIndex:
    """The evaluation images, ready to be searched. About 2.7 kB are kept of each, whatever its size; it can be
    pickled, and finds the same in another process.

    Args:
        images: decoded, (N, S, S, 3), uint8.
        names: of each, kept as evidence with every removal.

    Raises:
        ValueError: as many names as images are needed.
        UsageError: faiss is not installed.
    """

    def __init__(self, images: NDArray[np.uint8], names: Sequence[str]):
        if len(images) != len(names):
            raise ValueError(f"{len(names)} names for {len(images)} images")
        self.names = list(names)
        self._grey = luminance(images)  # (N, 32, 32)
        self._thumbnails = Thumbnails(self._grey)

    def find(self, images: NDArray[np.uint8]) -> Matches:
        """The best match of each image (n, S, S, 3), n of a few hundred at a time. What is found for an image does
        not depend on the others, nor on the number of threads."""
        grey = luminance(images)
        found = self._thumbnails.candidates(grey, CANDIDATES)
        alike = self._compared(torch.from_numpy(grey), found)  # (n, m)
        best = alike.argmax(1, keepdim=True)
        return Matches(
            found.index.gather(1, best)[:, 0].numpy(),
            alike.gather(1, best)[:, 0].numpy(),
            MIRRORED[found.turn.gather(1, best)[:, 0]].numpy(),
        )

    def _compared(self, grey: Tensor, found: Candidates) -> Tensor:
        """Similarity, (n, m), of the likely candidates; 0 of the others."""
        result = torch.zeros(found.score.shape)
        likely = torch.where(found.turn < COMMON, LIKELY, UNUSUAL)
        image, rank = (found.score >= likely).nonzero(as_tuple=True)
        for at in range(0, len(image), TOGETHER):
            i, r = image[at : at + TOGETHER], rank[at : at + TOGETHER]
            of, window, turn = found.index[i, r], found.window[i, r], found.turn[i, r]
            pairs = Pairs(
                torch.from_numpy(self._grey[of.numpy()]).float(),
                turned(grey[i].float(), turn),
                STARTS[window],
            )
            alike = similarity(pairs) - HANDICAP * (turn >= COMMON)
            result[i, r] = alike.round(decimals=DECIMALS)
        return result


MIRRORED = torch.tensor([how.mirrored != how.headlong != how.diagonal for how in TURNS])
STARTS = torch.tensor([[[1 / zoom, 0, -x / zoom], [0, 1 / zoom, -y / zoom]] for x, y, zoom in WINDOWS])
