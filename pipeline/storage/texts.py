"""Hashes of texts, many at a time."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; 2**64 divided by the golden ratio


def hash_texts(texts: pa.Array) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of each text, twice: (n, 2), words as `find_repeats` takes them.

    For counting texts that occur twice: two of a hundred million collide with probability 3e-4.
    """
    large = texts.cast(pa.large_binary())
    ends = np.frombuffer(large.buffers()[1], np.int64)[large.offset : large.offset + len(large) + 1]
    lengths = np.diff(ends)
    data = np.frombuffer(large.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    longest = int(lengths.max(initial=0))
    powers = np.cumprod(np.full(longest + 1, MULTIPLIER, np.uint64))
    place = np.arange(len(data)) - np.repeat(ends[:-1] - ends[0], lengths)
    terms = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[place], out=terms[1:])
    value = terms[ends[1:] - ends[0]] - terms[ends[:-1] - ends[0]]
    value = (value ^ (value >> np.uint64(32))) * MULTIPLIER  # the sum's low bits are weak
    return np.stack([value, value], axis=1)
