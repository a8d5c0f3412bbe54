"""Stored distributions to float32 rows that sum to 1."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.storage.tables import fixed_numbers
from pipeline.targets.layout import ITEM, Dtype

BLOCK = 1 << 17  # numbers that stay in the processor's cache between the passes over them


def stored_rows(column: pa.Array, dtype: Dtype) -> NDArray[Any]:
    """The numbers as they lie in the store, read only, (n, C), of `dtype`."""
    return fixed_numbers(column, ITEM[dtype])


def normalised(stored: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Float32 rows that sum to 1, (n, C): float16 rows do so only nearly.

    Args:
        stored: float16 or float32 rows, (n, C).
        out: gets the result, where it is given.
    """
    result = np.empty(stored.shape, np.float32) if out is None else out
    step = max(1, BLOCK // max(stored.shape[1], 1))
    half = np.empty((min(step, len(stored)), stored.shape[1]), np.float16)
    for begin in range(0, len(stored), step):
        rows, block = stored[begin : begin + step], result[begin : begin + step]
        if stored.dtype == np.float16:
            # torch has the processor convert float16, NumPy takes 30 times as long; a copy, as torch wants to write.
            np.copyto(half[: len(rows)], rows)
            torch.from_numpy(block).copy_(torch.from_numpy(half[: len(rows)]))
        else:
            np.copyto(block, rows)
        block /= block.sum(axis=1, keepdims=True)
    return result
