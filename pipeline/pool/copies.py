"""Copies of evaluation images: near-duplicates, not look-alikes.

Two looks. Candidates come from a thumbnail of the luminance, 8×8, with mean and contrast taken out, of the image
as it is and mirrored, in place and shifted by two pixels. Each candidate is then laid over the image at full size
(at most 32 pixels), shifted by up to two pixels or trimmed by as much, and compared by the correlation of their
*detail*: what is left when a blurred version is taken away. A copy keeps its detail through re-encoding, a change of
brightness or contrast, the loss of colour, a shift or a mirror; another picture of the same thing shares the large
forms, which is why thumbnails alone cannot tell, but not the detail. A teacher's features are class features, not
copy features, and play no part.

How it was measured: benchmarks/copies.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32  # pixels at which images are compared; larger ones are scaled down to it
THUMBNAIL = 8
CANDIDATES = 12
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, eq=False)
class Matches:
    """The nearest evaluation image of each of n images.

    Attributes:
        index: into the evaluation images, (n,), int64.
        similarity: correlation of the detail at the best alignment, (n,), float32, in [−1, 1].
        mirrored: whether the match is mirrored, (n,), bool.
    """

    index: NDArray[np.int64]
    similarity: NDArray[np.float32]
    mirrored: NDArray[np.bool_]


def descriptor(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Thumbnail of the luminance of decoded images (n, S, S, 3): uint8, (n, 64)."""
    return thumbnails(luminance(images)).flatten(1).round().to(torch.uint8).numpy()


def luminance(images: NDArray[np.uint8]) -> Tensor:
    """(n, S, S, 3) uint8 → (n, s, s) float32 in [0, 255], s = min(S, 32)."""
    grey = torch.from_numpy(np.ascontiguousarray(images)).float() @ torch.tensor(LUMA)  # (n, S, S)
    return grey if grey.shape[1] <= SIDE else F.adaptive_avg_pool2d(grey, SIDE)


def thumbnails(grey: Tensor) -> Tensor:
    """(n, s, s) → (n, 8, 8)."""
    return F.adaptive_avg_pool2d(grey, THUMBNAIL)


def detail(grey: Tensor) -> Tensor:
    """(n, s, s) less its 5×5 blur, lightly smoothed against coding noise; small images as they are."""
    if grey.shape[1] < 2 * THUMBNAIL:
        return grey
    padded = F.pad(grey[:, None], (3, 3, 3, 3), mode="reflect")
    smooth = F.avg_pool2d(padded, 3, 1, 1)  # kernel 3, then the blur of the same
    blurred = F.avg_pool2d(smooth, 5, 1, 2)
    return (smooth - blurred)[:, 0, 3:-3, 3:-3]


def default_threshold(size: int) -> float:
    """Similarity from which an image of `size` pixels is a copy; measured by benchmarks/copies.py.

    Below 16 pixels there is no detail: honest digits correlate up to 0.99, and copies beyond.
    """
    return 0.8 if size >= 2 * THUMBNAIL else 0.99


class CopyIndex:
    """The evaluation images, ready to be searched.

    Args:
        images: decoded, (N, S, S, 3), uint8.
        names: of each, kept as evidence with every removal.
    """

    def __init__(self, images: NDArray[np.uint8], names: Sequence[str]):
        if len(images) != len(names):
            raise ValueError(f"{len(names)} names for {len(images)} images")
        grey = luminance(images)
        self.names = list(names)
        self._side = grey.shape[1]
        self._shift = self._side // 16  # pixels either way
        self._thumbnails = _standardised(thumbnails(grey).flatten(1))  # (N, 64)
        self._detail = detail(grey)  # (N, s, s)

    def find(self, images: NDArray[np.uint8]) -> Matches:
        """The best match of each image (n, S, S, 3), n of a few hundred at a time."""
        grey = luminance(images)
        both = torch.stack([grey, grey.flip(2)])  # (2, n, s, s)
        wanted = min(CANDIDATES, len(self.names))
        candidates, mirrored = self._candidates(both, wanted)
        of = torch.arange(len(grey))[:, None].expand(-1, wanted)
        query = both[mirrored.long(), of]  # (n, m, s, s)
        similarity = self._aligned(query, self._detail[candidates])  # (n, m)
        best = similarity.argmax(1, keepdim=True)
        return Matches(
            candidates.gather(1, best)[:, 0].numpy(),
            similarity.gather(1, best)[:, 0].numpy(),
            mirrored.gather(1, best)[:, 0].numpy(),
        )

    def _candidates(self, both: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Nearest evaluation images by thumbnail, (n, m), and whether as mirrored, (n, m)."""
        scores = torch.stack([self._best_over_shifts(grey) for grey in both], dim=1)  # (n, 2, N)
        best, orientation = scores.max(1)
        top = best.topk(wanted, dim=1).indices
        return top, orientation.gather(1, top) == 1

    def _best_over_shifts(self, grey: Tensor) -> Tensor:
        """Correlation of thumbnails, (n, N), at the best of no shift and the four diagonal ones."""
        far = self._shift
        padded = F.pad(grey[:, None], (far,) * 4, mode="replicate")[:, 0]
        best = torch.full((len(grey), len(self.names)), -1.0)
        for dy, dx in {(far, far), (0, 0), (0, 2 * far), (2 * far, 0), (2 * far, 2 * far)}:
            seen = padded[:, dy : dy + self._side, dx : dx + self._side]
            torch.maximum(best, _standardised(thumbnails(seen).flatten(1)) @ self._thumbnails.T, out=best)
        return best

    def _aligned(self, query: Tensor, candidate: Tensor) -> Tensor:
        """Best correlation, (n, m), of the query's centre, or of all of it scaled to the centre's size, with the
        windows of the candidate."""
        n, m = query.shape[:2]
        shift, side = self._shift, self._side - 2 * self._shift
        flat = query.flatten(0, 1)
        centres = [detail(flat)[:, shift : shift + side, shift : shift + side]]
        if shift:
            scaled = F.interpolate(flat[:, None], size=(side, side), mode="bilinear", antialias=True)
            centres.append(detail(scaled[:, 0]))
        views = [_standardised(centre.flatten(1)).view(n, m, -1) for centre in centres]
        best = torch.full((n, m), -1.0)
        for dy in range(2 * shift + 1):
            for dx in range(2 * shift + 1):
                window = _standardised(candidate[:, :, dy : dy + side, dx : dx + side].flatten(2))
                for view in views:
                    best = torch.maximum(best, (view * window).sum(2))
        return best


def _standardised(x: Tensor) -> Tensor:
    """Rows less their mean, of norm one; flat rows become zero and correlate with nothing."""
    x = x - x.mean(dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 1e-3 * x.shape[-1] ** 0.5, x / norm.clamp_min(1e-12), 0.0)
