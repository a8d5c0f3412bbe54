"""From which similarity on an image is a copy, calibrated on the data set at hand.

What the comparison finds between images that are no copies of one another says what it means on this data: silhouettes,
digits and textures are alike without being the same. The labelled images and the evaluation images, each left out in
turn, are compared with the evaluation images exactly as the pool will be. From that come two conditions on a copy:

1. Its similarity is at least the *threshold*. That is the least that the comparison itself supports
   (`default_threshold`), and so it stays where hardly any of these images exceed it. Where more do, the set is
   self-similar, and the threshold is where the share that is allowed would exceed it: a Gumbel distribution, the law of
   largest values, is fitted to the bulk of arctanh(similarity). Images that fulfil the second condition, as true
   duplicates in the set do, are left out.
2. It is more like its match than the match is like any other of these images, by a *margin*: an eye-catching match
   among many that are alike is no evidence (the ratio test of Lowe 2004, "Distinctive image features", section 7.1,
   with images for features). Two evaluation images that are themselves copies are not held against one another.

Measured: benchmarks/copies.py, docs/results/copies.md.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.pool.copies.index import CopyIndex

VERSION = 1  # of the calibration: another one selects again
MARGIN = 0.75  # of arctanh(similarity), between a copy and the next best
SELF_SIMILAR = (
    0.03  # of the images, that may exceed the default threshold: duplicates are up to that many in known sets
)
UPPER, TOP = 0.5, 0.8  # quantiles that the fit goes through
LEAST, CAUTIOUS = 20, 0.95  # similarities to fit to; the threshold where there are fewer
QUERIES = 2_000  # labelled images compared, at most
NEAREST = 6  # evaluation images looked at for each
MOST = 0.999  # an identical image is always a copy
SURE = 1.645  # standard deviations: one-sided, 95%
BATCH = 256  # images at a time

Similarities = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What makes a copy on one data set.

    Attributes:
        threshold: least similarity of a copy.
        higher: more, for evaluation images that are like others: by name.
        images: that the threshold rests on: labelled and evaluation images that are no duplicates.
        above: share of them that exceed the default threshold.
        self_similar: whether these are too many, so that the threshold was fitted.
    """

    threshold: float
    images: int = 0
    above: float = 0.0
    self_similar: bool = False
    higher: dict[str, float] = field(default_factory=dict)

    def are_copies(self, similarity: NDArray[np.float32], names: list[str | None]) -> NDArray[np.bool_]:
        """Whether images of these similarities to the evaluation images of these names are copies, (n,)."""
        needed = np.array([self.higher.get(name or "", self.threshold) for name in names], np.float32)
        return similarity >= needed


def calibrate(
    index: CopyIndex, evaluation: NDArray[np.uint8], labelled: NDArray[np.uint8], default: float, honest: float
) -> Calibration:
    """Calibrate the comparison.

    Args:
        index: of the evaluation images.
        evaluation: these images, decoded, (N, S, S, 3), uint8, in the index' order.
        labelled: images for training, (M, S, S, 3), uint8; of many, some spread over them are compared.
        default: the least threshold, see `default_threshold`.
        honest: share of images that are no copies of which the threshold may be exceeded, such as 0.001.
    """
    chosen = labelled[np.linspace(0, len(labelled) - 1, min(QUERIES, len(labelled))).astype(int)]
    near, alike = _left_out_in_turn(*_ranked(index, evaluation, NEAREST + 1))  # (N, k)
    labelled_near, labelled_alike = _ranked(index, chosen, NEAREST)  # (M, k)
    # How much every evaluation image is like another one; beside the best, if that stands out as a copy does.
    stands_out = (alike[:, 0] >= default) & (_stretched(alike[:, 0]) - _stretched(alike[:, 1]) >= MARGIN)
    other = np.where(stands_out, alike[:, 1], alike[:, 0])
    back = near[near[:, 0], 0] == np.arange(len(near))  # two that are each other's best
    against = np.where(back, alike[near[:, 0], 1], other[near[:, 0]])
    best = np.concatenate([alike[:, 0], labelled_alike[:, 0]])
    ahead = _stretched(best) - _stretched(np.concatenate([against, other[labelled_near[:, 0]]]))
    distinct = best[(best < default) | (ahead < MARGIN)]  # without what looks like a true duplicate
    above = float(np.mean(distinct >= default))
    self_similar = _upper_bound(above, len(distinct)) > SELF_SIMILAR
    threshold = min(max(default, _fitted(distinct, honest)), MOST) if self_similar else default
    similar = _stretched(labelled_alike) - _stretched(other[labelled_near]) < MARGIN
    np.maximum.at(other, labelled_near[similar], labelled_alike[similar])
    needed = np.minimum(np.tanh(_stretched(other) + MARGIN), MOST)
    higher = {index.names[i]: round(float(needed[i]), 4) for i in np.flatnonzero(needed > threshold)}
    return Calibration(round(float(threshold), 4), len(distinct), above, self_similar, higher)


def _ranked(index: CopyIndex, images: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], Similarities]:
    """The most similar evaluation images of each image, best first: which, and how much; 0 where there are fewer."""
    parts = [index.ranked(images[at : at + BATCH], count) for at in range(0, len(images), BATCH)]
    if not parts:
        return np.zeros((0, count), np.int64), np.zeros((0, count))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]).clip(0)


def _left_out_in_turn(near: NDArray[np.int64], alike: Similarities) -> tuple[NDArray[np.int64], Similarities]:
    """Of evaluation images among themselves: the best of each, without itself."""
    others = np.where(near == np.arange(len(near))[:, None], -1.0, alike)
    order = np.argsort(-others, axis=1, kind="stable")[:, :-1]
    return np.take_along_axis(near, order, 1), np.take_along_axis(others, order, 1).clip(0)


def _fitted(best: Similarities, honest: float) -> float:
    """The similarity that a share `honest` of such images exceeds, by the upper bound of a Gumbel distribution.

    It is that of images which resemble some evaluation image at all; of the others nothing was compared.
    """
    compared = _stretched(best[best > 0])
    if len(compared) < LEAST:
        return CAUTIOUS
    beyond = honest * len(best) / len(compared)  # the share of these, for that share of all
    upper, top = np.quantile(compared, [UPPER, TOP])
    spread = (top - upper) / (_reduced(TOP) - _reduced(UPPER))
    # The two quantiles are uncertain: the variance of their difference in a tail that falls like exp is
    # (1 / (1 − TOP) − 1 / (1 − UPPER)) / n in units of the spread.
    error = (1 / (1 - TOP) - 1 / (1 - UPPER)) ** 0.5 / np.log((1 - UPPER) / (1 - TOP)) / len(compared) ** 0.5
    return float(np.tanh(top + spread * (1 + SURE * error) * (_reduced(1 - beyond) - _reduced(TOP))))


def _reduced(p: float) -> float:
    """The standard Gumbel distribution's quantile."""
    return float(-np.log(-np.log(p)))


def _stretched(similarity: Similarities) -> Similarities:
    """arctanh, under which correlations have a distribution of one shape (Fisher 1915)."""
    return np.arctanh(np.clip(similarity, 0, 0.9999))


def _upper_bound(share: float, count: int) -> float:
    """Of a share observed among so many: Wilson's, one-sided, 95%."""
    z2 = SURE * SURE / count
    return (share + z2 / 2 + (z2 * share * (1 - share) + z2 * z2 / 4) ** 0.5) / (1 + z2)
