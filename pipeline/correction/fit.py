"""A correction fitted to labelled images: a multinomial regression, shrunk toward the map of classes or the identity.

On features x = log q (C_T) it minimises the mean of −log p(y) plus λ/2·‖W‖², with p = softmax(a·z₀ + x·W + b) and z₀
the logits of the start: with λ large only a temperature and the bias are left of it. These two have a weak prior of
their own, normal around 1 and 0 with variance 2: a few images that a start gets right would else make it certain. λ is
chosen by cross-validation inside the labelled images. A class without a labelled image keeps its place in z₀: nothing
is known of it.

The features are turned into their principal directions first, which changes neither ‖W‖ nor the result, and leaves as
many of them as there are images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from pipeline.correction.class_map import ClassMap
from pipeline.correction.correction import Correction, features, start_logits
from pipeline.errors import DataError
from pipeline.seeds import permutation

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(4, -11, -1))  # λ, from 100 down to 1e-5
FOLDS = 5
MOST = 10_000  # labelled images that λ is chosen on; all of them are fitted to
PRIOR = 0.5  # of the mean loss of one image, times (a − 1)² / 2 and ‖b‖² / 2
ROUGH = {"maxiter": 2000, "gtol": 1e-5, "ftol": 1e-9}  # of L-BFGS
EXACT = {"maxiter": 2000, "gtol": 1e-7, "ftol": 1e-13}
PATIENCE = 3  # strengths in a row that are worse than the best before the search ends
Floats = NDArray[np.float64]


class Solution(NamedTuple):
    """Weight (r, C), bias (C,) and the scale of the start."""

    weight: Floats
    bias: Floats
    scale: float


@dataclass(frozen=True)
class Fit:
    """A fitted correction, and how its strength was chosen.

    Attributes:
        correction: of kind "fit".
        strength: λ.
        strengths: those that were tried, falling.
        nll: mean −log p of images that a fold left out, nats, at each of `strengths`.
        images: labelled images that it was fitted to.
        absent: classes without a labelled image.
    """

    correction: Correction
    strength: float
    strengths: tuple[float, ...]
    nll: tuple[float, ...]
    images: int
    absent: tuple[str, ...]


def fit_correction(
    q: NDArray[np.floating],
    labels: NDArray[np.int64],
    teacher_names: tuple[str, ...],
    class_names: tuple[str, ...],
    class_map: ClassMap | None = None,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Fit:
    """Fit to labelled images.

    Args:
        q: the teacher's distributions of n labelled images, (n, C_T).
        labels: (n,), from 0.
        teacher_names, class_names, class_map: see `Correction`.
        strengths: λ to choose from, falling; of one nothing is chosen.
        seed: of the folds.

    Raises:
        DataError: fewer than two images.
    """
    _require_images(labels)
    with threadpool_limits(1, "blas"):  # NumPy's threads and SciPy's wait for each other: twelve times as long on two
        return _fit(q, labels, Correction("fit", teacher_names, class_names, class_map), strengths, seed)


def _fit(
    q: NDArray[np.floating], labels: NDArray[np.int64], start: Correction, strengths: Sequence[float], seed: int
) -> Fit:
    z = start_logits(start._start(q))
    x = features(q)
    center = x.mean(axis=0)
    directions = np.linalg.svd(x - center, full_matrices=False)[2] if x.shape[1] > 1 else np.eye(1)
    rotated = (x - center) @ directions.T  # (n, r)
    present = np.unique(labels)
    tried, losses = list(strengths)[:1], [float("nan")]
    if len(strengths) > 1:
        some = permutation(len(labels), seed, "fit")[:MOST]
        tried, losses = _search(rotated[some], z[some], labels[some], strengths, seed)
    best = tried[int(np.nanargmin(losses))] if len(tried) > 1 else tried[0]
    weight, bias, scale = _solve(rotated, z, labels, best)
    whole = directions.T @ weight
    corrected = replace(start, weight=whole, bias=bias - center @ whole, scale=scale)
    absent = tuple(name for place, name in enumerate(start.class_names) if place not in present)
    return Fit(corrected, best, tuple(tried), tuple(losses), len(labels), absent)


def fit_scaling(
    q: NDArray[np.floating],
    labels: NDArray[np.int64],
    teacher_names: tuple[str, ...],
    class_names: tuple[str, ...],
    class_map: ClassMap | None = None,
) -> Correction:
    """Fit a and b alone, C + 1 numbers: where too few images are labelled for more, or the teacher's priors are wrong.

    Args: see `fit_correction`; there is a start, a map or equal classes.

    Raises:
        DataError: fewer than two images.
    """
    _require_images(labels)
    start = Correction("scaling", teacher_names, class_names, class_map)
    z = start_logits(start._start(q))
    _, bias, scale = _solve(np.empty((len(z), 0)), z, labels, 0.0)
    return replace(start, bias=bias, scale=scale)


def _require_images(labels: NDArray[np.int64]) -> None:
    if len(labels) < 2:
        raise DataError(
            f"a correction is fitted to labelled images that the teacher answered, and there are {len(labels)}"
        )


def _search(
    x: Floats, z: Floats, labels: NDArray[np.int64], strengths: Sequence[float], seed: int
) -> tuple[list[float], list[float]]:
    """Strengths tried, and the mean loss of left-out images at each."""
    fold = deal_to_folds(labels, FOLDS, seed)
    parts = [(fold != number, fold == number) for number in range(FOLDS) if (fold == number).any()]
    states: list[Solution | None] = [None] * len(parts)
    tried: list[float] = []
    losses: list[float] = []
    for strength in strengths:
        total = 0.0
        for number, (inside, outside) in enumerate(parts):
            state = _solve(x[inside], z[inside], labels[inside], strength, states[number], roughly=True)
            states[number] = state
            logits = x[outside] @ state.weight + state.scale * z[outside] + state.bias
            total += float(_losses(logits, labels[outside]).sum())
        tried.append(strength)
        losses.append(total / len(labels))
        if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
            break
    return tried, losses


def deal_to_folds(labels: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each image, (n,): those of a class are dealt out, to every fold as many, give or take one."""
    fold = np.empty(len(labels), np.int64)
    dealt = 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold[members[permutation(len(members), seed, "folds", int(label))]] = (dealt + np.arange(len(members))) % folds
        dealt += len(members)
    return fold


def _losses(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    top = logits.max(axis=1, keepdims=True)
    result: Floats = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return result


def _solve(
    x: Floats,
    z: Floats,
    labels: NDArray[np.int64],
    strength: float,
    state: Solution | None = None,
    *,
    roughly: bool = False,
) -> Solution:
    """The minimum; zero weight and bias for classes without an image.

    Args:
        x, z, labels, strength: see above.
        state: where to begin.
        roughly: as near as a choice of λ needs.
    """
    present = np.unique(labels)
    n, r, classes = len(labels), x.shape[1], z.shape[1]
    prior = PRIOR / n
    has_start = bool(np.ptp(z, axis=1).max() > 0)  # else a scale of it would change nothing
    one = np.zeros((n, classes))
    one[np.arange(n), labels] = 1.0
    # The directions are principal, so the curvature is near diagonal: in units of its root the problem is round
    unit = 1 / np.sqrt(np.square(x).mean(axis=0) / classes + strength)[:, None]  # (r, 1)

    def value(flat: Floats) -> tuple[float, Floats]:
        w, b = flat[: r * len(present)].reshape(r, len(present)) * unit, flat[r * len(present) : -1]
        logits = flat[-1] * z
        logits[:, present] += x @ w + b
        top = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - top)
        p /= p.sum(axis=1, keepdims=True)
        shift = flat[-1] - 1.0
        loss = _losses(logits, labels).mean() + strength / 2 * float((w * w).sum())
        loss += prior / 2 * (float(b @ b) + shift**2)
        difference = (p - one) / n
        of_scale = float((difference * z).sum()) + prior * shift if has_start else 0.0
        difference = difference[:, present]
        gradient = np.concatenate(
            [((x.T @ difference + strength * w) * unit).ravel(), difference.sum(axis=0) + prior * b, [of_scale]]
        )
        return float(loss), gradient

    state = state or Solution(np.zeros((r, classes)), np.zeros(classes), 1.0)
    begin = np.concatenate([(state.weight[:, present] / unit).ravel(), state.bias[present], [state.scale]])
    found = minimize(value, begin, jac=True, method="L-BFGS-B", options=ROUGH if roughly else EXACT)
    weight, bias = np.zeros((r, classes)), np.zeros(classes)
    weight[:, present] = found.x[: r * len(present)].reshape(r, len(present)) * unit
    bias[present] = found.x[r * len(present) : -1]
    return Solution(weight, bias, float(found.x[-1]))
