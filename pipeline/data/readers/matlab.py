"""MATLAB's format 5, as far as arrays of numbers go, read as a stream.

`scipy.io.loadmat` holds a whole variable in memory: 1.6 GB for SVHN's `extra`. An array lies in the file in
column-major order, so the last index of (32, 32, 3, N) is outermost and images follow one another; here they are
inflated as they are asked for.

Source: "MAT-File Format", The MathWorks: a header of 128 bytes, then elements of an 8-byte tag (type, bytes) and data,
padded to 8 bytes; a matrix is an element of elements: flags, dimensions, name, numbers; `miCOMPRESSED` is a zlib
stream of one element.
"""

import io
import math
import struct
import zlib
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from pipeline.errors import DataError

MATRIX, COMPRESSED = 14, 15
DTYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
NUMERIC = range(6, 16)  # classes of arrays of numbers
SMALL = 1 << 10  # bytes: no name or list of dimensions is longer
CHUNK = 1 << 18  # bytes of compressed data at a time


@dataclass
class Variable:
    """An array of numbers, and the stream of them in column-major order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: IO[bytes]
    inflated: bool = False
    """Whether the stream ends with this variable, and with a checksum."""
    left: int = field(init=False)  # bytes

    def __post_init__(self) -> None:
        self.left = math.prod(self.shape) * self.dtype.itemsize

    def read(self, count: int) -> np.ndarray:
        """The next `count` numbers, flat; with the last of them the checksum of a compressed variable is verified.

        Raises:
            DataError: the file ends before, or was altered.
        """
        return np.frombuffer(self._take(count * self.dtype.itemsize), self.dtype)

    def skip(self, count: int) -> None:
        """Pass over so many numbers."""
        size = count * self.dtype.itemsize
        for start in range(0, size, CHUNK):
            self._take(min(CHUNK, size - start))

    def _take(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise DataError(f"variable {self.name} ends early")
        self.left -= size
        if not self.left and self.inflated:
            self.stream.read(CHUNK)  # at most the padding
        return data


def find_variable(file: IO[bytes], name: str) -> Variable:
    """The array `name`; other variables are sought past, not inflated.

    Raises:
        DataError: there is none of that name and kind, or this is no little-endian file of format 5.
    """
    header = file.read(128)
    if len(header) < 128 or header[124:128] != b"\x00\x01IM":
        description = "HDF5: save it with '-v7'" if header.startswith(b"MATLAB 7.3") else "another format"
        raise DataError(f"only MATLAB's format 5, little-endian, can be read, and this is {description}")
    while tag := file.read(8):
        kind, size = _unpack(tag)
        start = file.tell()
        if kind == COMPRESSED:
            stream: IO[bytes] = io.BufferedReader(_Inflated(file, size), CHUNK)
            kind, _ = _unpack(stream.read(8))
        else:
            stream = file
        if kind == MATRIX and (variable := _matrix(stream, stream is not file)) is not None and variable.name == name:
            return variable
        file.seek(start + size + (0 if stream is not file else -size % 8))
    raise DataError(f"there is no array of numbers {name!r} in it")


def _matrix(stream: IO[bytes], inflated: bool) -> Variable | None:
    """The start of a matrix, up to its numbers; None for cells, objects, sparse and other kinds."""
    flags = _element(stream)
    if len(flags) < 4 or flags[0] not in NUMERIC:
        return None
    shape = tuple(np.frombuffer(_element(stream), "<i4").tolist())
    name = _element(stream).decode("ascii", "replace")
    kind, size, small = _tag(stream)
    if kind not in DTYPES:
        return None
    dtype = np.dtype(DTYPES[kind])
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != size:
        raise DataError(f"variable {name} has the shape {shape} and {size:,} bytes, which do not agree")
    return Variable(name, shape, dtype, stream if small is None else io.BytesIO(small), inflated and small is None)


def _element(stream: IO[bytes]) -> bytes:
    """A short element whole."""
    _, size, small = _tag(stream)
    if small is not None:
        return small
    if size > SMALL:
        raise DataError(f"a name or a list of dimensions of {size:,} bytes is not possible")
    return stream.read(size + -size % 8)[:size]


def _tag(stream: IO[bytes]) -> tuple[int, int, bytes | None]:
    """Type, bytes, and the data itself where it is so short that it lies in the tag."""
    tag = stream.read(8)
    kind, size = _unpack(tag)
    if kind >> 16:
        return kind & 0xFFFF, kind >> 16, tag[4 : 4 + (kind >> 16)]
    return kind, size, None


def _unpack(tag: bytes) -> tuple[int, int]:
    if len(tag) < 8:
        raise DataError("it was cut short")
    kind, size = struct.unpack("<II", tag)
    return kind, size


class _Inflated(io.RawIOBase):
    """The content of a zlib stream of `size` bytes, in bounded memory."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size
        self.inflater = zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self.inflater.eof:
            source = self.inflater.unconsumed_tail or self.file.read(min(CHUNK, self.left))
            if not self.inflater.unconsumed_tail:
                self.left -= len(source)
            if not source:
                raise DataError("it was cut short")
            if data := self.inflater.decompress(source, len(buffer)):
                buffer[: len(data)] = data
                return len(data)
        return 0
