"""Means over seeds and paired differences between methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n − 1) over n seeds; the deviation is None for one seed."""

    n: int
    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a − b over n seeds, with its two-sided 95% interval and p of the paired t-test.

    Interval and p are None for one seed, and p is None where all differences are equal.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.2f} (n = {self.n}: no interval)"
        p = "" if self.p is None else ", p < 0.001" if self.p < 0.001 else f", p = {self.p:.3f}"
        verdict = "" if self.p is None or self.p < 0.05 else "; no significant difference"
        return f"{self.mean:+.2f}, 95% interval [{self.low:+.2f}, {self.high:+.2f}]{p}, n = {self.n}{verdict}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean ± standard deviation."""
    return Summary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """a − b, pair by pair (one pair a seed).

    Raises:
        ValueError: the two have not as many values.
    """
    difference = np.subtract(a, b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: pairs are needed")
    n, mean = len(difference), float(np.mean(difference))
    if n < 2:
        return PairedDifference(n, mean, None, None, None)
    error = float(np.std(difference, ddof=1)) / np.sqrt(n)
    if error == 0:
        return PairedDifference(n, mean, mean, mean, None)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return PairedDifference(n, mean, mean - half, mean + half, p)
