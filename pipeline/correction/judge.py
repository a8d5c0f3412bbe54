"""What a correction is worth on images that it was not fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.correction.class_map import ClassMap
from pipeline.correction.correction import Correction
from pipeline.correction.fit import fit_correction
from pipeline.seeds import permutation

SHARES = (0.25, 0.5, 1.0)  # of the labelled images, that a fit is tried on
BINS = 15


@dataclass(frozen=True, eq=False)
class Answered:
    """Images with labels and a teacher's distributions: q (n, C_T), labels (n,)."""

    q: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """A correction by a name for people, and how many labelled images it was fitted to (0: none)."""

    name: str
    correction: Correction
    images: int


def candidates(
    labelled: Answered,
    teacher_names: tuple[str, ...],
    class_names: tuple[str, ...],
    class_map: ClassMap | None,
    selected: Correction,
    *,
    seed: int = 0,
) -> list[Candidate]:
    """The start (identity, or map), what the pool was selected with, and fits to shares of the labelled images."""
    found = []
    if teacher_names == class_names:
        found.append(Candidate("the teacher as it is", Correction.identity(class_names), 0))
    if class_map is not None:
        found.append(Candidate("map of classes", Correction.mapped(teacher_names, class_names, class_map), 0))
    order = spread_order(labelled.labels, seed)
    shares = SHARES[:-1] if selected.kind == "fit" else SHARES  # that one is a fit to all of them
    for share in shares if len(order) >= 2 else ():
        chosen = order[: max(2, round(share * len(order)))]
        fit = fit_correction(
            labelled.q[chosen], labelled.labels[chosen], teacher_names, class_names, class_map, seed=seed
        )
        found.append(Candidate(f"fit to {len(chosen):,} images", fit.correction, len(chosen)))
    known = {candidate.correction.fingerprint() for candidate in found}
    if selected.fingerprint() not in known:
        found.append(
            Candidate(f"as selected ({selected.kind})", selected, len(order) if selected.bias is not None else 0)
        )
    return found


def spread_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """An order of images, (n,), whose every beginning has the classes in about their proportions."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn = permutation(len(members), seed, "calibrate", int(label))
        place[members[drawn]] = (np.arange(len(members)) + 0.5) / len(members)
    result: NDArray[np.int64] = np.argsort(place, kind="stable")
    return result


def reliability(
    confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_], bins: int = BINS
) -> list[dict[str, float]]:
    """Mean confidence, accuracy and images of each bin (a, b] that has any."""
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for number in range(bins):
        mine = index == number
        if mine.any():
            rows.append(
                {
                    "confidence": float(confidence[mine].mean()),
                    "accuracy": float(right[mine].mean()),
                    "images": int(mine.sum()),
                }
            )
    return rows


def confusions(counts: NDArray[np.int64], names: Sequence[str], most: int = 5) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often, from images of each (rows) taken for each."""
    pairs = counts.copy()
    np.fill_diagonal(pairs, 0)
    order = np.argsort(-pairs, axis=None, kind="stable")[:most]
    rows = [(names[int(at) // len(names)], names[int(at) % len(names)], int(pairs.flat[at])) for at in order]
    return [{"is": a, "taken for": b, "images": n} for a, b, n in rows if n]


@dataclass(frozen=True, eq=False)
class Movements:
    """What becomes of the images of each answer: of the r most frequent first answers of a teacher.

    Attributes:
        answers: the teacher's classes, (r,), most frequent first.
        images: that have each as their first answer, (r,).
        before, after: mean distributions of these images over the data set's classes, (r, C).
        total: images in all.
    """

    answers: NDArray[np.int64]
    images: NDArray[np.int64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    total: int

    def largest(self, teacher_names: Sequence[str], class_names: Sequence[str], most: int = 8) -> list[dict[str, Any]]:
        """The largest gains of a class among the images of one answer, in shares of all images."""
        gain = (self.after - self.before) * self.images[:, None] / self.total
        order = np.argsort(-gain, axis=None, kind="stable")[:most]
        rows = [(int(at) // len(class_names), int(at) % len(class_names)) for at in order]
        return [
            {
                "answer": teacher_names[int(self.answers[row])],
                "images": int(self.images[row]),
                "class": class_names[column],
                "share": round(float(gain[row, column]), 4),
                "before": round(float(self.before[row, column]), 3),
                "after": round(float(self.after[row, column]), 3),
            }
            for row, column in rows
            if gain[row, column] > 5e-5
        ]


def movements(q: NDArray[np.floating[Any]], before: Correction, after: Correction, most: int) -> Movements:
    """How two corrections differ on a teacher's distributions (n, C_T), by its first answer; the `most` frequent."""
    first = q.argmax(axis=1)
    counts = np.bincount(first, minlength=q.shape[1])
    answers = np.argsort(-counts, kind="stable")[:most]
    answers = answers[counts[answers] > 0]
    one, other = before.targets(q).astype(np.float64), after.targets(q).astype(np.float64)
    means = [np.stack([targets[first == answer].mean(axis=0) for answer in answers]) for targets in (one, other)]
    return Movements(answers, counts[answers], means[0], means[1], len(q))
