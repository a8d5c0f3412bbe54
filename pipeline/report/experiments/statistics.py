"""Means over seeds and paired differences between methods."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

K = TypeVar("K", bound=Hashable)
ROUNDING = 1e-12  # of the values: equal differences of percentages are equal up to this


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

    Interval and p are None for one seed, and where all differences are equal: both are judged by their spread.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.2f} (n = {self.n}{', all equal' if self.n > 1 else ''}: no interval)"
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
    if np.ptp(difference) <= ROUNDING * np.max(np.abs([a, b])):  # two seeds, one test image each, are no evidence
        return PairedDifference(n, mean, None, None, None)
    error = float(np.std(difference, ddof=1)) / np.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return PairedDifference(n, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: one below α stands with all tests together at level α.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def holm_adjusted(differences: Mapping[K, PairedDifference]) -> dict[K, float]:
    """Holm's p of each difference; one that cannot be judged counts as p = 1."""
    p_values = [1.0 if difference.p is None else difference.p for difference in differences.values()]
    return dict(zip(differences, holm(p_values), strict=True))
