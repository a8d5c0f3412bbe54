"""A batch taken in parts, for memory; the mean over the batch is the sum of the parts' means times their shares."""

from itertools import pairwise
from typing import NamedTuple


class MicroBatch(NamedTuple):
    """Consecutive rows of a batch, and the share of all rows that they are."""

    rows: slice
    share: float


def micro_batches(rows: int, parts: int) -> list[MicroBatch]:
    """`rows` cut into `parts` runs that differ by one row at most; fewer runs where there are fewer rows."""
    ends = [rows * i // parts for i in range(parts + 1)]
    return [MicroBatch(slice(a, b), (b - a) / rows) for a, b in pairwise(ends) if b > a]
