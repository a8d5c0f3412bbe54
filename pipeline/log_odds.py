"""Log-odds and distributions: what scores are kept as, and what they mean."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError

LIMIT = 104.0  # nats: the smallest positive float32 is e**-103.3, so further out a probability is 0 or 1


def distributions(values: NDArray[Any]) -> NDArray[np.float64]:
    """Distributions (n, C) whose rows sum to 1, from log-odds (n, C) in nats."""
    x = values.astype(np.float64)
    small = np.exp(-np.abs(x))
    p = np.where(x >= 0, 1.0, small) / (1.0 + small)  # a sigmoid that never overflows
    result: NDArray[np.float64] = p / p.sum(axis=1, keepdims=True)
    return result


def log_odds(logits: Tensor) -> Tensor:
    """z_c - logsumexp of the other logits, nats: float32 (B, C), computed in float64.

    Of the highest logit the others are summed by themselves: 1 - p would cancel. A row with a NaN or an
    infinite logit becomes NaN as a whole.
    """
    if logits.shape[1] < 2:
        raise DataError(f"log-odds need at least 2 classes, found {logits.shape[1]}")
    logits = logits.detach()
    z = (logits.cpu() if logits.device.type == "mps" else logits).double()  # (B, C)
    finite = torch.isfinite(z).all(dim=1, keepdim=True)
    z = torch.where(finite, z, 0.0)
    top, at = z.max(dim=1, keepdim=True)  # (B, 1)
    weights = torch.exp(z - top)
    others = top + torch.log(weights.sum(dim=1, keepdim=True) - weights)  # right except for the highest
    rest = z.scatter(1, at, -torch.inf).logsumexp(dim=1, keepdim=True)
    result = z - others.scatter(1, at, rest)
    return torch.where(finite, result, torch.nan).float()


def log_odds_of_shares(p: NDArray[Any]) -> NDArray[np.float32]:
    """log p_c − log of all the rest, nats: float32 (n, C), from shares (n, C) ≥ 0 with a positive sum, C ≥ 2.

    A last column that is no class, such as what belongs to none, counts with the rest. Certainty is ±104 nats.
    """
    weights = p.astype(np.float64)
    rows, top = np.arange(len(weights)), weights.argmax(axis=1)
    highest = weights[rows, top]
    weights[rows, top] = 0.0
    rest = weights.sum(axis=1)
    others = highest[:, None] + rest[:, None] - weights
    weights[rows, top], others[rows, top] = highest, rest
    with np.errstate(divide="ignore"):
        result = np.log(weights) - np.log(others)
    return np.clip(result, -LIMIT, LIMIT).astype(np.float32)
