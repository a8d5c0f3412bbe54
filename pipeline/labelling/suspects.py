"""Labelled images whose label is likely wrong: by held-out opinions, by a twin in another class, by lying far off.

The ranking by opinions is that of confident learning (C. Northcutt et al., Confident Learning: Estimating Uncertainty
in Dataset Labels, JAIR 2021, "normalized margin"), averaged over opinions. An opinion counts where it was formed
without the label; who learned an image's label says that label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.pool.copies.index import CopyIndex, default_threshold

NEIGHBOURS = 5
FAR = 4.0  # robust standard deviations
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Margins:
    """What opinions say of labels, of each of n images.

    Attributes:
        margin: p(label) − p(the most probable other class), mean over opinions, in [−1, 1]; NaN where there is none.
        suggested: the class that is most probable on average, (n,), int64.
        label_probability, suggested_probability: mean over opinions, (n,).
    """

    margin: NDArray[np.float64]
    suggested: NDArray[np.int64]
    label_probability: NDArray[np.float64]
    suggested_probability: NDArray[np.float64]


def label_margins(labels: NDArray[np.int64], opinions: Sequence[Floats]) -> Margins:
    """What opinions say of labels.

    Args:
        labels: (n,), from 0.
        opinions: distributions (n, C) each; a row of NaN where an opinion has nothing to say.
    """
    stacked = np.stack([opinion.astype(np.float64) for opinion in opinions])  # (m, n, C)
    known = ~np.isnan(stacked).any(axis=2, keepdims=True)
    count = known.sum(axis=0)  # (n, 1)
    with np.errstate(invalid="ignore"):
        p = np.where(known, stacked, 0.0).sum(axis=0) / count  # (n, C); NaN where there is no opinion
    rows = np.arange(len(labels))
    own = p[rows, labels]
    others = p.copy()
    others[rows, labels] = -np.inf
    suggested = np.where(count[:, 0] > 0, np.nan_to_num(p).argmax(axis=1), labels)
    return Margins(own - others.max(axis=1), suggested, own, p[rows, suggested])


@dataclass(frozen=True)
class Twins:
    """Two images of different classes that are copies of each other.

    Attributes:
        first, second: places among the images.
        similarity: see `CopyIndex`.
    """

    first: int
    second: int
    similarity: float


def twins_across_classes(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[Twins]:
    """Copies with other labels, the most alike first; each image with its nearest of another class.

    Args:
        images: decoded, (n, S, S, 3), uint8.
        labels: (n,).
    """
    threshold = default_threshold(images.shape[1])
    pairs: dict[tuple[int, int], float] = {}
    for label in np.unique(labels)[:-1]:
        inside, outside = np.flatnonzero(labels == label), np.flatnonzero(labels > label)
        index = CopyIndex(images[outside], [str(place) for place in outside])
        found = index.find(images[inside])
        for place, other, similarity in zip(inside, found.index, found.similarity, strict=True):
            if similarity >= threshold:
                pairs[int(place), int(outside[other])] = float(similarity)
    return [Twins(*pair, value) for pair, value in sorted(pairs.items(), key=lambda item: -item[1])]


def distances(features: Floats) -> NDArray[np.float64]:
    """How far each of n images lies from its five nearest, in robust standard deviations from the median, (n,).

    Features are brought to length 1 first: of a network's, the direction tells the class.
    """
    x = features.astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    apart = np.maximum(2 - 2 * x @ x.T, 0)  # (n, n), squared distances
    np.fill_diagonal(apart, np.inf)
    near = np.sqrt(np.sort(apart, axis=1)[:, : min(NEIGHBOURS, len(x) - 1)]).mean(axis=1)
    middle = np.median(near)
    spread = 1.4826 * np.median(np.abs(near - middle))
    result: NDArray[np.float64] = (near - middle) / max(float(spread), 1e-12)
    return result


@dataclass(frozen=True)
class Suspect:
    """A labelled image that a person should look at.

    Attributes:
        place: among the images.
        reasons: in words, the strongest first.
        suggested: the class that opinions favour.
        margin: see `Margins`; NaN: nobody has an opinion.
    """

    place: int
    reasons: tuple[str, ...]
    suggested: int
    margin: float


def rank(margins: Margins, twins: Sequence[Twins], far: NDArray[np.float64], names: Sequence[str]) -> list[Suspect]:
    """All images about which there is something to say: twins first, then by their margin, then what lies far off.

    Args:
        margins: of n images.
        twins: among them.
        far: see `distances`, (n,).
        names: of the images, to say which is whose twin.
    """
    reasons: dict[int, list[str]] = {}
    for pair in twins:
        for place, other in ((pair.first, pair.second), (pair.second, pair.first)):
            reasons.setdefault(place, []).append(f"a copy of {names[other]}, which has another label")
    twin = set(reasons)
    contradicted = {int(place) for place in np.flatnonzero(margins.margin < 0)}
    for place in contradicted:
        reasons.setdefault(place, []).append("opinions contradict the label")
    outliers = {int(place) for place in np.flatnonzero(far > FAR)}
    for place in outliers:
        reasons.setdefault(place, []).append("unlike all other labelled images")

    def order(place: int) -> tuple[bool, bool, float]:
        margin = margins.margin[place]
        own = margin if place in contradicted or np.isfinite(margin) else 0.0
        return place not in twin, place not in contradicted, float(own)

    return [
        Suspect(place, tuple(reasons[place]), int(margins.suggested[place]), float(margins.margin[place]))
        for place in sorted(reasons, key=order)
    ]
