"""Dense rows of numbers in Arrow and Parquet: fixed-size binary values, moved without a copy per row."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import RunError
from pipeline.storage.files import Location, opened


def require_absence(place: Location, error: Exception) -> None:
    """Pass where the error of a reader means that there is no file, or none that is whole.

    Raises:
        RunError: it means that nobody knows: the place cannot be reached just now, or may not be read.
    """
    absent = isinstance(error, FileNotFoundError | NotADirectoryError | pa.ArrowInvalid)
    parsed = type(error) is OSError and error.errno is None  # Arrow's, of bytes that it was given
    if not absent and not parsed:
        raise RunError(f"{place} cannot be reached ({error}); run the same command again") from error


@contextmanager
def open_parquet(place: Location, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file on disk or in object storage; `options` of `pyarrow.parquet.ParquetFile`.

    Raises:
        OSError: it is not there, or cannot be read; also inside the `with`.
        pa.ArrowInvalid: it is cut short, or no Parquet file.
    """
    if isinstance(place, Path):
        with pq.ParquetFile(place, **options) as file:
            yield file
    else:
        with opened(place, random=True) as stream, pq.ParquetFile(stream, pre_buffer=True, **options) as file:
            yield file


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
