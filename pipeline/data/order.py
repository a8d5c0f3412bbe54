"""The order in which a run sees its images."""

from functools import lru_cache

import numpy as np

from pipeline.errors import DataError
from pipeline.seeds import permutation


def batch_indices(n: int, batch: int, seed: int, purpose: str, step: int) -> np.ndarray:
    """The images of one step: a pure function of the arguments.

    The order is one seeded permutation of range(n) after another, an epoch each; a step takes the next
    `batch` of that sequence, so an epoch's remainder is not lost and a batch may be larger than n.

    Returns:
        int64 (batch,), values in [0, n).
    """
    if n < 1 or batch < 1 or step < 0:
        raise DataError(f"a batch of {batch} from {n} images at step {step} cannot be drawn")
    start, stop = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = _epoch_order(n, seed, purpose, epoch)
        parts.append(order[max(start - epoch * n, 0) : stop - epoch * n])
    return np.concatenate(parts)


@lru_cache(maxsize=8)
def _epoch_order(n: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    return permutation(n, seed, "order", purpose, epoch)
