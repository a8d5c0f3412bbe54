"""Pool images whose labels would tell a network most: unsure of them, and unlike each other.

BADGE (J. Ash et al., Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds, ICLR 2020,
arXiv:1906.03671): the gradient of the last layer, were the most probable class the label, is (p − 1_argmax) ⊗ x; its
length says how unsure the network is, and k-means++ on it chooses a batch that is long and spread. Three things are
added. Zero is a centre from the start: an image that the network is certain of would else be chosen for being unlike
all others. Where the teacher sees an image otherwise than the student, the gradient is longer, and so it is in classes
that have few labels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
SHORT = 4.0  # times, at most, that an image of a class short of labels counts more


def disagreement(distributions: Sequence[Floats]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence of several distributions (n, C) of n images, as a share of its maximum, (n,)."""
    stacked = np.stack([p.astype(np.float64) for p in distributions])  # (m, n, C)
    mean = stacked.mean(axis=0)
    most = np.log(min(len(stacked), stacked.shape[2])) if len(stacked) > 1 else 1.0
    result: NDArray[np.float64] = np.maximum(_entropy(mean) - _entropy(stacked).mean(axis=0), 0) / most
    return result


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1)
    return result


def shortness(labelled: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """How much an image of each class counts, (C,): 1 where there are as many labels as on average, up to 4 for fewer.

    Args:
        labelled: labels of the labelled images, (l,).
        classes: C.
    """
    counts = np.bincount(labelled, minlength=classes)
    return np.clip((counts.mean() + 1) / (counts + 1), 1 / SHORT, SHORT)


def like_the_labelled(features: Floats, labelled: Floats) -> NDArray[np.bool_]:
    """Which of n images are as like a labelled one as each labelled one is like another, (n,).

    By the cosine of what a network's last layer sees. An image that is not is of no class, or of a kind that has no
    label yet. Of fewer than two labelled images nothing is known, and all are.

    Args:
        features: (n, D).
        labelled: of the labelled images, (l, D).
    """
    if len(labelled) < 2:
        return np.ones(len(features), bool)
    x, own = _unit(features), _unit(labelled)
    among = own @ own.T
    np.fill_diagonal(among, -np.inf)
    result: NDArray[np.bool_] = (x @ own.T).max(axis=1) >= among.max(axis=1).min()
    return result


def _unit(x: Floats) -> NDArray[np.float64]:
    values = x.astype(np.float64)
    result: NDArray[np.float64] = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return result


def choose(p: Floats, features: Floats, importance: Floats, count: int, seed: int) -> NDArray[np.int64]:
    """`count` of n images, in the order in which they were chosen, (count,).

    Args:
        p: the network's distributions, (n, C).
        features: what its last layer sees, (n, D).
        importance: a factor of each gradient, (n,).
        count: at most n.
        seed: of k-means++.
    """
    a = p.astype(np.float64)
    a[np.arange(len(a)), a.argmax(axis=1)] -= 1.0
    a *= importance[:, None]
    x = features.astype(np.float64)
    lengths = (a**2).sum(axis=1) * (x**2).sum(axis=1)  # of a ⊗ x, squared
    random = np.random.default_rng(seed)
    chosen = [int(lengths.argmax())]
    apart = lengths.copy()
    while len(chosen) < min(count, len(a)):
        last = chosen[-1]
        inner = (a @ a[last]) * (x @ x[last])
        apart = np.minimum(apart, np.maximum(lengths + lengths[last] - 2 * inner, 0))
        apart[chosen] = 0
        total = apart.sum()
        if total <= 0:  # all that is left is alike
            rest = np.setdiff1d(np.arange(len(a)), chosen)
            chosen.append(int(rest[random.integers(len(rest))]))
            continue
        chosen.append(int(random.choice(len(a), p=apart / total)))
    return np.array(chosen, np.int64)
