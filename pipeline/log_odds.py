"""Log-odds and distributions: what scores are kept as, and what they mean."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 104.0  # nats: the smallest positive float32 is e**-103.3, so further out a probability is 0 or 1


def distributions(values: NDArray[Any]) -> NDArray[np.float64]:
    """Distributions (n, C) whose rows sum to 1, from log-odds (n, C) in nats."""
    x = values.astype(np.float64)
    small = np.exp(-np.abs(x))
    p = np.where(x >= 0, 1.0, small) / (1.0 + small)  # a sigmoid that never overflows
    result: NDArray[np.float64] = p / p.sum(axis=1, keepdims=True)
    return result


def log_odds_of_logits(logits: NDArray[Any]) -> NDArray[np.float32]:
    """z_c − logsumexp of the other logits, nats: float32 (n, C), computed in float64; finite logits (n, C), C ≥ 2.

    Of the highest logit the others are summed by themselves: 1 − p would cancel.
    """
    z = logits.astype(np.float64)
    weights = np.exp(z - z.max(axis=1, keepdims=True))
    return _log_odds(weights)


def log_odds_of_shares(p: NDArray[Any]) -> NDArray[np.float32]:
    """log p_c − log of all the rest, nats: float32 (n, C), from shares (n, C) ≥ 0 with a positive sum, C ≥ 2.

    A last column that is no class, such as what belongs to none, counts with the rest. Certainty is ±104 nats.
    """
    return _log_odds(p.astype(np.float64))


def _log_odds(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    rows, top = np.arange(len(weights)), weights.argmax(axis=1)
    highest = weights[rows, top]
    weights[rows, top] = 0.0
    rest = weights.sum(axis=1)
    others = highest[:, None] + rest[:, None] - weights
    weights[rows, top], others[rows, top] = highest, rest
    with np.errstate(divide="ignore"):
        result = np.log(weights) - np.log(others)
    return np.clip(result, -LIMIT, LIMIT).astype(np.float32)
