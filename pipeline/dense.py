"""Dense rows of numbers in Arrow and Parquet: fixed-size binary values, moved without a copy per row."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def fixed_binary(values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> pa.Array:
    """(n, C) numbers as n fixed-size binary values; rows that are not valid, (n,), become null."""
    width = values.shape[1] * values.dtype.itemsize
    data = np.ascontiguousarray(values if valid is None else np.where(valid[:, None], values, 0), values.dtype)
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little").tobytes())
    return pa.Array.from_buffers(pa.binary(width), len(values), [bits, pa.py_buffer(data)])


def fixed_numbers(array: pa.Array, dtype: str) -> NDArray[Any]:
    """Fixed-size binary values as read-only numbers (n, C) of little-endian `dtype`; nulls are arbitrary."""
    columns = array.type.byte_width // np.dtype(dtype).itemsize
    if len(array) == 0:
        return np.empty((0, columns), dtype)
    flat = np.frombuffer(array.buffers()[1], dtype)
    return flat[array.offset * columns : (array.offset + len(array)) * columns].reshape(-1, columns)
