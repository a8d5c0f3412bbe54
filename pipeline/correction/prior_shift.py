"""Prior shift: the teacher learned from other shares of the classes than the pool has; its answers are reweighted.

Under prior shift p(x | y) stays, and a calibrated q becomes q′(y | x) ∝ q(y | x) · p_pool(y) / p_source(y): a bias in
log space. The pool's shares are estimated in two ways:

- `prior-em`: maximum likelihood on the pool's answers by expectation and maximisation (Saerens, Latinne and
  Decaestecker 2002, Neural Computation 14);
- `prior-bbse`: the shares that explain the pool's mean answer through the confusion matrix (Lipton, Wang and Smola
  2018, arXiv:1802.03916), soft, as least squares with shares ≥ 0, drawn toward those of the labelled images the more,
  the fewer there are (in the way of RLLS, Azizzadenesheli et al. 2019, arXiv:1903.09734).

Both need the shares that the teacher learned from, which a black box does not state. S, with S_ij the mean answer i
about images of class j, comes from the labelled images; a teacher whose answers are calibrated where it learned answers
its source's shares there on average, S p = p, and so they are S's stationary distribution. Only answers within a class
enter S: the labelled images' own shares do not, except as the shares that BBSE is drawn toward. Each column of S has
one more image, made of the pool's answers as they would be if they were right: a class without a labelled image is left
to the teacher, and without any labelled image nothing changes.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pipeline.correction.correction import Correction
from pipeline.errors import DataError

PriorKind = Literal["prior-em", "prior-bbse"]
OWN_IMAGES = 1.0  # images that the teacher's own account of each class counts as
LEAST = 1e-6  # share of a class, below which none is estimated
TOLERANCE = 1e-9  # of a share, between two rounds of EM
ROUNDS = 20_000  # of EM at most
Floats = NDArray[np.float64]


def fit_prior(
    kind: PriorKind,
    q: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    pool: NDArray[np.floating[Any]],
    start: Correction,
) -> Correction:
    """The reweighting of a teacher's answers for the pool's shares.

    Args:
        kind: how the pool's shares are estimated.
        q: distributions of n labelled images, (n, C_T).
        labels: (n,), from 0.
        pool: distributions of m pool images, (m, C_T).
        start: what makes distributions over the data set's classes of them: the identity, or a map.

    Raises:
        DataError: there is no pool image, or fewer than two labelled ones.
    """
    if not len(pool) or len(labels) < 2:
        raise DataError(
            f"prior shift is estimated from the pool and labelled images, and the teacher answered {len(pool):,} and "
            f"{len(labels):,} of them"
        )
    ours, theirs = start.targets(pool).astype(np.float64), start.targets(q).astype(np.float64)
    confusion = mean_answers(theirs, labels, ours)
    source = stationary(confusion)
    if kind == "prior-em":
        shares = shares_by_em(ours, source)
    else:
        held = np.bincount(labels, minlength=ours.shape[1]) / len(labels)
        shares = shares_by_confusion(confusion, ours.mean(axis=0), held, 1 / len(labels))
    bias = np.log(np.maximum(shares, LEAST)) - np.log(np.maximum(source, LEAST))
    return Correction(kind, start.teacher_names, start.class_names, start.class_map, bias=bias - bias.mean())


def mean_answers(q: Floats, labels: NDArray[np.int64], pool: Floats) -> Floats:
    """S (C, C): column j is the mean answer about images of class j; columns sum to 1.

    Args:
        q, labels: of labelled images, (n, C) and (n,).
        pool: (m, C), of which the additional image of each column is made.
    """
    own = pool.T @ pool  # column j: the mean answer, each image counted as q_j says
    own = own / np.maximum(own.sum(axis=0), np.finfo(np.float64).tiny)
    one = np.eye(pool.shape[1])[labels]  # (n, C)
    result: Floats = q.T @ one + OWN_IMAGES * own
    return result / result.sum(axis=0)


def stationary(confusion: Floats) -> Floats:
    """p (C,) ≥ 0 with S p = p and sum 1, of a matrix (C, C) with columns that sum to 1."""
    classes = len(confusion)
    system = np.concatenate([confusion - np.eye(classes), np.ones((1, classes))])
    found = np.linalg.lstsq(system, np.append(np.zeros(classes), 1.0), rcond=None)[0]
    result: Floats = np.maximum(found, 0.0)
    return result / result.sum()


def shares_by_em(q: Floats, source: Floats) -> Floats:
    """Shares (C,) that make answers (m, C) of a teacher that learned from shares `source` (C,) most likely.

    Maximises the mean of log Σ_y p_y q_y / source_y over the simplex, where it is concave.
    """
    likelihood = q / np.maximum(source, LEAST)
    shares = np.full(q.shape[1], 1.0 / q.shape[1])
    for _ in range(ROUNDS):
        weighed = likelihood * shares
        new = (weighed / weighed.sum(axis=1, keepdims=True)).mean(axis=0)
        moved, shares = float(np.abs(new - shares).max()), new
        if moved < TOLERANCE:
            break
    return shares


def shares_by_confusion(confusion: Floats, mean: Floats, held: Floats, strength: float) -> Floats:
    """Shares p (C,) ≥ 0, sum 1, that minimise ‖S p − mean‖² + strength · ‖p − held‖².

    Args:
        confusion: S, (C, C).
        mean: answer about the pool, (C,).
        held: shares that p is drawn toward, (C,).
        strength: 0: nothing is drawn.
    """
    classes, root = len(mean), np.sqrt(strength)
    heavy = 1e4  # of the row that says that the shares sum to 1
    system = np.concatenate([confusion, root * np.eye(classes), heavy * np.ones((1, classes))])
    shares = nnls(system, np.concatenate([mean, root * held, [heavy]]))[0]
    result: Floats = shares / shares.sum()
    return result
